"""What a played provider does on one connection, and how a test steers it.

A script is called with each accepted connection, which is closed behind it. The raw pieces that a
script is given are bytes of HTTP; the content that :func:`stream` is given is put into chunks.
"""

from __future__ import annotations

import queue
import threading
from typing import Any

from tests.support.sockets import WAIT, Script, Wire, chunked

# These say that their connection ends with them: a kept one, which its script then closes, could be
# taken for the next request in the same moment.
SSE = (
    b"HTTP/1.1 200 OK\r\nConnection: close\r\nContent-Type: text/event-stream\r\n"
    b"Transfer-Encoding: chunked\r\n\r\n"
)
LAST = b"0\r\n\r\n"
DONE = b"data: [DONE]\n\n"
OK = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\nConnection: close\r\n\r\nok"
KEPT = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok"
"""A response that leaves its connection open."""


class Turn:
    """One side gives turns, the other side takes them; no wait is endless."""

    def __init__(self) -> None:
        self._turns = threading.Semaphore(0)

    def give(self, count: int = 1) -> None:
        """Let the other side go on, so many times."""
        self._turns.release(count)

    def take(self) -> None:
        """Wait for the other side."""
        if not self._turns.acquire(timeout=WAIT):
            raise TimeoutError("the other side gave no turn")


class Notes(queue.Queue[Any]):
    """What a script saw, for the test to read."""

    def read(self) -> Any:
        """Wait for the next note."""
        try:
            return self.get(timeout=WAIT)
        except queue.Empty:
            raise TimeoutError("the script noted nothing") from None


def event(number: int) -> bytes:
    """Return one SSE event."""
    return b'data: {"n":%d}\n\n' % number


def reply(*raw: bytes) -> Script:
    """Send these bytes in response to one request."""

    def script(wire: Wire) -> None:
        wire.read_request()
        wire.send(*raw)

    return script


def keep_replying(wire: Wire) -> None:
    """Respond to every request on a connection with ``KEPT``."""
    while True:
        wire.read_request()
        wire.send(KEPT)


def stream(turn: Turn, *pieces: bytes, head: bytes = SSE) -> Script:
    """Send the head at once, then each piece as one chunk at a turn, then the last chunk at one."""

    def script(wire: Wire) -> None:
        wire.read_request()
        wire.send(head)
        for piece in pieces:
            turn.take()
            wire.send(chunked(piece))
        turn.take()
        wire.send(LAST)

    return script


def hold(ended: Notes, *raw: bytes) -> Script:
    """Send these bytes and then nothing; note how the proxy ended the connection.

    It may have ended before all of that, where a deadline is short and the machine busy.
    """

    def script(wire: Wire) -> None:
        try:
            wire.read_request()
            wire.send(*raw)
        except (OSError, EOFError):
            ended.put("early")
            raise
        ended.put(wire.wait_closed())

    return script


def flood(ended: Notes, head: bytes = SSE) -> Script:
    """Send chunks without end; note ``cut`` once the proxy has closed the connection."""

    def script(wire: Wire) -> None:
        wire.read_request()
        try:
            wire.send(head)
            while True:
                wire.send(chunked(b"x" * 100_000))
        except OSError:
            ended.put("cut")
            raise

    return script


def break_off(turn: Turn, end: str, *raw: bytes) -> Script:
    """Send these bytes, then end the connection at a turn, by a ``fin`` or a ``reset``."""

    def script(wire: Wire) -> None:
        wire.read_request()
        wire.send(*raw)
        turn.take()
        if end == "reset":
            wire.reset()

    return script


class PacedStream:
    """A script that sends one chunk, and the rest at a turn; it notes how its connection ended.

    Args:
        first: the content of the first chunk.
        rest: that of the second; without it the stream does not end.

    Attributes:
        turn: lets it go on.
        ended: how each connection ended, once the stream was sent or could not be.
    """

    def __init__(self, first: bytes, rest: bytes = b"") -> None:
        self.turn = Turn()
        self.ended = Notes()
        self._first, self._rest = first, rest

    def __call__(self, wire: Wire) -> None:
        """Play."""
        wire.read_request()
        wire.send(SSE, chunked(self._first))
        if self._rest:
            self.turn.take()
            wire.send(chunked(self._rest), LAST)
        self.ended.put(wire.wait_closed())
