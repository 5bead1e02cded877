"""Work in steps: shared fairly, within one budget a turn, and ended when nobody waits for it."""

from __future__ import annotations

from collections.abc import Callable, Generator
from typing import Any

import pytest
from twisted.internet.defer import CancelledError, Deferred

from llmproxy.net.turns import BUDGET_S, Turns
from tests.support.turning import TurningReactor

Work = Generator[None, None, str]


class Played:
    """Turns of a reactor whose clock moves with each step."""

    def __init__(self, step: float) -> None:
        self.reactor = TurningReactor()
        self.now = 0.0
        self.step = step
        self.log: list[str] = []
        self.turns = Turns(self.reactor, lambda: self.now)

    def work(self, name: str, steps: int, error: Exception | None = None) -> Work:
        """Return work of so many steps."""
        try:
            for _ in range(steps):
                self.now += self.step
                self.log.append(name)
                yield
        finally:
            self.log.append(f"{name} closed")
        if error is not None:
            raise error
        return name

    def turn(self) -> list[str]:
        """Let a turn pass; return what was done in it."""
        self.log.clear()
        self.reactor.turn()
        return list(self.log)


def outcome(done: Deferred[Any]) -> list[Any]:
    """Return the list into which the result comes."""
    results: list[Any] = []
    done.addBoth(results.append)
    return results


def test_work_is_done_in_turns_within_the_budget() -> None:
    """Nothing is done at once; a turn takes as many steps as fit, and the result comes last."""
    played = Played(BUDGET_S / 3)
    result = outcome(played.turns.run(played.work("a", 5)))
    assert played.log == []
    assert played.turn() == ["a"] * 3
    assert result == []
    assert played.turn() == ["a", "a", "a closed"]
    assert result == ["a"]
    assert not played.reactor.calls


def test_all_work_shares_one_budget() -> None:
    """However much work there is, a turn takes no longer; each piece has its turn."""
    played = Played(BUDGET_S)
    results = [outcome(played.turns.run(played.work(name, 2))) for name in "abc"]
    assert [played.turn() for _ in range(6)] == [["a"], ["b"], ["c"], *[[n] for n in "abc"]]
    assert [played.turn() for _ in range(3)] == [[f"{name} closed"] for name in "abc"]
    assert results == [["a"], ["b"], ["c"]]


def test_an_error_of_the_work_is_its_result() -> None:
    """The next piece of work is not touched by it."""
    played = Played(BUDGET_S)
    first = outcome(played.turns.run(played.work("a", 0, ValueError("x"))))
    second = outcome(played.turns.run(played.work("b", 0)))
    played.turn()
    assert first[0].check(ValueError)
    played.turn()
    assert second == ["b"]


@pytest.mark.parametrize("begun", [False, True])
def test_cancelled_work_is_ended(begun: bool) -> None:
    """Nothing more of it is done, and no timer is left."""
    played = Played(BUDGET_S)
    done = played.turns.run(played.work("a", 9))
    other = played.turns.run(played.work("b", 9))
    results = outcome(done), outcome(other)
    if begun:
        played.turn()
    done.cancel()
    assert results[0][0].check(CancelledError)
    assert ("a closed" in played.log) is begun
    assert played.turn() == ["b"]
    other.cancel()
    assert results[1][0].check(CancelledError)
    assert not played.reactor.calls
    later = outcome(played.turns.run(played.work("c", 0)))
    played.turn()
    assert later == ["c"]


def test_what_a_result_begins_waits_for_its_turn() -> None:
    """Work that is begun by the end of other work is done in a later turn."""
    played = Played(BUDGET_S)

    def again(_: str) -> Deferred[str]:
        return played.turns.run(played.work("b", 1))

    run: Callable[[str], Deferred[str]] = again
    result = outcome(played.turns.run(played.work("a", 0)).addCallback(run))
    played.turn()
    assert result == []
    played.turn()
    played.turn()
    assert result == ["b"]
