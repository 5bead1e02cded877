"""What a client sends, read: heads and bodies become requests, strictly (RFC 9110 and 9112).

This is the reading half of a connection; ``server/connection.py`` adds how it is written to and
ends. Nothing is parsed by Twisted: its reader repairs what must be refused (ADR-0007).  What
follows a request that is being served is kept, up to the size of a head, and never hides that the
client leaves::

    HANDSHAKE --> IDLE
    IDLE --a byte--> HEAD --its end--> BODY --its end--> SERVING --response's end--> IDLE | CLOSING
"""

from __future__ import annotations

import math
import re
from typing import Any

from twisted.web import http

from llmproxy.errors import ProxyError
from llmproxy.http1.framing import ChunkedReader, LengthReader
from llmproxy.http1.grammar import (
    BadMessage,
    RequestHead,
    field_values,
    is_chunked,
    list_tokens,
    parse_length,
    parse_request_head,
)
from llmproxy.net.transport import has_peer_left
from llmproxy.server.progress import Phase
from llmproxy.server.request import Request
from llmproxy.server.upload import Upload

_HANDSHAKE, _IDLE, _HEAD, _BODY, _SERVING, _CLOSING = Phase  # found faster than members (ADR-0011)

_BARE_LF = re.compile(rb"(?<!\r)\n")
_WATCH = 0.05
"""Seconds between looks at a client that is not read from."""

_NOTHING: list[bytes] = []
_REASONS = {414: "target_too_long", 431: "head_too_large", 501: "coding", 505: "version"}


class Receiver(http.HTTPChannel):
    """Reads requests from one client.

    Args:
        site: the listener's factory: its limits, timeouts and clock.

    Attributes:
        deadline: monotonic seconds at which the present phase is over, or infinity.
        phase: where the connection stands.
        address: the client's, where it is known.
    """

    __slots__ = (
        *("_advancing", "_buffer", "_discarding", "_invited", "_reader", "_seen", "_skips_line"),
        *("_upload_left", "_upload_paused_at", "_watch", "address", "deadline", "phase", "site"),
    )
    site: Any
    address: str | None
    transport: Any
    _networkProducer: Any

    def __init__(self, site: Any) -> None:
        super().__init__()
        self.site = site
        self.factory = site
        self.timeOut = None
        self.phase = _IDLE
        self.deadline = math.inf
        self._buffer = b""
        self._advancing = False
        self._reader: ChunkedReader | LengthReader = LengthReader(0)
        self._seen = 0
        self._skips_line = True
        self._invited = True
        self._upload_paused_at: float | None = None
        self._upload_left = 0.0
        self._watch: Any = None
        self._discarding = False

    def enter(self, phase: Phase, seconds: float | None) -> None:
        """Begin a phase that may last so many seconds."""
        self.phase = phase
        self.deadline = math.inf if seconds is None else self.site.clock() + seconds

    def abort(self) -> None:
        """Drop the connection; see ``front.channel``."""
        raise NotImplementedError

    def identify(self) -> None:
        """Find out where the client is; see ``front.channel``."""
        raise NotImplementedError

    def tell_and_close(self, error: ProxyError) -> None:
        """Answer where there is no request yet that could; see ``front.channel``."""
        raise NotImplementedError

    # -- in -------------------------------------------------------------------------------------

    def dataReceived(self, data: bytes) -> None:
        """Take bytes, split at any point."""
        if self._discarding or self.phase is _CLOSING:
            return
        self._buffer += data
        if not self._advancing:
            self._advancing = True
            try:
                while self._advance():
                    pass
            finally:
                self._advancing = False

    def _advance(self) -> bool:
        """Take one step with what is buffered; return whether another may follow."""
        if self._discarding or self.phase is _CLOSING:
            self._buffer = b""
            return False
        if self.phase is _BODY:
            return self._read_body()
        if self.phase is _SERVING:
            return self._keep_pipelined()
        return self._read_head()

    def _read_head(self) -> bool:
        if self.phase is _IDLE:
            if self._skips_line:  # one empty line before a request: RFC 9112, section 2.2
                if self._buffer == b"\r":
                    return False
                self._skips_line = not self._buffer.startswith(b"\r\n")
                self._buffer = self._buffer.removeprefix(b"\r\n")
            if not self._buffer:
                return False
            self.enter(_HEAD, self.site.timeouts.request_head)
            if self.address is None:
                self.identify()
                if self._discarding:
                    return False
        longest = self.site.limits.request_head
        seen, self._seen = self._seen, len(self._buffer)
        end = self._buffer.find(b"\r\n\r\n", max(0, seen - 3), longest + 4)
        try:
            if end >= 0:
                self._seen = 0
                head, self._buffer = self._buffer[:end], self._buffer[end + 4 :]
                self._begin(parse_request_head(head))
                return True
            if len(self._buffer) > longest + 3:
                in_first = b"\r\n" not in self._buffer[:longest]
                raise BadMessage("the request's head is too long", 414 if in_first else 431)
            if _BARE_LF.search(self._buffer, max(0, seen - 1)):
                raise BadMessage("a line does not end with CRLF")
        except BadMessage as error:
            self._refuse_head(error)
        return False

    def _refuse_head(self, error: BadMessage) -> None:
        text = f"The request is not acceptable: {error}."
        self.tell_and_close(ProxyError(error.status, _REASONS.get(error.status, "malformed"), text))

    def _begin(self, head: RequestHead) -> None:
        """The head is in: refuse what is too large before a byte of it is asked for."""
        self._reader = request_body(head)
        request = Request(self)
        request.take_head(head)
        self.requests.append(request)
        self._skips_line = True
        self._handlingRequest = True
        self.persistent = head.minor == 1
        if b"connection" in head.first:
            options = list_tokens(field_values(head.fields, b"connection"))
            self.persistent = self.persistent and b"close" not in options
        self.enter(_BODY, self.site.timeouts.request_body)
        length = self._reader.left if isinstance(self._reader, LengthReader) else None
        request.gotLength(length)
        expected = _NOTHING
        if b"expect" in head.first:
            expected = list_tokens(field_values(head.fields, b"expect"))
        if request.refusal is None and expected not in ([], [b"100-continue"]):
            request.refusal = ProxyError(417, "expectation", "This expectation cannot be met.")
        if length == 0:
            self._body_done()
        elif request.refusal is not None:
            self.refuse_early(request)
        else:
            self._take_body(request, length, expected)

    def _take_body(self, request: Request, length: int | None, expected: list[bytes]) -> None:
        """Hold the body, or begin to serve the request while its body streams."""
        refusal = None if self._has_whole_body(length) else self.site.early_refusal(request)
        if refusal is not None:
            request.refuse(refusal)
            return
        self._invited = not expected or request.clientproto == b"HTTP/1.0"
        if self.site.holds_body(request):
            self.invite_upload()
        else:
            request.upload = Upload(self, length)
            request.process()

    def _has_whole_body(self, length: int | None) -> bool:
        return length is not None and len(self._buffer) >= length

    def _read_body(self) -> bool:
        data, self._buffer = self._buffer, b""
        content = self._reader.feed(data)
        request = self.requests[0]
        if content:
            request.handleContentChunk(content)
        if self._reader.error is not None and not self._discarding:
            request.refuse(ProxyError(400, "malformed", f"The body is bad: {self._reader.error}."))
        elif self._reader.done and not self._discarding:
            self._buffer = self._reader.extra
            self._body_done()
            return True
        return False

    def _body_done(self) -> None:
        self.enter(_SERVING, None)
        self.requests[0].body_done()

    def _keep_pipelined(self) -> bool:
        """Keep a little of what follows; who sends more is read from, but not served any more."""
        if len(self._buffer) > self.site.limits.request_head:
            self._discarding = True
            self._buffer = b""
        return False

    def refuse_early(self, request: Request) -> None:
        """Serve a request whose body is refused: what still comes is dropped."""
        self._discarding = True
        self.persistent = False
        self.enter(_SERVING, None)
        request.process()

    # -- a body that streams (server.upload.Reading) ---------------------------------------------

    def pause_upload(self) -> None:
        """Read no more for now; the body's deadline stands still."""
        if self._upload_paused_at is None and self.phase is _BODY:
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
            self.deadline = self.site.clock() + self._upload_left
            self._networkProducer.resumeProducing()

    def _watch_unread(self) -> None:
        """Look whether a client that is not read from has left; reading would be what tells."""
        if has_peer_left(self.transport):
            self.abort()
        self._watch = self.site.reactor.callLater(_WATCH, self._watch_unread)

    def invite_upload(self) -> None:
        """Tell a client that waits for it that the body may come (RFC 9110, section 10.1.1)."""
        if not self._invited:
            self._invited = True
            self._send100Continue()

    def resumeProducing(self) -> None:
        """The client takes bytes again; an upload that waits goes on waiting."""
        super().resumeProducing()
        if self._upload_paused_at is not None:
            self._networkProducer.pauseProducing()


def request_body(head: RequestHead) -> ChunkedReader | LengthReader:
    """Return what reads the body behind ``head`` (RFC 9112, section 6.3).

    Raises:
        BadMessage: 400 where it is framed twice or in a way that its version lacks, 501 for a
            transfer coding that is not known.
    """
    length = None
    if b"content-length" in head.first:
        length = parse_length(field_values(head.fields, b"content-length"))
    if b"transfer-encoding" not in head.first:
        return LengthReader(length or 0)
    coding = field_values(head.fields, b"transfer-encoding")
    if length is not None or head.minor == 0:
        raise BadMessage("Transfer-Encoding beside a Content-Length, or in HTTP/1.0")
    if not is_chunked(coding):
        raise BadMessage("a transfer coding other than chunked", 501)
    return ChunkedReader()
