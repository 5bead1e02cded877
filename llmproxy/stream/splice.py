"""The two-way pump of a tunnel: bytes between a client's socket and a host's, verbatim.

A :class:`Splice` is what ``Request.hand_over`` is given; a pump is in one of these states::

    FLOWING ---one side ends---> HALF ---the other ends---> CLOSING ---all is delivered---> over
       |                           |                           |
       +---------------------------+-------- a reset, a deadline, end() ------------------> over

Each direction is a push producer of the other's transport: a side that takes nothing pauses the
side that sends.  So a pump holds one read and what a transport queues, in each direction.  A FIN of
one side becomes a FIN to the other behind all that came before it, and the other direction goes on.
A reset of one side resets the other.

Silence is looked for in one sweep over all pumps (:class:`Splices`), as is a side that has reset
its connection while it is not read from: thousands of quiet tunnels cost one timer.  What the bytes
mean, and how the host was reached, is not known here.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Protocol
from weakref import ref

from twisted.internet.defer import Deferred
from twisted.internet.error import ConnectionDone
from twisted.internet.interfaces import IHalfCloseableProtocol, IPushProducer
from twisted.internet.protocol import Protocol as TwistedProtocol
from twisted.internet.protocol import connectionDone
from twisted.internet.task import LoopingCall
from twisted.logger import Logger
from twisted.python.failure import Failure
from zope.interface import implementer

from llmproxy.errors import ClientGone, EndReason
from llmproxy.net.transport import has_failed

_WATCH = 0.1
"""Seconds between looks at sides that are not read from."""

_LONGEST_SWEEP, _SHORTEST_SWEEP = 1.0, 0.02

_log = Logger()


class FarSide(Protocol):
    """A connection to a host that nobody reads from yet; ``upstream.way_out.OpenWay`` is one."""

    def begin(self, protocol: Any) -> None:
        """Connect ``protocol`` to the transport, and deliver what has come so far."""


class Splices:
    """All pumps of a process.

    Args:
        reactor: keeps time.
        clock: monotonic seconds.
    """

    def __init__(self, reactor: Any, clock: Callable[[], float]) -> None:
        self.clock = clock
        self._open: set[Splice] = set()
        self._paused: set[Splice] = set()
        self._sweep, self._watch = LoopingCall(self._check_all), LoopingCall(self._check_paused)
        self._sweep.clock = self._watch.clock = reactor

    def __len__(self) -> int:
        return len(self._open)

    def add(self, splice: Splice, shortest: float) -> None:
        """Look after a pump whose shortest deadline is so many seconds long."""
        self._open.add(splice)
        interval = min(max(shortest / 4, _SHORTEST_SWEEP), _LONGEST_SWEEP)
        if self._sweep.running and (self._sweep.interval or 0.0) > interval:
            self._sweep.stop()
        if not self._sweep.running:
            self._sweep.start(interval, now=False)

    def discard(self, splice: Splice) -> None:
        """A pump is over."""
        self._open.discard(splice)
        self.set_paused(splice, paused=False)
        if not self._open and self._sweep.running:
            self._sweep.stop()

    def set_paused(self, splice: Splice, *, paused: bool) -> None:
        """Begin or cease to look whether a side that is not read from has reset its connection."""
        if paused:
            self._paused.add(splice)
            if not self._watch.running:
                self._watch.start(_WATCH, now=False)
        else:
            self._paused.discard(splice)
            if not self._paused and self._watch.running:
                self._watch.stop()

    def _check_all(self) -> None:
        now = self.clock()
        for splice in list(self._open):
            self._call(splice.check, now)

    def _check_paused(self) -> None:
        for splice in list(self._paused):
            self._call(splice.check_paused)

    def _call(self, check: Callable[..., None], *args: float) -> None:
        try:
            check(*args)
        except Exception:
            _log.failure("a tunnel could not be checked")


@implementer(IHalfCloseableProtocol)
class Splice(TwistedProtocol):
    """One pump: give it to ``Request.hand_over``, and await :attr:`done`.

    For example, behind a CONNECT::

        way = await way_out.open(host, port)                # upstream/way_out.py
        splice = Splice(way, splices, idle=config.tunnel.idle, total=config.tunnel.total)
        try:
            request.hand_over(200, [], splice)
        except (ClientGone, ProxyError):
            way.abort()                                     # the pump has not begun
            raise
        end = await splice.done                             # an EndReason; never fails
        ... splice.sent, splice.received, splice.detail ...

    What the client sent together with its CONNECT reaches the host first.  Nothing else is needed:
    the pump ends with the client's connection, whoever ends that, and takes the host's along.

    Args:
        far: the connection to the host.
        splices: looks after the deadlines.
        idle: seconds of silence in both directions after which both sides are reset, or None.  It
            stands still for nobody: a side that takes nothing is silent, too.
        total: seconds after which they are reset in any case, or None.

    Attributes:
        done: fires once with the end reason, when the client's connection is gone; it never fails.
            Cancelling it resets both sides.
            ``complete``: both sides ended in order, and all was delivered.  ``client_gone``: the
            client reset its connection, or closed it where half of it cannot be closed (Twisted's
            own TLS).  ``client_stalled``: it did not take the last bytes.  ``upstream_broken``: the
            host reset.  ``upstream_idle``, ``upstream_timeout``: ``idle`` and ``total``.
            ``drained``: ``Site.cut`` ended it.  Else what :meth:`end` was told.
        sent: bytes from the client to the host so far.
        received: bytes from the host to the client so far.
        detail: for the log: how a connection was lost; empty where nothing is to be said.
    """

    transport: Any

    def __init__(
        self, far: FarSide, splices: Splices, *, idle: float | None, total: float | None
    ) -> None:
        self._far = far
        self._splices = splices
        self._clock = splices.clock
        self._idle = math.inf if idle is None else idle
        self._total = math.inf if total is None else total
        self._host: Any = None  # the transport
        self._last_at = 0.0
        self._until = math.inf
        self._client_ended = self._host_ended = False  # a FIN has come
        self._is_closing = False  # both have, and the host's side is being closed
        self._host_is_gone = self._client_is_gone = False
        self._from_client = _Valve(self)
        self._from_host = _Valve(self)
        self._reason: EndReason | None = None
        self.detail = ""
        self.sent = self.received = 0
        ours = ref(self)  # which would keep each other
        self.done: Deferred[EndReason] = Deferred(lambda _: _end(ours()))

    def end(self, reason: EndReason) -> None:
        """Reset both sides at once, for a reason of ours such as ``killed``."""
        if self._reason is None:
            self._reason = reason
        if not self._host_is_gone and self._host is not None:
            self._host.abortConnection()
        if not self._client_is_gone and self.transport is not None:
            self.transport.abortConnection()

    # -- from the client ------------------------------------------------------------------------

    def connectionMade(self) -> None:
        """The client's socket is ours: begin."""
        now = self._last_at = self._clock()
        self._until = now + self._total
        self._splices.add(self, min(self._idle, self._total))
        self._far.begin(_HostSide(self))

    def dataReceived(self, data: bytes) -> None:
        """Forward bytes to the host."""
        self._last_at = self._clock()
        self.sent += len(data)
        self._host.write(data)

    def readConnectionLost(self) -> None:
        """The client has ended its side: end ours towards the host, behind all that came."""
        self._last_at = self._clock()
        self._client_ended = True
        self._from_client.close()
        self._host.unregisterProducer()  # a paused one would keep the end back
        self._host.loseWriteConnection()
        self._close_if_both_ended()

    def writeConnectionLost(self) -> None:
        """The host's end has reached the client."""

    def connectionLost(self, reason: Failure = connectionDone) -> None:
        """The client's connection is gone, and with it the tunnel."""
        self._client_is_gone = True
        error = reason.value
        in_order = isinstance(error, ConnectionDone)
        if self._reason is None:
            if isinstance(error, ClientGone):  # we have dropped it
                self._reason = error.end
            elif in_order and self._is_closing and self._host_is_gone:
                self._reason = EndReason.COMPLETE
            else:
                self._reason = EndReason.CLIENT_GONE
                self.detail = reason.getErrorMessage()
        self._from_client.close()
        if self._host_is_gone:
            self._splices.discard(self)
        elif in_order:
            self._host.unregisterProducer()
            self._host.loseConnection()  # behind what the client sent
        else:
            self._host.abortConnection()
        if not self.done.called:
            self.done.callback(self._reason)

    # -- from the host --------------------------------------------------------------------------

    def host_made(self, transport: Any) -> None:
        """The host's connection is ours: each side is paused by the other from now on."""
        self._host = transport
        self._from_client.open(self.transport)
        self._from_host.open(transport)
        transport.registerProducer(self._from_client, True)
        self.transport.registerProducer(self._from_host, True)

    def host_sent(self, data: bytes) -> None:
        """Forward bytes to the client."""
        self._last_at = self._clock()
        self.received += len(data)
        if not self._client_is_gone:
            self.transport.write(data)

    def host_ended(self) -> None:
        """The host has ended its side: end ours towards the client."""
        self._last_at = self._clock()
        self._host_ended = True
        self._from_host.close()
        if not self._client_is_gone:
            self.transport.unregisterProducer()
            self.transport.loseWriteConnection()
        self._close_if_both_ended()

    def host_lost(self, reason: Failure) -> None:
        """The host's connection is gone: in order if we have closed it, else it broke."""
        self._host_is_gone = True
        self._from_host.close()
        if self._client_is_gone:
            self._splices.discard(self)
        elif self._is_closing and isinstance(reason.value, ConnectionDone):
            self.transport.loseConnection()
        else:
            if self._reason is None:
                self._reason = EndReason.UPSTREAM_BROKEN
                self.detail = reason.getErrorMessage()
            self.transport.abortConnection()

    def _close_if_both_ended(self) -> None:
        """Close the host's side when all is delivered there, and then the client's."""
        if self._client_ended and self._host_ended and not self._is_closing:
            self._is_closing = True
            self._host.loseConnection()

    # -- deadlines ------------------------------------------------------------------------------

    def check(self, now: float) -> None:
        """Act on a deadline that has passed."""
        if now >= self._until:
            self.end(EndReason.UPSTREAM_TIMEOUT)
        elif now - self._last_at >= self._idle:
            self.end(EndReason.UPSTREAM_IDLE)

    def valve_turned(self) -> None:
        """A side is not read from any more, or is again."""
        paused = self._from_client.is_paused or self._from_host.is_paused
        self._splices.set_paused(self, paused=paused)

    def check_paused(self) -> None:
        """End the pump if a side that is not read from has reset its connection."""
        if self._from_client.is_paused and has_failed(self.transport):
            self.detail = "the client reset the connection"
            self.end(EndReason.CLIENT_GONE)
        elif self._from_host.is_paused and has_failed(self._host):
            self.detail = "the host reset the connection"
            self.end(EndReason.UPSTREAM_BROKEN)


def _end(splice: Splice | None) -> None:
    if splice is not None:
        splice.end(EndReason.KILLED)


@implementer(IHalfCloseableProtocol)
class _HostSide(TwistedProtocol):
    """The host's connection, which tells the pump what happens on it."""

    def __init__(self, splice: Splice) -> None:
        self._splice = splice
        self.dataReceived = splice.host_sent  # type: ignore[method-assign]  # a call less for a chunk

    def connectionMade(self) -> None:
        """The connection is ours."""
        self._splice.host_made(self.transport)

    def readConnectionLost(self) -> None:
        """The host sends no more."""
        self._splice.host_ended()

    def writeConnectionLost(self) -> None:
        """The client's end has reached the host."""

    def connectionLost(self, reason: Failure = connectionDone) -> None:
        """The connection is gone."""
        self._splice.host_lost(reason)


@implementer(IPushProducer)
class _Valve:
    """One direction: reads from a side as long as the other side takes what comes.

    Attributes:
        is_paused: nothing is read.
    """

    __slots__ = ("_source", "_splice", "is_paused")

    def __init__(self, splice: Splice) -> None:
        self._splice: Splice | None = splice
        self._source: Any = None
        self.is_paused = False

    def open(self, source: Any) -> None:
        """Read from ``source``, which is read from already."""
        self._source = source

    def close(self) -> None:
        """The source sends no more: it must not be read from again, which would end it twice."""
        if self.is_paused:
            self._turn(paused=False)
        self._source = self._splice = None

    def pauseProducing(self) -> None:
        """The other side takes no more for now."""
        if self._source is not None and not self.is_paused:
            self._source.pauseProducing()
            self._turn(paused=True)

    def resumeProducing(self) -> None:
        """The other side takes bytes again."""
        if self._source is not None and self.is_paused:
            self._turn(paused=False)
            self._source.resumeProducing()

    def stopProducing(self) -> None:
        """The other side is gone, which its own protocol reports."""

    def _turn(self, *, paused: bool) -> None:
        self.is_paused = paused
        if self._splice is not None:
            self._splice.valve_turned()
