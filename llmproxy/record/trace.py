"""The trace: the one record of one request, written when the request ends.

A :class:`Sink` takes the trace; ``record/sinks.py`` has all sinks.  No key is ever in a record.
Content is in a record only if a route asks for it (``capture``).  Nothing here knows a file or a
network.
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime
from functools import lru_cache
from typing import Protocol

import msgspec
from msgspec import UNSET, UnsetType

CONTENT = ("finish_reason", "response_id", "text", "tool_calls")
"""The fields of a response's content: left out unless they are set, and in no ledger."""


SKIPPED = "skipped"
"""The outcome of a try that was not made."""


class Attempt(msgspec.Struct):
    """One try at one provider.

    ``outcome`` is ``ok``, an end reason, or ``skipped`` where the provider was passed over without
    being asked; ``cause`` distinguishes failures that have the same outcome, such as the status of
    a refusal; ``seconds`` is the time until the response's head or the failure.
    """

    provider: str
    outcome: str
    seconds: float
    cause: str | None = None


class ToolCall(Protocol):
    """A tool call; a struct that is encoded as it is."""

    @property
    def arguments(self) -> str:
        """The arguments of the call, mostly JSON."""


class Trace(msgspec.Struct, kw_only=True):
    """The record of one request; names and order are those of design 10.

    Times are in seconds; ``bytes_in`` and ``bytes_out`` count bodies.  A WebSocket on which
    responses were followed has one record for itself, with their number in ``responses`` and the
    sums of their tokens, and one for each of them, whose id is the connection's with a number
    behind it.  Token fields are null if no
    tokens were counted: unknown is not zero.  The last fields, :data:`CONTENT`, are left out of the
    record unless they are set.  If ``tool_calls`` is set, ``text`` must be set, too, if only to "".
    """

    time: str
    id: str
    client_request_id: str | None = None
    instance: str
    peer: str
    user_agent: str | None = None
    client: str | None = None
    session: str | None = None
    route: str | None = None
    provider: str | None = None
    dialect: str | None = None
    method: str
    path: str
    model: str | None = None
    served_model: str | None = None
    stream: bool | None = None
    status: int | None = None
    end_reason: str = ""
    error: str | None = None
    is_complete: bool = False
    attempts: list[Attempt] = msgspec.field(default_factory=list)
    bytes_in: int = 0
    bytes_out: int = 0
    chunks: int = 0
    head_s: float | None = None
    first_chunk_s: float | None = None
    duration_s: float = 0.0
    longest_gap_s: float | None = None
    paused_s: float = 0.0
    input_tokens: int | None = None
    output_tokens: int | None = None
    cache_read_tokens: int | None = None
    cache_write_tokens: int | None = None
    reasoning_tokens: int | None = None
    usage: str | None = None
    degraded: list[str] = msgspec.field(default_factory=list)
    on_disconnect: str | None = None
    model_from: str | None = None
    queued_s: float = 0.0
    counted_tokens: int | None = None
    tunnel: str | None = None
    responses: int | None = None
    events: int | None = None
    chunks_at_once: int | None = None
    last_chunk_s: float | None = None
    buffered_upstream: bool | None = None
    resent: str | None = None
    finish_reason: str | UnsetType = UNSET
    response_id: str | UnsetType = UNSET
    text: str | UnsetType = UNSET
    tool_calls: Sequence[ToolCall] | UnsetType = UNSET


NAMES = tuple(name for name in Trace.__struct_fields__ if name not in CONTENT)
"""The fields that every record has, in their order."""


def content_size(trace: Trace) -> int:
    """Return how many characters of a response's content a trace holds."""
    size = 0 if trace.text is UNSET else len(trace.text)
    if trace.tool_calls is not UNSET:
        size += sum(len(call.arguments) for call in trace.tool_calls)
    return size


def without_content(trace: Trace) -> Trace:
    """Return a copy of a trace without the text and the tool calls of its response."""
    return msgspec.structs.replace(trace, text=UNSET, tool_calls=UNSET)


def conceal(trace: Trace, *, path: bool) -> None:
    """Leave out what a client wrote freely, as it holds a key; ``path`` tells whether that does."""
    trace.client_request_id = trace.user_agent = trace.session = None
    if path:
        trace.path = ""


class Sink(Protocol):
    """Where a request's trace goes when the request ends."""

    def write(self, trace: Trace) -> None:
        """Take one trace; never blocks and never raises."""


def trace_id(trace: Trace) -> str:
    """Return by what a tracing system knows the request: the id in 32 digits."""
    return trace.id.zfill(32)


def timestamp(seconds: float) -> str:
    """Return seconds since the epoch as RFC 3339 in UTC, to the millisecond."""
    thousandths = int(seconds * 1000)
    return f"{_whole_second(thousandths // 1000)}.{thousandths % 1000:03d}Z"


@lru_cache(maxsize=16)
def _whole_second(seconds: int) -> str:
    return datetime.fromtimestamp(seconds, UTC).isoformat().removesuffix("+00:00")
