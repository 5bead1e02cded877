"""One request as a client sent it, and the only hand that writes, ends or breaks off its answer.

A :class:`Request` is Twisted's, with the parts replaced that a proxy cannot live with: the head
goes out in one piece and without Twisted's defaults, the body is held in bounded memory and never
in a file, and an answer that breaks never ends as if it were whole (ADR-0004).  It knows its
channel and its site, and nothing of providers, routes or dialects.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from twisted.python.failure import Failure

from llmproxy.errors import ClientGone, ProxyError
from llmproxy.front.lazy import LazyRequest
from llmproxy.front.refusal import memory_full, status_line, too_large
from llmproxy.front.upload import Upload
from llmproxy.wire.framing import LAST_CHUNK
from llmproxy.wire.grammar import RequestHead

_BODY_GRACE = 1 / 65536
"""Seconds that each received byte of a request body adds to ``request_body``."""


class Request(LazyRequest):
    """One request and the answer to it.

    Attributes:
        first: the first value of each name.
        body: the whole request body, where it is held.
        upload: the request body, where it streams.
        refusal: why the request cannot be served, where the wire knows already.
        gone: called once with the reason where the client leaves before the answer is whole.
        stall_after: seconds without progress after which a client that takes nothing is dropped.
        status: the status that was sent, or None.
        sent: bytes of the body that were written.
    """

    __slots__ = (
        *("_bodiless", "_ended", "_flows", "_head", "_held", "_length", "_limit", "_parts"),
        *("_served", "body", "body_bytes", "first", "gone", "refusal", "sent", "stall_after"),
        *("status", "upload"),
    )
    defaultContentType = None  # noqa: N815 - Twisted's name; no text/html of its own

    def __init__(self, channel: Any) -> None:
        super().__init__(channel)
        self.first: dict[bytes, bytes] = {}
        self.body = b""
        self.upload: Upload | None = None
        self.refusal: ProxyError | None = None
        self.gone: Callable[[ClientGone], None] | None = None
        self.stall_after: float | None = channel.site.timeouts.client_stall
        self.status: int | None = None
        self.sent = 0
        self.body_bytes = 0
        self._parts: list[bytes] = []
        self._limit = 0
        self._held = 0
        self._length: int | None = None
        self._head = b""
        self._bodiless = False
        self._ended = False
        self._served = False
        self._flows = False

    # -- in -------------------------------------------------------------------------------------

    def gotLength(self, length: int | None) -> None:
        """The head is in: bound the body before the first byte of it."""
        self._limit = self.site.body_limit(self.uri)
        if length is not None and length > self._limit:
            self.refusal = too_large(self._limit)

    def handleContentChunk(self, data: bytes) -> None:  # noqa: N802 - Twisted's name
        """Take one piece of the body: pass it on, or hold it within the bounds."""
        if self.refusal is not None or self._ended:
            return
        site = self.site
        self.body_bytes += len(data)
        self.channel.deadline += len(data) * _BODY_GRACE
        if self.body_bytes > self._limit:
            self.refuse(too_large(self._limit))
        elif self.upload is not None:
            self.upload.feed(data)
        elif site.held_bytes + len(data) > site.limits.request_memory:
            self.refuse(memory_full())
        else:
            self._parts.append(data)
            self._held += len(data)
            site.held_bytes += len(data)

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

    def release(self) -> None:
        """Let go of the body; what it held counts no more."""
        self.site.held_bytes -= self._held
        self._held = 0
        self._parts = []
        self.body = b""

    def take_head(self, head: RequestHead) -> None:
        """Take over what the head says."""
        self.method, self.uri, minor, self.fields, self.first = head
        self.clientproto = b"HTTP/1.1" if minor else b"HTTP/1.0"
        self.path = head.target.partition(b"?")[0]
        self.args = {}

    def body_done(self) -> None:
        """The body is in: serve the request, unless it is being served already."""
        if self.upload is not None:
            self.upload.end()
            return
        self.body = self._parts[0] if len(self._parts) == 1 else b"".join(self._parts)
        self._parts = []
        self.process()

    def process(self) -> None:
        """Find the resource and render it; the body is held, refused or streams."""
        self._served = True
        resource = self.site.resource
        try:
            if not resource.isLeaf:
                self.prepath: list[bytes] = []
                self.postpath = self.path[1:].split(b"/")
                resource = self.site.getResourceFor(self)
            self.render(resource)
        except Exception:
            self.processingFailed(Failure())

    # -- out ------------------------------------------------------------------------------------

    def start(self, status: int, fields: Iterable[tuple[bytes, bytes]]) -> None:
        """Begin the answer; the head leaves with the first bytes, or at :meth:`flush`.

        Args:
            fields: as they go on the wire, without framing but for a ``Content-Length``.
        """
        if self._disconnected or self.startedWriting:
            return
        self.startedWriting = 1
        self.status = self.code = status
        self._bodiless = self.method == b"HEAD" or status in (204, 304)
        head = [status_line(status)]
        for name, value in fields:
            head += (name, b": ", value, b"\r\n")
            if name == b"content-length":
                self._length = int(value)
        if self._length is None and not self._bodiless:
            if self.clientproto == b"HTTP/1.1":
                self.chunked = 1
                head.append(b"transfer-encoding: chunked\r\n")
            else:
                self.channel.persistent = 0
        if self.site.draining or (self.upload is not None and not self.upload.complete):
            self.channel.persistent = 0
        if not self.channel.persistent:
            head.append(b"connection: close\r\n")
        head.append(b"\r\n")
        self._head = b"".join(head)

    def flush(self) -> None:
        """Send the head now, where nothing has taken it along."""
        if self._head and not self._disconnected:
            head, self._head = self._head, b""
            self.channel.write(head)

    def write(self, data: bytes) -> None:
        """Put one piece of the body on the wire."""
        if self._flows and data:
            self.sent += len(data)
            self.channel.write(b"%x\r\n%b\r\n" % (len(data), data))
            return
        if self._disconnected or self._ended:
            return
        if not self.startedWriting:
            names = self.responseHeaders.getAllRawHeaders()
            self.start(self.code, [(n.lower(), v) for n, values in names for v in values])
        if not data or self._bodiless:
            return
        self.sent += len(data)
        if self.chunked:
            data = b"%x\r\n%b\r\n" % (len(data), data)
        if self._head:
            data, self._head = self._head + data, b""
        self._flows = bool(self.chunked)
        self.channel.write(data)

    def finish(self) -> None:
        """End the answer as whole; one that is short of its length is broken off instead."""
        if self._ended or self._disconnected:
            return
        if not self.startedWriting:
            self.write(b"")
        if self._length is not None and self.sent != self._length and not self._bodiless:
            self.break_off()
            return
        self.flush()
        if self.chunked:
            self.channel.write(LAST_CHUNK)
        self._close_books()
        self._part(self.channel.requestDone)

    def break_off(self) -> None:
        """End the answer so that the client cannot take it for whole.

        What was written already still goes out first, under ``client_stall``.
        """
        if self._ended or self._disconnected:
            return
        self.flush()
        unframed = self.is_unframed
        self._close_books()
        self._part(self.channel.request_broken if unframed else self.channel.request_cut)

    @property
    def is_unframed(self) -> bool:
        """Whether the end of the connection would now be the end of the answer's body."""
        framed = bool(self.chunked) or self._length is not None or self._bodiless
        return bool(self.startedWriting) and not framed and not self._ended

    def abort(self, why: ClientGone) -> None:
        """Drop the client at once, for a reason of ours."""
        if not self._ended and not self._disconnected:
            channel = self.channel
            self._leave(why)
            channel.abort()

    def registerProducer(self, producer: Any, streaming: bool) -> None:
        """Register; a producer that comes while the wire is full is paused at once."""
        super().registerProducer(producer, streaming)
        if self.channel.is_full:
            producer.pauseProducing()

    def unregisterProducer(self) -> None:
        """Unregister, also after the client has left."""
        if self.channel is not None:
            self.channel.unregisterProducer()
        self.producer = None

    def processingFailed(self, reason: Failure) -> Failure:
        """An exception is a broken answer, or a bare 500; never HTML, never in a stream."""
        self._log.failure("rendering failed", failure=reason)
        if self.startedWriting:
            self.break_off()
        else:
            self.start(500, [(b"content-length", b"0")])
            self.finish()
        return reason

    def connectionLost(self, reason: Failure) -> None:
        """The client's connection is gone."""
        self._leave(ClientGone(reason.getErrorMessage()))
        super().connectionLost(reason)

    def _leave(self, why: ClientGone) -> None:
        if not self._ended:
            self._close_books()
            if not self._served:
                self.site.abandoned(self, why)
            gone, self.gone = self.gone, None
            if gone is not None:
                gone(why)

    def _close_books(self) -> None:
        self._ended = True
        self._flows = False
        self.finished = 1
        self.site.ended += self._served
        self.release()

    def _part(self, tell: Callable[[Request], None]) -> None:
        """Leave the channel, in the way that ``tell`` says, and whoever waits for the end."""
        if self.producer is not None:
            self.unregisterProducer()
        self.channel = None
        tell(self)
        while self.notifications:
            self.notifications.pop(0).callback(None)
