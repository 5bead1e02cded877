"""A ledger in PostgreSQL: how it is reached, how its schema is brought up to date, how it is read.

The table ``llmproxy_ledger`` says that the tables beside it are a ledger, and how many steps its
schema has taken (``ledger_steps.py``).  Hosts that start at once take the steps one after another,
behind an advisory lock.  To import this module is to need psycopg; nothing imports it unless a
configuration or a command names a server (ADR-0042).
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing
from typing import Any, TypeVar

from llmproxy.record.ledger_steps import POSTGRES, LedgerError, steps_for

try:
    import psycopg
    from psycopg.conninfo import conninfo_to_dict, make_conninfo
except ImportError as error:
    raise LedgerError(
        f"PostgreSQL needs psycopg, and it cannot be imported ({error}): "
        "pip install 'llmproxy[postgres]'"
    ) from error

T = TypeVar("T")

STEPS = steps_for(POSTGRES)
"""The statements of each step, for PostgreSQL."""

LOCK = 0x6C6C6D70
"""The advisory lock behind which steps are taken; ``LOCK + 1`` is that of who deletes old rows."""

STATEMENT_S, LOCK_S = 15, 5
"""Seconds for which the server works for a writer, and for which it waits for a lock."""

_CONNECT_S = 5
"""Seconds for which an address of the server is waited for."""

_DEFAULTS: Mapping[str, str | int] = {
    "connect_timeout": _CONNECT_S,
    "fallback_application_name": "llmproxy",
    "keepalives_idle": 10,
    "keepalives_interval": 5,
    "keepalives_count": 3,
    "tcp_user_timeout": 15_000,
}
"""What libpq connects with where the URL says nothing else: a server that is gone is noticed."""

_LIMITS = (
    f"SELECT set_config('statement_timeout', '{STATEMENT_S}s', true), "
    f"set_config('lock_timeout', '{LOCK_S}s', true)"
).encode()

# Not by to_regclass(): it looks into a cache, which may lag behind what another host has committed.
_TABLES = (
    b"SELECT relname FROM pg_catalog.pg_class WHERE relname IN ('llmproxy_ledger', 'traces') "
    b"AND pg_catalog.pg_table_is_visible(oid)"
)

Connection = psycopg.Connection[tuple[Any, ...]]


def conninfo_of(url: str, password: str | None) -> str:
    """Return what libpq connects with.

    Args:
        url: libpq's URL or connection string, without a password.
        password: the password, or None: libpq finds one itself, or needs none.

    Raises:
        LedgerError: libpq does not understand the URL; what may be a secret is not shown.
    """
    try:
        parts = conninfo_to_dict(url)
    except psycopg.Error as error:
        said = str(error).strip()
        shown = said if said.startswith("invalid URI query parameter") else "libpq cannot read it"
        raise LedgerError(f"the URL of PostgreSQL is wrong: {shown}") from None
    if "password" in parts:
        raise LedgerError("the URL of PostgreSQL is wrong: no password may stand in it")
    given: dict[str, Any] = {**_DEFAULTS, **parts}
    if password is not None:
        given["password"] = password
    return make_conninfo(**given)


def reason(error: BaseException) -> str:
    """Return what is wrong, in one line, without the rows that the server may quote."""
    primary = error.diag.message_primary if isinstance(error, psycopg.Error) else None
    lines = (line.strip() for line in (primary or str(error)).splitlines())
    return "; ".join(line for line in lines if line) or type(error).__name__


def within(seconds: float, call: Callable[[], T]) -> T:
    """Return what a call returns that reads a ledger, if it returns in time.

    Raises:
        LedgerError: it cannot be read, or not in time; then a thread of its own goes on with it.
    """
    done: list[T | LedgerError] = []

    def run() -> None:
        try:
            done.append(call())
        except LedgerError as error:
            done.append(error)

    thread = threading.Thread(target=run, name="ledger", daemon=True)
    thread.start()
    thread.join(seconds)
    if not done:
        raise LedgerError(f"PostgreSQL: nothing came within {seconds:g} s")
    (found,) = done
    if isinstance(found, LedgerError):
        raise found
    return found


def begin(connection: Connection) -> None:
    """Begin a transaction in which nothing waits for ever."""
    connection.execute(b"BEGIN")
    connection.execute(_LIMITS)


def connect(conninfo: str) -> Connection:
    """Connect; what stands outside of :func:`begin` is a transaction of its own.

    Raises:
        psycopg.Error: the server cannot be reached, or refuses.
    """
    connection = psycopg.connect(conninfo, autocommit=True, client_encoding="UTF8")
    connection.prepare_threshold = None  # poolers may give each transaction another session
    return connection


def bring_up_to_date(connection: Connection) -> None:
    """Make the ledger, or take the steps that it lacks, if that is needed.

    Raises:
        LedgerError: the tables are none of ours, or those of a newer version.
        psycopg.Error: the server refuses.
    """
    if _steps_taken(connection) < len(STEPS):
        _take_steps(connection)


class PostgresLedger:
    """A ledger that is read: a source of reports.

    Args:
        conninfo: what libpq connects with.
        hint: stands behind the reason where it cannot be reached.
        is_ours: it is a daemon's own, which brings it up to date before it reads.
    """

    engine = POSTGRES

    def __init__(self, conninfo: str, hint: str = "", *, is_ours: bool = False) -> None:
        self._conninfo = conninfo
        self._hint = hint
        self._is_ours = is_ours

    def rows(self, query: str, *arguments: object) -> Iterator[tuple[Any, ...]]:
        """Yield what a query finds; all of it is of one moment.

        Raises:
            LedgerError: it cannot be read.
        """
        try:
            with closing(connect(self._conninfo)) as connection:
                if self._is_ours:
                    bring_up_to_date(connection)
                connection.execute(b"BEGIN ISOLATION LEVEL REPEATABLE READ READ ONLY")
                steps = _steps_taken(connection)
                if not steps:
                    raise LedgerError("PostgreSQL: there is no ledger in this database")
                if steps < len(STEPS):
                    raise LedgerError(
                        f"PostgreSQL: a ledger of an older version ({steps}, not {len(STEPS)}): "
                        "start a daemon, which brings it up to date"
                    )
                yield from connection.execute(query.replace("?", "%s").encode(), arguments)
        except psycopg.Error as error:
            raise LedgerError(f"PostgreSQL: {reason(error)}{self._hint}") from error


def _steps_taken(connection: Connection) -> int:
    """Return how many steps the schema has taken, 0 where nothing is there.

    Raises:
        LedgerError: the tables are another program's, or have taken more steps than we know.
    """
    tables = {name for (name,) in connection.execute(_TABLES)}
    if "llmproxy_ledger" not in tables:
        if tables:
            raise LedgerError(
                'PostgreSQL: the table "traces" is another program\'s: use a database or a '
                "schema (search_path) of its own"
            )
        return 0
    found = connection.execute(b"SELECT steps FROM llmproxy_ledger").fetchone()
    steps = int(found[0]) if found else 0
    if steps > len(STEPS):
        raise LedgerError(
            f"PostgreSQL: a ledger of a newer version ({steps}, this one knows {len(STEPS)})"
        )
    return steps


def _take_steps(connection: Connection) -> None:
    """Take the steps that are missing, all or none; another host may have done it already."""
    with connection.transaction():
        connection.execute(_LIMITS)
        connection.execute(b"SELECT pg_advisory_xact_lock(%d)" % LOCK)
        taken = _steps_taken(connection)
        if not taken:
            connection.execute(b"CREATE TABLE llmproxy_ledger (steps integer NOT NULL)")
            connection.execute(b"INSERT INTO llmproxy_ledger VALUES (0)")
        for statements in STEPS[taken:]:
            for statement in statements:
                connection.execute(statement.encode())
        connection.execute(b"UPDATE llmproxy_ledger SET steps = %d" % len(STEPS))
