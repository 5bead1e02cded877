"""A ledger's file: how it is made, brought up to date, told from others, and refused."""

from __future__ import annotations

import os
import sqlite3
import stat
from contextlib import closing
from pathlib import Path

import pytest

from llmproxy.record import ledger_schema
from llmproxy.record.ledger_schema import (
    APPLICATION_ID,
    STEPS,
    TOKENS,
    LedgerError,
    is_locked,
    open_for_reading,
    open_for_writing,
)
from llmproxy.record.trace import NAMES
from tests.support.records import query


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """Where the ledger is."""
    return tmp_path / "ledger.sqlite3"


def at_step(path: Path, steps: int) -> None:
    """Make a ledger as the version with so many steps left it."""
    with closing(sqlite3.connect(path, isolation_level=None)) as connection:
        for statements in STEPS[:steps]:
            for statement in statements:
                connection.execute(statement)
        connection.execute(f"PRAGMA application_id = {APPLICATION_ID}")
        connection.execute(f"PRAGMA user_version = {steps}")


def shape(path: Path) -> list[tuple[str, str]]:
    """What the file is made of."""
    return query(path, "SELECT name, sql FROM sqlite_master ORDER BY name")


def test_a_ledger_holds_every_field_of_a_trace(path: Path) -> None:
    """Its columns are the record's names in their order: a new field needs a new step."""
    open_for_writing(str(path)).close()
    columns = [name for (name,) in query(path, "SELECT name FROM pragma_table_info('traces')")]
    assert columns == list(NAMES)
    assert set(TOKENS) < set(columns)


def test_a_ledger_is_written_ahead_and_closed_to_others(path: Path) -> None:
    """So that it can be read meanwhile, and not by everybody."""
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
    """From each step it becomes what a new one is, with what was in it."""
    at_step(path, steps)
    new = tmp_path / "new"
    open_for_writing(str(new)).close()
    open_for_writing(str(path)).close()
    assert shape(path) == shape(new)
    assert query(path, "PRAGMA user_version") == [(len(STEPS),)]


def test_sessions_are_made_of_the_traces_that_are_there(path: Path) -> None:
    """The second step counts what the first version has kept."""
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
    """All steps, or none."""
    at_step(path, 1)
    before = shape(path)
    broken = (STEPS[0], ("CREATE TABLE one (a)", "CREATE TABLE one (a)"))
    monkeypatch.setattr(ledger_schema, "STEPS", broken)
    with pytest.raises(sqlite3.OperationalError, match="already exists"):
        open_for_writing(str(path))
    assert shape(path) == before
    assert query(path, "PRAGMA user_version") == [(1,)]


def test_an_older_ledger_is_not_read(path: Path) -> None:
    """Who reads changes nothing; the words say what does."""
    at_step(path, 1)
    with pytest.raises(LedgerError, match="older version") as caught:
        open_for_reading(str(path))
    assert "start the daemon" in str(caught.value)


@pytest.mark.parametrize("opened", [open_for_writing, open_for_reading])
def test_a_newer_ledger_is_refused(path: Path, opened: object) -> None:
    """It is left as it is."""
    at_step(path, len(STEPS))
    with closing(sqlite3.connect(path)) as connection:
        connection.execute("PRAGMA user_version = 99")
    before = path.read_bytes()
    with pytest.raises(LedgerError, match=rf"newer version \(99, this one knows {len(STEPS)}\)"):
        opened(str(path))  # type: ignore[operator]  # both take a path
    assert path.read_bytes() == before


@pytest.mark.parametrize("opened", [open_for_writing, open_for_reading])
def test_another_program_s_file_is_refused(path: Path, opened: object) -> None:
    """Nothing is written into it."""
    with closing(sqlite3.connect(path)) as connection:
        connection.execute("CREATE TABLE theirs (a)")
    before = path.read_bytes()
    with pytest.raises(LedgerError, match="not a ledger"):
        opened(str(path))  # type: ignore[operator]  # both take a path
    assert path.read_bytes() == before


def test_what_is_no_database_is_refused(path: Path) -> None:
    """In SQLite's words, with the file's name before them."""
    path.write_bytes(b"time,client\n" * 1000)
    with pytest.raises(LedgerError, match=r"ledger\.sqlite3: file is not a database"):
        open_for_reading(str(path))
    with pytest.raises(sqlite3.DatabaseError, match="not a database"):
        open_for_writing(str(path))


def test_a_missing_file_is_told(path: Path) -> None:
    """And not made by whoever only reads."""
    with pytest.raises(LedgerError, match="there is no such file"):
        open_for_reading(str(path))
    assert not path.exists()


def test_an_empty_file_becomes_a_ledger(path: Path) -> None:
    """As one does that was made for its permissions."""
    path.touch()
    with pytest.raises(LedgerError, match="empty file, not a ledger"):
        open_for_reading(str(path))
    open_for_writing(str(path)).close()
    assert shape(path)


def test_a_folder_is_no_ledger(path: Path) -> None:
    """Neither for who reads nor for who writes."""
    path.mkdir()
    with pytest.raises(LedgerError, match="there is no such file"):
        open_for_reading(str(path))
    with pytest.raises(OSError, match="directory"):
        open_for_writing(str(path))


def test_names_that_mean_something_in_a_uri(tmp_path: Path) -> None:
    """A path is a path."""
    path = tmp_path / "a?mode=rw#b %41&c"
    open_for_writing(str(path)).close()
    open_for_reading(str(path)).close()
    assert [file for file in os.listdir(tmp_path) if not file.startswith(path.name)] == []


def test_two_make_the_tables_at_once(path: Path) -> None:
    """Whoever comes second waits, and finds them made."""
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
