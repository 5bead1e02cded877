"""One request: what its client sent, and the only hand that writes, ends or breaks its response.

A :class:`Request` is Twisted's, with the parts replaced that a proxy cannot live with.  Its body is
held in bounded memory or streams, and never goes into a file.  The head of its response goes out in
one piece and without Twisted's defaults.  A response that breaks never ends as if it were whole
(ADR-0004).  A request knows its connection (Twisted's word is channel) and its site, and nothing of
providers, routes or dialects.

Twisted's own request asks the kernel for both addresses and makes four tables for each request,
which costs as much as reading a head (ADR-0011).  Here each is made when somebody asks for it.
What is leaned on is which attributes ``twisted.web.http.Request.__init__`` sets;
``tests/server/test_lazy.py`` fails when they change.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import cached_property
from typing import Any

from twisted.internet.defer import Deferred
from twisted.internet.interfaces import IProtocol
from twisted.python.failure import Failure
from twisted.web import http
from twisted.web.http_headers import Headers

from llmproxy.errors import ClientGone, ProxyError
from llmproxy.http1.framing import LAST_CHUNK, chunk
from llmproxy.http1.grammar import (
    NO_FIELDS,
    NO_VALUES,
    RequestHead,
    field_lines,
    is_persistent,
    parse_request_head,
)
from llmproxy.server.error_response import memory_full, status_line, too_large
from llmproxy.server.inside import Inside
from llmproxy.server.seen_heads import SeenHead, Sighting
from llmproxy.server.upload import Upload

_BODY_GRACE = 1 / 65536
"""Seconds that each received byte of a request body adds to ``request_body``."""

_NO_WAITERS: list[Deferred[None]] = []
_NO_PARTS: list[bytes] = []
"""Stand for those who wait for a request's end, and for its body's pieces, where there are none.

Nothing is added to them.
"""

_OK = 200

_END = b"\r\n"
"""What the lines of a head are joined with, and what ends the last one and the head."""


class Request(http.Request):
    """One request and the response to it.

    Args:
        channel: the connection that it came on.
        head: what stood before its body, or what is known of it.
        raw: the head as it came, where it is known; it is parsed only if somebody asks for fields.

    Attributes:
        fields: the header fields in their order, names in lower case.
        first: the first value of each name.
        body: the whole request body, where it is held.
        body_bytes: how much of it came so far.
        upload: the request body, where it streams.
        handler: what its head found to serve it; None once it does.
        seen: what is known of its head, which came before; or None.
        sighting: where what is known of its head may be kept; or None.
        kept: whatever the handler keeps with the request, from its head on.
        refusal: why the request cannot be served, where that is known before it is served.
        held: how many bytes of the body are held.
        owner: the client whose body it is, once that is known.
        inside: what its connection was opened to by CONNECT, if it was.
        caller: whatever the handler found out of its client before the body came.
        gone: called once with the reason where the client leaves before the response is whole.
        stall_after: seconds without progress after which a client that takes nothing is dropped.
        status: the status that was sent, or None.
        sent: bytes of the body that were written, but for what went out :meth:`verbatim`.
        ended: nothing will be written any more.
        is_over: it has ended, and the client has all of it or is gone.
    """

    # With those of the connection, 1.2 µs and 4 KiB of a request.  Twisted's attributes are among
    # them: one that is set later than those of the first instances gets a whole dictionary.
    __slots__ = (
        *("_disconnected", "_parsePOSTFormSubmission", "channel", "chunked", "client"),
        *("clientproto", "code", "finished", "method", "notifications", "path", "producer"),
        *("queued", "site", "startedWriting", "streamingProducer", "transport", "uri"),
        *("_bodiless", "_flows", "_head", "_is_whole", "_length", "_limit", "_parts", "_raw"),
        *("_served", "_waiting", "seen", "sighting"),
        *("body", "body_bytes", "caller", "ended", "fields"),
        *("first", "gone", "handler", "held", "inside", "is_over"),
        *("kept", "owner", "refusal", "sent", "stall_after", "status", "upload"),
    )
    defaultContentType = None  # noqa: N815 - Twisted's name; no text/html of its own
    channel: Any
    site: Any

    def __init__(self, channel: Any, head: RequestHead | SeenHead, raw: bytes = b"") -> None:
        # Twisted's own is not called: what it sets is set here, or made lazily below.
        self.channel = channel
        self.site = channel.site
        self.transport = channel.transport
        self.client = channel.peer
        self.inside: Inside | None = channel.inside
        self.notifications = _NO_WAITERS
        self.queued = self._disconnected = self._parsePOSTFormSubmission = False
        self.producer: Any = None
        self.streamingProducer = False
        self.code = _OK
        self.startedWriting = self.chunked = self.finished = 0
        # what came in
        self.method, self.uri = head.method, head.target
        self.clientproto = b"HTTP/1.1" if head.minor else b"HTTP/1.0"
        self.sighting: Sighting | None = None
        self.seen: SeenHead | None = None
        self._raw = raw
        self.handler: Any
        self.kept: Any
        if isinstance(head, RequestHead):
            self.fields, self.first = head.fields, head.first
            self.path = head.target.partition(b"?")[0]
            self.handler = channel.site.router.find(self.method, self.path)
            self.kept = None
        else:
            self.seen = head
            self.path, self.handler, self.kept = head.path, head.handler, head.kept
        self.body = b""
        self.body_bytes = 0
        self.upload: Upload | None = None
        self.refusal: ProxyError | None = None
        self._parts = _NO_PARTS
        self._limit = 0
        self.held = 0
        self.owner: str | None = None
        self.caller: Any = None
        self._served = False
        # what goes out
        self.gone: Callable[[ClientGone], None] | None = None
        self.stall_after: float | None = channel.site.timeouts.client_stall
        self.status: int | None = None
        self.sent = 0
        self.ended = False
        self.is_over = False
        self._waiting: Deferred[None] | None = None
        self._head = b""
        self._length: int | None = None
        self._bodiless = False
        self._flows = False  # the body has begun, and goes in the chunked coding
        self._is_whole = False  # its end is on the wire

    def __getattr__(self, name: str) -> Any:
        """Parse the head, if that is known and somebody asks for its fields all the same."""
        if name not in ("fields", "first"):
            raise AttributeError(name)
        head = parse_request_head(self._raw)
        self.fields, self.first = head.fields, head.first
        return getattr(self, name)

    # -- what Twisted's request has, made when it is asked for -------------------------------------

    @cached_property
    def host(self) -> Any:
        """Our address, as the client reached it."""
        return self.channel.getHost()

    @cached_property
    def requestHeaders(self) -> Headers:  # type: ignore[override]  # can be written all the same
        """Twisted's table of the request's fields."""
        headers = Headers()
        for name, value in self.fields:
            headers.addRawHeader(name, value)
        return headers

    @cached_property
    def responseHeaders(self) -> Headers:  # type: ignore[override]  # can be written all the same
        """The fields of a response that no head was given for."""
        return Headers()

    @cached_property
    def args(self) -> dict[bytes, list[bytes]]:  # type: ignore[override]  # can be written all the same
        """The query, parsed; nobody reads it."""
        return {}

    @cached_property
    def cookies(self) -> list[bytes]:  # type: ignore[override]  # can be written all the same
        """Cookies that a resource sets; none of ours does."""
        return []

    @cached_property
    def received_cookies(self) -> dict[bytes, bytes]:  # type: ignore[override]  # can be written all the same
        """The client's cookies; nobody reads them."""
        return {}

    # -- in -------------------------------------------------------------------------------------

    def drop_head(self) -> None:
        """Let go of the head; what is asked of it from now on is empty."""
        self.fields, self.first, self._raw, self.sighting = NO_FIELDS, NO_VALUES, b"", None

    def gotLength(self, length: int | None) -> None:
        """Bound the body before the first byte of it; ``length`` is what the head announces."""
        seen = self.seen
        self._limit = self.handler.body_limit(self) if seen is None else seen.body_limit
        if length is not None and length > self._limit:
            self.refusal = too_large(self._limit)

    def handleContentChunk(self, data: bytes) -> None:  # noqa: N802 - Twisted's name
        """Take one piece of the body: forward it, or hold it within the bounds."""
        if self.refusal is not None or self.ended:
            return
        site = self.site
        self.body_bytes += len(data)
        self.channel.deadline += len(data) * _BODY_GRACE
        if self.body_bytes > self._limit:
            self.refuse(too_large(self._limit))
        elif self.upload is not None:
            self.upload.feed(data)
        elif site.memory.hold(self, len(data)):
            if self._parts is _NO_PARTS:
                self._parts = [data]
            else:
                self._parts.append(data)
        else:
            self.refuse(memory_full())

    def holds_at_once(self, size: int, limit: int) -> bool:
        """Return whether a body that is here as a whole can be held; then it is."""
        if size > limit or not self.site.memory.hold(self, size):
            return False
        self._limit = limit
        return True

    def serve(self, body: bytes) -> None:
        """Serve the request with a whole body, which is held already."""
        self.body, self.body_bytes = body, len(body)
        self.process()

    def body_done(self) -> None:
        """The body is whole: serve the request, unless it is being served already."""
        if self.upload is not None:
            self.upload.end()
            return
        if self.owner is not None:
            self.site.memory.complete(self)
        self.body = self._parts[0] if len(self._parts) == 1 else b"".join(self._parts)
        self._parts = _NO_PARTS
        self.process()

    def refuse(self, error: ProxyError) -> None:
        """Refuse the request in the middle of its body; what still comes is dropped."""
        self.refusal = error
        self.release()
        if self.upload is None:
            self.channel.refuse_early(self)
        else:
            self.upload.fail(error)

    def limit_body(self, limit: int) -> None:
        """Bound the body by its route's own limit, now that the route is known.

        Raises:
            ProxyError: 413, where what came or what was announced is more.
        """
        announced = 0 if self.upload is None else self.upload.announced
        if max(announced, self.body_bytes) > limit:
            raise too_large(limit)
        self._limit = min(self._limit, limit)

    def belongs_to(self, owner: str) -> None:
        """Count the body, and what comes of it, as that of one client among several.

        Raises:
            ProxyError: 503, where that client holds too much.
        """
        if not self.site.memory.assign(self, owner):
            raise memory_full()

    def hold(self, count: int) -> None:
        """Count so many bytes more that are held with the whole body, until that is let go of.

        Raises:
            ProxyError: 503, where there is no room for them.
        """
        memory = self.site.memory
        if not memory.hold(self, count):
            raise memory_full()
        memory.complete(self)

    def release(self) -> None:
        """Let go of the body; what it held counts no more."""
        if self.owner is not None:
            self.site.memory.release(self)
        elif self.held:
            self.site.memory.held -= self.held
            self.held = 0
        self._parts = _NO_PARTS
        self.body = b""

    def keep_head(self, handler: Any, found: object) -> None:
        """Keep what was found out by the head alone, for the requests that have the same.

        Args:
            handler: what serves them.  It holds their bodies, as it does this one's.
            found: what it found out; nothing of the head that is secret.
        """
        if (sighting := self.sighting) is not None:
            stays = is_persistent(self.clientproto == b"HTTP/1.1", self.fields, self.first)
            sighting.keep(
                SeenHead(
                    method=self.method,
                    target=self.uri,
                    path=self.path,
                    minor=int(self.clientproto == b"HTTP/1.1"),
                    persistent=stays,
                    handler=handler,
                    kept=self.kept,
                    body_limit=handler.body_limit(self),
                    found=found,
                )
            )

    def process(self) -> None:
        """Let the handler serve the request; its body is held, refused or streams."""
        self._served = True
        handler, self.handler = self.handler, None  # a stream may outlive its configuration
        try:
            handler.render(self)
        except Exception:
            self.processingFailed(Failure())

    def processingFailed(self, reason: Failure) -> Failure:
        """An exception is a broken response, or a bare 500; never HTML, never in a stream."""
        self._log.failure("rendering failed", failure=reason)
        if self.startedWriting:
            self.break_off()
        else:
            self.start(500, [(b"content-length", b"0")])
            self.finish()
        return reason

    # -- out ------------------------------------------------------------------------------------

    def start(
        self, status: int, fields: Iterable[tuple[bytes, bytes]], phrase: str | None = None
    ) -> None:
        """Begin the response; the head leaves with the first bytes, or at :meth:`flush`.

        Args:
            fields: as they go on the wire, without framing but for a ``Content-Length``.
            phrase: in ASCII; stands behind the status instead of what is usual.
        """
        if self._disconnected or self.startedWriting:
            return
        self.startedWriting = 1
        self.status = self.code = status
        self._bodiless = self.method == b"HEAD" or status in (204, 304)
        fields = [*fields]
        if (length := dict(fields).get(b"content-length")) is not None:
            if status == 204:  # whoever reads one there waits for a body: RFC 9110, 8.6
                fields = [field for field in fields if field[0] != b"content-length"]
            else:
                self._length = int(length)
        head = [status_line(status), *field_lines(fields)]
        if phrase is not None:
            head[0] = b"HTTP/1.1 %d %b" % (status, phrase.encode("ascii"))
        if self._length is None and not self._bodiless:
            if self.clientproto == b"HTTP/1.1":
                self.chunked = 1
                head.append(b"transfer-encoding: chunked")
            else:
                self.channel.persistent = 0
        is_unread = self.upload is not None and not self.upload.complete
        # What follows a refused handshake may be of the protocol that the client asked for.
        if self.site.draining or is_unread or status == 426:
            self.channel.persistent = 0
        if not self.channel.persistent:
            head.append(b"connection: close")
        head.append(_END)
        self._head = _END.join(head)

    def flush(self) -> None:
        """Send the head now, where nothing has taken it along."""
        if self._head and not self._disconnected:
            head, self._head = self._head, b""
            self.channel.write(head)

    def write(self, data: bytes) -> None:
        """Put one piece of the body on the wire."""
        if self._disconnected or self.ended:
            return
        if not self.startedWriting:
            names = self.responseHeaders.getAllRawHeaders()
            self.start(self.code, [(n.lower(), v) for n, values in names for v in values])
        if not data or self._bodiless:
            return
        self.sent += len(data)
        if self.chunked:
            data = chunk(data)
        if self._head:
            data, self._head = self._head + data, b""
        self._flows = bool(self.chunked)
        self.channel.write(data)

    def write_last(self, data: bytes) -> None:
        """Put the last piece of the body on the wire, with the end that :meth:`finish` reports."""
        if not data or self._disconnected or self.ended or self._bodiless:
            self.write(data)
            return
        self.sent += len(data)
        head, self._head = self._head, b""
        if self.chunked:
            self._is_whole = True
            self.channel.write(b"".join((head, chunk(data), LAST_CHUNK)))
        else:
            self.channel.write(head + data)

    def verbatim(self) -> Callable[[bytes], object] | None:
        """Return what puts chunks of the chunked coding on the wire as they are.

        None until the first piece of a body in that coding is written, and where a transport does
        not count what is written to it.
        """
        return self.channel.verbatim if self._flows else None

    def when_sent(self, call: Callable[[], object]) -> None:
        """Call ``call`` once the kernel has all that was written, at once where it has."""
        if self.channel is not None:
            self.channel.when_sent(call)

    def registerProducer(self, producer: Any, streaming: bool) -> None:
        """Register; a producer that comes while the wire is full is paused at once.

        One that comes when the client has left is stopped, as Twisted's transports do.
        """
        if self.channel is None:
            producer.stopProducing()
            return
        super().registerProducer(producer, streaming)
        if self.channel.is_full:
            producer.pauseProducing()

    def unregisterProducer(self) -> None:
        """Unregister, also after the client has left."""
        if self.channel is not None:
            self.channel.unregisterProducer()
        self.producer = None

    # -- the end --------------------------------------------------------------------------------

    @property
    def is_unframed(self) -> bool:
        """Whether the end of the connection would now be the end of the response's body."""
        framed = bool(self.chunked) or self._length is not None or self._bodiless
        return bool(self.startedWriting) and not framed and not self.ended

    def finish(self) -> None:
        """End the response as whole; one that is short of its length is broken off instead."""
        if self.ended or self._disconnected:
            return
        if not self.startedWriting:
            self.write(b"")
        if self._length is not None and self.sent != self._length and not self._bodiless:
            self.break_off()
            return
        self.flush()
        if self.chunked and not self._is_whole:
            self.channel.write(LAST_CHUNK)
        self._end()
        self._part(self.channel.requestDone)

    def notifyFinish(self) -> Deferred[None]:
        """Return what fires when the response is written, and fails if the client leaves before."""
        if self.notifications is _NO_WAITERS:
            self.notifications = []
        return super().notifyFinish()

    def when_delivered(self) -> Deferred[None] | None:
        """Return when the client has the response that was ended; None where it has it already.

        Returns:
            fires when the client's kernel has acknowledged every byte.  It fails with
            ``ClientGone``, of whatever kind, where the connection ends before that.
        """
        if self.is_over:
            return None
        self._waiting = Deferred()
        return self._waiting

    def delivered(self) -> None:
        """The client has the response."""
        if not self.is_over:
            self.is_over = True
            self.site.ended += self._served
            if self._waiting is not None:
                waiting, self._waiting = self._waiting, None
                waiting.callback(None)

    def break_off(self) -> None:
        """End the response so that the client cannot take it for whole.

        What was written already still goes out first, under ``client_stall``.
        """
        if self.ended or self._disconnected:
            return
        self.flush()
        unframed = self.is_unframed
        self._end()
        self._part(self.channel.request_broken if unframed else self.channel.request_cut)

    def abort(self, why: ClientGone) -> None:
        """Drop the client at once, for a reason of ours."""
        channel = self.channel
        self.leave(why)
        if channel is not None:
            channel.abort()

    def connectionLost(self, reason: Failure) -> None:
        """The client's connection is gone."""
        self.leave(ClientGone(reason.getErrorMessage()))
        if self.channel is not None:
            super().connectionLost(reason)

    def hand_over(
        self,
        status: int,
        fields: Iterable[tuple[bytes, bytes]],
        protocol: IProtocol,
        *,
        behind: bytes = b"",
    ) -> None:
        """End the request with a head alone, and let ``protocol`` have the client's socket.

        The head goes out first.  Then ``protocol`` is connected to a transport
        (``server/hand_over.py``) that it can write to, pause, close and abort, and gets the bytes
        that came behind the request before any others.  No deadline of HTTP's applies any more.

        The connection is still its site's: it is counted until it is gone, and ``Site.cut`` drops
        it.  ``connectionLost`` is called once: with ``Cut`` or ``ClientStalled`` where we drop it,
        else with the transport's reason.  If ``protocol`` is an ``IHalfCloseableProtocol``, the
        sides end one by one.  An exception of its own ends the connection.

        Args:
            status: such as 101, or 200 for CONNECT.
            fields: as they go on the wire; no framing is added.
            protocol: gets the socket.
            behind: bytes of the protocol that leave together with the head.

        Raises:
            ClientGone: the client has left.
            ProxyError: 400, where more has come behind the request than can be kept; the request
                can still be responded to.
            RuntimeError: the response has begun, or the request's body is not whole.
        """
        head = self._last_head(status, fields) + behind
        channel = self.channel
        self._end()
        self._part(lambda request: channel.hand_over(request, head, protocol))

    def turn_inside(self, fields: Iterable[tuple[bytes, bytes]], inside: Inside) -> None:
        """Respond to a CONNECT with 200, and go on with this site instead of a tunnel.

        The connection is its site's as before.  What its client says next decides whether TLS is
        ended here (``server/inside.py``); then requests are served, which know ``inside`` by their
        connection.  For the handshake the client has ``request_head``.

        Args:
            fields: as they go on the wire; no framing is added.
            inside: what the client asked for.

        Raises:
            ClientGone, ProxyError, RuntimeError: as :meth:`hand_over`.
        """
        head = self._last_head(200, fields)
        channel = self.channel
        self._end()
        self._part(lambda request: channel.turn_inside(request, head, inside))

    def _last_head(self, status: int, fields: Iterable[tuple[bytes, bytes]]) -> bytes:
        """Begin a response that is a head alone, behind which HTTP ends for now; return the head.

        Raises:
            ClientGone, ProxyError, RuntimeError: as :meth:`hand_over`.
        """
        if self.ended or self._disconnected:
            raise ClientGone("the client has left")
        channel = self.channel
        if self.startedWriting or not channel.is_serving:
            raise RuntimeError("a socket is handed over before a response, and behind a whole body")
        if channel.has_dropped:
            text = "More came behind the request than is kept until it is responded to."
            raise ProxyError(400, "early_data", text)
        # Neither 1xx nor a 2xx to CONNECT has a length (RFC 9110, 8.6): what follows is no body.
        fields = [field for field in fields if field[0] != b"content-length"]
        head = _END.join([status_line(status), *field_lines(fields), _END])
        self.startedWriting = 1
        self.status = self.code = status
        return head

    def leave(self, why: ClientGone) -> None:
        """The client is gone, or is being dropped: report that to what serves the request."""
        if not self.ended:
            gone = self.gone
            self._end()
            if not self._served:
                self.site.abandoned(self, why)
            if gone is not None:
                gone(why)
        if not self.is_over:
            self.is_over = True
            self.site.ended += self._served
            if self._waiting is not None:
                waiting, self._waiting = self._waiting, None
                waiting.errback(why)

    def _end(self) -> None:
        """Write no more, and let go of the body."""
        self.ended = True
        self.gone = None  # it leads to what serves this request, and that leads here
        self._flows = False
        self.finished = 1
        self.release()
        if self.upload is not None:
            self.upload.stopProducing()  # where none took it, the client was not read from so far

    def _part(self, leave: Callable[[Request], None]) -> None:
        """Leave the connection by one of its methods, and fire what waits for the end."""
        if self.producer is not None:
            self.unregisterProducer()
        self.channel = None
        leave(self)
        waiting, self.notifications = self.notifications, _NO_WAITERS
        for deferred in waiting:
            deferred.callback(None)
