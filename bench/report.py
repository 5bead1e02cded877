"""``make bench-docs``: results become the tables and the pictures of ``docs/benchmark.rst``.

Arguments are files that ``bench.compare`` has kept; their rounds count together.  The page has one
block between two comments, which is written anew; the pictures stand beside the page.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from bench import peers
from bench.build import ROOT
from bench.svg import Bar, Bars, Line, Lines, draw_bars, draw_lines
from bench.table import OURS, number
from bench.works import BUSY, Figures, combine

DOCS = ROOT / "docs"
PAGE = "benchmark.rst"

_BEGIN = '.. figures: "make bench-docs" writes them'
_END = ".. end of figures"
_BLOCK = re.compile(rf"^{re.escape(_BEGIN)}$.*?^{re.escape(_END)}$", re.MULTILINE | re.DOTALL)

_NAMES = {
    "haproxy": "HAProxy",
    "envoy": "Envoy",
    "go": "Go",
    "caddy": "Caddy",
    "traefik": "Traefik",
    "litellm": "LiteLLM",
    "portkey": "Portkey",
}
_COLOURS = {
    OURS: "#2f81f7",
    "nginx": "#2da44e",
    "envoy": "#a371f7",
    "go": "#1b9aaa",
    "haproxy": "#d1579a",
    "caddy": "#c08a1e",
    "traefik": "#7d8590",
    "aiohttp": "#db6d28",
}
"""Each is seen on a light and on a dark ground; a proxy without one has no line."""

_LONGEST = 4.0
"""A bar that is so many times ours is cut."""

Medians = Mapping[str, Mapping[str, Figures]]
"""By workload and proxy."""

Points = list[tuple[float, float]]


class Column(NamedTuple):
    """A figure of a workload; ``by`` is what it is divided by, for another unit."""

    title: str
    work: str
    figure: str
    by: float = 1


TABLES: tuple[tuple[str, tuple[Column, ...]], ...] = (
    (
        "Events and requests",
        (
            Column("W1 µs/event", "W1", "us_event"),
            Column("W1 p99 ms", "W1", "delay_p99", 1e3),
            Column("W1 PSS MiB", "W1", "pss_mib"),
            Column("W3 µs/request", "W3", "us_request"),
            Column("W3 p99 ms", "W3", "round_p99", 1e3),
        ),
    ),
    (
        "Many, long and leaving streams",
        (
            Column("W2 µs/event", "W2", "us_event"),
            Column("W2 p99 ms", "W2", "delay_p99", 1e3),
            Column("W4 KiB/stream", "W4", "kib_stream"),
            Column("W4 p99 ms", "W4", "delay_p99", 1e3),
            Column("W4 p999 ms", "W4", "delay_p999", 1e3),
            Column("W5 µs/request", "W5", "us_request"),
            Column("W7 p99 ms", "W7", "close_p99"),
        ),
    ),
    (
        "Streams that begin, and the pace of the suites",
        (
            Column("W8 µs/stream", "W8", "us_stream"),
            Column("W8T µs/stream", "W8T", "us_stream"),
            Column("W8T resumed %", "W8T", "resumed_share"),
            Column("W9 p99 ms", "W9", "beside_p99", 1e3),
            Column("W10 gap p50 ms", "W10", "gap_p50", 1e3),
            Column("W10 gap p99 ms", "W10", "gap_p99", 1e3),
            Column("streams held", "STREAMS", "max_streams"),
        ),
    ),
    (
        "Starts",
        (
            Column("answers after ms", "START", "ready_ms"),
            Column("READY=1 after ms", "START", "notified_ms"),
            Column("idle PSS MiB", "START", "idle_mib"),
        ),
    ),
)

INTERPRETERS = (
    Column("W1 µs/event", "W1", "us_event"),
    Column("W3 µs/request", "W3", "us_request"),
    Column("W8 µs/stream", "W8", "us_stream"),
    Column("READY=1 after ms", "START", "notified_ms"),
    Column("idle PSS MiB", "START", "idle_mib"),
)


# -- results --------------------------------------------------------------------------------------


def joined(results: Sequence[Mapping[str, Any]]) -> Medians:
    """Return the medians of all rounds of some results.

    Raises:
        ValueError: they are of different machines or commits.
    """
    for what in ("machine", "commit"):
        if any(result[what] != results[0][what] for result in results):
            raise ValueError(f"the results are not of one {what}")
    runs: dict[str, dict[str, list[Figures]]] = {}
    for result in results:
        for work, proxies in result["runs"].items():
            for proxy, seen in proxies.items():
                runs.setdefault(work, {}).setdefault(proxy, []).extend(seen)
    return {
        work: {proxy: combine(seen) for proxy, seen in proxies.items() if seen}
        for work, proxies in runs.items()
    }


def is_interpreter(proxy: str) -> bool:
    """Tell whether it is the daemon under a CPython that is named."""
    return bool(re.fullmatch(rf"{OURS}-\d[^-]*", proxy))


def title_of(proxy: str) -> str:
    """Return a proxy's name as readers know it."""
    kind, secure = peers.split(proxy)
    return _NAMES.get(kind, kind) + (", TLS" if secure else "")


def proxies_of(medians: Medians) -> list[str]:
    """Return all that were measured, in their usual order, but for other interpreters."""
    seen = {proxy for proxies in medians.values() for proxy in proxies}
    return [name for name in peers.EVERY if name in seen]


# -- tables ---------------------------------------------------------------------------------------


def cell(medians: Medians, column: Column, proxy: str) -> str:
    """Return a figure, in brackets where the load generator was at its end, or nothing."""
    found = medians.get(column.work, {}).get(proxy, {})
    if column.figure not in found:
        return ""
    shown = number(found[column.figure] / column.by)
    return f"({shown})" if found.get("load_share", 0) > BUSY else shown


def rows(medians: Medians, columns: Sequence[Column], proxies: Iterable[str]) -> list[list[str]]:
    """Return a line for each proxy that has one of the figures."""
    found = [["..", *(column.title for column in columns)]]
    for proxy in proxies:
        cells = [cell(medians, column, proxy) for column in columns]
        if any(cells):
            found.append([title_of(proxy), *cells])
    return found


def grid(lines: Sequence[Sequence[str]]) -> str:
    """Return a simple table of reStructuredText."""
    widths = [max(len(line[at]) for line in lines) for at in range(len(lines[0]))]
    rule = "  ".join("=" * width for width in widths)
    head, *rest = (
        "  ".join(text.ljust(width) for text, width in zip(line, widths, strict=True)).rstrip()
        for line in lines
    )
    return "\n".join((rule, head, rule, *rest, rule))


def block(results: Sequence[Mapping[str, Any]], made: Iterable[str]) -> str:
    """Return what stands between the comments of the page."""
    medians = joined(results)
    proxies = proxies_of(medians)
    tables = [(title, rows(medians, columns, proxies)) for title, columns in TABLES]
    others = [
        OURS,
        *sorted({name for seen in medians.values() for name in seen if is_interpreter(name)}),
    ]
    if len(others) > 1:
        tables.append(("The daemon by several CPythons", rows(medians, INTERPRETERS, others)))
    parts = [_BEGIN, _about(results)]
    parts += [
        f".. image:: {name}\n   :alt: {alt}" for name, alt in _PICTURES.items() if name in made
    ]
    for title, lines in tables:
        if len(lines) > 1:
            parts += [f"{title}:", grid(lines)]
    return "\n\n".join((*parts, _END))


def _about(results: Sequence[Mapping[str, Any]]) -> str:
    first, machine = results[0], results[0]["machine"]
    versions: dict[str, str] = {}
    for result in results:
        versions |= result["versions"]
    told = "\n".join(f"* {title_of(name)}: {_plain(text)}" for name, text in versions.items())
    memory = machine["memory_mib"] / 1024
    kept = [
        seen
        for result in results
        for proxies in result["runs"].values()
        for seen in proxies.values()
    ]
    rounds = min((len(seen) for seen in kept if seen), default=0)
    count = f"{rounds} round" + ("s" if rounds != 1 else "")
    return (
        f"Medians of at least {count}, {first['date'][:10]}, commit {first['commit']}, on"
        f" {machine['processors']} processors ({machine['processor']}),\n"
        f"{memory:.0f} GiB, Linux {machine['kernel']}. A figure in brackets: the load generator was"
        f" over {BUSY:.0f} % busy.\n\n{told}"
    )


def _plain(version: str) -> str:
    """Return what our own commands said of a version, or the number in what a program said."""
    if version[:1].isdigit():
        return version
    number_of = re.search(r"\d+\.\d+(\.\d+)?", version)
    return number_of[0] if number_of else "unknown"


def rewritten(page: str, made: str) -> str:
    """Return the page with another block.

    Raises:
        ValueError: it has none.
    """
    found, count = _BLOCK.subn(lambda _: made, page)
    if count != 1:
        raise ValueError(f"expected one block of figures, got {count}")
    return found


# -- pictures -------------------------------------------------------------------------------------

_PICTURES = {
    "benchmark-cost.svg": "processor time for an event and for a request, beside other proxies",
    "benchmark-delay.svg": "99th percentile of delay over streams at once",
    "benchmark-memory.svg": "memory over streams at once",
}


def pictures(medians: Medians) -> dict[str, str]:
    """Return the pictures that there are figures for, by name."""
    drawn = (_cost(medians), _delay(medians), _memory(medians))
    return {name: text for name, text in zip(_PICTURES, drawn, strict=True) if text is not None}


def _cost(medians: Medians) -> str | None:
    panels = []
    for title, work, figure in (
        ("An event of a stream", "W1", "us_event"),
        ("A request with its response", "W3", "us_request"),
    ):
        seen = medians.get(work, {})
        plain = [name for name in peers.EVERY if name in seen and not peers.split(name)[1]]
        found = [Bar(title_of(name), seen[name][figure], name == OURS) for name in plain]
        if not any(bar.ours for bar in found):
            return None
        bars = sorted((bar for bar in found if bar.name != "cpython"), key=lambda bar: bar.value)
        ours = next(bar.value for bar in bars if bar.ours)
        most = min(max(bar.value for bar in bars), _LONGEST * ours)
        panels.append(Bars(title, f"µs of processor time ({work})", bars, most))
    return draw_bars(panels)


def _delay(medians: Medians) -> str | None:
    drawn = _drawn(medians, lambda seen, _: _points(seen, "delay_p99", 1e3))
    below = (
        "streams at once, 50 events a second each (STREAMS); a line ends with the last that held"
    )
    return draw_lines(Lines("Delay over streams", below, "p99, ms", drawn, True)) if drawn else None


def _memory(medians: Medians) -> str | None:
    def points(seen: Figures, proxy: str) -> Points:
        first = medians.get("START", {}).get(proxy, {}).get("idle_mib")
        last = medians.get("W4", {}).get(proxy, {}).get("pss_mib")
        found = [] if first is None else [(0.0, first)]
        found += _points(seen, "pss_mib", 1)
        return found if last is None else [*found, (5000.0, last)]

    drawn = _drawn(medians, points)
    below = "streams at once: none (START), more and more (STREAMS), 5,000 (W4)"
    return draw_lines(Lines("Memory over streams", below, "PSS, MiB", drawn)) if drawn else None


def _points(seen: Figures, figure: str, by: float) -> Points:
    steps = [name.partition("@") for name in seen]
    found = [
        (float(step), seen[f"{figure}@{step}"] / by)
        for name, _, step in steps
        if name == figure and step
    ]
    return sorted(found)


def _drawn(medians: Medians, points: Callable[[Figures, str], Points]) -> list[Line]:
    seen = medians.get("STREAMS", {})
    lines = [
        Line(title_of(name), _COLOURS[name], points(seen[name], name))
        for name in peers.EVERY
        if name in seen and name in _COLOURS
    ]
    return [line for line in lines if line.points]


def main(args: Sequence[str]) -> int:
    """Write the block and the pictures."""
    parser = argparse.ArgumentParser(prog="python -m bench.report", description=__doc__)
    parser.add_argument("results", nargs="+", type=Path, help="files that make bench has kept")
    parser.add_argument("--docs", type=Path, default=DOCS, help="the folder of the page")
    asked = parser.parse_args(args)
    results = [json.loads(path.read_text()) for path in asked.results]
    try:
        made = pictures(joined(results))
        page = rewritten((asked.docs / PAGE).read_text(), block(results, made))
    except ValueError as error:
        print(f"nothing is written: {error}")
        return 1
    (asked.docs / PAGE).write_text(page)
    for name, text in made.items():
        (asked.docs / name).write_text(text)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
