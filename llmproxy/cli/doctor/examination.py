"""All that is tried with one URL, one exchange after the other.

First the stream, as a client asks for it that takes gzip.  If it was compressed or held, it is
asked for again without compression, so that it is known whether that is the cause; a paced one that
was held once more with larger events, so that a block of N bytes is told from the whole stream.
What needs the help of the far end is tried with a paced stream alone: a broken body, a client that
leaves, a slow reader, a silence.  What could not be tried is None.
"""

from __future__ import annotations

import contextlib
import json
import secrets
import time
from collections.abc import Callable, Mapping

import msgspec

from llmproxy.cli.doctor.exchange import End, Exchange, Seen, Trust, protocol
from llmproxy.cli.doctor.shape import Pattern, is_after, shape_of, taken_unread
from llmproxy.cli.doctor.target import Target

_ENOUGH_EVENTS = 3
_SETTLED_S = 1.0  # a stream has begun at the far end by then, also where nothing is seen of it
_POLL_S = 0.05
_BREAK_AFTER = 5
_BREAK_WAIT_S = 10.0
_ASKED_S = 5.0
SILENCE_AFTER = 3
"""How many events a stream with a silence has before it; one more comes after it."""
_BEYOND_SILENCE_S = 10.0
_FLOOD = {"n": 1024, "interval_ms": 0, "bytes": 65536}
_SMALL_BUFFER = 65536
_MOST_TAKEN = 60 * 1024**2
_WIDE_BYTES = 4000
_SILENT_MS = 30_000
_REFUSALS = (400, 429)
"""The far end does not know a word of the query, or has had enough requests of this client."""

Progress = Callable[[str], None]
"""Called with what is tried next."""


class Checks(msgspec.Struct, frozen=True, kw_only=True):
    """How long may be waited for what.

    Attributes:
        timeout_s: the longest that a stream is read, connection and all.
        idle_s: a silence of so many seconds is tried; None leaves it out.
        stall_s: how long a slow reader reads nothing; None leaves it out.
        patience_s: how long the far end may take to notice that its client has left.
    """

    timeout_s: float = 60.0
    idle_s: float | None = None
    stall_s: float | None = 2.0
    patience_s: float = 3.0


class Told(msgspec.Struct, frozen=True):
    """After how many seconds the far end knew that its client had left; None: not in time."""

    seconds: float | None


class Unread(msgspec.Struct, frozen=True):
    """What the way took while nobody read, in bytes, and whether the far end then had to wait."""

    size: int
    far_end_waited: bool


class Observations(msgspec.Struct, kw_only=True):
    """What was seen at one URL; None is what was not tried, or could not be.

    Attributes:
        target: the URL.
        direct: it is the provider itself.
        stream: the stream, as a client gets it that takes gzip.
        plain: the same without compression.
        wide: a paced stream with events of some kilobytes.
        broken: a paced stream that the far end breaks off.
        cancel_sending: a client left while the far end was sending.
        cancel_silent: the same while it was silent.
        unread: a client did not read.
        silence: a paced stream with a silence of ``silence_s`` seconds.
        arrived: what the far end saw of a request: its version, and fields that hops add.
        protocol: what the server chooses where HTTP/2 is offered, too; None without TLS.
    """

    target: str
    direct: bool
    stream: Seen
    plain: Seen | None = None
    wide: Seen | None = None
    broken: Seen | None = None
    cancel_sending: Told | None = None
    cancel_silent: Told | None = None
    unread: Unread | None = None
    silence: Seen | None = None
    silence_s: float | None = None
    arrived: dict[str, str] | None = None
    protocol: str | None = None


def examine(target: Target, checks: Checks, trust: Trust, progress: Progress) -> Observations:
    """Try everything that can be tried with one URL."""
    return _Examination(target, checks, trust, progress).run()


class _Examination:
    def __init__(self, target: Target, checks: Checks, trust: Trust, progress: Progress) -> None:
        self._target, self._checks, self._trust = target, checks, trust
        self._progress = progress

    def run(self) -> Observations:
        """Return what was seen."""
        target = self._target
        self._progress("the stream")
        stream = self._read("gzip", {})
        found = Observations(target=str(target), direct=target.direct, stream=stream)
        if stream.status is None:
            return found
        if target.url.scheme == "https":
            with contextlib.suppress(OSError):
                found.protocol = protocol(
                    target, trust=self._trust, timeout_s=self._checks.timeout_s
                )
        if stream.status != 200:
            return found
        paced = target.is_paced and stream.is_paced
        held = shape_of(stream).pattern in (Pattern.HELD, Pattern.BLOCKS)
        if stream.coding is not None or held:
            self._progress("the stream, without compression")
            found.plain = self._again({})
        if paced and shape_of(found.plain or stream).pattern in (Pattern.HELD, Pattern.BLOCKS):
            self._progress("the stream, with larger events")
            found.wide = self._again({"bytes": _WIDE_BYTES})
        if paced:
            self._ask_more(found)
        return found

    def _ask_more(self, found: Observations) -> None:
        self._progress("a broken body")
        found.broken = self._break()
        self._progress("a client that leaves")
        found.cancel_sending, arrived = self._leave({"n": 400, "interval_ms": 50})
        silent = {"silence_after": SILENCE_AFTER, "silence_ms": _SILENT_MS}
        found.cancel_silent, _ = self._leave({"n": 4, "interval_ms": 50} | silent)
        found.arrived = arrived
        if (stall_s := self._checks.stall_s) is not None:
            self._progress("a slow reader")
            found.unread = self._stall(stall_s)
        if (idle_s := self._checks.idle_s) is not None:
            self._progress(f"a silence of {idle_s:g} s")
            found.silence = self._wait(idle_s)
            found.silence_s = idle_s

    def _open(
        self,
        pace: Mapping[str, object],
        timeout_s: float,
        *,
        encoding: str = "identity",
        receive_buffer: int = 0,
    ) -> Exchange:
        if self._target.is_paced and "ended" not in pace:
            pace = {"mark": secrets.token_hex(8), **pace}  # so that no two URLs are the same
        return Exchange(
            self._target,
            self._target.request(encoding, pace),
            trust=self._trust,
            timeout_s=timeout_s,
            receive_buffer=receive_buffer,
        )

    def _read(self, encoding: str, pace: Mapping[str, object]) -> Seen:
        with self._open(pace, self._checks.timeout_s, encoding=encoding) as exchange:
            return exchange.read()

    def _again(self, pace: Mapping[str, object]) -> Seen | None:
        """Return the stream without compression, unless it is refused this time."""
        seen = self._read("identity", pace)
        return seen if seen.status == 200 else None

    def _break(self) -> Seen | None:
        pace = {"n": 20, "interval_ms": 50, "break_after": _BREAK_AFTER}
        with self._open(pace, min(_BREAK_WAIT_S, self._checks.timeout_s)) as exchange:
            seen = exchange.read()
        was_broken = seen.status not in _REFUSALS and len(seen.events) <= _BREAK_AFTER
        return seen if was_broken else None

    def _leave(self, pace: Mapping[str, object]) -> tuple[Told | None, dict[str, str] | None]:
        """Leave a stream; return when the far end knew, and what it saw of the request."""
        mark = secrets.token_hex(8)
        with self._open({"mark": mark, **pace}, self._checks.timeout_s) as exchange:
            exchange.read(lambda seen: len(seen.events) >= _ENOUGH_EVENTS, seconds=_SETTLED_S)
            if exchange.seen.end is not End.OPEN:
                return None, None
        left = time.monotonic()
        arrived = None
        while time.monotonic() - left < self._checks.patience_s:
            told = self._ended(mark)
            waited = time.monotonic() - left
            if told is None:
                return None, arrived
            arrived = _arrived(told) or arrived
            if told.get("ended") == "complete":
                return None, arrived
            if told.get("ended") is not None:
                return Told(waited), arrived
            time.sleep(_POLL_S)
        return Told(None), arrived

    def _ended(self, mark: str) -> dict[str, object] | None:
        """Return what the far end says of a stream; None where it knows nothing."""
        with self._open({"ended": mark}, _ASKED_S) as exchange:
            seen = exchange.read()
        if seen.status != 200 or seen.end not in (End.WHOLE, End.CLOSED):
            return None
        try:
            said = json.loads(seen.excerpt)
        except ValueError:
            return None
        return said if isinstance(said, dict) and "ended" in said else None

    def _stall(self, stall_s: float) -> Unread | None:
        """Read nothing for a while, then as much as was taken in between."""
        limit_s = self._checks.timeout_s
        with self._open(_FLOOD, limit_s, receive_buffer=_SMALL_BUFFER) as exchange:
            seen = exchange.read(lambda seen: bool(seen.events), seconds=_ASKED_S)
            if seen.status != 200 or not seen.events:
                return None
            time.sleep(stall_s)
            seen = exchange.read(lambda seen: _has_shown(seen, stall_s))
        if seen.end is End.OPEN and not _has_shown(seen, stall_s):
            return None
        return Unread(*taken_unread(seen.events, stall_s))

    def _wait(self, idle_s: float) -> Seen | None:
        silent = {"silence_after": SILENCE_AFTER, "silence_ms": int(idle_s * 1000)}
        pace = {"n": 4, "interval_ms": 50} | silent
        with self._open(pace, idle_s + _BEYOND_SILENCE_S) as exchange:
            seen = exchange.read()
        was_silent = len(seen.events) < 4 or seen.end_s >= idle_s
        return seen if was_silent and seen.status not in _REFUSALS else None


def _has_shown(seen: Seen, stall_s: float) -> bool:
    """Return whether enough has come to say what was taken while nobody read."""
    return is_after(seen.events[0], stall_s, seen.events[-1]) or seen.size >= _MOST_TAKEN


def _arrived(told: dict[str, object]) -> dict[str, str] | None:
    """Return what the far end saw of a request, if it says so."""
    request = told.get("request")
    if not isinstance(request, dict):
        return None
    return {str(name): str(value) for name, value in request.items() if value is not None}
