"""The pump of a tunnel, on real sockets: its bytes, its pauses, its deadlines and its ends.

A client in a thread asks a site for a tunnel to a host on loopback, as behind a CONNECT; the host
is another thread.  The site's clock is the test's.
"""

from __future__ import annotations

import gc
import hashlib
import os
import queue
import random
import socket
import threading
import time
import weakref
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from pytest_twisted import ensureDeferred
from twisted.internet.defer import CancelledError, Deferred
from twisted.web.server import NOT_DONE_YET

from llmproxy.config import Config, Proxy, Timeouts
from llmproxy.errors import EndReason
from llmproxy.net.addresses import AddressGuard
from llmproxy.net.transport import pending_bytes, raw_transport
from llmproxy.server.handler import Handler, Router
from llmproxy.server.request import Request
from llmproxy.server.tls import ListenerTls
from llmproxy.stream.splice import Splice, Splices
from llmproxy.upstream.way_out import WayOut, tunnel_resolver
from tests.support.fake_transport import turn, until
from tests.support.keypairs import Vault
from tests.support.served import Served
from tests.support.sockets import WAIT, Provider, Wire, connect, request

HEAD = b"HTTP/1.1 200 OK\r\n\r\n"
MOST = 64 * 1024 + 80 * 1024
"""Bytes that one direction may hold: a transport's queue, and one read behind it."""

PLAIN, TLS = (False, True), (True, True)
KINDS = [PLAIN, TLS, (False, False), (True, False)]
IDS = ["plain", "tls", "twisted's plain", "twisted's tls"]
TCP = pytest.mark.parametrize("kind", [KINDS[0], KINDS[2]], ids=["direct", "twisted"])
HALF_CLOSEABLE = pytest.mark.parametrize("kind", KINDS[:3], ids=IDS[:3])
ALL = pytest.mark.parametrize("kind", KINDS, ids=IDS)


class Tunnelling(Handler):
    """Opens a tunnel to where each request says.

    Attributes:
        splices: every pump, in order.
    """

    def __init__(self, out: WayOut, pumps: Splices, idle: float | None, total: float | None):
        super().__init__()
        self._out, self._pumps, self._idle, self._total = out, pumps, idle, total
        self.splices: list[Splice] = []

    def render(self, request: Request) -> int:
        host, _, port = request.uri.decode().rpartition(":")

        def opened(way: Any) -> None:
            splice = Splice(way, self._pumps, idle=self._idle, total=self._total)
            self.splices.append(splice)
            request.hand_over(200, [], splice)

        self._out.open(host, int(port)).addCallback(opened)
        return NOT_DONE_YET


class Host(Provider):
    """A host that gives each of its connections to the test."""

    def __init__(self, **options: Any) -> None:
        self.wires: queue.Queue[Wire] = queue.Queue()
        self._over = threading.Event()
        super().__init__(self._hand_out, **options)

    def _hand_out(self, wire: Wire) -> None:
        self.wires.put(wire)
        self._over.wait(WAIT)

    def __exit__(self, *how: Any) -> None:
        self._over.set()
        super().__exit__(*how)


class Tunnels(NamedTuple):
    """A site that opens tunnels to one host."""

    served: Served
    host: Host
    handler: Tunnelling
    pumps: Splices
    context: Any
    wires: list[Wire]

    async def open(self, early: bytes = b"", **options: Any) -> tuple[Wire, Wire, Splice]:
        """Return a client, the host's end, and the pump between them."""

        def ask() -> tuple[Wire, Wire]:
            client = connect(self.served.port, tls=self.context, **options)
            client.send(request("CONNECT", f"127.0.0.1:{self.host.port}") + early)
            self.wires.append(client)
            assert client.read_until(b"\r\n\r\n") == HEAD
            self.wires.append(self.host.wires.get(timeout=WAIT))
            return client, self.wires[-1]

        client, host = await self.served.run(ask)
        return client, host, self.handler.splices[-1]

    async def pass_time(self, seconds: float) -> None:
        """Turn the clock in small steps."""
        await self.served.pass_time(seconds)

    async def run(self, *calls: Callable[[], Any]) -> list[Any]:
        """Let clients and hosts talk in threads, all at once."""
        talks = [self.served.run(call) for call in calls]
        running = [Deferred.fromCoroutine(talk) for talk in talks]
        return [await one for one in running]

    async def ended(self, splice: Splice) -> EndReason:
        """Wait for the end, while the clock goes on; nothing of the tunnel is left."""
        deadline = time.monotonic() + WAIT
        while not splice.done.called or len(self.pumps):
            assert time.monotonic() < deadline, "the tunnel does not end"
            await self.pass_time(0.5)
        reason: EndReason = await splice.done
        return reason


@asynccontextmanager
async def tunnels(
    tmp_path: Path,
    kind: tuple[bool, bool] = PLAIN,
    *,
    idle: float | None = 600.0,
    total: float | None = None,
    **options: Any,
) -> AsyncIterator[Tunnels]:
    """Serve tunnels; behind the test no timer and no pump is left."""
    secure, direct = kind
    vault = Vault(tmp_path) if secure else None
    tls = ListenerTls(vault.issue().keypair()) if vault else None
    async with Served(tls=tls, direct=direct) as served:
        reactor = served.reactor
        config = Config(proxy=Proxy(tuned_loop=direct), timeouts=Timeouts(connect=None))
        guard = AddressGuard(tuple, allow_private=True)
        out = WayOut(reactor, tunnel_resolver(reactor, reactor.seconds), config, guard)
        pumps = Splices(reactor, reactor.seconds)
        handler = Tunnelling(out, pumps, idle, total)
        served.site.serve(Router(handler))
        with Host(**options) as host:
            one = Tunnels(served, host, handler, pumps, vault.client() if vault else None, [])
            try:
                yield one
            finally:
                for wire in one.wires:
                    wire.sock.close()
            served.site.cut()
            await served.site.when_empty()
            await until(lambda: not len(pumps))


def send_all(wire: Wire, size: int, seed: int, *, end: bool = True) -> bytes:
    """Send so many random bytes, and a FIN; return their digest."""
    digest, source, left = hashlib.sha256(), random.Random(seed), size
    while left:
        piece = source.randbytes(min(left, 1_000_000))
        digest.update(piece)
        wire.sock.sendall(piece)
        left -= len(piece)
    if end:
        wire.sock.shutdown(socket.SHUT_WR)
    return digest.digest()


def read_all(wire: Wire) -> tuple[int, bytes]:
    """Read to the FIN; return how many bytes came, and their digest."""
    digest, count = hashlib.sha256(), 0
    while data := wire.sock.recv(1 << 20):
        digest.update(data)
        count += len(data)
    return count, digest.digest()


async def fill(wire: Wire, splice: Splice) -> int:
    """Send until nothing is taken any more, and the pump does not read; return how much was."""
    wire.sock.setblocking(False)
    sent = looks = 0

    def is_full() -> bool:
        """Whether kernels have not made room for long, which they do in steps."""
        nonlocal sent, looks
        looks += 1
        try:
            while True:
                sent += wire.sock.send(bytes(65536))
                looks = 0
        except BlockingIOError:
            if not (splice._from_client.is_paused or splice._from_host.is_paused):
                looks = 0
        return looks > 100

    await until(is_full)
    wire.sock.settimeout(WAIT)
    return sent


# --- bytes ----------------------------------------------------------------------------------------


@ensureDeferred
async def test_a_hundred_megabytes_each_way_are_exact_and_are_not_held(tmp_path: Path) -> None:
    """Both at once; whatever the two sides do, what is held is bounded."""
    size, most = 100_000_000, 0
    async with tunnels(tmp_path) as one:
        client, host, splice = await one.open()

        def look() -> None:
            nonlocal most
            for transport in (raw_transport(splice.transport), splice._host):
                most = max(most, pending_bytes(transport))

        forward = splice.dataReceived

        def watched(data: bytes) -> None:
            forward(data)
            look()

        splice.dataReceived = watched  # type: ignore[method-assign]
        senders = [lambda: send_all(client, size, 1), lambda: send_all(host, size, 2)]
        sending = Deferred.fromCoroutine(one.run(*senders))
        await until(lambda: splice._from_client.is_paused and splice._from_host.is_paused)
        came, got = await one.run(lambda: read_all(host), lambda: read_all(client))
        sent, back = await sending
        assert came == (size, sent)
        assert got == (size, back)
        client.close()
        host.close()
        assert await one.ended(splice) is EndReason.COMPLETE
        assert (splice.sent, splice.received) == (size, size)
        assert 0 < most <= MOST


@ALL
@ensureDeferred
async def test_bytes_go_both_ways(tmp_path: Path, kind: tuple[bool, bool]) -> None:
    """Each transport carries them as they are; early ones reach the host first."""
    early, late = bytes(range(256)) * 4, random.Random(1).randbytes(3_000_000)
    async with tunnels(tmp_path, kind) as one:
        client, host, splice = await one.open(early)

        size = len(early) + len(late)

        def echo() -> None:
            left = size
            while left:
                data = host.sock.recv(65536)
                host.sock.sendall(data)
                left -= len(data)

        def ask() -> bytes:
            got = client.read(len(early))
            for at in range(0, len(late), 50_000):  # a socket of ssl is not safe in two threads
                client.send(late[at : at + 50_000])
                got += client.read(len(late[at : at + 50_000]))
            return got

        got, _ = await one.run(ask, echo)
        assert got == early + late
        assert splice.sent == splice.received == len(early) + len(late)
        client.close()


@ALL
@ensureDeferred
async def test_a_host_may_speak_first(tmp_path: Path, kind: tuple[bool, bool]) -> None:
    """Before the client has sent anything."""
    async with tunnels(tmp_path, kind) as one:
        client, host, splice = await one.open()
        host.send(b"SSH-2.0-x\r\n")
        assert await one.run(lambda: client.read(11)) == [b"SSH-2.0-x\r\n"]
        assert (splice.sent, splice.received) == (0, 11)
        client.close()


# --- one side ends --------------------------------------------------------------------------------


@TCP
@ensureDeferred
async def test_a_client_may_end_its_side_first(tmp_path: Path, kind: tuple[bool, bool]) -> None:
    """The host reads an end behind all that came, and answers at its leisure."""
    answer = random.Random(1).randbytes(1_000_000)
    async with tunnels(tmp_path, kind) as one:
        client, host, splice = await one.open()

        def ask() -> tuple[bytes, str]:
            client.send(b"question")
            client.sock.shutdown(socket.SHUT_WR)
            return client.read(len(answer)), client.wait_closed()

        def respond() -> bytes:
            asked = b""
            while data := host.sock.recv(100):
                asked += data
            host.send(answer[:500_000])
            host.send(answer[500_000:])
            host.close()
            return asked

        assert await one.run(ask, respond) == [(answer, "fin"), b"question"]
        client.close()
        assert await one.ended(splice) is EndReason.COMPLETE


@HALF_CLOSEABLE
@ensureDeferred
async def test_a_host_may_end_its_side_first(tmp_path: Path, kind: tuple[bool, bool]) -> None:
    """The client reads an end behind all that came, and goes on sending."""
    words = random.Random(1).randbytes(1_000_000)
    async with tunnels(tmp_path, kind) as one:
        client, host, splice = await one.open()

        def read() -> str:
            assert client.read(5) == b"hello"
            ended = client.wait_closed()
            client.send(words)
            client.close_notify()
            client.close()
            return ended

        def hear() -> bytes:
            host.send(b"hello")
            host.sock.shutdown(socket.SHUT_WR)
            heard = b""
            while data := host.sock.recv(65536):
                heard += data
            return heard

        assert await one.run(read, hear) == ["fin", words]
        assert (await one.ended(splice), splice.detail) == (EndReason.COMPLETE, "")


@pytest.mark.parametrize(
    ("who", "kind"),
    [("client", PLAIN), ("host", PLAIN), ("client", TLS)],
    ids=["client", "host", "client in TLS"],
)
@ensureDeferred
async def test_an_end_comes_behind_what_waits(
    tmp_path: Path, who: str, kind: tuple[bool, bool]
) -> None:
    """The other side takes nothing yet, so that a pause is in the way of the end."""
    async with tunnels(tmp_path, kind, receive_buffer=4096) as one:
        client, host, splice = await one.open(receive_buffer=4096)
        source, sink = (client, host) if who == "client" else (host, client)
        size = 30_000_000  # more than kernels hold

        def send() -> bytes:
            sent = send_all(source, size, 1, end=not kind[0])
            source.close_notify()  # which waits for the other side's
            return sent

        sending = Deferred.fromCoroutine(one.run(send))
        await until(lambda: splice._from_client.is_paused or splice._from_host.is_paused)
        sink.sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 20)
        (came,) = await one.run(lambda: read_all(sink))
        assert not splice.done.called
        sink.close()
        (sent,) = await sending
        assert came == (size, sent)
        assert await one.ended(splice) is EndReason.COMPLETE
        source.close()


@pytest.mark.parametrize("who", ["client", "host"])
@ensureDeferred
async def test_an_end_may_come_in_the_read_that_fills_the_other_side(
    tmp_path: Path, who: str
) -> None:
    """As in TLS, where bytes and close_notify are read at once; the pause must not keep it back."""
    size = 20_000_000
    async with tunnels(tmp_path) as one:
        client, host, splice = await one.open()
        if who == "client":
            splice.dataReceived(bytes(size))
            assert splice._from_client.is_paused
            splice.readConnectionLost()
        else:
            splice.host_sent(bytes(size))
            assert splice._from_host.is_paused
            splice.host_ended()
        (came,) = await one.run(lambda: read_all(host if who == "client" else client))
        assert came[0] == size


# --- a side that takes nothing --------------------------------------------------------------------


@pytest.mark.parametrize("who", ["client", "host"])
@TCP
@ensureDeferred
async def test_a_stuck_side_stops_the_other(
    tmp_path: Path, who: str, kind: tuple[bool, bool]
) -> None:
    """What is held is bounded; when bytes are taken again, all of them come."""
    async with tunnels(tmp_path, kind, receive_buffer=4096) as one:
        client, host, splice = await one.open(receive_buffer=4096)
        source, sink = (client, host) if who == "client" else (host, client)
        sent = await fill(source, splice)
        transport = splice._host if who == "client" else raw_transport(splice.transport)
        assert 0 < pending_bytes(transport) <= MOST
        moved = splice.sent if who == "client" else splice.received
        assert moved < sent  # the rest waits in the source's own kernel, and ours
        await one.pass_time(5)
        assert (splice.sent if who == "client" else splice.received) == moved
        sink.sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 20)
        (got,) = await one.run(lambda: sink.read(sent))
        assert got == bytes(sent)
        # and the other direction was not in its way
        sink.send(b"x")
        assert await one.run(lambda: source.read(1)) == [b"x"]
        client.close()
        host.close()


@pytest.mark.parametrize("who", ["client", "host"])
@ensureDeferred
async def test_a_side_that_resets_while_it_is_not_read_from_is_noticed(
    tmp_path: Path, who: str
) -> None:
    """The other side takes nothing, and would never let it be read."""
    async with tunnels(tmp_path, receive_buffer=4096) as one:
        client, host, splice = await one.open(receive_buffer=4096)
        source, sink = (client, host) if who == "client" else (host, client)
        await fill(source, splice)
        source.reset()
        await one.pass_time(1)
        expected = EndReason.CLIENT_GONE if who == "client" else EndReason.UPSTREAM_BROKEN
        assert await one.ended(splice) is expected
        assert splice.detail == f"the {who} reset the connection"
        assert await one.run(sink.wait_closed) == ["reset"]


# --- resets ---------------------------------------------------------------------------------------


@ALL
@ensureDeferred
async def test_a_reset_of_the_client_resets_the_host(
    tmp_path: Path, kind: tuple[bool, bool]
) -> None:
    """At once."""
    async with tunnels(tmp_path, kind) as one:
        client, host, splice = await one.open()
        client.reset()
        assert await one.run(host.wait_closed) == ["reset"]
        assert await one.ended(splice) is EndReason.CLIENT_GONE


@ALL
@ensureDeferred
async def test_a_reset_of_the_host_resets_the_client(
    tmp_path: Path, kind: tuple[bool, bool]
) -> None:
    """In TLS without the end that would make it whole."""
    async with tunnels(tmp_path, kind) as one:
        client, host, splice = await one.open()
        host.reset()
        (ended,) = await one.run(client.wait_closed)
        assert ended == "reset" or (kind[0] and ended == "truncated")
        assert await one.ended(splice) is EndReason.UPSTREAM_BROKEN
        assert splice.detail


@ensureDeferred
async def test_a_reset_behind_an_end_is_a_reset(tmp_path: Path) -> None:
    """One direction has ended in order, the other one breaks."""
    async with tunnels(tmp_path) as one:
        client, host, splice = await one.open()
        client.sock.shutdown(socket.SHUT_WR)
        assert await one.run(host.receive) == [b""]
        host.reset()
        assert await one.run(client.wait_closed) == ["reset"]
        assert await one.ended(splice) is EndReason.UPSTREAM_BROKEN


# --- deadlines ------------------------------------------------------------------------------------


@ensureDeferred
async def test_silence_in_both_directions_ends_a_tunnel(tmp_path: Path) -> None:
    """Bytes of either side begin it anew."""
    async with tunnels(tmp_path, idle=20.0) as one:
        client, host, splice = await one.open()
        for source, sink in ((client, host), (host, client)) * 2:
            await one.pass_time(18)
            source.send(b"x")
            assert await one.run(sink.receive) == [b"x"]
        await one.pass_time(18)
        assert not splice.done.called
        await one.pass_time(4)
        assert await one.ended(splice) is EndReason.UPSTREAM_IDLE
        assert await one.run(client.wait_closed, host.wait_closed) == ["reset"] * 2


@ensureDeferred
async def test_a_side_that_takes_nothing_is_silent_too(tmp_path: Path) -> None:
    """The limit stands still for nobody."""
    async with tunnels(tmp_path, idle=20.0, receive_buffer=4096) as one:
        client, host, splice = await one.open()
        await fill(client, splice)
        await one.pass_time(22)
        assert await one.ended(splice) is EndReason.UPSTREAM_IDLE
        assert await one.run(host.wait_closed) == ["reset"]
        client.close()


@ensureDeferred
async def test_a_tunnel_may_last_so_long(tmp_path: Path) -> None:
    """Silent or not."""
    async with tunnels(tmp_path, idle=None, total=20.0) as one:
        client, host, splice = await one.open()
        for _ in range(2):
            await one.pass_time(9)
            client.send(b"x")
            assert await one.run(host.receive) == [b"x"]
        await one.pass_time(4)
        assert await one.ended(splice) is EndReason.UPSTREAM_TIMEOUT
        assert await one.run(client.wait_closed, host.wait_closed) == ["reset"] * 2


@ensureDeferred
async def test_without_limits_a_tunnel_stays(tmp_path: Path) -> None:
    """``off`` is no limit."""
    async with tunnels(tmp_path, idle=None, total=None) as one:
        client, host, _ = await one.open()
        one.served.reactor.clock.advance(10 * 86400)
        await one.pass_time(2)
        client.send(b"x")
        assert await one.run(host.receive) == [b"x"]
        client.close()
        host.close()


# --- the proxy ends it ----------------------------------------------------------------------------


@ALL
@ensureDeferred
async def test_a_cut_ends_both_sides_as_drained(tmp_path: Path, kind: tuple[bool, bool]) -> None:
    """As the drain's deadline does."""
    async with tunnels(tmp_path, kind) as one:
        client, host, splice = await one.open()
        one.served.site.cut()
        assert splice.done.called
        assert await one.run(host.wait_closed) == ["reset"]
        assert await one.ended(splice) is EndReason.DRAINED
        client.close()


@ensureDeferred
async def test_a_tunnel_can_be_ended_from_outside(tmp_path: Path) -> None:
    """By an operator, as ``killed``; twice is once."""
    async with tunnels(tmp_path) as one:
        client, host, splice = await one.open()
        splice.end(EndReason.KILLED)
        splice.end(EndReason.INTERNAL)
        assert await one.run(client.wait_closed, host.wait_closed) == ["reset"] * 2
        assert await one.ended(splice) is EndReason.KILLED


@ensureDeferred
async def test_who_does_not_wait_any_more_ends_the_tunnel(tmp_path: Path) -> None:
    """A tunnel without somebody who waits for its end would have no record."""
    async with tunnels(tmp_path) as one:
        client, host, splice = await one.open()
        splice.done.addErrback(lambda failure: failure.trap(CancelledError) and None)
        splice.done.cancel()
        assert await one.run(client.wait_closed, host.wait_closed) == ["reset"] * 2
        await until(lambda: not len(one.pumps))


@ensureDeferred
async def test_a_client_that_does_not_take_the_last_bytes_has_stalled(tmp_path: Path) -> None:
    """Both sides have ended; the client's connection is closed under ``client_stall``."""
    async with tunnels(tmp_path) as one:
        client, host, splice = await one.open(receive_buffer=4096)
        client.sock.shutdown(socket.SHUT_WR)
        assert await one.run(host.receive) == [b""]
        host.sock.setblocking(False)
        assert host.sock.send(bytes(60_000))
        host.close()
        await until(lambda: splice._host_is_gone)
        await one.pass_time(65)
        assert await one.ended(splice) is EndReason.CLIENT_STALLED
        client.close()


# --- what a tunnel costs --------------------------------------------------------------------------


@ensureDeferred
async def test_quiet_tunnels_share_one_timer(tmp_path: Path) -> None:
    """Two hundred have as many timers as one."""
    async with tunnels(tmp_path) as one:
        ends = [await one.open()]
        timers = one.served.reactor.timers()
        ends += [await one.open() for _ in range(200)]
        assert len(one.pumps) == 201
        assert one.served.reactor.timers() == timers
        await one.pass_time(3)
        assert one.served.reactor.timers() == timers
        for client, host, _ in ends:
            client.close()
            host.close()


@ensureDeferred
async def test_nothing_of_a_tunnel_is_kept_when_it_is_over(tmp_path: Path) -> None:
    """It is freed without the garbage collector, which runs rarely."""
    async with tunnels(tmp_path) as one:
        client, host, splice = await one.open(b"early")
        host.send(b"late")
        assert await one.run(lambda: client.read(4)) == [b"late"]
        client.close()
        host.close()
        await one.ended(splice)
        gone = weakref.ref(splice)
        one.handler.splices.clear()
        gc.disable()
        try:
            del splice
            await until(lambda: gone() is None)
        finally:
            gc.enable()


# --- drawn lives ----------------------------------------------------------------------------------

SEED = int(os.environ["LLMPROXY_TEST_SEED"])  # tests/conftest.py
LIVES = 30


class PlayedEnd:
    """One end of a tunnel, which sends, takes, ends and resets as it is drawn; it never blocks.

    Args:
        sock: the end's.
        marks: what its bytes are made of.

    Attributes:
        sent, got: every byte that was sent and taken.
        has_ended: it has sent its FIN.
        over: how the other side has ended: ``fin`` or ``reset``.
    """

    def __init__(self, sock: socket.socket, marks: random.Random) -> None:
        sock.setblocking(False)
        self.sock, self._marks = sock, marks
        self.sent, self.got = bytearray(), bytearray()
        self.has_ended = self.has_reset = False
        self.over = ""

    def send(self, size: int) -> None:
        """Send up to so many bytes."""
        if self.has_ended or self.has_reset:
            return
        data = self._marks.randbytes(size)
        try:
            self.sent += data[: self.sock.send(data)]
        except BlockingIOError:
            return
        except OSError:
            self.over = "reset"

    def take(self, size: int) -> None:
        """Take up to so many bytes."""
        if self.over or self.has_reset:
            return
        try:
            data = self.sock.recv(size)
        except BlockingIOError:
            return
        except OSError:
            self.over = "reset"
            return
        self.got += data
        if not data:
            self.over = "fin"

    def end(self) -> None:
        """End this side."""
        if not (self.has_ended or self.has_reset):
            self.has_ended = True
            with suppress(OSError):  # the other side has reset it
                self.sock.shutdown(socket.SHUT_WR)

    def reset(self) -> None:
        """Reset the connection."""
        if not self.has_reset:
            self.has_reset = True
            Wire(self.sock).reset()


@pytest.mark.parametrize("kind", [PLAIN, (False, False)], ids=["direct", "twisted"])
@ensureDeferred
async def test_whatever_two_sides_do_no_byte_is_lost_or_made_up(
    tmp_path: Path, kind: tuple[bool, bool]
) -> None:
    """What one gets is how the other's bytes begin; where both end in order it is all of them."""
    async with tunnels(tmp_path, kind) as one:
        for number in range(LIVES):
            drawn = random.Random(SEED * 1000 + number)
            client, host, splice = await one.open(receive_buffer=drawn.choice([0, 4096]))
            ends = [PlayedEnd(wire.sock, random.Random(drawn.random())) for wire in (client, host)]
            resets = drawn.random() < 0.3
            for _ in range(drawn.randrange(60)):
                end, step = drawn.choice(ends), drawn.random()
                if step < 0.45:
                    end.send(drawn.choice([1, 1000, 300_000]))
                elif step < 0.9:
                    end.take(drawn.choice([1, 5000, 300_000]))
                elif step < 0.93:
                    end.end()
                elif step < 0.94 and resets:
                    end.reset()
                if drawn.random() < 0.3:
                    await turn()
            for end in ends:
                end.end()

            def is_over() -> bool:
                for end in ends:  # noqa: B023 - called before the next life
                    end.take(1 << 20)
                return all(end.over or end.has_reset for end in ends)  # noqa: B023 - the same

            await until(is_over)
            reason = await one.ended(splice)
            was_reset = any(end.has_reset for end in ends)
            for sender, taker in (ends, ends[::-1]):
                assert sender.sent.startswith(taker.got), number
                assert was_reset or taker.got == sender.sent, number
            assert was_reset or reason is EndReason.COMPLETE, number
            assert splice.received <= len(ends[1].sent)
            assert splice.sent <= len(ends[0].sent)
