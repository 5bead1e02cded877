"""A process's share of the limits, while the engine is away."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from twisted.internet.defer import Deferred

from llmproxy.config import Client
from llmproxy.errors import ProxyError
from llmproxy.policy.limits import DAY_S
from llmproxy.shared.client_limits import SharedLimits

EVENING = 20_000 * DAY_S - 60.0


class Away:
    """An engine that is away; two processes shared it."""

    is_up = False
    processes = 2

    def ask(self, op: list[Any], late: Callable[[Any], object]) -> Deferred[Any]:
        """Nobody asks."""
        raise AssertionError(op)

    def wake(self, seconds: float = 0.0) -> None:
        """There is nobody to tell."""


class Alone(SharedLimits):
    """Limits under a clock that the tests turn."""

    def __init__(self) -> None:
        self.now = 0.0
        super().__init__(lambda: 1000 + self.now, lambda: EVENING + self.now)
        self.engine = Away()

    def passes(self, client: Client, most: int = 50) -> int:
        """Return how many requests pass at once, each of a client that has no costs yet."""
        for count in range(most):
            try:
                self.admit(client, None, 0).settle(10, is_known=False)
            except ProxyError:
                return count
        return most


def client(**limits: int) -> Client:
    """Return a client."""
    return Client(name="c", keys=(), **limits)  # type: ignore[arg-type]  # only limits


def test_a_reload_counts_while_the_engine_is_away() -> None:
    """The share is one of the limit that holds now."""
    limits = Alone()
    assert limits.passes(client(requests_per_minute=8)) == 4
    assert limits.passes(client(requests_per_minute=20)) == 6


@pytest.mark.parametrize("before", [0, 3])
def test_a_day_begins_while_the_engine_is_away(before: int) -> None:
    """What was used yesterday counts no more, also as the engine said it."""
    limits, one = Alone(), client(tokens_per_day=4000)
    limits.heard([2, "c"], [[0, 0, 0, 4000, 4000]])
    assert limits.passes(one, before) <= 1  # a first one may be greater than what is left
    limits.now = 120
    assert limits.passes(one) > 9


def test_what_waits_for_the_engine_is_bounded() -> None:
    """Many minutes of many requests become one thing to tell."""
    limits, one = Alone(), client(requests_per_minute=10**6)
    limits.hear_time(10**12)
    for _ in range(30_000):
        limits.now += 0.25
        limits.admit(one, None, None).settle(0)
    ops = limits.take(1 << 20)
    assert len(ops) < 5000
    assert sum(op[3] for op in ops) == 30_000
    assert sum(op[2] for op in ops) == 0
