"""The log's queue and thread: what is kept, what is lost, and that nobody waits (ADR-0021)."""

from __future__ import annotations

import errno
import fcntl
import os
import resource
import select
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from llmproxy.record.log_writer import LogFile, LogWriter, open_log
from tests.support.daemon import environment
from tests.support.live_proxy import until
from tests.support.sockets import WAIT

SOON = 0.2
"""Seconds that a flush of a pipe that nobody reads is allowed; it takes all of them."""


def note(count: int, why: str) -> bytes:
    """Return the line about lines that were lost."""
    return b"lost %d: %b\n" % (count, why.encode())


IN_TIME = b"they were not taken in time"


class Pipe:
    """A pipe of one page, the writer at one end, and what was read at the other."""

    def __init__(self, *, queue: int = 10, blocking: bool = True) -> None:
        self.out, into = os.pipe()
        fcntl.fcntl(into, fcntl.F_SETPIPE_SZ, 4096)
        os.set_blocking(into, blocking)
        self.file = LogFile(into)
        self.writer = LogWriter(self.file, note, queue=queue)
        self.read = b""
        self._into = into

    def block(self) -> None:
        """Fill the pipe, and let the thread hang in the write of a line behind that."""
        os.write(self._into, bytes(4096))
        self.writer.start()
        self.writer.put(b"first\n")
        until(lambda: not self.writer._lines, "the thread has taken the line")

    def unblock(self) -> list[bytes]:
        """Read all that waits; return its lines."""
        os.set_blocking(self.out, False)
        reading = threading.Thread(target=self._read)
        reading.start()
        self.writer.flush(WAIT)
        self.file.close()
        reading.join()
        return self.read.lstrip(b"\0").splitlines()

    def _read(self) -> None:
        poll = select.poll()
        poll.register(self.out, select.POLLIN)
        while poll.poll():
            data = os.read(self.out, 4096)
            if not data:
                os.close(self.out)
                return
            self.read += data


@pytest.mark.parametrize("blocking", [True, False])
def test_lines_wait_for_a_full_pipe(*, blocking: bool) -> None:
    """They come in their order, also where another process made the pipe non-blocking."""
    pipe = Pipe(blocking=blocking)
    pipe.block()
    for number in range(3):
        pipe.writer.put(b"line %d\n" % number)
        pipe.writer.put_access(b"access %d\n" % number)
    assert pipe.unblock() == [
        b"first",
        *(b"%b %d" % (kind, number) for number in range(3) for kind in (b"line", b"access")),
    ]
    assert pipe.writer.lost == 0


def test_lines_that_do_not_fit_are_counted_and_reported_in_their_place() -> None:
    """The report stands behind the lines that are older, before those that are newer."""
    pipe = Pipe(queue=3)
    pipe.block()
    for number in range(5):
        pipe.writer.put(b"%d\n" % number)
    assert pipe.writer.lost == 2
    assert pipe.unblock() == [b"first", b"0", b"1", b"2", b"lost 2: " + IN_TIME]
    assert pipe.writer.lost == 2


def test_access_lines_make_room_for_events() -> None:
    """The newest go first; an access line takes no place of an event."""
    pipe = Pipe(queue=4)
    pipe.block()
    for number in range(6):
        pipe.writer.put_access(b"access %d\n" % number)
    for number in range(3):
        pipe.writer.put(b"error %d\n" % number)
    pipe.writer.put_access(b"late\n")
    assert pipe.writer.lost == 6
    kept = [b"first", b"access 0", b"error 0", b"error 1", b"error 2"]
    assert pipe.unblock() == [*kept, b"lost 6: " + IN_TIME]


def test_a_long_line_counts_more() -> None:
    """The bound is one of memory; a line that cannot fit moves nothing out of its place."""
    pipe = Pipe(queue=10)
    pipe.block()
    pipe.writer.put_access(b"access\n")
    pipe.writer.put(b"x" * 20 * 1024 + b"\n")
    pipe.writer.put(b"y" * 5 * 1024 + b"\n")
    pipe.writer.put(b"z" * 5 * 1024 + b"\n")
    lines = [line[:6] for line in pipe.unblock()]
    assert lines == [b"first", b"access", b"yyyyyy", b"lost 2"]


def test_a_flush_has_a_bound() -> None:
    """The end of a process does not wait for a pipe that nobody reads."""
    pipe = Pipe()
    pipe.block()
    pipe.writer.flush(SOON)
    assert pipe.unblock() == [b"first"]


def test_a_line_of_a_pipe_is_written_whole_or_not_at_all() -> None:
    """Lines that are written together, and do not fit, do not end amid one of them."""
    pipe = Pipe(queue=100)
    for number in range(20):
        pipe.writer.put(b"%03d" % number + b"x" * 500 + b"\n")
    pipe.writer.flush(SOON)
    first = os.read(pipe.out, 1 << 16)
    assert first.endswith(b"x\n")
    assert len(first.splitlines() + pipe.unblock()) == 20


def test_a_line_that_is_logged_amid_a_call_does_not_hang() -> None:
    """The collector may run anywhere, and logs failures that nobody has looked at."""
    pipe = Pipe()
    with pipe.writer._lock:
        pipe.writer.put(b"amid\n")
    assert pipe.unblock() == [b"amid"]


def test_lines_of_many_threads_are_whole_and_in_order() -> None:
    """Each thread's lines keep their order; none is lost."""
    pipe = Pipe(queue=10_000)

    lines = [b"%d" % number for number in range(2000)]

    def put(start: int) -> None:
        for number in range(start, 2000, 4):
            line = lines[number] + b"\n"
            if number % 8 < 4:
                pipe.writer.put(line)
            else:
                pipe.writer.put_access(line)

    threads = [threading.Thread(target=put, args=(start,)) for start in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    found = pipe.unblock()
    assert sorted(found) == sorted(lines)
    for start in range(4):
        own = [int(line) for line in found if int(line) % 4 == start]
        assert own == sorted(own)


@contextmanager
def no_larger(size: int) -> Iterator[None]:
    """Let no file of this process become larger: a disk that is full."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_full_disk_loses_whole_lines_and_says_so(tmp_path: Path) -> None:
    """Half a line is taken back; with room again, a report stands before the next line."""
    path = tmp_path / "log"
    writer = LogWriter(open_log(str(path)), note)
    with no_larger(10):
        for line in (b"one\n", b"two\n", b"three\n"):
            writer.put(line)
        writer.flush(WAIT)
        assert path.read_bytes() == b"one\ntwo\n"
        assert writer.lost == 1
        writer.put(b"four\n")
        writer.flush(WAIT)
        assert writer.lost == 2
    writer.put(b"five\n")
    writer.flush(WAIT)
    why = os.strerror(errno.EFBIG).encode()
    assert path.read_bytes() == b"one\ntwo\nlost 2: %b\nfive\n" % why


def test_half_a_line_is_not_taken_back_from_under_another_process(tmp_path: Path) -> None:
    """What another process has written behind it stays."""
    path = tmp_path / "log"
    file, other = open_log(str(path)), open_log(str(path))
    file.write(b"line\n")
    other.write(b"other\n")
    assert not file._take_back(3)
    assert path.read_bytes() == b"line\nother\n"
    file.close()
    other.close()


def test_a_pipe_whose_reader_is_gone_loses_lines(tmp_path: Path) -> None:
    """They are counted; a new reader of a FIFO gets the report and the lines after it."""
    path = tmp_path / "fifo"
    os.mkfifo(path)
    with pytest.raises(OSError, match="No such device"):  # at the start, and at once
        open_log(str(path))
    reader = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    writer = LogWriter(open_log(str(path)), note)
    writer.put(b"one\n")
    writer.flush(WAIT)
    assert os.read(reader, 100) == b"one\n"
    os.close(reader)
    writer.put(b"two\n")
    writer.flush(WAIT)
    assert writer.lost == 1
    reader = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    writer.put(b"three\n")
    writer.flush(WAIT)
    assert os.read(reader, 100) == b"lost 1: Broken pipe\nthree\n"
    os.close(reader)


def test_a_line_that_never_fits_costs_no_other_line(tmp_path: Path) -> None:
    """It is lost; what comes behind it finds the queue empty."""
    path = tmp_path / "log"
    writer = LogWriter(open_log(str(path)), note, queue=10)
    writer.start()
    writer.put(b"x" * 20_000 + b"\n")
    writer.put_access(b"access\n")
    writer.flush(WAIT)
    assert writer.lost == 1
    assert b"access\n" in path.read_bytes()


def test_an_error_of_ours_stops_no_other_line(tmp_path: Path) -> None:
    """The line counts as lost, and the thread goes on."""
    path = tmp_path / "log"

    class Failing(LogFile):
        fails = True

        def write(self, lines: bytes) -> None:
            if self.fails:
                self.fails = False
                raise ZeroDivisionError
            super().write(lines)

    writer = LogWriter(Failing(os.open(path, os.O_WRONLY | os.O_CREAT)), note)
    writer.put_access(b"never\n")
    writer.flush(WAIT)
    writer.put(b"on\n")
    writer.flush(WAIT)
    assert writer.lost == 1
    assert path.read_bytes().endswith(b"\non\n")


def test_opening_a_file_anew_waits_for_nobody(tmp_path: Path) -> None:
    """A path that hangs in ``open`` holds up the thread alone."""
    path, hangs = tmp_path / "log", threading.Event()
    writer = LogWriter(open_log(str(path)), note)

    def opened() -> LogFile:
        hangs.wait(WAIT)
        return open_log(str(tmp_path / "new"))

    writer.start()
    writer.reopen(opened)
    writer.put(b"line\n")
    assert path.read_bytes() == b""
    hangs.set()
    writer.flush(WAIT)
    assert (tmp_path / "new").read_bytes() == b"line\n"


FORKS = """
import atexit, os, sys
from llmproxy.record.log_writer import LogFile, LogWriter
writer = LogWriter(LogFile(1), lambda count, why: b"")
atexit.register(writer.flush)
writer.put(b"before\\n")
if os.fork():
    os.wait()
    os._exit(0)
writer.put(b"after\\n")
if sys.argv[1] == "start":
    writer.start()
sys.exit()
"""


@pytest.mark.parametrize("how", ["start", "fail"])
def test_a_fork_neither_loses_nor_doubles_lines(how: str) -> None:
    """twistd forks behind its first lines; a start that fails before the thread writes them too."""
    command = [sys.executable, "-c", FORKS, how]
    ended = subprocess.run(
        command, env=environment(), capture_output=True, timeout=WAIT, check=True
    )
    assert (ended.stdout, ended.stderr) == (b"before\nafter\n", b"")
