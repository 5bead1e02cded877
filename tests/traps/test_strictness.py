"""Requests that are not quite HTTP are refused with a reason, and reach no Resource."""

from __future__ import annotations

import pytest
from pytest_twisted import ensureDeferred

from tests.conftest import LoggedFailures
from tests.support.sockets import WAIT, Provider, connect, request
from tests.traps.asking import ask, read_response
from tests.traps.calls import Responding
from tests.traps.parts import Ports
from tests.traps.resources import Counting
from tests.traps.waits import thread

GET = request("GET", "/x")
NEXT = request("GET", "/next")


def head(*lines: bytes) -> bytes:
    """Return a request's head with these lines."""
    return b"\r\n".join([*lines, b"", b""])


@pytest.mark.parametrize(
    "sent",
    [
        GET,
        request("GET", "/x", version="1.0"),
        head(b"GET /x HTTP/1.0"),
        request("GET", "/x?q=%7F", "X-A: \x80\xff", host="[::1]:80"),
        request("POST", "/x", "Content_Type: a", body=b"ok"),
    ],
    ids=["1.1", "1.0", "1.0 without Host", "odd, and sound", "a body"],
)
@ensureDeferred
async def test_a_sound_request_is_served(front: Ports, sent: bytes) -> None:
    """Whatever HTTP allows reaches the Resource."""
    counting = Counting()
    got = await thread(ask, front(counting), WAIT, sent)
    assert (got.status, counting.rendered) == (200, 1)


async def assert_refused(front: Ports, patience: float, sent: bytes) -> None:
    """Check that bytes are refused, that the connection ends, and that nothing was served on it."""
    counting = Counting()
    got = await thread(ask, front(counting), patience, sent, NEXT)
    assert (got.status, counting.rendered) == (400, 0)
    assert got.message
    assert got.how == "fin"


# -- C1 -------------------------------------------------------------------------------------


@pytest.mark.trap("C1")
@pytest.mark.parametrize(
    "hosts",
    [[], [b"a", b"a"], [b"a", b"b"], [b"a b"], [b"me@a"], [b"a/x"], [b"a:b"], [b"[::1"], [b"a, b"]],
    ids=["none", "twice", "two", "blank", "user", "path", "port", "bracket", "list"],
)
@ensureDeferred
async def test_there_is_one_host_that_is_one(
    front: Ports, patience: float, hosts: list[bytes]
) -> None:
    """A request with no Host, two, or one that is no host is refused."""
    lines = [b"Host: " + host for host in hosts]
    await assert_refused(front, patience, head(b"GET /x HTTP/1.1", *lines))


@pytest.mark.trap("C1")
@pytest.mark.parametrize("byte", [0x7F, 0x80, 0x9F, 0xA0, 0xB0], ids=hex)
@ensureDeferred
async def test_a_target_is_printable_ascii(front: Ports, patience: float, byte: int) -> None:
    """DEL and bytes above ASCII belong into no target."""
    first = b"GET /x%c HTTP/1.1" % byte
    await assert_refused(front, patience, head(first, b"Host: proxy"))


@pytest.mark.trap("C1")
@pytest.mark.parametrize(
    "target",
    ["foo", "p/x", "?x=1", "*", "http://other/p/x", "http:///p/x", "http://[::1/p/x"],
    ids=["word", "path", "query", "asterisk", "other host", "empty host", "broken host"],
)
@ensureDeferred
async def test_a_target_is_a_path(proxy: Ports, patience: float, target: str) -> None:
    """A target that is no path, or whose host is none, is refused.

    One that names another host is a request for that host (a forward request), which needs a key.
    """
    with Provider(Responding()) as provider:
        got = await thread(ask, proxy(provider.url), patience, request("GET", target))
    assert (got.status, provider.accepted) == (407 if "other" in target else 400, 0)
    assert got.message


# -- C2 -------------------------------------------------------------------------------------

POST = b"POST /x HTTP/1.1"
HOST = b"Host: proxy"
CHUNKED = b"Transfer-Encoding: chunked"


@pytest.mark.trap("C2")
@pytest.mark.parametrize(
    "sent",
    [
        head(POST, HOST, b"Transfer-Encoding: identity", b"Content-Length: 2") + b"ok",
        head(POST, HOST, b"Content-Length: 2", b"Transfer-Encoding: identity") + b"ok",
        head(b"POST /x HTTP/1.0", HOST, CHUNKED) + b"2\r\nok\r\n0\r\n\r\n",
        head(POST, HOST, b"Transfer-Encoding:", b" chunked") + b"2\r\nok\r\n0\r\n\r\n",
    ],
    ids=["identity and length", "length and identity", "chunked in 1.0", "folded coding"],
)
@ensureDeferred
async def test_framing_that_two_readers_could_read_in_two_ways_is_refused(
    front: Ports, patience: float, sent: bytes
) -> None:
    """Where a body ends is not guessed, and nothing that follows is served."""
    await assert_refused(front, patience, sent)


@pytest.mark.trap("C2")
@pytest.mark.parametrize(
    "lines",
    [[b"X-A: 1", b" 2"], [b"X-A: 1", b"\t2"], [b"X-A: a\x01b"], [b"X-A: a\x0bb"], [b"X-A: a\x7fb"]],
    ids=["folded by a space", "folded by a tab", "SOH", "VT", "DEL"],
)
@ensureDeferred
async def test_a_field_is_one_line_of_text(
    front: Ports, patience: float, lines: list[bytes]
) -> None:
    """Folded lines are not joined, and control characters are not forwarded."""
    await assert_refused(front, patience, head(b"GET /x HTTP/1.1", HOST, *lines))


@pytest.mark.trap("C2")
@pytest.mark.parametrize(
    "field",
    [
        "Content_Length: 5",
        "Transfer_Encoding: chunked",
        "Keep_Alive: timeout=5",
        "Proxy_Authorization: x",
        "X_Forwarded_For: 10.0.0.1",
        "x-forwarded_proto: https",
        "x_api_key: sk-1",
        "x_llmproxy_key: sk-1",
    ],
)
@ensureDeferred
async def test_no_field_is_disguised_as_one_that_the_proxy_owns(
    proxy: Ports, patience: float, field: str
) -> None:
    """A provider behind a gateway that takes ``_`` for ``-`` would read it as the real one."""
    with Provider(Responding()) as provider:
        got = await thread(ask, proxy(provider.url), patience, request("GET", "/p/x", field))
    assert (got.status, provider.accepted) == (400, 0)
    assert got.message


# -- C3 -------------------------------------------------------------------------------------


@pytest.mark.trap("C3")
@ensureDeferred
async def test_an_endless_length_is_refused(
    front: Ports, patience: float, logged_failures: LoggedFailures
) -> None:
    """A ``Content-Length`` of 5,000 digits is a 400, and no failure of the program."""
    counting = Counting()
    sent = request("POST", "/x", "Content-Length: " + "9" * 5000)
    got = await thread(ask, front(counting), patience, sent)
    failures = logged_failures.flush()
    assert (got.status, counting.rendered) == (400, 0)
    assert got.message
    assert failures == []


# -- C4 -------------------------------------------------------------------------------------


@pytest.mark.trap("C4")
@pytest.mark.parametrize(
    "fields",
    [
        ["Connection: x, close"],
        ["Connection: close, x"],
        ["Connection: keep-alive,close"],
        ["Connection: x", "Connection: close"],
        ["Connection: x", "Connection: y, Close"],
    ],
    ids=["last", "first", "without a blank", "second line", "second line's list"],
)
@ensureDeferred
async def test_close_is_honoured_wherever_it_stands(
    front: Ports, patience: float, fields: list[str]
) -> None:
    """``Connection`` is one list over all its lines: the response is the connection's last."""

    def count_responses(port: int) -> tuple[int, str]:
        with connect(port) as wire:
            wire.send(request("GET", "/x", *fields), NEXT)
            responses = [read_response(wire, patience)]
            if responses[0].how == "open":
                responses.append(read_response(wire, patience))
            return [got.status for got in responses].count(200), responses[-1].how

    assert await thread(count_responses, front(Counting())) == (1, "fin")


# -- C5 -------------------------------------------------------------------------------------


@pytest.mark.trap("C5")
@pytest.mark.parametrize(
    "sent",
    [
        b"nonsense\r\n\r\n",
        head(b"GET /x y HTTP/1.1", HOST),
        request("GET", "/x", "no colon"),
        request("GET", "/x", "bad name: x"),
        request("GET", "/x", "X-A: a\0b"),
        request("POST", "/x", "Content-Length: 1", "Content-Length: 2"),
    ],
    ids=["nonsense", "two targets", "no colon", "bad name", "NUL", "two lengths"],
)
@ensureDeferred
async def test_a_refusal_has_its_reason(front: Ports, patience: float, sent: bytes) -> None:
    """A request that is not HTTP is a 400 with a sentence in JSON, and ends the connection."""
    await assert_refused(front, patience, sent)


LONG = "x" * (64 << 10)


@pytest.mark.trap("C5")
@pytest.mark.parametrize(
    ("sent", "status"),
    [
        (request("GET", "/" + LONG), 414),
        (request("GET", "/x", "X-Long: " + LONG), 431),
        (b"GET /" + LONG.encode(), 414),
    ],
    ids=["target", "field", "line without end"],
)
@ensureDeferred
async def test_a_line_that_is_too_long_is_refused(
    front: Ports, patience: float, sent: bytes, status: int
) -> None:
    """The response says what was too long, and can be read: a clean close comes behind it."""
    counting = Counting()
    got = await thread(ask, front(counting), patience, sent)
    assert (got.status, counting.rendered) == (status, 0)
    assert got.message
    assert got.how == "fin"
