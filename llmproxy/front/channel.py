"""One client connection: Twisted's channel, with deadlines, early refusals and honest endings.

Every phase of a connection has a deadline that bytes do not push back.  Deadlines are numbers on
the channel; its site looks at them in one sweep::

    IDLE --a byte--> HEAD --its end--> BODY --its end--> SERVING --answer's end--> IDLE | CLOSING

A channel knows its site and its requests, and nothing of what they are for.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

from twisted.internet.protocol import connectionDone
from twisted.python.failure import Failure
from twisted.web import http

from llmproxy.errors import ClientStalled, ProxyError
from llmproxy.front.progress import Phase, Progress
from llmproxy.front.request import Request, bare_answer
from llmproxy.front.upload import Upload
from llmproxy.wire.grammar import MAX_FIELDS, field_values, list_tokens
from llmproxy.wire.transport import pending_bytes, unacknowledged_bytes

_LINGER = 2.0
"""Seconds for which a refused upload is read and dropped, so that the refusal can be read."""

_CLOSE_GRACE = 5.0
"""Seconds that a closing connection with nothing left to send may take, as TLS's farewell does."""

_DRAIN_POLL = 0.02
"""Seconds between looks at a send queue that must empty before a reset."""


class Channel(http.HTTPChannel):
    """One client connection.

    Attributes:
        deadline: monotonic seconds at which the present phase is over, or infinity.
        phase: where the connection stands.
    """

    site: Any
    transport: Any
    _networkProducer: Any
    maxHeaders = MAX_FIELDS

    def __init__(self, site: Any) -> None:
        super().__init__()
        self.site = site
        self.factory = site
        self.requestFactory = Request
        self.timeOut = None
        self.totalHeadersSize = self.MAX_LENGTH = site.limits.request_head
        self.phase = Phase.IDLE
        self.deadline = math.inf
        self._invited = True
        self._upload_paused_at: float | None = None
        self._upload_left = 0.0
        self._discarding = False
        self._lingering = False
        self._poll: Any = None
        self._stall_after = site.timeouts.client_stall
        self._progress = Progress()

    # -- the life of the socket -----------------------------------------------------------------

    def connectionMade(self) -> None:
        """Begin to wait for a request."""
        super().connectionMade()
        self.site.joined(self)
        self._enter(Phase.IDLE, self.site.timeouts.client_idle)

    def connectionLost(self, reason: Failure = connectionDone) -> None:
        """Tell the running request, if any."""
        if self._poll is not None:
            self._poll.cancel()
            self._poll = None
        try:
            super().connectionLost(reason)
        finally:
            self.site.left(self)  # last: whoever waits for it finds the request recorded

    def abort(self) -> None:
        """Drop the connection and whatever it still holds."""
        self.transport.abortConnection()

    def loseConnection(self) -> None:
        """Write out what is queued, then close; whoever takes nothing is dropped by the sweep."""
        self._enter(Phase.CLOSING, _CLOSE_GRACE)
        super().loseConnection()

    @property
    def is_full(self) -> bool:
        """Whether the transport asked for no more."""
        return bool(self._waitingForTransport)

    def _enter(self, phase: Phase, seconds: float | None) -> None:
        self.phase = phase
        self.deadline = math.inf if seconds is None else self.site.clock() + seconds

    # -- in -------------------------------------------------------------------------------------

    def dataReceived(self, data: bytes) -> None:
        """Take bytes; the first of a head starts its clock."""
        if self._discarding or self.phase is Phase.CLOSING:
            return
        if self.phase is Phase.IDLE:
            self._enter(Phase.HEAD, self.site.timeouts.request_head)
        super().dataReceived(data)

    def rawDataReceived(self, data: bytes) -> None:
        """Take bytes of a body, or drop them where the request was refused."""
        if not self._discarding:
            super().rawDataReceived(data)

    def headerReceived(self, line: bytes) -> bool:
        """Keep the field in its place, too; Twisted's own headers know no order across names."""
        if not super().headerReceived(line):
            return False
        name, _, value = line.partition(b":")
        self.requests[-1].fields.append((name.lower(), value.strip(b" \t")))
        return True

    def allHeadersReceived(self) -> None:
        """The head is in: refuse what is too large before a byte of it is asked for."""
        request = self.requests[-1]
        self.persistent = self.checkPersistence(request, self._version)
        self._enter(Phase.BODY, self.site.timeouts.request_body)
        request.gotLength(self.length)
        if request.refusal is not None:
            self.refuse_early(request)
        elif self.length != 0:
            self._take_body(request)

    def checkPersistence(  # noqa: N802 - Twisted's name
        self, request: Request, version: bytes
    ) -> bool:
        """Read ``Connection`` as the list that it is, over all its lines (RFC 9110, 7.6.1)."""
        options = list_tokens(field_values(request.fields, b"connection"))
        return version == b"HTTP/1.1" and b"close" not in options

    def allContentReceived(self) -> None:
        """The body is in: serve the request."""
        if self._discarding:
            return
        self._enter(Phase.SERVING, None)
        super().allContentReceived()

    def _take_body(self, request: Request) -> None:
        """Hold the body, or begin to serve the request while its body streams."""
        expected = list_tokens(field_values(request.fields, b"expect"))
        if expected not in ([], [b"100-continue"]):
            request.refusal = ProxyError(417, "expectation", "This expectation cannot be met.")
            self.refuse_early(request)
            return
        self._invited = not expected or self._version == b"HTTP/1.0"
        if self.site.holds_body(request.fields, self._path):
            self.invite_upload()
        else:
            request.upload = Upload(self, self.length)
            request.serve(self._command, self._path, self._version)

    # -- a body that streams (front.upload.Reading) ---------------------------------------------

    def pause_upload(self) -> None:
        """Read no more for now; the body's deadline stands still."""
        if self._upload_paused_at is None and self.phase is Phase.BODY:
            self._upload_paused_at = self.site.clock()
            self._upload_left = self.deadline - self._upload_paused_at
            self.deadline = math.inf
            self._networkProducer.pauseProducing()

    def resume_upload(self) -> None:
        """Read on."""
        if self._upload_paused_at is not None:
            self._upload_paused_at = None
            self.deadline = self.site.clock() + self._upload_left
            self._networkProducer.resumeProducing()

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

    def refuse_early(self, request: Request) -> None:
        """Serve a request whose body is refused: what still comes is dropped."""
        self._discarding = True
        self.persistent = False
        self._handlingRequest = True
        self._enter(Phase.SERVING, None)
        request.requestReceived(self._command, self._path, self._version)

    def _respondToBadRequestAndDisconnect(self) -> None:  # noqa: N802 - Twisted's name
        """Answer what is not HTTP; Twisted's own answer is empty."""
        self._tell_and_close(ProxyError(400, "malformed", "The request is not valid HTTP/1.1."))

    def _tell_and_close(self, error: ProxyError) -> None:
        """Answer where there is no request yet that could."""
        self._discarding = True
        self.write(bare_answer(error))
        self.loseConnection()

    # -- out ------------------------------------------------------------------------------------

    def write(self, data: bytes) -> None:
        """Write, and count what was written."""
        self._progress.written += len(data)
        self.transport.write(data)

    def writeSequence(self, pieces: Iterable[bytes]) -> None:
        """Write pieces together."""
        self.write(b"".join(pieces))

    def requestDone(self, request: Request) -> None:
        """The answer is whole: wait for the next request, or close."""
        unfinished = request.upload is not None and not request.upload.complete
        if self._discarding or unfinished:
            self._discarding = True
            self.requests.remove(request)
            self._lingering = True
            self._enter(Phase.CLOSING, _LINGER)
            return
        self._enter(Phase.IDLE, self.site.timeouts.client_idle)
        super().requestDone(request)

    def request_cut(self, request: Request) -> None:
        """The answer is short of its framing: close after what is queued, without its end."""
        self.persistent = False
        self.requests.remove(request)
        self.loseConnection()

    def request_broken(self, request: Request) -> None:
        """The answer ends with the connection, so only a reset can tell that it broke."""
        self.persistent = False
        self.requests.remove(request)
        self._enter(Phase.CLOSING, None)
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
        elif self.phase is Phase.SERVING or self.phase is Phase.CLOSING:
            self._check_stall(now)

    def _expire(self, now: float) -> None:
        if self.phase is Phase.BODY:
            self.deadline = math.inf
            slow = ProxyError(408, "slow_request", "The request body came too slowly.")
            self.requests[-1].refuse(slow)
        elif self.phase is Phase.CLOSING:
            if pending_bytes(self.transport):
                self._check_stall(now)
            elif self._lingering:
                self._lingering = False
                self.loseConnection()
            else:
                self.abort()
        elif self.phase is Phase.HEAD:
            self._tell_and_close(ProxyError(408, "slow_request", "The request came too slowly."))
        else:
            self.loseConnection()

    def _check_stall(self, now: float) -> None:
        """Tell a client that takes nothing from a slow one, whatever is still written to it."""
        if self.requests:
            self._stall_after = self.requests[0].stall_after  # stays behind for what it leaves
        waiting = pending_bytes(self.transport)
        if self._poll is not None:
            waiting += unacknowledged_bytes(self.transport)
        if self._progress.has_stalled(now, waiting, self._stall_after):
            for request in list(self.requests):
                request.abort(ClientStalled())
            self.abort()
