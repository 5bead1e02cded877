"""A ledger in an SQLite file: how it is opened, and how its schema is brought up to date.

The file's ``application_id`` says that it is a ledger, its ``user_version`` how many steps its
schema has taken.  ``ledger_steps.py`` declares the steps; those that a file lacks are taken in one
transaction.  Writers and readers open a ledger here.  Nothing here knows a trace.
"""

from __future__ import annotations

import os
import sqlite3
from urllib.parse import quote

from llmproxy.record.ledger_steps import SQLITE, LedgerError, steps_for

APPLICATION_ID = 0x6C6C6D70
"""``llmp``, in the header of the file."""

BUSY_S = 0.02
"""Seconds for which a writer waits for a lock; meanwhile the other sinks wait."""

READER_BUSY_S = 5.0
"""Seconds for which a reader waits for a lock."""

_LOCKED = (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED)
_PASSING = (*_LOCKED, sqlite3.SQLITE_FULL, sqlite3.SQLITE_IOERR)

STEPS = steps_for(SQLITE)
"""The statements of each step, for SQLite."""


def open_for_writing(path: str) -> sqlite3.Connection:
    """Open a ledger; make it or bring its schema up to date if that is needed.

    Other users of the machine cannot read a file that is made here.

    Raises:
        LedgerError: the file is no ledger, or a ledger of a newer version.
        OSError: the file cannot be opened.
        sqlite3.Error: anything else is wrong, a lock included (:func:`is_locked`).
    """
    os.close(os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o640))
    connection = sqlite3.connect(path, timeout=BUSY_S, isolation_level=None)
    try:
        if _steps_taken(connection, path) < len(STEPS):
            _take_steps(connection, path)
        connection.execute("PRAGMA journal_mode = WAL")
        connection.execute("PRAGMA synchronous = NORMAL")
        connection.execute("PRAGMA journal_size_limit = 67108864")
    except BaseException:
        connection.close()
        raise
    return connection


def open_for_reading(path: str, *, beside: str | None = None) -> sqlite3.Connection:
    """Open a ledger that a daemon may be writing to; all reads see it at one moment.

    Args:
        path: the file.
        beside: another database, which is attached as ``seen``.

    Raises:
        LedgerError: the file cannot be read, is no ledger, or a ledger of another version.
    """
    if not os.path.isfile(path):
        raise LedgerError(f"{path}: there is no such file")
    try:
        uri = f"file:{quote(path)}?mode=ro"
        connection = sqlite3.connect(uri, timeout=READER_BUSY_S, isolation_level=None, uri=True)
    except sqlite3.Error as error:
        raise LedgerError(f"{path}: {error}") from error
    try:
        if beside is not None:
            connection.execute("ATTACH DATABASE ? AS seen", (beside,))
        connection.execute("BEGIN")
        steps = _steps_taken(connection, path)
        if not steps:
            raise LedgerError(f"{path}: an empty file, not a ledger")
        if steps < len(STEPS):
            raise LedgerError(
                f"{path}: a ledger of an older version ({steps}, not {len(STEPS)}): "
                "start the daemon, which brings it up to date"
            )
    except sqlite3.Error as error:
        connection.close()
        raise LedgerError(f"{path}: {error}") from error
    except BaseException:
        connection.close()
        raise
    return connection


def is_locked(error: sqlite3.Error) -> bool:
    """Return whether another process holds the file now."""
    return _code(error) in _LOCKED


def may_pass(error: sqlite3.Error) -> bool:
    """Return whether the disk or another process is the cause, and not the file itself."""
    return _code(error) in _PASSING


def _steps_taken(connection: sqlite3.Connection, path: str) -> int:
    """Return how many steps the schema has taken, 0 for an empty file.

    Raises:
        LedgerError: the file holds something else, or has taken more steps than we know.
    """
    if _number(connection, "PRAGMA application_id") != APPLICATION_ID:
        if _number(connection, "SELECT count(*) FROM sqlite_master"):
            raise LedgerError(f"{path}: not a ledger, but another program's SQLite file")
        return 0
    steps = _number(connection, "PRAGMA user_version")
    if steps > len(STEPS):
        raise LedgerError(
            f"{path}: a ledger of a newer version ({steps}, this one knows {len(STEPS)})"
        )
    return steps


def _take_steps(connection: sqlite3.Connection, path: str) -> None:
    """Take the steps that are missing, all or none; another process may have done it already."""
    connection.execute("BEGIN IMMEDIATE")
    try:
        for statements in STEPS[_steps_taken(connection, path) :]:
            for statement in statements:
                connection.execute(statement)
        connection.execute(f"PRAGMA application_id = {APPLICATION_ID}")
        connection.execute(f"PRAGMA user_version = {len(STEPS)}")
        connection.execute("COMMIT")
    except BaseException:
        if connection.in_transaction:
            connection.execute("ROLLBACK")
        raise


def _code(error: sqlite3.Error) -> int | None:
    """Return the primary code of SQLite's error; None where sqlite3 itself raised it."""
    code: int | None = getattr(error, "sqlite_errorcode", None)
    return None if code is None else code & 0xFF


def _number(connection: sqlite3.Connection, query: str) -> int:
    (number,) = connection.execute(query).fetchone()
    return int(number)
