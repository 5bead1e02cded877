// A provider that says which models Node sees in a request: JSON.parse, WHATWG URLs, character sets
// and forms, and zlib, as body-parser and undici use them.
import http from "node:http";
import zlib from "node:zlib";

const CODINGS = {
  gzip: zlib.gunzipSync,
  deflate: zlib.inflateSync,
  br: zlib.brotliDecompressSync,
};

const attempt = (read) => {
  try {
    return read() ?? [];
  } catch {
    return [];
  }
};

const segments = (path) => {
  const parts = path.split("/").map((part) => part.split(";")[0]);
  const kept = parts.filter((part) => part !== "");
  return kept.slice(0, -1).flatMap((part, at) => {
    const next = kept[at + 1];
    if (part.toLowerCase() === "deployments") return [next];
    if (part.toLowerCase() === "models" && next.indexOf(":") > 0) return [next.split(":")[0]];
    return [];
  });
};

const json = (body, charset) =>
  attempt(() => {
    const value = JSON.parse(new TextDecoder(charset, { fatal: true }).decode(body));
    return typeof value?.model === "string" ? [value.model] : [];
  });

http
  .createServer(async (request, response) => {
    const pieces = [];
    for await (const piece of request) pieces.push(piece);
    let body = Buffer.concat(pieces);
    const decode = CODINGS[(request.headers["content-encoding"] ?? "").toLowerCase()];
    if (decode) body = attempt(() => decode(body));
    const type = request.headers["content-type"] ?? "";
    const charset = /charset="?([^";\s]+)/i.exec(type)?.[1] ?? "utf-8";
    const seen = [...json(body, "utf-8"), ...json(body, charset)];
    try {
      const form = await new Response(body, { headers: { "content-type": type } }).formData();
      seen.push(...form.getAll("model").filter((value) => typeof value === "string"));
    } catch {
      // it is no form
    }
    const url = new URL("http://localhost" + request.url);
    seen.push(...url.searchParams.getAll("model"));
    seen.push(...attempt(() => segments(url.pathname).map(decodeURIComponent)));
    seen.push(...attempt(() => segments(decodeURIComponent(url.pathname))));
    response.setHeader("content-type", "application/json");
    response.end(JSON.stringify({ seen }));
  })
  .listen(0, "127.0.0.1", function () {
    console.log(this.address().port);
  });
