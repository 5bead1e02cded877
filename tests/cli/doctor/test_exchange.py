"""One request over a real socket: what is noted of it, whatever answers."""

from __future__ import annotations

import contextlib
import gzip
import socket
import ssl
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from llmproxy.cli.doctor import exchange as module
from llmproxy.cli.doctor.exchange import End, Exchange, Seen, Trust, protocol
from llmproxy.cli.doctor.target import Target, target
from tests.support.programs import free_port
from tests.support.scripts import LAST, SSE, Turn, event
from tests.support.sockets import Provider, Script, Wire, chunked
from tests.support.tls import Authority

PLAIN = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\n"
LINES = b"HTTP/1.1 200 OK\r\nContent-Type: application/x-ndjson\r\nContent-Length: 8\r\n\r\n"


@contextlib.contextmanager
def asked(script: Script, *, timeout_s: float = 20.0) -> Iterator[Exchange]:
    """An exchange with a provider that follows a script."""
    with Provider(script) as provider:
        there = target(f"{provider.url}/sse")
        with Exchange(there, there.request("gzip"), trust=Trust(), timeout_s=timeout_s) as exchange:
            yield exchange


def replying(*raw: bytes, reset: bool = False) -> Script:
    """Send these bytes in response to a request, then close the connection."""

    def script(wire: Wire) -> None:
        wire.read_request()
        wire.send(*raw)
        if reset:
            wire.reset()

    return script


def seen_of(*raw: bytes, reset: bool = False) -> Seen:
    """What is seen of these bytes."""
    with asked(replying(*raw, reset=reset)) as exchange:
        return exchange.read()


def test_each_event_has_its_own_time() -> None:
    """It is noted when it came, and not when the next one did."""
    turn, events = Turn(), [event(number) for number in range(3)]

    def script(wire: Wire) -> None:
        wire.read_request()
        wire.send(SSE)
        for one in events:
            turn.take()
            wire.send(chunked(one))
        wire.send(LAST)

    with asked(script) as exchange:
        for number in range(3):
            before = time.monotonic()
            turn.give()
            exchange.read(lambda seen, count=number: len(seen.events) > count)  # type: ignore[misc]  # of a lambda
            took = time.monotonic() - before
            seen = exchange.seen
            assert len(seen.events) == number + 1
            assert seen.end_s - seen.events[-1].at <= took
        seen = exchange.read()
    times = [one.at for one in seen.events]
    assert times == sorted(times)
    assert [one.at for one in seen.reads] == times
    assert seen.size == sum(map(len, events))
    assert (seen.end, seen.framing, seen.status, seen.minor) == (End.WHOLE, "chunked", 200, 1)
    assert seen.connect_s is not None
    assert seen.head_s is not None
    assert 0 <= seen.head_s <= times[0]
    assert (seen.tls, seen.tls_s, seen.problem) == (None, None, None)


@pytest.mark.parametrize(
    ("raw", "reset", "end", "framing"),
    [
        pytest.param(SSE + chunked(event(0)) + LAST, False, End.WHOLE, "chunked", id="chunked"),
        pytest.param(SSE + chunked(event(0)), False, End.CUT, "chunked", id="no last chunk"),
        pytest.param(SSE + chunked(event(0))[:-3], False, End.CUT, "chunked", id="half a chunk"),
        pytest.param(SSE + chunked(event(0)), True, End.RESET, "chunked", id="reset"),
        pytest.param(LINES + b'{"n":0}\n', False, End.WHOLE, "length", id="length"),
        pytest.param(LINES + b'{"n', False, End.CUT, "length", id="short"),
        pytest.param(PLAIN + b"\r\n" + event(0), False, End.CLOSED, "close", id="no framing"),
        pytest.param(PLAIN + b"\r\n" + event(0), True, End.RESET, "close", id="no framing, reset"),
        pytest.param(
            SSE + chunked(event(0)) + b"zz\r\n", False, End.MALFORMED, "chunked", id="no size"
        ),
    ],
)
def test_how_a_body_ends(raw: bytes, reset: bool, end: End, framing: str) -> None:
    """What came before is kept, and a break is never taken for an end."""
    seen = seen_of(raw, reset=reset)
    assert (seen.end, seen.framing, seen.problem) == (end, framing, None)


def test_a_response_in_http_1_0() -> None:
    """It has its number."""
    seen = seen_of(PLAIN.replace(b"HTTP/1.1", b"HTTP/1.0") + b"\r\n" + event(0))
    assert (seen.minor, seen.end, len(seen.events)) == (0, End.CLOSED, 1)


def test_interim_responses_are_passed_over() -> None:
    """The response is the one behind them."""
    seen = seen_of(b"HTTP/1.1 103 Early Hints\r\nLink: x\r\n\r\n" + LINES + b'{"n":0}\n')
    assert (seen.status, seen.end, len(seen.events)) == (200, End.WHOLE, 1)
    assert seen.field("link") is None


def test_compressed_events_are_told_apart() -> None:
    """They are inflated as they come; the reads have the size that they had on the way."""
    packed = gzip.compress(event(0) + event(1))
    head = SSE.replace(b"\r\n\r\n", b"\r\nContent-Encoding: gzip\r\n\r\n")
    seen = seen_of(head + chunked(packed) + LAST)
    assert (seen.coding, len(seen.events), seen.size) == ("gzip", 2, len(packed))
    broken = seen_of(head + chunked(b"no gzip at all") + LAST)
    assert (broken.end, broken.events) == (End.WHOLE, [])
    unknown = seen_of(head.replace(b"gzip", b"br") + chunked(packed) + LAST)
    assert (unknown.coding, unknown.events) == ("br", [])


def test_the_last_event_counts_without_its_blank_line() -> None:
    """Some providers leave it out."""
    seen = seen_of(SSE + chunked(event(0) + event(1)[:-1]) + LAST)
    assert len(seen.events) == 2


def test_the_beginning_of_a_body_is_kept() -> None:
    """So that an error's words can be shown; no more of it is."""
    body = b'{"error": {"message": "' + b"x" * 5000
    seen = seen_of(b"HTTP/1.1 500 No\r\nContent-Length: %d\r\n\r\n" % len(body) + body)
    assert seen.excerpt == body[: len(seen.excerpt)]
    assert 1000 < len(seen.excerpt) < 5000


@pytest.mark.parametrize(
    ("raw", "problem"),
    [
        (b"", "the connection was closed before a response"),
        (b"HTTP/1.1 200", "the connection was closed before a response"),
        (b"SSH-2.0-x\r\n", "what answers is no HTTP/1.1 server: the status line is malformed"),
        (
            b"HTTP/1.1 200 OK\r\nbad line\r\n\r\n",
            "what answers is no HTTP/1.1 server: a header field's name is malformed",
        ),
        (
            b"HTTP/1.1 100 Continue\r\n\r\n" * 20,
            "what answers is no HTTP/1.1 server: more than 10 interim responses",
        ),
        (
            b"HTTP/1.1 200 OK\r\na: " + b"x" * 70_000,
            "what answers is no HTTP/1.1 server: a head longer than 65536 bytes",
        ),
    ],
)
def test_what_is_no_response(raw: bytes, problem: str) -> None:
    """It is said in words."""
    seen = seen_of(raw)
    assert (seen.status, seen.problem) == (None, problem)


def test_a_reset_before_a_response() -> None:
    """It is told from a close."""
    seen = seen_of(b"HTTP", reset=True)
    assert seen.problem == "the connection was reset before a response"


def test_nobody_listens() -> None:
    """Nothing is raised."""
    there = target(f"http://127.0.0.1:{free_port()}/")
    with Exchange(there, there.request("gzip"), trust=Trust(), timeout_s=20) as exchange:
        seen = exchange.read()
    assert seen.problem == "the connection was refused: nothing listens there"
    assert seen.connect_s is None


def test_a_name_that_is_unknown(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is told from a host that is away."""

    def fail(*_: object, **__: object) -> None:
        raise socket.gaierror(-2, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", fail)
    there = target("http://nowhere.invalid/")
    with Exchange(there, there.request("gzip"), trust=Trust(), timeout_s=20) as exchange:
        assert exchange.read().problem == "the host's name is not known"


@pytest.mark.parametrize("scheme", ["http", "https"])
def test_the_time_is_bounded_where_nothing_comes(scheme: str) -> None:
    """A listener that says nothing, to a request or to a handshake, holds nobody up."""

    def script(wire: Wire) -> None:
        wire.wait_closed()

    with Provider(script) as provider:
        there = target(f"{scheme}://127.0.0.1:{provider.port}/")
        with Exchange(there, there.request("gzip"), trust=Trust(), timeout_s=0.2) as exchange:
            seen = exchange.read()
    assert seen.problem == (
        "no response within 0.2 s" if scheme == "http" else "no connection in time"
    )


def test_the_time_is_bounded_where_nobody_accepts() -> None:
    """A host that drops what comes is not waited for."""
    with contextlib.ExitStack() as stack:
        listener = stack.enter_context(socket.socket())
        listener.bind(("127.0.0.1", 0))
        listener.listen(0)
        for _ in range(3):  # the queue has room for one, and the kernel drops what is too much
            waiting = stack.enter_context(socket.socket())
            waiting.setblocking(False)
            waiting.connect_ex(listener.getsockname())
        there = target(f"http://127.0.0.1:{listener.getsockname()[1]}/")
        with Exchange(there, there.request("gzip"), trust=Trust(), timeout_s=0.3) as exchange:
            seen = exchange.read()
    assert (seen.problem, seen.connect_s) == ("no connection in time", None)


def test_the_time_is_bounded_where_bytes_trickle() -> None:
    """Each byte is in time, and the whole is not."""
    over = Turn()

    def script(wire: Wire) -> None:
        wire.read_request()
        wire.send(SSE)
        while True:
            wire.send(chunked(b":"))
            time.sleep(0.01)

    with asked(script, timeout_s=0.3) as exchange:
        seen = exchange.read()
    over.give()
    assert (seen.end, seen.problem) == (End.OPEN, None)
    assert seen.end_s < 5


def test_the_memory_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """A stream without end is left when enough has come."""
    monkeypatch.setattr(module, "MOST_NOTES", 500)

    def script(wire: Wire) -> None:
        wire.read_request()
        wire.send(SSE)
        while True:
            wire.send(chunked(event(0) * 100))

    with asked(script) as exchange:
        seen = exchange.read()
    assert seen.end is End.OPEN
    assert 500 <= len(seen.events) < 500 + 65536 / len(event(0))


# --- TLS ------------------------------------------------------------------------------------------


def over_tls(
    context: ssl.SSLContext, trust: Trust, host: str = "localhost"
) -> tuple[Seen, Target, Callable[[], str | None]]:
    """What is seen of a response over TLS, and what asks for the protocol."""
    with Provider(replying(LINES, b'{"n":0}\n'), tls=context) as provider:
        there = target(f"https://{host}:{provider.port}/")
        with Exchange(there, there.request("gzip"), trust=trust, timeout_s=20) as exchange:
            seen = exchange.read()
        chosen = protocol(there, trust=trust, timeout_s=20) if seen.problem is None else None
        provider.errors.clear()  # a client that does not trust it ends the handshake
    return seen, there, lambda: chosen


def test_a_handshake(tmp_path: Path) -> None:
    """Its version and its time are noted, and what the server would choose."""
    authority = Authority(tmp_path)
    context = authority.server()
    context.set_alpn_protocols(["h2", "http/1.1"])
    seen, _, chosen = over_tls(context, Trust(str(authority.ca_path)))
    assert (seen.status, seen.tls, seen.problem) == (200, "TLSv1.3", None)
    assert seen.tls_s is not None
    assert chosen() == "h2"


@pytest.mark.parametrize(("notify", "end"), [(True, End.CLOSED), (False, End.CUT)])
def test_an_end_over_tls(tmp_path: Path, notify: bool, end: End) -> None:
    """A body that ends with its connection has ended only if TLS says so."""
    authority = Authority(tmp_path)

    def script(wire: Wire) -> None:
        wire.read_request()
        wire.send(PLAIN + b"\r\n" + event(0))
        if notify:
            wire.close_notify()

    with Provider(script, tls=authority.server()) as provider:
        there = target(f"{provider.url}/")
        trust = Trust(str(authority.ca_path))
        with Exchange(there, there.request("gzip"), trust=trust, timeout_s=20) as exchange:
            seen = exchange.read()
    assert (seen.framing, len(seen.events), seen.end) == ("close", 1, end)


@pytest.mark.parametrize(
    ("names", "days", "trusted", "problem"),
    [
        (
            ("localhost",),
            1,
            False,
            "TLS: the certificate's issuer is not known here; the chain may ",
        ),
        (("localhost",), -1, True, "TLS: the certificate has expired"),
        (("other.example",), 1, True, "TLS: the certificate is for another host name"),
    ],
)
def test_a_certificate_that_is_not_believed(
    tmp_path: Path, names: tuple[str, ...], days: int, trusted: bool, problem: str
) -> None:
    """The reason is said in words, and no request is sent."""
    authority = Authority(tmp_path)
    end = datetime.now(UTC) + timedelta(days=days)
    trust = Trust(str(authority.ca_path) if trusted else None)
    seen, _, _ = over_tls(authority.server(*names, not_after=end), trust)
    assert (seen.problem or "").startswith(problem)
    assert seen.status is None


def test_tls_where_there_is_none() -> None:
    """A port that speaks HTTP in the clear is named as that."""

    def script(wire: Wire) -> None:
        wire.receive()  # a handshake
        wire.send(b"HTTP/1.1 400 Bad Request\r\n\r\n")
        wire.wait_closed()

    with Provider(script) as provider:
        there = target(f"https://127.0.0.1:{provider.port}/")
        with Exchange(there, there.request("gzip"), trust=Trust(), timeout_s=20) as exchange:
            seen = exchange.read()
    assert seen.problem is not None
    assert seen.problem.endswith("(does it speak TLS at all?)")
