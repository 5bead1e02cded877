"""A site gets a new configuration: its handlers, its limits and its deadlines change."""

from __future__ import annotations

import pytest
from twisted.internet.task import Clock

from llmproxy.config import Limits, Timeouts
from llmproxy.errors import ProxyError
from llmproxy.server.handler import Router
from llmproxy.server.request import Request
from llmproxy.server.site import Site
from tests.server.caller import GET, Caller, WaitingHandler
from tests.support.served import limits
from tests.support.sockets import request

POST = request("POST", "/", body=b"body")


def test_the_next_request_is_served_by_the_next_handler() -> None:
    """The connection stays the same."""
    caller, after = Caller(), WaitingHandler()
    caller.send(GET)
    caller.respond()
    caller.site.serve(Router(after))
    caller.send(GET)
    assert (len(caller.handler.requests), len(after.requests)) == (1, 1)


@pytest.mark.parametrize("sent", range(POST.index(b"\r\n\r\n") + 4, len(POST)))
def test_a_request_whose_head_is_whole_keeps_its_handler(sent: int) -> None:
    """The handler and the body limit stay, however much of the body has come."""
    caller, after = Caller(), WaitingHandler(limit=1, holds=False)
    caller.send(POST[:sent])
    caller.site.serve(Router(after))
    caller.send(POST[sent:])
    assert (len(caller.handler.requests), after.requests) == (1, [])
    assert caller.request.body == b"body"
    caller.respond()
    caller.send(POST)
    assert (len(caller.handler.requests), len(after.requests)) == (1, 1)
    assert after.requests[0].refusal is not None


def test_a_request_whose_head_is_not_whole_has_the_new_handler() -> None:
    """A part of a head is no request yet."""
    caller, after = Caller(), WaitingHandler()
    caller.send(POST[:-10])
    caller.site.serve(Router(after))
    caller.send(POST[-10:])
    assert (caller.handler.requests, len(after.requests)) == ([], 1)


def test_an_early_refusal_is_the_new_handlers() -> None:
    """The new handler may refuse a request before its body is read."""
    caller = Caller()
    refusal = ProxyError(401, "no_key", "No.")
    early: list[Request] = []

    class Refusing(WaitingHandler):
        def early_refusal(self, request: Request) -> ProxyError:
            early.append(request)
            return refusal

    after = Refusing()
    caller.site.serve(Router(after))
    caller.send(POST[:-1])
    assert after.requests == early
    assert early[0].refusal is refusal


@pytest.mark.parametrize("before", [None, 1000.0, 2.0])
def test_the_deadline_of_an_idle_connection_starts_again(before: float | None) -> None:
    """A new ``client_idle`` counts from the change, after a longer one or none."""
    caller = Caller(client_idle=before)
    caller.pass_time(1)
    caller.site.follow(Timeouts(client_idle=10.0), Limits())
    caller.pass_time(9)
    assert caller.is_open()
    caller.pass_time(2)
    assert not caller.is_open()


def test_other_deadlines_do_not_extend_an_idle_connection() -> None:
    """Reloads alone keep no idle connection open."""
    caller = Caller(client_idle=10)
    for _ in range(11):
        caller.pass_time(1)
        caller.site.follow(
            Timeouts(client_idle=10.0, request_head=caller.clock.seconds()), Limits()
        )
    assert not caller.is_open()


def test_deadlines_that_run_stay() -> None:
    """A head that has begun keeps its deadline, and the next head has the new one."""
    caller = Caller(request_head=10)
    caller.send(GET[:5])
    caller.site.follow(Timeouts(request_head=1.0), Limits())
    caller.pass_time(5)
    assert caller.is_open()
    caller.send(GET[5:])
    caller.respond()
    caller.transport.take()
    caller.send(GET[:5])
    caller.pass_time(2)
    assert caller.status == 408


def test_a_request_keeps_its_stall_deadline() -> None:
    """A request keeps the `client_stall` of its beginning."""
    caller = Caller(client_stall=50)
    caller.send(GET)
    caller.site.follow(Timeouts(client_stall=1.0), Limits())
    assert caller.request.stall_after == 50
    caller.respond()
    caller.send(GET)
    assert caller.request.stall_after == 1


def test_the_next_head_has_the_new_limit() -> None:
    """The new limit holds for the next head."""
    caller = Caller()
    caller.site.follow(Timeouts(), Limits(request_head=50))
    caller.send(request("GET", "/", "x-long: " + "x" * 50))
    assert caller.status == 431


def test_the_sweep_is_as_fine_as_the_shortest_deadline() -> None:
    """The new deadline may be much shorter; frequent reloads do not delay the sweep."""
    caller = Caller(client_idle=100)
    for _ in range(40):
        caller.site.follow(Timeouts(client_idle=0.4), Limits())
        caller.clock.advance(0.05)
    assert not caller.is_open()


def test_an_idle_site_does_not_begin_to_sweep() -> None:
    """Without a listener and a client there is no timer."""
    clock = Clock()
    site = Site(Router(WaitingHandler()), clock, clock.seconds, wall=lambda: 0.0)
    site.follow(Timeouts(client_idle=1.0), Limits())
    assert not clock.getDelayedCalls()


def test_new_limits_hold_for_the_next_connection() -> None:
    """Open connections stay and count, also those of one address."""
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
