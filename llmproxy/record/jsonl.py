"""The trace file: JSON lines, one record a line, appended, and renamed by logrotate.

An output of ``record/writer.py``; it knows nothing of the other outputs.
"""

from __future__ import annotations

import os
from math import inf

import msgspec

from llmproxy.record.sink_queue import Dropped
from llmproxy.record.trace import Trace


class JsonLines:
    """Appends traces to a file; one ``write`` for each batch, and never half a line.

    Args:
        path: the file; opened at once, so that a path that cannot be written stops the start.

    Raises:
        OSError: the file cannot be opened for appending.
    """

    name = "jsonl"
    patience_s = 0.0
    keeps_content = True

    def __init__(self, path: str) -> None:
        self._path = path
        self._file = _open(path)
        self._encoder = msgspec.json.Encoder()

    def put(self, traces: list[Trace]) -> None:
        """Append these traces.

        Raises:
            Dropped: there was no room for all of them, or some cannot be JSON.
            OSError: the file takes none.
        """
        status = os.fstat(self._file)
        if status.st_nlink == 0:  # a renamed file is still read, a removed one is not
            self.reopen()
            status = os.fstat(self._file)
        lines, refused = self._encoded(traces)
        short = self._append(lines, status.st_size)
        if short:
            raise Dropped(short + refused, "the disk is full")
        if refused:
            raise Dropped(refused, "a record is not JSON")

    def maintenance(self) -> float:
        """A file needs none."""
        return inf

    def reopen(self) -> None:
        """Open the path again; if that fails, the open file stays.

        Raises:
            OSError: it cannot be opened.
        """
        file = _open(self._path)
        os.close(self._file)
        self._file = file

    def close(self) -> None:
        """Close the file."""
        os.close(self._file)

    def _encoded(self, traces: list[Trace]) -> tuple[bytes, int]:
        """Return the lines, and how many traces cannot be one (half a surrogate pair)."""
        try:
            return self._encoder.encode_lines(traces), 0
        except Exception:
            lines = [line for trace in traces if (line := self._line(trace))]
            return b"".join(lines), len(traces) - len(lines)

    def _line(self, trace: Trace) -> bytes:
        try:
            return self._encoder.encode(trace) + b"\n"
        except Exception:
            return b""

    def _append(self, lines: bytes, size: int) -> int:
        """Append lines to a file of this size; return how many did not fit on the disk.

        A line that was only written in part is removed again.
        """
        written = os.write(self._file, lines)
        if written == len(lines):
            return 0
        whole = lines.rfind(b"\n", 0, written) + 1
        os.ftruncate(self._file, size + whole)
        return lines.count(b"\n", whole)


def _open(path: str) -> int:
    return os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o640)
