"""Timers in queues: when they ring, and how few calls of the reactor they need."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from twisted.internet.task import Clock

from llmproxy.net.timers import Timer, Timers


class Bells:
    """Timers on a clock, and what rang at which time."""

    def __init__(self) -> None:
        self.clock = Clock()
        self.timers = Timers(self.clock)
        self.rang: list[tuple[str, float]] = []

    def set(self, name: str, delay: float) -> Timer:
        """Ask for a timer."""
        return self.timers.callLater(delay, lambda: self.rang.append((name, self.clock.seconds())))


def test_a_cancelled_timer_does_not_ring() -> None:
    """It may be the first of its length or not; a second cancel is an error, as with Twisted."""
    bells = Bells()
    first, second, third = (bells.set(name, 5) for name in ("first", "second", "third"))
    first.cancel()
    third.cancel()
    assert (first.active(), second.active()) == (False, True)
    bells.clock.advance(5)
    assert bells.rang == [("second", 5.0)]
    for timer in (first, second):
        with pytest.raises(KeyError):
            timer.cancel()


def test_many_timers_that_ring_at_once_leave_turns_to_the_reactor() -> None:
    """The reactor gets its turn between them, and no timer is lost."""
    bells = Bells()
    for number in range(40):
        bells.set(str(number), 0)
    rung: list[int] = []

    def look() -> None:
        rung.append(len(bells.rang))
        if len(rung) < 4:
            bells.clock.callLater(0, look)

    bells.clock.callLater(0, look)
    bells.clock.advance(0)
    assert rung == [16, 32, 40, 40]
    assert [int(name) for name, _ in bells.rang] == list(range(40))
    assert not bells.clock.getDelayedCalls()


def test_many_timers_of_one_length_need_one_delayed_call() -> None:
    """The reactor has one delayed call for each length."""
    bells = Bells()
    for _ in range(1000):
        bells.set("gone", 30).cancel()
    bells.set("stays", 30)
    assert len(bells.clock.getDelayedCalls()) == 1
    bells.clock.advance(30)
    assert bells.rang == [("stays", 30.0)]


def test_a_timer_may_be_set_and_cancelled_while_others_ring() -> None:
    """A call may set a timer of its own length, and cancel one that is due."""
    bells = Bells()
    due: list[Timer] = []

    def ring() -> None:
        due[0].cancel()
        bells.set("new", 2)

    bells.timers.callLater(2, ring)
    due.append(bells.set("due", 2))
    bells.clock.advance(2)
    assert bells.rang == []
    bells.clock.advance(2)
    assert bells.rang == [("new", 4.0)]


def test_a_call_that_fails_stops_no_other(logged_failures: Any) -> None:
    """The failure is logged, and the next timer rings."""
    bells = Bells()
    error = ValueError("wrong")

    def fail() -> None:
        raise error

    bells.timers.callLater(1, fail)
    bells.set("next", 1)
    bells.clock.advance(1)
    assert bells.rang == [("next", 1.0)]
    assert [failure.value for failure in logged_failures.flush(ValueError)] == [error]


def test_closing_forgets_every_timer() -> None:
    """No timer rings, and the reactor has no delayed call."""
    bells = Bells()
    bells.set("a", 1)
    bells.set("b", 2)
    bells.timers.close()
    assert not bells.clock.getDelayedCalls()
    bells.clock.advance(5)
    assert bells.rang == []


_STEPS = st.lists(
    st.tuples(st.sampled_from([1.0, 2.0, 5.0]), st.floats(0, 3), st.booleans()), max_size=40
)


@given(_STEPS)
def test_timers_ring_as_those_of_the_reactor(steps: list[tuple[float, float, bool]]) -> None:
    """In any sequence of steps the same timers ring at the same turns, each once."""
    bells, own = Bells(), Clock()
    expected: list[str] = []
    for at, (delay, wait, cancelled) in enumerate([*steps, (1.0, 10.0, False)]):
        ours = bells.set(str(at), delay)
        theirs = own.callLater(delay, expected.append, str(at))
        if cancelled:
            ours.cancel()
            theirs.cancel()
        bells.clock.advance(wait)
        own.advance(wait)
        assert sorted(name for name, _ in bells.rang) == sorted(expected)
        assert ours.active() is bool(theirs.active())
    assert not bells.clock.getDelayedCalls()
