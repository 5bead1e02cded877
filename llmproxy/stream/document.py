"""An answer in one piece: a JSON document, cut anywhere, that is read when the body ends.

Up to its limit it is held as it came.  A longer one is thinned while it passes: values of its
members that are long become ``null``, so that the usage behind ten megabytes of embeddings is
still found.  Nothing here knows a dialect.
"""

from __future__ import annotations

import codecs
import re
from collections.abc import Callable, Sequence

from llmproxy.stream.events import Event

_LONGEST_VALUE = 16 * 1024
"""Longer values of members become null where a document is thinned, in bytes."""

_STUMP = b"{"
"""What stands for a document that is too long without its long values, too; it is no JSON."""

_IN_STRING = re.compile(rb'(?:[^"\\]++|\\.)*+', re.DOTALL).match
_AT_TOP = re.compile(rb'[^"{}\[\],:]*+').match
# Below the top what is whole is passed over at once: strings, and arrays and objects that hold
# no other.
_FLAT = rb'(?:[^"{}\[\]]++|"(?:[^"\\]++|\\.)*+")*+'
_BELOW = re.compile(
    rb'(?:[^"{}\[\]]++|"(?:[^"\\]++|\\.)*+"|[\[{]%b[\]}])*+' % _FLAT, re.DOTALL
).match


class Document:
    """One JSON document.

    Args:
        limit: most bytes that are held of it.
        overlong: called once where it is longer, so that something of it may be left out.
    """

    def __init__(self, limit: int, overlong: Callable[[], None]) -> None:
        self._limit = limit
        self._overlong = overlong
        self._body = bytearray()
        self._thin: _Thin | None = None

    @property
    def held_bytes(self) -> int:
        """How much of the document is held."""
        return len(self._body) if self._thin is None else len(self._thin.kept)

    def feed(self, data: bytes) -> Sequence[Event]:
        """Hold ``data``, or what is wanted of it; there is no event before the end."""
        if self._thin is not None:
            self._thin.feed(data)
            return ()
        self._body += data
        if len(self._body) > self._limit:
            self._overlong()
            self._thin = _Thin(self._limit)
            self._thin.feed(bytes(self._body))
            self._body.clear()
        return ()

    def flush(self) -> Sequence[Event]:
        """Return the document."""
        kept = self._body if self._thin is None else self._thin.kept
        document = bytes(kept).removeprefix(codecs.BOM_UTF8)
        self._body.clear()
        self._thin = None
        return [(None, document)] if document else []


class _Thin:
    """Copies a JSON object without the values that are long.

    Whether this is JSON at all is left to who decodes the copy.

    Args:
        limit: most bytes that the copy may have; beyond it only a stump is left.
    """

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._longest = min(limit, _LONGEST_VALUE)
        self._depth = 0
        self._in_string = False
        self._after_backslash = False
        self._value: int | None = None  # where the copy of a top member's value begins
        self._drops = False  # the rest of this value is too much
        self._is_over = False  # everything is
        self.kept = bytearray()

    def feed(self, data: bytes) -> None:
        """Copy what is short of ``data``."""
        at = 0
        while at < len(data) and not self._is_over:
            end = self._string(data, at) if self._in_string else self._plain(data, at)
            self._keep(data[at:end])
            if end < len(data):
                self._mark(data[end : end + 1])
            at = end + 1

    def _string(self, data: bytes, at: int) -> int:
        """Return where the string ends, or the data."""
        if self._after_backslash:
            self._after_backslash = False
            at += 1
        found = _IN_STRING(data, at)
        end = found.end() if found is not None else at
        if end < len(data) and data[end] == 0x5C:  # the last byte: what it escapes comes later
            self._after_backslash = True
            return len(data)
        return end

    def _plain(self, data: bytes, at: int) -> int:
        found = (_AT_TOP if self._depth <= 1 else _BELOW)(data, at)
        return found.end() if found is not None else at

    def _mark(self, mark: bytes) -> None:
        """Take one of the characters that JSON is built of."""
        if mark == b'"':
            self._in_string = not self._in_string
        elif mark in (b"{", b"["):
            self._depth += 1
        elif mark in (b"}", b"]"):
            self._depth -= 1
        ends = self._depth == 0 or (self._depth == 1 and mark == b",")
        if ends and not self._in_string and self._value is not None:
            self._value = None
            self._drops = False
        self._keep(mark)
        if mark == b":" and self._depth == 1 and self._value is None:
            self._value = len(self.kept)

    def _keep(self, piece: bytes) -> None:
        if self._drops or self._is_over:
            return
        self.kept += piece
        if self._value is not None and len(self.kept) - self._value > self._longest:
            del self.kept[self._value :]
            self.kept += b"null"
            self._drops = True
        if len(self.kept) > self._limit:
            self.kept[:] = _STUMP
            self._is_over = True
