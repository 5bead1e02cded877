"""How a process shuts down: refuse, wait, cut, and say how many."""

from __future__ import annotations

from typing import Any

import pytest
from twisted.internet.task import Clock
from twisted.logger import LogEvent, formatEvent
from twisted.web.server import NOT_DONE_YET

from llmproxy.config import Limits, Timeouts
from llmproxy.ops.drain import Drain
from llmproxy.server.handler import Handler, Router
from llmproxy.server.request import Request
from llmproxy.server.site import Site
from tests.support.fake_transport import ABORTED, FIN, FakeTransport
from tests.support.sockets import request

GET = request("GET", "/")
POST = request("POST", "/", body=b"{}")


class Waits(Handler):
    """Counts what it serves, and answers when the test says so."""

    def __init__(self) -> None:
        super().__init__()
        self.running: dict[Request, None] = {}

    def body_limit(self, request: Request) -> int:
        return 100

    def render(self, request: Request) -> int:
        self.running[request] = None
        request.gone = lambda why: self.running.pop(request)
        return NOT_DONE_YET

    def response(self) -> None:
        """Answer the oldest request."""
        request = next(iter(self.running))
        del self.running[request]
        request.start(200, [(b"content-length", b"0")])
        request.finish()


class DrainedSite:
    """A site with clients, and its drain."""

    def __init__(self, idle: int = 0, busy: int = 0) -> None:
        self.clock = Clock()
        self.resource = Waits()
        self.site = Site(
            Router(self.resource),
            self.clock,
            self.clock.seconds,
            Timeouts(),
            Limits(),
            wall=lambda: 0.0,
        )
        self.transports: list[FakeTransport] = []
        for number in range(idle + busy):
            channel = self.connect()
            if number >= idle:
                channel.dataReceived(GET)
        self.drain = Drain(self.site, self.clock, 30.0)
        self.rested: list[float] = []

    def connect(self) -> Any:
        """Connect a client and return our end."""
        transport = FakeTransport()
        self.transports.append(transport)
        channel = self.site.buildProtocol(None)
        transport.connect(channel)
        return channel

    def begin(self) -> None:
        """Begin to drain."""
        self.drain.begin().addCallback(lambda _: self.rested.append(self.clock.seconds()))

    def pass_time(self, seconds: float) -> None:
        """Turn the clock; a connection that we closed is gone a moment later."""
        for _ in range(int(seconds / 0.5)):
            self.clock.advance(0.5)
            for transport in list(self.transports):
                if transport.count("abort") or transport.count("lose"):
                    self.transports.remove(transport)
                    transport.end(ABORTED if transport.count("abort") else FIN)


def told(logged: list[LogEvent]) -> tuple[int, int]:
    """Return how many the last line says have finished and were cut."""
    assert formatEvent(logged[-1]).startswith("drained: ")
    return logged[-1]["finished"], logged[-1]["cut"]


def test_without_clients_it_is_over_at_once(logged: list[LogEvent]) -> None:
    """There is nothing to wait for, and no timer stays."""
    drained = DrainedSite()
    begun = [drained.drain.begun]
    drained.begin()
    begun.append(drained.drain.begun)

    assert begun == [False, True]
    assert drained.rested == [0.0]
    assert told(logged) == (0, 0)
    assert not drained.clock.getDelayedCalls()


def test_idle_clients_are_sent_away(logged: list[LogEvent]) -> None:
    """After a short grace, and they are no requests that finished."""
    drained = DrainedSite(idle=3)
    drained.begin()
    drained.pass_time(5)

    assert drained.rested
    assert drained.rested[0] <= 3
    assert told(logged) == (0, 0)
    assert not drained.clock.getDelayedCalls()


def test_running_responses_go_on(logged: list[LogEvent]) -> None:
    """It is over when the last of them is, long before the deadline if so."""
    drained = DrainedSite(idle=1, busy=2)
    drained.begin()
    assert "2 requests" in formatEvent(logged[-1])
    drained.pass_time(10)
    drained.resource.response()
    drained.pass_time(10)
    assert not drained.rested
    drained.resource.response()
    drained.pass_time(1)

    assert drained.rested == [20.5]
    assert told(logged) == (2, 0)
    assert not drained.clock.getDelayedCalls()


def test_what_takes_too_long_is_cut(logged: list[LogEvent]) -> None:
    """At the deadline the rest is dropped, and the last line says how many."""
    drained = DrainedSite(busy=3)
    drained.begin()
    drained.resource.response()
    drained.pass_time(29)
    assert not drained.rested
    drained.pass_time(2)

    assert drained.rested == [30.0]
    assert told(logged) == (1, 2)
    assert not drained.resource.running
    assert not drained.clock.getDelayedCalls()


def test_it_can_be_cut_short(logged: list[LogEvent]) -> None:
    """A second signal drops what is left at once."""
    drained = DrainedSite(idle=1, busy=2)
    drained.begin()
    drained.pass_time(0.5)
    drained.drain.cut()
    drained.pass_time(0.5)

    assert drained.rested == [1.0]
    assert told(logged) == (0, 2)
    drained.pass_time(60)
    assert drained.rested == [1.0]
    assert not drained.clock.getDelayedCalls()


def test_a_request_that_comes_in_a_drain_counts_too(logged: list[LogEvent]) -> None:
    """Whoever was served or cut is told of, also if it came after the beginning."""
    drained = DrainedSite(busy=1)
    late = [drained.connect(), drained.connect()]
    for channel in late:
        channel.dataReceived(GET[:5])
    drained.begin()
    for channel in late:
        channel.dataReceived(GET[5:])
    drained.resource.response()
    drained.resource.response()
    drained.pass_time(31)

    assert told(logged) == (2, 1)


def test_a_client_that_leaves_by_itself_is_waited_for_no_more(logged: list[LogEvent]) -> None:
    """It was not cut."""
    drained = DrainedSite(busy=1)
    drained.begin()
    drained.transports.pop().end(FIN)

    assert drained.rested == [0.0]
    assert told(logged)[1] == 0
    assert not drained.clock.getDelayedCalls()


@pytest.mark.parametrize("how", ["deadline", "second signal"])
def test_a_body_that_is_still_coming_is_cut_and_counted(logged: list[LogEvent], how: str) -> None:
    """A request that nobody serves yet is one all the same, for whoever sent it."""
    drained = DrainedSite(busy=1)
    drained.connect().dataReceived(POST[:-1])
    drained.begin()
    assert "2 requests" in formatEvent(logged[-1])
    drained.resource.response()
    drained.pass_time(5)
    assert drained.drain.remaining == 1
    if how == "second signal":
        drained.drain.cut()
        drained.drain.cut()
    drained.pass_time(30)

    assert told(logged) == (1, 1)
    assert not drained.clock.getDelayedCalls()


def test_a_body_that_comes_in_time_is_served(logged: list[LogEvent]) -> None:
    """A drain waits for it as for any other."""
    drained = DrainedSite()
    channel = drained.connect()
    channel.dataReceived(POST[:-1])
    drained.begin()
    drained.pass_time(5)
    assert not drained.rested
    channel.dataReceived(POST[-1:])
    drained.resource.response()
    drained.pass_time(1)

    assert told(logged) == (1, 0)


def test_what_is_left_can_be_seen(logged: list[LogEvent]) -> None:
    """How many requests, and for how long; nothing while nothing is drained."""
    drained = DrainedSite(idle=1, busy=2)
    seen = [(drained.drain.remaining, drained.drain.remaining_s)]
    drained.begin()
    seen.append((drained.drain.remaining, drained.drain.remaining_s))
    drained.resource.response()
    drained.pass_time(10)
    seen.append((drained.drain.remaining, drained.drain.remaining_s))
    drained.resource.response()
    drained.pass_time(1)
    seen.append((drained.drain.remaining, drained.drain.remaining_s))

    assert seen == [(0, 0.0), (2, 30.0), (1, 20.0), (0, 0.0)]


def test_progress_is_logged(logged: list[LogEvent]) -> None:
    """Every ten seconds, until it is over."""
    drained = DrainedSite(busy=2)
    drained.begin()
    drained.pass_time(10)
    drained.resource.response()
    drained.pass_time(50)

    lines = [formatEvent(event) for event in logged if "requests are left" in formatEvent(event)]
    assert lines == [
        "draining: 2 requests are left, to be cut in 20 s",
        "draining: 1 requests are left, to be cut in 10 s",
    ]
