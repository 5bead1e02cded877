"""Which connection the next request goes on, and which response it gets."""

from __future__ import annotations

import pytest
from pytest_twisted import ensureDeferred

from tests.support.sockets import Provider, Wire
from tests.traps.calls import MINE, OK, TRICK, FirstThenSecond, Outcome, Step, outcome
from tests.traps.parts import Sender, Upstream
from tests.traps.waits import until

PLAIN = b"HTTP/1.1 200 OK\r\n"
CHUNKED = PLAIN + b"Transfer-Encoding: chunked\r\n\r\n2\r\nok\r\n0\r\n\r\n"


async def first_and_second(
    sender: Sender, seconds: float, method: str = "GET"
) -> tuple[Outcome, Outcome]:
    """Send a request to ``/first``, and then one to ``/second``."""
    first = await outcome(sender.send(method, "/first", []), seconds)
    return first, await outcome(sender.send("GET", "/second", []), seconds)


@pytest.mark.trap("U1")
@pytest.mark.parametrize(
    ("method", "first"),
    [
        ("GET", OK + TRICK),
        ("GET", OK + b"\n"),
        ("GET", CHUNKED + TRICK),
        ("HEAD", OK),
        ("HEAD", PLAIN + b"Content-Length: 9\r\n\r\n" + TRICK),
        ("GET", b"HTTP/1.1 204 None\r\n\r\n" + TRICK),
        ("GET", b"HTTP/1.1 304 Same\r\nContent-Length: 2\r\n\r\nok"),
        ("GET", PLAIN + b"Content-Length: 0\r\n\r\n" + TRICK),
    ],
    ids=[
        "behind a length",
        "a line end behind it",
        "behind the last chunk",
        "HEAD with a body",
        "HEAD with a response behind it",
        "204 with a response behind it",
        "304 with a body",
        "behind an empty body",
    ],
)
@ensureDeferred
async def test_a_connection_with_bytes_behind_its_response_is_not_used_again(
    upstream: Upstream, patience: float, method: str, first: bytes
) -> None:
    """The next request goes on a connection of its own and gets its own response."""
    script = FirstThenSecond(first)
    with Provider(script) as provider:
        poisoned, second = await first_and_second(upstream(provider.url), patience, method)
        accepted = provider.accepted
    assert poisoned.error is None
    assert second.data == b"mine"
    assert (accepted, script.targets) == (2, [b"/first", b"/second"])


@pytest.mark.trap("U1")
@ensureDeferred
async def test_tenants_do_not_share_a_connection(upstream: Upstream, patience: float) -> None:
    """A connection that one credential went over serves no other."""
    script = FirstThenSecond(OK)
    fields = {name: [(b"authorization", name.encode())] for name in "ab"}
    with Provider(script) as provider:
        sender = upstream(provider.url)
        await outcome(sender.send("GET", "/first", fields["a"], tenant="a"), patience)
        second = await outcome(sender.send("GET", "/second", fields["b"], tenant="b"), patience)
    assert second.data == b"mine"


@pytest.mark.trap("U2")
@pytest.mark.parametrize(
    "head",
    [
        b"HTTP/1.1 200 OK\r\nConnection: Close\r\n",
        b"HTTP/1.1 200 OK\r\nConnection: x, CLOSE\r\n",
        b"HTTP/1.1 200 OK\r\nConnection: keep-alive\r\nConnection: close\r\n",
        b"HTTP/1.0 200 OK\r\n",
    ],
    ids=["capital", "list", "second line", "1.0"],
)
@ensureDeferred
async def test_a_connection_that_the_provider_closes_is_not_used_again(
    upstream: Upstream, patience: float, head: bytes
) -> None:
    """``Connection`` is a list without case, and HTTP/1.0 without it means close."""
    script = FirstThenSecond(head + b"Content-Length: 2\r\n\r\nok")
    with Provider(script) as provider:
        first, second = await first_and_second(upstream(provider.url), patience)
        accepted = provider.accepted
    assert (first.data, first.whole) == (b"ok", True)
    assert (second.data, accepted) == (b"mine", 2)


@pytest.mark.trap("U15")
@pytest.mark.parametrize(
    "framing",
    [
        b"Content-Length: 2\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nok\r\n0\r\n\r\n",
        b"Transfer-Encoding: chunked\r\nContent-Length: 20\r\n\r\n2\r\nok\r\n0\r\n\r\n",
        b"Content-Length: 2\r\nContent-Length: 2\r\n\r\nok",
        b"Content-Length: 2\r\nContent-Length: 7\r\n\r\nok",
        b"Content-Length: 2, 2\r\n\r\nok",
    ],
    ids=["length and chunked", "chunked and length", "twice", "two lengths", "a list"],
)
@ensureDeferred
async def test_a_response_that_is_framed_twice_is_refused(
    upstream: Upstream, patience: float, framing: bytes
) -> None:
    """It is a bad upstream, and its connection serves no other request."""
    script = FirstThenSecond(PLAIN + framing)
    with Provider(script) as provider:
        first, second = await first_and_second(upstream(provider.url), patience)
    assert first.refused
    assert second.data == b"mine"


BURST = 5


@pytest.mark.trap("U19")
@ensureDeferred
async def test_as_many_connections_are_kept_as_the_pool_is_wide(
    upstream: Upstream, patience: float
) -> None:
    """A burst of requests leaves its connections behind, and the next burst goes on them."""
    together = Step()

    def script(wire: Wire) -> None:
        while True:
            wire.read_request()
            together.take()
            wire.send(OK)

    with Provider(script) as provider:
        sender = upstream(provider.url)
        for _ in range(2):
            calls = [sender.send("GET", "/x", []) for _ in range(BURST)]
            assert await until(lambda: provider.accepted >= BURST, patience)
            together.give()
            for call in calls:
                assert (await outcome(call, patience)).data == b"ok"
        accepted = provider.accepted
    assert accepted == BURST


@pytest.mark.trap("U19")
@pytest.mark.parametrize("hint", [b"timeout=1", b"max=9, timeout=1", b"Timeout = 0"])
@ensureDeferred
async def test_the_idle_limit_of_a_provider_is_kept_to(
    upstream: Upstream, patience: float, hint: bytes
) -> None:
    """A connection that the provider is about to close is not used for one more request."""
    response = PLAIN + b"Keep-Alive: %b\r\nContent-Length: 2\r\n\r\nok" % hint
    script = FirstThenSecond(response)
    with Provider(script) as provider:
        _, second = await first_and_second(upstream(provider.url), patience)
    assert second.data == b"mine"


@pytest.mark.trap("U19")
@ensureDeferred
async def test_an_idle_connection_is_closed_in_the_time_that_is_configured(
    upstream: Upstream, patience: float
) -> None:
    """``pool_idle`` ends it, long before the four minutes of Twisted's pool."""
    closed = Step()

    def script(wire: Wire) -> None:
        wire.read_request()
        wire.send(MINE)
        wire.wait_closed()
        closed.give()

    with Provider(script) as provider:
        sender = upstream(provider.url, pool_idle=0.1)
        assert (await outcome(sender.send("GET", "/x", []), patience)).data == b"mine"
        assert await closed.happens(patience), "the provider's connection is kept"
