// The operator's page: follows /events, shows what it says, and asks for changes with the token.
const WINDOW = 50;
const LONGEST = 300;
const LOST = "The connection to the proxy is lost; the page tries again.";
const at = (id) => document.getElementById(id);
const asked = { sort: "-age", offset: 0 };
let source = null;
let again = null;
let isPaused = false;
let isAwaited = true; // the next state is shown even while updates are paused
let newest = null;
let token = null;
let pressed = null;

// -- what the tables show ---------------------------------------------------------------------------

const streams = tableOf("streams", (row) => row.id, [
  ["Client", (row) => row.client, { sort: "client", kind: "name" }],
  ["Model", (row) => row.model, { sort: "model", kind: "name" }],
  ["Phase", (row) => (row.ahead === null ? row.phase : `${row.phase}, ${row.ahead} ahead`), { sort: "phase", word: (row) => row.phase }],
  ["Age", (row) => seconds(row.age_s), { sort: "age", kind: "number" }],
  ["Provider", (row) => row.provider, { sort: "provider", kind: "name" }],
  ["Route", (row) => row.route, { sort: "route", kind: "name" }],
  ["Bytes", (row) => bytes(row.bytes), { sort: "bytes", kind: "number" }],
  ["Events", (row) => row.events, { sort: "events", kind: "number" }],
  ["Tokens", (row) => row.tokens, { kind: "number" }],
  ["Last chunk", (row) => ago(row.last_chunk_s), { sort: "last_chunk", kind: "number" }],
  ["Held up", (row) => (row.paused_s ? seconds(row.paused_s) : ""), { sort: "paused", kind: "number" }],
  ["Id", (row) => row.id, { kind: "id" }],
  ["End it", () => "End", { kind: "act", press: (row) => kill(row), says: (row) => `End the stream ${row.id}${whose(row)}` }],
]);
const providers = tableOf("providers", (row) => row.name, [
  ["Name", (row) => row.name, { kind: "name" }],
  ["State", stateOf, { word: (row) => wordOf(row) }],
  ["Dialect", (row) => row.dialect],
  ["URL", (row) => row.url],
  ["Connections", (row) => `${row.connections.active} active, ${row.connections.idle} idle, ${row.connections.connecting} connecting`],
  ["Places", (row) => placesOf(row.places)],
  ["Told of its limits", headroomOf, { kind: "wide" }],
  ["Switch", (row) => (row.state === "off" ? "Enable" : "Disable"), {
    kind: "act",
    press: (row) => turn(row),
    says: (row) => `${row.state === "off" ? "Enable" : "Disable"} the provider ${row.name}`,
  }],
]);
const clients = tableOf("clients", (row) => row.client, [
  ["Client", (row) => row.client, { kind: "name" }],
  ["Streams", (row) => row.streams, { kind: "number" }],
  ["Limits: used of what is allowed", limitsOf, { kind: "wide" }],
]);
const ended = tableOf("ended", (row) => row.id, [
  ["Began", (row) => row.time],
  ["End", (row) => row.end_reason],
  ["Why", (row) => [row.error, row.cause].filter((word) => word && word !== row.end_reason).join(", "), { kind: "name" }],
  ["Client", (row) => row.client, { kind: "name" }],
  ["Model", (row) => row.model, { kind: "name" }],
  ["Provider", (row) => row.provider, { kind: "name" }],
  ["Status", (row) => row.status, { kind: "number" }],
  ["Lasted", (row) => seconds(row.duration_s), { kind: "number" }],
  ["Bytes", (row) => bytes(row.bytes_out), { kind: "number" }],
  ["Id", (row) => row.id, { kind: "id", link: (row) => `./streams/ended/${row.id}` }],
]);

function stateOf(row) {
  const parts = [];
  if (row.state === "off") parts.push("off");
  for (const one of row.switched_off) if (one.model !== null) parts.push(`${one.model} off`);
  for (const one of row.circuits) {
    const client = one.client === null ? "" : ` for ${one.client}`;
    parts.push(`failing${client}, asked again in ${seconds(one.seconds)}`);
  }
  for (const one of row.cooldowns) {
    const model = one.model === null ? "" : `${one.model} `;
    parts.push(`${model}cooling for ${seconds(one.seconds)} (${one.status})`);
  }
  return parts.join("; ") || "on";
}
function wordOf(row) {
  if (row.state === "off") return "off";
  if (!row.up) return "failing";
  return row.cooldowns.length || row.switched_off.length ? "cooling" : "on";
}
function placesOf(places) {
  const most = places.most === null ? "" : ` of ${places.most}`;
  return `${places.busy}${most} taken, ${places.waiting} waiting`;
}
function headroomOf(row) {
  if (row.headroom === null) return "";
  const fields = Object.entries(row.headroom.fields).map(([name, value]) => `${name}: ${value}`);
  return `${fields.join(", ")} (${ago(row.headroom.age_s)})`;
}
function limitsOf(row) {
  return Object.entries(row.limits).map(([name, one]) => `${name}: ${one.used} of ${one.limit}`).join(", ");
}

// -- words ------------------------------------------------------------------------------------------

function visible(text) {
  // What a caller wrote may hide, or turn round, what stands beside it.
  const hidden = /[\p{C}\p{Zl}\p{Zp}\p{Default_Ignorable_Code_Point}]|(?! )\p{Zs}/gu;
  const whole = `${text ?? ""}`.replace(hidden, (one) => {
    const code = one.codePointAt(0).toString(16);
    return code.length > 4 ? `\\u{${code}}` : `\\u${code.padStart(4, "0")}`;
  });
  return whole.length > LONGEST ? `${whole.slice(0, LONGEST - 40)} … ${whole.slice(-37)}` : whole;
}
function whose(row) {
  return row.client === null ? "" : ` of ${row.client}`;
}

function seconds(number) {
  if (number === null) return "";
  if (number < 10) return `${number.toFixed(1)} s`;
  if (number < 120) return `${Math.round(number)} s`;
  if (number < 7200) return `${Math.floor(number / 60)} min`;
  return number < 172800 ? `${Math.floor(number / 3600)} h` : `${Math.floor(number / 86400)} d`;
}
function ago(number) {
  return number === null ? "" : `${seconds(number)} ago`;
}
function bytes(number) {
  if (number < 10000) return `${number}`;
  return number < 10000000 ? `${Math.round(number / 1000)} k` : `${Math.round(number / 1000000)} M`;
}

// -- a table whose rows are kept, so that focus stays where it is -------------------------------------

function tableOf(id, keyOf, columns) {
  const head = at(id).tHead.rows[0];
  const body = at(id).tBodies[0];
  const kept = new Map();
  const headings = [];
  for (const [title, , more = {}] of columns) {
    const cell = document.createElement("th");
    cell.scope = "col";
    if (["number", "act"].includes(more.kind)) cell.className = more.kind;
    if (more.sort) {
      const button = document.createElement("button");
      button.type = "button";
      button.textContent = title;
      button.addEventListener("click", () => sortBy(more.sort));
      cell.append(button);
      headings.push([more.sort, cell]);
    } else cell.textContent = title;
    head.append(cell);
  }

  function made() {
    const line = { row: null, element: document.createElement("tr"), cells: [] };
    for (const [, , more = {}] of columns) {
      const cell = document.createElement("td");
      if (more.kind) cell.className = more.kind;
      let inner = cell;
      if (more.press) {
        inner = document.createElement("button");
        inner.type = "button";
        inner.addEventListener("click", () => {
          pressed = inner;
          more.press(line.row);
        });
        cell.append(inner);
      } else if (more.link) {
        inner = document.createElement("a");
        cell.append(inner);
      }
      line.cells.push([cell, inner]);
      line.element.append(cell);
    }
    return line;
  }

  function fill(line, row) {
    line.row = row;
    columns.forEach(([, text, more = {}], place) => {
      const [cell, inner] = line.cells[place];
      const wanted = visible(text(row));
      if (inner.textContent !== wanted) {
        inner.textContent = wanted;
        if (more.kind === "name") cell.title = wanted;
      }
      const label = more.says ? visible(more.says(row)) : null;
      if (inner.ariaLabel !== label) inner.ariaLabel = label;
      if (more.link && !inner.hasAttribute("href")) inner.href = more.link(row);
      if (more.word && cell.dataset.word !== more.word(row)) cell.dataset.word = more.word(row);
    });
  }

  function show(rows) {
    const stays = body.contains(focused());
    const seen = new Set();
    let before = null;
    body.querySelector(".empty")?.remove();
    for (const row of rows) {
      const key = keyOf(row);
      seen.add(key);
      let line = kept.get(key);
      const isNew = !line;
      if (isNew) kept.set(key, (line = made()));
      fill(line, row);
      line.element.classList.remove("over");
      const next = before === null ? body.firstChild : before.nextSibling;
      if (isNew || (!stays && next !== line.element)) body.insertBefore(line.element, next);
      before = line.element;
    }
    for (const [key, line] of kept) if (!seen.has(key)) line.element.classList.add("over");
    sweep();
  }

  // A row that is over stays as long as it has the focus.
  function sweep() {
    for (const [key, { element }] of kept) {
      if (!element.classList.contains("over") || element.contains(focused())) continue;
      element.remove();
      kept.delete(key);
    }
    if (!kept.size && !body.rows.length) {
      const cell = body.insertRow().insertCell();
      cell.parentNode.className = "empty";
      cell.colSpan = columns.length;
      cell.textContent = "None";
    }
  }

  body.addEventListener("focusout", () => setTimeout(sweep));

  function mark(sort) {
    const name = sort.replace("-", "");
    for (const [own, cell] of headings) {
      if (own === name) cell.ariaSort = sort.startsWith("-") ? "descending" : "ascending";
      else cell.removeAttribute("aria-sort");
    }
  }
  return { show, mark };
}

function focused() {
  return at("sure").open ? pressed : document.activeElement;
}

// -- the events -------------------------------------------------------------------------------------

// Shows what the operator asks for, also while updates are paused.
function ask() {
  isAwaited = true;
  follow();
}

function follow() {
  clearTimeout(again);
  source?.close();
  streams.mark(asked.sort);
  const query = new URLSearchParams({ sort: asked.sort, limit: WINDOW, offset: asked.offset });
  for (const name of ["client", "provider", "model", "phase"]) {
    if (asked[name]) query.set(name, asked[name]);
  }
  const url = `./events?${query}`;
  const own = new EventSource(url);
  source = own;
  own.addEventListener("state", (event) => {
    newest = JSON.parse(event.data);
    if (isPaused && !isAwaited) tell(newest.process);
    else show(newest);
  });
  own.addEventListener("error", async () => {
    if (own.readyState !== EventSource.CLOSED) {
      say(LOST, "bad");
      return;
    }
    const [text, wait] = await whyNot(url);
    if (source !== own) return;
    if (text) say(text, "bad");
    again = setTimeout(follow, wait * 1000);
  });
}

// An EventSource does not say why it was refused: ask once more, for the status and the message.
async function whyNot(url) {
  const stop = new AbortController();
  try {
    const response = await fetch(url, { signal: stop.signal });
    if (response.ok) {
      stop.abort();
      return ["", 1];
    }
    const usual = response.status < 500 ? 30 : 5;
    const told = +response.headers.get("retry-after") || usual;
    const wait = Math.min(Math.max(1, told), 60);
    return [`${await messageOf(response)} The page tries again in ${wait} s.`, wait];
  } catch {
    return [LOST, 3];
  }
}

async function messageOf(response) {
  try {
    return visible((await response.json()).error.message);
  } catch {
    return `The proxy responds with ${response.status}.`;
  }
}

function show(state) {
  const began = performance.now();
  const { process } = state;
  isAwaited = false;
  at("instance").textContent = visible(process.instance);
  at("version").textContent = visible(process.version);
  at("uptime").textContent = seconds(process.uptime_s);
  at("total").textContent = state.total;
  at("connections").textContent = process.connections;
  streams.show(state.streams);
  providers.show(state.providers);
  clients.show(state.clients);
  ended.show(state.ended);
  const last = state.offset + state.streams.length;
  const which = state.streams.length ? `${state.offset + 1} to ${last} of ` : "";
  const chosen = state.matching === state.total ? "" : ` (of ${state.total} in all)`;
  at("window").textContent = `${which}${state.matching} streams${chosen}`;
  at("before").disabled = state.offset === 0;
  at("after").disabled = last >= state.matching;
  tell(process);
  document.body.dataset.shownIn = (performance.now() - began).toFixed(1);
}

function tell(process) {
  const paused = isPaused ? "Updates are paused." : "";
  if (process.draining) {
    const { remaining, cut_in_s: left } = process.draining;
    say(`The proxy shuts down: ${remaining} streams are left, to be cut in ${seconds(left)}. ${paused}`, "warn");
  } else if (!process.reload.succeeded) {
    say(`The last reload failed; the log says why. The configuration of before is in use. ${paused}`, "bad");
  } else say(paused, "");
}

function say(text, kind) {
  const state = at("state");
  text = text.trim();
  if (state.textContent !== text) state.textContent = text;
  state.dataset.kind = kind;
}

function sortBy(name) {
  asked.sort = asked.sort === `-${name}` ? name : `-${name}`;
  asked.offset = 0;
  ask();
}

// -- changes ----------------------------------------------------------------------------------------

async function kill(row) {
  const client = row.client === null ? "" : ` of ${quoted(row.client)}`;
  const model = row.model === null ? "" : ` with the model ${quoted(row.model)}`;
  const text = `The stream ${row.id}${client}${model} is broken off. Its client sees an error, and the provider is dropped.`;
  await change("DELETE", `./streams/${row.id}`, "End this stream?", text, "End it");
}

async function turn(row) {
  const [verb, yes, text] = row.state === "off"
    ? ["enable", "Enable", `New requests may go to ${quoted(row.name)} again.`]
    : ["disable", "Disable", `No new request goes to ${quoted(row.name)}. Streams that run go on. It stays so until it is enabled, or this process ends.`];
  const path = `./providers/${encodeURIComponent(row.name)}/${verb}`;
  await change("POST", path, `${yes} this provider?`, text, yes);
}

// A name on its own: one that is written from right to left turns nothing round beside it.
function quoted(name) {
  return `\u2068${visible(name)}\u2069`;
}

async function change(method, path, title, text, yes) {
  at("alert").hidden = true;
  let wrong = "";
  while (await sure(title, text, yes, wrong)) {
    if (/[^\x20-\x7e]/.test(token)) {
      token = null;
      wrong = "The token has characters that no token has.";
      continue;
    }
    const [status, message] = await send(method, path);
    if (status === 401) {
      token = null;
      wrong = message;
      continue;
    }
    at("forget").hidden = false;
    if (message === null) isAwaited = true;
    else {
      at("alert").textContent = message;
      at("alert").hidden = false;
    }
    return;
  }
}

async function send(method, path) {
  try {
    const response = await fetch(path, { method, headers: { authorization: `Bearer ${token}` } });
    return [response.status, response.ok ? null : await messageOf(response)];
  } catch {
    return [0, "The proxy cannot be reached."];
  }
}

// Asks whether to go on, and for the token where the page has none.
function sure(title, text, yes, wrong) {
  const dialog = at("sure");
  at("sure-title").textContent = title;
  at("sure-text").textContent = text;
  at("sure-yes").textContent = yes;
  at("sure-token").hidden = token !== null;
  at("sure-wrong").textContent = wrong;
  at("sure-wrong").hidden = !wrong;
  dialog.returnValue = "";
  dialog.showModal();
  return new Promise((answered) => {
    dialog.addEventListener("close", () => {
      const goesOn = dialog.returnValue === "yes";
      if (goesOn) token ??= at("token").value.trim();
      at("token").value = "";
      answered(goesOn);
    }, { once: true });
  });
}

// -- controls ---------------------------------------------------------------------------------------

at("filters").addEventListener("submit", (submitted) => {
  submitted.preventDefault();
  Object.assign(asked, Object.fromEntries(new FormData(at("filters"))), { offset: 0 });
  ask();
});
at("filters").addEventListener("reset", () => {
  for (const name of ["client", "provider", "model", "phase"]) asked[name] = "";
  asked.offset = 0;
  ask();
});
at("forget").addEventListener("click", () => {
  token = null;
  at("forget").hidden = true;
  at("pause").focus();
});
at("before").addEventListener("click", () => {
  asked.offset = Math.max(0, asked.offset - WINDOW);
  ask();
});
at("after").addEventListener("click", () => {
  asked.offset += WINDOW;
  ask();
});
at("pause").addEventListener("click", () => {
  isPaused = !isPaused;
  at("pause").ariaPressed = `${isPaused}`;
  if (newest) isPaused ? tell(newest.process) : show(newest);
});
ask();
