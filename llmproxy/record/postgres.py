"""Traces and session checkpoints to a ledger in PostgreSQL, which hosts may share (ADR-0042).

This output blocks, so it has a thread and a queue of its own.  A batch is one statement in one
transaction: it adds the traces that are not there yet, and only these to their sessions.  So a
batch that is written again, because nobody knows what became of it, changes nothing.  Whatever
fails but may pass is tried again, after growing pauses, while the queue has room.
"""

from __future__ import annotations

import os
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from math import inf
from typing import Any

import msgspec
import psycopg
from twisted.logger import Logger

from llmproxy.record.ledger_steps import (
    LARGEST,
    POSTGRES,
    TOKENS,
    LedgerError,
    add_to_sessions,
    deletions,
    trace_columns,
)
from llmproxy.record.postgres_ledger import (
    LOCK,
    STATEMENT_S,
    Connection,
    begin,
    bring_up_to_date,
    connect,
    reason,
)
from llmproxy.record.sink_queue import Dropped, Retry
from llmproxy.record.trace import Trace, timestamp

BATCH = 512
"""Most traces in a transaction: while they are encoded, the reactor waits."""

GATHER_S = 0.1
"""Seconds for which traces wait for one another."""

_DEADLINE_S = STATEMENT_S + 5.0
"""Seconds after which a server that says nothing is given up."""

_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 0.25, 10.0
"""Seconds until the next try, which double with each one that fails."""

_STEP = 500
"""Most rows that are deleted at once."""

_STEP_REST_S = 0.05
"""Seconds between two such steps."""

_SWEEP_S = 60.0
"""Seconds between two searches for rows that have become too old."""

_REFUSED = (psycopg.DataError, psycopg.IntegrityError)
"""Errors of a record: no other try helps, and the connection is as good as before."""

_COLUMNS = trace_columns(POSTGRES)


def _value(column: str) -> str:
    if column in TOKENS:
        return f"CASE WHEN {column} BETWEEN 0 AND {LARGEST} THEN {column} END"
    return column


_ADD = (
    "WITH added AS ("  # noqa: S608 - names of ours
    f"INSERT INTO traces ({', '.join(_COLUMNS)}) SELECT {', '.join(map(_value, _COLUMNS))} "
    "FROM ROWS FROM (json_to_recordset(%s::json) AS "
    f"({', '.join(f'{name} {kind}' for name, kind in _COLUMNS.items())})) "
    f"WITH ORDINALITY AS batch ({', '.join(_COLUMNS)}, place) ORDER BY place "
    "ON CONFLICT (id) DO NOTHING RETURNING *) "
    f"{add_to_sessions(POSTGRES, 'added WHERE true')}"
).encode()

_DELETIONS = tuple(one.replace("?", "%s").encode() for one in deletions(POSTGRES))
_MAY_DELETE = b"SELECT pg_try_advisory_xact_lock(%d)" % (LOCK + 1)

_log = Logger()


class Postgres:
    """Writes traces and session checkpoints to PostgreSQL; connects when it is first used.

    Args:
        conninfo: what libpq connects with.
        keep_s: seconds after which traces and sessions are deleted; None keeps them.
        wall: seconds since the epoch; called by the writer's thread.
        deadline_s: seconds after which a server that says nothing is given up.
    """

    name = "postgres"
    patience_s = inf
    keeps_content = False

    def __init__(
        self,
        conninfo: str,
        *,
        keep_s: float | None,
        wall: Callable[[], float],
        deadline_s: float = _DEADLINE_S,
    ) -> None:
        self._conninfo = conninfo
        self._keep_s = keep_s
        self._wall = wall
        self._deadline_s = deadline_s
        self._encoder = msgspec.json.Encoder()
        self._connection: Connection | None = None
        self._pause_s = _FIRST_PAUSE_S
        self._is_reported = False

    def put(self, traces: list[Trace]) -> None:
        """Add those of these traces that are not there yet, all or none.

        Raises:
            Retry: the server cannot be reached, is busy, or has no room.
            Dropped: the server does not take some of the traces, whatever is tried.
        """
        with self._or_retry():
            try:
                self._add(traces)
            except _REFUSED:
                self._add_one_by_one(traces)

    def maintenance(self) -> float:
        """Delete some rows that are too old; return the seconds until the next call.

        Raises:
            Retry: as :meth:`put`.
        """
        with self._or_retry():
            if self._keep_s is None:
                self._open()
                return inf
            oldest = timestamp(self._wall() - self._keep_s)
            with self._transaction() as connection:
                if connection.execute(_MAY_DELETE).fetchone() != (True,):
                    return _SWEEP_S
                counts = [
                    connection.execute(one, (oldest, oldest, _STEP)).rowcount for one in _DELETIONS
                ]
        return _STEP_REST_S if _STEP in counts else _SWEEP_S

    def reopen(self) -> None:
        """No file is kept."""

    def close(self) -> None:
        """Close the connection."""
        self._let_go()

    def _add(self, traces: list[Trace]) -> None:
        body = self._encoded(traces)
        with self._transaction() as connection:
            connection.execute(_ADD, (body,))

    def _add_one_by_one(self, traces: list[Trace]) -> None:
        """Find the traces that the server does not take."""
        count, why = 0, ""
        for one in traces:
            try:
                self._add([one])
            except _REFUSED as error:
                count, why = count + 1, reason(error)
        if count:
            raise Dropped(count, f"the server refused records: {why}")

    def _encoded(self, traces: list[Trace]) -> str:
        """Return traces as JSON, in which is nothing that PostgreSQL cannot hold."""
        with suppress(OverflowError, UnicodeError):
            body = self._encoder.encode(traces).decode()
            if "\\u0000" not in body:
                return body
        return self._encoder.encode(
            [_storable(msgspec.to_builtins(one)) for one in traces]
        ).decode()

    @contextmanager
    def _or_retry(self) -> Iterator[None]:
        """Ask for another try after what fails, and say so once."""
        try:
            yield
        except (psycopg.Error, LedgerError, OSError) as error:
            pause, why = self._pause_s, reason(error)
            self._pause_s = min(2 * pause, _LONGEST_PAUSE_S)
            if not self._is_reported:
                self._is_reported = True
                _log.warn("postgres: records wait, as they cannot be written: {why}", why=why)
            raise Retry(why, again_s=pause) from error
        self._pause_s = _FIRST_PAUSE_S
        if self._is_reported:
            self._is_reported = False
            _log.info("postgres: records can be written again")

    @contextmanager
    def _transaction(self) -> Iterator[Connection]:
        """Commit all that is done inside, or nothing; after a failure, close the connection."""
        try:
            connection = self._open()
            with self._deadline(connection):
                begin(connection)
                try:
                    yield connection
                except _REFUSED:
                    connection.execute(b"ROLLBACK")
                    raise
                connection.execute(b"COMMIT")
        except _REFUSED:
            raise
        except BaseException:
            self._let_go()
            raise

    def _open(self) -> Connection:
        if self._connection is None:
            connection = connect(self._conninfo)
            try:
                with self._deadline(connection):
                    bring_up_to_date(connection)
            except BaseException:
                connection.close()
                raise
            self._connection = connection
        return self._connection

    @contextmanager
    def _deadline(self, connection: Connection) -> Iterator[None]:
        """Cut the connection if what is done inside takes too long: a server may hang."""
        with socket.socket(fileno=os.dup(connection.fileno())) as sock:
            timer = threading.Timer(self._deadline_s, _cut, (sock,))
            timer.daemon = True
            timer.start()
            try:
                yield
            finally:
                timer.cancel()

    def _let_go(self) -> None:
        """Close the connection, which rolls back what it had begun."""
        connection, self._connection = self._connection, None
        if connection is not None:
            with suppress(psycopg.Error, OSError):
                connection.close()


def _cut(sock: socket.socket) -> None:
    with suppress(OSError):
        sock.shutdown(socket.SHUT_RDWR)


def _storable(value: Any) -> Any:
    """Return what PostgreSQL can hold: no NUL, no half of a surrogate pair, at most 64 bits."""
    if isinstance(value, str):
        return value.encode("utf-8", "replace").decode().replace("\0", "?")
    if isinstance(value, list):
        return [*map(_storable, value)]
    if isinstance(value, dict):
        return {name: _storable(one) for name, one in value.items()}
    if isinstance(value, int) and not -(2**63) <= value < 2**63:
        return None
    return value
