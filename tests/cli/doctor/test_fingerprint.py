"""Which cuts carry a limit, and which do not."""

from __future__ import annotations

import random

import pytest

from llmproxy.cli.doctor.fingerprint import Fingerprint, fingerprints
from llmproxy.record.cuts import Cut, Side


def cut(
    silence: float, age: float | None = None, side: Side = "client", *, waited: bool = False
) -> Cut:
    """Return one cut; it had lived for a while before the silence, if nothing else is said."""
    return Cut("r", "p", side, waited, silence, silence * 3 + 7 if age is None else age)


def jittered(seconds: float, count: int) -> list[float]:
    """Return times of one timer, as a network shows them."""
    chance = random.Random(count)
    return [seconds + chance.uniform(0, 0.2) for _ in range(count)]


def test_a_limit_on_silence() -> None:
    """Most cuts came after the same silence; the others are people."""
    chance = random.Random(1)
    people = [cut(chance.uniform(0, 40), chance.uniform(40, 300)) for _ in range(4)]
    timer = [cut(time, 60 + chance.uniform(1, 300)) for time in jittered(60, 37)]
    (found,) = fingerprints([*people, *timer])
    assert found == Fingerprint("r", "p", "client", "silence", found.seconds, 37, 41)
    assert found.seconds == pytest.approx(60.1, abs=0.11)


def test_a_limit_on_the_age() -> None:
    """Whether bytes came or not: the silences differ, and the ages agree."""
    chance = random.Random(2)
    (found,) = fingerprints([cut(chance.uniform(0, 3), age) for age in jittered(15, 9)])
    assert (found.clock, found.agreeing, found.of) == ("age", 9, 9)
    assert found.seconds == pytest.approx(15.1, abs=0.11)


def test_a_limit_on_the_wait() -> None:
    """Nothing had come: the two are the same."""
    cuts = [cut(time, time, "provider", waited=True) for time in jittered(30, 6)]
    (found,) = fingerprints(cuts)
    assert (found.clock, found.side, found.agreeing) == ("wait", "provider", 6)


def test_sides_routes_and_providers_are_told_apart() -> None:
    """Each has its own limit; one that is too rare says nothing."""
    cuts = [Cut("a", "p", "client", False, time, 100) for time in jittered(60, 5)]
    cuts += [Cut("b", "p", "client", False, time, 100) for time in jittered(30, 7)]
    cuts += [Cut("b", "q", "client", False, time, 100) for time in jittered(30, 4)]
    found = [(one.route, one.provider, round(one.seconds), one.of) for one in fingerprints(cuts)]
    assert found == [("b", "p", 30, 7), ("a", "p", 60, 5)]


@pytest.mark.parametrize("seed", range(20))
def test_people_leave_no_fingerprint(seed: int) -> None:
    """They leave when they like; those who leave at once do not count."""
    chance = random.Random(seed)
    hasty = [cut(chance.uniform(0, 0.9), chance.uniform(0, 0.9)) for _ in range(50)]
    others = [cut(chance.expovariate(0.1), chance.uniform(1, 300)) for _ in range(40)]
    assert fingerprints([*hasty, *others]) == []


def test_few_cuts_say_nothing() -> None:
    """Four that agree may be an accident, and no cut at all is none."""
    assert fingerprints([cut(60.0)] * 4) == []
    assert fingerprints([]) == []
