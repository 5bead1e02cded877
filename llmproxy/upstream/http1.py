"""One HTTP/1.1 connection to a provider: a request out, a response in, strictly.

A :class:`Connection` turns bytes into a :class:`Response` and its body.  Pools, providers and
clients are not known here.  Twisted's own client is not used: it lets the end of one response cross
into the next, accepts faulty framing and gives no hold on the transport (ADR-0002).

A connection is in one of five states::

    IDLE --send()--> ASKED --head--> RESPONDED --deliver()--> FLOWING --end--> IDLE or CLOSED
                       |                 |                       |
                       +---- abort(), a fault, the peer's end ---+--> CLOSED

A connection is never used again if it received anything that was not asked for, or if its response
did not end exactly.  All content of one read is forwarded as one piece, and a transport that was
paused stays paused.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

from twisted.internet.defer import Deferred, succeed
from twisted.internet.error import ConnectionDone
from twisted.internet.interfaces import IHandshakeListener, IProtocol, ITCPTransport
from twisted.internet.protocol import Protocol, connectionDone
from twisted.python.failure import Failure
from twisted.web.client import ResponseDone
from twisted.web.iweb import IBodyProducer
from zope.interface import implementer

from llmproxy.errors import upstream_broken, upstream_protocol, upstream_timeout
from llmproxy.http1.framing import LengthReader, response_body
from llmproxy.http1.grammar import BadMessage
from llmproxy.net.transport import notice_vanished_peer, pending_bytes
from llmproxy.upstream.request_body import HeldBody, Phase, Sending, Sent
from llmproxy.upstream.response import Response, read_response
from llmproxy.upstream.tls import Verdict

MAX_INTERIM = 16
"""Most 1xx responses before a final one; curl has no limit, Go's client takes 5."""

_DONE = Failure(ResponseDone())
_SETTLED: Deferred[Any] = succeed(None)
"""Stands for :attr:`Connection.ready` once nobody waits for it."""


class State:
    """Where a connection stands.

    No Enum: CPython 3.11 takes 0.1 µs longer to find a member, 2 µs of a request
    (docs/performance.rst).
    """

    IDLE: Final = "idle"
    ASKED: Final = "asked"
    RESPONDED: Final = "responded"
    FLOWING: Final = "flowing"
    CLOSED: Final = "closed"


@implementer(IHandshakeListener)
class Connection(Protocol):
    """One connection to a provider, for one request at a time.

    Args:
        max_head: most bytes of a response's head.
        became_idle: called with this connection when another request may be sent on it.
        closed: called once with this connection when it is gone.
        secure: whether a TLS handshake comes before the first request.
        tunnelled: a parent proxy is on the way, which turns a provider's reset into a FIN.
    """

    __slots__ = (  # more attributes than the dictionaries of instances share (docs/performance.rst)
        *("_response", "_became_idle", "_buffer", "_closed", "_consumer", "_early", "_interim"),
        *("_knows_fin", "_lost_early", "_max_head", "_method", "_paused", "_reader", "_secure"),
        *("_transport", "_until_close", "aborted", "expires_at", "keep_for", "persistent"),
        *("pool_key", "ready", "sending", "serving", "state", "upgrades", "verdict", "_framed"),
        *("_bell", "_phase", "_seconds", "_timers"),
    )

    def __init__(
        self,
        *,
        max_head: int,
        became_idle: Callable[[Connection], None],
        closed: Callable[[Connection], None],
        secure: bool,
        tunnelled: bool = False,
    ) -> None:
        self.state: str = State.IDLE
        self.ready: Deferred[Connection] = Deferred(lambda _: self.abort())
        """Fires once requests may be sent, the name verified; cancelling it closes the socket."""
        self.sending: Sending | Sent | None = None  # the request's body on its way, or the last's
        self.keep_for: float | None = None
        """Seconds for which the provider says that it keeps the connection when it is idle."""
        self.expires_at, self.pool_key = 0.0, b""
        """The pool's own marks: when it gives it up, and what it keeps it apart by."""
        self.verdict: Verdict | None = None
        """What the TLS handshake found out; ``tls.ProviderTls`` says it."""
        self.serving: Response | None = None
        """The response that comes in on it now."""
        self.persistent = True
        """Whether another request may be sent when that response has ended."""
        self.upgrades = False
        """Whether a request on it asks for another protocol: then a 101 is a response, whose body
        is that protocol's and ends with the connection."""
        self._became_idle, self._closed = became_idle, closed
        self._max_head, self._secure = max_head, secure
        self._knows_fin = secure or not tunnelled  # behind TLS it comes with close_notify
        self._framed: Any = None  # takes a chunk in its coding, while it may
        self._lost_early: Failure | None = None
        self._bell: Any = None  # rings when the head of a response is late
        self.aborted = False
        """Whether we close it, so that it is of no use to anybody."""

    # -- the life of the socket -----------------------------------------------------------------

    def connectionMade(self) -> None:
        """Set TCP_NODELAY; a plain connection is ready at once."""
        self._transport: Any = self.transport
        self.verdict = self.verdict or getattr(self._transport, "verdict", None)
        if ITCPTransport.providedBy(self._transport):
            self._transport.setTcpNoDelay(True)
            notice_vanished_peer(self._transport)
        if not self._secure:
            self._settle_ready(self)

    def handshakeCompleted(self) -> None:
        """Twisted's TLS layer has verified the provider's name and agreed on keys."""
        self._settle_ready(self)

    def connectionLost(self, reason: Failure = connectionDone) -> None:
        """End whatever was under way; a FIN may be the end of a body that has no other."""
        state, self.state = self.state, State.CLOSED
        self._settle_ready(reason)
        if state is State.ASKED:
            # What the kernel did not get, no provider has: it has no whole request to work on.
            whole = not (self._is_sending or pending_bytes(self._transport))
            self._stop_sending()
            self._tell(upstream_broken(reason.getErrorMessage(), may_have_run=whole))
        elif state is State.FLOWING and self._consumer is not None:
            self._end_body(self._how_it_ended(reason))
        elif state is State.RESPONDED:
            self._lost_early = reason
        self._closed(self)

    def abort(self) -> None:
        """Close the socket at once, dropping what was not sent; harmless when closed already."""
        if not self.aborted and self.state is not State.CLOSED:
            self.aborted, self._framed = True, None
            self._transport.abortConnection()

    def forget_beginning(self) -> None:
        """Let go of what has made the connection, now that it is ready: it may last for long."""
        self.ready, self.factory = _SETTLED, None

    def _settle_ready(self, result: Any) -> None:
        if not self.ready.called:
            (self.ready.errback if isinstance(result, Failure) else self.ready.callback)(result)

    # -- the request ----------------------------------------------------------------------------

    def send(self, method: bytes, head: bytes, body: IBodyProducer | None) -> Deferred[Response]:
        """Send one request and return its response.

        Args:
            method: decides whether the response has a body.
            head: the whole request head as it goes on the wire, empty line included.
            body: written after the head as it produces, or nothing.

        Returns:
            fires with the :class:`Response` when its whole head is in.  Cancelling it closes the
            socket at once.  It fails with ``ProxyError``.
        """
        self.state, self._method, self.sending = State.ASKED, method, None
        self._buffer, self._interim = b"", 0
        self._until_close = self._paused = False
        response: Deferred[Response] = Deferred(self._give_up)
        self._response: Deferred[Response] | None = response
        if body is None:
            self._transport.write(head)
        elif isinstance(body, HeldBody) and body.is_short:
            self.sending = Sent(self._transport, head, body)
        else:
            self.sending = Sending(self._transport, head, body, self._sending_failed)
        return response

    def _give_up(self, _: Deferred[Response]) -> None:
        """Nobody waits for the response any more."""
        self._stop_bell()
        self.abort()

    def await_head(self, timers: Any, seconds: float | None) -> None:
        """Let the head of the response take so many seconds at most, behind :meth:`send`.

        They begin anew as long as the provider takes some of the request, or waits for more.  When
        they are over, the connection is closed, and the response fails with ``ProxyError``.

        Args:
            timers: keeps the time.
            seconds: None lets it wait for ever.
        """
        if seconds is not None and self._response is not None:
            self._timers, self._seconds = timers, seconds
            self._phase: Phase | None = None
            self._bell = timers.callLater(seconds, self._ring)

    def _ring(self) -> None:
        """Give up, or begin anew."""
        self._bell = None
        phase = self._phase = self._phase or Phase(self.sending)
        late = phase()
        if late is None:
            self._bell = self._timers.callLater(self._seconds, self._ring)
            return
        self.abort()
        self._stop_sending()
        self._tell(upstream_timeout(late, may_have_run=True))

    def _stop_bell(self) -> None:
        bell, self._bell = self._bell, None
        if bell is not None:
            bell.cancel()

    def _sending_failed(self, failure: Failure) -> None:
        """The body will not be whole, so neither can the request be: give the connection up."""
        self.abort()
        if self.state is State.ASKED:
            self._tell(failure.value)
        elif self.state is State.FLOWING:
            self._end_body(failure)

    @property
    def _is_sending(self) -> bool:
        return self.sending is not None and self.sending.active

    def _stop_sending(self) -> None:
        if self.sending is not None:
            self.sending.stop()

    # -- the response -----------------------------------------------------------------------------

    def dataReceived(self, data: bytes) -> None:
        """Take bytes, split at any point."""
        framed = self._framed
        if framed is not None and (start := self._reader.framed(data)):
            framed(data, start)
        elif self.aborted:
            return
        elif self.state is State.FLOWING:
            self._read_body(data)
        elif self.state is State.ASKED:
            self._read_head(data)
        elif self.state is State.RESPONDED:
            self._early += data
        else:
            self.abort()  # nobody asked for anything

    def _read_head(self, data: bytes) -> None:
        start = max(0, len(self._buffer) - 3)
        self._buffer += data
        try:
            while (end := self._buffer.find(b"\r\n\r\n", start)) >= 0:
                if end > self._max_head:
                    break
                head, self._buffer, start = self._buffer[:end], self._buffer[end + 4 :], 0
                if self._take_head(head):
                    return
            if len(self._buffer) > self._max_head + 3:
                raise BadMessage(f"a response head longer than {self._max_head} bytes")
        except BadMessage as error:
            self.abort()
            self._stop_sending()
            self._tell(upstream_protocol(str(error)))

    def _take_head(self, head: bytes) -> bool:
        """Read one head; return whether it was the final one (RFC 9112, section 6.3)."""
        response = read_response(self, head)
        reader, length = response_body(
            self._method, response.code, response.version[2], response.fields, response.first
        )
        if length is not None:
            response.length = length
        if response.code < 200:
            if response.code == 101 and self.upgrades:
                reader = LengthReader(None)
            else:
                self._skip_interim(response.code)
                return False
        self._reader = reader
        self._until_close = isinstance(reader, LengthReader) and reader.left is None
        self.persistent = response.is_persistent and not self._until_close
        self.keep_for = response.keep_alive_hint
        self._early, self._buffer, self._lost_early = self._buffer, b"", None
        self._begun = b""
        self.state = State.RESPONDED
        self.serving = response
        self._tell(response)
        if self.state is State.RESPONDED:
            self._paused = True
            self._transport.pauseProducing()
        return True

    def _skip_interim(self, code: int) -> None:
        self._interim += 1
        if code == 101 or self._interim > MAX_INTERIM:
            raise BadMessage("a protocol switch that nobody asked for, or endless 1xx responses")

    def _tell(self, result: Any) -> None:
        if self._bell is not None:
            self._stop_bell()
        deferred, self._response = self._response, None
        if deferred is not None and not deferred.called:
            (deferred.callback if isinstance(result, Response) else deferred.errback)(result)

    # -- its body -------------------------------------------------------------------------------

    def deliver(self, protocol: IProtocol) -> None:
        """Hand the body to ``protocol``; see :meth:`Response.deliverBody`."""
        lost = self.state is State.CLOSED
        self._consumer: IProtocol | None = protocol
        protocol.makeConnection(self._transport)
        if not lost:
            self.state = State.FLOWING
            self._framed = None if self.aborted else getattr(protocol, "framedReceived", None)
            if self._paused:
                self._paused = False
                self._transport.resumeProducing()
        early, self._early = self._early, b""
        if begun := self._begun:
            self._begun = b""
            protocol.dataReceived(begun)
        if early or self._reader.done or self._reader.error is not None:
            self._read_body(early)
        if lost:
            self._end_body(self._how_it_ended(self._lost_early or Failure(ConnectionDone())))

    def take_whole(self) -> bytes | None:
        """Take the body, if all of it came with the head; see :meth:`Response.take_whole`."""
        reader, early = self._reader, self._early
        if self.state is not State.RESPONDED or self._paused or self.aborted:
            return None
        if not (reader.done or reader.may_end_with(early)):
            return None
        content, self._early = reader.feed(early), b""
        if reader.done:
            self.state, self._consumer = State.FLOWING, None
            self._settle(reader.extra)
            return content
        self._begun = content
        return None

    def _read_body(self, data: bytes) -> None:
        reader, consumer = self._reader, self._consumer
        content = reader.feed(data)
        if content and consumer is not None:
            if reader.done and reader.error is None:
                getattr(consumer, "lastReceived", consumer.dataReceived)(content)
            else:
                consumer.dataReceived(content)
        if reader.error is not None:
            self.abort()
            self._end_body(Failure(upstream_protocol(str(reader.error))))
            return
        if reader.done and self._consumer is not None:
            self._settle(reader.extra)
            self._end_body(_DONE)

    def _settle(self, extra: bytes) -> None:
        """The response is whole: keep the connection for another, or close it."""
        if self.state is State.CLOSED:
            return
        unsent = self._is_sending or pending_bytes(self._transport) > 0
        if extra or unsent or not self.persistent or self.aborted:
            self._stop_sending()
            self.abort()
            return
        self.state = State.IDLE
        self.serving = None
        self._transport.resumeProducing()
        self._became_idle(self)

    def _end_body(self, reason: Failure) -> None:
        consumer, self._consumer, self._framed = self._consumer, None, None
        if consumer is not None:
            consumer.connectionLost(reason)

    def _how_it_ended(self, reason: Failure) -> Failure:
        """A body that ends with its connection is whole after a FIN, and broken after all else.

        A FIN that a parent proxy sent says nothing.
        """
        is_fin = reason.check(ConnectionDone) and self._knows_fin
        if self._until_close and is_fin and not self.aborted:
            return _DONE
        cause = "closed" if reason.check(ConnectionDone) else "reset"
        return Failure(upstream_broken(reason.getErrorMessage(), cause=cause))
