"""Where reports come from: some SQLite files, read as one ledger.

Files may have been copied from one another, or from hosts that are gone.  A record that is in two
of them counts once: the ids of the files that were read are kept in a temporary database, which is
attached to each of the others.  Files of different instances have nothing in common, and are spared
that.  Views there hide what was seen, under the names of the tables, so
that no query of a report knows how many files there are.
"""

from __future__ import annotations

import os
import sqlite3
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from typing import Any, Protocol

from llmproxy.record.ledger_schema import open_for_reading
from llmproxy.record.ledger_steps import (
    COMPLETE,
    COUNTS_FOR_SESSION,
    SQLITE,
    TOKENS,
    UNREPORTED,
    Engine,
    LedgerError,
)

_SEEN = """
    PRAGMA journal_mode = OFF;
    PRAGMA synchronous = OFF;
    CREATE TABLE ids (id TEXT PRIMARY KEY) WITHOUT ROWID;
    CREATE TABLE ends (
        session TEXT, client TEXT, first_time TEXT, last_trace TEXT,
        PRIMARY KEY (session, client, first_time, last_trace)
    ) WITHOUT ROWID;
"""

_END = "session, client, first_time, last_trace"
"""A checkpoint that has these in common with another one is the same, in a copy."""

_SEE = (
    "INSERT OR IGNORE INTO seen.ids SELECT id FROM main.traces",
    f"INSERT OR IGNORE INTO seen.ends SELECT {_END} FROM main.sessions",  # noqa: S608 - names of ours
)

_SUMS = ("requests", "complete", "unreported", *TOKENS)

_HIDE = (
    """CREATE TEMP VIEW traces AS
    SELECT * FROM main.traces WHERE id NOT IN (SELECT id FROM seen.ids)""",
    f"""CREATE TEMP VIEW sessions AS
    SELECT session, client, last_trace, first_time, last_time,
        {", ".join(f"whole.{n} - coalesce(again.{n}, 0) AS {n}" for n in _SUMS)}
    FROM main.sessions AS whole LEFT JOIN (
        SELECT session, client, count(*) AS requests, {COMPLETE} AS complete,
            {UNREPORTED} AS unreported, {", ".join(f"sum({n}) AS {n}" for n in TOKENS)}
        FROM main.traces WHERE id IN (SELECT id FROM seen.ids)
            AND session IS NOT NULL {COUNTS_FOR_SESSION} GROUP BY 1, 2
    ) AS again USING (session, client)
    WHERE whole.requests > coalesce(again.requests, 0)
        AND ({_END}) NOT IN (SELECT {_END} FROM seen.ends)""",  # noqa: S608 - names of ours
)


class Source(Protocol):
    """What a report reads.

    Attributes:
        engine: whose SQL it wants, with ``?`` for each argument.
    """

    engine: Engine

    def rows(self, query: str, *arguments: object) -> Iterator[tuple[Any, ...]]:
        """Yield what a query finds, of one file after another.

        Raises:
            LedgerError: it cannot be read.
        """


class Files:
    """Ledgers in SQLite files.

    Args:
        paths: the files.
    """

    engine = SQLITE

    def __init__(self, paths: Sequence[str]) -> None:
        self._paths = paths

    def rows(self, query: str, *arguments: object) -> Iterator[tuple[Any, ...]]:
        """Yield what a query finds in each of the files, whose errors have its name.

        Raises:
            LedgerError: one of the files cannot be read.
        """
        shared = _shared(self._paths) if len(self._paths) > 1 else []
        for path in self._paths:
            if path not in shared:
                yield from _rows(path, query, arguments)
        if shared:
            yield from _rows_once(shared, query, arguments)


def _shared(paths: Sequence[str]) -> list[str]:
    """Return the files that may have records in common, as they are of the same instance.

    What has sessions alone may have them in common with any file.
    """
    instances = [
        {name for (name,) in _rows(path, "SELECT DISTINCT instance FROM traces", ())}
        for path in paths
    ]
    counts = Counter(name for names in instances for name in names)
    if not all(instances):
        return [*paths]
    return [
        path
        for path, names in zip(paths, instances, strict=True)
        if any(counts[name] > 1 for name in names)
    ]


def _rows_once(
    paths: Sequence[str], query: str, arguments: Sequence[object]
) -> Iterator[tuple[Any, ...]]:
    """Yield what a query finds in each of the files and not in one before."""
    with tempfile.TemporaryDirectory(prefix="llmproxy-") as folder:
        seen = os.path.join(folder, "seen")
        with closing(sqlite3.connect(seen)) as connection:
            connection.executescript(_SEEN)
        for at, path in enumerate(paths):
            with _named(path), closing(open_for_reading(path, beside=seen)) as connection:
                for view in _HIDE if at else ():
                    connection.execute(view)
                yield from connection.execute(query, arguments)
                for statement in _SEE if at < len(paths) - 1 else ():
                    connection.execute(statement)
                connection.execute("COMMIT")


def _rows(path: str, query: str, arguments: Sequence[object]) -> Iterator[tuple[Any, ...]]:
    with _named(path), closing(open_for_reading(path)) as connection:
        yield from connection.execute(query, arguments)


@contextmanager
def _named(path: str) -> Iterator[None]:
    """Name the file in every error."""
    try:
        yield
    except sqlite3.Error as error:
        raise LedgerError(f"{path}: {error}") from error
