#!/bin/sh
# http-proxy's proxyTimeout ends its side of a stream, and leaves the client waiting for ever.
#
# Packages: http-proxy 1.18.1, on the Node that is installed.
#
# A server sends one event and is silent.  After proxyTimeout, http-proxy destroys its connection to the
# server.  But it pipes the response to the client, and a pipe does not pass an abort on: the client
# gets no end, no reset and no error, and its connection stays.  The same happens if the server itself
# breaks a response off.  Vite's development server is made of http-proxy and has both.  Two lines of
# the caller mend it: proxy.on('proxyRes', (up, req, res) => up.on('aborted', () => res.destroy())).
#
# Seen:
#     proxyTimeout 500: the server's connection was closed, the client still waits after 3 s
#     a break by the server: the client still waits after 3 s
#     proxyTimeout 500 with the lines: the client's connection was closed
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
npm install --silent --no-audit --no-fund http-proxy@1.18.1 >npm 2>&1 || { cat npm; exit 1; }
cat > run.cjs <<'NODE'
const assert = require("node:assert");
const http = require("node:http");
const httpProxy = require("http-proxy");

// Stream one event through a proxy; say what became of the connections at both of its sides.
async function seen({ proxyTimeout, breaksOff, mended }) {
  let server_closed = false;
  const server = http.createServer((request, response) => {
    response.on("close", () => (server_closed = true));
    response.writeHead(200, { "content-type": "text/event-stream" });
    response.write("data: one\n\n");
    if (breaksOff) setTimeout(() => request.socket.destroy(), 200);
  });
  await new Promise((done) => server.listen(0, "127.0.0.1", done));
  const target = `http://127.0.0.1:${server.address().port}`;
  const proxy = httpProxy.createProxyServer({ target, proxyTimeout });
  proxy.on("error", () => {});
  if (mended) proxy.on("proxyRes", (up, req, res) => up.on("aborted", () => res.destroy()));
  const front = http.createServer((request, response) => proxy.web(request, response));
  await new Promise((done) => front.listen(0, "127.0.0.1", done));
  const client = await new Promise((done) => {
    const asked = http.get({ port: front.address().port, host: "127.0.0.1" }, (response) => {
      let ended = false;
      response.on("data", () => {});
      response.on("error", () => {});
      response.on("close", () => (ended = true));
      setTimeout(() => done(ended ? "closed" : "waits"), 3000);
    });
    asked.on("error", () => {});
  });
  return { server: server_closed ? "closed" : "open", client };
}

(async () => {
  const cut = await seen({ proxyTimeout: 500 });
  const broken = await seen({ breaksOff: true });
  const mended = await seen({ proxyTimeout: 500, mended: true });
  const words = { waits: "the client still waits after 3 s", closed: "the client's connection was closed" };
  console.log(`proxyTimeout 500: the server's connection was ${cut.server}, ${words[cut.client]}`);
  console.log(`a break by the server: ${words[broken.client]}`);
  console.log(`proxyTimeout 500 with the lines: ${words[mended.client]}`);
  assert.deepStrictEqual([cut.server, cut.client, broken.client, mended.client],
    ["closed", "waits", "waits", "closed"], "a release has changed this");
  process.exit(0);
})();
NODE
node --no-deprecation run.cjs
