"""The one record of one request, written when it ends, and the file that it is written to.

Records pass a bounded queue to one writer thread: a full disk or a slow one loses records, which
are counted, and never holds up a stream.  No content and no key is ever in a record.
"""

from __future__ import annotations

import os
import threading
from collections import deque
from datetime import UTC, datetime
from functools import lru_cache
from typing import Protocol

import msgspec
from twisted.logger import Logger

_QUEUE = 10_000
"""Most records that wait for the writer; about 10 MB."""

_BATCH = 2_000
"""Most records that are written together."""

_GATHER = 0.02
"""Seconds for which the writer waits for more: waking it costs more than a record."""

_log = Logger()


class Attempt(msgspec.Struct):
    """One try at one provider.

    ``outcome`` is ``ok`` or an end reason, ``cause`` what tells failures of one outcome apart,
    ``seconds`` the time to the answer's head or to the failure.
    """

    provider: str
    outcome: str
    seconds: float
    cause: str | None = None


class Trace(msgspec.Struct, kw_only=True):
    """What is remembered of one request; names and order are those of design 10.

    Times are in seconds, ``bytes_in`` and ``bytes_out`` count bodies.  Token fields stay null until
    something counts tokens.
    """

    time: str
    id: str
    client_request_id: str | None = None
    instance: str
    peer: str
    user_agent: str | None = None
    client: str | None = None
    session: str | None = None
    route: str | None = None
    provider: str | None = None
    dialect: str | None = None
    method: str
    path: str
    model: str | None = None
    served_model: str | None = None
    stream: bool | None = None
    status: int | None = None
    end_reason: str = ""
    error: str | None = None
    is_complete: bool = False
    attempts: list[Attempt] = msgspec.field(default_factory=list)
    bytes_in: int = 0
    bytes_out: int = 0
    chunks: int = 0
    head_s: float | None = None
    first_chunk_s: float | None = None
    duration_s: float = 0.0
    longest_gap_s: float | None = None
    paused_s: float = 0.0
    input_tokens: int | None = None
    output_tokens: int | None = None
    cache_read_tokens: int | None = None
    cache_write_tokens: int | None = None
    reasoning_tokens: int | None = None
    usage: str | None = None
    degraded: list[str] = msgspec.field(default_factory=list)


class Sink(Protocol):
    """Where traces go.

    Attributes:
        name: what the metric calls it.
        lost: how many traces were not written.
    """

    name: str
    lost: int

    def write(self, trace: Trace) -> None:
        """Take one trace; never blocks and never raises."""

    def close(self) -> None:
        """Write what waits, and stop."""


def timestamp(seconds: float) -> str:
    """Return seconds since the epoch as RFC 3339 in UTC, to the millisecond."""
    thousandths = int(seconds * 1000)
    return f"{_whole_second(thousandths // 1000)}.{thousandths % 1000:03d}Z"


@lru_cache(maxsize=16)
def _whole_second(seconds: int) -> str:
    return datetime.fromtimestamp(seconds, UTC).isoformat().removesuffix("+00:00")


class JsonLines:
    """Appends traces to a file, one JSON object a line.

    Args:
        path: the file; opened at once, so that a path that cannot be written stops the start.

    Attributes:
        lost: records that were not written, because the queue was full or the file refused them.

    Raises:
        OSError: the file cannot be opened for appending.
    """

    name = "jsonl"

    def __init__(self, path: str) -> None:
        self._path = path
        self.lost = 0
        self._failing = False
        self._closing = False
        self._closed = threading.Event()
        self._waiting: deque[Trace] = deque()
        self._wake = threading.Event()
        self._file = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o640)
        self._encoder = msgspec.json.Encoder()
        self._thread = threading.Thread(target=self._run, name="trace", daemon=True)
        self._thread.start()

    def write(self, trace: Trace) -> None:
        """Queue one trace, or lose it where the queue is full."""
        waiting = self._waiting
        if len(waiting) >= _QUEUE:
            self.lost += 1
            return
        waiting.append(trace)
        if len(waiting) == 1:
            self._wake.set()

    def close(self) -> None:
        """Write what waits, for at most five seconds, and stop."""
        self._closing = True
        self._closed.set()
        self._wake.set()
        self._thread.join(timeout=5)

    def _run(self) -> None:
        while (batch := self._next_batch()) is not None:
            try:
                self._append(b"".join(self._encoder.encode(trace) + b"\n" for trace in batch))
                self._failing = False
            except Exception as error:
                self.lost += len(batch)
                if not self._failing:
                    self._failing = True
                    _log.error("traces are being lost: {reason}", reason=str(error))
        os.close(self._file)

    def _next_batch(self) -> list[Trace] | None:
        """Wait for traces, a moment for more of them, and take all; None once the end has come."""
        waiting = self._waiting
        while not waiting:
            if self._closing:
                return None
            self._wake.wait()
            self._wake.clear()
        self._closed.wait(_GATHER)  # so that a busy daemon wakes this thread fifty times a second
        return [waiting.popleft() for _ in range(min(len(waiting), _BATCH))]

    def _append(self, lines: bytes) -> None:
        """Append whole lines; what a full disk took of them is cut off again."""
        before = os.fstat(self._file).st_size
        written = os.write(self._file, lines)
        if written != len(lines):
            os.ftruncate(self._file, before)
            raise OSError(28, "the disk is full")


class NoSink:
    """Takes traces and forgets them: no trace file is configured."""

    name = "none"
    lost = 0

    def write(self, trace: Trace) -> None:
        """Forget it."""

    def close(self) -> None:
        """Nothing to close."""
