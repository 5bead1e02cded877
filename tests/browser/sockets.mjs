// WebSockets as npm programs make them; one of these is run in a process of its own, and prints JSON.
import { WebSocket, WebSocketServer } from "ws";
import OpenAI from "openai";
import { OpenAIRealtimeWS } from "openai/realtime/ws";
import { OpenAIRealtimeWebSocket } from "openai/realtime/websocket";

const [what, address, key] = process.argv.slice(2);
const say = (found) => console.log(JSON.stringify(found));
const mass = Buffer.alloc(5 * 1024 * 1024, "mass");

function echoed() {
  const socket = new WebSocket(address, { headers: { authorization: `Bearer ${key}` } });
  const found = { messages: [], pongs: 0 };
  socket.on("open", () => {
    socket.ping("ping");
    for (const message of ["text", "again and again ".repeat(500), "again and again ".repeat(500)])
      socket.send(message);
    socket.send(mass);
    socket.send("in ", { fin: false });
    socket.send("pieces", { fin: true });
  });
  socket.on("pong", () => (found.pongs += 1));
  socket.on("message", (data, isBinary) => {
    found.messages.push([isBinary, data.length, isBinary && data.equals(mass)]);
    if (found.messages.length === 5) socket.close(4001, "enough");
  });
  socket.on("close", (code, reason) =>
    say({ ...found, code, reason: reason.toString(), extensions: socket.extensions }));
  socket.on("error", (error) => say({ error: error.message }));
}

function refused() {
  const socket = new WebSocket(address, { headers: { authorization: "Bearer wrong" } });
  socket.on("unexpected-response", (request, response) => {
    let body = "";
    response.on("data", (data) => (body += data));
    response.on("end", () => {
      say({ status: response.statusCode, body });
      request.destroy();
    });
  });
}

function served() {
  const server = new WebSocketServer({ port: 0, host: "127.0.0.1", perMessageDeflate: true });
  server.on("connection", (socket) => {
    socket.on("message", (data, isBinary) => socket.send(data, { binary: isBinary }));
    socket.on("close", (code) => say({ code }));
  });
  server.on("listening", () => say({ port: server.address().port }));
}

async function realtime(Kind) {
  const client = new OpenAI({ baseURL: address, apiKey: key, maxRetries: 0 });
  const socket = new Kind({ model: "gpt-realtime", dangerouslyAllowBrowser: true }, client);
  const types = [];
  socket.on("event", (event) => {
    types.push(event.type);
    if (event.type === "session.created") socket.send({ type: "response.create" });
    if (event.type === "response.done") {
      socket.close();
      say({ types, total: event.response.usage.total_tokens });
      setTimeout(() => process.exit(0), 300);
    }
  });
  socket.on("error", (error) => {
    say({ error: error.message, types });
    process.exit(1);
  });
}

const calls = {
  echoed,
  refused,
  served,
  "realtime ws": () => realtime(OpenAIRealtimeWS),
  "realtime websocket": () => realtime(OpenAIRealtimeWebSocket),
};
await calls[what]();
