"""What is remembered of who served whom."""

from __future__ import annotations

import pytest
from twisted.internet.task import Clock

from llmproxy.config import Route
from llmproxy.policy.stickiness import Stickiness, key_of


def test_a_provider_is_remembered_until_its_time_is_over() -> None:
    """Each use begins that time anew, within a second."""
    clock = Clock()
    known = Stickiness(clock.seconds)
    known.remember(("r", "c"), "p", 10)
    for _ in range(3):
        clock.advance(9)
        assert known.provider_of(("r", "c"), 10) == "p"
    clock.advance(0.9)
    assert known.provider_of(("r", "c"), 10) == "p"
    clock.advance(9.1)
    assert known.provider_of(("r", "c"), 10) is None
    assert len(known) == 0


def test_a_provider_that_replaces_another_is_remembered_at_once() -> None:
    """And for its own time."""
    clock = Clock()
    known = Stickiness(clock.seconds)
    known.remember(("r", "c"), "p", 10)
    known.remember(("r", "c"), "q", 2)
    assert known.provider_of(("r", "c"), 2) == "q"
    clock.advance(2)
    assert known.provider_of(("r", "c"), 2) is None


def test_what_was_used_longest_ago_is_forgotten_first() -> None:
    """Memory is bounded, whatever callers name their sessions."""
    clock = Clock()
    known = Stickiness(clock.seconds, most=3)
    for session in "abc":
        known.remember(("r", "c", session), "p", 10)
    clock.advance(1)
    known.provider_of(("r", "c", "a"), 10)
    known.remember(("r", "c", "d"), "p", 10)
    found = {session: known.provider_of(("r", "c", session), 10) for session in "abcd"}
    assert found == {"a": "p", "b": None, "c": "p", "d": "p"}


@pytest.mark.parametrize(
    ("sticky", "session", "expected"),
    [
        ("off", "s", None),
        ("client", "s", ("r", "c")),
        ("client", None, ("r", "c")),
        ("session", "s", ("r", "c", "s")),
        ("session", None, None),
    ],
)
def test_what_belongs_together(
    sticky: str, session: str | None, expected: tuple[str, ...] | None
) -> None:
    """Sessions of two clients are two, however they are called."""
    route = Route(path="/r", name="r", providers=("p", "q"), sticky=sticky)  # type: ignore[arg-type]  # a word of the table above
    assert key_of(route, "c", session) == expected
