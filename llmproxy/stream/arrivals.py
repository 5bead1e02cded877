"""Whether a stream came as it was made, or was held back on its way and sent on in blocks.

A model writes one token after the other, so that its events come one by one.  Where some hop holds
them back, many events come at once, and then nothing for a while (ADR-0036).
"""

from __future__ import annotations

_EVENTS = 32
"""Fewer events tell nothing: a short answer may be made at once."""

_EVENTS_A_BURST = 8
"""Events that come together, on average, where a hop collects them."""

_SECONDS_A_BURST = 0.25
"""Seconds between two bursts, on average: a model that is quick sends its bursts quickly, too."""


def are_held_back(*, events: int, chunks: int, at_once: int, seconds: float) -> bool:
    """Return whether the events of a stream came in bursts.

    It is a hint, and no proof: a provider may make its events so.

    Args:
        events: how many there were.
        chunks: reads that brought them.
        at_once: those of the reads that came right behind another.
        seconds: from the request to the last chunk.
    """
    bursts = max(1, chunks - at_once)
    return events >= max(_EVENTS, bursts * _EVENTS_A_BURST) and seconds >= bursts * _SECONDS_A_BURST
