"""The ledger: every trace, and the checkpoint of every session, in an SQLite file (ADR-0013).

A batch is one transaction: its traces, and what they add to their sessions.  The thread that
writes opens the file; it opens the file again after every failure, and when the file was removed or
replaced.  So no restart is needed when a disk, a directory or a lock comes back.  No content is
stored.  ``ledger_steps.py`` knows the tables, ``ledger_report.py`` reads them.
"""

from __future__ import annotations

import os
import sqlite3
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from math import inf
from operator import attrgetter

import msgspec

from llmproxy.record.ledger_schema import is_locked, may_pass, open_for_writing
from llmproxy.record.ledger_steps import LARGEST, SQLITE, TOKENS, add_to_sessions, deletions
from llmproxy.record.sink_queue import Retry
from llmproxy.record.trace import NAMES, Trace, timestamp

_STEP = 500
"""Most rows that are deleted at once; meanwhile the other sinks wait."""

_STEP_REST_S = 0.05
"""Seconds between two such steps."""

_SWEEP_S = 60.0
"""Seconds between two searches for rows that have become too old."""

_AGAIN_S = 0.1
"""Seconds until the next try at a locked file."""

_LISTS = ("attempts", "degraded")
_PLAIN = tuple(name for name in NAMES if name not in _LISTS)
_COLUMNS = (*_PLAIN, *_LISTS)
_plain_of = attrgetter(*_PLAIN)


def _value(number: int, column: str) -> str:
    if column in TOKENS:
        return f"CASE WHEN ?{number} BETWEEN 0 AND {LARGEST} THEN ?{number} END"
    return f"?{number}"


_INSERT = (
    f"INSERT INTO traces ({', '.join(_COLUMNS)}) "  # noqa: S608 - names of ours
    f"VALUES ({', '.join(_value(at, name) for at, name in enumerate(_COLUMNS, 1))})"
)
_ADD_TO_SESSIONS = add_to_sessions(SQLITE, "traces WHERE rowid > ?")
"""Adds the traces behind a row."""

_DELETIONS = deletions(SQLITE)


class Ledger:
    """Writes traces and session checkpoints to a ledger.

    Args:
        path: the file.  It is opened once at the start, so that a wrong file stops the start.
        keep_s: seconds after which traces and sessions are deleted; None keeps them.
        wall: seconds since the epoch; called by the writer's thread.

    Raises:
        LedgerError: the file is no ledger, or a ledger of a newer version.
        OSError: it cannot be opened.
    """

    name = "ledger"
    patience_s = 2.0
    keeps_content = False

    def __init__(self, path: str, *, keep_s: float | None, wall: Callable[[], float]) -> None:
        self._path = path
        self._keep_s = keep_s
        self._wall = wall
        self._encoder = msgspec.json.Encoder()
        self._connection: sqlite3.Connection | None = None
        self._identity: tuple[int, int] | None = None
        self._try()

    def put(self, traces: list[Trace]) -> None:
        """Add these traces, all or none.

        Raises:
            Retry: another process holds the file.
            OSError: the file cannot be opened.
            sqlite3.Error: the disk is full, the file cannot be written or is broken.
        """
        rows = [self._row(trace) for trace in traces]
        try:
            self._insert(rows)
        except (OverflowError, UnicodeError):
            self._insert([tuple(map(_storable, row)) for row in rows])

    def maintenance(self) -> float:
        """Delete some rows that are too old; return the seconds until the next call.

        Raises:
            Retry, OSError, sqlite3.Error: as :meth:`put`.
        """
        if self._keep_s is None:
            return inf
        oldest = timestamp(self._wall() - self._keep_s)
        with self._transaction() as connection:
            counts = [
                connection.execute(one, (oldest, oldest, _STEP)).rowcount for one in _DELETIONS
            ]
        return _STEP_REST_S if _STEP in counts else _SWEEP_S

    def reopen(self) -> None:
        """Open the file again with the next batch."""
        self._let_go()

    def close(self) -> None:
        """Close the file."""
        self._let_go()

    def _try(self) -> None:
        """Open the file once, and raise what is wrong with it; a lock or a full disk may pass."""
        try:
            open_for_writing(self._path).close()
        except sqlite3.Error as error:
            if not may_pass(error):
                raise OSError(f"{self._path}: {error}") from error

    def _row(self, trace: Trace) -> tuple[object, ...]:
        degraded = trace.degraded
        return (
            *_plain_of(trace),
            self._encoder.encode(trace.attempts).decode(),
            self._encoder.encode(degraded).decode() if degraded else "[]",
        )

    def _insert(self, rows: list[tuple[object, ...]]) -> None:
        with self._transaction() as connection:
            (last,) = connection.execute("SELECT coalesce(max(rowid), 0) FROM traces").fetchone()
            connection.executemany(_INSERT, rows)
            connection.execute(_ADD_TO_SESSIONS, (last,))

    @contextmanager
    def _transaction(self) -> Iterator[sqlite3.Connection]:
        """Commit all that is done inside, or nothing; after a failure, close the file."""
        try:
            connection = self._open()
            connection.execute("BEGIN IMMEDIATE")
            yield connection
            connection.execute("COMMIT")
        except sqlite3.Error as error:
            self._let_go()
            if is_locked(error):
                raise Retry(str(error), again_s=_AGAIN_S) from error
            raise
        except BaseException:
            self._let_go()
            raise

    def _open(self) -> sqlite3.Connection:
        """Return a connection to the file that the path names now."""
        if self._connection is not None and self._identity != _identity(self._path):
            self._let_go()
        if self._connection is None:
            self._connection = open_for_writing(self._path)
            self._identity = _identity(self._path)
        return self._connection

    def _let_go(self) -> None:
        """Close the connection, which rolls back what it had begun."""
        connection, self._connection = self._connection, None
        if connection is not None:
            with suppress(sqlite3.Error):
                connection.close()


def _identity(path: str) -> tuple[int, int] | None:
    """Return what distinguishes a file from a later one of the same name; None without a file."""
    try:
        status = os.stat(path)
    except OSError:
        return None
    return status.st_dev, status.st_ino


def _storable(value: object) -> object:
    """Return a value that SQLite can hold: no half of a surrogate pair, no more than 64 bits."""
    if isinstance(value, str):
        return value.encode("utf-8", "replace").decode()
    if isinstance(value, int) and not -(2**63) <= value < 2**63:
        return None
    return value
