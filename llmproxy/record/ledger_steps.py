"""What every ledger holds, whichever database keeps it: the tables, and the steps that made them.

The steps are declared once, in words of SQLite's SQL and with the types ``MOMENT``, ``BOOLEAN`` and
``JSON`` besides.  An :class:`Engine` says what a database calls these, and the few words that two
databases do not share; everything else that reads or writes a ledger is the same SQL for both.  A
step is never rewritten: a new ledger takes all of them, an older one takes those that it lacks.
Nothing here knows a connection, or a trace (ADR-0042).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import NamedTuple

TOKENS = (
    "input_tokens",
    "output_tokens",
    "cache_read_tokens",
    "cache_write_tokens",
    "reasoning_tokens",
)
"""The columns of tokens; NULL where nothing was reported, which is not zero."""

LARGEST = 10**12
"""More tokens than this are no count: they are stored as unknown, so that sums cannot overflow."""

_WORD = re.compile(r"[A-Z]+(?: ROWID)?")


class LedgerError(OSError):
    """A ledger cannot be used; the text names it and says why."""


class Engine(NamedTuple):
    """The words of one database's SQL that another one does not share.

    Attributes:
        words: what stands for the words of the declaration, where that is something else.
        row: a column that tells traces apart.
        first_columns: what the table of traces has before the columns of a trace.
        last_id: finds the id of the trace that was written last.
        least: the function that returns the least of its arguments.
        greatest: the function that returns the greatest of them.
        day: the day of a trace, in UTC.
        moment: how a moment is read, as RFC 3339 in UTC; ``{}`` is the column.
        ever: a moment before all others.
    """

    words: Mapping[str, str]
    row: str
    first_columns: str
    last_id: str
    least: str
    greatest: str
    day: str
    moment: str
    ever: str


SQLITE = Engine(
    words={"MOMENT": "TEXT", "BOOLEAN": "INTEGER", "JSON": "TEXT"},
    row="rowid",
    first_columns="",
    last_id="substr(max(printf('%020d', rowid) || id), 21)",
    least="min",
    greatest="max",
    day="substr(time, 1, 10)",
    moment="{}",
    ever="",
)

POSTGRES = Engine(
    words={
        "MOMENT": "timestamptz",
        "INTEGER": "bigint",
        "REAL": "double precision",
        "JSON": "jsonb",
        "WITHOUT ROWID": "",
    },
    row="id",
    first_columns="number bigint GENERATED ALWAYS AS IDENTITY, PRIMARY KEY (id), ",
    last_id="(array_agg(id ORDER BY number DESC))[1]",
    least="least",
    greatest="greatest",
    day="to_char(time AT TIME ZONE 'UTC', 'YYYY-MM-DD')",
    moment="""to_char({} AT TIME ZONE 'UTC', 'YYYY-MM-DD"T"HH24:MI:SS.MS"Z"')""",
    ever="-infinity",
)


def count_where(condition: str) -> str:
    """Return the SQL that counts the rows of which a condition is true."""
    return f"sum(CASE WHEN {condition} THEN 1 ELSE 0 END)"


UNREPORTED = count_where("coalesce(usage, '') <> 'reported'")
"""How many requests did not report all their tokens."""

COMPLETE = count_where("is_complete")
"""How many requests ended as ``complete``."""

COUNTS_FOR_SESSION = "AND client IS NOT NULL AND coalesce(responses, 0) = 0"
"""Which traces of a session count: a request whose caller was not known adds to none, or anybody
could fill the table with names.  A WebSocket adds its responses, and not itself besides."""


def add_to_sessions(engine: Engine, traces: str, *, counts: str = COUNTS_FOR_SESSION) -> str:
    """Return the statement that adds traces to the checkpoints of their sessions.

    Args:
        engine: whose SQL it is.
        traces: where the traces are, with a condition that holds for them alone.
        counts: a further condition.
    """
    least, greatest = engine.least, engine.greatest
    sums = (
        f"{n} = coalesce(sessions.{n} + excluded.{n}, sessions.{n}, excluded.{n})" for n in TOKENS
    )
    return f"""
    INSERT INTO sessions
    SELECT session, coalesce(client, ''), count(*), {COMPLETE}, {UNREPORTED},
           {", ".join(f"sum({name})" for name in TOKENS)},
           {engine.last_id}, min(time), max(time)
    FROM {traces} AND session IS NOT NULL {counts} GROUP BY 1, 2 ORDER BY 1, 2
    ON CONFLICT (session, client) DO UPDATE SET
        requests = sessions.requests + excluded.requests,
        complete = sessions.complete + excluded.complete,
        unreported = sessions.unreported + excluded.unreported,
        {", ".join(sums)},
        last_trace = excluded.last_trace,
        first_time = {least}(sessions.first_time, excluded.first_time),
        last_time = {greatest}(sessions.last_time, excluded.last_time)
    """  # noqa: S608 - names of ours


def deletions(engine: Engine) -> tuple[str, str]:
    """Return the statements that delete some traces and sessions from before a moment.

    Each takes the moment twice, and how many rows to delete.  The outer condition sees a session
    that another writer has just gone on with.
    """
    row = engine.row
    return (
        f"DELETE FROM traces WHERE time < ? AND {row} IN "  # noqa: S608 - names of ours
        f"(SELECT {row} FROM traces WHERE time < ? LIMIT ?)",
        "DELETE FROM sessions WHERE last_time < ? AND (session, client) IN "
        "(SELECT session, client FROM sessions WHERE last_time < ? LIMIT ?)",
    )


_FIRST_SESSIONS = add_to_sessions(SQLITE, "traces WHERE true", counts="")
"""Makes sessions of the traces that a ledger of the first version had; PostgreSQL never had it."""

_DECLARED: tuple[tuple[str, ...], ...] = (
    (
        """CREATE TABLE traces (FIRST
            time MOMENT NOT NULL, id TEXT NOT NULL, client_request_id TEXT, instance TEXT NOT NULL,
            peer TEXT NOT NULL, user_agent TEXT, client TEXT, session TEXT, route TEXT,
            provider TEXT, dialect TEXT, method TEXT NOT NULL, path TEXT NOT NULL, model TEXT,
            served_model TEXT, stream BOOLEAN, status INTEGER, end_reason TEXT NOT NULL, error TEXT,
            is_complete BOOLEAN NOT NULL, attempts JSON NOT NULL, bytes_in INTEGER NOT NULL,
            bytes_out INTEGER NOT NULL, chunks INTEGER NOT NULL, head_s REAL, first_chunk_s REAL,
            duration_s REAL NOT NULL, longest_gap_s REAL, paused_s REAL NOT NULL,
            input_tokens INTEGER, output_tokens INTEGER, cache_read_tokens INTEGER,
            cache_write_tokens INTEGER, reasoning_tokens INTEGER, usage TEXT,
            degraded JSON NOT NULL, on_disconnect TEXT
        )""",
        "CREATE INDEX traces_by_time ON traces (time)",
    ),
    (
        """CREATE TABLE sessions (
            session TEXT NOT NULL, client TEXT NOT NULL, requests INTEGER NOT NULL,
            complete INTEGER NOT NULL, unreported INTEGER NOT NULL, input_tokens INTEGER,
            output_tokens INTEGER, cache_read_tokens INTEGER, cache_write_tokens INTEGER,
            reasoning_tokens INTEGER, last_trace TEXT NOT NULL, first_time MOMENT NOT NULL,
            last_time MOMENT NOT NULL, PRIMARY KEY (session, client)
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
        "ALTER TABLE traces ADD COLUMN buffered_upstream BOOLEAN",
    ),
    ("ALTER TABLE traces ADD COLUMN resent TEXT",),
)
"""The statements of each step: the traces, their sessions, where a request named its model, for how
long it waited in a queue, the tokens that counted for its client's limits, what became of a
CONNECT, how many responses a WebSocket had, how the events of a stream arrived, and how the first
request stood that another one came after."""

_COLUMN = re.compile(
    r"(?:[(,]|FIRST|ADD COLUMN)\s*([a-z_]+) ([A-Z]+)(?= NOT NULL|,| DEFAULT|\s*\)|$)"
)


def steps_for(engine: Engine) -> tuple[tuple[str, ...], ...]:
    """Return the statements of each step, as a database knows them."""

    def known(word: re.Match[str]) -> str:
        return engine.words.get(word[0], word[0])

    def translated(statement: str) -> str:
        return _WORD.sub(known, statement).replace("(FIRST", f"({engine.first_columns}")

    return tuple(
        tuple(
            one if one is _FIRST_SESSIONS else translated(one)
            for one in statements
            if one is not _FIRST_SESSIONS or engine is SQLITE
        )
        for statements in _DECLARED
    )


def trace_columns(engine: Engine) -> dict[str, str]:
    """Return the columns of a trace in their order, each with its type."""
    traces = [one for statements in _DECLARED for one in statements if " traces " in one[:24]]
    return {
        name: engine.words.get(kind, kind)
        for one in traces
        if not one.startswith("CREATE INDEX")
        for name, kind in _COLUMN.findall(one)
    }
