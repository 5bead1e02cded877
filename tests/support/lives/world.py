"""The world of the lives: a whole proxy in this process, its provider and its clients.

All run on one reactor and over real sockets, so that leftovers of a life can be found: delayed
calls of the reactor, descriptors in the kernel, and objects that the garbage collector knows.
"""

from __future__ import annotations

import hashlib
import json
import socket
from collections.abc import AsyncIterator, Iterable, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from twisted.internet import reactor
from twisted.internet.defer import Deferred, gatherResults
from twisted.internet.endpoints import TCP4ClientEndpoint, serverFromString, wrapClientTLS
from twisted.internet.error import ConnectError
from twisted.internet.interfaces import IAddress
from twisted.internet.protocol import Factory
from twisted.internet.ssl import Certificate, optionsForClientTLS, trustRootFromCertificates

from llmproxy.config import Config, parse
from llmproxy.net.transport import raw_transport
from llmproxy.service import ProxyService
from tests.support.daemon import provider_table, route_table
from tests.support.lives.caller import LifeClient
from tests.support.lives.plan import BODY_LIMIT, CURT, IMPATIENT, KEY, PLAIN, STERN, Life
from tests.support.lives.provider import LivesProvider, Mute, ProviderFactory
from tests.support.lives.verdict import Record
from tests.support.tls import Authority

CLOCK: Any = reactor

LONGEST = 40.0
"""Seconds after which a life counts as endless."""

SEND_BUFFER = 32768
"""Bytes that the kernel takes for each client, as the listening sockets say."""

_AT_ONCE = 80
"""Lives that run at the same time; each has four sockets, so it stays far below 1024."""

_PRESENT = (
    "llmproxy_active_streams",
    "llmproxy_paused_streams",
    "llmproxy_client_connections",
    "llmproxy_upstream_connections",
    "llmproxy_buffered_bytes",
    "llmproxy_request_bytes_held",
    "llmproxy_drains",
    "llmproxy_queued_requests",
)


_SLOTS = 1_000_000
"""Requests that the client may have under way: each takes one of these, and gives it back."""


class _Once(Factory):
    """Hands out one protocol; Twisted's own says so in the log, whose history keeps it."""

    noisy = False

    def __init__(self, protocol: LifeClient) -> None:
        self._protocol = protocol

    def buildProtocol(self, addr: IAddress | None) -> LifeClient:
        """Return it."""
        return self._protocol


NO_CIRCUIT = "health = { failures = 0 }"
"""Each life is to meet the provider as it is, whatever those before it have met."""

PLACES = 'max_streams = 20\nqueue = { size = 1000, timeout = "60s" }\n' + NO_CIRCUIT
"""Fewer places than lives at the same time, so that some wait for one."""


class World:
    """The proxy, its provider and its clients.

    Args:
        folder: for certificates and the trace.
        lives: who will live, by number.
    """

    def __init__(self, folder: Path, lives: Iterable[Life]) -> None:
        self.lives = {life.number: life for life in lives}
        self.provider = LivesProvider(CLOCK, lambda name: self.lives[name[0]].asks[name[1]])
        self.callers: list[LifeClient] = []
        self.endless: list[Life] = []
        self.refused = 0
        self.trace_path = folder / "trace.jsonl"
        self._folder = folder
        self._authority = Authority(folder)
        self._listening: list[Any] = []
        self._vacant = socket.socket()
        pem = self._authority.ca_path.read_bytes()
        trust = trustRootFromCertificates([Certificate.loadPEM(pem)])
        self._trust: Any = optionsForClientTLS("localhost", trust)
        self.service: ProxyService

    # -- the proxy and its provider -------------------------------------------------------------

    async def open(self) -> None:
        """Let everything listen."""
        key, certificate = self._authority.key_and_certificate()
        plain = "tcp:0:interface=127.0.0.1:backlog=256"
        secure = f"ssl:0:interface=127.0.0.1:backlog=256:privateKey={key}:certKey={certificate}"
        self._vacant.bind(("127.0.0.1", 0))
        mute = Factory.forProtocol(Mute)
        mute.noisy = False
        ports = {"gone": int(self._vacant.getsockname()[1])}
        for name, text, factory in (
            ("plain", plain, ProviderFactory(self.provider)),
            ("secure", secure, ProviderFactory(self.provider)),
            ("mute", plain, mute),
        ):
            port: Any = await serverFromString(CLOCK, text).listen(factory)
            self._listening.append(port)
            ports[name] = port.getHost().port
        self.service = ProxyService(
            self._config(ports, [plain, secure]), CLOCK, handle_signals=False
        )
        self.service.privilegedStartService()
        self.service.startService()
        for port in self.service.proxy_ports:
            port.socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SEND_BUFFER)
        self._ports = [port.getHost().port for port in self.service.proxy_ports]

    async def stop(self) -> None:
        """Stop the proxy; once is enough."""
        if self.service.running:
            await self.service.stopService()

    async def close(self) -> None:
        """Stop the proxy and its provider, and drop the connections that are left."""
        await self.stop()
        self._vacant.close()
        for port in self._listening:
            await port.stopListening()
        for protocol in (*self.provider.connections, *self.callers):
            if protocol.transport is not None:
                raw_transport(protocol.transport).abortConnection()

    def _config(self, ports: dict[str, int], listen: list[str]) -> Config:
        other = self._folder / "other"
        other.mkdir()
        trusted, stranger = self._authority.ca_path, Authority(other).ca_path
        return parse(
            f"""
            [proxy]
            listen = {json.dumps(listen)}
            drain_timeout = "10ms"
            [admin]
            listen = "tcp:0:interface=127.0.0.1"
            [timeouts]
            first_byte = "60s"
            idle = "60s"
            client_stall = "8s"
            connect = "30s"
            request_head = "6s"
            request_body = "6s"
            client_idle = "6s"
            pool_idle = "1s"
            [limits]
            request_body = "{BODY_LIMIT // 1024}KiB"
            [trace]
            jsonl = "{self.trace_path}"
            [clients.c]
            keys = ["sha256:{hashlib.sha256(KEY.encode()).hexdigest()}"]
            max_streams = {_SLOTS}
            requests_per_minute = 10000000
            tokens_per_day = 1000000000000
            {provider_table("plain", "pool = 20", PLACES, url=f"http://127.0.0.1:{ports['plain']}")}
            {provider_table("secure", f'ca = "{trusted}"', PLACES, url=f"https://localhost:{ports['secure']}")}
            {provider_table("gone", NO_CIRCUIT, url=f"http://127.0.0.1:{ports['gone']}")}
            {provider_table("untrusted", f'ca = "{stranger}"', NO_CIRCUIT, url=f"https://localhost:{ports['secure']}")}
            {provider_table("mute", f'ca = "{trusted}"', NO_CIRCUIT, url=f"https://localhost:{ports['mute']}")}
            {_routes(PLAIN, "")}
            {_routes(IMPATIENT, 'idle = "300ms"')}
            {_routes(CURT, 'first_byte = "500ms"')}
            {_routes(STERN, 'client_stall = "500ms"')}
            {route_table("/gone", "gone")}
            {route_table("/untrusted", "untrusted")}
            {route_table("/mute", "mute", 'timeouts = { connect = "400ms" }')}
            """,
            environ={},
        )

    # -- lives ----------------------------------------------------------------------------------

    async def live(self) -> None:
        """Live every life, many at the same time."""
        waiting = iter(self.lives.values())

        async def one_after_another() -> None:
            for life in waiting:
                await self._live_one(life)

        await gatherResults(
            [Deferred.fromCoroutine(one_after_another()) for _ in range(_AT_ONCE)],
            consumeErrors=True,
        )

    async def _live_one(self, life: Life) -> None:
        endpoint: Any = TCP4ClientEndpoint(CLOCK, "127.0.0.1", self._ports[life.secure], LONGEST)
        if life.secure:
            endpoint = wrapClientTLS(self._trust, endpoint)
        over: Deferred[None] = Deferred()
        caller = LifeClient(life, CLOCK, over.callback)
        try:
            await endpoint.connect(_Once(caller))
        except ConnectError:
            self.refused += 1
            return
        self.callers.append(caller)
        limit = CLOCK.callLater(LONGEST, self._give_up, caller)
        await over
        if limit.active():
            limit.cancel()

    def _give_up(self, caller: LifeClient) -> None:
        self.endless.append(caller.life)
        caller.transport.abortConnection()

    # -- leftovers -----------------------------------------------------------------------------

    def gauges(self) -> dict[str, float]:
        """Return every gauge of running work that is not zero."""
        found = {
            f"{sample.name}{sample.labels}": sample.value
            for sample in self._samples()
            if sample.name in _PRESENT and sample.value
        }
        for name in ("plain", "secure"):
            if taken := self.service.standing.places.at(name).busy:
                found[f"places at {name}"] = float(taken)
        left = self.service.limits.remaining()["c", "max_streams"]
        return found | ({} if left == _SLOTS else {"slots of the client": float(_SLOTS - left)})

    def busy(self) -> dict[str, float]:
        """Return the same, and the provider's open connections: the proxy may not know of all."""
        connections = float(len(self.provider.connections))
        return self.gauges() | ({"connections at the provider": connections} if connections else {})

    def total(self, name: str) -> float:
        """Return a counter, over all its labels."""
        return float(sum(sample.value for sample in self._samples() if sample.name == name))

    def _samples(self) -> Iterator[Any]:
        for metric in self.service.metrics.registry.collect():
            yield from metric.samples

    def records(self) -> list[Record]:
        """Return the trace, once the service has stopped."""
        return [json.loads(line) for line in self.trace_path.read_text().splitlines()]


@asynccontextmanager
async def open_world(folder: Path, lives: Iterable[Life]) -> AsyncIterator[World]:
    """Let a world be, and end it whatever happens."""
    world = World(folder, lives)
    await world.open()
    try:
        yield world
    finally:
        await world.close()


def _routes(paths: tuple[str, str], timeouts: str) -> str:
    """Return the sections of two routes, to the provider over TCP and over TLS."""
    more = f'timeouts = {{ {timeouts} }}\non_disconnect = "drain"\ndrain_for = "1s"'
    return "".join(route_table(f"/{path}", to, more) for path, to in zip(paths, PLAIN, strict=True))
