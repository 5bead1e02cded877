"""Slow clients: deadlines that a byte now and then does not push back."""

from __future__ import annotations

import time
from contextlib import suppress
from typing import Any

import pytest
from pytest_twisted import ensureDeferred

from tests.support.sockets import WAIT, Provider, Wire, chunked, connect, request
from tests.traps.asking import ClientResponse, ask, read_response
from tests.traps.calls import Step
from tests.traps.parts import Ports
from tests.traps.resources import Counting, Saying
from tests.traps.waits import thread

DEADLINE = 0.3
"""Seconds that a client is given."""

PACE = 0.03
"""Seconds between two pieces, so that the client is never silent."""

GET = request("GET", "/x")


def trickle(port: int, seconds: float, start: bytes, piece: bytes) -> ClientResponse | None:
    """Send ``start`` and then the same piece again and again; return the response.

    After so many seconds without a response or an end, that is None.
    """
    with connect(port) as wire:
        wire.send(start)
        wire.sock.settimeout(PACE)
        over = time.monotonic() + seconds
        with suppress(ConnectionError):
            while not wire.buffer:
                if time.monotonic() > over:
                    return None
                wire.send(piece)
                with suppress(TimeoutError):
                    if not wire.receive():
                        break
        return read_response(wire, seconds)


@ensureDeferred
async def test_a_client_in_time_is_served(front: Ports) -> None:
    """A deadline is no hindrance to a client that is quicker."""
    port = front(Counting(), client_deadline=WAIT / 2)
    assert (await thread(ask, port, WAIT, GET)).status == 200


@pytest.mark.trap("C8")
@ensureDeferred
async def test_a_head_that_comes_byte_by_byte_has_an_end(front: Ports, patience: float) -> None:
    """Its deadline is absolute: 408, and the connection is over."""
    counting = Counting()
    port = front(counting, client_deadline=DEADLINE)
    start = b"GET /x HTTP/1.1\r\nHost: proxy\r\nX-Long: "
    got = await thread(trickle, port, patience, start, b"x")
    assert got is not None, "it is waited for"
    assert (got.status, counting.rendered) == (408, 0)
    assert got.message
    assert got.how == "fin"


@pytest.mark.trap("C8")
@pytest.mark.parametrize(
    ("fields", "piece"),
    [
        (["Content-Type: application/json", "Content-Length: 100000"], b"x"),
        (["Content-Type: application/pdf", "Transfer-Encoding: chunked"], chunked(b"x")),
    ],
    ids=["held", "streamed"],
)
@ensureDeferred
async def test_a_body_that_comes_byte_by_byte_has_an_end(
    proxy: Ports, patience: float, fields: list[str], piece: bytes
) -> None:
    """The same for the body, whether it is held here or on its way to the provider already."""

    def script(wire: Wire) -> None:
        wire.wait_closed()

    with Provider(script) as provider:
        port = proxy(provider.url, client_deadline=DEADLINE)
        start = request("POST", "/p/x", *fields)
        got = await thread(trickle, port, patience, start, piece)
    assert got is not None, "it is waited for"
    assert got.status == 408
    assert got.message
    assert got.how == "fin"


MORE_THAN_THE_KERNEL_TAKES = 8 << 20


@pytest.mark.trap("C8")
@ensureDeferred
async def test_a_client_that_reads_nothing_is_disconnected(front: Ports, patience: float) -> None:
    """While its response is under way, too: the Resource learns that its client is gone."""
    gone = Step()

    def say(request: Any) -> None:
        request.notifyFinish().addErrback(lambda _: gone.give())
        request.write(bytes(MORE_THAN_THE_KERNEL_TAKES))

    port = front(Saying(say), client_deadline=DEADLINE)
    with await thread(connect, port, receive_buffer=4096) as wire:
        wire.send(GET)
        disconnected = await gone.happens(patience)
    assert disconnected
