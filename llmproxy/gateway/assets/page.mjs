// The page of the paced stream: asks for one, reads it as it comes, draws it, and shows the verdict.
import { bytes, figures, seconds, verdict } from "./verdict.mjs";

const DRAWN_EVERY_MS = 200;
const PATIENCE_MS = 3000;
const SVG = "http://www.w3.org/2000/svg";
const at = (id) => document.getElementById(id);
const site = document.body.dataset.site;
let stopper = null;
let shown = null;

at("form").addEventListener("submit", (submitted) => {
  submitted.preventDefault();
  if (!stopper) measure();
});
at("stop").addEventListener("click", () => stopper?.abort());
at("there").addEventListener("input", pointThere);
new ResizeObserver(() => shown && draw(shown)).observe(at("plot"));
pointThere();

// -- one run ----------------------------------------------------------------------------------------

async function measure() {
  const asked = {
    n: at("n").valueAsNumber,
    interval_ms: at("interval").valueAsNumber,
    bytes: at("bytes").valueAsNumber,
    silence_ms: at("silence").valueAsNumber * 1000,
    format: at("format").value,
  };
  const run = begin(asked);
  stopper = new AbortController();
  at("start").disabled = true;
  at("stop").disabled = false;
  at("result").hidden = at("headers").hidden = at("numbers").hidden = true;
  const lasts = (asked.n - 1) * asked.interval_ms + asked.silence_ms;
  at("progress").textContent = `Measuring: ${asked.n} events, for about ${seconds(lasts)}.`;
  Object.assign(at("bar"), { max: asked.n, value: 0, hidden: false });
  shown = run;
  try {
    await read(run, stopper.signal);
  } finally {
    stopper = null;
    at("start").disabled = false;
    at("stop").disabled = true;
    at("bar").hidden = true;
  }
  const how = { broken: " Then it was cut.", stopped: " Then it was stopped." }[run.end] || "";
  at("progress").textContent = `${run.events.length} of ${asked.n} events arrived.${how}`;
  run.request = await requestOf(run);
  if (shown !== run) return;
  show(run, verdict(run));
  showHops(run);
}

function begin(asked) {
  return {
    asked,
    mark: site === "proxy" ? `page-${[...crypto.getRandomValues(new Uint32Array(3))].join("-")}` : "",
    status: 0,
    problem: "",
    fields: {},
    request: {},
    is_paced: false,
    head_ms: 0,
    events: [],
    reads: [],
    end: "",
    end_ms: 0,
  };
}

async function read(run, signal) {
  const began = performance.now();
  const passed = () => performance.now() - began;
  let drawing = 0;
  const drawSoon = () => {
    drawing ||= setTimeout(() => {
      drawing = 0;
      at("bar").value = run.events.length;
      draw(run);
    }, DRAWN_EVERY_MS);
  };
  try {
    const response = await fetch(addressOf(run), { headers: keyFields(), cache: "no-store", signal });
    run.head_ms = passed();
    run.status = response.status;
    run.fields = Object.fromEntries(response.headers);
    if (!response.ok) {
      run.problem = await reasonOf(response);
      run.end = "complete";
      return;
    }
    run.is_paced = /^(text\/event-stream|application\/x-ndjson)\b/.test(run.fields["content-type"] || "");
    const take = reader(run);
    const body = response.body.getReader();
    for (;;) {
      const { done, value } = await body.read();
      if (done) break;
      const now = passed();
      run.reads.push({ at_ms: now, bytes: value.length });
      take(value, now);
      drawSoon();
    }
    run.end = "complete";
  } catch (error) {
    run.end = signal.aborted ? "stopped" : "broken";
    if (!run.status) run.problem = `The browser says: ${error.message}.`;
  } finally {
    run.end_ms = passed();
    clearTimeout(drawing);
  }
}

function addressOf(run) {
  const { asked } = run;
  const address = new URL(document.body.dataset.stream, location.href);
  const query = { n: asked.n, interval_ms: asked.interval_ms, bytes: asked.bytes, format: asked.format };
  if (asked.silence_ms) {
    query.silence_ms = asked.silence_ms;
    query.silence_after = Math.ceil(asked.n / 2);
  }
  if (run.mark) query.mark = run.mark;
  address.search = new URLSearchParams(query).toString();
  return address;
}

function keyFields() {
  const key = site === "proxy" ? at("key").value.trim() : "";
  return key ? { "x-llmproxy-key": key } : {};
}

// Takes the pieces of a body, split anywhere, and adds what they hold to the events.
function reader(run) {
  const decoder = new TextDecoder();
  let rest = "";
  return (piece, now) => {
    const lines = (rest + decoder.decode(piece, { stream: true })).split("\n");
    rest = lines.pop();
    for (const line of lines) {
      const event = eventOf(line.replace(/^data: /, ""));
      if (event) run.events.push({ n: event.n, sent_ms: event.ms, at_ms: now });
      else if (line) run.is_paced = false;
    }
  };
}

function eventOf(text) {
  try {
    const event = JSON.parse(text);
    return Number.isInteger(event.n) && typeof event.ms === "number" ? event : null;
  } catch {
    return null;
  }
}

async function reasonOf(response) {
  try {
    return (await response.json()).error.message;
  } catch {
    return "";
  }
}

// -- what is shown ----------------------------------------------------------------------------------

function show(run, found) {
  at("result").dataset.word = found.word;
  at("title").textContent = found.title;
  at("sentences").replaceChildren(...found.sentences.map((text) => element("p", text)));
  at("advice").replaceChildren(...found.advice.map((text) => element("li", text)));
  at("change").hidden = !found.advice.length;
  at("result").hidden = false;
  draw(run);
  const { quickest } = aligned(run);
  at("rows").replaceChildren(
    ...run.events.map((event) =>
      row([
        event.n,
        `${event.sent_ms.toFixed(1)} ms`,
        `${event.at_ms.toFixed(1)} ms`,
        `${(event.at_ms - event.sent_ms - quickest).toFixed(1)} ms`,
      ]),
    ),
  );
  at("numbers").hidden = !run.events.length;
}

// What reached llmproxy of the request, as far as the process knows it that responds now.
async function requestOf(run) {
  if (!run.mark || run.status !== 200) return {};
  const address = new URL(document.body.dataset.stream, location.href);
  address.search = new URLSearchParams({ ended: run.mark }).toString();
  try {
    const signal = AbortSignal.timeout(PATIENCE_MS);
    const response = await fetch(address, { headers: keyFields(), cache: "no-store", signal });
    return (await response.json()).request || {};
  } catch {
    return {}; // the verdict does without
  }
}

function showHops(run) {
  const ours = new Set(["cache-control", "date", "x-accel-buffering", "x-llmproxy-request-id"]);
  const fields = Object.entries(run.fields).filter(([name]) => !ours.has(name));
  const found = [
    ...fields.map(([name, value]) => row(["response here", name, value])),
    ...Object.entries(run.request).map(([name, value]) => row(["request there", name, value])),
  ];
  at("fields").replaceChildren(...found);
  at("headers").hidden = !found.length;
}

function aligned(run) {
  const quickest = run.events.reduce((least, one) => Math.min(least, one.at_ms - one.sent_ms), Infinity);
  return { quickest: Number.isFinite(quickest) ? quickest : 0 };
}

// Sent above, arrived below, a line for each event: it leans to the right where the event was held.
function draw(run) {
  at("plot").hidden = !run.events.length;
  if (!run.events.length) return;
  const chart = at("chart");
  const width = Math.max(280, chart.clientWidth || 0);
  const [left, right, top, bottom, height] = [8, 8, 30, 150, 202];
  const { quickest } = aligned(run);
  const { asked, events } = run;
  const lasts = (asked.n - 1) * asked.interval_ms + asked.silence_ms + quickest;
  const longest = Math.max(run.end ? 0 : lasts, run.end_ms, events[events.length - 1].at_ms, 1);
  const x = (time) => left + ((width - left - right) * time) / longest;
  const parts = [line(left, top, width - right, top, "axis"), line(left, bottom, width - right, bottom, "axis")];
  for (const event of events) {
    parts.push(line(x(event.sent_ms + quickest), top, x(event.at_ms), bottom, "way"));
  }
  for (const event of events) {
    parts.push(dot(x(event.sent_ms + quickest), top, "sent"), dot(x(event.at_ms), bottom, "arrived"));
  }
  parts.push(label(left, top - 14, "Sent by llmproxy", "start", "lane"));
  parts.push(label(left, bottom + 24, "Arrived here", "start", "lane"));
  const step = stepOf(longest, width);
  for (let time = 0; time <= longest; time += step) {
    const anchor = time === 0 ? "start" : x(time) > width - 20 ? "end" : "middle";
    parts.push(label(time ? x(time) : left, bottom + 46, `${time / 1000} s`, anchor));
    parts.push(line(x(time), bottom, x(time), bottom + 6, "tick"));
  }
  if (run.end && run.end !== "complete") parts.push(line(x(run.end_ms), top - 8, x(run.end_ms), bottom + 8, "end"));
  chart.setAttribute("viewBox", `0 0 ${width} ${height}`);
  chart.replaceChildren(...parts);
  const { late_ms } = figures(run);
  const size = run.reads.reduce((sum, one) => sum + one.bytes, 0);
  at("caption").textContent =
    `${events.length} events, ${bytes(size)} in ${run.reads.length} ${run.reads.length === 1 ? "read" : "reads"}. A line that leans to the right is an event ` +
    `that arrived later than the quickest one, by ${seconds(late_ms)} at most.`;
}

function stepOf(longest, width) {
  const steps = [100, 200, 500, 1000, 2000, 5000, 10000, 20000, 60000, 120000, 300000, 600000];
  return steps.find((step) => (longest / step) * 56 <= width) || 1200000;
}

function line(x1, y1, x2, y2, kind) {
  return drawing("line", { x1, y1, x2, y2, class: kind });
}

function dot(cx, cy, kind) {
  return drawing("circle", { cx, cy, r: 3, class: kind });
}

function label(x, y, text, anchor, kind = "") {
  const found = drawing("text", { x, y, "text-anchor": anchor, class: kind });
  found.textContent = text;
  return found;
}

function drawing(name, attributes) {
  const found = document.createElementNS(SVG, name);
  for (const [key, value] of Object.entries(attributes)) found.setAttribute(key, value);
  return found;
}

function element(name, text) {
  const found = document.createElement(name);
  found.textContent = text;
  return found;
}

function row(cells) {
  const found = document.createElement("tr");
  found.append(...cells.map((cell) => element("td", cell)));
  return found;
}

function pointThere() {
  let address = null;
  try {
    address = new URL(at("there").value);
  } catch {
    // Nothing, or half of an address.
  }
  if (address && /^https?:$/.test(address.protocol)) {
    address.pathname = `${address.pathname.replace(/\/+$/, "")}/-/pace/`;
    address.search = address.hash = "";
    at("go").href = address.href;
  } else {
    at("go").removeAttribute("href");
  }
}
