"""One client connection: how it is written to, how long it may take, how it ends.

The reading half is ``server/receiver.py``.  Every phase of a connection has a deadline that bytes
do not push back; deadlines are numbers on the channel, which its site looks at in one sweep.  A
channel knows its site and its requests, and nothing of what they are for.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from twisted.internet.error import ConnectionDone
from twisted.internet.interfaces import IHalfCloseableProtocol, IHandshakeListener
from twisted.internet.protocol import connectionDone
from twisted.protocols.tls import TLSMemoryBIOProtocol
from twisted.python.failure import Failure
from zope.interface import implementer

from llmproxy.errors import ClientStalled, ProxyError
from llmproxy.net.tcp import DirectTransport
from llmproxy.net.tls import TlsTransport
from llmproxy.net.transport import pending_bytes, raw_transport, unacknowledged_bytes
from llmproxy.server.progress import Phase, Progress
from llmproxy.server.receiver import Receiver
from llmproxy.server.request import Request

_HANDSHAKE, _IDLE, _HEAD, _BODY, _SERVING, _CLOSING = Phase  # found faster than members (ADR-0011)

_LINGER = 2.0
"""Seconds for which a refused upload is read and dropped, so that the refusal can be read."""

_QUEUE = 28 * 1024
"""Bytes in Twisted's queue at which it asks for no more.

With one read from the provider behind it (``net.tcp.READ_SIZE``) and all that a stream needs, a
response holds less than 128 KiB.
"""

_LOOKS = 4
"""Looks at what the kernel alone holds within ``client_stall``; each is a system call."""

_CLOSE_GRACE = 5.0
"""Seconds that a closing connection with nothing left to send may take, as TLS's farewell does."""

_DRAIN_GRACE = 1.0
"""Seconds for which an idle connection may still bring a request that was on its way."""

_DRAIN_POLL = 0.02
"""Seconds between looks at a send queue that must empty before a reset."""


@implementer(IHandshakeListener, IHalfCloseableProtocol)
class ClientConnection(Receiver):
    """One client connection.

    Args:
        site: the listener's factory.
        address: the client's, as its door counted it; None where that is not known yet.

    Attributes:
        deadline: monotonic seconds at which the present phase is over, or infinity.
        phase: where the connection stands.
    """

    __slots__ = (
        *("_aborted", "_lingering", "_look_at", "_peer", "_peer_name", "_poll", "_progress"),
        *("_stall_after", "_written"),
    )

    def __init__(self, site: Any, address: str | None = None) -> None:
        super().__init__(site)
        self._peer: Any = None
        self._peer_name: str | None = None
        self.address = address
        self._aborted = False
        self._lingering = False
        self._poll: Any = None
        self._look_at = 0.0
        self._stall_after = site.timeouts.client_stall
        self._progress = Progress()
        self._written = 0

    # -- the life of the socket -----------------------------------------------------------------

    def connectionMade(self) -> None:
        """Begin to wait for a request, or for the handshake before it."""
        super().connectionMade()
        raw_transport(self.transport).bufferSize = _QUEUE
        self.site.joined(self)
        if isinstance(self.transport, TLSMemoryBIOProtocol | TlsTransport):
            self.enter(_HANDSHAKE, self.site.timeouts.request_head)
        else:
            self.await_request()

    def handshakeCompleted(self) -> None:
        """TLS is there: begin to wait for a request."""
        self.await_request()

    def await_request(self) -> None:
        """Wait for the next request; while the process shuts down, for a short grace."""
        idle = _DRAIN_GRACE if self.site.draining else self.site.timeouts.client_idle
        self.enter(_IDLE, idle)

    def identify(self) -> None:
        """Count the client's address where a balancer had to say it first, or turn it away."""
        host = getattr(self.getPeer(), "host", None)
        refusal = None if host is None else self.site.limiter.recognise(host)
        if refusal is None:
            self.address = host
        else:
            self.tell_and_close(refusal)

    def connectionLost(self, reason: Failure = connectionDone) -> None:
        """Tell the running request, if any."""
        if self._poll is not None:
            self._poll.cancel()
            self._poll = None
        self.resume_upload()
        try:
            super().connectionLost(reason)
        finally:
            self.site.left(self)  # last: whoever waits for it finds the request recorded

    def readConnectionLost(self) -> None:
        """The client has ended its side: it counts as gone, and cannot take a part for the whole.

        This is what Twisted does where nobody asks to be told, but for the reset, and for what is
        still being written out: that ends as it was to end.
        """
        if self.phase is _CLOSING and (pending_bytes(self.transport) or self._poll):
            return
        if any(request.is_unframed for request in self.requests):
            self.abort()
        else:
            self.transport.connectionLost(Failure(ConnectionDone()))

    def writeConnectionLost(self) -> None:
        """Our side is ended; what the client still sends is read and dropped."""

    def abort(self) -> None:
        """Drop the connection and whatever it still holds; twice would be an error on TLS."""
        if not self._aborted:
            self._aborted = True
            self.transport.abortConnection()

    def loseConnection(self) -> None:
        """Write out what is queued, then close; whoever takes nothing is dropped by the sweep."""
        self.enter(_CLOSING, _CLOSE_GRACE)
        super().loseConnection()

    @property
    def peer(self) -> Any:
        """The client's address, from the first request on; a balancer has said it by then."""
        if self._peer is None:
            self._peer = self.getPeer()
        return self._peer

    @property
    def peer_name(self) -> str:
        """The client's address in words."""
        if self._peer_name is None:
            self._peer_name = str(getattr(self.peer, "host", "unix"))
        return self._peer_name

    @property
    def is_full(self) -> bool:
        """Whether the transport asked for no more."""
        return bool(self._waitingForTransport)

    # -- out ------------------------------------------------------------------------------------

    def write(self, data: bytes) -> None:
        """Write, and count what was written."""
        self._written += len(data)
        self.transport.write(data)

    @property
    def written(self) -> int:
        """How many bytes were written so far; transports of ``wire/`` count by themselves."""
        return int(getattr(self.transport, "written", self._written))

    @property
    def verbatim(self) -> Callable[[bytes], object] | None:
        """What takes bytes past :meth:`write`, or None where nobody would count them."""
        transport = self.transport
        return transport.write if hasattr(transport, "written") else None

    def when_sent(self, call: Callable[[], object]) -> None:
        """Call ``call`` once the kernel has all that was written, at once where it has.

        The last call counts alone.  Twisted's own transports do not tell: there it is dropped.
        """
        if not pending_bytes(self.transport):
            call()
        elif isinstance(self.transport, DirectTransport):
            self.transport.drained = call

    def writeSequence(self, pieces: Iterable[bytes]) -> None:
        """Write pieces together."""
        self.write(b"".join(pieces))

    def requestDone(self, request: Request) -> None:
        """The response is whole: wait for the next request, or close."""
        self.requests.remove(request)
        self._handlingRequest = False
        if self._discarding or (request.upload is not None and not request.upload.complete):
            self._linger()
        elif self.persistent:
            self.await_request()
            if self._buffer:
                self.dataReceived(b"")
        else:
            self.loseConnection()

    def tell_and_close(self, error: ProxyError) -> None:
        """Answer where there is no request yet that could; what still comes is dropped."""
        self.write(self.site.malformed(self.peer_name, error))
        self._linger()

    def _linger(self) -> None:
        """Close our side, and read and drop what still comes, so that the response can be read."""
        self._discarding = self._lingering = True
        self.enter(_CLOSING, _LINGER)
        if self.transport is raw_transport(self.transport):
            self.transport.loseWriteConnection()

    def request_cut(self, request: Request) -> None:
        """The response is short of its framing: close after what is queued, without its end."""
        self.persistent = False
        self.requests.remove(request)
        self.loseConnection()

    def request_broken(self, request: Request) -> None:
        """The response ends with the connection, so only a reset can tell that it broke."""
        self.persistent = False
        self.requests.remove(request)
        self.enter(_CLOSING, None)
        self._networkProducer.unregisterProducer()
        self._reset_once_sent()

    def _reset_once_sent(self) -> None:
        self._poll = None
        if pending_bytes(self.transport) or unacknowledged_bytes(self.transport):
            self._poll = self.site.reactor.callLater(_DRAIN_POLL, self._reset_once_sent)
        else:
            self.abort()

    # -- the sweep ------------------------------------------------------------------------------

    def check(self, now: float) -> None:
        """Act on a deadline that has passed, and on a client that takes nothing."""
        if now >= self.deadline:
            self._expire(now)
        elif self.phase not in (_IDLE, _HANDSHAKE):
            self._check_stall(now)

    def _expire(self, now: float) -> None:
        if self.phase is _BODY:
            self.enter(_BODY, None)
            slow = ProxyError(408, "slow_request", "The request body came too slowly.")
            self.requests[-1].refuse(slow)
        elif self.phase is _CLOSING:
            if pending_bytes(self.transport):
                self._check_stall(now)
            elif self._lingering:
                self._lingering = False
                self.loseConnection()
            else:
                self.abort()
        elif self.phase is _HEAD:
            self.tell_and_close(ProxyError(408, "slow_request", "The request came too slowly."))
        elif self.phase is _HANDSHAKE:
            self.abort()
        else:
            self.loseConnection()

    def _check_stall(self, now: float) -> None:
        """Tell a client that takes nothing from a slow one, whatever is still written to it."""
        if self.requests:
            self._stall_after = self.requests[0].stall_after  # stays behind for what it leaves
        waiting = pending_bytes(self.transport)
        if self._stall_after is None or (
            not waiting and self._poll is None and now < self._look_at
        ):
            return
        # The kernel asks for more only when much of its queue is free again, and what is all with
        # it may be for a client that is no more: progress is what the client acknowledges.
        waiting += unacknowledged_bytes(self.transport)
        self._look_at = now + self._stall_after / _LOOKS
        if self._progress.has_stalled(now, self.written, waiting, self._stall_after):
            for request in list(self.requests):
                request.abort(ClientStalled())
            self.abort()
