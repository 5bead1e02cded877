// Streams a POST with one library, and writes each piece as it comes.
const [library, url] = process.argv.slice(2);
const body = { model: "m", stream: true, messages: [{ role: "user", content: "hi" }] };
const show = (piece) => new Promise((done) => process.stdout.write(piece, done));

const libraries = {
  async fetch() {
    const headers = { "content-type": "application/json" };
    const response = await fetch(url, { method: "POST", headers, body: JSON.stringify(body) });
    if (!response.ok) throw new Error(`${response.status} ${await response.text()}`);
    for await (const piece of response.body) await show(piece);
  },
  async openai() {
    const { default: OpenAI } = await import("openai");
    const client = new OpenAI({ baseURL: url.split("/chat/")[0], apiKey: "placeholder" });
    const stream = await client.chat.completions.create({ model: "m", messages: [], stream: true });
    for await (const part of stream) await show(`data: {"n":${part.n}}\n\n`);
  },
  async anthropic() {
    const { default: Anthropic } = await import("@anthropic-ai/sdk");
    const client = new Anthropic({ baseURL: url.split("/v1/")[0], apiKey: "placeholder" });
    const call = { model: "m", messages: [], max_tokens: 9, stream: true };
    for await (const part of await client.messages.create(call)) {
      if (part.type === "content_block_delta") await show(part.delta.text);
    }
  },
};

libraries[library]().catch((error) => {
  for (let cause = error; cause; cause = cause.cause) console.error(String(cause));
  process.exitCode = 1;
});
