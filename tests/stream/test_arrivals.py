"""Which streams look as if a hop held them back."""

from __future__ import annotations

import pytest

from llmproxy.stream.arrivals import are_held_back


@pytest.mark.parametrize(
    ("events", "chunks", "at_once", "seconds"),
    [
        (200, 1, 0, 6.0),  # all in one piece, at the end
        (200, 40, 39, 6.0),  # the same, in many reads
        (200, 8, 0, 6.0),  # in blocks
        (200, 60, 52, 6.0),  # in blocks of several reads each
        (32, 1, 0, 0.25),
    ],
)
def test_held_back(events: int, chunks: int, at_once: int, seconds: float) -> None:
    """Many events in few bursts, and a silence before each."""
    assert are_held_back(events=events, chunks=chunks, at_once=at_once, seconds=seconds)


@pytest.mark.parametrize(
    ("events", "chunks", "at_once", "seconds"),
    [
        (200, 200, 0, 6.0),  # one by one
        (200, 200, 20, 6.0),  # a few of them together
        (200, 50, 0, 6.0),  # four tokens a step
        (200, 25, 0, 0.5),  # a model that is very quick
        (200, 1, 0, 0.2),  # an answer from a cache
        (31, 1, 0, 6.0),  # a short answer
        (1, 1, 0, 6.0),
        (0, 0, 0, 6.0),
    ],
)
def test_not_held_back(events: int, chunks: int, at_once: int, seconds: float) -> None:
    """Events that come one by one, quick ones, and those that are too few to tell."""
    assert not are_held_back(events=events, chunks=chunks, at_once=at_once, seconds=seconds)
