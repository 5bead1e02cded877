"""Where the bytes are while a client does not read."""

from __future__ import annotations

import socket

import pytest
from pytest_twisted import ensureDeferred

from tests.support.kernel import held
from tests.support.sockets import WAIT, Provider, Wire, connect, request
from tests.support.tls import Authority
from tests.traps.calls import Step
from tests.traps.parts import Ports
from tests.traps.waits import thread

BUFFER = 8192
"""Every kernel buffer's size in bytes, where it can be said; Linux gives twice as much."""

TOTAL = 2 << 20
BOUND = 128 * 1024
"""Most bytes that the proxy may hold of one response, in its own memory."""

TLS_EXTRA = (16 + 4) * 1024
"""What is counted below TLS and is no byte of a response yet: a record that is incomplete, which is
at most 16 KiB, and the handshake."""

STILL = 0.75
"""Seconds without progress after which a sender is held up for good."""


class Pouring:
    """A provider's script that sends a body as fast as it is taken, and notes when none is taken.

    Attributes:
        taken: bytes that the kernel, and before it TLS, took from the script.
        stood: given when no byte was taken for a while, or when there is none left.
    """

    def __init__(self) -> None:
        self.content = b"".join(b"%07d\n" % place for place in range(TOTAL // 8))
        self.taken = 0
        self.stood = Step()

    def __call__(self, wire: Wire) -> None:
        """Serve one connection."""
        wire.read_request()
        wire.send(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % TOTAL)
        left = memoryview(self.content)
        wire.sock.settimeout(STILL)
        while left:
            try:
                count = wire.sock.send(left[:65536])
            except TimeoutError:
                self.stood.give()
                wire.sock.settimeout(WAIT)
            else:
                self.taken += count
                left = left[count:]
        self.stood.give()


def read_all(wire: Wire) -> bytes:
    """Read the body, with a kernel buffer that is no longer small."""
    wire.sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 20)
    pieces = [wire.buffer]
    left = TOTAL - len(wire.buffer)
    while left:
        piece = wire.sock.recv(65536)
        if not piece:
            break
        pieces.append(piece)
        left -= len(piece)
    return b"".join(pieces)


@pytest.mark.trap("C16")
@pytest.mark.parametrize("below", [False, True], ids=["plain client", "tls client"])
@pytest.mark.parametrize("above", [False, True], ids=["plain provider", "tls provider"])
@ensureDeferred
async def test_a_client_that_stops_reading_stops_the_provider(
    proxy: Ports, authority: Authority, above: bool, below: bool
) -> None:
    """What the proxy took and could not forward stays bounded; reading again, all of it comes."""
    pouring = Pouring()
    tls = authority.server() if above else None
    with Provider(pouring, tls=tls, send_buffer=BUFFER) as provider:
        port = proxy(provider.url, ca=authority.ca_path, tls=below, send_buffer=BUFFER)
        context = authority.client() if below else None
        wire = await thread(connect, port, receive_buffer=BUFFER, tls=context)
        with wire:
            wire.send(request("GET", "/p/x"))
            await thread(wire.read_head)
            assert await pouring.stood.happens(WAIT)
            arrived = held(peer=provider.port)
            taken = arrived.received - arrived.unread
            given = held(local=port).written
            assert given > BUFFER // 2
            assert taken - given <= BOUND + (TLS_EXTRA if above else 0)
            assert pouring.taken < TOTAL
            body = await thread(read_all, wire)
    assert body == pouring.content
