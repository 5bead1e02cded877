"""The flight recorder: the last requests that did not end as they should, and how each went.

Each is a :class:`Capsule`: what the record has of it, and of the response how much came, when, and
how it broke.  No content is in it, and nothing that a caller wrote but the model, so that it can be
handed on.  The demo provider plays one again (``llmproxy demo --replay``), so that a provider's
fault becomes a test (ADR-0037).

The capsules are in memory alone, and of each end reason only the newest are kept: callers who are
refused, however many, push out nothing of a provider's fault.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from itertools import chain

import msgspec

from llmproxy.record.trace import Attempt, Trace

KEPT = 32
"""How many capsules are kept of each end reason."""

FORM = 1
"""The form of a capsule; another number says that older readers do not understand it."""


Bytes = bytes
"""The type, for a struct that has a field of that name."""

_LONGEST_DETAIL = 2000
_WHOLE = ("upstream_refused", "upstream_failed", "unfinished", "rejected")
"""The ends of which a client may have got all that there was; behind the others it was cut."""


class Body(msgspec.Struct, kw_only=True):
    """How a response went, as it came from the provider; times are seconds since the request.

    Attributes:
        status: the provider's.
        content_type, content_encoding: as its head has them.
        length: its Content-Length, or None where it had none.
        chunks: how many reads brought the body.
        bytes: how much it had.
        events: how many events were found in it, or None where nothing read it.
        first_chunk_s, last_chunk_s: when the first and the last of the chunks came.
        longest_gap_s: the longest time between two of them, without pauses.
        chunks_at_once: how many came right behind another.
        ends_between_events: whether nothing of a further event came.
        last_chunks: the last of the chunks, in their order: when each came, and its bytes.
        fields: its header fields, in their order; of one that could be a secret there is only how
            long its value is.  A stream keeps those that name requests, hops and limits.
        last_bytes: how it ended, where the route keeps content; in base64, as it came.
    """

    status: int
    content_type: str | None
    content_encoding: str | None
    length: int | None
    chunks: int
    bytes: int
    events: int | None
    first_chunk_s: float | None
    last_chunk_s: float | None
    longest_gap_s: float
    chunks_at_once: int
    ends_between_events: bool
    last_chunks: list[tuple[float, int]]
    fields: list[tuple[str, str]] = []
    last_bytes: Bytes | None = None


class Capsule(msgspec.Struct, kw_only=True):
    """One abnormal end; the fields of a record mean what they mean there.

    Attributes:
        capsule: :data:`FORM`.
        cause: one word that distinguishes ends of the same reason, as ``reset`` and ``closed``.
        detail: the same in words, for operators; it may name addresses.
        to_client: how the response ended for the client: ``nothing``, an ``error`` of the proxy's,
            an ``error_event`` behind what had come, ``broken_off``, ``left`` where the client
            left by itself, or ``whole``.
        response: how the response went, or None where none began.
    """

    capsule: int = FORM
    id: str
    time: str
    client: str | None
    route: str | None
    provider: str | None
    dialect: str | None
    model: str | None
    served_model: str | None
    stream: bool | None
    status: int | None
    end_reason: str
    error: str | None
    cause: str | None
    detail: str | None
    attempts: list[Attempt]
    bytes_in: int
    bytes_out: int
    queued_s: float
    head_s: float | None
    duration_s: float
    paused_s: float
    to_client: str | None = None
    response: Body | None


def capsule(
    trace: Trace,
    cause: str | None = None,
    detail: str | None = None,
    response: Body | None = None,
    to_client: str | None = None,
) -> Capsule:
    """Return the capsule of a request that has ended; the arguments are its fields."""
    if to_client is None:
        if trace.end_reason == "client_gone":
            to_client = "left"
        elif trace.status is None:
            to_client = "nothing"
        else:
            to_client = "whole" if trace.end_reason in _WHOLE else "broken_off"
    return Capsule(
        id=trace.id,
        time=trace.time,
        client=trace.client,
        route=trace.route,
        provider=trace.provider,
        dialect=trace.dialect,
        model=trace.model,
        served_model=trace.served_model,
        stream=trace.stream,
        status=trace.status,
        end_reason=trace.end_reason,
        error=trace.error,
        cause=cause,
        detail=None if detail is None else detail[:_LONGEST_DETAIL],
        attempts=trace.attempts,
        bytes_in=trace.bytes_in,
        bytes_out=trace.bytes_out,
        queued_s=trace.queued_s,
        head_s=trace.head_s,
        duration_s=trace.duration_s,
        paused_s=trace.paused_s,
        to_client=to_client,
        response=response,
    )


class FlightRecorder:
    """The newest capsules of each end reason."""

    def __init__(self) -> None:
        self._kept: dict[str, deque[Capsule]] = {}

    def keep(self, capsule: Capsule) -> None:
        """Keep a capsule, and forget the oldest of the same end reason if there are too many."""
        self._kept.setdefault(capsule.end_reason, deque(maxlen=KEPT)).append(capsule)

    def newest_first(self) -> list[Capsule]:
        """Return all capsules, by the time at which their requests came in."""
        return sorted(self, key=lambda kept: kept.time, reverse=True)

    def find(self, name: str) -> Capsule | None:
        """Return the capsule of a request's id, or None where it is not kept (any more)."""
        return next((kept for kept in self if kept.id == name), None)

    def __iter__(self) -> Iterator[Capsule]:
        """Go through all capsules."""
        return chain.from_iterable(self._kept.values())
