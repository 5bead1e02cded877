"""Several files are read as one ledger: a record that is in two of them counts once."""

from __future__ import annotations

import re
import shutil
from contextlib import closing
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmproxy.record.cuts import cuts_of
from llmproxy.record.ledger import Ledger
from llmproxy.record.ledger_report import (
    checkpoints_of,
    refused_in,
    tokens_by_client,
    tunnels_of,
    usage_of,
)
from llmproxy.record.ledger_source import Files, Source
from llmproxy.record.ledger_steps import LedgerError
from llmproxy.record.trace import Trace
from tests.support.made_records import OTHERS, TRACES, numbered
from tests.support.records import trace


def write(path: Path, *batches: list[Trace]) -> str:
    """Add these traces to a ledger; return its name."""
    with closing(Ledger(str(path), keep_s=None, wall=lambda: 0.0)) as ledger:
        for batch in batches:
            ledger.put(batch)
    return str(path)


def reports(source: Source) -> list[object]:
    """Return all that is reported of a ledger; the order of what is equally late does not count."""
    return [
        usage_of(source, ["client", "model", "day"]),
        refused_in(source),
        tunnels_of(source),
        sorted(tokens_by_client(source, source.engine.ever).items()),
        sorted(checkpoints_of(source), key=lambda one: (one.session, one.client or "")),
        sorted(map(repr, cuts_of(source))),
    ]


@settings(max_examples=settings().max_examples * 2 // 5)
@given(st.lists(TRACES | OTHERS, max_size=3), st.lists(TRACES | OTHERS, max_size=3))
def test_a_copy_and_its_original_are_one(
    tmp_path_factory: pytest.TempPathFactory, early: list[list[Trace]], late: list[list[Trace]]
) -> None:
    """A file that was copied, and went on elsewhere, changes no report, in whatever order."""
    numbered([*early, *late])
    folder = tmp_path_factory.mktemp("ledgers")
    whole = write(folder / "whole", *early)
    copy = str(shutil.copy(whole, folder / "copy"))
    write(folder / "whole", *late)
    expected = reports(Files([whole]))
    for paths in ([whole, copy], [copy, whole], [copy, whole, copy]):
        found = reports(Files(paths))
        assert _comparable(found) == _comparable(expected)


def _comparable(found: list[object]) -> list[str]:
    """Of a session that goes on in a second file, an unknown sum may have become zero.

    Its last trace is the later one there, and the one that was written last in a single file.
    """
    words = (repr(one).replace("_tokens=None", "_tokens=0") for one in found)
    return [re.sub(r"last_trace='[0-9]+'", "", one) for one in words]


def test_a_session_on_two_hosts_is_added_up(tmp_path: Path) -> None:
    """Only what both files have counts once, not what they have of the same session."""
    fields = {"client": "c", "session": "s", "time": "2026-11-01T00:00:00.000Z"}
    west = write(tmp_path / "west", [trace(1, input_tokens=1, **fields)])
    both = str(shutil.copy(west, tmp_path / "both"))
    write(tmp_path / "west", [trace(2, input_tokens=10, **fields)])
    write(tmp_path / "both", [trace(3, input_tokens=100, **fields)])
    for paths in ([west, both], [both, west]):
        (found,) = checkpoints_of(Files(paths))
        assert (found.totals.requests, found.totals.input_tokens) == (3, 111)


def test_a_session_whose_requests_are_gone_counts_once(tmp_path: Path) -> None:
    """Its checkpoint outlives its requests, and a copy has the same one."""
    path = str(tmp_path / "ledger")
    with closing(Ledger(path, keep_s=60.0, wall=lambda: 1_793_577_600.0)) as ledger:
        fields = {"client": "c", "session": "s"}
        ledger.put([trace(1, time="2026-11-01T00:00:00.000Z", **fields)])
        ledger.put([trace(2, time="2026-11-01T23:59:59.000Z", **fields)])
        ledger.maintenance()
    copy = str(shutil.copy(path, tmp_path / "copy"))
    assert checkpoints_of(Files([path, copy])) == checkpoints_of(Files([path]))


def test_more_files_than_sqlite_attaches(tmp_path: Path) -> None:
    """Hosts may be many; a file that is named twice is one."""
    paths = [write(tmp_path / str(one), [trace(one, client="c")]) for one in range(20)]
    assert usage_of(Files([*paths, *paths]), ["client"])[("c",)].requests == 20


def test_files_of_other_instances_are_added_up(tmp_path: Path) -> None:
    """Beside some that have a record in common, and one that is empty."""
    west = write(tmp_path / "west", [trace(1, client="c", instance="west")])
    copy = str(shutil.copy(west, tmp_path / "copy"))
    east = write(tmp_path / "east", [trace(2, client="c", instance="east")])
    empty = write(tmp_path / "empty")
    for paths in ([west, east], [west, east, copy, west], [east, empty, copy, west]):
        assert usage_of(Files(paths), ["client"])[("c",)].requests == 2


def test_the_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    """Behind others, too."""
    good = write(tmp_path / "good", [trace(1)])
    with pytest.raises(LedgerError, match="nowhere: there is no such file"):
        refused_in(Files([good, str(tmp_path / "nowhere")]))
