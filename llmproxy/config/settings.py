"""The effective configuration: frozen structs, as the rest of the program reads them.

Nothing here knows TOML, files or the environment: ``config.py`` fills these structs, and everybody
takes them from there.  Durations are seconds as ``float`` and ``None`` where the file says
``"off"``; sizes are bytes.  Two things are kept from ever being printed: a credential's value
(:class:`Secret`) and the digests of client keys (:class:`Client`).
"""

from __future__ import annotations

from typing import Literal, cast

import msgspec

from llmproxy.config.url import Url
from llmproxy.config.values import show_duration, show_size
from llmproxy.dialects.dialect import Dialect


class Secret:
    """A credential's value, which ``repr``, ``str`` and the encoders of msgspec do not give away.

    It is no struct on purpose: msgspec would encode a struct's fields, and refuses this class.
    """

    __slots__ = ("_value",)

    def __init__(self, value: str) -> None:
        self._value = value

    def reveal(self) -> str:
        """Return the value itself, to be put on a request and nowhere else."""
        return self._value

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Secret) and other._value == self._value

    def __hash__(self) -> int:
        return hash(self._value)

    def __repr__(self) -> str:
        return "***"


class Timeouts(msgspec.Struct, frozen=True, kw_only=True):
    """Every deadline, in seconds; ``None`` is off (design 4 says what each one measures)."""

    connect: float | None = 10.0
    first_byte: float | None = 600.0
    idle: float | None = 300.0
    total: float | None = None
    client_stall: float | None = 60.0
    request_head: float | None = 10.0
    request_body: float | None = 60.0
    client_idle: float | None = 75.0
    pool_idle: float | None = 60.0


class Limits(msgspec.Struct, frozen=True, kw_only=True):
    """How much is held or accepted, in bytes; of connections and drains how many.

    With 0 there is no limit to ``connections_per_address``, and no drain.
    """

    request_head: int = 32 * 1024
    request_body: int = 32 * 1024**2
    request_memory: int = 256 * 1024**2
    response_head: int = 64 * 1024
    accumulate: int = 1024**2
    event: int = 1024**2
    connections_per_address: int = 0
    drains: int = 100


class Provider(msgspec.Struct, frozen=True, kw_only=True):
    """A service that answers, and how it wants to be called.

    ``header`` and the names in ``headers`` are lower-case; ``format`` holds exactly one ``{}``,
    where the credential goes; ``timeouts`` holds only what this provider sets for itself.
    """

    name: str
    url: Url
    dialect: Dialect
    credential: Secret | None = None
    header: str = "authorization"
    format: str = "Bearer {}"
    pass_credential: bool = False
    headers: tuple[tuple[str, str], ...] = ()
    ca: str | None = None
    pool: int = 1000
    timeouts: dict[str, float | None] = {}


class Override(msgspec.Struct, frozen=True, kw_only=True):
    """What a route changes for one of its candidates."""

    model: str | None = None


class Route(msgspec.Struct, frozen=True, kw_only=True):
    """From (host, path prefix, model) to candidates; ``hosts`` are lower-case.

    ``hosts`` and ``models`` are ``None`` where the route takes any; ``timeouts`` holds only what
    this route sets for itself, and ``request_body`` is its own limit in bytes.
    """

    name: str
    path: str
    providers: tuple[str, ...]
    hosts: tuple[str, ...] | None = None
    models: tuple[str, ...] | None = None
    strip: bool = True
    override: dict[str, Override] = {}
    timeouts: dict[str, float | None] = {}
    accept_encoding: Literal["identity", "pass"] = "identity"
    include_usage: Literal["as-asked", "inject"] = "as-asked"
    on_disconnect: Literal["cancel", "drain"] = "cancel"
    drain_for: float = 30.0
    error_event: bool = False
    capture: Literal["usage", "content"] = "usage"
    request_body: int | None = None


class Client(msgspec.Struct, frozen=True, kw_only=True):
    """A program that may call; ``keys`` are 32-byte SHA-256 digests, which ``repr`` only counts."""

    name: str
    keys: tuple[bytes, ...]
    routes: tuple[str, ...] = ("*",)
    models: tuple[str, ...] = ("*",)

    def __repr__(self) -> str:
        return (
            f"Client(name={self.name!r}, keys=<{len(self.keys)}>, "
            f"routes={self.routes!r}, models={self.models!r})"
        )


class Keypair(msgspec.Struct, frozen=True, kw_only=True):
    """What a listener shows and proves with: a PEM chain and its key.

    ``not_after`` is when the certificate expires, in seconds since the epoch.
    """

    certificate: bytes
    key: Secret
    not_after: float


class Proxy(msgspec.Struct, frozen=True, kw_only=True):
    """The listeners that clients reach; ``via`` is our pseudonym in Via.

    ``keypair`` is there where ``listen_tls`` is.
    """

    listen: tuple[str, ...] = ("tcp:8080:interface=127.0.0.1",)
    listen_tls: tuple[str, ...] = ()
    reuse_port: bool = False
    keypair: Keypair | None = None
    anonymous: bool = False
    drain_timeout: float = 300.0
    max_connections: int = 20000
    tuned_loop: bool = True
    via: str = "llmproxy"


class Admin(msgspec.Struct, frozen=True, kw_only=True):
    """The listener that operators and Prometheus reach."""

    listen: str = "tcp:9080:interface=127.0.0.1"
    metrics_listen: str | None = None


class Trace(msgspec.Struct, frozen=True, kw_only=True):
    """Where the record of each request goes; ``None`` is nowhere.

    ``keep`` is for how many seconds the ledger keeps it (``None``: for ever), ``session_header``
    the lower-case name of the field in which callers name their session.
    """

    jsonl: str | None = None
    ledger: str | None = None
    keep: float | None = 30 * 86400.0
    otlp: Url | None = None
    session_header: str = "x-session-id"


class Config(msgspec.Struct, frozen=True, kw_only=True):
    """The whole configuration, checked; ``routes`` stand in the order of the file."""

    proxy: Proxy = Proxy()
    admin: Admin = Admin()
    timeouts: Timeouts = Timeouts()
    limits: Limits = Limits()
    providers: dict[str, Provider] = {}
    routes: tuple[Route, ...] = ()
    clients: dict[str, Client] = {}
    trace: Trace = Trace()

    def timeouts_for(self, route: Route, provider: Provider) -> Timeouts:
        """Return the deadlines of one request: the route's, else the provider's, else ours."""
        return msgspec.structs.replace(self.timeouts, **{**provider.timeouts, **route.timeouts})

    def redacted(self) -> dict[str, object]:
        """Return the effective configuration as JSON-able values, without anything secret.

        Durations and sizes are strings as in the file.  A credential is true or false, keys are
        a count, and of a provider's added headers only the names are shown.
        """
        return {
            "proxy": _proxy(self.proxy),
            "admin": msgspec.structs.asdict(self.admin),
            "timeouts": _durations(msgspec.structs.asdict(self.timeouts)),
            "limits": _limits(self.limits),
            "providers": {name: _provider(one) for name, one in self.providers.items()},
            "routes": [_route(one) for one in self.routes],
            "clients": {name: _client(one) for name, one in self.clients.items()},
            "trace": _trace(self.trace),
        }


def _proxy(proxy: Proxy) -> dict[str, object]:
    return {
        "listen": list(proxy.listen),
        "listen_tls": list(proxy.listen_tls),
        "reuse_port": proxy.reuse_port,
        "certificate": proxy.keypair is not None,
        "key": proxy.keypair is not None,
        "anonymous": proxy.anonymous,
        "drain_timeout": show_duration(proxy.drain_timeout),
        "max_connections": proxy.max_connections,
        "tuned_loop": proxy.tuned_loop,
        "via": proxy.via,
    }


def _limits(limits: Limits) -> dict[str, object]:
    shown: dict[str, object] = dict(msgspec.structs.asdict(limits))
    counts = {name: shown.pop(name) for name in ("connections_per_address", "drains")}
    return {name: show_size(cast(int, size)) for name, size in shown.items()} | counts


def _durations(timeouts: dict[str, float | None]) -> dict[str, object]:
    return {name: show_duration(seconds) for name, seconds in timeouts.items()}


def _provider(provider: Provider) -> dict[str, object]:
    return {
        "url": str(provider.url),
        "dialect": provider.dialect.value,
        "credential": provider.credential is not None,
        "header": provider.header,
        "format": provider.format,
        "pass_credential": provider.pass_credential,
        "headers": [name for name, _ in provider.headers],
        "ca": provider.ca,
        "pool": provider.pool,
        "timeouts": _durations(provider.timeouts),
    }


def _route(route: Route) -> dict[str, object]:
    return {
        "name": route.name,
        "path": route.path,
        "providers": list(route.providers),
        "hosts": None if route.hosts is None else list(route.hosts),
        "models": None if route.models is None else list(route.models),
        "strip": route.strip,
        "override": {name: {"model": one.model} for name, one in route.override.items()},
        "timeouts": _durations(route.timeouts),
        "accept_encoding": route.accept_encoding,
        "include_usage": route.include_usage,
        "on_disconnect": route.on_disconnect,
        "drain_for": show_duration(route.drain_for),
        "error_event": route.error_event,
        "capture": route.capture,
        "request_body": None if route.request_body is None else show_size(route.request_body),
    }


def _trace(trace: Trace) -> dict[str, object]:
    return {
        "jsonl": trace.jsonl,
        "ledger": trace.ledger,
        "keep": show_duration(trace.keep),
        "otlp": None if trace.otlp is None else str(trace.otlp),
        "session_header": trace.session_header,
    }


def _client(client: Client) -> dict[str, object]:
    return {
        "keys": len(client.keys),
        "routes": list(client.routes),
        "models": list(client.models),
    }
