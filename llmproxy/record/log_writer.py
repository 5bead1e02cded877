"""The log's lines on their way out: a bounded queue, a thread, and the file that it writes to.

Standard output can be a pipe that nobody reads, and a file can be on a disk that hangs.  Whoever
logs puts a line into the queue and never waits; the thread writes.  If the queue is full, lines are
lost, counted, and reported by a line in their place (ADR-0021).  Nothing here knows what a line
says.  The traces of requests have a queue of their own (``record/writer.py``).
"""

from __future__ import annotations

import faulthandler
import os
import select
import stat
import threading
from collections import deque
from collections.abc import Callable, Mapping, Sequence

from twisted.logger import Logger

from llmproxy.record.journal import is_journal

QUEUE = 25_000
"""How much may wait: lines, a long line counting once for each KiB; about 25 MB at most.

It has room for a line about each of the streams that ``max_connections`` allows by default.
"""

CLOSING_S = 2.0
"""Seconds for which the end of the process waits for what is not written."""

_TOGETHER = 64
"""Most pieces of the queue that are written at once."""

_KIB = 1024

_log = Logger()

_Waiting = deque[tuple[int, bytes | int, int]]
"""By their number, lines with their ends, or how many were lost in a place; and their weight."""


class Unwritten(Exception):
    """Some lines were not written; those before them were.

    Args:
        count: how many were not.
        reason: why, for the log.
    """

    def __init__(self, count: int, reason: str) -> None:
        super().__init__(reason)
        self.count = count


class LogFile:
    """A descriptor that takes whole lines; each call may block.

    Args:
        descriptor: open for writing.  It may be non-blocking: another process that has the same
            pipe decides that.
        owned: whether :meth:`close` closes it.
    """

    def __init__(self, descriptor: int, *, owned: bool = True) -> None:
        self._descriptor = descriptor
        self._owned = owned
        self._is_pipe = stat.S_ISFIFO(os.fstat(descriptor).st_mode)
        self._is_torn = False

    def is_journal(self, environ: Mapping[str, str]) -> bool:
        """Return whether systemd's journal reads the lines; see ``record/journal.py``."""
        return is_journal(self._descriptor, environ)

    def catch_crash(self) -> None:
        """Write the thread's stack here if the process is ended by a fault or by SIGABRT.

        SIGABRT is what systemd's watchdog sends; the reactor's thread, which hangs, gets it.  The
        other threads are left out: they may run meanwhile, and whoever reads their frames then may
        crash before he comes to the reactor's, which stand last.
        """
        faulthandler.enable(self._descriptor, all_threads=False)

    def write(self, lines: bytes) -> None:
        """Write whole lines, however long that takes.

        If there is no room for all of them, half a line is taken back.  Where it cannot be, as in a
        pipe, the next line begins on a line of its own.

        Raises:
            Unwritten: some lines are not there.
        """
        data = memoryview(lines)
        written = 0
        try:
            if self._is_torn:
                self._write_some(b"\n")
                self._is_torn = False
            while written < len(lines):
                end = self._end(lines, written)
                while written < end:
                    written += self._write_some(data[written:end])
        except OSError as error:
            whole = lines.rfind(b"\n", 0, written) + 1
            if written > whole:
                self._is_torn = not self._take_back(written - whole)
            raise Unwritten(lines.count(b"\n", whole), error.strerror or str(error)) from error

    def _end(self, lines: bytes, start: int) -> int:
        """Return where one write ends: in a pipe, behind as many lines as it takes all or none of.

        So no line of up to 4 KiB is torn, neither by the end of this process nor by a line of
        another process (pipe(7), PIPE_BUF).
        """
        if not self._is_pipe or len(lines) - start <= select.PIPE_BUF:
            return len(lines)
        end = lines.rfind(b"\n", start, start + select.PIPE_BUF) + 1
        return end or lines.index(b"\n", start) + 1

    def close(self) -> None:
        """Close the descriptor, if it is ours."""
        if self._owned:
            os.close(self._descriptor)

    def _write_some(self, data: bytes | memoryview) -> int:
        while True:
            try:
                return os.write(self._descriptor, data)
            except BlockingIOError:
                poll = select.poll()
                poll.register(self._descriptor, select.POLLOUT)
                poll.poll()

    def _take_back(self, count: int) -> bool:
        """Remove the last bytes of a file, if nobody has written behind them."""
        try:
            status = os.fstat(self._descriptor)
            end = os.lseek(self._descriptor, 0, os.SEEK_CUR)
            if not stat.S_ISREG(status.st_mode) or end != status.st_size:
                return False
            os.ftruncate(self._descriptor, end - count)
            os.lseek(self._descriptor, end - count, os.SEEK_SET)  # a shell's ">" does not append
        except OSError:
            return False
        return True


def open_log(path: str) -> LogFile:
    """Open a file to append to, or a FIFO that somebody reads.

    Raises:
        OSError: it cannot be opened; also, a FIFO has no reader.
    """
    flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC | os.O_NONBLOCK
    return LogFile(os.open(path, flags, 0o666))


class LogWriter:
    """The queue and its thread.

    Lines can be put from any thread, also before :meth:`start`.  twistd forks after its first
    lines, and a fork takes no thread along.

    Args:
        file: where the lines go.
        note: makes the line that says how many lines were lost, and why.
        queue: how much may wait.

    Attributes:
        lost: how many lines were not written.
    """

    def __init__(
        self, file: LogFile, note: Callable[[int, str], bytes], *, queue: int = QUEUE
    ) -> None:
        self._file = file
        self._note = note
        self._most = queue
        self.lost = 0
        # An unread failure is logged when the collector finds it, also amid a call of this class.
        self._lock = threading.RLock()
        self._changed = threading.Condition(self._lock)
        self._lines: _Waiting = deque()
        self._access: _Waiting = deque()
        self._number = 0
        self._weight = 0  # of both
        self._access_weight = 0
        self._gap = 0  # lost behind everything that waits
        self._unsaid, self._why = 0, ""  # the thread's: lost, and not in the log yet
        self._reopening: Callable[[], LogFile] | None = None
        self._rests = False
        self._catches_crash = False
        self._thread: threading.Thread | None = None

    def catch_crash(self) -> None:
        """Let the file have the thread's stack if the process crashes; see LogFile."""
        self._catches_crash = True
        self._file.catch_crash()

    def start(self) -> None:
        """Begin to write; from now on the process must not fork."""
        self._thread = threading.Thread(target=self._run, name="log", daemon=True)
        self._thread.start()

    def put(self, line: bytes) -> None:
        """Queue a line; if the queue is full, access lines make room for it, the newest first."""
        weight = _weight(1, line)
        with self._lock:
            if self._weight - self._access_weight + weight > self._most:
                self._lose(1)
                return
            while self._weight + weight > self._most:
                _, dropped, freed = self._access.pop()
                self._weight -= freed
                self._access_weight -= freed
                self._lose(_count(dropped))
            self._append(self._lines, line, weight)
            self._wake()

    def wake(self) -> None:
        """Let what waits be written now."""
        with self._lock:
            self._wake()

    def put_access(self, lines: bytes, count: int = 1) -> None:
        """Queue so many access lines; they are written with the next line, or at :meth:`wake`.

        If the queue is full, they are lost, and those behind them, too.
        """
        weight = _weight(count, lines)
        with self._lock:
            is_behind = self._gap and not self._is_empty()
            if is_behind or self._weight + weight > self._most:
                self._lose(count)
                return
            self._access_weight += weight
            self._append(self._access, lines, weight)

    def reopen(self, opened: Callable[[], LogFile]) -> None:
        """Continue soon in the file that ``opened`` returns; if that fails, in the present one."""
        with self._lock:
            self._reopening = opened
            self._wake()

    def flush(self, seconds: float = CLOSING_S) -> None:
        """Wait until everything is written, at most so long."""
        if self._thread is None:
            try:
                self.start()
            except RuntimeError:  # the interpreter is ending, and starts no thread any more
                self._write(self._take())
                return
        with self._lock:
            self._wake()
            self._changed.wait_for(lambda: self._rests and self._is_empty(), seconds)

    # -- the queue ------------------------------------------------------------------------------

    def _append(self, waiting: _Waiting, line: bytes | int, weight: int) -> None:
        self._number += 1
        waiting.append((self._number, line, weight))
        self._weight += weight

    def _wake(self) -> None:
        if self._rests and not self._is_empty():
            self._rests = False
            self._changed.notify_all()

    def _lose(self, count: int) -> None:
        self.lost += count
        self._gap += count

    def _is_empty(self) -> bool:
        return not (self._lines or self._access or self._reopening)

    def _take(self) -> list[bytes | int]:
        """Take the first lines out of the queue; mark the place of those that were lost."""
        taken: list[bytes | int] = []
        lines, access = self._lines, self._access
        with self._lock:
            while (lines or access) and len(taken) < _TOGETHER:
                if not access or (lines and lines[0][0] < access[0][0]):
                    _, line, weight = lines.popleft()
                else:
                    _, line, weight = access.popleft()
                    self._access_weight -= weight
                taken.append(line)
                self._weight -= weight
            if self._gap and self._weight < self._most:
                gap, self._gap = self._gap, 0
                self._append(lines, gap, 1)
        return taken

    # -- the thread -----------------------------------------------------------------------------

    def _run(self) -> None:
        while True:
            with self._lock:
                while self._is_empty():
                    self._rests = True
                    self._changed.notify_all()
                    self._changed.wait()
                self._rests = False
                reopening, self._reopening = self._reopening, None
            if reopening is not None:
                self._reopen(reopening)
            taken = self._take()
            try:
                self._write(taken)
            except Exception as error:  # whatever it is, the next lines may be written
                self._failed(sum(map(_count, taken)), repr(error))

    def _reopen(self, opened: Callable[[], LogFile]) -> None:
        try:
            file = opened()
        except OSError as error:
            _log.error("the log cannot be opened anew: {reason}", reason=str(error))
            return
        before, self._file = self._file, file
        if self._catches_crash:
            file.catch_crash()  # before the other's number can become a client's socket
        if file is not before:
            before.close()

    def _write(self, taken: Sequence[bytes | int]) -> None:
        whole: list[bytes] = []
        for line in taken:
            if isinstance(line, int):
                self._write_lines(whole)
                whole = []
                self._unsaid += line
                self._why = self._why or "they were not taken in time"
            else:
                whole.append(line)
        self._write_lines(whole)

    def _write_lines(self, lines: list[bytes]) -> None:
        try:
            if self._unsaid:
                self._file.write(self._note(self._unsaid, self._why))
                self._unsaid, self._why = 0, ""
            if lines:
                self._file.write(b"".join(lines))
        except Unwritten as error:
            count = sum(map(_count, lines)) if self._unsaid else error.count
            self._failed(count, str(error))

    def _failed(self, count: int, why: str) -> None:
        """Count lines that could not be written; the next line that can be is behind a report."""
        self._unsaid += count
        self._why = why
        with self._lock:
            self.lost += count


def _weight(count: int, lines: bytes) -> int:
    return max(count, 1 + len(lines) // _KIB)


def _count(lines: bytes | int) -> int:
    return lines.count(b"\n") if isinstance(lines, bytes) else 0
