"""Clients that leave in the middle of a response, in ways that are easily missed."""

from __future__ import annotations

import socket
import ssl
from collections.abc import Callable
from typing import Any

import pytest
from pytest_twisted import ensureDeferred

from tests.support.kernel import held
from tests.support.sockets import WAIT, Provider, Wire, chunked, connect, request
from tests.support.tls import Authority
from tests.traps.calls import Step
from tests.traps.endings import read_ending
from tests.traps.parts import Ports
from tests.traps.resources import Saying
from tests.traps.waits import thread, until

GET = request("GET", "/p/x")
PIECE = b"data: 1\n\n"

EAGER = 16 << 10
"""Bytes behind a running request after which Twisted reads no more."""


class Streaming:
    """A provider's script that begins a stream and goes on until it is let go of.

    Attributes:
        dropped: given once its connection is over.
    """

    def __init__(self) -> None:
        self.dropped = Step()

    def __call__(self, wire: Wire) -> None:
        """Serve one connection."""
        wire.read_request()
        wire.send(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n", chunked(PIECE))
        wire.wait_closed()
        self.dropped.give()


def begin(wire: Wire) -> None:
    """Ask, and read until the stream has begun."""
    wire.send(GET)
    wire.read_head()
    assert wire.read_chunk() == PIECE


LEAVE: dict[str, Callable[[Wire], None]] = {"closes": Wire.close, "resets": Wire.reset}


@pytest.mark.parametrize("how", LEAVE)
@ensureDeferred
async def test_a_client_that_leaves_is_noticed(proxy: Ports, how: str) -> None:
    """Its provider is let go of."""
    streaming = Streaming()
    with Provider(streaming) as provider, await thread(connect, proxy(provider.url)) as wire:
        await thread(begin, wire)
        LEAVE[how](wire)
        dropped = await streaming.dropped.happens(WAIT)
    assert dropped


@pytest.mark.trap("C9")
@pytest.mark.parametrize(("how", "behind"), [("closes", 100 << 10), ("resets", 20 << 10)])
@ensureDeferred
async def test_a_client_that_pipelined_and_leaves_is_noticed(
    proxy: Ports, patience: float, how: str, behind: int
) -> None:
    """However much it sent behind its running request, its provider is let go of."""
    streaming = Streaming()

    def is_read(port: int) -> bool:
        arrived = held(local=port)
        return arrived.received - arrived.unread > len(GET) + EAGER

    with Provider(streaming) as provider:
        port = proxy(provider.url)
        with await thread(connect, port) as wire:
            await thread(begin, wire)
            await thread(wire.send, GET * (behind // len(GET)))
            read = await until(lambda: is_read(port), patience)
            LEAVE[how](wire)
            dropped = await streaming.dropped.happens(patience)
        accepted = provider.accepted
    assert (read, accepted) == (True, 1)  # else nothing was shown
    assert dropped


def half_close(wire: Wire) -> None:
    """Close the sending half: TLS's close_notify, or a FIN."""
    if isinstance(wire.sock, ssl.SSLSocket):
        wire.close_notify()
    else:
        wire.sock.shutdown(socket.SHUT_WR)


@pytest.mark.trap("C14")
@pytest.mark.parametrize("tls", [False, True], ids=["plain", "tls"])
@ensureDeferred
async def test_a_client_that_half_closes_is_taken_for_gone(
    front: Ports, authority: Authority, tls: bool
) -> None:
    """The Resource learns that its client has left, though the client might still read."""
    gone = Step()

    def say(request: Any) -> None:
        request.notifyFinish().addErrback(lambda _: gone.give())
        request.write(PIECE)

    port = front(Saying(say), tls=tls)
    context = authority.client() if tls else None
    with await thread(connect, port, tls=context) as wire:
        await thread(begin, wire)
        await thread(half_close, wire)
        left = await gone.happens(WAIT)
    assert left


@pytest.mark.trap("C14")
@ensureDeferred
async def test_the_provider_of_a_client_that_half_closed_is_let_go_of(proxy: Ports) -> None:
    """And the client can tell: its response breaks off without an end."""
    streaming = Streaming()
    with Provider(streaming) as provider, await thread(connect, proxy(provider.url)) as wire:
        await thread(begin, wire)
        half_close(wire)
        ending = await thread(read_ending, wire, WAIT)
        dropped = await streaming.dropped.happens(WAIT)
    assert dropped
    assert (ending.raw, ending.how) == (b"", "fin")
