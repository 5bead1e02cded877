"""What Twisted's own TCP and TLS transports hold when their peer does not read.

These tests fail when the private attributes change on which ``net/transport.py`` leans.
"""

from __future__ import annotations

import contextlib
import queue
import select
import socket
import threading
import time
from collections.abc import Callable
from typing import Any

import pytest
import pytest_twisted
from twisted.internet import reactor as real_reactor
from twisted.internet.address import IPv4Address, IPv6Address, UNIXAddress
from twisted.internet.defer import Deferred
from twisted.internet.endpoints import TCP4ClientEndpoint, connectProtocol, wrapClientTLS
from twisted.internet.protocol import Protocol, connectionDone
from twisted.internet.ssl import Certificate, optionsForClientTLS, trustRootFromCertificates
from twisted.internet.tcp import Client
from twisted.internet.threads import deferToThread
from twisted.protocols.tls import TLSMemoryBIOProtocol
from twisted.python.failure import Failure

from llmproxy.net.transport import (
    has_failed,
    has_peer_left,
    host_of,
    is_quiet,
    notice_vanished_peer,
    pending_bytes,
    raw_transport,
    unacknowledged_bytes,
    unsent_bytes,
)
from tests.support.fake_transport import until
from tests.support.sockets import WAIT, Provider, Wire
from tests.support.tls import Authority

reactor: Any = real_reactor


class OurEnd(Protocol):
    """Our end of a connection."""

    def __init__(self) -> None:
        self.received = b""
        self.lost: Deferred[None] = Deferred()

    def dataReceived(self, data: bytes) -> None:
        self.received += data

    def connectionLost(self, reason: Failure = connectionDone) -> None:
        self.lost.callback(None)


class StuckPeer:
    """A peer whose socket the test holds; it reads and writes only when the test does."""

    def __init__(self, authority: Authority | None) -> None:
        self._authority = authority
        self._wires: queue.Queue[Wire] = queue.Queue()
        self._over = threading.Event()
        tls = None if authority is None else authority.server()
        self.peer = Provider(self._hold, tls=tls, receive_buffer=65536)
        self.ours = OurEnd()

    def _hold(self, wire: Wire) -> None:
        self._wires.put(wire)
        self._over.wait(WAIT)

    async def connect(self) -> Any:
        """Return our transport."""
        endpoint: Any = TCP4ClientEndpoint(reactor, "127.0.0.1", self.peer.port)
        if self._authority is not None:
            root = Certificate.loadPEM(self._authority.ca_path.read_bytes())
            trust = trustRootFromCertificates([root])
            endpoint = wrapClientTLS(optionsForClientTLS("localhost", trust), endpoint)
        await connectProtocol(endpoint, self.ours)
        await until(lambda: not self._wires.empty())
        self.wire = self._wires.get()
        # The tickets of TLS 1.3 follow the handshake; they are read before anything is looked at.
        self.wire.send(b"!")
        await until(lambda: self.ours.received == b"!")
        return self.ours.transport

    def release(self) -> None:
        """Let the peer end."""
        self._over.set()

    async def close(self) -> None:
        """End both ends."""
        transport: Any = self.ours.transport
        transport.abortConnection()
        self.release()
        await self.ours.lost

    async def fill(self) -> None:
        """Wait until the kernel takes nothing more."""
        handle = raw_transport(self.ours.transport).socket
        await until(lambda: not select.select([], [handle], [], 0)[1])


@contextlib.asynccontextmanager
async def connected(authority: Authority | None) -> Any:
    """Yield a peer that does not read, and our transport; both ends end behind the test."""
    held = StuckPeer(authority)
    with held.peer:
        try:
            transport = await held.connect()
            yield held, transport
            await held.close()
        finally:
            held.release()


@pytest.fixture(scope="module", params=["tcp", "tls"])
def authority(request: Any, tmp_path_factory: pytest.TempPathFactory) -> Authority | None:
    """The peer's authority where the connection is TLS."""
    if request.param == "tcp":
        return None
    return Authority(tmp_path_factory.mktemp("ca"))


@pytest_twisted.ensureDeferred
async def test_the_raw_transport_has_the_socket(authority: Authority | None) -> None:
    """Below TLS there is Twisted's TCP transport with the socket."""
    async with connected(authority) as (_, transport):
        assert isinstance(transport, TLSMemoryBIOProtocol) is (authority is not None)
        assert type(raw_transport(transport)) is Client
        assert isinstance(raw_transport(transport).socket, socket.socket)


@pytest_twisted.ensureDeferred
async def test_every_byte_is_pending_until_the_kernel_has_it(authority: Authority | None) -> None:
    """Each byte is counted, in whichever queue it is."""
    async with connected(authority) as (_, transport):
        assert pending_bytes(transport) == 0
        for count in range(1, 4):
            transport.write(b"x" * 1000)
            assert 1000 * count <= pending_bytes(transport) <= 1100 * count
        await until(lambda: pending_bytes(transport) == 0)


@pytest_twisted.ensureDeferred
async def test_what_a_stuck_peer_leaves_is_pending(authority: Authority | None) -> None:
    """A written byte is pending or in the kernel until the peer reads it."""
    size = 20_000_000
    async with connected(authority) as (held, transport):
        for _ in range(20):
            transport.write(bytes(size // 20))
        assert pending_bytes(transport) >= size
        await held.fill()
        left = pending_bytes(transport)
        assert 0 < left < size * 1.01
        assert unacknowledged_bytes(transport) >= unsent_bytes(transport) > 0
        received = 0
        while received < size:
            received += len(await until_received(held.wire))
        await until(lambda: pending_bytes(transport) == 0)
        await until(lambda: unacknowledged_bytes(transport) == 0)
        assert (received, unsent_bytes(transport)) == (size, 0)


@pytest_twisted.ensureDeferred
async def test_pending_is_exactly_what_the_kernel_did_not_take() -> None:
    """The peer can read all other bytes while the reactor stands still."""
    size = 20_000_000
    async with connected(None) as (held, transport):
        for _ in range(200):
            transport.write(bytes(size // 200))
        await held.fill()
        taken = size - pending_bytes(transport)
        assert transport.offset > 0  # part of one string was sent, which is what is easily missed
        received = 0
        while received < taken:
            received += len(held.wire.sock.recv(min(65536, taken - received)))
        deadline = time.monotonic() + WAIT
        while unacknowledged_bytes(transport):
            assert time.monotonic() < deadline
        assert not select.select([held.wire.sock], [], [], 0)[0]


async def until_received(wire: Wire) -> bytes:
    """Receive what is there, while the reactor turns."""
    wire.buffer = b""
    return await deferToThread(wire.receive)


@pytest_twisted.ensureDeferred
async def test_bytes_wait_while_the_handshake_lasts() -> None:
    """Bytes that OpenSSL does not take yet are pending, too."""
    held = StuckPeer(None)
    with held.peer:
        options = optionsForClientTLS("localhost")
        endpoint: Any = TCP4ClientEndpoint(reactor, "127.0.0.1", held.peer.port)
        await connectProtocol(wrapClientTLS(options, endpoint), held.ours)
        transport: Any = held.ours.transport
        await until(lambda: pending_bytes(transport) == 0)  # the ClientHello is out
        transport.write(b"x" * 1000)
        assert pending_bytes(transport) == 1000
        await until(lambda: not transport._aggregator._buffer)
        assert pending_bytes(transport) == 1000
        await held.close()


@pytest_twisted.ensureDeferred
async def test_a_lost_connection_holds_nothing_of_the_kernel(authority: Authority | None) -> None:
    """After the end no byte waits to be acknowledged, and the connection is not quiet."""
    async with connected(authority) as (held, transport):
        await held.close()
        assert unacknowledged_bytes(transport) == unsent_bytes(transport) == 0
        assert not is_quiet(transport)


@pytest_twisted.ensureDeferred
@pytest.mark.parametrize("what", ["nothing", "a byte", "fin", "reset"])
async def test_what_waits_to_be_read_is_seen(what: str, authority: Authority | None) -> None:
    """An idle connection is quiet; with an unread byte, FIN or reset it is not."""
    async with connected(authority) as (held, transport):
        transport.pauseProducing()
        assert is_quiet(transport)
        actions: dict[str, Callable[[], None]] = {
            "nothing": lambda: None,
            "a byte": lambda: held.wire.send(b"x"),
            "fin": lambda: held.wire.sock.shutdown(socket.SHUT_WR),
            "reset": held.wire.reset,
        }
        actions[what]()
        if what == "nothing":
            assert is_quiet(transport)
        else:
            await until(lambda: not is_quiet(transport))
            assert not is_quiet(transport)  # looking took nothing away
        if what == "a byte":
            transport.resumeProducing()
            await until(lambda: held.ours.received == b"!x")
            assert is_quiet(transport)


@pytest_twisted.ensureDeferred
@pytest.mark.parametrize("how", ["fin", "reset"])
async def test_the_end_of_a_peer_is_seen_behind_unread_bytes(
    how: str, authority: Authority | None
) -> None:
    """Its end is known while our end does not read, whatever comes before it."""
    async with connected(authority) as (held, transport):
        transport.pauseProducing()
        held.wire.send(b"unread")
        await until(lambda: not is_quiet(transport))
        assert has_peer_left(transport) is False
        held.wire.sock.shutdown(socket.SHUT_WR) if how == "fin" else held.wire.reset()
        await until(lambda: has_peer_left(transport))
        assert has_failed(transport) is (how == "reset")
        await held.close()
        assert has_peer_left(transport)
        assert not has_failed(transport)


@pytest_twisted.ensureDeferred
async def test_the_kernel_notices_a_vanished_peer(authority: Authority | None) -> None:
    """Probes and unacknowledged bytes show that a peer vanished."""
    async with connected(authority) as (held, transport):
        notice_vanished_peer(transport)
        handle = raw_transport(transport).socket
        assert handle.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE)
        assert handle.getsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE) == 30
        assert handle.getsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL) == 10
        assert handle.getsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT) == 3
        assert handle.getsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT) == 60_000
        await held.close()
        notice_vanished_peer(transport)  # harmless by then


@pytest.mark.parametrize(
    ("address", "host"),
    [
        (IPv4Address("TCP", "192.0.2.1", 1), "192.0.2.1"),
        (IPv6Address("TCP", "::ffff:192.0.2.1", 1), "192.0.2.1"),
        (IPv6Address("TCP", "::1", 1), "::1"),
        (IPv6Address("TCP", "::ffff:1", 1), "::ffff:1"),
        (UNIXAddress(None), None),
        (None, None),
    ],
)
def test_a_client_has_one_address_on_every_socket(address: Any, host: str | None) -> None:
    """An IPv4 client of a socket of IPv6 is that IPv4 client."""
    assert host_of(address) == host
