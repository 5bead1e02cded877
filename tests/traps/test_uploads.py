"""Request bodies on their way up, and answers that come before those have ended."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from pytest_twisted import ensureDeferred

from tests.support.sockets import Provider, Received, Wire, chunked, connect, request
from tests.traps.calls import OK, Step, outcome, reads_until_closed
from tests.traps.parts import Sender
from tests.traps.waits import thread

Upstream = Callable[..., Sender]
BIG = 16 << 20
TOO_LARGE = b"HTTP/1.1 413 Too Large\r\nContent-Length: 9\r\n\r\ntoo large"


@pytest.mark.trap("U3")
@pytest.mark.parametrize("kind", ["application/json", "application/octet-stream"])
@ensureDeferred
async def test_a_body_s_length_is_said_once(proxy: Callable[..., int], kind: str) -> None:
    """The caller's own ``Content-Length`` does not stand beside ours, held body or streamed."""
    seen: list[Received] = []

    def script(wire: Wire) -> None:
        seen.append(wire.read_request())
        wire.send(OK)

    def ask(port: int) -> None:
        with connect(port) as wire:
            wire.send(request("POST", "/p/x", f"Content-Type: {kind}", body=b'{"a":1}'))
            _, fields = wire.read_head()
            assert wire.read_body(fields) == b"ok"

    with Provider(script) as provider:
        await thread(ask, proxy(provider.url))
    (got,) = seen
    assert got.values(b"content-length") == [b"7"]
    assert got.values(b"transfer-encoding") == []
    assert got.body == b'{"a":1}'


class Refusing:
    """A provider's script that answers a request's head and reads none of its body meanwhile.

    Attributes:
        closed: given once the connection is over.
        received: bytes of the body that came until then.
    """

    def __init__(self, response: bytes = TOO_LARGE) -> None:
        self._response = response
        self._answered = Step()
        self.closed = Step()
        self.received = 0

    def __call__(self, wire: Wire) -> None:
        """Serve one connection."""
        wire.read_head()
        wire.send(self._response)
        self._answered.take()
        self.received = reads_until_closed(wire)
        self.closed.give()

    def go_on(self) -> None:
        """Let it read the body."""
        self._answered.give()


@pytest.mark.trap("U17")
@pytest.mark.parametrize(
    ("response", "text"),
    [
        (TOO_LARGE, b"too large"),
        (b"HTTP/1.1 401 No\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nno\r\n0\r\n\r\n", b"no"),
        (b"HTTP/1.1 429 Slow\r\nContent-Length: 0\r\n\r\n", b""),
    ],
    ids=["length", "chunked", "empty"],
)
@ensureDeferred
async def test_a_response_is_delivered_while_the_body_is_still_being_sent(
    upstream: Upstream, patience: float, response: bytes, text: bytes
) -> None:
    """A refusal that comes first is the response; the rest of the body stays here."""
    refusing = Refusing(response)
    with Provider(refusing, receive_buffer=1 << 16) as provider:
        call = upstream(provider.url).send("POST", "/x", [], body=bytes(BIG))
        result = await outcome(call, patience)
        refusing.go_on()
        stopped = await refusing.closed.happens(patience)
    assert (result.data, result.whole) == (text, True)
    assert stopped, "the connection is kept"
    assert refusing.received < BIG


@pytest.mark.trap("U17")
@pytest.mark.parametrize("framing", ["chunked", "length"])
@ensureDeferred
async def test_a_streamed_upload_is_stopped_by_its_response(
    proxy: Callable[..., int], patience: float, framing: str
) -> None:
    """The caller has the refusal inside its body, and the provider never gets the rest."""
    refusing = Refusing()
    kind = "Content-Type: application/octet-stream"
    if framing == "chunked":
        head = request("POST", "/p/x", kind, "Transfer-Encoding: chunked")
        piece = chunked(bytes(1 << 16))
    else:
        head = request("POST", "/p/x", kind, f"Content-Length: {BIG}")
        piece = bytes(1 << 16)

    def ask(port: int) -> bytes:
        with connect(port) as wire:
            wire.send(head, piece)
            wire.sock.settimeout(patience)
            try:
                first, fields = wire.read_head()
            except TimeoutError:
                return b"no answer"
            return first[:12] + b" " + wire.read_body(fields)

    with Provider(refusing) as provider:
        got = await thread(ask, proxy(provider.url))
        refusing.go_on()
        stopped = await refusing.closed.happens(patience)
    assert got == b"HTTP/1.1 413 too large"
    assert stopped, "the provider waits for the rest of the body"
