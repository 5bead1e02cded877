"""A site from one configuration to the next: who serves, what is allowed, and for how long."""

from __future__ import annotations

import pytest
from twisted.internet.task import Clock

from llmproxy.config import Limits, Timeouts
from llmproxy.errors import ProxyError
from llmproxy.server.handler import Router
from llmproxy.server.request import Request
from llmproxy.server.site import Site
from tests.server.test_site import Caller, Waits
from tests.support.served import limits
from tests.support.sockets import request

GET = request("GET", "/")
POST = request("POST", "/", body=b"body")


def test_the_next_request_is_served_by_the_next_handler() -> None:
    """On the same connection."""
    caller, after = Caller(), Waits()
    caller.send(GET)
    caller.response()
    caller.site.serve(Router(after))
    caller.send(GET)
    assert (len(caller.resource.requests), len(after.requests)) == (1, 1)


@pytest.mark.parametrize("sent", range(POST.index(b"\r\n\r\n") + 4, len(POST)))
def test_a_request_whose_head_is_in_keeps_who_serves_it(sent: int) -> None:
    """However much of its body has come by then; what it may hold is settled, too."""
    caller, after = Caller(), Waits(limit=1, holds=False)
    caller.send(POST[:sent])
    caller.site.serve(Router(after))
    caller.send(POST[sent:])
    assert (len(caller.resource.requests), after.requests) == (1, [])
    assert caller.request.body == b"body"
    caller.response()
    caller.send(POST)
    assert (len(caller.resource.requests), len(after.requests)) == (1, 1)
    assert after.requests[0].refusal is not None


def test_a_request_whose_head_is_not_in_has_the_new_one() -> None:
    """A part of a head is no request yet."""
    caller, after = Caller(), Waits()
    caller.send(POST[:-10])
    caller.site.serve(Router(after))
    caller.send(POST[-10:])
    assert (caller.resource.requests, len(after.requests)) == ([], 1)


def test_a_refusal_before_the_body_follows() -> None:
    """Who is refused before a body is read is a matter of the configuration, too."""
    caller = Caller()
    refusal = ProxyError(401, "no_key", "No.")
    asked: list[Request] = []

    class Refusing(Waits):
        def early_refusal(self, request: Request) -> ProxyError:
            asked.append(request)
            return refusal

    after = Refusing()
    caller.site.serve(Router(after))
    caller.send(POST[:-1])
    assert after.requests == asked
    assert asked[0].refusal is refusal


@pytest.mark.parametrize("before", [None, 1000.0, 2.0])
def test_who_is_idle_is_so_anew(before: float | None) -> None:
    """A connection that could have stayed for ever does not, and one that was to go may stay."""
    caller = Caller(client_idle=before)
    caller.pass_time(1)
    caller.site.follow(Timeouts(client_idle=10.0), Limits())
    caller.pass_time(9)
    assert caller.is_open()
    caller.pass_time(2)
    assert not caller.is_open()


def test_who_is_idle_is_not_told_of_other_deadlines() -> None:
    """Reloads alone keep nobody's connection open."""
    caller = Caller(client_idle=10)
    for _ in range(11):
        caller.pass_time(1)
        caller.site.follow(
            Timeouts(client_idle=10.0, request_head=caller.clock.seconds()), Limits()
        )
    assert not caller.is_open()


def test_deadlines_that_run_stay() -> None:
    """A head that has begun has the time that it began with, and the next one the new."""
    caller = Caller(request_head=10)
    caller.send(GET[:5])
    caller.site.follow(Timeouts(request_head=1.0), Limits())
    caller.pass_time(5)
    assert caller.is_open()
    caller.send(GET[5:])
    caller.response()
    caller.transport.take()
    caller.send(GET[:5])
    caller.pass_time(2)
    assert caller.status == 408


def test_a_client_that_takes_nothing_has_the_time_that_it_began_with() -> None:
    """`client_stall` is its request's, of the site's from the beginning."""
    caller = Caller(client_stall=50)
    caller.send(GET)
    caller.site.follow(Timeouts(client_stall=1.0), Limits())
    assert caller.request.stall_after == 50
    caller.response()
    caller.send(GET)
    assert caller.request.stall_after == 1


def test_limits_of_heads_follow() -> None:
    """The next head is measured by the new one."""
    caller = Caller()
    caller.site.follow(Timeouts(), Limits(request_head=50))
    caller.send(request("GET", "/", "x-long: " + "x" * 50))
    assert caller.status == 431


def test_the_sweep_is_as_fine_as_the_shortest_deadline() -> None:
    """Which may be much shorter by now; and reloads in quick succession do not hold it up."""
    caller = Caller(client_idle=100)
    for _ in range(40):
        caller.site.follow(Timeouts(client_idle=0.4), Limits())
        caller.clock.advance(0.05)
    assert not caller.is_open()


def test_an_idle_site_does_not_begin_to_sweep() -> None:
    """Nobody is connected, and nobody listens."""
    clock = Clock()
    site = Site(Router(Waits()), clock, clock.seconds, wall=lambda: 0.0)
    site.follow(Timeouts(client_idle=1.0), Limits())
    assert not clock.getDelayedCalls()


def test_limits_of_connections_are_others_from_now_on() -> None:
    """Open connections stay, and are counted, from one address too."""
    limiter = limits(2)
    assert [limiter.enter("a"), limiter.enter("a")] == [None, None]
    limiter.limit(3, 0)
    assert limiter.enter("a") is None
    limiter.limit(3, 3)
    refusals = [limiter.enter("b")]
    limiter.limit(9, 3)
    refusals += [limiter.enter("a"), limiter.enter("b")]
    reasons = [None if refusal is None else refusal.reason for refusal in refusals]
    assert reasons == ["max_connections", "connections_per_address", None]
    limiter.limit(1, 1)
    for _ in range(4):
        assert limiter.enter("c") is not None
    for address in "aaab":
        limiter.leave(address)
    assert limiter.enter("a") is None
