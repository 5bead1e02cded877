"""The order in which candidates are asked."""

from __future__ import annotations

from collections import Counter

import pytest

from llmproxy.policy.balance import Balance


def idle(_: str) -> int:
    return 0


def test_the_order_of_the_file_stays() -> None:
    """Whoever is busy."""
    assert list(Balance("ordered", [1, 1]).order("ab", {"a": 9, "b": 0}.__getitem__)) == ["a", "b"]


def test_the_least_busy_comes_first() -> None:
    """Among equals the order of the file decides."""
    busy = {"a": 2, "b": 0, "c": 0}.__getitem__
    assert list(Balance("least_busy", [1] * 3).order("abc", busy)) == ["b", "c", "a"]


@pytest.mark.parametrize("weights", [(1, 1), (3, 1), (5, 2, 3), (1, 100)])
def test_weights_are_kept_exactly(weights: tuple[int, ...]) -> None:
    """In every round of as many requests as the weights' sum, and spread within it."""
    names = "abc"[: len(weights)]
    balance, total = Balance("weighted", weights), sum(weights)
    for _ in range(3):
        first = [balance.order(names, idle)[0] for _ in range(total)]
        assert Counter(first) == dict(zip(names, weights, strict=True))


def test_turns_are_spread() -> None:
    """Not three for the one, and then one for the other."""
    balance = Balance("weighted", [2, 1])
    assert [balance.order("ab", idle)[0] for _ in range(6)] == list("abaaba")


def test_every_candidate_stands_in_the_order_once() -> None:
    """Those behind the first are asked if it fails."""
    balance = Balance("weighted", [1, 5, 2])
    for _ in range(20):
        assert sorted(balance.order("abc", idle)) == ["a", "b", "c"]
