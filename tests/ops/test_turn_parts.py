"""The parts that a watch over turns names are there, and are what they were when it stops."""

from __future__ import annotations

from llmproxy.net.timers import Timers
from llmproxy.net.turn_watch import TurnWatch
from llmproxy.ops.turn_parts import _PARTS, name_parts


def test_named_parts_are_put_back() -> None:
    """Each method is replaced by one that is timed, and comes back."""
    owners = [(owner, attribute) for owner, attribute, _ in _PARTS] + [(Timers, "callLater")]
    before = [getattr(owner, attribute) for owner, attribute in owners]
    watch = TurnWatch(lambda: 0.0, lambda: 0.0, lambda seconds: None)
    name_parts(watch)
    assert all(
        getattr(owner, attribute) is not method
        for (owner, attribute), method in zip(owners, before, strict=True)
    )
    watch.stop()
    assert [getattr(owner, attribute) for owner, attribute in owners] == before
