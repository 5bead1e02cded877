"""Chunks that were forwarded and are still to be looked at, so that many are in one go.

What counting and reading a chunk needs is out of the processor's caches when the next one comes:
there it costs three times what it costs behind another one (ADR-0024).  All streams of a process
therefore share one backlog: whoever fills it has it read, and so does whoever asks a stream what
was found in it.  It holds few chunks and no long one, whatever the streams do.

Nothing here knows what a chunk holds or how it is read.
"""

from __future__ import annotations

from typing import Protocol

from twisted.logger import Logger

_log = Logger()

TOGETHER = 32
"""Chunks that are read in one go; for about a tenth of a millisecond nothing else is done."""

SHORT = 4096
"""Most bytes of a chunk that waits; a longer one is read at once, behind those before it."""


class Reader(Protocol):
    """Whoever looks at chunks; ``trail.StreamStatistics`` is one."""

    def read(self, at: float, data: bytes, start: int) -> None:
        """Look at a chunk.

        Args:
            at: when it came, in monotonic seconds.
            start: where the content of a chunk in the chunked coding starts, whose last two bytes
                end it; 0 where all is content.
        """


class Batch(list[tuple[Reader, float, bytes, int]]):
    """The chunks that wait, in the order in which they came: who reads each, and what it is told.

    It is a list so that whoever is in haste can do :meth:`add` without a call.
    """

    __slots__ = ()

    def add(self, reader: Reader, at: float, data: bytes, start: int = 0) -> int:
        """Have ``reader`` read ``data`` soon; return how many wait now.

        The arguments are those of :meth:`Reader.read`.
        """
        self.append((reader, at, data, start))
        count = len(self)
        if count < TOGETHER and len(data) <= SHORT:
            return count
        self.read()
        return 0

    def read(self) -> None:
        """Have all read that waits."""
        if self:
            waiting = self[:]
            self.clear()
            for reader, at, data, start in waiting:
                try:
                    reader.read(at, data, start)
                except Exception:  # an error of ours; here it would be another stream's
                    _log.failure("a chunk could not be looked at")
