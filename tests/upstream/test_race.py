"""Which of several addresses is connected to, and when each is tried."""

from __future__ import annotations

import socket
from typing import Any

import pytest
from twisted.internet.defer import CancelledError, Deferred
from twisted.internet.error import ConnectionRefusedError
from twisted.internet.task import Clock

from llmproxy.upstream.race import DELAY, first_connected, interleaved

V4, V6 = socket.AF_INET, socket.AF_INET6


class Run:
    """A race between some addresses."""

    def __init__(self, count: int, *, refused: tuple[int, ...] = ()) -> None:
        self.clock = Clock()
        self.begun: list[Deferred[str]] = []
        self.cancelled: list[int] = []
        self.given_up: list[str] = []
        self.found: list[Any] = []
        self._refused = refused
        attempts = [self.attempt] * count
        self.won = first_connected(self.clock, attempts, self.given_up.append)
        self.won.addBoth(self.found.append)

    def attempt(self) -> Deferred[str]:
        """Begin one; some are refused at once."""
        number = len(self.begun)
        connecting: Deferred[str] = Deferred(lambda _: self.cancelled.append(number))
        self.begun.append(connecting)
        if number in self._refused:
            connecting.errback(ConnectionRefusedError(f"{number} refused"))
        return connecting


def test_the_first_that_connects_counts() -> None:
    """Nothing else is begun, and no timer is left."""
    run = Run(3)
    run.clock.advance(DELAY - 0.01)
    run.begun[0].callback("a")
    assert (run.found, len(run.begun)) == (["a"], 1)
    assert run.clock.getDelayedCalls() == []


def test_a_silent_address_does_not_hold_up_the_next() -> None:
    """The next is tried a moment later; who connects first wins, and the others are cancelled."""
    run = Run(3)
    for _ in range(2):
        run.clock.advance(DELAY)
    run.begun[1].callback("b")
    assert run.found == ["b"]
    assert sorted(run.cancelled) == [0, 2]
    assert run.clock.getDelayedCalls() == []


@pytest.mark.parametrize("at_once", [True, False])
def test_a_refused_address_is_followed_at_once(at_once: bool) -> None:
    """No time passes before the next one."""
    run = Run(3, refused=(0, 1) if at_once else ())
    if not at_once:
        run.begun[0].errback(ConnectionRefusedError())
        run.begun[1].errback(ConnectionRefusedError())
    assert len(run.begun) == 3
    run.begun[2].callback("c")
    assert run.found == ["c"]
    assert run.clock.seconds() == 0


def test_a_failure_begins_the_delay_anew() -> None:
    """Behind a refusal, the next address has its own time."""
    run = Run(3)
    run.clock.advance(DELAY - 0.01)
    run.begun[0].errback(ConnectionRefusedError())
    run.clock.advance(DELAY - 0.01)
    assert len(run.begun) == 2
    run.clock.advance(0.01)
    assert len(run.begun) == 3


@pytest.mark.parametrize("refused", [(), (0, 1)])
def test_the_last_failure_is_the_race_s(refused: tuple[int, ...]) -> None:
    """It comes when all have failed, in whatever order."""
    run = Run(2, refused=refused)
    if not refused:
        run.clock.advance(DELAY)
        run.begun[1].errback(ConnectionRefusedError("1 refused"))
        assert run.found == []
        run.begun[0].errback(ConnectionRefusedError("1 refused"))
    (failure,) = run.found
    assert str(failure.value).endswith(": 1 refused.")
    assert run.clock.getDelayedCalls() == []


def test_a_race_can_be_cancelled() -> None:
    """Whatever is under way is cancelled; nothing is begun any more."""
    run = Run(3)
    run.clock.advance(DELAY)
    run.won.cancel()
    assert run.found[0].check(CancelledError)
    assert sorted(run.cancelled) == [0, 1]
    run.clock.advance(10)
    assert len(run.begun) == 2


def test_what_connects_too_late_is_given_up() -> None:
    """An attempt may not hear that it was cancelled."""
    clock = Clock()
    given_up: list[str] = []
    late: list[Deferred[str]] = []

    def deaf() -> Deferred[str]:
        deferred: Deferred[str] = Deferred(lambda one: one.callback("late"))
        late.append(deferred)
        return deferred

    won = first_connected(clock, [deaf, deaf], given_up.append)
    clock.advance(DELAY)
    late[1].callback("b")
    assert won.result == "b"
    assert given_up == ["late"]


def test_families_take_turns() -> None:
    """The first family is that of the system's first address (RFC 8305, section 4)."""
    found = [(V6, "a"), (V6, "b"), (V6, "c"), (V4, "d")]
    assert interleaved(found) == [(V6, "a"), (V4, "d"), (V6, "b"), (V6, "c")]
    assert interleaved(found[::-1]) == [(V4, "d"), (V6, "c"), (V6, "b"), (V6, "a")]
    assert interleaved([]) == []
