"""The pump for one response body: every chunk that comes in goes out, at once.

The relay stands between a provider's connection, which pushes, and a client's request, which pushes
back.  It knows no provider, trace or metric; what is noted of a chunk that was forwarded is its
trail's affair (``trail.py``).  Its life is three states::

    FLOWING <--pauseProducing / resumeProducing--> PAUSED
       |                                             |
       +------------ end of the body, a fault, cancel() ----------> ENDED

The idle clock runs only while the relay flows: a client that is slow must not look like a provider
that is silent.  It is one timer that looks at the last chunk's time when it rings; neither chunks
nor pauses touch it.
"""

from __future__ import annotations

from collections.abc import Callable
from enum import Enum
from typing import Any, Protocol

from twisted.internet.defer import Deferred, succeed
from twisted.internet.interfaces import IPushProducer
from twisted.internet.protocol import Protocol as TwistedProtocol
from twisted.internet.protocol import connectionDone
from twisted.python.failure import Failure
from twisted.web.client import ResponseDone
from zope.interface import implementer

from llmproxy.errors import ClientGone, upstream_idle
from llmproxy.stream.batch import SHORT, TOGETHER, Batch
from llmproxy.stream.statistics import StreamStatistics

_FOLLOWED = 2
"""The chunk of a backlog that is followed until the kernel has it."""


_OVER: Deferred[None] = succeed(None)
"""What stands for :attr:`Relay.done` once that has fired."""


class Sink(Protocol):
    """What the relay writes to; ``server.site.Request`` is one."""

    def write(self, data: bytes) -> None:
        """Take one chunk and put it on the wire."""

    def verbatim(self) -> Callable[[bytes], object] | None:
        """Return what takes chunks of the chunked coding as they are, or None while none may."""

    def registerProducer(self, producer: Any, streaming: bool) -> None:
        """Name whom to pause; it is paused at once where the wire is full already."""

    def unregisterProducer(self) -> None:
        """Pause nobody any more."""

    def when_sent(self, call: Callable[[], object]) -> None:
        """Call ``call`` once the kernel has all that was written, at once where it has."""


class Source(Protocol):
    """What the relay reads from; ``upstream.http1.Response`` is one."""

    def deliverBody(self, protocol: Any) -> None:
        """Push the body into ``protocol``."""

    def abort(self) -> None:
        """Close the connection at once; harmless when the body has ended."""


class State(Enum):
    """Where a relay stands."""

    FLOWING = "flowing"
    PAUSED = "paused"
    ENDED = "ended"


_FLOWING, _PAUSED, _ENDED = State  # found faster than members (ADR-0011)


@implementer(IPushProducer)
class Relay(TwistedProtocol):
    """Hands a body from ``source`` to ``sink``.

    Args:
        source: where the body comes from.
        sink: where it goes.
        reactor: schedules the idle clock.
        clock: monotonic seconds.
        idle: seconds of silence after which the source is given up, or None.
        batch: where what was forwarded waits to be looked at.
        gaps: called with the seconds between one chunk and the next.
        delays: called with the seconds from a chunk's coming in until the kernel has it; of one
            chunk in each filling of the backlog.
        copy: called with each chunk some time after it was written, or None.
        stays: asked when the sink goes away whether the body is read on, for the copy alone.

    Attributes:
        statistics: how much came, when, and how it ends.
        done: fires with None when the body ended as its framing says; fails with a ``ProxyError``
            where it broke, with ``ClientGone`` where the sink went away.  Cancelling it closes the
            source.
    """

    __slots__ = (
        *("_batch", "_clock", "_delays", "_handed_on", "_idle", "_paused_at"),
        *("_paused_before", "_reactor", "_sink", "_source", "_stays", "_timer", "_verbatim"),
        *("done", "state", "statistics"),
    )

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
        stays: Callable[[], bool] = lambda: False,
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
        self.state = _FLOWING
        self._handed_on: tuple[int, int] | None = None  # what was, when the sink went away
        self.statistics = StreamStatistics(batch, clock(), gaps, copy)
        self._batch = batch
        self.done: Deferred[None] = Deferred(lambda _: self.cancel())

    def start(self) -> Deferred[None]:
        """Begin to pump; returns :attr:`done`."""
        done = self.done  # the body may be over within this call
        self._sink.registerProducer(self, True)
        self._source.deliverBody(self)
        if self._idle is not None and self.state is not _ENDED:
            self._wait(self._idle)
        if self.state is _PAUSED and self.transport is not None:
            self.transport.pauseProducing()  # type: ignore[attr-defined]  # a push producer, too
        return done

    @property
    def chunks(self) -> int:
        """How many chunks were forwarded; what the copy alone got is not among them."""
        return self.statistics.chunks if self._handed_on is None else self._handed_on[0]

    @property
    def byte_count(self) -> int:
        """How many bytes that was."""
        return self.statistics.byte_count if self._handed_on is None else self._handed_on[1]

    @property
    def paused_s(self) -> float:
        """Seconds for which the client held the relay up, so far."""
        if self.state is _PAUSED:
            return self._paused_before + self._clock() - self._paused_at
        return self._paused_before

    @property
    def is_paused(self) -> bool:
        """Whether the client holds the relay up now."""
        return self.state is _PAUSED

    # -- from the provider ----------------------------------------------------------------------

    def dataReceived(self, data: bytes) -> None:
        """Forward one chunk, split at any point."""
        now = self._clock()
        self._sink.write(data)
        if self._batch.add(self.statistics, now, data) == _FOLLOWED:
            self._follow(now)

    def framedReceived(self, data: bytes, start: int) -> None:
        """Forward one chunk of the chunked coding, as it is where the sink takes it so.

        Args:
            start: where its content starts, which ends two bytes before the end.
        """
        clock, verbatim = self._clock, self._verbatim  # as in trail.py
        if verbatim is None:
            self.dataReceived(data[start:-2])
            self._verbatim = self._sink.verbatim()
            return
        now = clock()
        verbatim(data)
        batch = self._batch
        batch.append((self.statistics, now, data, start))  # and on as in Backlog.add()
        if (count := len(batch)) >= TOGETHER or len(data) > SHORT:
            batch.read()
        elif count == _FOLLOWED:
            self._follow(now)

    def _follow(self, since: float) -> None:
        self._sink.when_sent(lambda: self._delays(self._clock() - since))

    def connectionLost(self, reason: Failure = connectionDone) -> None:
        """The body is over: whole where ``reason`` is ``ResponseDone``, else broken."""
        self._end(None if isinstance(reason.value, ResponseDone) else reason)

    # -- from the client ------------------------------------------------------------------------

    def pauseProducing(self) -> None:
        """The client takes no more for now: stop reading from the provider."""
        if self.state is _FLOWING:
            self.state = _PAUSED
            self._paused_at = self._clock()
            if self.transport is not None:
                self.transport.pauseProducing()  # type: ignore[attr-defined]  # see start()

    def resumeProducing(self) -> None:
        """The client takes bytes again; what it did not wait for does not count as silence."""
        if self.state is _PAUSED:
            now = self._clock()
            self._paused_before += now - self._paused_at
            self.statistics.excuse(self._paused_at, now)
            self.state = _FLOWING
            if self._timer is None and self._idle is not None:
                self._wait(self._idle - (now - self.statistics.last_at))
            if self.transport is not None:
                self.transport.resumeProducing()  # type: ignore[attr-defined]  # see start()

    def stopProducing(self) -> None:
        """The client is gone: what is read on from here reaches the copy alone."""
        if self._stays():
            self._handed_on = self.chunks, self.byte_count
            self._verbatim = None
            self.resumeProducing()
        else:
            self.leave()

    def leave(self) -> None:
        """The client is gone: close the provider's connection; :attr:`done` fails a turn later.

        Where many leave at once, every provider hears of it before the first is written down.
        """
        if self.state is not _ENDED:
            done = self._finish()
            self._source.abort()
            self._reactor.callLater(0, lambda: self._tell_left(done))

    def cancel(self) -> None:
        """Stop, and close the provider's connection; :attr:`done` does not fire by this."""
        if self.state is not _ENDED:
            self._finish()
            self._source.abort()

    # -- the end --------------------------------------------------------------------------------

    def _wait(self, seconds: float) -> None:
        self._timer = self._reactor.callLater(max(0.0, seconds), self._check_idle)

    def _check_idle(self) -> None:
        """Give up where the silence since the last chunk has lasted for ``idle``; else go on."""
        self._timer = None
        if self.state is _FLOWING and self._idle is not None:
            left = self._idle - (self._clock() - self.statistics.last_at)
            if left <= 0:
                self._end(Failure(upstream_idle()))
            else:
                self._wait(left)

    def _end(self, failure: Failure | None) -> None:
        if self.state is _ENDED:
            return
        done = self._finish()
        if failure is None:
            done.callback(None)
        else:
            self._source.abort()
            done.errback(failure)

    def _tell_left(self, done: Deferred[None]) -> None:
        if not done.called:
            done.errback(Failure(ClientGone()))

    def _finish(self) -> Deferred[None]:
        """End; return :attr:`done`, which is let go of since it would keep this relay."""
        self._paused_before = self.paused_s
        self.state = _ENDED
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        self._verbatim = None
        self._sink.unregisterProducer()
        done, self.done = self.done, _OVER
        return done
