"""What a row of the table of endpoints says, and what the readers of all dialects share.

A row answers "what is this path?" once for the whole program: for the request, for the tap that
reads the response, and for the span.  This module knows no dialect's shapes; the modules that do
make the rows, and ``endpoints.py`` is the table.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Annotated, Any, Literal, NamedTuple

import msgspec

from llmproxy.dialects.accumulated import Accumulated
from llmproxy.dialects.dialect import Dialect

Operation = Literal["chat", "text_completion", "embeddings"]
"""What an endpoint does, in the words of OpenTelemetry (``gen_ai.operation.name``)."""

Reader = Callable[[bytes, Accumulated], None]
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


class Endpoint(NamedTuple):
    """One endpoint of an API: what it does, and how its responses are read.

    Attributes:
        name: how logs and tests call it.
        dialect: the dialect that has it; providers of other dialects may offer it, too.
        operation: what it does.
        event: reads one event of a stream.
        document: reads a response in one piece, or an error's body.
        end_marker: what ends a stream, in words; None where nothing does.
        text_only: names of SSE events that hold text alone: they need not be decoded for the usage.
        streams_by_default: a body that does not mention ``stream`` asks for a stream.
        usage_option: matches the whole path, without the query, where a stream has its counts only
            if ``stream_options.include_usage`` asks for them; None where no path needs that.
    """

    name: str
    dialect: Dialect
    operation: Operation
    event: Reader
    document: Reader
    end_marker: str | None = None
    text_only: frozenset[bytes] = frozenset()
    streams_by_default: bool = False
    usage_option: re.Pattern[bytes] | None = None


def is_whole(event: bytes) -> bool:
    """Return whether the provider sent an event in full: it is JSON, or the older end marker."""
    try:
        msgspec.json.decode(event, type=msgspec.Raw)
    except (msgspec.DecodeError, RecursionError):
        return event.startswith(DONE)
    return True


def read_error(error: Any, seen: Accumulated) -> None:
    """Take the value of an ``error`` member: an object, a sentence, or what stands for no error."""
    if isinstance(error, dict):
        kind = _text(error.get("type")) or _text(error.get("code"))
        seen.fail(kind, _text(error.get("message")))
    elif error:
        seen.fail(None, _text(error))


def json_text(value: Any) -> str:
    """Return the arguments of a tool as text; most providers send JSON inside a string."""
    return value if isinstance(value, str) else msgspec.json.encode(value).decode()


def _text(value: Any) -> str | None:
    if value is None or isinstance(value, dict | list):
        return None
    return str(value)
