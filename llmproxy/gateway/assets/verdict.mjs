// What a run of the paced stream says about the way between: words for what was seen, and what to change.
//
// Nothing here knows a page or a network.  `verdict(run)` takes:
//   asked     {n, interval_ms, bytes, silence_ms}
//   status    of the response, or 0 where there was none; `problem` then says why
//   fields    header fields of the response by their names in lower case
//   request   what reached llmproxy of the request: its version, and fields that hops add; may be empty
//   is_paced  the body is a paced stream
//   events    [{n, sent_ms, at_ms}]: by the far end's clock, and by ours from the request on
//   reads     [{at_ms, bytes}]: the pieces in which the body came
//   end       "complete", "broken" or "stopped" (by the reader), at end_ms; head_ms: when the head came
// and returns {word, title, sentences, advice, figures}.

const ENOUGH_EVENTS = 4; // fewer say nothing of how they are held
const ENOUGH_MS = 400; // a shorter stream neither
const LATE_MS = 100; // what a network may do without anybody holding anything
const LIMITS_S = [5, 10, 15, 20, 30, 45, 60, 75, 90, 100, 120, 180, 240, 300, 350, 600];

export function verdict(run) {
  const found = { word: "", title: "", sentences: [], advice: [], figures: null };
  if (!run.status) return unanswered(found, run);
  if (run.status !== 200) return refused(found, run);
  if (!run.is_paced) {
    const text = "What responds there is not llmproxy, or a hop responds in its place.";
    return told(found, "other", "The response is no paced stream.", [text]);
  }
  found.figures = figures(run);
  const whole = run.end === "complete" && run.events.length === run.asked.n;
  if (!whole && run.end !== "stopped") cut(found, run);
  held(found, run);
  const coding = codingOf(run);
  if (coding) compressed(found, run, coding);
  if (!found.word) streams(found, run);
  advise(found, run);
  return found;
}

// -- what is measured -------------------------------------------------------------------------------

export function figures(run) {
  // The last event is left out where the end came with it: whoever holds anything lets it go then.
  const last = run.end === "complete" ? run.asked.n : -1;
  const seen = run.events.filter((event) => event.n !== last);
  if (!seen.length) return { seen, delays: [], span_ms: 0, spread_ms: 0, late_ms: 0, groups: [] };
  const ages = seen.map((event) => event.at_ms - event.sent_ms);
  const quickest = ages.reduce((least, age) => Math.min(least, age), Infinity);
  const delays = ages.map((age) => age - quickest);
  const first = seen[0];
  const final = seen[seen.length - 1];
  return {
    seen,
    delays,
    span_ms: final.sent_ms - first.sent_ms,
    spread_ms: final.at_ms - first.at_ms,
    late_ms: delays.reduce((most, delay) => Math.max(most, delay), 0),
    groups: groupsOf(run),
  };
}

function groupsOf(run) {
  const apart = Math.max(5, Math.min(50, run.asked.interval_ms / 4));
  const groups = [];
  let before = -Infinity;
  for (const read of run.reads) {
    if (read.at_ms - before > apart) groups.push({ at_ms: read.at_ms, bytes: 0 });
    groups[groups.length - 1].bytes += read.bytes;
    before = read.at_ms;
  }
  return groups;
}

// -- what is said of it -----------------------------------------------------------------------------

function held(found, run) {
  const { seen, delays, span_ms, spread_ms, late_ms, groups } = found.figures;
  if (seen.length < ENOUGH_EVENTS - 1 || span_ms < ENOUGH_MS) return;
  const isHeld = delays.map((delay) => delay > Math.max(LATE_MS, run.asked.interval_ms * 0.6));
  const count = isHeld.filter(Boolean).length;
  if (spread_ms <= Math.max(LATE_MS / 2, span_ms / 10) && late_ms > span_ms * 0.8) {
    if (found.word) {
      found.sentences.push("What came before that came all at once.");
      found.held = true;
      return;
    }
    const all = run.events;
    const lasted = all[all.length - 1].sent_ms - all[0].sent_ms;
    const sent = `${all.length} events were sent over ${seconds(lasted)}`;
    told(found, "held_to_end", "Held until the end.", [
      `${sent}, and all of them arrived together, when the last one was sent.`,
      "A hop between here and llmproxy collects the whole response before it passes it on.",
    ]);
    found.held = true;
    return;
  }
  const firstFree = isHeld.indexOf(false);
  const together = seen.filter((event) => event.at_ms - seen[0].at_ms <= LATE_MS / 2).length;
  const isFree = firstFree >= 3 && count <= firstFree + seen.length / 10;
  if (isFree && seen.length - together >= ENOUGH_EVENTS) {
    const size = groups.length ? groups[0].bytes : 0;
    const text = `The first ${together} events arrived together, ${seconds(delays[0])} late; the others came as they were sent.`;
    begin(found, "held_at_first", `The first ${bytes(size)} are held back.`, [text]);
    found.size = size;
    found.held = true;
    return;
  }
  if (count < seen.length / 4) return;
  const size = usualSize(groups.slice(0, -1));
  const blocks = groups.slice(0, -1).filter((group) => group.bytes >= size / 2);
  const apart = median(blocks.slice(1).map((group, index) => group.at_ms - blocks[index].at_ms));
  const every = blocks.length > 1 ? `, one every ${seconds(apart)}` : "";
  begin(found, "held_in_blocks", `Held in blocks of ${bytes(size)}.`, [
    `The events arrived in ${blocks.length + 1} blocks${every}; the latest was ${seconds(late_ms)} late.`,
    "A hop between here and llmproxy collects bytes before it passes them on.",
  ]);
  found.size = size;
  found.held = true;
}

function cut(found, run) {
  const { seen } = found.figures;
  const got = `${run.events.length} of ${run.asked.n} events arrived.`;
  const lastAt = seen.length ? run.events[run.events.length - 1].at_ms : 0;
  const silent = run.end_ms - lastAt;
  const how = run.end === "complete" ? "It ended as if it were whole, so that a client does not notice." : "";
  if (!seen.length) {
    const text = "No event had arrived by then: a hop held all of them, and gave up.";
    told(found, "cut", `Cut ${seconds(run.end_ms)} after the request.`, [text, how]);
  } else if (silent > Math.max(3 * run.asked.interval_ms, 1000)) {
    told(found, "cut", `Cut after ${seconds(silent)} of silence.`, [got, limit(silent), how]);
    found.idle = true;
  } else {
    const title = `Cut ${seconds(run.end_ms)} after the request, while events came.`;
    told(found, "cut", title, [got, limit(run.end_ms), how]);
  }
}

function compressed(found, run, coding) {
  found.coding = coding;
  const title = `Compressed with ${coding}.`;
  if (found.word) {
    found.sentences.push(`It is compressed with ${coding}, too, which llmproxy does not do.`);
    return;
  }
  told(found, "compressed", title, [
    "It streams all the same: the hop that compresses passes each event on at once.",
    "With another client or other events it may not. llmproxy asks for no-transform.",
  ]);
}

function streams(found, run) {
  const { seen, span_ms, late_ms } = found.figures;
  if (seen.length < ENOUGH_EVENTS - 1 || span_ms < ENOUGH_MS) {
    const text = "Ask for more events, or a longer interval, to see whether they are held back.";
    told(found, "too_short", "Too short to tell.", [text]);
    return;
  }
  const text = `Each event arrived as it was sent; the latest was ${seconds(late_ms)} later than the quickest.`;
  told(found, "streams", "It streams.", [text]);
  if (run.end === "stopped") found.sentences.push("That holds for what came before it was stopped.");
  if (run.asked.silence_ms) {
    found.sentences.push(`A silence of ${seconds(run.asked.silence_ms)} was not cut.`);
  }
}

function unanswered(found, run) {
  if (run.end === "stopped") {
    const text = "Not even the head of the response had come by then.";
    return told(found, "unreachable", `Stopped after ${seconds(run.end_ms)}.`, [text]);
  }
  const text = "If that took long, a hop may have held the whole response, and given up.";
  const title = `No response came within ${seconds(run.end_ms)}.`;
  return told(found, "unreachable", title, [run.problem || "", run.end_ms > 1000 ? text : ""]);
}

function refused(found, run) {
  const title = `Refused with status ${run.status}.`;
  const text = {
    401: "A hop in front of llmproxy asks for a key of its own.",
    403: "A hop in front of llmproxy lets nobody pass here.",
    404: "What responds there does not know this path.",
    426: "A hop speaks HTTP/1.0 to one that does not: with nginx, set proxy_http_version 1.1.",
    429: "A limit of the client is reached.",
  }[run.status];
  return told(found, "refused", title, [run.problem || text || ""]);
}

function told(found, word, title, sentences) {
  Object.assign(found, { word, title });
  found.sentences.push(...sentences.filter(Boolean));
  return found;
}

function begin(found, word, title, sentences) {
  if (found.word) found.sentences.push(title, ...sentences);
  else told(found, word, title, sentences);
}

function limit(milliseconds) {
  const near = LIMITS_S.find((one) => Math.abs(milliseconds / 1000 - one) <= 0.35 + one * 0.02);
  return near ? `That looks like a limit of ${near} s.` : "";
}

// -- what to change ---------------------------------------------------------------------------------

// How each hop is known by what it writes into a response (`fields`) or adds to a request (`asked`), and
// which line of it to change.
const HOPS = [
  {
    name: "nginx",
    known: (fields) => /nginx|openresty/i.test(fields.server || ""),
    held: "proxy_buffering off; in its location (it ignores our X-Accel-Buffering if proxy_ignore_headers says so)",
    coding: "gzip off; in its location, or no text/event-stream in gzip_types",
    cut: "proxy_read_timeout 1h; and proxy_send_timeout 1h; in its location",
  },
  {
    name: "Caddy",
    known: (fields) => /caddy/i.test(`${fields.server || ""} ${fields.via || ""}`),
    held: "no response_buffers (2.6: buffer_responses) in reverse_proxy",
    coding: "leave text/event-stream out of encode (match)",
    cut: "read_timeout 1h in the transport of reverse_proxy",
  },
  {
    name: "Envoy",
    known: (fields, asked) => /envoy/i.test(fields.server || "") || [...Object.keys(fields), ...Object.keys(asked)].some((name) => name.startsWith("x-envoy-")),
    held: "no buffer filter on the route",
    coding: "leave text/event-stream out of the compressor's content_type",
    cut: "timeout: 0s on the route (15 s by default), and a stream_idle_timeout that is long enough",
  },
  {
    name: "Varnish",
    known: (fields, asked) => "x-varnish" in fields || "x-varnish" in asked || /varnish/i.test(fields.via || ""),
    held: "set beresp.do_stream = true; in vcl_backend_response",
    coding: "set beresp.do_gzip = false; in vcl_backend_response",
    cut: "between_bytes_timeout of the backend, 60 s by default",
  },
  {
    name: "Apache",
    known: (fields, asked) => /apache/i.test(fields.server || "") || ("x-forwarded-server" in asked && !("x-forwarded-port" in asked)),
    held: "flushpackets=on on ProxyPass",
    coding: "SetEnv no-gzip 1 for the location",
    cut: "timeout=3600 on ProxyPass",
  },
  {
    name: "Traefik", // it writes nothing into responses
    known: (fields, asked) => "x-forwarded-server" in asked && "x-forwarded-port" in asked,
    held: "no buffering middleware on the router",
    coding: "excludedContentTypes with text/event-stream in the compress middleware",
    cut: "writeTimeout = 0 in respondingTimeouts of the entry point",
  },
  {
    name: "Cloudflare",
    known: (fields, asked) => "cf-ray" in fields || "cf-ray" in asked || /cloudflare/i.test(fields.server || ""),
    held: "a rule that turns response buffering and transformations off for the path",
    coding: "a compression rule that leaves the path out",
    cut: "a heartbeat: it waits about 100 s for a byte",
  },
  {
    name: "HAProxy",
    known: () => false, // it names itself nowhere
    held: "option http-no-delay",
    coding: "no text/event-stream in compression type",
    cut: "timeout server 1h and timeout client 1h",
  },
];

function advise(found, run) {
  const needs = [];
  if (found.held) needs.push("held");
  if (found.coding) needs.push("coding");
  if (found.word === "cut") needs.push("cut");
  const asked = run.request || {};
  const expected = Number(asked["x-envoy-expected-rq-timeout-ms"]);
  if (expected > 0 && found.word !== "cut") {
    found.sentences.push(`Envoy is on the way, and cuts each request after ${seconds(expected)}, however busy it is.`);
    found.advice.push("Envoy: timeout: 0s on the route");
  }
  if (!needs.length) return;
  const known = HOPS.filter((hop) => hop.known(run.fields, asked));
  if (known.length) {
    found.sentences.push(`On the way is ${known.map((hop) => hop.name).join(" and ")}.`);
  }
  if (found.held && asked.version === "1.0") {
    found.sentences.push("A hop speaks HTTP/1.0 to llmproxy, which has no chunks.");
    found.advice.push('nginx: proxy_http_version 1.1; and proxy_set_header Connection ""; in its location');
  }
  const guilty = known.length ? known : HOPS.filter((hop) => ["nginx", "HAProxy", "Caddy"].includes(hop.name));
  for (const hop of guilty) {
    for (const need of needs) found.advice.push(`${hop.name}: ${hop[need]}`);
  }
  if (found.word === "held_at_first") {
    found.advice.push(`llmproxy: padding = "${Math.ceil(found.size / 1024)}KiB" on the route, if the hop cannot be changed`);
  } else if (found.idle) {
    found.advice.push('llmproxy: heartbeat = "15s" on the route, if the hop cannot be changed');
  }
  found.advice.push("llmproxy doctor URL names the hop: give it the URL of each, from the outside to llmproxy");
}

// -- words ------------------------------------------------------------------------------------------

function codingOf(run) {
  const coding = (run.fields["content-encoding"] || "").trim().toLowerCase();
  return coding === "identity" ? "" : coding;
}

function median(numbers) {
  if (!numbers.length) return 0;
  const sorted = [...numbers].sort((a, b) => a - b);
  return sorted[Math.floor(sorted.length / 2)];
}

// The size of the block that half of the bytes came in, or in smaller ones: some hops let a small one follow.
function usualSize(groups) {
  const sizes = groups.map((group) => group.bytes).sort((a, b) => a - b);
  let rest = sizes.reduce((sum, size) => sum + size, 0) / 2;
  for (const size of sizes) {
    rest -= size;
    if (rest <= 0) return size;
  }
  return 0;
}

export function seconds(milliseconds) {
  if (milliseconds < 0.5) return "less than 1 ms";
  if (milliseconds < 1000) return `${Math.round(milliseconds)} ms`;
  return `${(milliseconds / 1000).toFixed(1)} s`;
}

export function bytes(count) {
  return count < 1024 ? `${count} bytes` : `${(count / 1024).toFixed(count < 10240 ? 1 : 0)} KiB`;
}
