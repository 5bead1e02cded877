"""One client connection: what it reads, how it is written to, how long it may take, how it ends.

What a client sends becomes requests here, strictly (RFC 9110 and 9112).  Nothing is parsed by
Twisted: its reader repairs what must be refused (ADR-0007).  A connection knows its site and its
requests, and nothing of what they are for.  It is in one phase at a time::

    HANDSHAKE -----> IDLE -----> HEAD -----> BODY -----> SERVING -----> HANDED_OVER
                      ^                                     |
                      |                         all is written, or it broke
                      |                                     v
                      +----- the client has it all ----- SENDING        any -----> CLOSING

    phase        begins with           may last               what comes is           too late
    -----        -----------           --------               -------------           --------
    HANDSHAKE    TLS                   request_head           TLS's                   reset
    IDLE         waiting               client_idle            the next request        closed
    HEAD         its first byte        request_head           parsed                  408
    BODY         the head's end        request_body + earned  the body                408
    SERVING      the body's end        without end            kept, up to a head      -
    SENDING      the response's end    without end            kept, up to a head      -
    HANDED_OVER  Request.hand_over()   without end            the protocol's          -
    CLOSING      the end of all that   see below              dropped                 closed

A request whose body streams is served in BODY already.  In SERVING a client may send the next
request.  If it sends more than the size of a head, it is still read from, so that its leaving is
seen, but it is not served any more.  In SENDING, if it sends so much, it is not read from: it has
something to read.  Of requests that came together, each is served in a turn of the reactor of its
own, and nothing more is read before the last of them.

Bytes do not push a deadline back, but for those of a body, which earn time.  Deadlines are numbers,
which the site looks at in one sweep.  In HEAD, BODY, SERVING, SENDING and CLOSING a client is
dropped that takes no byte for ``client_stall`` although some wait for it, in our queue or in the
kernel's; one that takes some is given time.  When a closing connection's client has all, and has
sent nothing that was not served, the socket is closed.  If it has, that is read and dropped for two
seconds more: the kernel resets a connection that is closed with something unread, and the client
would lose the response (ADR-0020).
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable
from contextlib import suppress
from typing import Any, Final

from twisted.internet.error import ConnectionDone
from twisted.internet.interfaces import IHalfCloseableProtocol, IHandshakeListener, IProtocol
from twisted.internet.protocol import connectionDone
from twisted.logger import Logger
from twisted.protocols.tls import TLSMemoryBIOProtocol
from twisted.python.failure import Failure
from twisted.web import http
from zope.interface import implementer

from llmproxy.errors import ClientGone, ClientStalled, Cut, ProxyError
from llmproxy.http1.framing import BodyReader, LengthReader, request_body
from llmproxy.http1.grammar import (
    BadMessage,
    RequestHead,
    field_values,
    is_persistent,
    list_tokens,
    parse_request_head,
)
from llmproxy.net.tcp import DirectTransport
from llmproxy.net.tls import TlsTransport
from llmproxy.net.transport import (
    has_failed,
    has_peer_left,
    host_of,
    pending_bytes,
    raw_transport,
    tls_of,
)
from llmproxy.server.delivery import Delivery
from llmproxy.server.hand_over import ClientSocket
from llmproxy.server.inside import Inside
from llmproxy.server.request import Request
from llmproxy.server.seen_heads import SeenHead, Sighting
from llmproxy.server.upload import Upload

_LINGER = 2.0
"""Seconds for which what was not served is read and dropped when the client has the response."""

_QUEUE = 28 * 1024
"""Bytes in Twisted's queue at which it asks for no more.

With one read from the provider behind it (``net.tcp.READ_SIZE``) and all that a stream needs, a
response holds less than 128 KiB.
"""

_DRAIN_GRACE, _FIRST_GRACE = 1.0, 5.0
"""Seconds for which an idle connection may still bring a request that was on its way in a drain.

A client that has just connected will send one, and on a busy machine that takes longer.
"""

_WATCH = 0.05
"""Seconds between looks at a client that is not read from."""

_HELLO = b"\x16\x03"
"""How TLS begins: a record of a handshake (RFC 8446, section 5.1)."""

_BARE_LF = re.compile(rb"(?<!\r)\n")
_REASONS = {414: "target_too_long", 431: "head_too_large", 501: "coding", 505: "version"}

_DONE = Failure(ConnectionDone())

_log = Logger()


class Phase:
    """Where a connection stands; the table above says what each means.

    No Enum: CPython 3.11 takes 0.1 µs longer to find a member, 2 µs of a request.
    """

    HANDSHAKE: Final = "handshake"
    IDLE: Final = "idle"
    HEAD: Final = "head"
    BODY: Final = "body"
    SERVING: Final = "serving"
    SENDING: Final = "sending"
    HANDED_OVER: Final = "handed over"
    CLOSING: Final = "closing"


@implementer(IHandshakeListener, IHalfCloseableProtocol)
class ClientConnection(http.HTTPChannel):
    """One client connection.

    Args:
        site: the listener's factory: its limits, timeouts and clock.
        address: the client's, as the connection limiter counted it; None where it is not known yet.
        peer: the client's with its port, likewise.

    Attributes:
        deadline: monotonic seconds at which the present phase is over, or infinity.
        phase: where the connection stands.
        address: the client's, where it is known.
        inside: what it was opened to by CONNECT, once its requests are for that; else None.
    """

    __slots__ = (  # as those of the request, Twisted's attributes included
        *("_dataBuffer", "_handlingRequest", "_networkProducer", "_requestProducer"),
        *("_requestProducerStreaming", "_transferDecoder", "connected", "factory", "persistent"),
        *("requests", "timeOut", "transport"),
        *("_aborted", "_advancing", "_buffer", "_delivery", "_discarding", "_has_ended"),
        *("_invited", "_is_held", "_lingers", "_peer", "_peer_name", "_reader", "_resets"),
        *("_seen", "_skips_line", "_socket", "_stall_after", "_turn", "_upload_left"),
        *(
            "_upload_paused_at",
            "_watch",
            "_written",
            "address",
            "deadline",
            "inside",
            "phase",
            "site",
        ),
    )
    transport: Any
    _networkProducer: Any

    def __init__(self, site: Any, address: str | None = None, peer: Any = None) -> None:
        super().__init__()
        self._dataBuffer: Any = ()  # Twisted's own reader is not used
        self.transport = self._networkProducer = self._requestProducer = None
        self._requestProducerStreaming = None
        self.connected, self.persistent = 0, True
        self.site: Any = site
        self.factory = site
        self.timeOut = None
        self.address = address
        self.inside: Inside | None = None
        self.phase: str = Phase.IDLE
        self.deadline = math.inf
        self._peer = peer
        self._peer_name: str | None = None
        # what comes in
        self._buffer = b""
        self._seen = 0  # bytes of the buffer in which a head's end was looked for
        self._skips_line = True
        self._advancing = False
        self._discarding = False  # what still comes is dropped
        self._reader: BodyReader = LengthReader(0)
        self._invited = True  # nobody waits for a 100
        self._upload_paused_at: float | None = None
        self._upload_left = 0.0
        self._watch: Any = None
        self._turn: Any = None  # of the reactor, in which what is buffered goes on
        self._is_held = False  # nothing is read before that turn, or before a response is taken
        # what goes out
        self._written = 0
        self._stall_after: float | None = site.timeouts.client_stall
        # the end
        self._socket: ClientSocket | None = None  # once it is another protocol's
        self._resets = False  # a reset ends the connection, once the client has all
        self._lingers = False  # something that the client sent was not served
        self._has_ended = False  # the client sends no more
        self._aborted = False

    def enter(self, phase: str, seconds: float | None) -> None:
        """Begin a phase that may last so many seconds; None for no limit."""
        self.phase = phase
        self.deadline = math.inf if seconds is None else self.site.clock() + seconds

    # -- the life of the socket -----------------------------------------------------------------

    def connectionMade(self) -> None:
        """Begin to wait for a request, or for the handshake before it."""
        transport = self.transport
        if isinstance(transport, DirectTransport):
            self._networkProducer = transport
            transport.registerProducer(self, True)
            transport.bufferSize = _QUEUE
        else:
            super().connectionMade()
            raw_transport(transport).bufferSize = _QUEUE
        self._delivery = Delivery(transport, self.site.reactor)
        self.site.joined(self)
        if self.inside is not None:
            return  # TLS behind a CONNECT: the handshake's time runs from that on
        if isinstance(self.transport, TLSMemoryBIOProtocol | TlsTransport):
            self.enter(Phase.HANDSHAKE, self.site.timeouts.request_head)
        else:
            self.await_request()

    def handshakeCompleted(self) -> None:
        """TLS is there: begin to wait for a request."""
        if self.inside is not None:
            self.inside.shaken(tls_of(self.transport))
        self.await_request()

    def await_request(self) -> None:
        """Wait for the next request; while the process shuts down, for a short grace."""
        idle = self.site.timeouts.client_idle
        if self.site.draining:
            idle = _DRAIN_GRACE if self.written else _FIRST_GRACE
        self.enter(Phase.IDLE, idle)

    def connectionLost(self, reason: Failure = connectionDone) -> None:
        """The connection is gone: report it to whatever ran on it."""
        self._cancel_calls()
        self.resume_upload()
        if self.inside is not None:
            self.inside.lost(reason)
        try:
            self._report_lost(reason)
            for request in self.requests:
                request.connectionLost(reason)
            if self._socket is not None:
                self._socket.end(reason)
        finally:
            self.site.left(self)  # last: where that is waited for, the request is recorded by then

    def _report_lost(self, reason: Failure) -> None:
        """Report the end to the requests, with whether the client had room for their responses."""
        if not (self.requests or self._buffer):
            return
        why = ClientGone(reason.getErrorMessage())
        why.had_room = self._delivery.had_room
        if self.phase is Phase.SENDING and self.requests and why.had_room and not self._aborted:
            self.requests.pop(0).delivered()
        for request in self.requests:
            request.leave(why)
        if not self._aborted:
            self._abandon_next(why)

    def _abandon_next(self, why: ClientGone) -> None:
        """Let the request that came behind the last one, and is never begun, have a record, too.

        It has none if this side ends the connection: then its client has not left.
        """
        buffer, self._buffer = self._buffer, b""
        if self.phase is not Phase.BODY and (end := buffer.find(b"\r\n\r\n")) >= 0:
            with suppress(BadMessage):
                Request(self, parse_request_head(buffer[:end])).leave(why)

    def readConnectionLost(self) -> None:
        """The client has ended its side: it counts as gone, and cannot take a part for the whole.

        For a protocol that is not half-closeable Twisted closes the connection.  So does this, but
        for the reset of a body without framing.  If a response is whole, the rest of it is sent
        first: the client may have ended its side behind its last request.
        """
        if self.phase in (Phase.SENDING, Phase.CLOSING):
            self.persistent = False
            self._discarding = self._has_ended = True
            self._look_now()
            return
        if self.phase is Phase.HANDED_OVER and self._socket:
            self._has_ended = True
            if self._socket.end_reading():
                return
        if any(request.is_unframed for request in self.requests):
            self.abort()
        elif self.phase is Phase.SERVING and self._all_are_left():
            self.site.close_soon(self)
        else:
            self._close()

    def _all_are_left(self) -> bool:
        """Report to the requests that the client has left; return whether nothing more is written.

        Then all else about the end can wait: providers of clients that leave together hear first.
        """
        why = ClientGone(_DONE.getErrorMessage())
        why.had_room = self._delivery.had_room
        for request in self.requests:
            request.leave(why)
        return all(request.producer is None for request in self.requests)

    def writeConnectionLost(self) -> None:
        """Our side is ended; what the client still sends is read, and dropped or the protocol's."""
        if self._socket is not None:
            self._socket.end_writing()

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
            self._peer_name = host_of(self.peer) or "unix"
        return self._peer_name

    # -- in: heads ------------------------------------------------------------------------------

    def dataReceived(self, data: bytes) -> None:
        """Take bytes, split at any point."""
        if self._discarding or self.phase is Phase.CLOSING:
            if self.phase is Phase.HANDED_OVER and self._socket is not None:
                self._socket.feed(data)
            else:
                self._lingers = True
            return
        self._buffer += data
        if not self._advancing and self._turn is None:
            self._go_on()

    def _go_on(self) -> None:
        """Take what is buffered, but for a request behind one that was served in this turn."""
        self._advancing = True
        try:
            while self._advance() and self._buffer and self._turn is None:
                pass
        finally:
            self._advancing = False

    def _go_on_later(self) -> None:
        """Take what is buffered in the next turn of the reactor; until then nothing is read.

        So a client that sends many requests at once gets as much of a turn as any other.
        """
        if self._turn is None:
            self._turn = self.site.reactor.callLater(0, self._begin_turn)
            self._hold()

    def _begin_turn(self) -> None:
        self._turn = None
        self._go_on()
        if self._turn is None and not self._is_ahead:
            self._let_go()

    @property
    def _is_ahead(self) -> bool:
        """Whether a client that has a response to take has sent more than is kept meanwhile."""
        return self.phase is Phase.SENDING and len(self._buffer) > self.site.limits.request_head

    def _hold(self) -> None:
        """Read no more for now."""
        self._is_held = True
        self._networkProducer.pauseProducing()

    def _let_go(self) -> None:
        """Read on, unless an upload waits."""
        if self._is_held:
            self._is_held = False
            if self._upload_paused_at is None:
                self._networkProducer.resumeProducing()

    def _advance(self) -> bool:
        """Take one step with what is buffered; return whether another may follow."""
        if self._discarding or self.phase is Phase.CLOSING:
            self._buffer = b""
            return False
        if self.phase is Phase.BODY:
            return self._read_body()
        if self.phase is Phase.SERVING:
            return self._keep_pipelined()
        if self.phase is Phase.SENDING:
            self._look_now()
            if self._is_ahead:
                self._hold()
            return False
        return self._read_head()

    def _read_head(self) -> bool:
        is_first = self.phase is Phase.IDLE
        if is_first:
            if self._skips_line:  # one empty line before a request: RFC 9112, section 2.2
                if self._buffer == b"\r":
                    return False
                self._skips_line = not self._buffer.startswith(b"\r\n")
                self._buffer = self._buffer.removeprefix(b"\r\n")
            if not self._buffer:
                return False
            self.phase = Phase.HEAD
            if self.address is None:
                self._identify()
                if self._discarding:
                    return False
        longest = self.site.limits.request_head
        seen, self._seen = self._seen, len(self._buffer)
        end = self._buffer.find(b"\r\n\r\n", max(0, seen - 3), longest + 4)
        try:
            if end >= 0:
                self._seen = 0
                head, self._buffer = self._buffer[:end], self._buffer[end + 4 :]
                sighting = self.site.router.heads.look(head) if self.inside is None else None
                if sighting is not None and sighting.seen is not None:
                    self._begin_again(sighting.seen, sighting.length, head)
                else:
                    self._begin(parse_request_head(head), sighting)
                return True
            if self._buffer.startswith(_HELLO):
                self.site.report_tls(self.peer_name)
                raise BadMessage("it is TLS, which is not spoken on this port")
            if len(self._buffer) > longest + 3:
                in_first = b"\r\n" not in self._buffer[:longest]
                raise BadMessage("the request's head is too long", 414 if in_first else 431)
            if _BARE_LF.search(self._buffer, max(0, seen - 1)):
                raise BadMessage("a line does not end with CRLF")
            if is_first:  # most heads come whole, and need no deadline
                self.enter(Phase.HEAD, self.site.timeouts.request_head)
        except BadMessage as error:
            text = f"The request is not acceptable: {error}."
            reason = _REASONS.get(error.status, "malformed")
            self._refuse_connection(ProxyError(error.status, reason, text))
        return False

    def _identify(self) -> None:
        """Count the client's address where a balancer had to say it first, or reject it."""
        host = host_of(self.getPeer())
        refusal = None if host is None else self.site.limiter.recognise(host)
        if refusal is None:
            self.address = host
        else:
            self._refuse_connection(refusal)

    def _begin(self, head: RequestHead, sighting: Sighting | None) -> None:
        """The head is in: refuse what is too large before a byte of it is asked for."""
        self._reader = request_body(head)
        request = Request(self, head)
        self.persistent = is_persistent(head.minor == 1, head.fields, head.first)
        expected: list[bytes] = []
        if b"expect" in head.first:
            expected = list_tokens(field_values(head.fields, b"expect"))
        elif sighting is not None:
            request.sighting = sighting
        length = self._reader.left if isinstance(self._reader, LengthReader) else None
        self._await_body(request, length, expected)

    def _begin_again(self, seen: SeenHead, length: int, raw: bytes) -> None:
        """Do as :meth:`_begin`, with a head that is known."""
        self.persistent = seen.persistent
        request = Request(self, seen, raw)
        if 0 < length <= len(self._buffer) and request.holds_at_once(length, seen.body_limit):
            body, self._buffer = self._buffer[:length], self._buffer[length:]
            self.requests.append(request)
            self._skips_line = True
            self.phase, self.deadline = Phase.SERVING, math.inf
            request.serve(body)
            return
        self._reader = LengthReader(length)
        self._await_body(request, length, [])

    def _await_body(self, request: Request, length: int | None, expected: list[bytes]) -> None:
        """Go on with a request whose head is read."""
        self.requests.append(request)
        self._skips_line = True
        self.phase = Phase.BODY
        if length is None or len(self._buffer) < length:  # most bodies are here, and are read next
            self.enter(Phase.BODY, self.site.timeouts.request_body)
        request.gotLength(length)
        if request.refusal is None and expected and set(expected) - {b"100-continue"}:
            request.refusal = ProxyError(417, "expectation", "This expectation cannot be met.")
        if length == 0:
            self._body_done()
        elif request.refusal is not None:
            self.refuse_early(request)
        else:
            self._take_body(request, length, expected)

    def _keep_pipelined(self) -> bool:
        """Keep a little of what follows; a client that sends more is read from, but not served."""
        if len(self._buffer) > self.site.limits.request_head:
            self._discarding = self._lingers = True
            self._buffer = b""
        return False

    # -- in: bodies -----------------------------------------------------------------------------

    def _take_body(self, request: Request, length: int | None, expected: list[bytes]) -> None:
        """Hold the body, or begin to serve the request while its body streams."""
        is_here = length is not None and len(self._buffer) >= length
        refusal = None if is_here else request.handler.early_refusal(request)
        if refusal is not None:
            request.refuse(refusal)
            return
        self._invited = not expected or request.clientproto == b"HTTP/1.0"
        if request.seen is not None or request.handler.holds_body(request):
            if is_here:
                self._take_whole_body(request, length or 0)
            else:
                self.invite_upload()
        else:
            request.upload = Upload(self, length)
            request.process()

    def _take_whole_body(self, request: Request, length: int) -> None:
        """Take a body all of which came with its head, as most do."""
        body, self._buffer = self._buffer[:length], self._buffer[length:]
        request.handleContentChunk(body)
        if self.phase is Phase.BODY:  # else it was refused
            self._body_done()

    def _read_body(self) -> bool:
        data, self._buffer = self._buffer, b""
        content = self._reader.feed(data)
        request = self.requests[0]
        if content:
            request.handleContentChunk(content)
        if self.phase is not Phase.BODY:  # refused, or its response was broken off
            return False
        if self._reader.error is not None:
            request.refuse(ProxyError(400, "malformed", f"The body is bad: {self._reader.error}."))
        elif self._reader.done:
            self._buffer = self._reader.extra
            self._body_done()
            return True
        return False

    def _body_done(self) -> None:
        self.enter(Phase.SERVING, None)
        self.requests[0].body_done()

    def refuse_early(self, request: Request) -> None:
        """Serve a request whose body is refused: what still comes is dropped."""
        self._discarding = self._lingers = True
        self.persistent = False
        self.enter(Phase.SERVING, None)
        request.process()

    # -- in: a body that streams (server.upload.Reading) -----------------------------------------

    def pause_upload(self) -> None:
        """Read no more for now; the body's deadline stands still."""
        if self._upload_paused_at is None and self.phase is Phase.BODY:
            self._upload_paused_at = self.site.clock()
            self._upload_left = self.deadline - self._upload_paused_at
            self.deadline = math.inf
            self._networkProducer.pauseProducing()
            self._watch_unread()

    def resume_upload(self) -> None:
        """Read on."""
        if self._upload_paused_at is not None:
            self._upload_paused_at = None
            self._watch.cancel()
            if self.phase is Phase.BODY:  # else the body is whole, and what follows has its own
                self.deadline = self.site.clock() + self._upload_left
            if not self._is_held:
                self._networkProducer.resumeProducing()

    def _watch_unread(self) -> None:
        """Look whether a client that is not read from has left: no read would show it."""
        if has_peer_left(self.transport):
            self.abort()
        self._watch = self.site.reactor.callLater(_WATCH, self._watch_unread)

    def invite_upload(self) -> None:
        """Let a client that waits for it send the body (RFC 9110, section 10.1.1)."""
        if not self._invited:
            self._invited = True
            self._send100Continue()

    # -- out ------------------------------------------------------------------------------------

    def write(self, data: bytes) -> None:
        """Write, and count what was written."""
        self._written += len(data)
        self.transport.write(data)

    def writeSequence(self, pieces: Iterable[bytes]) -> None:
        """Write pieces together."""
        self.write(b"".join(pieces))

    @property
    def written(self) -> int:
        """How many bytes were written so far; transports of ``net/`` count by themselves."""
        return int(getattr(self.transport, "written", self._written))

    @property
    def verbatim(self) -> Callable[[bytes], object] | None:
        """What takes bytes past :meth:`write`, or None where nobody would count them."""
        transport = self.transport
        return transport.write if hasattr(transport, "written") else None

    @property
    def is_serving(self) -> bool:
        """Whether a whole request is being served."""
        return self.phase is Phase.SERVING

    @property
    def has_dropped(self) -> bool:
        """Whether bytes that the client has sent were dropped, or still will be."""
        return self._discarding

    @property
    def is_full(self) -> bool:
        """Whether the transport asked for no more."""
        return bool(self._waitingForTransport)

    def pauseProducing(self) -> None:
        """The client takes no more for now; it is read from all the same, to see it leave.

        Twisted's own would stop reading between two requests.  Here no request is served before the
        response to the one before it is taken.
        """
        self._waitingForTransport = True
        if self._requestProducer is not None:
            self._requestProducer.pauseProducing()

    def resumeProducing(self) -> None:
        """The client takes bytes again."""
        self._waitingForTransport = False
        if self._requestProducer is not None:
            self._requestProducer.resumeProducing()

    def when_sent(self, call: Callable[[], object]) -> None:
        """Call ``call`` once the kernel has all that was written, at once where it has.

        The last call counts alone.  Twisted's own transports do not report it: there the call is
        dropped.
        """
        if not pending_bytes(self.transport):
            call()
        elif isinstance(self.transport, DirectTransport):
            self.transport.drained = call

    # -- how a response ends, and how the connection does -----------------------------------------

    def requestDone(self, request: Request) -> None:
        """The response is whole: when its client has it, wait for the next request, or close."""
        if self._discarding or (request.upload is not None and not request.upload.complete):
            self.persistent = False
        if self.persistent and self._delivery.is_sent():  # as nearly always
            self._delivered()
        else:
            self._send_out(closes=not self.persistent)

    def request_cut(self, request: Request) -> None:
        """The response is short of its framing: close after what is queued, without its end."""
        self.persistent = False
        self._send_out(closes=True)

    def request_broken(self, request: Request) -> None:
        """The response ends with the connection, so only a reset shows that it broke."""
        self.persistent = False
        self._resets = True
        self._networkProducer.unregisterProducer()
        self._send_out(closes=False)

    def _send_out(self, *, closes: bool) -> None:
        """The response is written: end it when the client has all, which mostly is now.

        What the kernel has sent counts as received: the client had room for it.  If something
        waits for room, the response is over when the client has acknowledged everything.  Behind a
        reset, which the transport reports in the next turn, nobody gets it.
        """
        if self._aborted:
            return
        is_sent = self._delivery.is_sent()
        if closes:
            self._end_writing()
        self.enter(Phase.SENDING, None)
        if is_sent and not self._resets:
            self._delivered()
        elif is_sent or not self._look_now():
            self._delivery.watch(self._look_again)

    def _look_again(self) -> None:
        if self._look_now():
            return
        if has_failed(self.transport):  # neither reading nor writing would report it
            self.drop(ClientGone("the connection was reset"))
        elif self._is_held and has_peer_left(self.transport):
            self._discarding = True  # nobody is there to get what else was asked for
            self._let_go()

    def _look_now(self) -> bool:
        """Go on if the client has acknowledged all that was written; return whether it has."""
        if not self._delivery.is_acknowledged:
            return False
        self._delivery.stop_watching()
        if self.phase is Phase.SENDING:
            self._delivered()
        elif self._lingers and not self._has_ended:
            self.enter(Phase.CLOSING, _LINGER)
        else:
            self._close()
        return True

    def _delivered(self) -> None:
        """The client has the whole response."""
        self.requests.pop(0).delivered()
        if self._resets:
            self.enter(Phase.CLOSING, None)
            self.abort()
        elif self.persistent:
            self.await_request()
            if self._buffer:
                self._go_on_later()
            else:
                self._let_go()
        else:
            self._wait_for_close()

    def hand_over(self, request: Request, head: bytes, protocol: IProtocol) -> None:
        """Let another protocol have the socket; see :meth:`Request.hand_over`."""
        early, self._buffer = self._buffer, b""
        self._discarding = True  # as far as HTTP is concerned
        self._stall_after = request.stall_after
        self.requests.remove(request)
        request.delivered()
        self.enter(Phase.HANDED_OVER, None)
        self._networkProducer.unregisterProducer()
        self.write(head)
        self._socket = ClientSocket(self, protocol, early)
        try:
            self._socket.begin()
        except Exception:
            _log.failure("a protocol that was given a client's socket failed")
            self.abort()

    def turn_inside(self, request: Request, head: bytes, inside: Inside) -> None:
        """Go on behind CONNECT with this site; see :meth:`Request.turn_inside`."""
        early, self._buffer = self._buffer, b""
        self.requests.remove(request)
        request.delivered()
        self.inside = inside
        self.write(head)
        self.enter(Phase.HANDSHAKE, self.site.timeouts.request_head)
        inside.begin(self, early)

    def _refuse_connection(self, error: ProxyError) -> None:
        """Respond where there is no request yet that could; what still comes is dropped."""
        self.write(self.site.malformed(self.peer_name, error))
        self._lingers = True
        self.loseConnection()

    def loseConnection(self) -> None:
        """Write out what is queued and end our side; close when the client has it all.

        A client that takes nothing of it for ``client_stall`` is dropped.
        """
        if self.phase is not Phase.CLOSING:
            self._end_writing()
            self._wait_for_close()

    def _end_writing(self) -> None:
        """End our side behind what is queued; what still comes is read and dropped."""
        self.resume_upload()
        self._discarding = True
        self._lingers = self._lingers or bool(self._buffer) or self.phase is Phase.BODY
        self._buffer = b""
        self._networkProducer.unregisterProducer()
        if isinstance(self.transport, TLSMemoryBIOProtocol):
            self.transport.loseConnection()  # Twisted's TLS waits for the client's end by itself
        elif self._socket is None or not self._socket.has_ended_writing:
            self.transport.loseWriteConnection()  # twice, epoll would report a broken connection
        self._let_go()

    def _wait_for_close(self) -> None:
        self.enter(Phase.CLOSING, None)
        if not (self._has_ended and self._look_now()):
            self._delivery.watch(self._look_again)

    def close_left(self) -> None:
        """Close the socket of a client that has left."""
        self._close()

    def _close(self) -> None:
        """Close the socket: the client has acknowledged all, our end as well."""
        raw_transport(self.transport).connectionLost(_DONE)

    def drain(self) -> None:
        """The process shuts down: wait for another request no longer than a short grace."""
        if self.phase is Phase.IDLE:
            self.await_request()
        elif self._socket is not None:
            self._socket.drain()

    def cut(self) -> None:
        """Drop the connection, unless another protocol has it and ends it by itself."""
        if self._socket is None or not self._socket.cut():
            self.drop(Cut())

    def drop(self, why: ClientGone) -> None:
        """Drop the connection at once, for a reason of ours, and report that to what runs on it.

        A response that is written whole, and for which the client had room, is none of that.
        """
        if self.phase is Phase.SENDING and self.requests and self._delivery.had_room:
            self.requests.pop(0).delivered()
        for request in list(self.requests):
            request.abort(why)
        self._abandon_next(why)
        if self._socket is not None:
            self._socket.end(Failure(why))
        self.abort()

    def abort(self) -> None:
        """Drop the connection and whatever it still holds; twice would be an error on TLS."""
        if not self._aborted:
            self._aborted = True
            self.persistent = False
            self._cancel_calls()
            self.transport.abortConnection()

    def _cancel_calls(self) -> None:
        self._delivery.stop_watching()
        if self._turn is not None:
            self._turn.cancel()
            self._turn = None

    # -- the sweep ------------------------------------------------------------------------------

    def check(self, now: float) -> None:
        """Act on a deadline that has passed, and on a client that takes nothing."""
        if now >= self.deadline:
            self._expire(now)
        elif self.phase not in (Phase.IDLE, Phase.HANDSHAKE, Phase.HANDED_OVER):
            if self.requests:
                self._stall_after = self.requests[0].stall_after  # also for what is left to send
            if self._delivery.is_stalled(now, self._stall_after, self.written):
                self.drop(ClientStalled())

    def _expire(self, now: float) -> None:
        if self.phase is Phase.BODY:
            self.enter(Phase.BODY, None)
            slow = ProxyError(408, "slow_request", "The request body came too slowly.")
            self.requests[-1].refuse(slow)
        elif self.phase is Phase.CLOSING:
            self.enter(Phase.CLOSING, None)
            self._close()
        elif self.phase is Phase.HEAD:
            slow = ProxyError(408, "slow_request", "The request came too slowly.")
            self._refuse_connection(slow)
        elif self.phase is Phase.HANDSHAKE:
            if self.inside is not None:
                self.inside.late()
            self.abort()
        else:
            self.loseConnection()
