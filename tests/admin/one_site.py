"""An admin site of which a test holds the parts, and rows of requests that it makes up."""

from __future__ import annotations

import json
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import msgspec
from twisted.internet.address import IPv4Address
from twisted.internet.task import Clock

from llmproxy.admin.clients import Clients
from llmproxy.admin.overview import Overview, ProcessRow, Reloaded
from llmproxy.admin.providers import Providers
from llmproxy.admin.site import Shown, admin_site
from llmproxy.admin.streams import Streams
from llmproxy.config import Config, Secret, parse
from llmproxy.policy.limits import ClientLimits
from llmproxy.policy.standing import Standing
from llmproxy.record.flight import FlightRecorder
from llmproxy.record.metrics import Metrics
from tests.support.fake_transport import FakeTransport
from tests.support.sockets import request

CLIENT = IPv4Address("TCP", "127.0.0.1", 40000)
TOKEN = "admin-TOKEN"
BEARER = f"Authorization: Bearer {TOKEN}"
FILE = """
proxy.anonymous = true
providers.p = { url = "http://p.example/v1", dialect = "openai" }
providers."q.1" = { url = "http://q.example", dialect = "raw" }
routes = [{ path = "/p", providers = ["p"] }, { path = "/q", providers = ["q.1"] }]
"""


def with_token(token: str | None) -> Config:
    """Return a configuration of two providers, and with this admin token."""
    config = parse(FILE, environ={})
    secret = None if token is None else Secret(token)
    admin = msgspec.structs.replace(config.admin, token=secret)
    return msgspec.structs.replace(config, admin=admin)


class Admin:
    """An admin site and one connection to it."""

    def __init__(
        self,
        *,
        config: bool = True,
        address: Any = CLIENT,
        turns: Callable[[], object] | None = None,
    ) -> None:
        self.ready = True
        self.hosts: tuple[str, ...] = ()
        self.shown: Any = {"proxy": {"via": "us"}}
        self.exchanges: list[Any] = []
        self.metrics = Metrics("1.2.3")
        self.followed = with_token(TOKEN)
        self.counts = {("p", "idle"): 3}
        self.flights = FlightRecorder()
        clock, self.clock = Clock(), Clock()  # the connection's, and that of what is shown
        self.reactor = clock
        wall = lambda: 1000 + self.clock.seconds()  # noqa: E731 - a clock like the other
        self.standing = Standing(self.clock, self.clock.seconds, wall)
        self.standing.follow(self.followed)
        self.switches = self.standing.switches
        self.limits = ClientLimits(self.clock.seconds, wall)
        recorder: Any = SimpleNamespace(exchanges=self.exchanges)
        streams = Streams(SimpleNamespace(connections=()), recorder, self.clock.seconds)  # type: ignore[arg-type]  # nothing is logged
        providers = Providers(lambda: self.followed, lambda: self.counts, self.standing)
        clients = Clients(lambda: self.followed.clients, recorder, self.limits)
        reload = Reloaded(True, "2026-01-01T00:00:00Z")
        process = ProcessRow("1.2.3", "0", "", "", 1.0, 2, None, reload)
        shown = Shown(
            config=lambda: self.shown,
            streams=streams,
            providers=providers,
            clients=clients,
            flights=self.flights,
            overview=Overview(lambda: process, streams, providers, clients, self.flights),
            turns=turns,
            hosts=lambda: self.hosts,
        )
        site = admin_site(
            clock,
            clock.seconds,
            wall=lambda: 1.0,
            ready=lambda: (self.ready, "ready" if self.ready else "not ready"),
            metrics=self.metrics,
            shown=shown if config else None,
        )
        self.site, self.address = site, address
        self.transport, self.channel = self.connect()

    def connect(self) -> tuple[FakeTransport, Any]:
        """Return the wire and the server's side of a further connection."""
        transport = FakeTransport()
        transport.peerAddr = self.address
        channel = self.site.buildProtocol(None)
        transport.connect(channel)
        return transport, channel

    def get(
        self, target: str, *fields: str, method: str = "GET", body: bytes = b""
    ) -> tuple[int, dict[str, str], str]:
        """Return status, fields and body of a response."""
        self.channel.dataReceived(request(method, target, *fields, body=body))
        head, _, rest = self.transport.take().decode().partition("\r\n\r\n")
        first, *lines = head.split("\r\n")
        pairs = [line.partition(": ") for line in lines]
        return int(first.split()[1]), {name: value for name, _, value in pairs}, rest

    def post(self, target: str, *fields: str, method: str = "POST") -> tuple[int, Any]:
        """Return status and decoded body of a response, by default to whoever has the token."""
        status, _, body = self.get(target, *(fields or (BEARER,)), method=method)
        return status, json.loads(body)


def with_host(admin: Admin, host: str, path: str = "/config", method: str = "GET") -> int:
    """Return the status of a request to this host."""
    head = f"{method} {path} HTTP/1.1\r\nHost: {host}\r\n\r\n"
    admin.channel.dataReceived(head.encode())
    return int(admin.transport.take().split()[1])


class Made(SimpleNamespace):
    """A request that is being served, as far as its row asks."""

    killed = False

    def kill(self) -> None:
        """An operator ends it."""
        self.killed = True


def exchange(
    started: float = 10.0, *, client: str | None = "c", name: str = "i", **more: Any
) -> Any:
    """Return one request; by default it waits for the provider."""
    trace = SimpleNamespace(
        id=name, client=client, session=None, route="r", provider="p", model="m", attempts=[]
    )
    known = {
        "trace": trace,
        "request": SimpleNamespace(upload=None),
        "match": object(),
        "relay": None,
        "tap": None,
        "waiting": None,
        "bytes_out": 7,
        "is_detached": False,
    }
    return Made(started=started, **{**known, **more})


def relay(*, paused: bool = False, first_at: float | None = 11.0) -> Any:
    """Return the relay of a response that began at 11 and had its last chunk at 12."""
    statistics = SimpleNamespace(first_at=first_at, last_at=12.0)
    return SimpleNamespace(is_paused=paused, statistics=statistics, paused_s=0.5)


def tap(events: int = 5, tokens: int | None = None) -> Any:
    """Return what has read so many events, and so many tokens that were reported."""
    return SimpleNamespace(events=events, usage=SimpleNamespace(output_tokens=tokens))
