"""Where the members of a JSON object stand in its bytes, so that one can be read or replaced alone.

Here live pure functions over the bytes of JSON, below everything that looks into a body. Nothing
here knows what a member means, or decodes and encodes a body anew.

Theory of operation: C code checks the grammar and tells how long each value is, building no objects
(`msgspec.Raw`); the names between the values are found by one pattern, and spans follow. Members
are bounded, and every pass is linear.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable
from typing import Final, NamedTuple

import msgspec

MEMBERS: Final = 65_536  # of one object; an API call has dozens

_OBJECT = re.compile(rb"[ \t\n\r]*+\{")
_NAME = re.compile(rb'(?s)\s*+[{,]\s*+"(?:[^"\\]++|\\.)*+"\s*+:\s*+')  # in JSON known to be valid


class BodyError(ValueError):
    """What is wrong with a body or path: a sentence for the caller that repeats none of it."""


class Span(NamedTuple):
    """Where a value stands in a body: byte offsets, `end` not included, no whitespace around."""

    start: int
    end: int


class _Member:
    """A dictionary key for a member: it equals only itself, so that equal names stay apart."""


def member_spans(body: bytes, wanted: Collection[str]) -> dict[str, Span]:
    """Check the grammar of UTF-8 JSON and return where the values of `wanted` members stand.

    The names are in lower case; a member whose name differs in case alone is there as it is spelt.

    Raises:
        BodyError: not JSON, too deep, too many members, or two that any reader takes for one.
    """
    spans: dict[str, Span] = {}
    at = 0
    for name, length in _members(body):
        match = _NAME.match(body, at)
        if match is None:
            raise BodyError("The body is not valid JSON.")  # never, while msgspec and we agree
        at = match.end() + length
        if (folded := name.casefold()) in wanted:
            if any(other.casefold() == folded for other in spans):
                raise BodyError(f'The body has two "{folded}" members.')
            spans[name] = Span(match.end(), at)
    return spans


def _members(body: bytes) -> Iterable[tuple[str, int]]:
    """Return the name and the value's length in bytes of each top-level member, in order."""
    names: list[str] = []

    def add(_type: type, name: str) -> _Member:
        if len(names) == MEMBERS:
            raise OverflowError  # msgspec lets it through, unlike a ValueError
        names.append(name)
        return _Member()

    try:
        if not _OBJECT.match(body):
            msgspec.json.decode(body, type=msgspec.Raw)
            return []
        values = msgspec.json.decode(body, type=dict[_Member, msgspec.Raw], dec_hook=add).values()
    except msgspec.DecodeError:
        # msgspec refuses half a surrogate pair. In a copy of the same length and grammar it becomes
        # another character beyond ASCII; so no name turns into one that we look for.
        plain = body.replace(b"\\ud", b"\\ue").replace(b"\\uD", b"\\ue")
        if plain == body:
            raise BodyError("The body is not valid JSON.") from None
        return _members(plain)
    except (OverflowError, RecursionError):  # the latter where our own stack is deep already
        raise BodyError("The body nests too deeply, or has too many members at its top.") from None
    return zip(names, map(len, values), strict=True)
