"""Responses split at any point by the wire itself: two segments, two reads, one meaning."""

from __future__ import annotations

import threading

import pytest
from pytest_twisted import ensureDeferred

from tests.support.fake_transport import Collector, turn
from tests.support.kernel import held
from tests.support.sockets import Provider, Wire
from tests.support.tls import Authority
from tests.upstream.one_provider import pool_of

HEAD = b"HTTP/1.1 200 OK\r\nx-a: 1\r\n"
CHUNKED = (
    HEAD
    + b"transfer-encoding: chunked\r\n\r\n4;x\r\ndata\r\n0A\r\n: a line\n\n\r\n0\r\nt: 1\r\n\r\n"
)
LENGTH = b"HTTP/1.1 103 X\r\n\r\n" + HEAD + b"content-length: 14\r\n\r\ndata: a line\n\n"


class Splitting:
    """A provider's script that splits its response to each request, further on each time.

    The second piece follows only once the first one was read.
    """

    def __init__(self, response: bytes) -> None:
        self._response = response

    def __call__(self, wire: Wire) -> None:
        """Serve one connection."""
        port = wire.sock.getpeername()[1]
        tick = threading.Event()
        for at in range(1, len(self._response)):
            wire.read_request()
            wire.send(self._response[:at])
            while held(local=port).unread:
                tick.wait(0.0005)
            wire.send(self._response[at:])


@pytest.mark.parametrize("tls", [False, True], ids=["plain", "tls"])
@pytest.mark.parametrize("response", [LENGTH, CHUNKED], ids=["length", "chunked"])
@ensureDeferred
async def test_a_response_is_the_same_at_every_split_of_the_wire(
    authority: Authority, response: bytes, tls: bool
) -> None:
    """One connection serves a request for each offset of the split, and no response differs."""
    provider = Provider(Splitting(response), tls=authority.server() if tls else None)
    async with pool_of(provider, ca=authority.ca_path) as (_, pool):
        for at in range(1, len(response)):
            got = await pool.send()
            body = Collector()
            got.deliverBody(body)
            await body.ended
            assert (got.code, body.body) == (200, b"data: a line\n\n"), at
            await turn()  # a TLS connection is kept from then on
            assert b"" not in body.pieces
        assert provider.accepted == 1
