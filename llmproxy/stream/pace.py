"""A stream of events that the proxy makes itself, to measure the way between a client and itself.

Each event is one JSON object: ``{"n": 1, "sent": 1790000000.123456, "ms": 0.412, "pad": "xx"}``.
``n`` counts from 1.  ``sent`` is when it was written, in seconds since the epoch, and ``ms`` the
monotonic milliseconds from the beginning of the stream to then.  ``pad`` fills the event up to the
size that was asked for, which counts its framing: ``data: `` and an empty line behind it (SSE), or
a line end (NDJSON).  Each event is one write.  There is no end marker: the body ends behind the
last event.

What can be asked for stands in :func:`pace_of`.  A :class:`PacedSource` is to a relay what a
provider's response is, so that backpressure, a client that leaves and the figures of a stream are
the relay's.  Nothing here knows clients, records or HTTP.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any
from urllib.parse import parse_qsl

import msgspec
from twisted.python.failure import Failure
from twisted.web.client import ResponseDone

from llmproxy.errors import ProxyError

MOST_EVENTS = 100_000
LONGEST_INTERVAL_MS = 60_000
LARGEST_EVENT = 65_536
LONGEST_SILENCE_MS = 600_000
MOST_BYTES = 64 * 1024 * 1024
LONGEST_S = 3600

_NUMBER = re.compile(r"[0-9]{1,9}\Z")
_FORMATS = ("sse", "ndjson")
_NAMES = ("n", "interval_ms", "bytes", "format", "silence_ms", "silence_after", "break_after")
_FRAMES = {"sse": (b"data: ", b"\n\n"), "ndjson": (b"", b"\n")}


class Pace(msgspec.Struct, frozen=True):
    """What a paced stream is like.

    Attributes:
        events: how many there are.
        interval_s: seconds from one to the next; 0: as fast as they are taken.
        size: bytes of one, at least.
        form: ``sse`` or ``ndjson``.
        silence_s: seconds of silence in the place of one interval; 0 for none.
        silence_after: the event behind which that is; behind the last one, the body ends after it.
        break_after: the event behind which the stream breaks off, or None.
    """

    events: int = 20
    interval_s: float = 0.25
    size: int = 200
    form: str = "sse"
    silence_s: float = 0.0
    silence_after: int = 1
    break_after: int | None = None

    @property
    def last(self) -> int:
        """The last event that is sent."""
        return self.events if self.break_after is None else self.break_after

    @property
    def content_type(self) -> bytes:
        """The type of the body."""
        return b"text/event-stream" if self.form == "sse" else b"application/x-ndjson"


def read_query(query: bytes) -> dict[str, str]:
    """Return the parameters of a query.

    Raises:
        ProxyError: 400, if one is there twice.
    """
    pairs = parse_qsl(query.decode("latin-1"), keep_blank_values=True)
    found = dict(pairs)
    if len(found) < len(pairs):
        raise _bad("Each parameter of the query may be there once.")
    return found


def pace_of(parameters: Mapping[str, str], others: tuple[str, ...] = ()) -> Pace:
    """Return what the parameters of a query ask for.

    Args:
        parameters: from :func:`read_query`.
        others: names of parameters that mean something else to the caller.

    Raises:
        ProxyError: 400, which names the parameter and its range.
    """
    known = (*_NAMES, *others)
    if not parameters.keys() <= set(known):
        raise _bad(f"The query may have {', '.join(known)}, and nothing else.")
    form = parameters.get("format", "sse")
    if form not in _FORMATS:
        raise _bad("format must be sse or ndjson.")

    def number(name: str, default: int, least: int, most: int) -> int:
        if name not in parameters:
            return default
        value = parameters[name]
        if _NUMBER.match(value) is None or not least <= int(value) <= most:
            raise _bad(f"{name} must be a whole number from {least} to {most}.")
        return int(value)

    events = number("n", 20, 1, MOST_EVENTS)
    interval_ms = number("interval_ms", 250, 0, LONGEST_INTERVAL_MS)
    size = number("bytes", 200, 0, LARGEST_EVENT)
    silence_ms = number("silence_ms", 0, 0, LONGEST_SILENCE_MS)
    silence_after = number("silence_after", 1, 1, events)
    break_after = number("break_after", 0, 1, events) or None
    if events * size > MOST_BYTES:
        raise _bad(f"n times bytes may be {MOST_BYTES} at most.")
    if (events - 1) * interval_ms + silence_ms > LONGEST_S * 1000:
        raise _bad(f"All intervals (interval_ms) and silence_ms may last {LONGEST_S} s together.")
    return Pace(
        events=events,
        interval_s=interval_ms / 1000,
        size=size,
        form=form,
        silence_s=silence_ms / 1000,
        silence_after=silence_after,
        break_after=break_after,
    )


class PacedSource:
    """Makes the body of one paced stream; a ``Source`` of ``stream/relay.py``.

    While the relay is paused no event is made.  Behind a pause the stream goes on from there: what
    was due meanwhile is not made up for.

    Args:
        pace: what is asked for.
        reactor: runs the timer.
        clock: monotonic seconds.
        wall: seconds since the epoch.

    Attributes:
        sent: how many events were made.
    """

    def __init__(
        self, pace: Pace, reactor: Any, clock: Callable[[], float], wall: Callable[[], float]
    ) -> None:
        self._pace = pace
        self._reactor = reactor
        self._clock = clock
        self._wall = wall
        self._before, self._behind = _FRAMES[pace.form]
        self._protocol: Any = None
        self._timer: Any = None
        self._began = self._due = 0.0
        self.sent = 0

    def deliverBody(self, protocol: Any) -> None:
        """Begin with the next turn, so that the head of the response leaves by itself."""
        self._protocol = protocol
        self._began = self._due = self._clock()
        protocol.makeConnection(self)
        self._wait()

    def abort(self) -> None:
        """Make no more."""
        self._protocol = None
        self.pauseProducing()

    def pauseProducing(self) -> None:
        """Make nothing for now."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def resumeProducing(self) -> None:
        """Go on."""
        if self._protocol is not None and self._timer is None:
            self._due = max(self._due, self._clock())
            self._wait()

    def _wait(self) -> None:
        self._timer = self._reactor.callLater(max(0.0, self._due - self._clock()), self._go_on)

    def _go_on(self) -> None:
        """Send one event, and no second one in the same turn; or end."""
        self._timer, pace, protocol = None, self._pace, self._protocol
        if self.sent == pace.last:
            self._end()
            return
        self.sent += 1
        is_silent = self.sent == pace.silence_after and pace.silence_s > 0
        step = pace.silence_s if is_silent else pace.interval_s
        self._due = max(self._due + step, self._clock())
        is_over = self.sent == pace.last and not is_silent
        if not is_over:
            self._wait()  # before the event, which may pause the stream
        protocol.dataReceived(self._event())
        if is_over:
            self._end()

    def _end(self) -> None:
        protocol, self._protocol = self._protocol, None
        if protocol is not None:  # it did not leave with the last event
            protocol.connectionLost(Failure(ResponseDone()))

    def _event(self) -> bytes:
        passed_ms = (self._clock() - self._began) * 1000
        head = b'%b{"n":%d,"sent":%.6f,"ms":%.3f,"pad":"' % (
            self._before,
            self.sent,
            self._wall(),
            passed_ms,
        )
        behind = b'"}' + self._behind
        return head + b"x" * (self._pace.size - len(head) - len(behind)) + behind


def _bad(text: str) -> ProxyError:
    return ProxyError(400, "bad_query", text)
