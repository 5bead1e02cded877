"""What a body leaves behind it: how much came, when, how it ends, and a copy for the tap.

The relay hands a chunk on and adds it to the backlog; from there it comes here, a little later.
Whoever asks is told of all that has come: the backlog is read first, where there is one.  Like the
relay, this knows no provider, trace or metric.
"""

from __future__ import annotations

from collections.abc import Callable

from llmproxy.stream.batch import Batch


class StreamStatistics:
    """What is noted of one body.

    Args:
        batch: where its chunks wait.
        now: monotonic seconds, when the body was asked for.
        gaps: called with the seconds between one chunk and the next.
        copy: called with each chunk, or None.
    """

    __slots__ = (
        *("_batch", "_byte_count", "_chunks", "_copy", "_first_at", "_gaps", "_last_at"),
        *("_longest_gap", "_tail", "_verbatim"),
    )

    def __init__(
        self,
        batch: Batch,
        now: float,
        gaps: Callable[[float], None],
        copy: Callable[[bytes], None] | None,
    ) -> None:
        self._batch = batch
        self._gaps = gaps
        self._copy = copy
        self._chunks = self._byte_count = self._verbatim = 0
        self._first_at: float | None = None
        self._last_at = now
        self._longest_gap = 0.0
        self._tail = b""

    @property
    def chunks(self) -> int:
        """How many chunks came."""
        if self._batch:
            self._batch.read()
        return self._chunks

    @property
    def byte_count(self) -> int:
        """How many bytes that was."""
        if self._batch:
            self._batch.read()
        return self._byte_count

    @property
    def verbatim(self) -> int:
        """How many of these came in the chunked coding and went out as they were."""
        if self._batch:
            self._batch.read()
        return self._verbatim

    @property
    def first_at(self) -> float | None:
        """When the first chunk came, or None."""
        if self._batch:
            self._batch.read()
        return self._first_at

    @property
    def last_at(self) -> float:
        """When the last chunk came; before the first, when the body was asked for."""
        if self._batch:
            self._batch.read()
        return self._last_at

    @property
    def longest_gap(self) -> float:
        """The longest time between two chunks, pauses left out, in seconds."""
        if self._batch:
            self._batch.read()
        return self._longest_gap

    @property
    def tail(self) -> bytes:
        """The last four bytes, so that an event's end can be told."""
        if self._batch:
            self._batch.read()
        return self._tail

    def read(self, at: float, data: bytes, start: int = 0) -> None:
        """Note one chunk, split at any point; see ``backlog.Reader``."""
        if start:
            data = data[start:-2]
            self._verbatim += len(data)
        gaps, copy = self._gaps, self._copy  # found faster than as methods (ADR-0011)
        if self._chunks:
            gap = at - self._last_at
            gaps(gap)
            if gap > self._longest_gap:
                self._longest_gap = gap
        else:
            self._first_at = at
        self._last_at = at
        self._chunks += 1
        self._byte_count += len(data)
        self._tail = data[-4:] if len(data) > 3 else (self._tail + data)[-4:]
        if copy is not None:
            copy(data)

    def excuse(self, since: float, now: float) -> None:
        """From ``since`` until ``now`` nothing could come: that was no silence."""
        last_at = self.last_at
        self._last_at = last_at + now - max(since, last_at)
