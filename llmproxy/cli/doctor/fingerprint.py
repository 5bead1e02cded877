"""From many cuts to the limit that made them: a timer cuts at the same time again and again.

People leave when they like; a timer does not.  Where half of the cuts of a route and a provider,
from one side, lie within some hundredths of the same time, that is no accident, and its length says
whose timer it may be.  Whether the timer counts from the last byte or from the request shows in
which of the two figures the cuts agree.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from statistics import median
from typing import Literal, NamedTuple

from llmproxy.record.cuts import Cut, Side

_FEWEST = 5
"""Fewer cuts that agree may be an accident."""

_SHARE = 0.5
"""Of the cuts of a group, how many must agree."""

_SHORTEST_S = 1.0
"""Who leaves sooner is in a hurry; no hop has such a limit."""

_WIDTH, _LEAST_WIDTH_S = 0.02, 0.25
"""How far the times of a timer lie apart: the network and the timer's own steps."""

Clock = Literal["silence", "age", "wait"]


class Fingerprint(NamedTuple):
    """Cuts that agree.

    Attributes:
        route, provider, side: as :class:`~llmproxy.record.cuts.Cut` has them.
        clock: what they agree in: the time since the last byte, since the request although bytes
            came, or since the request when none had come.
        seconds: the time.
        agreeing: how many agree.
        of: how many cuts there were of this route, provider, side and phase.
    """

    route: str
    provider: str
    side: Side
    clock: Clock
    seconds: float
    agreeing: int
    of: int


def fingerprints(cuts: Iterable[Cut]) -> list[Fingerprint]:
    """Return what some cuts carry, the largest first; where they agree in nothing, nothing."""
    groups: dict[tuple[str, str, Side, bool], list[Cut]] = defaultdict(list)
    for cut in cuts:
        groups[cut.route, cut.provider, cut.side, cut.waited].append(cut)
    found = []
    for (route, provider, side, waited), members in groups.items():
        silence = _agreeing([cut.silence_s for cut in members])
        age = _agreeing([cut.age_s for cut in members])
        clock: Clock = "wait" if waited else "age" if len(age) > len(silence) else "silence"
        times = age if clock == "age" else silence
        if len(times) >= max(_FEWEST, _SHARE * len(members)):
            seconds = round(median(times), 1)
            found.append(
                Fingerprint(route, provider, side, clock, seconds, len(times), len(members))
            )
    return sorted(found, key=lambda one: (-one.agreeing, one))


def _agreeing(times: Sequence[float]) -> list[float]:
    """Return the most times that lie close together."""
    rest = sorted(time for time in times if time >= _SHORTEST_S)
    best: list[float] = []
    first = 0
    for last, time in enumerate(rest):
        while time - rest[first] > max(_LEAST_WIDTH_S, _WIDTH * rest[first]):
            first += 1
        if last + 1 - first > len(best):
            best = rest[first : last + 1]
    return best
