"""When a write leaves: what TLS may join, and what it may not hold back."""

from __future__ import annotations

from typing import Any

import pytest
from pytest_twisted import ensureDeferred
from twisted.internet.defer import Deferred

from tests.support.sockets import WAIT, Provider, Wire, chunked, connect, request
from tests.support.tls import Authority
from tests.traps.calls import Step
from tests.traps.parts import Ports
from tests.traps.resources import Saying
from tests.traps.waits import thread


class Reader:
    """A client that reads a response chunk by chunk over TLS, and notes when it has the first.

    Args:
        authority: whom it trusts.

    Attributes:
        has_first: given then.
    """

    def __init__(self, authority: Authority) -> None:
        self._context = authority.client()
        self.has_first = Step()

    def read(self, port: int, target: str) -> list[bytes]:
        """Ask, and return the first chunk and all that follows."""
        with connect(port, tls=self._context) as wire:
            wire.send(request("GET", target))
            wire.read_head()
            first = wire.read_chunk()
            self.has_first.give()
            return [first, wire.read_chunks()]


@pytest.mark.trap("C17")
@ensureDeferred
async def test_a_write_does_not_wait_for_the_next_turn(front: Ports, authority: Authority) -> None:
    """Only writes of one turn may be joined: the first is read before the second is written."""
    reader = Reader(authority)
    early: list[bool] = []

    async def go_on(request: Any) -> None:
        early.append(await reader.has_first.happens(WAIT))
        request.write(b"second")
        request.finish()

    def say(request: Any) -> None:
        request.write(b"first")
        Deferred.fromCoroutine(go_on(request))

    got = await thread(reader.read, front(Saying(say), tls=True), "/x")
    assert got == [b"first", b"second"]
    assert early == [True]


@pytest.mark.trap("C17")
@ensureDeferred
async def test_a_piece_of_a_provider_does_not_wait_for_the_next(
    proxy: Ports, authority: Authority
) -> None:
    """The same through the whole proxy: the second piece is sent once the client has the first."""
    reader = Reader(authority)

    def script(wire: Wire) -> None:
        wire.read_request()
        wire.send(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n", chunked(b"first"))
        reader.has_first.take()
        wire.send(chunked(b"second"), b"0\r\n\r\n")
        wire.wait_closed()

    with Provider(script) as provider:
        got = await thread(reader.read, proxy(provider.url, tls=True), "/p/x")
    assert got == [b"first", b"second"]
