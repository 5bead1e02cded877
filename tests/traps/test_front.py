"""What the listener's HTTP does with a Resource's response, and what it must not add."""

from __future__ import annotations

from typing import Any

import pytest
from pytest_twisted import ensureDeferred
from twisted.internet import reactor
from twisted.internet.task import deferLater
from twisted.logger import LogEvent, formatEvent, globalLogPublisher
from twisted.python.failure import Failure
from twisted.web import http

from tests.conftest import LoggedFailures
from tests.support.sockets import Provider, connect, request
from tests.support.tls import Authority
from tests.traps.calls import Responding, Step
from tests.traps.endings import Ending, read_ending
from tests.traps.parts import Ports
from tests.traps.resources import Saying
from tests.traps.waits import thread

Head = tuple[bytes, list[tuple[bytes, bytes]]]


def ask(port: int, seconds: float, *requests: bytes) -> tuple[Head, Ending]:
    """Send requests in one piece; return the first head and all that follows."""
    with connect(port) as wire:
        wire.send(*requests)
        return wire.read_head(), read_ending(wire, seconds)


GET = request("GET", "/x")


@ensureDeferred
async def test_a_response_is_served(front: Ports) -> None:
    """A Resource's response reaches a client, whose connection is used again."""

    def say(request: Any) -> None:
        request.setHeader(b"content-length", b"2")
        request.write(b"ok")
        request.finish()

    def twice(port: int) -> list[bytes]:
        bodies = []
        with connect(port) as wire:
            for _ in range(2):
                wire.send(GET)
                bodies.append(wire.read_body(wire.read_head()[1]))
        return bodies

    assert await thread(twice, front(Saying(say))) == [b"ok", b"ok"]


@pytest.mark.trap("C10")
@pytest.mark.parametrize("body", [b"short", b"much too long"], ids=["short", "long"])
@ensureDeferred
async def test_a_body_that_does_not_keep_its_length_is_the_last_on_its_connection(
    front: Ports, patience: float, body: bytes
) -> None:
    """Nothing follows a body of the wrong length that could be read as part of it."""

    def say(request: Any) -> None:
        request.setHeader(b"content-length", b"10")
        request.write(body)
        request.finish()

    (first, _), ending = await thread(ask, front(Saying(say)), patience, GET, GET)
    assert first == b"HTTP/1.1 200 OK"
    assert ending.raw == body
    assert ending.how in ("fin", "reset")


@pytest.mark.trap("C11")
@pytest.mark.parametrize("late", [False, True], ids=["rendering", "a turn later"])
@ensureDeferred
async def test_an_exception_in_a_stream_breaks_it_off(
    front: Ports, patience: float, logged_failures: LoggedFailures, late: bool
) -> None:
    """The client gets what was written and no end: no page, no last chunk."""

    def explode(request: Any) -> None:
        request.write(b"data: 1\n\n")
        raise ZeroDivisionError("in the middle of a stream")

    def explode_later(request: Any) -> None:
        later = deferLater(reactor, 0, explode, request)
        later.addErrback(request.processingFailed)
        later.addErrback(lambda _: None)

    port = front(Saying(explode_later if late else explode))
    (first, _), ending = await thread(ask, port, patience, GET)
    assert len(logged_failures.flush(ZeroDivisionError)) == 1
    assert first == b"HTTP/1.1 200 OK"
    assert ending.chunks() == (b"data: 1\n\n", False)
    assert ending.how == "fin"


class Idler:
    """A producer that has nothing to do."""

    def pauseProducing(self) -> None:
        """Do nothing."""

    def resumeProducing(self) -> None:
        """Do nothing."""

    def stopProducing(self) -> None:
        """Do nothing."""


@pytest.mark.trap("C12")
@ensureDeferred
async def test_a_response_may_be_ended_after_its_client_has_left(
    front: Ports, patience: float
) -> None:
    """Writing, unregistering and finishing behind the disconnect do nothing, and raise nothing."""
    raised: list[str] = []
    tried = Step()

    def go_on(_: Failure, request: Any) -> None:
        for step in (lambda: request.write(b"2"), request.unregisterProducer, request.finish):
            try:
                step()
            except Exception as error:
                raised.append(type(error).__name__)
        tried.give()

    def say(request: Any) -> None:
        request.notifyFinish().addErrback(go_on, request)
        request.registerProducer(Idler(), True)
        request.write(b"1")

    def leave(port: int) -> None:
        wire = connect(port)
        wire.send(GET)
        wire.read_head()
        wire.reset()

    await thread(leave, front(Saying(say)))
    assert await tried.happens(patience)
    assert raised == []


@pytest.mark.trap("C12")
@ensureDeferred
async def test_finishing_unregisters_the_producer(
    front: Ports, patience: float, logged_failures: LoggedFailures
) -> None:
    """A response that ends with its producer registered is no failure; the next one is served."""

    def say(request: Any) -> None:
        request.registerProducer(Idler(), True)
        request.write(b"1")
        request.finish()

    def twice(port: int) -> list[bytes]:
        with connect(port) as wire:
            wire.sock.settimeout(patience)
            bodies = []
            for _ in range(2):
                wire.send(GET)
                wire.read_head()
                bodies.append(wire.read_chunks())
        return bodies

    assert await thread(twice, front(Saying(say))) == [b"1", b"1"]
    assert logged_failures.flush() == []


@pytest.mark.trap("C15")
@pytest.mark.parametrize("whole_proxy", [False, True], ids=["site", "proxy"])
@ensureDeferred
async def test_http_2_is_not_offered(
    front: Ports,
    proxy: Ports,
    authority: Authority,
    monkeypatch: pytest.MonkeyPatch,
    whole_proxy: bool,
) -> None:
    """A client that would rather speak h2 agrees on http/1.1, also where Twisted could speak h2."""
    monkeypatch.setattr(http, "H2_ENABLED", True)
    context = authority.client()
    context.set_alpn_protocols(["h2", "http/1.1"])

    def negotiate(port: int) -> str | None:
        with connect(port, tls=context) as wire:
            chosen: str | None = wire.sock.selected_alpn_protocol()  # type: ignore[attr-defined]  # not in the stubs
            return chosen

    if whole_proxy:
        port = proxy("http://127.0.0.1:9", tls=True)
    else:
        port = front(Saying(lambda request: request.finish()), tls=True)
    assert await thread(negotiate, port) == "http/1.1"


@pytest.fixture
def log_events() -> Any:
    """Everything that is logged during the test."""
    events: list[LogEvent] = []
    globalLogPublisher.addObserver(events.append)  # type: ignore[arg-type]  # a callable is one
    yield events
    globalLogPublisher.removeObserver(events.append)  # type: ignore[arg-type]  # see above


@pytest.mark.trap("C18")
@ensureDeferred
async def test_the_log_holds_no_query_and_no_key(proxy: Ports, log_events: list[LogEvent]) -> None:
    """One request is one access line, and what may be a secret in it stands nowhere in the log."""

    def call(port: int) -> None:
        with connect(port) as wire:
            fields = ("x-api-key: sk-header", "authorization: Bearer sk-bearer", "referer: sk-page")
            wire.send(request("GET", "/p/v1/x?key=sk-query&n=1", *fields))
            wire.read_body(wire.read_head()[1])

    with Provider(Responding()) as provider:
        await thread(call, proxy(provider.url))
    texts = [f"{formatEvent(event)} {event}" for event in log_events]
    assert [text for text in texts if "sk-" in text or "n=1" in text] == []
    assert len([text for text in texts if "/p/v1/x" in text]) == 1


@pytest.mark.trap("C18")
@ensureDeferred
async def test_the_site_writes_no_access_line(
    front: Ports, patience: float, log_events: list[LogEvent]
) -> None:
    """A request that a Resource serves leaves no trace of its target in the log."""
    port = front(Saying(lambda request: request.finish()))
    await thread(ask, port, patience, request("GET", "/x?key=sk-query", "Connection: close"))
    assert [event for event in log_events if "sk-query" in f"{formatEvent(event)} {event}"] == []


def names(head: Head) -> set[bytes]:
    """Return the names of a head's fields."""
    return {name for name, _ in head[1]}


@pytest.mark.trap("C19")
@ensureDeferred
async def test_a_resource_s_response_gets_no_server_and_no_type(
    front: Ports, patience: float
) -> None:
    """A field that the Resource did not set is not added."""

    def say(request: Any) -> None:
        request.write(b"ok")
        request.finish()

    closing = request("GET", "/x", "Connection: close")
    head, _ = await thread(ask, front(Saying(say)), patience, closing)
    assert names(head).isdisjoint((b"server", b"content-type"))


@pytest.mark.trap("C19")
@ensureDeferred
async def test_a_provider_s_response_gets_no_server_and_no_type(
    proxy: Ports, patience: float
) -> None:
    """A response without a ``Server`` and a type keeps having none."""
    closing = request("GET", "/p/x", "Connection: close")
    with Provider(Responding()) as provider:
        head, ending = await thread(ask, proxy(provider.url), patience, closing)
    assert names(head).isdisjoint((b"server", b"content-type"))
    assert ending.raw == b"ok"


@pytest.mark.trap("C19")
@pytest.mark.parametrize(
    "sent",
    [
        request("GET", "/nowhere", "Connection: close"),
        request("BREW", "/p/x", "Connection: close"),
        request("GET", "/p/x", "Connection: close"),
        b"GET /p/x\r\n\r\n",
    ],
    ids=["no route", "method", "unreachable", "not HTTP"],
)
@ensureDeferred
async def test_an_error_is_json_and_names_no_server(
    proxy: Ports, patience: float, sent: bytes
) -> None:
    """A request is refused in JSON, without a page and without the server's name."""
    with Provider(Responding()) as gone:
        pass
    head, ending = await thread(ask, proxy(gone.url), patience, sent)
    assert head[0].split(b" ")[1] in (b"400", b"404", b"405", b"502")
    assert (b"content-type", b"application/json") in head[1]
    assert b"server" not in names(head)
    assert b"<html" not in ending.raw


@pytest.mark.trap("C19")
@ensureDeferred
async def test_a_failing_resource_gives_no_page(
    front: Ports, patience: float, logged_failures: LoggedFailures
) -> None:
    """An exception before the first byte is a 500 without HTML."""

    def explode(request: Any) -> None:
        raise ZeroDivisionError("before the first byte")

    closing = request("GET", "/x", "Connection: close")
    head, ending = await thread(ask, front(Saying(explode)), patience, closing)
    assert len(logged_failures.flush(ZeroDivisionError)) == 1
    assert head[0].startswith(b"HTTP/1.1 500")
    assert names(head).isdisjoint((b"server", b"content-type"))
    assert b"<" not in ending.raw
