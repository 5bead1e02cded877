"""One request as a client sent it, and the only hand that writes, ends or breaks off its response.

A :class:`Request` is Twisted's, with the parts replaced that a proxy cannot live with: the head
goes out in one piece and without Twisted's defaults, and a response that breaks never ends as if it
were whole (ADR-0004).  How it came in is ``server/incoming.py``.  It knows its channel and its
site, and nothing of providers, routes or dialects.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from twisted.python.failure import Failure

from llmproxy.errors import ClientGone
from llmproxy.http1.framing import LAST_CHUNK
from llmproxy.server.error_response import status_line
from llmproxy.server.incoming import Incoming


class Request(Incoming):
    """One request and the response to it.

    Attributes:
        gone: called once with the reason where the client leaves before the response is whole.
        stall_after: seconds without progress after which a client that takes nothing is dropped.
        status: the status that was sent, or None.
        sent: bytes of the body that were written, but for what went out :meth:`verbatim`.
    """

    __slots__ = ("_bodiless", "_flows", "_head", "_length", "gone", "sent", "stall_after", "status")
    defaultContentType = None  # noqa: N815 - Twisted's name; no text/html of its own

    def __init__(self, channel: Any) -> None:
        super().__init__(channel)
        self.gone: Callable[[ClientGone], None] | None = None
        self.stall_after: float | None = channel.site.timeouts.client_stall
        self.status: int | None = None
        self.sent = 0
        self._length: int | None = None
        self._head = b""
        self._bodiless = False
        self._flows = False

    # -- out ------------------------------------------------------------------------------------

    def start(self, status: int, fields: Iterable[tuple[bytes, bytes]]) -> None:
        """Begin the response; the head leaves with the first bytes, or at :meth:`flush`.

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
            size = len(data)
            self.sent += size
            self.channel.write(b"%x\r\n%b\r\n" % (size, data))
            return
        if self._disconnected or self.ended:
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
        if self.chunked:
            self.channel.write(LAST_CHUNK)
        self._close_books()
        self._part(self.channel.requestDone)

    def break_off(self) -> None:
        """End the response so that the client cannot take it for whole.

        What was written already still goes out first, under ``client_stall``.
        """
        if self.ended or self._disconnected:
            return
        self.flush()
        unframed = self.is_unframed
        self._close_books()
        self._part(self.channel.request_broken if unframed else self.channel.request_cut)

    @property
    def is_unframed(self) -> bool:
        """Whether the end of the connection would now be the end of the response's body."""
        framed = bool(self.chunked) or self._length is not None or self._bodiless
        return bool(self.startedWriting) and not framed and not self.ended

    def abort(self, why: ClientGone) -> None:
        """Drop the client at once, for a reason of ours."""
        if not self.ended and not self._disconnected:
            channel = self.channel
            self._leave(why)
            channel.abort()

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

    def processingFailed(self, reason: Failure) -> Failure:
        """An exception is a broken response, or a bare 500; never HTML, never in a stream."""
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
        if not self.ended:
            gone = self.gone
            self._close_books()
            if not self._served:
                self.site.abandoned(self, why)
            if gone is not None:
                gone(why)

    def _close_books(self) -> None:
        self.ended = True
        self.gone = None  # it knows whoever serves this request, who knows it
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
        waiting, self.notifications = self.notifications, []
        for deferred in waiting:
            deferred.callback(None)
