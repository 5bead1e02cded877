"""``make bench-quick``: what one event and one request cost, in this process, in under a minute.

Needs nothing but Python and the daemon's own dependencies, so that it can be run anywhere, before
and after a change.  Times are processor time of this process, in microseconds; the least of several
is the figure to compare, and how far the median lies from it tells how quiet the machine was.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

from bench import results

KEPT = results.RESULTS / "quick.json"

REPEATS = 9
"""How often each case is measured."""


class Spread(NamedTuple):
    """Microseconds for one, over the repeats."""

    least: float
    median: float
    most: float


class Case(NamedTuple):
    """Something that is measured.

    Attributes:
        times: how many times it is done in one repeat, at full scale.
        run: does it so many times, and returns the processor time of that in seconds.
    """

    name: str
    times: int
    run: Callable[[int], float]


def measure(case: Case, scale: float, repeats: int = REPEATS) -> Spread:
    """Measure one case, after a warm-up."""
    count = max(2, int(case.times * scale))
    case.run(max(2, count // 10))
    times = sorted(case.run(count) / count * 1e6 for _ in range(repeats))
    return Spread(times[0], median(times), times[-1])


def change(now: float, before: float | None) -> str:
    """Return by how many percent a figure has changed, or nothing where there was none."""
    return f"{100 * (now - before) / before:+.0f} %" if before else ""


def line(name: str, now: Spread, before: Mapping[str, Any]) -> str:
    """Return one line of the table."""
    past = before.get(name)
    least = None if past is None else past[0]
    figures = "".join(f"{figure:9.2f}" for figure in now)
    return f"{name:<48}{figures}  {change(now.least, least):>7}".rstrip()


def earlier(path: Path, machine: Mapping[str, Any]) -> tuple[Mapping[str, Any], str]:
    """Return the figures kept in ``path``, and which they are; none where they do not compare."""
    try:
        kept = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}, "nothing to compare with yet"
    if kept["machine"] != machine:
        return {}, f"not compared: {path.name} is of another machine"
    return kept[
        "figures"
    ], f"change: from {kept['commit'] or 'a tree'} of {kept['date']}, of the least"


def options(args: Sequence[str]) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(prog="make bench-quick ARGS=...", description=__doc__)
    add = parser.add_argument
    add("--scale", type=float, default=1.0, help="times as many iterations as usual (default 1)")
    add("--only", default="", help="only the cases whose names have this in them")
    add("--file", type=Path, default=KEPT, help="compare with this result, and keep this one there")
    add("--no-keep", action="store_true", help="compare only")
    found = parser.parse_args(args)
    if found.scale <= 0:
        parser.error("--scale is above zero")
    return found


def main(args: Sequence[str]) -> int:
    """Measure everything, print a table, and keep the figures."""
    from bench.quick_cases import every
    from bench.quick_loop import loopback

    asked = options(args)
    machine, commit = results.machine(), results.commit()
    before, which = earlier(asked.file, machine)
    print(f"{results.describe(machine)}; commit {commit or 'unknown'}; {which}")
    print(f"{'µs':<48}{'least':>9}{'median':>9}{'most':>9}")
    figures: dict[str, Spread] = {}

    def tell(case: Case) -> None:
        if asked.only in case.name:
            figures[case.name] = measure(case, asked.scale)
            print(line(case.name, figures[case.name], before), flush=True)

    for case in every():
        tell(case)
    with loopback() as cases:
        for case in cases:
            tell(case)
    if not (asked.no_keep or asked.only):
        when = results.now().isoformat()
        content = {"date": when, "commit": commit, "machine": machine, "figures": figures}
        results.keep(asked.file, content)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
