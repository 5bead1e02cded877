"""Giving a request up, in every phase, plain and by TLS: who sees it how soon, what is left."""

from __future__ import annotations

import os
import select
import socket
import statistics
import threading
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import pytest
import pytest_twisted
from twisted.internet import reactor
from twisted.internet.defer import Deferred

from llmproxy.config import Config, parse
from llmproxy.upstream import client
from llmproxy.upstream.answer import Answer
from llmproxy.upstream.client import Upstream
from llmproxy.upstream.names import Names
from tests.support.fake_transport import Collector, until
from tests.support.kernel import held
from tests.support.sockets import WAIT, Provider, Wire, chunked
from tests.support.tls import Authority

CLOCK: Any = reactor
SAMPLES = 20
MOST = 1.0
"""Seconds that the median may take on a machine that is busy; the promise is a tenth of it."""

STREAM = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"
ENDS = select.POLLRDHUP | select.POLLHUP | select.POLLERR


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    """The authority that the provider's certificate comes from."""
    return Authority(tmp_path_factory.mktemp("ca"))


def config_for(url: str, authority: Authority) -> Config:
    """Return a configuration with one provider."""
    return parse(
        f"""
        [proxy]
        listen = ["tcp:0"]
        anonymous = true
        [admin]
        listen = "tcp:0"
        [providers.p]
        url = "{url}"
        dialect = "openai"
        ca = "{authority.ca_path}"
        [[routes]]
        path = "/"
        providers = ["p"]
        """,
        environ={},
    )


@pytest.fixture
def quick(request: pytest.FixtureRequest) -> Callable[[list[float]], None]:
    """Check the median of what was measured, in seconds, and write it into the report."""

    def check(took: list[float]) -> None:
        assert len(took) == SAMPLES
        median = statistics.median(took)
        request.node.user_properties.append(("median_ms", f"{median * 1000:.3f}"))
        assert median < MOST

    return check


class Stage:
    """One provider that follows ``script``, and our side of the wire.

    Attributes:
        reached: set by the script where the phase is one that the provider sees.
        ended: when the provider saw the end of its connection, in seconds.
    """

    def __init__(self, authority: Authority, *, tls: bool, silent: bool = False) -> None:
        context = authority.server() if tls and not silent else None
        self.provider = Provider(self._serve, tls=context, receive_buffer=4096)
        scheme = "https" if tls else "http"
        self.url = f"{scheme}://localhost:{self.provider.port}"
        self.config = config_for(self.url, authority)
        self.reached = threading.Event()
        self.over = threading.Event()
        self.ended = 0.0
        self.script: Callable[[Wire], None] = lambda wire: None

    def upstream(self) -> Upstream:
        """Return our side."""
        return Upstream(CLOCK, time.monotonic, self.config)

    def send(self, upstream: Upstream, method: str = "GET", body: Any = b"") -> Deferred[Answer]:
        """Send a request."""
        return upstream.send(
            self.config.providers["p"],
            method,
            b"/",
            [],
            body,
            credential=b"",
            timeouts=self.config.timeouts,
        )

    def _serve(self, wire: Wire) -> None:
        self.script(wire)
        self.reached.set()
        poll = select.poll()
        poll.register(wire.sock.fileno(), ENDS)
        # The end is seen behind whatever lies unread, in the turn in which the kernel has it.
        assert poll.poll(WAIT * 1000)
        self.ended = time.monotonic()
        self.over.set()


def descriptors() -> int:
    """Return how many files and sockets the process has open."""
    return len(os.listdir("/proc/self/fd"))


async def assert_nothing_left(upstream: Upstream, port: int, timers: int) -> None:
    """No connection, no timed call and no socket to the provider stays behind."""
    await until(lambda: not any(upstream.counts().values()))
    await until(lambda: not held(peer=port).sockets)
    assert len(CLOCK.getDelayedCalls()) <= timers + 1  # the wait's own turn is one


def drop(_: object) -> None:
    """Take no interest in what was read."""


Giving = Callable[[Stage, Upstream], Any]
"""Brings a request into its phase; returns what gives it up."""


async def sending(stage: Stage, upstream: Upstream) -> Callable[[], None]:
    """Half a body is on its way; the provider takes no more of it."""
    stage.script = lambda wire: drop(wire.read_head())
    asked = stage.send(upstream, "POST", bytes(4 << 20))
    return await given_up_by_cancel(stage, asked)


async def awaiting_the_head(stage: Stage, upstream: Upstream) -> Callable[[], None]:
    """The provider has the request, and sent half a head."""

    def script(wire: Wire) -> None:
        wire.read_request()
        wire.send(b"HTTP/1.1 200 OK\r\nX-Half: ")

    stage.script = script
    return await given_up_by_cancel(stage, stage.send(upstream))


async def awaiting_a_whole_answer(stage: Stage, upstream: Upstream) -> Callable[[], None]:
    """The provider has the whole body of a request that asks for no stream, and works on it."""
    stage.script = lambda wire: drop(wire.read_request())
    return await given_up_by_cancel(stage, stage.send(upstream, "POST", b'{"stream":false}'))


async def given_up_by_cancel(stage: Stage, asked: Deferred[Answer]) -> Callable[[], None]:
    """Wait for the provider to reach the phase; the Deferred is the hold on the request."""
    asked.addErrback(lambda failure: None)
    await until(stage.reached.is_set)
    return asked.cancel


async def first_chunk(stage: Stage, upstream: Upstream) -> Callable[[], None]:
    """The head is in, and of the body there is nothing yet."""

    def script(wire: Wire) -> None:
        wire.read_request()
        wire.send(STREAM)

    stage.script = script
    answer = await stage.send(upstream)
    answer.deliverBody(Collector())
    await until(stage.reached.is_set)
    return answer.abort


async def mid_stream(stage: Stage, upstream: Upstream) -> Callable[[], None]:
    """Chunks have come, and the provider has more of them."""

    def script(wire: Wire) -> None:
        wire.read_request()
        wire.send(STREAM, chunked(b"data: 1\n\n"))

    stage.script = script
    answer = await stage.send(upstream)
    body = Collector()
    answer.deliverBody(body)
    await until(lambda: body.body and stage.reached.is_set())
    return answer.abort


async def handshake(stage: Stage, upstream: Upstream) -> Callable[[], None]:
    """The provider has the ClientHello and says nothing to it."""
    stage.script = lambda wire: drop(wire.receive())
    return await given_up_by_cancel(stage, stage.send(upstream))


PHASES = [sending, awaiting_the_head, first_chunk, mid_stream, awaiting_a_whole_answer]
CELLS = [(phase, tls) for phase in PHASES for tls in (False, True)] + [(handshake, True)]


@pytest.mark.parametrize(
    ("phase", "tls"),
    CELLS,
    ids=[f"{phase.__name__}, {'tls' if tls else 'plain'}" for phase, tls in CELLS],
)
@pytest_twisted.ensureDeferred
async def test_the_provider_sees_the_end_at_once(
    authority: Authority, phase: Giving, tls: bool, quick: Callable[[list[float]], None]
) -> None:
    """Twenty requests are given up in the same phase: each is seen at once and leaves nothing."""
    stage = Stage(authority, tls=tls, silent=phase is handshake)
    took: list[float] = []
    with stage.provider:
        upstream = stage.upstream()
        timers = len(CLOCK.getDelayedCalls())
        for _ in range(SAMPLES):
            stage.reached.clear()
            stage.over.clear()
            give_up = await phase(stage, upstream)
            began = time.monotonic()
            give_up()
            await until(stage.over.is_set)
            took.append(stage.ended - began)
            await assert_nothing_left(upstream, stage.provider.port, timers)
        assert stage.provider.accepted == SAMPLES
    quick(took)


@pytest.fixture
def hanging_names(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """Let every name hang in the resolver until the test is over; the names, in order."""
    over = threading.Event()
    asked: list[str] = []

    def getaddrinfo(host: str, *_: Any) -> list[Any]:
        asked.append(host)
        over.wait(WAIT)
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", ("127.0.0.1", 0))]

    monkeypatch.setattr(client, "Names", partial(Names, getaddrinfo=getaddrinfo))
    yield asked
    over.set()


@pytest.mark.parametrize("tls", [False, True], ids=["plain", "tls"])
@pytest_twisted.ensureDeferred
async def test_a_request_that_waits_for_a_name_is_given_up_at_once(
    authority: Authority, tls: bool, hanging_names: list[str], quick: Callable[[list[float]], None]
) -> None:
    """Its caller is told in the same turn, nothing is left, and nothing is connected to later."""
    stage = Stage(authority, tls=tls)
    took: list[float] = []
    with stage.provider:
        upstream = stage.upstream()
        timers = len(CLOCK.getDelayedCalls())
        for _ in range(SAMPLES):
            asked = stage.send(upstream)
            await until(lambda: hanging_names)
            assert upstream.counts()["p", "connecting"] == 1
            began = time.monotonic()
            asked.addErrback(lambda failure: took.append(time.monotonic() - began))  # noqa: B023
            asked.cancel()
            await assert_nothing_left(upstream, stage.provider.port, timers)
        assert hanging_names == ["localhost"]
        assert stage.provider.accepted == 0
    quick(took)


@pytest.mark.parametrize("tls", [False, True], ids=["plain", "tls"])
@pytest_twisted.ensureDeferred
async def test_a_connection_that_does_not_come_about_is_given_up_at_once(
    authority: Authority, tls: bool, quick: Callable[[list[float]], None]
) -> None:
    """The socket whose SYN nobody answers is closed as soon as nobody waits for it."""
    took: list[float] = []
    with socket.socket() as listener, socket.socket() as one, socket.socket() as two:
        listener.bind(("127.0.0.1", 0))
        listener.listen(0)
        port = listener.getsockname()[1]
        for filler in (one, two):  # the queue is full now: further SYNs are not answered
            filler.setblocking(False)
            filler.connect_ex(("127.0.0.1", port))
        stage = Stage(authority, tls=tls)
        stage.provider._listener.close()  # this one is not asked
        scheme = "https" if tls else "http"
        stage.config = config_for(f"{scheme}://127.0.0.1:{port}", authority)
        upstream = stage.upstream()
        timers = len(CLOCK.getDelayedCalls())
        before = descriptors()
        for _ in range(SAMPLES):
            asked = stage.send(upstream)
            asked.addErrback(lambda failure: None)
            # Twisted connects in the next turn; the other call is the wait's own.
            await until(lambda: len(CLOCK.getDelayedCalls()) <= timers + 1)
            assert upstream.counts()["p", "connecting"] == 1
            assert descriptors() == before + 1
            began = time.monotonic()
            asked.cancel()
            await until(lambda: descriptors() == before)
            took.append(time.monotonic() - began)
            await assert_nothing_left(upstream, -1, timers)
    quick(took)
