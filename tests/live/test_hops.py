"""The doctor before real hops, in front of llmproxy and behind it: each verdict is right.

A cell is a program, what it is told, and its side (``hop_cells.py``).  All cells are examined at
the same time, once, for most of an examination is waiting; each cell is a test of its own.  The
table in ``docs/buffering.rst`` is made of the same: ``make docs-hops`` writes it, and a test
compares it.
"""

from __future__ import annotations

import contextlib
import os
import re
import textwrap
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import zip_longest
from pathlib import Path
from typing import NamedTuple

import pytest

from llmproxy.cli.doctor.diagnosis import Diagnosis, conclude
from llmproxy.cli.doctor.examination import Checks, Observations, examine
from llmproxy.cli.doctor.exchange import Trust
from llmproxy.cli.doctor.target import target
from llmproxy.cli.doctor.verdict import Kind, Level, Verdict
from tests.live.hop_cells import (
    BEFORE,
    BEHIND,
    CELLS,
    CUT,
    DEFAULTS,
    GZIP,
    LIMIT,
    MENDED,
    NAMES,
    PROGRAMS,
    SMALL,
    TAKERS,
    TITLES,
    Cell,
    is_tried,
)
from tests.support.daemon import ROOT, Daemon, provider_table, route_table
from tests.support.hops import Site, hop, hops, is_installed, version
from tests.support.paced import PacedServer
from tests.support.sockets import Provider

PACE = "/-/pace"
QUERY = "?n=10&interval_ms=400&bytes=250"
"""Slow enough that a busy machine joins no events, and that HAProxy's 200 ms are seen."""
LONG_QUERY = "?n=36&interval_ms=150&bytes=200"
"""Of several blocks, where a block is small."""

CHECKS = Checks(timeout_s=60.0, stall_s=None, patience_s=1.5)
FLOOD_CHECKS = Checks(timeout_s=60.0, stall_s=3.0, patience_s=1.5)
LIMIT_CHECKS = Checks(timeout_s=60.0, stall_s=None, patience_s=1.5, idle_s=5.0)
ALL_CHECKS = Checks(timeout_s=60.0, stall_s=3.0, patience_s=1.5, idle_s=5.0)
FLOODS = 6
"""How many may send as much as they can at the same time."""


class Order:
    """Keeps what is loud for the end: no flood begins before every stream has been timed.

    Args:
        count: how many examinations there are.
    """

    def __init__(self, count: int) -> None:
        self._left = count
        self._lock = threading.Lock()
        self._quiet = threading.Event()
        self._floods = threading.Semaphore(FLOODS)

    def examine(self, url: str, checks: Checks) -> Observations:
        """Examine one URL."""
        with contextlib.ExitStack() as quiet, contextlib.ExitStack() as loud:
            quiet.callback(self._arrive)

            def tell(words: str) -> None:
                loud.close()
                if words == "a slow reader":
                    quiet.close()
                    self._quiet.wait()
                    loud.enter_context(self._floods)

            return examine(target(url), checks, Trust(), tell)

    def _arrive(self) -> None:
        with self._lock:
            self._left -= 1
            if not self._left:
                self._quiet.set()


class Seen(NamedTuple):
    """What the doctor says of a cell.

    Args:
        found: of all stations, from the client's side to the provider's.
        at: which of them is the hop's.
    """

    found: Diagnosis
    at: int

    @property
    def verdict(self) -> Verdict:
        """What is thought of the hop's URL."""
        return self.found.verdicts[self.at]

    def words(self) -> str:
        """Return all that is said, for who reads a failure."""
        lines = [
            f"{verdict.target}: {finding.text} (late: {verdict.late_s})"
            for verdict in self.found.verdicts
            for finding in verdict.findings
        ]
        return "\n".join(
            [*lines, *(f"{guilt.kind}: {guilt.words}" for guilt, _ in self.found.guilts)]
        )

    @property
    def bad(self) -> list[list[Kind]]:
        """What is bad at each station."""
        return [
            [one.kind for one in verdict.findings if one.level in (Level.FATAL, Level.BAD)]
            for verdict in self.found.verdicts
        ]


@contextlib.contextmanager
def running(cells: Sequence[Cell], origins: dict[str, int]) -> Iterator[dict[Cell, str]]:
    """Run the hops of all cells; a program is one process, unless it can have one configuration."""
    groups: dict[tuple[str, str], list[Cell]] = {}
    for cell in cells:
        key = (cell.kind, cell.told if cell.kind == "next" else "")
        groups.setdefault(key, []).append(cell)

    with contextlib.ExitStack() as stack, ThreadPoolExecutor() as threads:

        def start(group: list[Cell]) -> contextlib.AbstractContextManager[list[str]]:
            tolds = [PROGRAMS[cell.kind][cell.told] for cell in group]
            sites = [
                Site(origins[cell.side], told.lines, told.around)
                for cell, told in zip(group, tolds, strict=True)
            ]
            return hops(group[0].kind, sites)

        managers = [start(group) for group in groups.values()]
        started = threads.map(stack.enter_context, managers)
        found: dict[Cell, str] = {}
        for group, urls in zip(groups.values(), started, strict=True):
            found |= dict(zip(group, urls, strict=True))
        yield found


def ways(urls: dict[str, str]) -> str:
    """Return the configuration of a daemon with a route to each URL, by its name."""
    tables = [
        provider_table(name, url=url, dialect="raw") + route_table(f"/{name}", name)
        for name, url in urls.items()
    ]
    return "".join(tables)


def checks_of(cell: Cell, *, is_hop: bool) -> Checks:
    """Return what is tried; the slow reader only where it tells something, for it costs most."""
    if cell.told == LIMIT:
        return LIMIT_CHECKS
    floods = cell.told == DEFAULTS or (cell.told == MENDED and cell.kind in TAKERS)
    return FLOOD_CHECKS if floods and is_hop else CHECKS


@pytest.fixture(scope="module")
def matrix(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> dict[Cell, Seen]:
    """What the doctor says of each cell that a test asks for and whose program is installed."""
    calls = [getattr(item, "callspec", None) for item in request.session.items]
    wanted = [call.params.get("cell") for call in calls if call is not None]
    cells = [cell for cell in CELLS if cell in wanted and is_installed(cell.kind)]
    names = {cell: f"hop-{number}" for number, cell in enumerate(cells)}

    def folder() -> Path:
        return tmp_path_factory.mktemp("daemon")

    with contextlib.ExitStack() as stack:
        provider = stack.enter_context(Provider(PacedServer(), send_buffer=65536))
        inner = stack.enter_context(Daemon(folder(), ways({"direct": provider.url})))
        origins = {BEFORE: inner.port, BEHIND: provider.port}
        at = stack.enter_context(running(cells, origins))
        behind = {names[cell]: at[cell] for cell in cells if cell.side == BEHIND}
        outer = stack.enter_context(Daemon(folder(), ways(behind)))
        direct = f"http://127.0.0.1:{inner.port}/direct"
        queries: dict[str, str] = {}
        stations, asked = {}, {direct: ALL_CHECKS, provider.url: ALL_CHECKS}
        for cell in cells:
            urls = [f"{at[cell]}/direct", direct]
            if cell.side == BEHIND:
                urls = [f"http://127.0.0.1:{outer.port}/{names[cell]}", at[cell]]
            stations[cell] = [*urls, provider.url]
            if cell.told == SMALL:
                queries |= dict.fromkeys({*urls} - {direct}, LONG_QUERY)
            asked = {url: checks_of(cell, is_hop=url.startswith(at[cell])) for url in urls} | asked
        order = Order(len(asked))
        with ThreadPoolExecutor(len(asked)) as threads:
            full = [f"{url}{PACE}{queries.get(url, QUERY)}" for url in asked]
            seen = dict(zip(asked, threads.map(order.examine, full, asked.values()), strict=True))
    return {
        cell: Seen(conclude([seen[url] for url in urls]), 0 if cell.side == BEFORE else 1)
        for cell, urls in stations.items()
    }


@pytest.mark.timeout(300)
@pytest.mark.parametrize("cell", CELLS, ids=", ".join)
def test_what_a_hop_does_is_found_and_put_down_to_it(cell: Cell, matrix: dict[Cell, Seen]) -> None:
    """And to nobody else; the lines that are advised are such as a cell has."""
    if not is_installed(cell.kind):
        pytest.skip(f"{cell.kind} is not installed")
    seen, does = matrix[cell], cell.does
    found, at = seen.found, seen.at
    assert seen.bad[at] == list(does.bad), seen.words()
    assert not any(seen.bad[at + 1 :]), seen.words()
    assert seen.bad[0] in ([], list(does.bad)), seen.words()
    assert found.code == (1 if does.bad else 0)
    assert {guilt.kind for guilt, _ in found.guilts} == {*does.bad, *does.also}, seen.words()
    station, behind = found.verdicts[at], found.verdicts[at + 1]
    for guilt, pieces in found.guilts:
        assert (guilt.at, guilt.before) == (station.target, behind.target), seen.words()
        assert tuple(guilt.programs) == does.names, seen.words()
        own = [piece for piece in pieces if piece.program == NAMES[cell.kind]]
        assert own, guilt
        assert all(is_tried(cell.kind, piece.lines) for piece in own if piece.tried), own


@pytest.mark.parametrize("cell", [cell for cell in CELLS if CUT in cell.does.bad], ids=", ".join)
def test_a_silence_that_a_hop_cuts_is_timed(cell: Cell, matrix: dict[Cell, Seen]) -> None:
    """A limit of 3 s is seen as such; Envoy says it a second later, and some hops not at all."""
    if not is_installed(cell.kind):
        pytest.skip(f"{cell.kind} is not installed")
    words = matrix[cell].verdict.words
    if "waits for ever" not in words:
        cut = re.match(r"cut after (\d\.\d) s of silence", words)
        assert cut, words
        assert 2.0 < float(cut[1]) < 5.0, words


@pytest.mark.parametrize("cell", [cell for cell in CELLS if cell.told == SMALL], ids=", ".join)
def test_the_size_of_a_buffer_is_told(cell: Cell, matrix: dict[Cell, Seen]) -> None:
    """As nginx's configuration has it."""
    if not is_installed(cell.kind):
        pytest.skip(f"{cell.kind} is not installed")
    assert matrix[cell].verdict.words.startswith("held in blocks of 1,024 bytes")


def test_nginx_as_it_comes_is_refused_by_envoy() -> None:
    """It asks in HTTP/1.0; the doctor tells that, and the line that changes it."""
    for kind in ("nginx", "envoy"):
        if not is_installed(kind):
            pytest.skip(f"{kind} is not installed")
    query = f"{PACE}?n=5&interval_ms=150"
    with (
        Provider(PacedServer()) as origin,
        hop("envoy", origin.port, "timeout: 0s") as inner,
        hop("nginx", inner) as outer,
        ThreadPoolExecutor() as threads,
    ):
        full = [f"http://127.0.0.1:{port}{query}" for port in (outer, inner)]
        seen = threads.map(lambda url: examine(target(url), CHECKS, Trust(), print), full)
        found = conclude([*seen])
    assert found.code == 2
    assert [one.words.partition(":")[0] for one in found.verdicts] == [
        *("refused with 426", "streams"),
    ]
    ((guilt, pieces),) = found.guilts
    assert (guilt.kind, guilt.programs) == (Kind.ASKED_IN_1_0, ["nginx"])
    assert pieces[0].lines[0] == "proxy_http_version 1.1;"


# --- the table: what a client gets through llmproxy and the hop -----------------------------------

PAGE = ROOT / "docs" / "buffering.rst"
WRITE = os.environ.get("LLMPROXY_TEST_WRITE_HOPS") == "1"
BEGIN = ".. What follows is written by `make docs-hops`.\n\n"
END = "\n.. What precedes is written by `make docs-hops`.\n"
COLUMNS = (
    *("program", "holds a stream back", "told to compress", "a broken body"),
    *("tells that a client left", "cuts a silence"),
)
WIDTHS = (15, 15, 12, 13, 13, 12)
SHORT = {
    Kind.LATE: "each event 200 ms",
    Kind.BLOCKS: "in blocks",
    Kind.HELD: "to the end",
    Kind.HELD_AT_FIRST: "the first bytes",
    Kind.COMPRESSED: "to the end: it compresses",
}


def held(seen: Seen) -> str:
    """Return whether a hop holds a stream back as it comes.

    It is asked at the hop: through llmproxy the doctor may miss the lateness on a busy machine.
    """
    return ", ".join(SHORT[kind] for kind in seen.bad[seen.at]) or "no"


def compressed(seen: Seen) -> str:
    """Return what becomes of a stream if a hop is told to compress it."""
    if {Kind.COMPRESSED, Kind.HELD} & {*seen.bad[0]}:
        return "holds it"
    return "does not" if seen.found.seen[0].stream.coding is None else "streams"


def broken(seen: Seen) -> str:
    """Return what becomes of a broken body."""
    kinds = {one.kind for one in seen.found.verdicts[0].findings}
    if Kind.BREAK_HIDDEN in kinds:
        return "looks whole"
    return "never ends" if Kind.BREAK_LOST in kinds else "stays broken"


def left(seen: Seen) -> str:
    """Return whether a hop tells that a client left."""
    kinds = {one.kind for one in seen.found.verdicts[0].findings}
    if Kind.CANCEL_LOST in kinds:
        return "no"
    return "not in silence" if Kind.CANCEL_LOST_IN_SILENCE in kinds else "yes"


def cuts(seen: Seen) -> str:
    """Return how a hop with a limit on silence cuts."""
    words = seen.found.verdicts[0].words
    if CUT not in seen.bad[0]:
        return "no"
    if "waits for ever" in words:
        return "yes: never ends"
    return "yes: looks whole" if "whole" in words else "yes"


def row(kind: str, matrix: dict[Cell, Seen]) -> tuple[str, ...]:
    """Return a program's row of the table, by what was seen."""

    def of(told: str, words: Callable[[Seen], str]) -> str:
        before, behind = (words(matrix[Cell(kind, told, side)]) for side in (BEFORE, BEHIND))
        return before if before == behind else f"before: {before}; behind: {behind}"

    numbers = ".".join(version(kind).split(".")[:2])
    return (
        f"{TITLES[kind]} {numbers}",
        of(DEFAULTS, held),
        of(GZIP if GZIP in PROGRAMS[kind] else DEFAULTS, compressed),
        of(DEFAULTS, broken),
        of(DEFAULTS, left),
        of(LIMIT, cuts) if LIMIT in PROGRAMS[kind] else "it has no limit",
    )


def grid(rows: Sequence[Sequence[str]]) -> str:
    """Return a table of reStructuredText, its cells wrapped."""
    rule = "+" + "+".join("-" * (width + 2) for width in WIDTHS) + "+"
    lines = [rule]
    for number, one in enumerate(rows):
        cells = [
            textwrap.wrap(cell, width, break_long_words=False)
            for cell, width in zip(one, WIDTHS, strict=True)
        ]
        for parts in zip_longest(*cells, fillvalue=""):
            padded = [f" {part:{width}} " for part, width in zip(parts, WIDTHS, strict=True)]
            lines.append(f"|{'|'.join(padded)}|")
        lines.append(rule if number else rule.replace("-", "="))
    return "\n".join(lines) + "\n"


def rows_of(text: str) -> dict[str, tuple[str, ...]]:
    """Return the rows of such a table by their programs."""
    found = {}
    for part in re.split(r"^\+[-+=]*\+\n", text, flags=re.MULTILINE)[2:]:
        lines = [line.strip("|").split("|") for line in part.splitlines()]
        cells = tuple(" ".join(" ".join(words).split()) for words in zip(*lines, strict=True))
        if cells:
            found[cells[0]] = cells
    return found


def test_the_table_in_the_docs_is_what_was_seen(
    request: pytest.FixtureRequest, matrix: dict[Cell, Seen]
) -> None:
    """Rows of programs and of versions that are not here are left out."""
    kinds = [
        kind for kind in PROGRAMS if all(cell in matrix for cell in CELLS if cell.kind == kind)
    ]
    seen = {found[0]: found for found in (row(kind, matrix) for kind in kinds)}
    before, begin, rest = PAGE.read_text().partition(BEGIN)
    table, end, after = rest.partition(END)
    if WRITE:
        assert len(seen) == len(PROGRAMS), "not every program is installed"
        PAGE.write_text(before + begin + grid([COLUMNS, *seen.values()]) + end + after)
        return
    written = rows_of(table)
    assert len(written) == len(PROGRAMS)
    if not seen.keys() & written.keys():
        pytest.skip("no program of the table is installed in that version")
    assert {name: seen[name] for name in seen if name in written} == {
        name: written[name] for name in seen if name in written
    }
