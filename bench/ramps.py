"""The workloads that rise until a proxy can no longer: MAX by rate, STREAMS by number.

A step is sustained when every stream is whole and 99 of 100 events are less than 100 ms late.  At
STREAMS the provider must have kept its times as well: else it is not the proxy that is measured.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

from bench.rig import Bench, Measured, Target
from bench.works import LATE, WORKS, Figures, Observed, arguments, failures, figures

RATES = (
    *(500, 1000, 1500, 2000, 3000, 4000, 6000, 8000, 10_000, 12_500, 15_000, 17_500, 20_000),
    *(22_500, 25_000, 27_500, 30_000, 35_000, 40_000, 45_000, 50_000, 55_000, 60_000, 70_000),
    *(80_000, 90_000, 100_000, 110_000, 125_000, 150_000),
)
"""Events a second, of MAX."""

STREAMS = (
    *(100, 250, 500, 750, 1000, 1250, 1500, 1750, 2000, 2250, 2500, 2750, 3000),
    *(3500, 4000, 5000),
)
"""Streams at once, of STREAMS."""

MAX_DELAY_US = 100_000.0

_REST = 2.0
"""Seconds in which what was cut is cleared away."""


def is_sustained(load: Mapping[str, Any]) -> bool:
    """Tell whether a step went well."""
    delay = load["delay_us"]
    return not failures(load) and delay is not None and delay["p99"] < MAX_DELAY_US


def rate_arguments(rate: int) -> list[str]:
    """Return the load generator's arguments for one step of MAX."""
    interval = 200_000_000 // rate
    return arguments(WORKS["MAX"], 0, step=max(10, 4_000_000 // interval), interval=interval)


def highest(bench: Bench, target: Target) -> Figures:
    """Find the highest rate that holds."""
    low, high, found = 0, len(RATES) - 1, Figures(max_events_s=0)
    while low <= high:
        middle = (low + high) // 2
        seen = bench.observe(target, rate_arguments(RATES[middle]))
        if is_sustained(seen.load):
            found = _of_step(figures(WORKS["MAX"], seen))
            found["max_events_s"] = RATES[middle]
            low = middle + 1
        else:
            high = middle - 1
            time.sleep(_REST)
    return found


def most_streams(bench: Bench, target: Target, proxy: Measured) -> Figures:
    """Find how many streams hold; each step's delays and memory stand behind ``@`` and its number.

    A step that does not hold is tried a second time, for it ends the search.
    """
    work, found = WORKS["STREAMS"], Figures(max_streams=0)
    for count in STREAMS:
        args = arguments(work, 0, step=count)
        seen = bench.observe(target, args, proxy)
        if not _holds(seen):
            time.sleep(_REST)
            seen = bench.observe(target, args, proxy)
        step = figures(work, seen)
        if not _holds(seen):
            for name in ("load_share", "late_share", "delay_p99"):
                if name in step:
                    found[f"beyond_{name.removeprefix('delay_')}"] = step[name]
            break
        found |= _of_step(step)
        found["max_streams"] = count
        for name in ("delay_p50", "delay_p99", "pss_mib"):
            found[f"{name}@{count}"] = step[name]
    return found


def _holds(seen: Observed) -> bool:
    late = figures(WORKS["STREAMS"], seen).get("late_share", 0)
    return is_sustained(seen.load) and late <= LATE


def _of_step(step: Figures) -> Figures:
    keep = ("delay_p50", "delay_p99", "load_share", "late_share", "pss_mib")
    return {name: step[name] for name in keep if step.get(name)}
