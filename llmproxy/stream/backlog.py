"""Copies of chunks that wait to be read, so that many are read in one go.

What a tap's code needs is out of the processor's caches when the next event comes, so that reading
it there costs three times what it costs behind another one (ADR-0024).  All taps of a process
therefore share one backlog: whoever fills it reads it out, and so does whoever asks a tap what it
has found.  It holds few copies and no long one, whatever the streams do.

Nothing here knows what a copy holds or how it is read.
"""

from __future__ import annotations

from typing import Protocol

_TOGETHER = 32
"""Copies that are read in one go; for about a tenth of a millisecond nothing else is done."""

_SHORT = 4096
"""Most bytes of a copy that waits; a longer one is read at once, behind those before it."""


class Reader(Protocol):
    """Whoever reads copies; ``tap.StreamAccumulator`` is one."""

    def read(self, data: bytes) -> None:
        """Read a copy; never raises."""


class Backlog:
    """The copies that wait, in the order in which they came."""

    __slots__ = ("_copies",)

    def __init__(self) -> None:
        self._copies: list[tuple[Reader, bytes]] = []

    def add(self, reader: Reader, data: bytes) -> None:
        """Have ``reader`` read ``data`` soon."""
        copies = self._copies
        copies.append((reader, data))
        if len(copies) >= _TOGETHER or len(data) > _SHORT:
            self.read()

    def read(self) -> None:
        """Have all read that waits."""
        copies, self._copies = self._copies, []
        for reader, data in copies:
            reader.read(data)
