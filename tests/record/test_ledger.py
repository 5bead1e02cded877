"""The ledger: what it keeps of traces and sessions, and what happens when the disk fails."""

from __future__ import annotations

import json
import os
import sqlite3
import subprocess
from collections.abc import Iterator
from contextlib import closing, contextmanager
from math import inf
from pathlib import Path

import pytest

from llmproxy.record import ledger as module
from llmproxy.record.ledger import Ledger
from llmproxy.record.ledger_steps import LedgerError
from llmproxy.record.sink_queue import Retry
from llmproxy.record.trace import CONTENT, NAMES, Attempt, timestamp
from tests.record.conftest import Disk
from tests.support.records import ids_of, query, trace

NOW = 1_800_000_000.0
DAY = 86400.0


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """The path of the ledger."""
    return tmp_path / "folder" / "ledger.sqlite3"


@pytest.fixture
def ledger(path: Path) -> Iterator[Ledger]:
    """A ledger that keeps a day."""
    path.parent.mkdir()
    ledger = Ledger(str(path), keep_s=DAY, wall=lambda: NOW)
    yield ledger
    ledger.close()


@contextmanager
def held(path: Path) -> Iterator[None]:
    """Hold the lock of the ledger, as another writer does."""
    with closing(sqlite3.connect(path, isolation_level=None)) as other:
        other.execute("BEGIN EXCLUSIVE")
        yield
        other.execute("ROLLBACK")


# --- what is kept ---------------------------------------------------------------------------------


def test_every_field_is_kept(ledger: Ledger, path: Path) -> None:
    """Each field has its type; unknown is NULL, and lists are JSON."""
    full = trace(
        1,
        client="c",
        model="gpt-\N{SNOWMAN}",
        stream=True,
        status=200,
        is_complete=True,
        attempts=[Attempt("p", "ok", 0.5)],
        bytes_out=2**40,
        head_s=0.25,
        input_tokens=0,
        output_tokens=7,
        usage="reported",
        degraded=["event"],
    )
    ledger.put([full, trace(2)])
    one, two = (dict(zip(NAMES, row, strict=True)) for row in query(path, "SELECT * FROM traces"))
    for record, row in ((full, one), (trace(2), two)):
        row |= {name: json.loads(row[name]) for name in ("attempts", "degraded")}
        expected = {name: getattr(record, name) for name in NAMES}
        expected["attempts"] = [
            {"provider": "p", "outcome": "ok", "seconds": 0.5, "cause": None}
            for _ in record.attempts
        ]
        assert row == expected
    assert two["input_tokens"] is None


def test_no_content_is_kept(ledger: Ledger, path: Path) -> None:
    """The file never has the text that a route captures."""
    content = dict.fromkeys(CONTENT, "needle")
    ledger.put([trace(1, **content)])
    ledger.close()
    assert ids_of(path) == [1]
    assert b"needle" not in path.read_bytes()


def test_an_impossible_word_or_number_loses_no_trace(ledger: Ledger, path: Path) -> None:
    """Half a surrogate pair becomes a mark; an impossible count is unknown."""
    ledger.put([trace(0, model="a"), trace(1, model="x\ud800"), trace(2, input_tokens=2**70)])
    ledger.put([trace(3, input_tokens=10**12 + 1), trace(4, input_tokens=-1)])
    assert query(path, "SELECT id, model, input_tokens FROM traces") == [
        ("0", "a", None),
        ("1", "x?", None),
        ("2", None, None),
        ("3", None, None),
        ("4", None, None),
    ]


def test_a_session_is_checkpointed(ledger: Ledger, path: Path) -> None:
    """Each session and client has its totals and its last trace; an unknown caller has none."""

    def at(number: int, minute: int, **fields: object) -> object:
        return trace(number, time=f"2026-11-01T00:0{minute}:00.000Z", **fields)

    first = [
        at(9, 1, session="s", client="c", is_complete=True, usage="reported", input_tokens=5),
        at(2, 3, session="s", client="c", usage="partial", input_tokens=1),
        at(3, 2, session="s"),
        at(4, 2, client="c"),
    ]
    ledger.put(first)  # type: ignore[arg-type]  # they are traces
    ledger.put([at(1, 2, session="s", client="c", is_complete=True)])  # type: ignore[list-item]  # so is it
    words = (
        "SELECT client, requests, complete, unreported, input_tokens, output_tokens, last_trace, "
        "substr(first_time, 16, 1), substr(last_time, 16, 1) FROM sessions ORDER BY client"
    )
    assert query(path, words) == [
        ("c", 3, 2, 2, 6, None, "1", "1", "3"),
    ]


# --- what is not kept for ever --------------------------------------------------------------------


def test_old_rows_are_deleted_in_small_steps(
    ledger: Ledger, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A step deletes a few rows; the next one comes soon, while there are more."""
    monkeypatch.setattr(module, "_STEP", 10)
    ages = [1.5 * DAY] * 25 + [0.5 * DAY] * 5
    ledger.put(
        [
            trace(number, time=timestamp(NOW - age), session=f"s-{number}", client="c")
            for number, age in enumerate(ages)
        ]
    )
    left, rests = [], []
    for _ in range(3):
        rests.append(ledger.maintenance())
        left.append(len(ids_of(path)))
    assert left == [20, 10, 5]
    assert rests[0] == rests[1] < 1 < rests[2]
    assert ids_of(path) == [25, 26, 27, 28, 29]
    assert query(path, "SELECT count(*) FROM sessions") == [(5,)]


def test_a_session_that_goes_on_outlives_its_first_traces(ledger: Ledger, path: Path) -> None:
    """Its totals stay until its last request is too old."""
    ledger.put([trace(1, time=timestamp(NOW - 2 * DAY), session="s", client="c")])
    ledger.put([trace(2, time=timestamp(NOW), session="s", client="c")])
    ledger.maintenance()
    assert ids_of(path) == [2]
    assert query(path, "SELECT requests FROM sessions") == [(2,)]


def test_keep_off_deletes_nothing(path: Path) -> None:
    """``keep = "off"`` asks for no maintenance."""
    path.parent.mkdir()
    ledger = Ledger(str(path), keep_s=None, wall=lambda: NOW)
    ledger.put([trace(1, time=timestamp(0.0))])
    assert ledger.maintenance() == inf
    ledger.close()
    assert ids_of(path) == [1]


def test_the_oldest_are_found_by_an_index(ledger: Ledger, path: Path) -> None:
    """Neither retention nor ``--since`` reads the whole table."""
    for words in (
        "DELETE FROM traces WHERE rowid IN (SELECT rowid FROM traces WHERE time < '' LIMIT 1)",
        "SELECT count(*) FROM traces WHERE time >= ''",
        "DELETE FROM sessions WHERE (session, client) IN "
        "(SELECT session, client FROM sessions WHERE last_time < '' LIMIT 1)",
    ):
        plan = [row[-1] for row in query(path, f"EXPLAIN QUERY PLAN {words}")]
        assert not [step for step in plan if step.startswith("SCAN")], plan
        assert [step for step in plan if "time" in step], plan


# --- bad times ------------------------------------------------------------------------------------


def test_a_locked_ledger_asks_for_a_retry(ledger: Ledger, path: Path) -> None:
    """The batch can be written whole once the lock is gone."""
    ledger.put([trace(0)])
    with held(path):
        for _ in range(2):
            with pytest.raises(Retry, match="locked"):
                ledger.put([trace(1), trace(2)])
            with pytest.raises(Retry):
                ledger.maintenance()
        assert ids_of(path) == [0]  # and who reads is not held up
    ledger.put([trace(1), trace(2)])
    assert ids_of(path) == [0, 1, 2]


def test_a_lock_does_not_stop_the_start(ledger: Ledger, path: Path) -> None:
    """A lock goes away by itself, so the daemon starts."""
    with closing(sqlite3.connect(path, isolation_level=None)) as other:
        other.execute("PRAGMA locking_mode = EXCLUSIVE")
        other.execute("BEGIN EXCLUSIVE")
        second = Ledger(str(path), keep_s=None, wall=lambda: NOW)
        with pytest.raises(Retry):
            second.put([trace(1)])
    second.put([trace(2)])
    second.close()
    assert ids_of(path) == [2]


def test_a_full_disk_does_not_stop_the_start(ledger: Ledger, path: Path, disk: Disk) -> None:
    """The daemon starts, and keeps records when there is room again."""
    ledger.put([trace(0)])
    ledger.close()
    disk(0)
    second = Ledger(str(path), keep_s=None, wall=lambda: NOW)
    with pytest.raises(sqlite3.OperationalError):
        second.put([trace(1)])
    disk(None)
    second.put([trace(2)])
    second.close()
    assert ids_of(path) == [0, 2]


def test_a_full_disk_loses_whole_batches(ledger: Ledger, path: Path, disk: Disk) -> None:
    """The rows before stay whole, and later rows are kept again."""
    ledger.put([trace(0)])
    disk(64 * 1024)
    kept, lost = [0], 0
    for number in range(1, 400, 10):
        batch = [trace(one, session="s", client="c") for one in range(number, number + 10)]
        try:
            ledger.put(batch)
            kept += range(number, number + 10)
        except sqlite3.OperationalError:
            lost += 10
    assert lost > 0
    assert len(kept) + lost == 401
    disk(None)
    ledger.put([trace(1000, session="s", client="c")])
    assert ids_of(path) == [*kept, 1000]
    assert query(path, "SELECT requests FROM sessions") == [(len(kept),)]
    assert query(path, "PRAGMA integrity_check") == [("ok",)]


def test_a_full_file_system_loses_and_recovers(small_disk: Path) -> None:
    """The same is true on a disk that is really full."""
    path = small_disk / "ledger"
    ledger = Ledger(str(path), keep_s=None, wall=lambda: NOW)
    ledger.put([trace(0)])
    free = os.statvfs(small_disk)
    (small_disk / "filler").write_bytes(bytes(free.f_bavail * free.f_bsize))
    failed = 0
    for number in range(1, 50):
        try:
            ledger.put([trace(number) for _ in range(50)])
        except (sqlite3.OperationalError, OSError):
            failed += 1
    assert failed > 0
    (small_disk / "filler").unlink()
    ledger.put([trace(50)])
    assert len(ids_of(path)) == 2 + 50 * (49 - failed)
    ledger.close()


def test_a_read_only_file_system_loses_and_recovers(ledger: Ledger, path: Path) -> None:
    """The ledger follows its path through mounts."""
    ledger.put([trace(0)])
    mount = ["mount", "-t", "tmpfs", "-o", "ro", "tmpfs", str(path.parent)]
    if os.geteuid() != 0 or subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("a file system cannot be mounted here")
    try:
        for _ in range(2):
            with pytest.raises(OSError, match="Read-only"):
                ledger.put([trace(1)])
    finally:
        subprocess.run(["umount", str(path.parent)], check=True)
    ledger.put([trace(2)])
    assert ids_of(path) == [0, 2]


def test_a_removed_ledger_is_made_again(ledger: Ledger, path: Path) -> None:
    """Nobody could read rows in a file without a name."""
    ledger.put([trace(0)])
    for file in path.parent.iterdir():
        file.unlink()
    ledger.put([trace(1)])
    assert ids_of(path) == [1]


def test_a_broken_ledger_loses_until_it_is_put_away(ledger: Ledger, path: Path) -> None:
    """A new ledger needs no restart."""
    ledger.put([trace(number) for number in range(100)])
    ledger.reopen()
    path.write_bytes(b"garbage" * 10_000)
    for _ in range(2):
        with pytest.raises(sqlite3.DatabaseError):
            ledger.put([trace(100)])
    path.rename(path.with_suffix(".broken"))
    ledger.put([trace(101)])
    assert ids_of(path) == [101]


def test_a_broken_page_loses_whole_batches(ledger: Ledger, path: Path) -> None:
    """A failure inside a batch closes the file, so that a repaired ledger is opened again."""
    ledger.put([trace(number) for number in range(2000)])
    ledger.reopen()
    whole = path.read_bytes()
    path.write_bytes(whole[:8192] + b"\xff" * (len(whole) - 8192))
    with pytest.raises(sqlite3.DatabaseError):
        ledger.put([trace(2000)])
    path.write_bytes(whole)
    ledger.put([trace(2001)])
    assert ids_of(path)[-1] == 2001


def test_a_file_that_cannot_be_a_ledger_stops_the_start(tmp_path: Path) -> None:
    """The file may be another program's, or its folder may be missing."""
    other = tmp_path / "other"
    with closing(sqlite3.connect(other)) as connection:
        connection.execute("CREATE TABLE theirs (a)")
    with pytest.raises(LedgerError, match="not a ledger"):
        Ledger(str(other), keep_s=None, wall=lambda: NOW)
    (tmp_path / "text").write_text("text" * 1000)
    with pytest.raises(OSError, match="text: file is not a database"):
        Ledger(str(tmp_path / "text"), keep_s=None, wall=lambda: NOW)
    with pytest.raises(FileNotFoundError):
        Ledger(str(tmp_path / "missing" / "ledger"), keep_s=None, wall=lambda: NOW)
