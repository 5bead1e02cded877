"""One caller's poisoned response, and the next caller's request to the same provider (design 6)."""

from __future__ import annotations

import itertools

import pytest

from tests.support.live_proxy import (
    ONE_ROUTE,
    LiveProxy,
    Response,
    assert_settles,
    client_config,
    live_fixture,
)
from tests.support.scripts import Notes, Turn
from tests.support.sockets import Wire, request

KEYS = {"mallory": "key-of-mallory", "bob": "key-of-bob"}
PLAIN = b"HTTP/1.1 200 OK\r\n"
TWO = PLAIN + b"Content-Length: 2\r\n\r\nok"
CHUNKED = PLAIN + b"Transfer-Encoding: chunked\r\n\r\n2\r\nok\r\n0\r\n\r\n"
TRICK = PLAIN + b"Content-Length: 5\r\n\r\ntrick"
MINE = PLAIN + b"Content-Length: 4\r\nConnection: close\r\n\r\nmine"

live = live_fixture(
    ONE_ROUTE + "".join(client_config(name, key) for name, key in KEYS.items()),
    proxy="",
    both_links=True,
)


class Poisoned:
    """A provider's script whose first connection is poisoned, and each one behind it honest.

    A request on a connection that served another one gets ``trick``.

    Args:
        response: what the poisoned connection sends to its first request.
        behind: what it sends later, unasked, at a turn.

    Attributes:
        served: the number of the connection and the target, for each request in order.
    """

    def __init__(self, response: bytes, behind: bytes = b"", *, closes: bool = False) -> None:
        self._response, self._behind, self._closes = response, behind, closes
        self._number = itertools.count()
        self.later = Turn()
        self.said = Notes()
        self.served: list[tuple[int, bytes]] = []

    def __call__(self, wire: Wire) -> None:
        """Serve one connection."""
        number = next(self._number)
        self.served.append((number, wire.read_request().target))
        if number:
            wire.send(MINE)
            return
        wire.send(self._response)
        if self._closes:
            wire.close_notify()
            return
        if self._behind:
            self.later.take()
            wire.send(self._behind)
            self.said.put(None)
        self.served.append((number, wire.read_request().target))
        wire.send(TRICK)


def ask(live: LiveProxy, who: str, method: str = "GET") -> Response:
    """Send a request in somebody's name, on a client connection of its own."""
    return live.get(request(method, f"/p/{who}", f"x-api-key: {KEYS[who]}"))


def assert_untouched(live: LiveProxy, script: Poisoned) -> None:
    """The second caller gets its own response, on a connection that served nobody before."""
    got = ask(live, "bob")
    assert (got.status, got.body) == (200, b"mine")
    assert script.served == [(0, b"/mallory"), (1, b"/bob")]
    assert_settles(live.daemon)


@pytest.mark.parametrize(
    ("method", "response", "status", "body"),
    [
        ("GET", TWO + TRICK, 200, b"ok"),
        ("GET", TWO + b"\r\n", 200, b"ok"),
        ("GET", PLAIN + b"Content-Length: 1\r\n\r\nok", 200, b"o"),
        ("GET", PLAIN + b"Content-Length: 0\r\n\r\n" + TRICK, 200, b""),
        ("GET", CHUNKED + TRICK, 200, b"ok"),
        ("GET", CHUNKED + b"0\r\n\r\n", 200, b"ok"),
        ("HEAD", TWO, 200, b""),
        ("HEAD", CHUNKED, 200, b""),
        ("HEAD", PLAIN + b"Content-Length: 2\r\n\r\n" + TRICK, 200, b""),
        ("GET", b"HTTP/1.1 204 None\r\nContent-Length: 2\r\n\r\nok", 204, b""),
        ("GET", b"HTTP/1.1 204 None\r\n\r\n" + TRICK, 204, b""),
        ("GET", b"HTTP/1.1 304 Same\r\nContent-Length: 2\r\n\r\nok", 304, b""),
        ("GET", b"HTTP/1.1 100 Continue\r\n\r\njunk\r\n\r\n" + TRICK, 502, None),
        ("GET", b"HTTP/1.1 100 Continue\r\nContent-Length: 4\r\n\r\njunk" + TWO, 502, None),
        ("GET", PLAIN + b"Content-Length: 2\r\nContent-Length: 3\r\n\r\nok" + TRICK, 502, None),
    ],
    ids=[
        "behind a length",
        "a line end behind a length",
        "a length that is too short",
        "behind an empty body",
        "behind the last chunk",
        "a second last chunk",
        "HEAD with a body",
        "HEAD with a chunked body",
        "HEAD with a response behind it",
        "204 with a body",
        "204 with a response behind it",
        "304 with a body",
        "100 and junk",
        "100 with a body",
        "two lengths",
    ],
)
def test_poison_behind_a_response_meets_nobody(
    live: LiveProxy, method: str, response: bytes, status: int, body: bytes | None
) -> None:
    """The first caller gets what its framing says, and nothing of the rest gets to the second."""
    script = live.script = Poisoned(response)
    got = ask(live, "mallory", method)
    assert got.status == status
    assert body is None or got.body == body
    assert b"trick" not in got.body
    assert_untouched(live, script)


@pytest.mark.parametrize(
    ("method", "response"),
    [
        ("GET", TWO),
        ("GET", CHUNKED),
        ("HEAD", PLAIN + b"Content-Length: 2\r\n\r\n"),
        ("GET", b"HTTP/1.1 204 None\r\n\r\n"),
    ],
    ids=["length", "chunked", "HEAD", "204"],
)
@pytest.mark.parametrize(
    "behind", [TRICK, b"\r\n", b"x"], ids=["a response", "a line end", "a byte"]
)
def test_what_comes_unasked_on_an_idle_connection_meets_nobody(
    live: LiveProxy, method: str, response: bytes, behind: bytes
) -> None:
    """The connection was good when its response ended; what comes then makes it useless."""
    script = live.script = Poisoned(response, behind)
    assert ask(live, "mallory", method).status in (200, 204)
    script.later.give()
    script.said.read()
    assert_untouched(live, script)


@pytest.mark.parametrize(
    "response",
    [PLAIN + b"Content-Length: 9\r\n\r\nok", CHUNKED[:-5]],
    ids=["a length that is too long", "no last chunk"],
)
def test_a_response_that_ends_short_meets_nobody(live: LiveProxy, response: bytes) -> None:
    """The first caller's body breaks, and the second caller has a connection of its own."""
    script = live.script = Poisoned(response, closes=True)
    with live.connect() as client:
        client.send(request("GET", "/p/mallory", f"x-api-key: {KEYS['mallory']}"))
        client.read_head()
        client.wait_closed()
        assert b"ok" in client.buffer
        assert not client.buffer.endswith(b"0\r\n\r\n")
    assert_untouched(live, script)


def test_an_honest_connection_serves_the_next_caller(live: LiveProxy) -> None:
    """The counterpart: without poison both callers share one connection to the provider."""
    script = live.script = Poisoned(TWO)
    assert ask(live, "mallory").body == b"ok"
    assert ask(live, "bob").body == b"trick"
    assert script.served == [(0, b"/mallory"), (0, b"/bob")]
