"""How a process shuts down: it refuses, waits, aborts, and reports how many requests."""

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


class WaitingHandler(Handler):
    """Counts the requests that it serves, and responds when the test says so."""

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
        """Respond to the oldest request."""
        request = next(iter(self.running))
        del self.running[request]
        request.start(200, [(b"content-length", b"0")])
        request.finish()


class DrainedSite:
    """A site with clients, and its drain."""

    def __init__(self, idle: int = 0, busy: int = 0) -> None:
        self.clock = Clock()
        self.resource = WaitingHandler()
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
        self.ended: list[float] = []

    def connect(self) -> Any:
        """Connect a client and return our end."""
        transport = FakeTransport()
        self.transports.append(transport)
        channel = self.site.buildProtocol(None)
        transport.connect(channel)
        return channel

    def begin(self) -> None:
        """Begin to drain."""
        self.drain.begin().addCallback(lambda _: self.ended.append(self.clock.seconds()))

    def pass_time(self, seconds: float) -> None:
        """Turn the clock; a connection that we closed is gone a moment later."""
        for _ in range(int(seconds / 0.5)):
            self.clock.advance(0.5)
            for transport in list(self.transports):
                if transport.count("abort") or transport.count("close"):
                    self.transports.remove(transport)
                    transport.end(ABORTED if transport.count("abort") else FIN)

    def assert_over(self, logged: list[LogEvent], *, finished: int, cut: int) -> None:
        """The last line reports these numbers of requests, and no timer stays."""
        assert formatEvent(logged[-1]).startswith("drained: ")
        assert (logged[-1]["finished"], logged[-1]["cut"]) == (finished, cut)
        assert not self.clock.getDelayedCalls()


def test_without_clients_a_drain_is_over_at_once(logged: list[LogEvent]) -> None:
    """There is nothing to wait for, and no timer stays."""
    drained = DrainedSite()
    begun = [drained.drain.begun]
    drained.begin()
    begun.append(drained.drain.begun)

    assert begun == [False, True]
    assert drained.ended == [0.0]
    drained.assert_over(logged, finished=0, cut=0)


def test_idle_clients_are_disconnected(logged: list[LogEvent]) -> None:
    """After a short grace, and they do not count as requests."""
    drained = DrainedSite(idle=3)
    drained.begin()
    drained.pass_time(10)

    assert drained.ended
    assert drained.ended[0] <= 7
    drained.assert_over(logged, finished=0, cut=0)


def test_running_responses_go_on(logged: list[LogEvent]) -> None:
    """A drain is over with the last of them, which may be long before the deadline."""
    drained = DrainedSite(idle=1, busy=2)
    drained.begin()
    assert "2 requests" in formatEvent(logged[-1])
    drained.pass_time(10)
    drained.resource.response()
    drained.pass_time(10)
    assert not drained.ended
    drained.resource.response()
    drained.pass_time(1)

    assert drained.ended == [20.5]
    drained.assert_over(logged, finished=2, cut=0)


def test_a_request_that_takes_too_long_is_aborted(logged: list[LogEvent]) -> None:
    """At the deadline the rest is aborted, and the last line reports how many."""
    drained = DrainedSite(busy=3)
    drained.begin()
    drained.resource.response()
    drained.pass_time(29)
    assert not drained.ended
    drained.pass_time(2)

    assert drained.ended == [30.0]
    drained.assert_over(logged, finished=1, cut=2)
    assert not drained.resource.running


def test_a_drain_can_be_cut_short(logged: list[LogEvent]) -> None:
    """A second signal aborts the remaining requests at once."""
    drained = DrainedSite(idle=1, busy=2)
    drained.begin()
    drained.pass_time(0.5)
    drained.drain.cut()
    drained.pass_time(0.5)

    assert drained.ended == [1.0]
    drained.assert_over(logged, finished=0, cut=2)
    drained.pass_time(60)
    assert drained.ended == [1.0]


def test_a_request_that_comes_in_a_drain_counts_too(logged: list[LogEvent]) -> None:
    """It is reported as served or aborted, also if it came after the beginning."""
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

    drained.assert_over(logged, finished=2, cut=1)


def test_a_drain_does_not_wait_for_a_client_that_has_left(logged: list[LogEvent]) -> None:
    """Its request is not reported as aborted."""
    drained = DrainedSite(busy=1)
    drained.begin()
    drained.transports.pop().end(FIN)

    assert drained.ended == [0.0]
    drained.assert_over(logged, finished=1, cut=0)


@pytest.mark.parametrize("how", ["deadline", "second signal"])
def test_a_request_whose_body_is_still_coming_is_aborted_and_counted(
    logged: list[LogEvent], how: str
) -> None:
    """A request that is not served yet counts all the same."""
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

    drained.assert_over(logged, finished=1, cut=1)


def test_a_request_whose_body_comes_in_time_is_served(logged: list[LogEvent]) -> None:
    """A drain waits for it as for any other request."""
    drained = DrainedSite()
    channel = drained.connect()
    channel.dataReceived(POST[:-1])
    drained.begin()
    drained.pass_time(5)
    assert not drained.ended
    channel.dataReceived(POST[-1:])
    drained.resource.response()
    drained.pass_time(1)

    drained.assert_over(logged, finished=1, cut=0)


def test_the_remaining_requests_can_be_seen(logged: list[LogEvent]) -> None:
    """How many requests remain, and how much time; nothing before and after a drain."""
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
