"""Deadlines over every phase, descriptors that run out, and lookups that are slow."""

from __future__ import annotations

import resource
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import pytest
from pytest_twisted import ensureDeferred
from twisted.internet import reactor
from twisted.internet._resolver import GAIResolver
from twisted.internet.error import DNSLookupError

from llmproxy.upstream import client
from llmproxy.upstream.resolver import Resolver
from tests.support.sockets import Provider, Wire, connect, request
from tests.support.tls import Authority
from tests.traps.calls import Outcome, Responding, Step, names, outcome
from tests.traps.endings import Ending, read_ending
from tests.traps.parts import Ports, Upstream
from tests.traps.waits import thread, until

ANY: Any = reactor


@pytest.mark.trap("U12")
@ensureDeferred
async def test_the_handshake_is_within_the_time_to_connect(
    upstream: Upstream, authority: Authority, patience: float
) -> None:
    """A provider that accepts and never responds to the ClientHello is given up, and let go of."""
    closed = Step()

    def script(wire: Wire) -> None:
        assert wire.receive()[:1] == b"\x16"
        wire.wait_closed()
        closed.give()

    with Provider(script) as provider:
        sender = upstream(f"https://localhost:{provider.port}", authority.ca_path, connect=0.2)
        result = await outcome(sender.send("GET", "/x", []), patience)
        assert result.refused, "the provider is not given up"
        assert await closed.happens(patience), "the connection is kept"


def silent(*pieces: bytes) -> Callable[[Wire], None]:
    """Return a provider's script that sends these and then nothing."""

    def script(wire: Wire) -> None:
        wire.read_request()
        wire.send(*pieces)
        wire.wait_closed()

    return script


def drip(wire: Wire) -> None:
    """Respond with a body that never ends, a byte at a time, and is never silent."""
    wire.read_request()
    wire.send(b"HTTP/1.1 200 OK\r\n\r\n")
    tick = threading.Event()
    while not tick.wait(0.02):
        wire.send(b".")


HEAD = b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\n"


@pytest.mark.trap("U12")
@pytest.mark.parametrize(
    ("deadline", "script", "status"),
    [
        ("first_byte", silent(), b"504"),
        ("first_byte", silent(b"HTTP/1.1 200 OK\r\nX-Half: "), b"504"),
        ("total", silent(), b"504"),
        ("idle", silent(HEAD), b"200"),
        ("idle", silent(HEAD, b"half"), b"200"),
        ("total", drip, b"200"),
    ],
    ids=["no head", "half a head", "no head in all", "no body", "half a body", "no end in all"],
)
@ensureDeferred
async def test_every_later_phase_has_its_deadline(
    proxy: Ports,
    patience: float,
    deadline: str,
    script: Callable[[Wire], None],
    status: bytes,
) -> None:
    """A provider that is late with its head, silent in its body or endless is given up."""

    def ask(port: int) -> Ending:
        with connect(port) as wire:
            wire.send(request("GET", "/p/x", "Connection: close"))
            wire.sock.settimeout(patience)
            return read_ending(wire, patience) if script is not drip else _read_for(wire, patience)

    with Provider(script) as provider:
        ending = await thread(ask, proxy(provider.url, deadlines=f'{deadline} = "200ms"'))
    assert ending.how != "open", "the provider is not given up"
    assert ending.raw[9:12] == status
    assert not ending.raw.endswith(b"0\r\n\r\n")


def _read_for(wire: Wire, seconds: float) -> Ending:
    """Read for at most so long, although something always comes."""
    timer = threading.Timer(seconds, wire.sock.shutdown, (socket.SHUT_RD,))
    timer.start()
    ending = read_ending(wire, seconds)
    late = not timer.is_alive()
    timer.cancel()
    return Ending(ending.raw, "open") if late else ending


@contextmanager
def no_descriptor_left() -> Iterator[None]:
    """Take from the process the right to open one more file or socket."""
    socket.getaddrinfo("localhost", 1)  # what is imported for that is imported by now
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (3, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


@pytest.mark.trap("U18")
@pytest.mark.parametrize("host", ["127.0.0.1", "localhost"])
@ensureDeferred
async def test_being_out_of_descriptors_is_reported(
    upstream: Upstream, patience: float, host: str, logged_failures: Any
) -> None:
    """It is no failed lookup, nothing goes unhandled, and the next request is served."""
    provider = Provider(Responding())
    sender = upstream(f"http://{host}:{provider.port}")
    with no_descriptor_left():
        failed = await outcome(sender.send("GET", "/x", []), patience)
    unhandled = logged_failures.flush()
    with provider:  # only now: its thread needs descriptors, too
        served = await outcome(sender.send("GET", "/x", []), patience)
    assert not isinstance(failed.error, DNSLookupError)
    assert names(failed.error, "descriptors")
    assert unhandled == []
    assert served.data == b"ok"


@contextmanager
def resolving(monkeypatch: pytest.MonkeyPatch, getaddrinfo: Callable[..., Any]) -> Iterator[None]:
    """Let our parts and stock parts look names up in this way."""
    monkeypatch.setattr(client, "Resolver", partial(Resolver, getaddrinfo=getaddrinfo))
    stock = GAIResolver(ANY, getaddrinfo=getaddrinfo)
    before = ANY.installNameResolver(stock)
    try:
        yield
    finally:
        ANY.installNameResolver(before)


HANGING = "hangs.test"


@pytest.fixture
def slow_names(monkeypatch: pytest.MonkeyPatch) -> Iterator[threading.Event]:
    """Make one name hang in the resolver until the event is set; all others are on loopback."""
    over = threading.Event()

    def getaddrinfo(host: str, port: int, *_: Any) -> list[Any]:
        if host == HANGING:
            over.wait(20)
            raise socket.gaierror(socket.EAI_AGAIN, "no response")
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", ("127.0.0.1", port))]

    with resolving(monkeypatch, getaddrinfo):
        yield over
        over.set()


CALLS = 30
"""More than the reactor's thread pool has threads."""


@pytest.mark.trap("U20")
@ensureDeferred
async def test_a_name_that_hangs_delays_no_other_provider(
    upstream: Upstream, patience: float, slow_names: threading.Event
) -> None:
    """While thirty requests wait for one name, another is looked up and served at once.

    The row was only read in the source; with a resolver that hangs it shows in this process, too.
    """
    results: list[Outcome] = []
    before = threading.active_count()  # threads of logs that other tests have opened stay
    with Provider(Responding()) as provider:
        slow = upstream(f"http://{HANGING}:1")
        quick = upstream(f"http://other.test:{provider.port}")
        calls = [slow.send("GET", "/x", []) for _ in range(CALLS)]
        threads = threading.active_count() - before
        served = await outcome(quick.send("GET", "/x", []), patience)
        slow_names.set()
        for call in calls:
            results.append(await outcome(call, 5))
    assert served.data == b"ok"
    assert all(one.refused for one in results)
    assert threads < CALLS


@pytest.mark.trap("U20")
@ensureDeferred
async def test_a_name_is_not_looked_up_for_every_request(
    upstream: Upstream, patience: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Connections that are made shortly after one another share one lookup."""
    lookups: list[str] = []

    def getaddrinfo(host: str, port: int, *_: Any) -> list[Any]:
        lookups.append(host)
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", ("127.0.0.1", port))]

    closing = b"HTTP/1.1 200 OK\r\nConnection: close\r\nContent-Length: 0\r\n\r\n"
    with resolving(monkeypatch, getaddrinfo), Provider(Responding(closing)) as provider:
        sender = upstream(f"http://other.test:{provider.port}")
        for _ in range(3):
            assert (await outcome(sender.send("GET", "/x", []), patience)).code == 200
        assert await until(lambda: provider.accepted == 3)
    assert lookups == ["other.test"]
