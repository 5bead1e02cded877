"""What comes of one request, without exceptions, because ours and the stock parts differ."""

from __future__ import annotations

import threading
from typing import Any, NamedTuple

from tests.support.sockets import Received, Wire
from tests.traps.parts import Body, Call
from tests.traps.waits import ended, until, within

OK = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok"
MINE = b"HTTP/1.1 200 OK\r\nContent-Length: 4\r\n\r\nmine"
TRICK = b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\ntrick"


class Outcome(NamedTuple):
    """What came of a request.

    Attributes:
        code: the response's status, or None where there was no response.
        data: its body.
        whole: whether that was whole; None where it neither ended nor broke in time.
        error: why there was no response; ``TimeoutError`` where there was neither in time.
    """

    code: int | None
    data: bytes
    whole: bool | None
    error: Exception | None

    @property
    def refused(self) -> bool:
        """Whether the request failed by itself, and not because the test waited no longer."""
        return self.error is not None and not isinstance(self.error, TimeoutError)


async def outcome(call: Call, seconds: float) -> Outcome:
    """Await a response and its body, each for at most so many seconds."""
    try:
        reply = await within(seconds, call.head)
    except Exception as error:
        return Outcome(None, b"", None, error)
    body = Body()
    reply.deliver(body)
    whole = await ended(body.ended, seconds)
    return Outcome(reply.code, body.data, whole, None)


class Responding:
    """A provider's script that gives every request the same response, and keeps the requests."""

    def __init__(self, response: bytes = OK) -> None:
        self._response = response
        self.requests: list[Received] = []

    def __call__(self, wire: Wire) -> None:
        """Serve one connection."""
        while True:
            self.requests.append(wire.read_request())
            wire.send(self._response)


class FirstThenSecond:
    """A provider's script: the response to ``/second`` shows on which connection it came.

    On a connection of its own the second request gets ``mine``; where the first one was on that
    connection already, it gets ``trick``.

    Args:
        first: the response to the first request.

    Attributes:
        targets: what was asked for, in order.
    """

    def __init__(self, first: bytes) -> None:
        self._first = first
        self.targets: list[bytes] = []

    def __call__(self, wire: Wire) -> None:
        """Serve one connection."""
        used = False
        while True:
            target = wire.read_request().target
            self.targets.append(target)
            if target == b"/first":
                used = True
                wire.send(self._first)
            else:
                wire.send(TRICK if used else MINE)


class Step:
    """Lets a provider's thread wait for the test, or the test for the thread."""

    def __init__(self) -> None:
        self._event = threading.Event()

    def give(self) -> None:
        """Let the other side go on."""
        self._event.set()

    def take(self) -> None:
        """In the thread: wait."""
        assert self._event.wait(20)

    async def happens(self, seconds: float) -> bool:
        """In the test: wait, and tell whether it came."""
        return await until(self._event.is_set, seconds)


def reads_until_closed(wire: Wire) -> int:
    """Read to the peer's end, however it comes; return how many bytes there were."""
    count = len(wire.buffer)
    wire.buffer = b""
    try:
        while data := wire.sock.recv(1 << 16):
            count += len(data)
    except OSError:
        pass
    return count


def names(error: Any, word: str) -> bool:
    """Return whether the text of an error holds a word."""
    return word in f"{error} {getattr(error, 'detail', '')} {getattr(error, 'reason', '')}".lower()
