// The operator's page: follows /events, shows what it says, and asks for changes with the token.
const WINDOW = 50;
const at = (id) => document.getElementById(id);
const asked = { sort: "-age", offset: 0 };
let source = null;
let isPaused = false;
let newest = null;

// -- what the tables show ---------------------------------------------------------------------------

const streams = tableOf("streams", (row) => row.id, [
  ["Id", (row) => row.id, { kind: "id" }],
  ["Client", (row) => row.client, { sort: "client" }],
  ["Route", (row) => row.route, { sort: "route" }],
  ["Provider", (row) => row.provider, { sort: "provider" }],
  ["Model", (row) => row.model, { sort: "model" }],
  ["Phase", (row) => (row.ahead === null ? row.phase : `${row.phase}, ${row.ahead} ahead`), { sort: "phase", word: (row) => row.phase }],
  ["Age", (row) => seconds(row.age_s), { sort: "age", kind: "number" }],
  ["Bytes", (row) => bytes(row.bytes), { sort: "bytes", kind: "number" }],
  ["Events", (row) => row.events, { sort: "events", kind: "number" }],
  ["Tokens", (row) => row.tokens, { kind: "number" }],
  ["Last chunk", (row) => ago(row.last_chunk_s), { sort: "last_chunk", kind: "number" }],
  ["Held up", (row) => (row.paused_s ? seconds(row.paused_s) : ""), { sort: "paused", kind: "number" }],
  ["End it", (row) => `End`, { press: (row) => kill(row), says: (row) => `End the stream ${row.id}` }],
]);
const providers = tableOf("providers", (row) => row.name, [
  ["Name", (row) => row.name],
  ["State", stateOf, { word: (row) => wordOf(row) }],
  ["Dialect", (row) => row.dialect],
  ["URL", (row) => row.url],
  ["Connections", (row) => `${row.connections.active} active, ${row.connections.idle} idle, ${row.connections.connecting} connecting`],
  ["Places", (row) => placesOf(row.places)],
  ["Told of its limits", headroomOf, { kind: "wide" }],
  ["Switch", (row) => (row.state === "off" ? "Enable" : "Disable"), {
    press: (row) => turn(row),
    says: (row) => `${row.state === "off" ? "Enable" : "Disable"} the provider ${row.name}`,
  }],
]);
const clients = tableOf("clients", (row) => row.client, [
  ["Client", (row) => row.client],
  ["Streams", (row) => row.streams, { kind: "number" }],
  ["Limits: used of what is allowed", limitsOf, { kind: "wide" }],
]);
const ended = tableOf("ended", (row) => row.id, [
  ["Id", (row) => row.id, { kind: "id", link: (row) => `./streams/ended/${row.id}` }],
  ["Began", (row) => row.time],
  ["End", (row) => row.end_reason],
  ["Why", (row) => [row.error, row.cause].filter((word) => word && word !== row.end_reason).join(", ")],
  ["Client", (row) => row.client],
  ["Provider", (row) => row.provider],
  ["Model", (row) => row.model],
  ["Status", (row) => row.status, { kind: "number" }],
  ["Lasted", (row) => seconds(row.duration_s), { kind: "number" }],
  ["Bytes", (row) => bytes(row.bytes_out), { kind: "number" }],
]);

function stateOf(row) {
  const parts = [];
  if (row.state === "off") parts.push("off");
  for (const one of row.switched_off) if (one.model !== null) parts.push(`${one.model} off`);
  for (const one of row.circuits) {
    const whose = one.client === null ? "" : ` for ${one.client}`;
    parts.push(`failing${whose}, asked again in ${seconds(one.seconds)}`);
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
    if (more.kind === "number") cell.className = "number";
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
        inner.addEventListener("click", () => more.press(line.row));
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
      const wanted = `${text(row) ?? ""}`;
      if (inner.textContent !== wanted) inner.textContent = wanted;
      if (more.says && inner.ariaLabel !== more.says(row)) inner.ariaLabel = more.says(row);
      if (more.link && !inner.hasAttribute("href")) inner.href = more.link(row);
      if (more.word && cell.dataset.word !== more.word(row)) cell.dataset.word = more.word(row);
    });
  }

  function show(rows) {
    const stays = body.contains(document.activeElement);
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
    for (const [key, line] of kept) {
      if (seen.has(key)) continue;
      if (stays) line.element.classList.add("over");
      else {
        line.element.remove();
        kept.delete(key);
      }
    }
    if (!kept.size) {
      const cell = body.insertRow().insertCell();
      cell.parentNode.className = "empty";
      cell.colSpan = columns.length;
      cell.textContent = "None";
    }
  }

  function mark(sort) {
    const name = sort.replace("-", "");
    for (const [own, cell] of headings) {
      if (own === name) cell.ariaSort = sort.startsWith("-") ? "descending" : "ascending";
      else cell.removeAttribute("aria-sort");
    }
  }
  return { show, mark };
}

// -- the events -------------------------------------------------------------------------------------

function follow() {
  source?.close();
  streams.mark(asked.sort);
  const query = new URLSearchParams({ sort: asked.sort, limit: WINDOW, offset: asked.offset });
  for (const name of ["client", "provider", "model", "phase"]) {
    if (asked[name]) query.set(name, asked[name]);
  }
  source = new EventSource(`./events?${query}`);
  source.addEventListener("state", (event) => {
    newest = JSON.parse(event.data);
    if (!isPaused) show(newest);
  });
  source.addEventListener("error", () => {
    say("The connection to the proxy is lost; the page tries again.", "bad");
    if (source.readyState === EventSource.CLOSED) setTimeout(follow, 3000);
  });
}

function show(state) {
  const began = performance.now();
  const { process } = state;
  at("instance").textContent = process.instance;
  at("version").textContent = process.version;
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
  if (process.draining) {
    const { remaining, cut_in_s: left } = process.draining;
    say(`The proxy shuts down: ${remaining} streams are left, to be cut in ${seconds(left)}.`, "warn");
  } else if (!process.reload.succeeded) {
    say("The last reload failed; the log says why. The configuration of before is in use.", "bad");
  } else say(isPaused ? "Updates are paused." : "", "");
}

function say(text, kind) {
  const state = at("state");
  if (state.textContent !== text) state.textContent = text;
  state.dataset.kind = kind;
}

function sortBy(name) {
  asked.sort = asked.sort === `-${name}` ? name : `-${name}`;
  asked.offset = 0;
  follow();
}

// -- changes ----------------------------------------------------------------------------------------

async function kill(row) {
  const who = row.client === null ? "" : ` of ${row.client}`;
  const text = `The stream ${row.id}${who} is broken off. Its client sees an error, and the provider is dropped.`;
  if (await sure("End this stream?", text, "End it")) await change("DELETE", `./streams/${row.id}`);
}

async function turn(row) {
  const verb = row.state === "off" ? "enable" : "disable";
  const text = {
    disable: `No new request goes to ${row.name}. Streams that run go on. It stays so until it is enabled, or this process ends.`,
    enable: `New requests may go to ${row.name} again.`,
  }[verb];
  const title = { disable: "Disable this provider?", enable: "Enable this provider?" }[verb];
  const name = encodeURIComponent(row.name);
  if (await sure(title, text, { disable: "Disable", enable: "Enable" }[verb])) {
    await change("POST", `./providers/${name}/${verb}`);
  }
}

function sure(title, text, yes) {
  const dialog = at("sure");
  at("sure-title").textContent = title;
  at("sure-text").textContent = text;
  at("sure-yes").textContent = yes;
  dialog.returnValue = "";
  dialog.showModal();
  return new Promise((answered) => {
    dialog.addEventListener("close", () => answered(dialog.returnValue === "yes"), { once: true });
  });
}

async function change(method, path) {
  const alert = at("alert");
  alert.hidden = true;
  let text;
  try {
    const headers = { authorization: `Bearer ${at("token").value}` };
    const response = await fetch(path, { method, headers });
    if (response.ok) return;
    text = (await response.json()).error.message;
    if (response.status === 401) at("token").focus();
  } catch {
    text = "The proxy cannot be reached.";
  }
  alert.textContent = text;
  alert.hidden = false;
}

// -- controls ---------------------------------------------------------------------------------------

at("filters").addEventListener("submit", (submitted) => {
  submitted.preventDefault();
  Object.assign(asked, Object.fromEntries(new FormData(at("filters"))), { offset: 0 });
  follow();
});
at("filters").addEventListener("reset", () => {
  for (const name of ["client", "provider", "model", "phase"]) asked[name] = "";
  asked.offset = 0;
  follow();
});
at("changes").addEventListener("submit", (submitted) => submitted.preventDefault());
at("before").addEventListener("click", () => {
  asked.offset = Math.max(0, asked.offset - WINDOW);
  follow();
});
at("after").addEventListener("click", () => {
  asked.offset += WINDOW;
  follow();
});
at("pause").addEventListener("click", () => {
  isPaused = !isPaused;
  at("pause").ariaPressed = `${isPaused}`;
  if (newest) isPaused ? tell(newest.process) : show(newest);
});
follow();
