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


def test_who_may_not_be_asked_leaves_its_turns_to_all_others() -> None:
    """By their weights, and it has none to catch up with when it may be asked again."""
    balance = Balance("weighted", [2, 1, 1])

    def firsts(count: int, able: str) -> Counter[str]:
        orders = [balance.order("abc", idle, able=able.__contains__) for _ in range(count)]
        return Counter(next(one for one in order if one in able) for order in orders)

    assert firsts(4, "abc") == {"a": 2, "b": 1, "c": 1}
    assert firsts(40, "bc") == {"b": 20, "c": 20}
    assert firsts(4, "abc") == {"a": 2, "b": 1, "c": 1}


def test_where_nobody_may_be_asked_turns_are_taken_all_the_same() -> None:
    """Somebody may be asked by the time that it matters."""
    balance = Balance("weighted", [1, 1])
    orders = [balance.order("ab", idle, able=lambda _: False) for _ in range(4)]
    assert ["".join(order) for order in orders] == ["ab", "ba", "ab", "ba"]


def test_a_request_that_stays_takes_no_turn() -> None:
    """The order is the same as before it."""
    balance = Balance("weighted", [1, 1])
    assert [balance.order("ab", idle, takes_turn=False)[0] for _ in range(3)] == list("aaa")
    assert [balance.order("ab", idle)[0] for _ in range(2)] == list("ab")


def test_turns_are_spread() -> None:
    """Not three for the one, and then one for the other."""
    balance = Balance("weighted", [2, 1])
    assert [balance.order("ab", idle)[0] for _ in range(6)] == list("abaaba")


def test_every_candidate_stands_in_the_order_once() -> None:
    """Those behind the first are asked if it fails."""
    balance = Balance("weighted", [1, 5, 2])
    for _ in range(20):
        assert sorted(balance.order("abc", idle)) == ["a", "b", "c"]
