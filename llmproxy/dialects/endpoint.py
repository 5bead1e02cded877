"""What a row of the table of endpoints says, and what the readers of all dialects share.

This module knows no dialect.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Any, NamedTuple

import msgspec

from llmproxy.dialects.accumulated import Accumulated

Reader = Callable[[bytes, Accumulated], None]
"""Reads the data of one event, or a whole document, into what is gathered.

Raises:
    msgspec.DecodeError, UnicodeDecodeError, RecursionError: this is not what the dialect sends.
"""

Count = Annotated[int, msgspec.Meta(ge=0, le=10**12)]
"""A number of tokens; what is larger is none, here as in the ledger, so that their sums agree."""

Part = msgspec.Struct
"""The base of what is decoded: only the members that are read, in the provider's own words."""

DONE = b"[DONE]"
"""The end marker of OpenAI's older endpoints; it is no JSON."""


class Endpoint(NamedTuple):
    """One endpoint of a dialect: how what it sends is read.

    Attributes:
        name: how logs and tests call it.
        event: reads one event of a stream.
        document: reads a response in one piece, or an error's body.
        marker: what ends a stream, in words; None where nothing does.
        idle: names of SSE events that hold text alone, and need not be decoded for the usage.
    """

    name: str
    event: Reader
    document: Reader
    marker: str | None = None
    idle: frozenset[bytes] = frozenset()


def is_whole(event: bytes) -> bool:
    """Tell whether an event is all that its provider sent: JSON, or the older end marker."""
    try:
        msgspec.json.decode(event, type=msgspec.Raw)
    except (msgspec.DecodeError, RecursionError):
        return event.startswith(DONE)
    return True


def tell_error(error: Any, seen: Accumulated) -> None:
    """Take the value of an ``error`` member: an object, a sentence, or what stands for none."""
    if isinstance(error, dict):
        kind = _text(error.get("type")) or _text(error.get("code"))
        seen.fail(kind, _text(error.get("message")))
    elif error:
        seen.fail(None, _text(error))


def json_text(value: Any) -> str:
    """Return the arguments of a tool as text: most providers send JSON in a string."""
    return value if isinstance(value, str) else msgspec.json.encode(value).decode()


def _text(value: Any) -> str | None:
    if value is None or isinstance(value, dict | list):
        return None
    return str(value)
