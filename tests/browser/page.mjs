// Calls the proxy with the SDKs as web pages do, and reports to the page's own server what came of it.
import Anthropic from "@anthropic-ai/sdk";
import OpenAI from "openai";

const asked = { model: "demo-fast", messages: [{ role: "user", content: "hi" }], stream: true };
const { proxy, anonymous, key } = await (await fetch("/config")).json();
const shared = { maxRetries: 0, dangerouslyAllowBrowser: true };
const openai = (path, apiKey = key) =>
  new OpenAI({ baseURL: `${proxy}${path}/v1`, apiKey, ...shared }).chat.completions;
const anthropic = new Anthropic({ baseURL: `${proxy}/anthropic`, apiKey: key, ...shared }).messages;

async function text(stream, piece) {
  let found = "";
  for await (const event of await stream) found += piece(event) ?? "";
  return found;
}

const calls = {
  openai: () => text(openai("/openai").create(asked), (event) => event.choices[0]?.delta?.content),
  anthropic: () =>
    text(anthropic.create({ ...asked, max_tokens: 100 }), (event) => event.delta?.text),
  wrong: () => openai("/openai", "a-wrong-key").create(asked),
  closed: () => openai("/closed").create(asked),
  form: async () =>
    (await fetch(`${anonymous}/openai/v1/chat/completions`, {
      method: "POST",
      mode: "no-cors",
      body: JSON.stringify({ ...asked, stream: false }),
    })).type,
};

const found = {};
for (const [name, call] of Object.entries(calls)) {
  try {
    found[name] = { value: await call() };
  } catch (error) {
    found[name] = {
      error: error.constructor.name,
      status: error.status,
      message: error.message,
      id: error.headers?.get("x-llmproxy-request-id"),
      retry: error.headers?.get("x-should-retry"),
    };
  }
}
await fetch("/report", { method: "POST", body: JSON.stringify(found) });
