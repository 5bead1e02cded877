"""The events of a stream: SSE, or lines of JSON.

A framing of the tap gets bytes, split at any point, and returns the events that they complete, as
``(name, data)`` pairs.  It never holds more than one event of at most ``limit`` bytes.  A longer
event is dropped as it passes, up to the next boundary, and reported by a callback.  Each byte is
copied and searched a bounded number of times, so that an event of 100 MB costs linear time and no
memory.  An event of more than 10,000 lines counts as a longer one: each line costs as much as an
event.  The events do not depend on where the bytes were split.

Nothing here knows JSON, a dialect or a coding.
"""

from __future__ import annotations

import codecs
import re
from collections.abc import Callable, Sequence
from typing import Protocol

Event = tuple[bytes | None, bytes]
"""The name of an event, or None, and its data."""

_LINES = 10_000
"""Most lines of one event; a JSON text that is spread over lines has hundreds."""

_CR = 0x0D  # bytes find an int ten times as fast as a bytes object of length one

_ONE_EVENT = re.compile(rb"(?:event: ?(.++)?\n)?data: ?(.*+)\n\n").fullmatch
_PLAIN_EVENTS = re.compile(rb"(?:(?:event: ?.*+\n)?data: ?.*+(?:\n\n|\Z))++").fullmatch
_EVENTS = re.compile(rb"(?:event: ?(.*+)\n)?data: ?(.*+)(?:\n\n|\Z)").findall
_PLAIN_BLOCK = re.compile(rb"(?:event: ?(.++)?\n)?data: ?(.*+)").fullmatch
_FIELDS = re.compile(rb"^(data|event)(?:: ?(.*+))?$", re.MULTILINE).finditer


class Framing(Protocol):
    """Turns bytes into events."""

    @property
    def work(self) -> int:
        """How long the last feed took besides its events, in bytes of decompressed output."""

    @property
    def held_bytes(self) -> int:
        """How many bytes are held for the event that is not complete yet."""

    def feed(self, data: bytes) -> Sequence[Event]:
        """Return the events that these bytes, split at any point, complete."""

    def flush(self) -> Sequence[Event]:
        """Return the events that the end of the stream completes, and hold nothing any more."""


class Blocks:
    r"""Splits bytes into blocks at ``delimiter``: a line end, or two of them.

    Newlines around a block do not belong to it.  A block of newlines alone is no block.

    Args:
        delimiter: ``b"\n"`` or ``b"\n\n"``.
        limit: the longest block, in bytes; a longer one is dropped.
        overlong: called once for each dropped block.

    Attributes:
        is_clear: whether the next byte begins a block.
    """

    def __init__(self, delimiter: bytes, limit: int, overlong: Callable[[], None]) -> None:
        self._delimiter = delimiter
        self._reach = len(delimiter) - 1  # how far back a delimiter may have begun
        self._limit = limit
        self._overlong = overlong
        self._pending = bytearray()
        self._skipped: bytes | None = None  # the last bytes of an overlong block, while in one
        self.is_clear = True

    @property
    def held_bytes(self) -> int:
        """How many bytes wait for the end of their block."""
        return len(self._pending)

    def feed(self, data: bytes) -> list[bytes]:
        """Return the blocks that ``data`` completes, in order."""
        return self.cut(self.whole(data))

    def cut(self, whole: bytes) -> list[bytes]:
        """Return the blocks in what :meth:`whole` returned."""
        blocks = whole.split(self._delimiter)
        return [block for one in blocks if one and self._fits(block := one.strip(b"\n"))]

    def whole(self, data: bytes) -> bytes:
        """Return the blocks that ``data`` completes, joined, without the last delimiter."""
        if self._skipped is not None:
            joined = self._skipped + data
            at = joined.find(self._delimiter)
            if at < 0:
                self._skipped = self._end_of(joined)
                return b""
            self._skipped = None
            data = joined[at + len(self._delimiter) :]
        whole = self._join(data) if self._pending else self._cut(data)
        self._look_at_rest()
        return whole

    def flush(self) -> list[bytes]:
        """Return the block that lacks its delimiter, if there is one."""
        block = bytes(self._pending).strip(b"\n")
        self._pending.clear()
        return [block] if block and self._fits(block) else []

    def _cut(self, data: bytes) -> bytes:
        """Return ``data`` up to its last delimiter, and hold the rest."""
        last = data.rfind(self._delimiter)
        rest = data[last + len(self._delimiter) :] if last >= 0 else data
        self._pending += rest.lstrip(b"\n")
        return data[:last] if last >= 0 else b""

    def _join(self, data: bytes) -> bytes:
        """Do as :meth:`_cut` if bytes are held already; only ``data`` is searched."""
        pending = self._pending
        start = max(0, len(pending) - self._reach)
        pending += data
        last = pending.rfind(self._delimiter, start)
        if last < 0:
            return b""
        whole = bytes(pending[:last])
        del pending[: last + len(self._delimiter)]
        return whole

    def _look_at_rest(self) -> None:
        """Drop a block as soon as it is too long."""
        pending = self._pending
        if len(pending) > self._limit and len(pending) - pending.endswith(b"\n") > self._limit:
            self._skipped = self._end_of(pending)
            pending.clear()
            self._overlong()
        self.is_clear = not pending and self._skipped is None

    def _fits(self, block: bytes) -> bool:
        if len(block) > self._limit:
            self._overlong()
            return False
        return True

    def _end_of(self, data: bytes | bytearray) -> bytes:
        return bytes(data[len(data) - self._reach :])


class ServerSentEvents:
    r"""The events of a ``text/event-stream`` (HTML Living Standard, section 9.2.6).

    Lines end with CR, LF or CRLF; a byte order mark may come first; comments, ``id`` and ``retry``
    are ignored.  Unlike in the standard, an event at the end of the stream counts without its blank
    line: some providers leave it out after the last event.

    Args:
        limit: the longest event, with its field names, in bytes.
        overlong: called for each longer event.
    """

    work = 0

    def __init__(self, limit: int, overlong: Callable[[], None]) -> None:
        self._limit = limit
        self._overlong = overlong
        self._blocks = Blocks(b"\n\n", limit, overlong)
        self._start: bytes | None = b""  # the first bytes, while they may be a byte order mark
        self._after_cr = False
        self._is_clear = False

    @property
    def held_bytes(self) -> int:
        """How many bytes wait for the end of their event."""
        return self._blocks.held_bytes + len(self._start or b"")

    def feed(self, data: bytes) -> Sequence[Event]:
        """Return the events that ``data`` completes, in order."""
        if self._is_clear and len(data) <= self._limit:
            # Nearly every chunk of a provider is this: one whole event.
            one = _ONE_EVENT(data)
            if one is not None and _CR not in data:
                return (one.groups(),)  # type: ignore[return-value]  # two groups
        whole = self._blocks.whole(self._with_newlines(self._without_mark(data)))
        self._is_clear = self._blocks.is_clear and self._start is None and not self._after_cr
        if len(whole) <= self._limit and _PLAIN_EVENTS(whole) is not None:
            return [(name or None, event) for name, event in _EVENTS(whole)]
        return self._events(self._blocks.cut(whole))

    def flush(self) -> Sequence[Event]:
        """Return the event that lacks its blank line, if there is one."""
        self._start = None
        return self._events(self._blocks.flush())

    def _events(self, blocks: list[bytes]) -> Sequence[Event]:
        return [event for block in blocks if (event := self._event(block)) is not None]

    def _without_mark(self, data: bytes) -> bytes:
        if self._start is None:
            return data
        start = self._start + data
        if len(start) < len(codecs.BOM_UTF8) and codecs.BOM_UTF8.startswith(start):
            self._start = start
            return b""
        self._start = None
        return start.removeprefix(codecs.BOM_UTF8)

    def _with_newlines(self, data: bytes) -> bytes:
        """Make every line end a newline.  A CR counts at once, and an LF behind it is dropped."""
        if not data:
            return data
        after_cr, self._after_cr = self._after_cr, data.endswith(b"\r")
        if after_cr:
            data = data.removeprefix(b"\n")
        if _CR not in data:
            return data
        return data.replace(b"\r\n", b"\n").replace(b"\r", b"\n")

    def _event(self, block: bytes) -> Event | None:
        """Return the event of a block of lines; None if it has no data."""
        plain = _PLAIN_BLOCK(block)
        if plain is not None:
            return plain.groups()  # type: ignore[return-value]  # two groups
        if block.count(b"\n") > _LINES:
            self._overlong()
            return None
        name = None
        parts = []
        for field in _FIELDS(block):
            if field[1] == b"data":
                parts.append(field[2] or b"")
            else:
                name = field[2] or None
        return (name, b"\n".join(parts)) if parts else None


class Lines:
    """The lines of ``application/x-ndjson``; blank lines are ignored.

    Args:
        limit: the longest line, in bytes.
        overlong: called for each longer line.
    """

    work = 0

    def __init__(self, limit: int, overlong: Callable[[], None]) -> None:
        self._limit = limit
        self._blocks = Blocks(b"\n", limit, overlong)

    @property
    def held_bytes(self) -> int:
        """How many bytes wait for the end of their line."""
        return self._blocks.held_bytes

    def feed(self, data: bytes) -> Sequence[Event]:
        """Return the lines that ``data`` completes, in order."""
        if data and self._blocks.is_clear and data.find(b"\n") == len(data) - 1 <= self._limit:
            # Nearly every chunk of a provider is this: one whole line.
            return () if data.isspace() else ((None, data),)
        return [(None, line) for line in self._blocks.feed(data) if line and not line.isspace()]

    def flush(self) -> Sequence[Event]:
        """Return the line that lacks its end, if there is one."""
        return [(None, line) for line in self._blocks.flush() if not line.isspace()]
