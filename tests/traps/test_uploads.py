"""Request bodies on their way up, and responses that come before the body's end."""

from __future__ import annotations

import pytest
from pytest_twisted import ensureDeferred

from tests.support.sockets import Provider, Wire, chunked, request
from tests.traps.asking import ask
from tests.traps.calls import Responding, Step, outcome, reads_until_closed
from tests.traps.parts import Ports, Upstream
from tests.traps.waits import thread

BIG = 16 << 20
TOO_LARGE = b"HTTP/1.1 413 Too Large\r\nContent-Length: 9\r\n\r\ntoo large"


@pytest.mark.trap("U3")
@pytest.mark.parametrize("kind", ["application/json", "application/octet-stream"])
@ensureDeferred
async def test_a_body_s_length_is_sent_once(proxy: Ports, patience: float, kind: str) -> None:
    """The client's own ``Content-Length`` does not stand beside ours, held body or streamed."""
    responding = Responding()
    sent = request("POST", "/p/x", f"Content-Type: {kind}", body=b'{"a":1}')
    with Provider(responding) as provider:
        assert (await thread(ask, proxy(provider.url), patience, sent)).body == b"ok"
    (got,) = responding.requests
    assert got.values(b"content-length") == [b"7"]
    assert got.values(b"transfer-encoding") == []
    assert got.body == b'{"a":1}'


class Refusing:
    """A provider's script that responds to a request's head and reads none of its body meanwhile.

    Attributes:
        closed: given once the connection is over.
        received: bytes of the body that came until then.
    """

    def __init__(self, response: bytes = TOO_LARGE) -> None:
        self._response = response
        self._responded = Step()
        self.closed = Step()
        self.received = 0

    def __call__(self, wire: Wire) -> None:
        """Serve one connection."""
        wire.read_head()
        wire.send(self._response)
        self._responded.take()
        self.received = reads_until_closed(wire)
        self.closed.give()

    def go_on(self) -> None:
        """Let it read the body."""
        self._responded.give()


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
    proxy: Ports, patience: float, framing: str
) -> None:
    """The client gets the refusal inside its body, and the provider never gets the rest."""
    refusing = Refusing()
    kind = "Content-Type: application/octet-stream"
    if framing == "chunked":
        head = request("POST", "/p/x", kind, "Transfer-Encoding: chunked")
        piece = chunked(bytes(1 << 16))
    else:
        head = request("POST", "/p/x", kind, f"Content-Length: {BIG}")
        piece = bytes(1 << 16)

    with Provider(refusing) as provider:
        got = await thread(ask, proxy(provider.url), patience, head, piece)
        refusing.go_on()
        stopped = await refusing.closed.happens(patience)
    assert (got.status, got.body) == (413, b"too large")
    assert stopped, "the provider waits for the rest of the body"
