"""The file of a ledger: how it is made and brought up to date, and which files are refused."""

from __future__ import annotations

import os
import sqlite3
import stat
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from llmproxy.record import ledger_schema
from llmproxy.record.ledger_schema import (
    APPLICATION_ID,
    STEPS,
    is_locked,
    open_for_reading,
    open_for_writing,
)
from llmproxy.record.ledger_steps import TOKENS, LedgerError
from llmproxy.record.trace import NAMES
from tests.support.records import query


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """The path of the ledger."""
    return tmp_path / "ledger.sqlite3"


def at_step(path: Path, steps: int) -> None:
    """Make a ledger of the version that had so many steps."""
    with closing(sqlite3.connect(path, isolation_level=None)) as connection:
        for statements in STEPS[:steps]:
            for statement in statements:
                connection.execute(statement)
        connection.execute(f"PRAGMA application_id = {APPLICATION_ID}")
        connection.execute(f"PRAGMA user_version = {steps}")


def shape(path: Path) -> list[tuple[str, str]]:
    """Return the tables and indexes of the file."""
    return query(path, "SELECT name, sql FROM sqlite_master ORDER BY name")


def test_a_ledger_holds_every_field_of_a_trace(path: Path) -> None:
    """The columns are the names of the record in their order: a new field needs a new step."""
    open_for_writing(str(path)).close()
    columns = [name for (name,) in query(path, "SELECT name FROM pragma_table_info('traces')")]
    assert columns == list(NAMES)
    assert set(TOKENS) < set(columns)


def test_a_ledger_is_written_ahead_and_closed_to_others(path: Path) -> None:
    """It can be read while it is written, but not by everybody."""
    connection = open_for_writing(str(path))
    connection.execute("BEGIN IMMEDIATE")
    connection.execute("PRAGMA user_version = 2")
    connection.execute("COMMIT")
    assert connection.execute("PRAGMA journal_mode").fetchone() == ("wal",)
    for file in path.parent.iterdir():
        assert stat.S_IMODE(file.stat().st_mode) & 0o137 == 0, file
    connection.close()


@pytest.mark.parametrize("steps", range(len(STEPS)))
def test_an_older_ledger_is_brought_up_to_date(path: Path, tmp_path: Path, steps: int) -> None:
    """After each step, its shape is that of a new ledger."""
    at_step(path, steps)
    new = tmp_path / "new"
    open_for_writing(str(new)).close()
    open_for_writing(str(path)).close()
    assert shape(path) == shape(new)
    assert query(path, "PRAGMA user_version") == [(len(STEPS),)]


def test_an_update_makes_sessions_of_old_traces(path: Path) -> None:
    """The second step counts the traces of the first version."""
    at_step(path, 1)
    with closing(sqlite3.connect(path)) as connection:
        for number, session, tokens in ((1, "a", 5), (2, "a", None), (3, None, 7), (4, "b", None)):
            connection.execute(
                "INSERT INTO traces (time, id, instance, peer, method, path, session, end_reason, "
                "is_complete, attempts, bytes_in, bytes_out, chunks, duration_s, paused_s, "
                "degraded, input_tokens) "
                "VALUES (?, ?, '0', '', '', '', ?, '', 1, '[]', 0, 0, 0, 0, 0, '[]', ?)",
                (f"2026-11-0{number}T", str(number), session, tokens),
            )
        connection.commit()
    open_for_writing(str(path)).close()
    words = (
        "SELECT session, requests, complete, unreported, input_tokens, last_trace, first_time "
        "FROM sessions ORDER BY session"
    )
    assert query(path, words) == [
        ("a", 2, 2, 2, 5, "2", "2026-11-01T"),
        ("b", 1, 1, 1, None, "4", "2026-11-04T"),
    ]


def test_a_step_that_fails_leaves_the_ledger_as_it_was(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All steps are done, or none."""
    at_step(path, 1)
    before = shape(path)
    broken = (STEPS[0], ("CREATE TABLE one (a)", "CREATE TABLE one (a)"))
    monkeypatch.setattr(ledger_schema, "STEPS", broken)
    with pytest.raises(sqlite3.OperationalError, match="already exists"):
        open_for_writing(str(path))
    assert shape(path) == before
    assert query(path, "PRAGMA user_version") == [(1,)]


def test_an_older_ledger_is_not_read(path: Path) -> None:
    """A reader changes nothing; the error says how to update the ledger."""
    at_step(path, 1)
    with pytest.raises(LedgerError, match="older version") as caught:
        open_for_reading(str(path))
    assert "start the daemon" in str(caught.value)


@pytest.mark.parametrize("opened", [open_for_writing, open_for_reading])
@pytest.mark.parametrize(
    ("steps", "statement", "words"),
    [
        (
            len(STEPS),
            "PRAGMA user_version = 99",
            rf"newer version \(99, this one knows {len(STEPS)}\)",
        ),
        (0, "CREATE TABLE theirs (a)", "not a ledger"),
    ],
)
def test_a_file_of_others_is_refused_and_unchanged(
    path: Path, opened: Any, steps: int, statement: str, words: str
) -> None:
    """A newer version's ledger and another program's database are neither read nor written."""
    if steps:
        at_step(path, steps)
    with closing(sqlite3.connect(path)) as connection:
        connection.execute(statement)
    before = path.read_bytes()
    with pytest.raises(LedgerError, match=words):
        opened(str(path))
    assert path.read_bytes() == before


@pytest.mark.parametrize(
    ("make", "reading", "writing"),
    [
        (
            lambda path: path.write_bytes(b"time,client\n" * 1000),
            r"ledger\.sqlite3: file is not a database",
            "not a database",
        ),
        (lambda path: path.mkdir(), "there is no such file", "directory"),
        (lambda path: path.touch(), "empty file, not a ledger", ""),
        (lambda path: None, "there is no such file", ""),
    ],
)
def test_a_path_without_a_ledger(
    path: Path, make: Callable[[Path], object], reading: str, writing: str
) -> None:
    """A reader refuses it and makes no file; a writer makes a ledger, but overwrites nothing."""
    make(path)
    existed = path.exists()
    with pytest.raises(LedgerError, match=reading):
        open_for_reading(str(path))
    assert path.exists() is existed
    if writing:
        with pytest.raises((OSError, sqlite3.DatabaseError), match=writing):
            open_for_writing(str(path))
    else:
        open_for_writing(str(path)).close()
        assert shape(path)


def test_names_that_mean_something_in_a_uri(tmp_path: Path) -> None:
    """A path is never read as a URI."""
    path = tmp_path / "a?mode=rw#b %41&c"
    open_for_writing(str(path)).close()
    open_for_reading(str(path)).close()
    assert [file for file in os.listdir(tmp_path) if not file.startswith(path.name)] == []


def test_two_make_the_tables_at_once(path: Path) -> None:
    """The second writer waits, and finds the tables."""
    first = sqlite3.connect(path, isolation_level=None)
    first.execute("BEGIN IMMEDIATE")
    with pytest.raises(sqlite3.OperationalError) as caught:
        open_for_writing(str(path))
    assert is_locked(caught.value)
    first.execute("ROLLBACK")
    first.close()
    one, two = open_for_writing(str(path)), open_for_writing(str(path))
    one.close()
    two.close()
