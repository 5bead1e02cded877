"""Reports from ledgers: totals by group, and the checkpoints of sessions.

Instances may have a ledger of their own each; the reports add them up.  Each ledger is read at one
moment, while its daemon may write.  The SQL is what SQLite and PostgreSQL have in common; where
they differ, an :class:`~llmproxy.record.ledger_steps.Engine` has the words.  Unknown is not zero: a
sum of tokens is None if no request of the group reported any.  ``unreported`` says how many
requests did not report all of theirs.  The command ``llmproxy usage`` shows the reports; nothing
here knows how.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence

import msgspec

from llmproxy.errors import EndReason
from llmproxy.record.ledger_source import Source
from llmproxy.record.ledger_steps import COMPLETE, TOKENS, UNREPORTED, Engine

DAY = "day"

GROUPS = ("client", "model", "served_model", "provider", "route", "session", "instance", DAY)
"""What requests can be grouped by: columns, and the day in UTC."""

_PREFLIGHT = "(method = 'OPTIONS' AND provider IS NULL AND end_reason = 'complete')"

_REQUEST = "tunnel IS NULL"
"""What goes to other hosts than providers is in :func:`tunnels_of` alone."""

_PORT = re.compile(r":[0-9]+$")

_ONE = "coalesce(responses, 0) = 0"
"""A WebSocket's own record has the sums of those of its responses, which count."""


def _sum(column: str) -> str:
    """Return a sum that is a whole number in every database, as in each row."""
    return f"CAST(sum({column}) AS BIGINT)"


_SUMS = ", ".join(map(_sum, TOKENS))

_COUNTED = "coalesce(counted_tokens, coalesce(input_tokens, 0) + coalesce(output_tokens, 0))"

Group = tuple[str | None, ...]
"""The values that a group has in common, in the order of the keys; None for no value."""


class Totals(msgspec.Struct):
    """The totals of some requests.

    Attributes:
        complete: how many of the requests ended as ``complete``.
        unreported: how many of the requests did not report all their tokens.  The sums lack these.
    """

    requests: int = 0
    complete: int = 0
    unreported: int = 0
    input_tokens: int | None = None
    output_tokens: int | None = None
    cache_read_tokens: int | None = None
    cache_write_tokens: int | None = None
    reasoning_tokens: int | None = None

    def add(self, other: Totals) -> None:
        """Add the totals of other requests."""
        for name in self.__struct_fields__:
            ours, theirs = getattr(self, name), getattr(other, name)
            if theirs is not None:
                setattr(self, name, theirs if ours is None else ours + theirs)


class Ways(msgspec.Struct):
    """What one client asked of one host, if it came to the same: by CONNECT, or by URL.

    Attributes:
        host: host and port.
        outcome: ``intercepted``, ``tunnelled``, ``forwarded``, ``would_refuse`` or ``refused``.
        error: the reason word of the refusal or the failure, such as ``no_key``; None for neither.
        client: None where nobody said who calls.
        bytes_in: bytes from the client to the host.
        bytes_out: bytes from the host to the client.
    """

    host: str
    outcome: str
    error: str | None
    client: str | None
    count: int
    bytes_in: int
    bytes_out: int
    last_time: str

    def add(self, other: Ways) -> None:
        """Add those of another ledger."""
        self.count += other.count
        self.bytes_in += other.bytes_in
        self.bytes_out += other.bytes_out
        self.last_time = max(self.last_time, other.last_time)


class Checkpoint(msgspec.Struct):
    """How far a session has come.

    ``client`` is None in what version 0.1 wrote for callers that it did not know.
    """

    session: str
    client: str | None
    totals: Totals
    last_trace: str
    first_time: str
    last_time: str


def usage_of(source: Source, by: Sequence[str], since: str = "") -> dict[Group, Totals]:
    """Return totals by group, in the order of the groups, of what the proxy did not refuse.

    A browser's preflight, to which the proxy responds itself, is no request either.

    Args:
        source: the ledgers.
        by: keys of :data:`GROUPS`.
        since: RFC 3339 in UTC.  Requests that began earlier do not count.

    Raises:
        LedgerError: one of the ledgers cannot be read.
    """
    found: dict[Group, Totals] = {}
    engine = source.engine
    columns = ", ".join(engine.day if one == DAY else one for one in by)
    query = (
        f"SELECT {columns}, count(*), {COMPLETE}, {UNREPORTED}, {_SUMS} "  # noqa: S608 - names of ours
        f"FROM traces WHERE time >= ? AND end_reason != ? AND NOT {_PREFLIGHT} AND {_REQUEST} "
        f"AND {_ONE} "
        f"GROUP BY {columns}"
    )
    for row in source.rows(query, since or engine.ever, EndReason.REJECTED.value):
        group, figures = row[: len(by)], row[len(by) :]
        found.setdefault(group, Totals()).add(Totals(*figures))
    return dict(sorted(found.items(), key=lambda item: _order(item[0])))


def refused_in(source: Source, since: str = "") -> int:
    """Return how many requests the proxy refused: no provider saw them, and they named anything.

    Args:
        source: the ledgers.
        since: RFC 3339 in UTC.

    Raises:
        LedgerError: one of the ledgers cannot be read.
    """
    query = f"SELECT count(*) FROM traces WHERE time >= ? AND end_reason = ? AND {_REQUEST}"  # noqa: S608 - words of ours
    rows = source.rows(query, since or source.engine.ever, EndReason.REJECTED.value)
    return sum(count for (count,) in rows)


def tunnels_of(source: Source, since: str = "") -> list[Ways]:
    """Return the hosts that were asked for, by CONNECT or by URL; the most frequent ones first.

    Args:
        source: the ledgers.
        since: RFC 3339 in UTC.

    Raises:
        LedgerError: one of the ledgers cannot be read.
    """
    query = (
        f"SELECT path, tunnel, error, client, count(*), {_sum('bytes_in')}, {_sum('bytes_out')}, "  # noqa: S608 - names of ours
        f"{_moment(source.engine, 'max(time)')} "
        "FROM traces WHERE time >= ? AND tunnel IS NOT NULL GROUP BY path, tunnel, error, client"
    )
    found: dict[Group, Ways] = {}
    for row in source.rows(query, since or source.engine.ever):
        other = Ways(_host_and_port(row[0]), *row[1:])
        ours = found.setdefault((other.host, other.outcome, other.error, other.client), other)
        if ours is not other:
            ours.add(other)
    order = sorted(found, key=lambda key: (-found[key].count, _order(key)))
    return [found[key] for key in order]


def _host_and_port(path: str) -> str:
    """Return the authority in a record's path, which is a URL where the request had one."""
    if not path.startswith("http://"):
        return path
    authority = path.removeprefix("http://").partition("/")[0].partition("?")[0].lower()
    return authority if _PORT.search(authority) else f"{authority}:80"


def tokens_by_client(source: Source, since: str, instance: str | None = None) -> dict[str, int]:
    """Return the tokens that count for the limits of each client that is known.

    Where the client had no limits, those are the tokens that were reported.

    Args:
        source: the ledger.
        since: RFC 3339 in UTC.
        instance: whose requests count; None for all.

    Raises:
        LedgerError: the ledger cannot be read.
    """
    query = (
        f"SELECT client, {_sum(_COUNTED)} "  # noqa: S608 - words of ours
        f"FROM traces WHERE time >= ? AND client IS NOT NULL AND {_ONE}"
        f"{'' if instance is None else ' AND instance = ?'} GROUP BY client"
    )
    found = Counter[str]()
    for client, tokens in source.rows(query, since, *(() if instance is None else (instance,))):
        found[client] += tokens
    return dict(found)


def checkpoints_of(source: Source, since: str = "") -> list[Checkpoint]:
    """Return the sessions that had a request since then, the latest one first.

    Args:
        source: the ledgers.
        since: RFC 3339 in UTC.

    Raises:
        LedgerError: one of the ledgers cannot be read.
    """
    found: dict[tuple[str, str], Checkpoint] = {}
    times = (_moment(source.engine, one) for one in ("first_time", "last_time"))
    query = (
        f"SELECT session, client, last_trace, {', '.join(times)}, "  # noqa: S608 - names of ours
        f"requests, complete, unreported, {', '.join(TOKENS)} FROM sessions WHERE last_time >= ?"
    )
    for session, client, last, *times_and_figures in source.rows(
        query, since or source.engine.ever
    ):
        first_time, last_time, *figures = times_and_figures
        other = Checkpoint(session, client or None, Totals(*figures), last, first_time, last_time)
        ours = found.setdefault((session, client), other)
        if ours is not other:
            _merge(ours, other)
    return sorted(found.values(), key=lambda one: one.last_time, reverse=True)


def _merge(ours: Checkpoint, other: Checkpoint) -> None:
    """Add the checkpoint of another instance to ours."""
    ours.totals.add(other.totals)
    ours.first_time = min(ours.first_time, other.first_time)
    if other.last_time > ours.last_time:
        ours.last_time, ours.last_trace = other.last_time, other.last_trace


def _moment(engine: Engine, column: str) -> str:
    """Return the SQL that reads a moment as the records have it."""
    return engine.moment.format(column)


def _order(group: Group) -> list[tuple[bool, str]]:
    return [(value is not None, value or "") for value in group]
