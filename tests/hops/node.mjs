// Node's http-proxy, or Vite's development server, before other servers.  Its one argument is JSON:
// {"kind": "http-proxy" | "vite", "root": FOLDER, "sites": [{"port", "origin", "lines"}]}.  The lines
// of a site are what a developer writes: they see `options` of the proxy, `proxy`, `app` and
// `compression`.
import http from "node:http";
import compression from "compression";

const { kind, root, sites } = JSON.parse(process.argv[2]);

function written(lines) {
  return new Function("options", "proxy", "app", "compression", lines.join("\n"));
}

// What of Express and Vite is needed here: functions that each request passes through, in order.
class App {
  steps = [];

  use(step) {
    this.steps.push(step);
  }

  run(request, response, last) {
    const steps = [...this.steps, () => last()];
    const next = () => steps.shift()(request, response, next);
    next();
  }
}

async function httpProxy({ port, origin, lines }) {
  const { default: library } = await import("http-proxy");
  const options = { target: `http://127.0.0.1:${origin}` };
  const proxy = library.createProxyServer(options);
  const app = new App();
  written(lines)(options, proxy, app, compression);
  proxy.on("error", (error, request, response) => response.destroy());
  http
    .createServer((request, response) => {
      app.run(request, response, () => proxy.web(request, response, options));
    })
    .listen(port, "127.0.0.1");
}

async function vite({ port, origin, lines }) {
  const { createServer } = await import("vite");
  const options = { target: `http://127.0.0.1:${origin}` };
  const app = new App();
  const run = (proxy, merged) => written(lines)(merged, proxy, app, compression);
  const server = await createServer({
    root,
    configFile: false,
    cacheDir: `${root}/cache-${port}`,
    logLevel: "error",
    appType: "custom",
    optimizeDeps: { noDiscovery: true },
    plugins: [
      {
        name: "before-the-proxy",
        configureServer(made) {
          made.middlewares.use((...passed) => app.run(...passed));
        },
      },
    ],
    server: {
      host: "127.0.0.1",
      port,
      strictPort: true,
      hmr: false,
      watch: null,
      proxy: { "/": { ...options, configure: run } },
    },
  });
  await server.listen();
}

for (const site of sites) {
  await { "http-proxy": httpProxy, vite }[kind](site);
}
