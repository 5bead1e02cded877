"""What one reader makes of one message, in terms in which any two readers can be compared."""

from __future__ import annotations

from enum import Enum
from typing import NamedTuple

Fields = list[tuple[bytes, bytes]]

FRAMING = frozenset((b"content-length", b"transfer-encoding"))
"""The fields that say where a body ends."""


class Ending(Enum):
    """How reading ended."""

    WHOLE = "whole"
    SHORT = "short"
    REFUSED = "refused"


class Verdict(NamedTuple):
    """One reader's view of a message and of what followed it.

    Attributes:
        ending: whether it was whole, ended too soon or was refused.
        start: ``(minor, status)`` of a response, ``(method, target, minor)`` of a request.
        fields: names in lower case, values without white space around.
        body: the content, without its framing.
        leftover: what followed the end of the message.
        keep: whether another message may follow.
        why: the reader's own words for a refusal.
    """

    ending: Ending
    start: tuple[object, ...] = ()
    fields: Fields = []  # noqa: RUF012 - never changed
    body: bytes = b""
    leftover: bytes = b""
    keep: bool = False
    why: str = ""

    @property
    def whole(self) -> bool:
        """Whether the message was accepted to its end."""
        return self.ending is Ending.WHOLE


def refused(why: object) -> Verdict:
    """Return the verdict on what is no message."""
    return Verdict(Ending.REFUSED, why=str(why))


def plain(fields: Fields) -> Fields:
    """Return fields as every reader can be made to tell them.

    h11 gives codings in lower case; llhttp keeps white space behind a value.
    """
    named = [(name.lower(), value.strip(b" \t")) for name, value in fields]
    return [(name, value.lower() if name in FRAMING else value) for name, value in named]


def framing_error(ours: Verdict, other: Verdict, their_own: tuple[str, ...]) -> str:
    """Return how ``ours`` frames what ``other`` does not, or nothing.

    Args:
        their_own: beginnings of refusals that are not for framing, and so are their own affair.
    """
    if not ours.whole or other.why.startswith(their_own):
        return ""
    if not other.whole:
        return f"accepted what is {other.ending.value} elsewhere: {other.why}"
    for name in ("start", "fields", "body", "leftover"):
        if getattr(ours, name) != getattr(other, name):
            return f"{name}: {getattr(ours, name)!r} is {getattr(other, name)!r} elsewhere"
    if ours.keep and not other.keep:
        return "kept a connection that must close"
    return ""
