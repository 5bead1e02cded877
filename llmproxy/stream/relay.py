"""The pump for one response body: every chunk that comes in goes out, at once.

The relay stands between a provider's connection, which pushes, and a client's request, which pushes
back.  It has three states::

    FLOWING <--pauseProducing / resumeProducing--> PAUSED
       |                                             |
       +------------ end of the body, a fault, cancel() ----------> ENDED

Three classes, in the order in which a chunk meets them:

:class:`Relay` forwards the chunk, and adds it to the batch.
:class:`Batch` holds forwarded chunks of all streams of the process until there are many.
:class:`StreamStatistics` then notes what there is to note of the chunk, and feeds the tap's copy.

Why a batch: between two chunks, the code that notes and reads a chunk has left the processor's
caches.  A chunk that is read alone costs three times what it costs behind another one (ADR-0024).

The idle timer runs only while the relay flows: a client that is slow must not look like a provider
that is silent.  It is one timer.  When it rings, it looks at the time of the last chunk; neither
chunks nor pauses touch it.

A body that came whole with its head needs none of this: :class:`Whole` stands for it.

Nothing here knows a provider, a trace, a metric, or what a chunk holds.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable
from typing import Any, Final, Protocol

from twisted.internet.defer import Deferred, succeed
from twisted.internet.interfaces import IPushProducer
from twisted.internet.protocol import Protocol as TwistedProtocol
from twisted.internet.protocol import connectionDone
from twisted.logger import Logger
from twisted.python.failure import Failure
from twisted.web.client import ResponseDone
from zope.interface import implementer

from llmproxy.errors import ClientGone, upstream_idle

_log = Logger()

MOST_CHUNKS = 32
"""Chunks that are read together; for about a tenth of a millisecond nothing else is done."""

LONGEST_CHUNK = 4096
"""Most bytes of a chunk that waits; a longer one is read at once, behind those before it."""

_FOLLOWED = 2
"""Which chunk of a batch is followed until the kernel has it."""

AT_ONCE_S = 0.001
"""A chunk that comes so soon behind another was sent together with it."""

KEPT_CHUNKS = 32
"""How many of a body's last chunks are kept, each with its time and its size; a power of two."""

_MASK = KEPT_CHUNKS - 1
_NO_TIMES = array("d", bytes(8 * KEPT_CHUNKS))
_NO_SIZES = array("I", bytes(4 * KEPT_CHUNKS))

_OVER: Deferred[None] = succeed(None)
"""What stands for :attr:`Relay.done` once that has fired."""


class Reader(Protocol):
    """What reads chunks out of a batch; :class:`StreamStatistics` is one."""

    def read(self, at: float, data: bytes, start: int) -> None:
        """Read one chunk.

        Args:
            at: when it came, in monotonic seconds.
            start: where the content starts in a chunk of the chunked coding, whose content ends two
                bytes before its end; 0 where all of ``data`` is content.
        """


class Batch(list[tuple[Reader, float, bytes, int]]):
    """The chunks of all streams that wait to be read, in the order in which they came.

    The batch is read when it holds :data:`MOST_CHUNKS`, when a long chunk comes, and when anybody
    asks for something that is found in it.  So it never holds much, whatever the streams do.  Each
    entry holds who reads the chunk, and the arguments of :meth:`Reader.read`.  The batch is a list
    so that the relay can append without a call.
    """

    __slots__ = ()

    def add(self, reader: Reader, at: float, data: bytes, start: int = 0) -> int:
        """Let ``reader`` read ``data`` soon.

        The arguments are those of :meth:`Reader.read`.

        Returns:
            How many chunks wait now; 0 where they were read at once.
        """
        self.append((reader, at, data, start))
        count = len(self)
        if count < MOST_CHUNKS and len(data) <= LONGEST_CHUNK:
            return count
        self.read()
        return 0

    def read(self) -> None:
        """Let all waiting chunks be read."""
        if self:
            waiting = self[:]
            self.clear()
            for reader, at, data, start in waiting:
                try:
                    reader.read(at, data, start)
                except Exception:  # our own error, which must not end another stream
                    _log.failure("a chunk could not be looked at")


class StreamStatistics:
    """What is noted of one body: how much came, when, and how it ends.

    Every property counts all chunks that have come: the batch is read first.

    Args:
        batch: where the chunks of this body wait.
        now: monotonic seconds, when the body was asked for.
        gaps: called with the seconds between one chunk and the next.
        copy: called with the content of each chunk, or None.
    """

    __slots__ = (
        *("_at_once", "_batch", "_byte_count", "_chunks", "_copy", "_first_at", "_gaps"),
        *("_last_at", "_longest_gap", "_sizes", "_tail", "_times", "_verbatim"),
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
        self._chunks = self._byte_count = self._verbatim = self._at_once = 0
        self._first_at: float | None = None
        self._last_at = now
        self._longest_gap = 0.0
        self._tail = b""
        self._times = _NO_TIMES[:]
        self._sizes = _NO_SIZES[:]

    @property
    def chunks(self) -> int:
        """How many chunks came."""
        if self._batch:
            self._batch.read()
        return self._chunks

    @property
    def byte_count(self) -> int:
        """How many bytes of content came."""
        if self._batch:
            self._batch.read()
        return self._byte_count

    @property
    def verbatim(self) -> int:
        """How many of these bytes came in the chunked coding and went out as they were."""
        if self._batch:
            self._batch.read()
        return self._verbatim

    @property
    def first_at(self) -> float | None:
        """When the first chunk came, in monotonic seconds, or None."""
        if self._batch:
            self._batch.read()
        return self._first_at

    @property
    def last_at(self) -> float:
        """When the last chunk came; before the first one, when the body was asked for."""
        if self._batch:
            self._batch.read()
        return self._last_at

    @property
    def longest_gap(self) -> float:
        """The longest time between two chunks, without pauses, in seconds."""
        if self._batch:
            self._batch.read()
        return self._longest_gap

    @property
    def at_once(self) -> int:
        """How many chunks came within :data:`AT_ONCE_S` of the one before."""
        if self._batch:
            self._batch.read()
        return self._at_once

    @property
    def tail(self) -> bytes:
        """The last four bytes of the content, which say whether an event has ended."""
        if self._batch:
            self._batch.read()
        return self._tail

    @property
    def last_chunks(self) -> list[tuple[float, int]]:
        """The last :data:`KEPT_CHUNKS` chunks: when each came, in monotonic seconds, and its size.

        They stand in their order.
        """
        count = self.chunks
        places = [n % KEPT_CHUNKS for n in range(max(0, count - KEPT_CHUNKS), count)]
        return [(self._times[place], self._sizes[place]) for place in places]

    def read(self, at: float, data: bytes, start: int = 0) -> None:
        """Note one chunk, split at any point; see :class:`Reader`."""
        if start:
            data = data[start:-2]
            self._verbatim += len(data)
        size = len(data)
        place = self._chunks & _MASK
        self._times[place], self._sizes[place] = at, size
        gaps, copy = self._gaps, self._copy  # called as names: 0.01 of 0.66 µs of an event
        if self._chunks:
            gap = at - self._last_at
            gaps(gap)
            if gap > self._longest_gap:
                self._longest_gap = gap
            if gap < AT_ONCE_S:
                self._at_once += 1
        else:
            self._first_at = at
        self._last_at = at
        self._chunks += 1
        self._byte_count += size
        self._tail = data[-4:] if size > 3 else (self._tail + data)[-4:]
        if copy is not None:
            copy(data)

    def excuse(self, since: float, now: float) -> None:
        """Do not count the time from ``since`` to ``now`` as a gap: nothing could come then."""
        last_at = self.last_at
        self._last_at = last_at + now - max(since, last_at)


class Whole:
    """A body that came whole; it looks like a relay that has ended, and like its statistics.

    There was nothing to pump, nothing to wait for, and nothing to pause.

    Args:
        data: all of it.
        at: when it came, in monotonic seconds.
    """

    __slots__ = ("at", "byte_count", "chunks", "tail")
    is_paused = False
    paused_s = longest_gap = 0.0
    verbatim = at_once = 0

    def __init__(self, data: bytes, at: float) -> None:
        self.at = at
        self.byte_count = len(data)
        self.chunks = 1 if data else 0
        self.tail = data[-4:]

    @property
    def statistics(self) -> Whole:
        """Itself."""
        return self

    @property
    def first_at(self) -> float | None:
        """As in :class:`StreamStatistics`."""
        return self.at if self.chunks else None

    @property
    def last_at(self) -> float:
        """As in :class:`StreamStatistics`."""
        return self.at

    @property
    def last_chunks(self) -> list[tuple[float, int]]:
        """As in :class:`StreamStatistics`."""
        return [(self.at, self.byte_count)] if self.chunks else []

    def leave(self) -> None:
        """The client is gone; nothing more would have come."""


class Sink(Protocol):
    """What the relay writes to; ``server.request.Request`` is one."""

    def write(self, data: bytes) -> None:
        """Take one chunk and put it on the wire."""

    def write_last(self, data: bytes) -> None:
        """Take the last chunk, and put it on the wire together with the end of the body."""

    def verbatim(self) -> Callable[[bytes], object] | None:
        """Return what takes chunks of the chunked coding as they are, or None while none may be."""

    def registerProducer(self, producer: Any, streaming: bool) -> None:
        """Pause ``producer`` whenever the wire is full; at once, if it is full already."""

    def unregisterProducer(self) -> None:
        """Do not pause the producer any more."""

    def when_sent(self, call: Callable[[], object]) -> None:
        """Call ``call`` as soon as the kernel has all that was written, perhaps at once."""


class _Nowhere:
    """A sink whose client is gone.

    Args:
        most: how many bytes it takes.
        full: called with the first byte behind them.
    """

    __slots__ = ("_full", "_left")

    def __init__(self, most: float, full: Callable[[], object]) -> None:
        self._left = most
        self._full = full

    def write(self, data: bytes) -> None:
        """Drop one chunk."""
        self._left -= len(data)
        if self._left < 0:
            self._full()

    write_last = write

    def verbatim(self) -> None:
        """Return None: every chunk is counted."""

    def registerProducer(self, producer: Any, streaming: bool) -> None:
        """Pause nobody."""

    def unregisterProducer(self) -> None:
        """Nobody is paused."""

    def when_sent(self, call: Callable[[], object]) -> None:
        """Drop the call: nothing is sent."""


class Source(Protocol):
    """What the relay reads from; ``upstream.response.Response`` is one."""

    def deliverBody(self, protocol: Any) -> None:
        """Push the body into ``protocol``."""

    def abort(self) -> None:
        """Close the connection at once; once the body has ended, this does nothing."""


class State:
    """Where a relay stands.

    No Enum: CPython 3.11 takes 0.1 µs longer to find a member, and ten are looked up for each body.
    """

    FLOWING: Final = "flowing"
    PAUSED: Final = "paused"
    ENDED: Final = "ended"


@implementer(IPushProducer)
class Relay(TwistedProtocol):
    """Forwards one body from ``source`` to ``sink``.

    Args:
        source: where the body comes from.
        sink: where it goes.
        reactor: runs the idle timer.
        clock: monotonic seconds.
        idle: seconds of silence after which the source is given up, or None.
        batch: where forwarded chunks wait to be read.
        gaps: called with the seconds between one chunk and the next.
        delays: called with the seconds from a chunk's arrival until the kernel has it; for one
            chunk of each batch.
        copy: called with each chunk, some time after it was written, or None.
        stays: called when the sink goes away; returns how many more bytes to read at most, for the
            copy alone: 0 for none, infinity for all.

    Attributes:
        statistics: how much came, when, and how it ends.
        done: fires with None when the body has ended as its framing says.  It fails with a
            ``ProxyError`` if the body broke, and with ``ClientGone`` if the sink went away.
            Cancelling it closes the source.
    """

    def __init__(
        self,
        source: Source,
        sink: Sink,
        reactor: Any,
        clock: Callable[[], float],
        *,
        idle: float | None,
        batch: Batch,
        gaps: Callable[[float], None],
        delays: Callable[[float], None],
        copy: Callable[[bytes], None] | None = None,
        stays: Callable[[], float] = lambda: 0,
    ) -> None:
        self._source = source
        self._sink = sink
        self._verbatim: Callable[[bytes], object] | None = None
        self._reactor = reactor
        self._clock = clock
        self._idle = idle
        self._delays = delays
        self._stays = stays
        self._timer: Any = None
        self._paused_at = 0.0
        self._paused_before = 0.0
        self.state: str = State.FLOWING
        self._forwarded: tuple[int, int] | None = None  # chunks and bytes, once the sink is gone
        self.statistics = StreamStatistics(batch, clock(), gaps, copy)
        self._batch = batch
        self.done: Deferred[None] = Deferred(self._cancelled)

    def start(self) -> Deferred[None]:
        """Begin to pump; return :attr:`done`."""
        done = self.done  # the body may end within this call
        self._sink.registerProducer(self, True)
        self._source.deliverBody(self)
        if self._idle is not None and self.state is not State.ENDED:
            self._wait(self._idle)
        if self.state is State.PAUSED and self.transport is not None:
            self.transport.pauseProducing()  # type: ignore[attr-defined]  # a push producer, too
        return done

    def _cancelled(self, _: object) -> None:
        self.cancel()

    @property
    def chunks(self) -> int:
        """How many chunks were forwarded, without those that the copy alone got."""
        return self.statistics.chunks if self._forwarded is None else self._forwarded[0]

    @property
    def byte_count(self) -> int:
        """How many bytes these chunks had."""
        return self.statistics.byte_count if self._forwarded is None else self._forwarded[1]

    @property
    def paused_s(self) -> float:
        """For how many seconds the client has paused the relay so far."""
        if self.state is State.PAUSED:
            return self._paused_before + self._clock() - self._paused_at
        return self._paused_before

    @property
    def is_paused(self) -> bool:
        """Whether the client pauses the relay now."""
        return self.state is State.PAUSED

    @property
    def is_over(self) -> bool:
        """Whether nothing more is forwarded."""
        return self.state is State.ENDED

    # -- from the provider ----------------------------------------------------------------------

    def dataReceived(self, data: bytes) -> None:
        """Forward one chunk, split at any point."""
        now = self._clock()
        self._sink.write(data)
        if self._batch.add(self.statistics, now, data) == _FOLLOWED:
            self._follow(now)

    def framedReceived(self, data: bytes, start: int) -> None:
        """Forward one chunk of the chunked coding, as it is if the sink takes it so.

        Args:
            start: where its content starts, which ends two bytes before the end.
        """
        # Names and no methods of self when they are called: 0.02 of 0.66 µs of an event.
        clock, verbatim = self._clock, self._verbatim
        if verbatim is None:
            self.dataReceived(data[start:-2])
            self._verbatim = self._sink.verbatim()
            return
        now = clock()
        verbatim(data)
        # What follows is Batch.add(): a call costs 0.02 of 0.66 µs of an event.
        batch = self._batch
        batch.append((self.statistics, now, data, start))
        if (count := len(batch)) >= MOST_CHUNKS or len(data) > LONGEST_CHUNK:
            batch.read()
        elif count == _FOLLOWED:
            self._follow(now)

    def lastReceived(self, data: bytes) -> None:
        """Forward the last chunk; that the body has ended is reported behind it, in this turn."""
        now = self._clock()
        self._sink.write_last(data)
        if self._batch.add(self.statistics, now, data) == _FOLLOWED:
            self._follow(now)

    def _follow(self, since: float) -> None:
        self._sink.when_sent(lambda: self._delays(self._clock() - since))

    def connectionLost(self, reason: Failure = connectionDone) -> None:
        """The body has ended: in full if ``reason`` is ``ResponseDone``, else it is broken."""
        self._end(None if isinstance(reason.value, ResponseDone) else reason)

    # -- from the client ------------------------------------------------------------------------

    def pauseProducing(self) -> None:
        """The client takes no more for now: stop reading from the provider."""
        if self.state is State.FLOWING:
            self.state = State.PAUSED
            self._paused_at = self._clock()
            if self.transport is not None:
                self.transport.pauseProducing()  # type: ignore[attr-defined]  # see start()

    def resumeProducing(self) -> None:
        """The client takes bytes again; its pause does not count as the provider's silence."""
        if self.state is State.PAUSED:
            now = self._clock()
            self._paused_before += now - self._paused_at
            self.statistics.excuse(self._paused_at, now)
            self.state = State.FLOWING
            if self._timer is None and self._idle is not None:
                self._wait(self._idle - (now - self.statistics.last_at))
            if self.transport is not None:
                self.transport.resumeProducing()  # type: ignore[attr-defined]  # see start()

    def stopProducing(self) -> None:
        """The client is gone: stop, or keep reading for the copy alone as ``stays`` says."""
        if most := self._stays():
            self._forwarded = self.chunks, self.byte_count
            self._verbatim = None
            self._sink.unregisterProducer()
            self._sink = _Nowhere(most, self.leave)
            self.resumeProducing()
        else:
            self.leave()

    def leave(self) -> None:
        """The client is gone: close the provider's connection; :attr:`done` fails a turn later.

        So, if many clients leave at once, every provider hears of it before the first record is
        written.
        """
        if self.state is not State.ENDED:
            done = self._finish()
            self._source.abort()
            self._reactor.callLater(0, lambda: self._report_left(done))

    def cancel(self) -> None:
        """Stop, and close the provider's connection; this does not fire :attr:`done`."""
        if self.state is not State.ENDED:
            self._finish()
            self._source.abort()

    # -- the end --------------------------------------------------------------------------------

    def _wait(self, seconds: float) -> None:
        self._timer = self._reactor.callLater(max(0.0, seconds), self._check_idle)

    def _check_idle(self) -> None:
        """Give up if no chunk has come for ``idle`` seconds; else wait for the rest of them."""
        self._timer = None
        if self.state is State.FLOWING and self._idle is not None:
            left = self._idle - (self._clock() - self.statistics.last_at)
            if left <= 0:
                self._end(Failure(upstream_idle()))
            else:
                self._wait(left)

    def _end(self, failure: Failure | None) -> None:
        if self.state is State.ENDED:
            return
        done = self._finish()
        if failure is None:
            done.callback(None)
        else:
            self._source.abort()
            done.errback(failure)

    def _report_left(self, done: Deferred[None]) -> None:
        if not done.called:
            done.errback(Failure(ClientGone()))

    def _finish(self) -> Deferred[None]:
        """End; return :attr:`done`, which this relay forgets because it refers back to it."""
        self._paused_before = self.paused_s
        self.state = State.ENDED
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        self._verbatim = None
        self._sink.unregisterProducer()
        done, self.done = self.done, _OVER
        return done
