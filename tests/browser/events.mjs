// Reads a stream of events at every split in two, and prints the events of each as JSON.
import { createParser } from "eventsource-parser";

const chunks = [];
for await (const chunk of process.stdin) chunks.push(chunk);
const whole = Buffer.concat(chunks);

function events(pieces) {
  const found = [];
  const parser = createParser({ onEvent: (event) => found.push([event.event ?? null, event.data]) });
  const decoder = new TextDecoder();
  for (const piece of pieces) parser.feed(decoder.decode(piece, { stream: true }));
  return JSON.stringify(found);
}

const seen = new Set();
for (let at = 0; at <= whole.length; at += 1)
  seen.add(events([whole.subarray(0, at), whole.subarray(at)]));
console.log(JSON.stringify([...seen].map((found) => JSON.parse(found))));
