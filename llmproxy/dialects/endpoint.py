"""What a row of the table of endpoints says, and what the readers of all dialects share.

A row answers "what is this path?" once for the whole program: for the request, for the tap that
reads the response, and for the span.  This module knows no dialect's shapes; the modules that do
make the rows, and ``endpoints.py`` is the table.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Annotated, Literal

import msgspec

from llmproxy.dialects.accumulated import Accumulated
from llmproxy.dialects.dialect import Dialect

Operation = Literal["chat", "text_completion", "embeddings", "generate_content"]
"""What an endpoint does, in the words of OpenTelemetry (``gen_ai.operation.name``)."""

Reader = Callable[[bytes, Accumulated], object]
"""Reads the data of one event, or a whole document, into what is accumulated.

Raises:
    msgspec.DecodeError, UnicodeDecodeError, RecursionError: this is not what the dialect sends.
"""

Count = Annotated[int, msgspec.Meta(ge=0, le=10**12)]
"""A number of tokens.  A larger one is refused, here as in the ledger, so that their sums agree."""

Part = msgspec.Struct
"""The base of what is decoded: only the members that are read, in the provider's own words."""

DONE = b"[DONE]"
"""The end marker of OpenAI's older endpoints; it is no JSON."""

NEVER = re.compile(rb"(?!)")
"""Matches nothing."""


class ErrorObject(Part, gc=False):
    """The object of an ``error`` member."""

    type: str | int | None = None
    code: str | int | None = None
    message: str | None = None


ErrorMember = ErrorObject | list[ErrorObject] | str | bool | int | float | None
"""The value of an ``error`` member.

It has a type, so that an event of a MiB cannot become a million objects.
"""


class Endpoint(msgspec.Struct, frozen=True):
    """One endpoint of an API: what it does, and how its responses are read.

    Attributes:
        name: how logs and tests call it.
        dialect: the dialect that has it; providers of other dialects may offer it, too.
        operation: what it does.
        event: reads one event of a stream.
        document: reads a response in one piece, or an error's body.
        end_marker: what ends a stream, in words; None where nothing does.
        may_end: found in the data of an event that may be the end marker although it cannot be
            read.
        needs_blank_line: some SDK of the API drops the last event of SSE, or fails, if the event
            lacks the blank line behind it.
        has_long_marker: the end marker may be longer than ``limits.event``.
        has_lines: a stream is lines of JSON; a document is such a line.
        has_array: a stream may be one JSON array, whose items are the events.
        input_has_cached: the count of the input includes tokens read from and written to a cache.
        text_only: names of SSE events that hold text alone: they need not be decoded for the usage.
        streams_by_default: a body that does not mention ``stream`` asks for a stream.
        streams: whether a request asks for a stream, if the path alone says so; else None.
        usage_option: matches the whole path, without the query, where a stream has its counts only
            if ``stream_options.include_usage`` asks for them; None where no path needs that.
    """

    name: str
    dialect: Dialect
    operation: Operation
    event: Reader
    document: Reader
    end_marker: str | None = None
    may_end: re.Pattern[bytes] = NEVER
    needs_blank_line: bool = False
    has_long_marker: bool = False
    has_lines: bool = False
    has_array: bool = False
    input_has_cached: bool = True
    text_only: frozenset[bytes] = frozenset()
    streams_by_default: bool = False
    streams: bool | None = None
    usage_option: re.Pattern[bytes] | None = None


def is_whole(event: bytes) -> bool:
    """Return whether the provider sent an event in full: it is JSON, or the older end marker."""
    try:
        msgspec.json.decode(event, type=msgspec.Raw)
    except (msgspec.DecodeError, RecursionError):
        return event.startswith(DONE)
    return True


def read_error(error: ErrorMember, seen: Accumulated) -> None:
    """Take the value of an ``error`` member: an object, a sentence, or what stands for no error."""
    if isinstance(error, list):
        error = error[0] if error else None
    if isinstance(error, ErrorObject):
        kind = error.type or error.code
        seen.fail(None if kind is None else str(kind), error.message)
    elif error:
        seen.fail(None, str(error))
