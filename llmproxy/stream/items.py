"""The items of a stream that is one JSON array: how Gemini streams without ``alt=sse``.

A framing of the tap, as those in ``events.py``: an object in the array is an event.  It is found by
its brackets, and nothing is decoded here.  At most one item of at most ``limit`` bytes is held; a
longer one is dropped as it passes.  Each byte is looked at once or twice, however the array is
split.  Nothing here knows a dialect.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence

from llmproxy.stream.events import Event

_BRACKET_WORK = 64
"""Bytes of decompressed output that take as long as one bracket: about 300 ns."""

_QUOTE, _BACKSLASH = b'"\\'
_OPENING = frozenset(b"[{")

_to_bracket = re.compile(rb'(?:[^"{}\[\]]++|"(?:[^"\\]++|\\.)*+")*+', re.DOTALL).match
"""Passes over whole strings, up to a bracket or to a string that does not end here.

This and the next one match everywhere, if only nothing.
"""

_to_quote = re.compile(rb'(?:[^"\\]++|\\.)*+', re.DOTALL).match
"""Passes over the inside of a string, up to its end or to half an escape."""


class Items:
    """The items of one JSON array.

    Args:
        limit: the longest item, in bytes.
        overlong: called for each longer item.

    Attributes:
        work: how long the last feed took, in bytes of decompressed output.
        is_closed: whether the end of the array was seen.
    """

    def __init__(self, limit: int, overlong: Callable[[], None]) -> None:
        self._limit = limit
        self._overlong = overlong
        self._pending = bytearray()
        self._at = 0  # how far _pending was looked at
        self._start: int | None = None  # where the item begins that is held
        self._depth = 0  # brackets that are open; the array's is one
        self._in_string = False
        self.work = 0
        self.is_closed = False

    @property
    def held_bytes(self) -> int:
        """How many bytes wait for the end of their item."""
        return len(self._pending)

    def feed(self, data: bytes) -> Sequence[Event]:
        """Return the items that ``data`` completes, in order."""
        self.work = 0
        if self.is_closed:
            return ()
        self._pending += data
        events: list[Event] = []
        pending, depth = self._pending, self._depth
        while (at := self._next_bracket()) < len(pending):
            if pending[at] in _OPENING:
                if depth == 1:
                    self._start = at
                depth += 1
            else:
                depth -= 1
                if depth == 1:
                    self._end(at + 1, events)
                elif depth < 1:
                    self.is_closed = True
                    break
            self._at = at + 1
            self.work += _BRACKET_WORK
        self._depth = depth
        self._forget()
        return events

    def flush(self) -> Sequence[Event]:
        """Return the item that lacks its end, if there is one."""
        rest = b"" if self._start is None else bytes(self._pending[self._start :])
        self._pending.clear()
        self._at, self._start = 0, None
        return [(None, rest)] if rest else []

    def _next_bracket(self) -> int:
        """Return where the next bracket is, or where the bytes end that it may stand behind."""
        pending, at = self._pending, self._at
        while True:
            if self._in_string:
                at = self._at = _to_quote(pending, at).end()  # type: ignore[union-attr]  # it matches everywhere
                if at == len(pending) or pending[at] == _BACKSLASH:
                    return len(pending)
                at, self._in_string = at + 1, False
            at = self._at = _to_bracket(pending, at).end()  # type: ignore[union-attr]  # and so does this
            if at == len(pending) or pending[at] != _QUOTE:
                return at
            at, self._in_string = at + 1, True

    def _end(self, end: int, events: list[Event]) -> None:
        start, self._start = self._start, None
        if start is None:
            return  # it was dropped
        if end - start > self._limit:
            self._overlong()
        else:
            events.append((None, bytes(self._pending[start:end])))

    def _forget(self) -> None:
        """Hold nothing but the item that is open, unless that is too long."""
        if self._start is not None and len(self._pending) - self._start > self._limit:
            self._start = None
            self._overlong()
        done = self._at if self._start is None else self._start
        if self.is_closed:
            done = len(self._pending)
        del self._pending[:done]
        self._at = max(0, self._at - done)
        if self._start is not None:
            self._start = 0
