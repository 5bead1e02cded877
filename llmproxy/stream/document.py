"""A response in one piece: a JSON document that is read when the body ends.

A framing of the tap, as those in ``events.py``.  A document is held as it came, up to a limit.  Of
a longer one, the beginning and the end are held; the members that stand there in full are all that
is read of it.  Providers put names and counts there, so the usage behind ten megabytes of
embeddings is still found, at no cost for each byte of them.  Nothing here knows a dialect.
"""

from __future__ import annotations

import codecs
import re
from collections.abc import Callable, Iterator, Sequence

import msgspec

from llmproxy.stream.events import Event

_HEAD = 16 * 1024
_TAIL = 32 * 1024
"""Most bytes that are held of the beginning and the end of a long document."""

_TRIES = 64
"""Most commas that are tried: names and counts have dozens of members, not hundreds."""

_STUMP = b"{"
"""Stands for a long document in which nothing is found; it is not valid JSON."""

_BETWEEN = re.compile(rb',[ \t\n\r]*+(?=")')
"""A comma before a member, perhaps one of an inner object.

No string can hold this: its quote would have a backslash before it.
"""

_decode = msgspec.json.Decoder(msgspec.Raw).decode
"""Passes over a text, and makes nothing of it; with members, it would take twenty times as long."""


class Document:
    """One JSON document.

    Args:
        limit: most bytes of it that are held.
        overlong: called once if the document is longer, so that a part of it is left out.
    """

    work = 0

    def __init__(self, limit: int, overlong: Callable[[], None]) -> None:
        self._limit = limit
        self._overlong = overlong
        self._body = bytearray()
        self._head: bytes | None = None
        self._before = b""  # of a long document: the piece before _body
        self._tail_bytes = min(_TAIL, limit // 4)

    @property
    def held_bytes(self) -> int:
        """How much of the document is held."""
        return len(self._head or b"") + len(self._before) + len(self._body)

    @property
    def is_long(self) -> bool:
        """Whether a part of the document was left out."""
        return self._head is not None

    def feed(self, data: bytes) -> Sequence[Event]:
        """Hold ``data``, or the part of it that may be read; no event comes before the end."""
        if self._head is None:
            self._body += data
            if len(self._body) > self._limit:
                self._overlong()
                self._head = bytes(self._body[: min(_HEAD, self._limit // 4)])
                del self._body[: len(self._body) - self._tail_bytes]
        elif len(data) >= self._tail_bytes:
            # A piece of usual size is kept without a copy, however long the document is.
            usual = len(data) <= self._limit // 4
            self._before = data if usual else data[len(data) - self._tail_bytes :]
            self._body.clear()
        else:
            self._body += data
            if len(self._body) > 2 * self._tail_bytes:
                self._before = b""
                del self._body[: -self._tail_bytes]
        return ()

    def flush(self) -> Sequence[Event]:
        """Return the document."""
        document = self._before + self._body
        if self._head is None:
            document = document.removeprefix(codecs.BOM_UTF8)
        else:
            head, tail = self._head.removeprefix(codecs.BOM_UTF8), document[-self._tail_bytes :]
            document = ends_of(head, tail)
        self._body.clear()
        self._head, self._before = None, b""
        return [(None, document)] if document else []


def ends_of(head: bytes, tail: bytes) -> bytes:
    """Return an object with the members that stand in full in either end of a document."""
    first = max((at for at, _ in _cuts(head, -1) if _is_object(head[:at] + b"}")), default=0)
    last = min((at for _, at in _cuts(tail, 1) if _is_object(b"{" + tail[at:])), default=0)
    if not last:
        return head[:first] + b"}" if first else _STUMP
    return (head[:first] + b"," if first else b"{") + tail[last:]


def _cuts(text: bytes, side: int) -> Iterator[tuple[int, int]]:
    """Yield where commas between members begin and end: the first ones if ``side`` is negative."""
    found = [match.span() for match in _BETWEEN.finditer(text)]
    yield from found[:_TRIES] if side < 0 else found[-_TRIES:]


def _is_object(text: bytes) -> bool:
    try:
        _decode(text)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return False
    return True
