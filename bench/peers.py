"""The proxies that are measured: the daemon, and what a user would take instead.

Each has one processor and one thread, streams without buffers of its own, keeps its connections to
the provider, and writes no access log; the daemon writes its trace, its log and its metrics, as it
does in use.  With ``-tls`` behind the name the provider is reached by TLS, and its certificate is
verified by all; at W8T such a proxy listens by TLS, too.  ``cpython`` is no proxy: it is what any
in Python costs at least.
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
from bench.table import OURS, ours_for
from bench.works import Work

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


class Listen(NamedTuple):
    """Where a proxy listens; with a ``certificate``, whose file has its key as well, by TLS."""

    port: int
    certificate: Path | None = None


class Start(NamedTuple):
    """How a proxy is started, and the path and further fields of requests to it."""

    command: list[str]
    environ: dict[str, str]
    path: str = PATH
    fields: tuple[str, ...] = ()


class Peer(NamedTuple):
    """A proxy that can be measured.

    Attributes:
        needs: finds or builds its program, or raises ``CannotBuildError``.
        start: from that program, where it listens, the provider and a folder for its files.
        version: what tells its version, from its program.
        ends_tls: it can listen by TLS.
        works: the workloads that it can do, where that is not every one.
    """

    needs: Callable[[], str]
    start: Callable[[str, Listen, Upstream, Path], Start]
    version: Callable[[str], list[str]]
    ends_tls: bool = False
    works: tuple[str, ...] | None = None


def split(name: str) -> tuple[str, bool]:
    """Return a proxy's name without ``-tls``, and whether it had that."""
    return name.removesuffix("-tls"), name.endswith("-tls")


def takes(name: str, work: Work) -> bool:
    """Tell whether a proxy is measured with a workload."""
    kind, secure = split(name)
    peer = PEERS[kind]
    if peer.works is not None and work.name not in peer.works:
        return False
    if work.tls_clients:
        return secure and peer.ends_tls
    return work.tls_upstream or not secure


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


def daemon_config(
    upstream: Upstream, folder: Path, port: int, admin: int, key: str, tls: Path | None = None
) -> Path:
    """Write the daemon's configuration and its credentials; return the former's path."""
    credentials = folder / "credentials"
    credentials.mkdir(mode=0o700, exist_ok=True)
    (credentials / "provider-key").write_text("sk-bench\n")
    if tls is not None:
        at = (pem := tls.read_text()).index("-----BEGIN CERTIFICATE")
        (credentials / "key").write_text(pem[:at])
        (credentials / "certificate").write_text(pem[at:])
    return render(
        "llmproxy.toml",
        folder / f"llmproxy-{port}.toml",
        listen="listen" if tls is None else "listen_tls",
        listen_tls="" if tls is None else 'certificate = "certificate"\nkey = "key"',
        port=port,
        admin=admin,
        credentials=credentials,
        url=upstream.url,
        llmproxy_ca="" if upstream.authority is None else f'ca = "{upstream.authority}"',
        digest=hashlib.sha256(key.encode()).hexdigest(),
        folder=folder,
    )


def _llmproxy(program: str, listen: Listen, upstream: Upstream, folder: Path) -> Start:
    config = daemon_config(upstream, folder, listen.port, free_port(), KEY, tls=listen.certificate)
    twistd = [program, "-c", "from twisted.scripts.twistd import run; run()", "-n", "--pidfile="]
    command = [*twistd, "llmproxy", "--config", str(config)]
    return Start(command, {"PYTHONPATH": str(build.ROOT)}, f"/openai{PATH}")


def _nginx(program: str, listen: Listen, upstream: Upstream, folder: Path) -> Start:
    # The file of the authority is named where TLS is not used, too, and must exist there.
    authority = upstream.authority or build.certificates()[0]
    scheme = "http" if upstream.authority is None else "https"
    made = folder / f"nginx-{listen.port}.conf"
    values = {"port": listen.port, "upstream": upstream.port, "folder": folder}
    config = render(
        "nginx.conf",
        made,
        **values,
        scheme=scheme,
        ca=authority,
        listen_tls="" if listen.certificate is None else _NGINX_TLS.format(listen.certificate),
    )
    return Start([program, "-c", str(config), "-p", str(folder)], {})


_NGINX_TLS = "ssl; ssl_certificate {0}; ssl_certificate_key {0}; ssl_protocols TLSv1.2 TLSv1.3"


def _haproxy(program: str, listen: Listen, upstream: Upstream, folder: Path) -> Start:
    tls = ""
    if upstream.authority is not None:
        verify = f"verify required ca-file {upstream.authority} verifyhost localhost"
        tls = f"ssl {verify} sni str(localhost)"
    pair, made = listen.certificate, folder / f"haproxy-{listen.port}.cfg"
    values = {"port": listen.port, "upstream": upstream.port, "haproxy_tls": tls}
    listen_tls = "" if pair is None else f"ssl crt {pair} alpn http/1.1"
    config = render("haproxy.cfg", made, **values, listen_tls=listen_tls)
    return Start([program, "-f", str(config)], {})


def _caddy(program: str, listen: Listen, upstream: Upstream, folder: Path) -> Start:
    made = folder / f"Caddyfile-{listen.port}"
    config = render("Caddyfile", made, port=listen.port, upstream=upstream.port)
    command = [program, "run", "--config", str(config), "--adapter", "caddyfile"]
    return Start(command, {"GOMAXPROCS": "1", "HOME": str(folder)})


def _envoy(program: str, listen: Listen, upstream: Upstream, folder: Path) -> Start:
    tls = "" if upstream.authority is None else _ENVOY_TLS.format(upstream.authority)
    pair, made = listen.certificate, folder / f"envoy-{listen.port}.yaml"
    values = {"port": listen.port, "upstream": upstream.port, "envoy_tls": tls}
    listen_tls = "" if pair is None else _ENVOY_LISTEN_TLS.format(pair, _ENVOY_TYPES)
    config = render("envoy.yaml", made, **values, listen_tls=listen_tls)
    options = ["--concurrency", "1", "--disable-hot-restart", "-l", "error"]
    return Start([program, *options, "-c", str(config)], {})


_ENVOY_TYPES = "type.googleapis.com/envoy.extensions"
_ENVOY_LISTEN_TLS = """\
transport_socket:
        name: tls
        typed_config:
          "@type": {1}.transport_sockets.tls.v3.DownstreamTlsContext
          common_tls_context:
            alpn_protocols: [http/1.1]
            tls_certificates:
            - {{ certificate_chain: {{ filename: "{0}" }}, private_key: {{ filename: "{0}" }} }}
"""

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


def _traefik(program: str, listen: Listen, upstream: Upstream, folder: Path) -> Start:
    made = folder / f"traefik-routes-{listen.port}.yaml"
    routes = render("traefik-routes.yaml", made, upstream=upstream.port)
    made = folder / f"traefik-{listen.port}.yaml"
    config = render("traefik.yaml", made, port=listen.port, routes=routes)
    return Start([program, f"--configFile={config}"], {"GOMAXPROCS": "1", "HOME": str(folder)})


def _authority(upstream: Upstream) -> list[str]:
    return [] if upstream.authority is None else [str(upstream.authority)]


def _go(program: str, listen: Listen, upstream: Upstream, _: Path) -> Start:
    environ = {"GOMAXPROCS": "1"}
    if listen.certificate is not None:
        environ["CERTIFICATE"] = str(listen.certificate)
    return Start([program, str(listen.port), upstream.url, *_authority(upstream)], environ)


def _aiohttp(program: str, listen: Listen, upstream: Upstream, _: Path) -> Start:
    script = str(build.PROXIES / "aiohttp_proxy.py")
    return Start([program, script, str(listen.port), upstream.url, *_authority(upstream)], {})


def _litellm(program: str, listen: Listen, upstream: Upstream, folder: Path) -> Start:
    made = folder / f"litellm-{listen.port}.yaml"
    config = render("litellm.yaml", made, key=KEY, url=upstream.url)
    options = ["--config", str(config), "--host", "127.0.0.1", "--port", str(listen.port)]
    options += ["--num_workers", "1", "--log_config", str(build.PROXIES / "litellm-log.json")]
    environ = {"LITELLM_LOCAL_MODEL_COST_MAP": "True", "LITELLM_LOG": "ERROR"}
    return Start([str(Path(program).parent / "litellm"), *options], environ, f"/bench{PATH}")


def _portkey(program: str, listen: Listen, upstream: Upstream, _: Path) -> Start:
    command = [build.find("node"), program, f"--port={listen.port}", "--headless"]
    fields = ("x-portkey-provider: openai", f"x-portkey-custom-host: {upstream.url}/v1")
    return Start(command, {"NODE_ENV": "production"}, PATH, fields)


def _cpython(program: str, listen: Listen, upstream: Upstream, _: Path) -> Start:
    script = str(build.PROXIES / "cpython.py")
    return Start([program, script, str(listen.port), str(upstream.port)], {})


_AIOHTTP_VERSION = (
    "import aiohttp, uvloop; print(aiohttp.__version__, 'uvloop', uvloop.__version__)"
)
_LITELLM_VERSION = "from importlib.metadata import version; print(version('litellm'))"
_PORTKEY_VERSION = "require('{}/package.json').version + ' Node ' + process.version"
_OUR_VERSION = (
    "import sys, twisted, treq, llmproxy.version as v;"
    "print(v.version(), 'CPython', sys.version.split()[0], 'Twisted', twisted.__version__,"
    " 'treq', treq.__version__)"
)

_SLOW = ("W1", "W3", "START")
"""What gateways can do that need milliseconds for each event or request."""

PEERS = {
    "llmproxy": Peer(
        lambda: sys.executable, _llmproxy, lambda p: [p, "-c", _OUR_VERSION], ends_tls=True
    ),
    "nginx": Peer(lambda: build.find("nginx"), _nginx, lambda p: [p, "-v"], ends_tls=True),
    "haproxy": Peer(lambda: build.find("haproxy"), _haproxy, lambda p: [p, "-v"], ends_tls=True),
    "go": Peer(build.go_proxy, _go, lambda p: [build.find("go"), "version"], ends_tls=True),
    "envoy": Peer(
        lambda: build.find_peer("envoy"), _envoy, lambda p: [p, "--version"], ends_tls=True
    ),
    "caddy": Peer(lambda: build.find_peer("caddy"), _caddy, lambda p: [p, "version"]),
    "traefik": Peer(lambda: build.find_peer("traefik"), _traefik, lambda p: [p, "version"]),
    "aiohttp": Peer(build.aiohttp_python, _aiohttp, lambda p: [p, "-c", _AIOHTTP_VERSION]),
    "litellm": Peer(
        build.litellm_python, _litellm, lambda p: [p, "-c", _LITELLM_VERSION], works=_SLOW
    ),
    "portkey": Peer(
        build.portkey,
        _portkey,
        lambda p: [build.find("node"), "-p", _PORTKEY_VERSION.format(Path(p).parents[1])],
        works=_SLOW,
    ),
    "cpython": Peer(lambda: sys.executable, _cpython, lambda p: [p, "--version"]),
}


def add_interpreter(python: str) -> list[str]:
    """Add the daemon as another CPython runs it; return its names, plain and by TLS.

    Raises:
        CannotBuildError: there is no such interpreter, or pip has not what the daemon needs.
    """
    version, program = build.daemon_python(python)
    name = f"{OURS}-{version}"
    PEERS[name] = PEERS[OURS]._replace(needs=lambda: program)
    return [name, f"{name}-tls"]


EVERY = (
    *("llmproxy", "nginx", "haproxy", "envoy", "go", "caddy", "traefik", "aiohttp"),
    *("litellm", "portkey", "cpython"),
    *("llmproxy-tls", "nginx-tls", "haproxy-tls", "envoy-tls", "go-tls", "aiohttp-tls"),
)
