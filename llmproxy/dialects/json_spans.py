"""JSON spans: where the members of an object stand in its bytes.

With its span, a member can be read or replaced alone.  These are pure functions over the bytes of
JSON; ``json_body.py``, ``multipart.py`` and ``include_usage.py`` stand on them.  Nothing here knows
what a member means, or decodes a body and encodes it again.

Theory of operation: C code checks the grammar and says how long each value is, without building
objects (``msgspec.Raw``).  One pattern finds the names between the values, and so where each value
begins.  The number of members is bounded, and every pass is linear.
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
    """What is wrong with a body or a path: a sentence for the caller that quotes nothing of it."""


class Span(NamedTuple):
    """Where a value stands in a body, without whitespace around it: byte offsets, end excluded."""

    start: int
    end: int


class _Member:
    """A dictionary key for a member; no two are equal, so that equal names stay apart."""


def member_spans(body: bytes, wanted: Collection[str]) -> dict[str, Span]:
    """Check the grammar of UTF-8 JSON; return where the values of the ``wanted`` members stand.

    Args:
        wanted: names in lower case.

    Returns:
        The span of each by its name in the body, which may differ from the wanted one in case.

    Raises:
        BodyError: it is not JSON, nests too deeply, has too many members, or has two members that
            some reader takes for one.
    """
    spans: dict[str, Span] = {}
    at = 0
    for name, length in _members(body):
        match = _NAME.match(body, at)
        if match is None:
            raise BodyError(
                "The body is not valid JSON."
            )  # never, as long as the pattern and msgspec agree
        at = match.end() + length
        if (folded := name.casefold()) in wanted:
            if any(other.casefold() == folded for other in spans):
                raise BodyError(f'The body has two "{folded}" members.')
            spans[name] = Span(match.end(), at)
    return spans


def _members(body: bytes) -> Iterable[tuple[str, int]]:
    """Return each top-level member's name, and the length of its value in bytes, in order."""
    names: list[str] = []

    def add(_type: type, name: str) -> _Member:
        if len(names) == MEMBERS:
            raise OverflowError  # msgspec passes it on, unlike a ValueError
        names.append(name)
        return _Member()

    try:
        if not _OBJECT.match(body):
            msgspec.json.decode(body, type=msgspec.Raw)
            return []
        values = msgspec.json.decode(body, type=dict[_Member, msgspec.Raw], dec_hook=add).values()
    except msgspec.DecodeError:
        # msgspec refuses half a surrogate pair.  In a copy of the same length and grammar, another
        # character beyond ASCII stands for it, so that no name becomes one that is wanted.
        plain = body.replace(b"\\ud", b"\\ue").replace(b"\\uD", b"\\ue")
        if plain == body:
            raise BodyError("The body is not valid JSON.") from None
        return _members(plain)
    except (OverflowError, RecursionError):  # the latter if our own stack is deep already
        raise BodyError("The body nests too deeply, or has too many members at its top.") from None
    return zip(names, map(len, values), strict=True)
