"""Requests that somebody broke off, from ledgers: who, and how long after the last byte.

A limit on some hop cuts many requests at the same age, or after the same silence.  Who looks for it
needs both figures of every cut, and from which side it came.  What this proxy cut itself is not
here: it knows its own limits.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Literal

import msgspec

from llmproxy.errors import EndReason
from llmproxy.record.ledger_source import Source
from llmproxy.record.trace import Attempt

Side = Literal["client", "provider"]

_ENDS: dict[str, Side] = {
    EndReason.CLIENT_GONE.value: "client",
    EndReason.UPSTREAM_BROKEN.value: "provider",
}

_QUERY = (
    "SELECT route, provider, end_reason, duration_s, queued_s, head_s, last_chunk_s, "
    "CAST(attempts AS TEXT) "
    "FROM traces WHERE time >= ? AND tunnel IS NULL AND route IS NOT NULL "
    "AND coalesce(status, 0) <> 101 AND (end_reason IN (?, ?) OR CAST(attempts AS TEXT) LIKE ?)"
)


class Cut(msgspec.Struct, frozen=True):
    """One request, or one try of it, that was broken off.

    Attributes:
        route: its route's name.
        provider: its provider's.
        side: from which side it was broken off.
        waited: nothing had come of the response yet.
        silence_s: seconds from the last byte of the response, or from the request where none had
            come, to the end.
        age_s: seconds from the request to the end.
    """

    route: str
    provider: str
    side: Side
    waited: bool
    silence_s: float
    age_s: float


def cuts_of(source: Source, since: str = "") -> list[Cut]:
    """Return the cuts in some ledgers.

    Args:
        source: the ledgers.
        since: RFC 3339 in UTC.

    Raises:
        LedgerError: one of the ledgers cannot be read.
    """
    broken = EndReason.UPSTREAM_BROKEN.value
    found: list[Cut] = []
    for row in source.rows(_QUERY, since or source.engine.ever, *_ENDS, f'%"{broken}"%'):
        found += _cuts(*row)
    return found


def _cuts(
    route: str,
    provider: str | None,
    end: str,
    duration: float,
    queued: float,
    head: float | None,
    last_chunk: float | None,
    attempts: str,
) -> Iterator[Cut]:
    tries = msgspec.convert(json.loads(attempts), list[Attempt])
    side, last_byte = _ENDS.get(end), head if last_chunk is None else last_chunk
    is_a_try = side == "provider" and last_byte is None and tries
    if side is not None and provider is not None and not is_a_try:
        began = queued if last_byte is None else last_byte
        silence, age = max(0.0, duration - began), max(0.0, duration - queued)
        yield Cut(route, provider, side, last_byte is None, silence, age)
    for one in tries:
        if one.outcome == EndReason.UPSTREAM_BROKEN:
            yield Cut(route, one.provider, "provider", True, one.seconds, one.seconds)
