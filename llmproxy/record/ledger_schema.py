"""The schema of a ledger, the steps that made it, and how the file is opened.

A ledger is an SQLite file.  Its ``application_id`` says that it is a ledger, its ``user_version``
how many steps its schema has taken.  A step is never rewritten: a new ledger takes all of them, an
older one takes those that it lacks, in one transaction.  Writers and readers open a ledger here.
Nothing here knows a trace.
"""

from __future__ import annotations

import os
import sqlite3
from urllib.parse import quote

APPLICATION_ID = 0x6C6C6D70
"""``llmp``, in the header of the file."""

BUSY_S = 0.02
"""Seconds for which a writer waits for a lock; meanwhile the other sinks wait."""

READER_BUSY_S = 5.0
"""Seconds for which a reader waits for a lock."""

_LOCKED = (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED)
_PASSING = (*_LOCKED, sqlite3.SQLITE_FULL, sqlite3.SQLITE_IOERR)

TOKENS = (
    "input_tokens",
    "output_tokens",
    "cache_read_tokens",
    "cache_write_tokens",
    "reasoning_tokens",
)
"""The columns of tokens; NULL where nothing was reported, which is not zero."""

ADD_TO_SESSIONS = f"""
    INSERT INTO sessions
    SELECT session, coalesce(client, ''), count(*), sum(is_complete), sum(usage IS NOT 'reported'),
           {", ".join(f"sum({name})" for name in TOKENS)},
           substr(max(printf('%020d', rowid) || id), 21), min(time), max(time)
    FROM traces WHERE rowid > ? AND session IS NOT NULL AND client IS NOT NULL
        AND NOT coalesce(responses, 0) GROUP BY 1, 2
    ON CONFLICT (session, client) DO UPDATE SET
        requests = requests + excluded.requests,
        complete = complete + excluded.complete,
        unreported = unreported + excluded.unreported,
        {", ".join(f"{n} = coalesce({n} + excluded.{n}, {n}, excluded.{n})" for n in TOKENS)},
        last_trace = excluded.last_trace,
        first_time = min(first_time, excluded.first_time),
        last_time = max(last_time, excluded.last_time)
"""  # noqa: S608 - names of ours
"""Adds the traces behind a row to the checkpoints; ``max`` finds the id of the last one.

A request whose caller was not known adds to none: anybody could fill the table with names.  A
WebSocket adds its responses, and not itself besides.
"""

_FIRST_SESSIONS = (
    ADD_TO_SESSIONS.replace("?", "0")
    .replace(" AND client IS NOT NULL", "")
    .replace("AND NOT coalesce(responses, 0)", "")
)
"""The same as the second step has it, which is never rewritten."""

STEPS: tuple[tuple[str, ...], ...] = (
    (
        """CREATE TABLE traces (
            time TEXT NOT NULL, id TEXT NOT NULL, client_request_id TEXT, instance TEXT NOT NULL,
            peer TEXT NOT NULL, user_agent TEXT, client TEXT, session TEXT, route TEXT,
            provider TEXT, dialect TEXT, method TEXT NOT NULL, path TEXT NOT NULL, model TEXT,
            served_model TEXT, stream INTEGER, status INTEGER, end_reason TEXT NOT NULL, error TEXT,
            is_complete INTEGER NOT NULL, attempts TEXT NOT NULL, bytes_in INTEGER NOT NULL,
            bytes_out INTEGER NOT NULL, chunks INTEGER NOT NULL, head_s REAL, first_chunk_s REAL,
            duration_s REAL NOT NULL, longest_gap_s REAL, paused_s REAL NOT NULL,
            input_tokens INTEGER, output_tokens INTEGER, cache_read_tokens INTEGER,
            cache_write_tokens INTEGER, reasoning_tokens INTEGER, usage TEXT,
            degraded TEXT NOT NULL, on_disconnect TEXT
        )""",
        "CREATE INDEX traces_by_time ON traces (time)",
    ),
    (
        """CREATE TABLE sessions (
            session TEXT NOT NULL, client TEXT NOT NULL, requests INTEGER NOT NULL,
            complete INTEGER NOT NULL, unreported INTEGER NOT NULL, input_tokens INTEGER,
            output_tokens INTEGER, cache_read_tokens INTEGER, cache_write_tokens INTEGER,
            reasoning_tokens INTEGER, last_trace TEXT NOT NULL, first_time TEXT NOT NULL,
            last_time TEXT NOT NULL, PRIMARY KEY (session, client)
        ) WITHOUT ROWID""",
        "CREATE INDEX sessions_by_last_time ON sessions (last_time)",
        _FIRST_SESSIONS,
    ),
    ("ALTER TABLE traces ADD COLUMN model_from TEXT",),
    ("ALTER TABLE traces ADD COLUMN queued_s REAL NOT NULL DEFAULT 0",),
    ("ALTER TABLE traces ADD COLUMN counted_tokens INTEGER",),
    ("ALTER TABLE traces ADD COLUMN tunnel TEXT",),
    ("ALTER TABLE traces ADD COLUMN responses INTEGER",),
    (
        "ALTER TABLE traces ADD COLUMN events INTEGER",
        "ALTER TABLE traces ADD COLUMN chunks_at_once INTEGER",
        "ALTER TABLE traces ADD COLUMN last_chunk_s REAL",
        "ALTER TABLE traces ADD COLUMN buffered_upstream INTEGER",
    ),
    ("ALTER TABLE traces ADD COLUMN resent TEXT",),
)
"""The statements of each step: the traces, their sessions, where a request named its model, for how
long it waited in a queue, the tokens that counted for its client's limits, what became of a
CONNECT, how many responses a WebSocket had, how the events of a stream arrived, and how the first
request stood that another one came after."""


class LedgerError(OSError):
    """A file cannot be used as a ledger; the text names it and says why."""


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


def open_for_reading(path: str) -> sqlite3.Connection:
    """Open a ledger that a daemon may be writing to; all reads see it at one moment.

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
