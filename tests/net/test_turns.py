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


def test_work_is_done_within_the_budget_of_each_turn() -> None:
    """It begins at once; a turn takes as many steps as fit, and the result comes last."""
    played = Played(BUDGET_S / 3)
    result = outcome(played.turns.run(played.work("a", 5)))
    assert played.log == ["a"] * 3
    assert result == []
    assert played.turn() == ["a", "a", "a closed"]
    assert result == ["a"]
    assert played.turn() == []
    assert not played.reactor.calls


def test_short_work_is_done_at_once() -> None:
    """Its result is there when the caller asks for it."""
    played = Played(BUDGET_S / 8)
    assert outcome(played.turns.run(played.work("a", 3))) == ["a"]


def test_all_work_shares_one_budget() -> None:
    """However much work there is, a turn takes no longer; each piece has its turn."""
    played = Played(BUDGET_S)
    results = [outcome(played.turns.run(played.work(name, 2))) for name in "abc"]
    assert played.log == ["a"]
    assert [played.turn() for _ in range(5)] == [["a"], ["b"], ["c"], ["a closed"], ["b"]]
    assert [played.turn() for _ in range(3)] == [["c"], ["b closed"], ["c closed"]]
    assert results == [["a"], ["b"], ["c"]]


def test_work_that_begins_in_one_turn_shares_its_budget() -> None:
    """What is left by the first is for the second; what comes later waits."""
    played = Played(BUDGET_S / 4)
    results = [outcome(played.turns.run(played.work(name, 3))) for name in "abc"]
    assert played.log == ["a", "a", "a", "a closed", "b"]
    assert results == [["a"], [], []]
    assert played.turn() == ["b", "b", "b closed"]
    assert played.turn() == ["c", "c", "c", "c closed"]


def test_cancelled_work_gives_its_turn_back_to_nobody() -> None:
    """Who begins work again and again does not get a budget for each."""
    played = Played(BUDGET_S)
    for _ in range(3):
        done = played.turns.run(played.work("a", 9))
        outcome(done)
        done.cancel()
    assert played.log.count("a") == 1


def test_an_error_of_the_work_is_its_result() -> None:
    """The next piece of work is not touched by it."""
    played = Played(BUDGET_S)
    first = outcome(played.turns.run(played.work("a", 1, ValueError("x"))))
    second = outcome(played.turns.run(played.work("b", 0)))
    played.turn()
    assert first[0].check(ValueError)
    played.turn()
    assert second == ["b"]
    assert outcome(played.turns.run(played.work("c", 0, ValueError("x"))))[0].check(ValueError)


@pytest.mark.parametrize("begun", [False, True])
def test_cancelled_work_is_ended(begun: bool) -> None:
    """Nothing more of it is done."""
    played = Played(BUDGET_S)
    works = [played.turns.run(played.work(name, 9)) for name in "ab"]
    done, other = works if begun else reversed(works)
    results = outcome(done), outcome(other)
    done.cancel()
    assert results[0][0].check(CancelledError)
    assert ("a closed" in played.log) is begun
    assert played.turn() == ["b" if begun else "a"]
    other.cancel()
    assert results[1][0].check(CancelledError)
    later = outcome(played.turns.run(played.work("c", 0)))
    assert played.turn() == ["c closed"]
    assert later == ["c"]
    assert played.turn() == []
    assert not played.reactor.calls


def test_what_a_result_begins_shares_the_turn() -> None:
    """Work that is begun by the end of other work gets what that left."""
    played = Played(BUDGET_S / 2)

    def again(_: str) -> Deferred[str]:
        return played.turns.run(played.work("b", 2))

    run: Callable[[str], Deferred[str]] = again
    result = outcome(played.turns.run(played.work("a", 1)).addCallback(run))
    assert played.log == ["a", "a closed", "b"]
    assert result == []
    assert played.turn() == ["b", "b closed"]
    assert result == ["b"]
