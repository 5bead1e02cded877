"""The proxies that are measured: the daemon, and what a user would take instead.

Each has one processor and one thread, streams without buffers of its own, keeps its connections to
the provider, and writes no access log; the daemon writes its trace, its log and its metrics, as it
does in use.  With ``-tls`` behind the name the provider is reached by TLS, and its certificate is
verified by all.  ``cpython`` is no proxy: it is what any in Python costs at least.
"""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from string import Template
from typing import NamedTuple

from bench import build
from bench.processes import free_port
from bench.table import ours_for

KEY = "bench-key"
"""The client's key; the daemon replaces it by the provider's credential, the others hand it on."""

PATH = "/v1/chat/completions"


class Upstream(NamedTuple):
    """Where the provider is; ``authority`` is the file that its certificate is verified with."""

    port: int
    authority: Path | None = None

    @property
    def url(self) -> str:
        """Its URL."""
        return f"{'http' if self.authority is None else 'https'}://127.0.0.1:{self.port}"


class Start(NamedTuple):
    """How a proxy is started."""

    command: list[str]
    environ: dict[str, str]
    path: str = PATH


class Peer(NamedTuple):
    """A proxy that can be measured.

    Attributes:
        needs: finds or builds its program, or raises ``CannotBuildError``.
        start: from that program, a port, the provider and a folder for its files.
        version: what tells its version, from its program.
    """

    needs: Callable[[], str]
    start: Callable[[str, int, Upstream, Path], Start]
    version: Callable[[str], list[str]]


def split(name: str) -> tuple[str, bool]:
    """Return a proxy's name without ``-tls``, and whether it had that."""
    return name.removesuffix("-tls"), name.endswith("-tls")


def choose(wish: str) -> list[str]:
    """Return the names of what is measured: those that are wished, and the daemon before them.

    Raises:
        ValueError: a name is not known.
    """
    names = list(EVERY) if wish == "all" else [name.strip() for name in wish.split(",")]
    for name in names:
        if split(name)[0] not in PEERS or (name not in EVERY and name != split(name)[0]):
            raise ValueError(f"no peer {name!r}; there are {', '.join(EVERY)}")
    ours: Iterable[str] = dict.fromkeys(sorted(ours_for(name) for name in names))
    return list(dict.fromkeys([*ours, *names]))


def render(template: str, made: Path, **values: object) -> Path:
    """Write a configuration from ``proxies/``; return its path."""
    text = Template((build.PROXIES / template).read_text()).substitute(values)
    made.write_text(text)
    return made


def daemon_config(upstream: Upstream, folder: Path, port: int, admin: int, key: str) -> Path:
    """Write the daemon's configuration and its provider's credential; return the former's path."""
    credentials = folder / "credentials"
    credentials.mkdir(mode=0o700, exist_ok=True)
    (credentials / "provider-key").write_text("sk-bench\n")
    return render(
        "llmproxy.toml",
        folder / f"llmproxy-{port}.toml",
        port=port,
        admin=admin,
        credentials=credentials,
        url=upstream.url,
        llmproxy_ca="" if upstream.authority is None else f'ca = "{upstream.authority}"',
        digest=hashlib.sha256(key.encode()).hexdigest(),
        folder=folder,
    )


def _llmproxy(program: str, port: int, upstream: Upstream, folder: Path) -> Start:
    config = daemon_config(upstream, folder, port, free_port(), KEY)
    twistd = [program, "-c", "from twisted.scripts.twistd import run; run()", "-n", "--pidfile="]
    command = [*twistd, "llmproxy", "--config", str(config)]
    return Start(command, {"PYTHONPATH": str(build.ROOT)}, f"/openai{PATH}")


def _nginx(program: str, port: int, upstream: Upstream, folder: Path) -> Start:
    # The file of the authority is named where TLS is not used, too, and must exist there.
    authority = upstream.authority or build.certificates()[0]
    scheme = "http" if upstream.authority is None else "https"
    made = folder / f"nginx-{port}.conf"
    values = {"port": port, "upstream": upstream.port, "folder": folder}
    config = render("nginx.conf", made, **values, scheme=scheme, ca=authority)
    return Start([program, "-c", str(config), "-p", str(folder)], {})


def _haproxy(program: str, port: int, upstream: Upstream, folder: Path) -> Start:
    tls = ""
    if upstream.authority is not None:
        verify = f"verify required ca-file {upstream.authority} verifyhost localhost"
        tls = f"ssl {verify} sni str(localhost)"
    made = folder / f"haproxy-{port}.cfg"
    config = render("haproxy.cfg", made, port=port, upstream=upstream.port, haproxy_tls=tls)
    return Start([program, "-f", str(config)], {})


def _caddy(program: str, port: int, upstream: Upstream, folder: Path) -> Start:
    config = render("Caddyfile", folder / f"Caddyfile-{port}", port=port, upstream=upstream.port)
    command = [program, "run", "--config", str(config), "--adapter", "caddyfile"]
    return Start(command, {"GOMAXPROCS": "1", "HOME": str(folder)})


def _envoy(program: str, port: int, upstream: Upstream, folder: Path) -> Start:
    tls = "" if upstream.authority is None else _ENVOY_TLS.format(upstream.authority)
    made = folder / f"envoy-{port}.yaml"
    config = render("envoy.yaml", made, port=port, upstream=upstream.port, envoy_tls=tls)
    options = ["--concurrency", "1", "--disable-hot-restart", "-l", "error"]
    return Start([program, *options, "-c", str(config)], {})


_ENVOY_TLS = """\
transport_socket:
      name: tls
      typed_config:
        "@type": type.googleapis.com/envoy.extensions.transport_sockets.tls.v3.UpstreamTlsContext
        sni: localhost
        common_tls_context:
          validation_context:
            trusted_ca: {{ filename: "{}" }}
            match_typed_subject_alt_names: [{{ san_type: DNS, matcher: {{ exact: localhost }} }}]
"""


def _traefik(program: str, port: int, upstream: Upstream, folder: Path) -> Start:
    made = folder / f"traefik-routes-{port}.yaml"
    routes = render("traefik-routes.yaml", made, upstream=upstream.port)
    config = render("traefik.yaml", folder / f"traefik-{port}.yaml", port=port, routes=routes)
    return Start([program, f"--configFile={config}"], {"GOMAXPROCS": "1", "HOME": str(folder)})


def _authority(upstream: Upstream) -> list[str]:
    return [] if upstream.authority is None else [str(upstream.authority)]


def _go(program: str, port: int, upstream: Upstream, _: Path) -> Start:
    return Start([program, str(port), upstream.url, *_authority(upstream)], {"GOMAXPROCS": "1"})


def _aiohttp(program: str, port: int, upstream: Upstream, _: Path) -> Start:
    script = str(build.PROXIES / "aiohttp_proxy.py")
    return Start([program, script, str(port), upstream.url, *_authority(upstream)], {})


def _cpython(program: str, port: int, upstream: Upstream, _: Path) -> Start:
    script = str(build.PROXIES / "cpython.py")
    return Start([program, script, str(port), str(upstream.port)], {})


_AIOHTTP_VERSION = (
    "import aiohttp, uvloop; print(aiohttp.__version__, 'uvloop', uvloop.__version__)"
)
_OUR_VERSION = (
    "import sys, twisted, treq, llmproxy.version as v;"
    "print(v.version(), 'CPython', sys.version.split()[0], 'Twisted', twisted.__version__,"
    " 'treq', treq.__version__)"
)

PEERS = {
    "llmproxy": Peer(lambda: sys.executable, _llmproxy, lambda p: [p, "-c", _OUR_VERSION]),
    "nginx": Peer(lambda: build.find("nginx"), _nginx, lambda p: [p, "-v"]),
    "haproxy": Peer(lambda: build.find("haproxy"), _haproxy, lambda p: [p, "-v"]),
    "go": Peer(build.go_proxy, _go, lambda p: [build.find("go"), "version"]),
    "envoy": Peer(lambda: build.find_peer("envoy"), _envoy, lambda p: [p, "--version"]),
    "caddy": Peer(lambda: build.find_peer("caddy"), _caddy, lambda p: [p, "version"]),
    "traefik": Peer(lambda: build.find_peer("traefik"), _traefik, lambda p: [p, "version"]),
    "aiohttp": Peer(build.aiohttp_python, _aiohttp, lambda p: [p, "-c", _AIOHTTP_VERSION]),
    "cpython": Peer(lambda: sys.executable, _cpython, lambda p: [p, "--version"]),
}

EVERY = (
    *("llmproxy", "nginx", "haproxy", "envoy", "go", "caddy", "traefik", "aiohttp", "cpython"),
    *("llmproxy-tls", "nginx-tls", "haproxy-tls", "envoy-tls", "go-tls", "aiohttp-tls"),
)
