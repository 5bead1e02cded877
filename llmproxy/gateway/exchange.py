"""One request under way: what is known of it, how it fails, and how its record ends.

A handler tells the story; an :class:`Exchange` carries what one step leaves for the next.  What
breaks a story off is judged here, for every handler (:meth:`Exchange.judge`).  So are the two ends
that a request can come to before its response is whole: an error that the client can still get, and
a break that only the end of the connection can show.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import msgspec
from twisted.logger import Logger
from twisted.python.failure import Failure

from llmproxy.dialects.dialect import Dialect
from llmproxy.dialects.endpoint import Endpoint
from llmproxy.dialects.errors import error_body, error_event
from llmproxy.errors import ClientGone, EndReason, ProxyError, killed, upstream_timeout
from llmproxy.gateway.known_head import KnownHead
from llmproxy.gateway.resends import Key
from llmproxy.gateway.shown_fields import shown
from llmproxy.http1.grammar import Fields
from llmproxy.http1.headers import is_ndjson, is_stream
from llmproxy.http1.websocket import Handshake
from llmproxy.net.task import Task
from llmproxy.policy.auth import MISPLACED, THE_PATH
from llmproxy.policy.fair_queue import Place, Waiting
from llmproxy.policy.limits import Lease
from llmproxy.policy.routes import ATTEMPTS, Candidate, RouteMatch
from llmproxy.record.flight import Body
from llmproxy.record.trace import SKIPPED, Trace, conceal
from llmproxy.server.error_response import METHODS, error_fields
from llmproxy.server.request import Request
from llmproxy.stream.heartbeat import is_between_events
from llmproxy.stream.last_bytes import LastBytes
from llmproxy.stream.relay import Relay, Whole
from llmproxy.stream.tap import DocumentTap, StreamAccumulator
from llmproxy.stream.websocket_relay import WebSocketRelay
from llmproxy.upstream.held_response import HeldResponse
from llmproxy.upstream.response import Response

_log = Logger()

_LABELLED = frozenset((*METHODS, b"CONNECT"))
"""The methods that are words in a label."""


class Exchange(msgspec.Struct, eq=False, weakref=True):
    """One request under way: what is known of it so far, and how it can be stopped.

    Attributes:
        request: its client's side.
        trace: its record.
        started: when it came, in monotonic seconds.
        match: the route that it takes, once that is chosen.
        candidate: the one of it that is asked, or whose response this is.
        target: path and query as that one gets them.
        handshake: the WebSocket handshake that the request is, or None.
        waiting: its place in a queue, while it waits there.
        place: the place at a provider that it holds.
        decoded_body: the request's body without its Content-Encoding, where it was read, and until
            it was sent.
        left: why the client is gone, if it is.
        known: what its head says by itself, where that is known; or None.
        is_late: the request took longer than ``total``.
        is_killed: an operator has ended it.
        at_work: above 0 if some provider may do the work, and did not refuse it.
        status: the provider's, or 0 before its head has come.
        length: its Content-Length, or None where it has none.
        fields: what is kept of its header fields.
        last: keeps the end of its body, where the route keeps content.
        to_client: how the response ended for the client, where that is known: ``error`` (of ours),
            ``error_event``, ``broken_off``.
        page: the fields by which a response speaks to a web page's browser.
        endpoint: how the response can be read, or None where it cannot be.
        tap: reads the response.
        is_detached: the response is read on although the client has left, or was.
        is_read_out: the client has left, and the response was read to its end all the same.
        detached_timer: ends that.
        lease: what the request holds of its client's limits, if the client has some.
        sent_key: by what it is told apart from others, if it has a body that is held.
        task: runs the handler's story.
        timer: rings after ``total``.
    """

    request: Request
    trace: Trace
    started: float
    known: KnownHead | None = None
    match: RouteMatch | None = None
    candidate: Candidate | None = None
    target: bytes = b""
    handshake: Handshake | None = None
    waiting: Waiting | None = None
    place: Place | None = None
    page: Sequence[tuple[bytes, bytes]] = ()
    decoded_body: bytes = b""
    left: ClientGone | None = None
    is_late: bool = False
    is_killed: bool = False
    at_work: int = 0
    relay: Relay | Whole | WebSocketRelay | None = None
    response: Response | HeldResponse | None = None
    content_type: bytes | None = None
    content_encoding: bytes | None = None
    length: bytes | None = None
    fields: Fields = []
    last: LastBytes | None = None
    to_client: str | None = None
    status: int = 0
    endpoint: Endpoint | None = None
    tap: StreamAccumulator | DocumentTap | None = None
    is_detached: bool = False
    is_read_out: bool = False
    detached_timer: Any = None
    lease: Lease | None = None
    sent_key: Key | None = None
    task: Task | None = None
    timer: Any = None

    def asked(self) -> None:
        """The provider may do the work from here on."""
        self.at_work += 1

    def keep_of(self, response: Response | HeldResponse) -> None:
        """Keep what is needed of the response's head later, and drop both heads.

        A stream may last for long, and its heads are the largest part of what it would hold.
        """
        first = response.first
        self.status = response.code
        self.content_type = first.get(b"content-type")
        self.content_encoding = first.get(b"content-encoding")
        self.length = first.get(b"content-length")
        self.fields = response.fields
        request = self.request
        response.fields, response.first = [], {}
        request.fields, request.first = [], {}

    def expire(self) -> None:
        """The request has taken longer than ``total``: cancel it, whatever it waits for."""
        self.timer = None
        self.is_late = True
        self.cancel()

    def kill(self) -> None:
        """An operator ends the request: cancel it, whatever it waits for.

        A client without a byte of a response gets an error, after which an SDK does not try again.
        """
        self.is_killed = True
        self.cancel()

    def stop_timer(self) -> None:
        """Let ``total`` be: the provider has done its part."""
        if self.timer is not None:
            self.timer.cancel()
            self.timer = None

    def cancel(self) -> None:
        """Let whatever the request waits for fail."""
        if self.task is not None:
            self.task.cancel()

    def drop(self) -> None:
        """Close the provider's connection; while a body comes, the request ends a turn later."""
        if self.relay is not None:
            self.relay.leave()
        else:
            self.cancel()

    @property
    def has_body(self) -> bool:
        """Whether the request has a body, which may still be coming."""
        return self.request.body_bytes > 0 or self.request.upload is not None

    @property
    def bytes_out(self) -> int:
        """How many bytes of the body were written to the client so far."""
        return self.request.sent + (0 if self.relay is None else self.relay.statistics.verbatim)

    def told_fields(self) -> Fields:
        """Return how the client is told which provider responds, and how many were asked."""
        if self.candidate is None or not (told := self.candidate.told):
            return []
        attempts = self.trace.attempts
        if len(attempts) == 1:
            return told
        asked = sum(one.outcome != SKIPPED for one in attempts)
        return [told[0], (ATTEMPTS, b"%d" % asked)]

    def judge(self, problem: Exception) -> tuple[EndReason, ProxyError | None]:
        """Return why the request ends, and the error for its client; None where no client waits.

        Call it while ``problem`` is being handled: a fault of ours is logged with its traceback.

        Args:
            problem: what the story has raised.
        """
        if isinstance(problem, ProxyError):
            error = problem
            if error.reason == MISPLACED:
                conceal(self.trace, path=error.cause == THE_PATH)
        elif self.is_killed:
            error = killed()
        elif self.is_late:
            error = upstream_timeout("total", may_have_run=self.at_work > 0)
        elif self.left is not None:
            return self.left.end, None
        elif isinstance(problem, ClientGone):
            self.left = problem
            return problem.end, None
        else:
            _log.failure("request {id} failed", id=self.trace.id)
            end = EndReason.INTERNAL
            error = ProxyError(500, "internal", "The proxy failed.", end=end)
        return (error.end, error) if self.left is None else (self.left.end, None)

    def fail(self, error: ProxyError, dialect: Dialect, now: float) -> None:
        """Tell the client of an error; if it has bytes of a response, break that off.

        Args:
            error: what went wrong.
            dialect: the shape in which the client's SDK expects an error.
            now: seconds since the epoch, for the ``Date`` field.
        """
        request, name = self.request, self.trace.id
        if not request.startedWriting:
            body = error_body(error, dialect, name)
            fields = error_fields(error, name, len(body), now)
            request.start(error.status, [*fields, *self.page])
            request.write(body)
            request.finish()
            self.to_client = "error"
            return
        self.to_client = "broken_off"
        if self.match is not None and self.match.route.error_event and self._is_between_events():
            event = error_event(
                error,
                dialect,
                name,
                ndjson=is_ndjson(self.content_type),
                row=self.endpoint,
                number=0 if self.tap is None else self.tap.events,
            )
            request.write(event)
            self.to_client = "error_event"
        request.break_off()

    def close(self, end: EndReason, error: ProxyError | None, now: float) -> None:
        """Let go of everything, and fill in the trace; ``now`` is the clock's."""
        for timer in (self.timer, self.detached_timer):
            if timer is not None and timer.active():
                timer.cancel()
        if self.response is not None:
            self.response.abort()
        if self.place is not None:
            self.place.give_back()
        trace, sent = self.trace, self.bytes_out
        relay, self.relay = self.relay, None  # which would keep each other
        self.endpoint = None  # a client that is found to have left only now has nothing to read
        trace.end_reason, trace.is_complete = end, end is EndReason.COMPLETE
        trace.error = None if error is None else error.reason
        trace.status, trace.bytes_out = self.request.status, sent
        trace.bytes_in = self.request.body_bytes
        trace.duration_s = round(now - self.started, 6)
        if (lease := self.lease) is not None:
            tokens = (trace.input_tokens or 0) + (trace.output_tokens or 0)
            if trace.usage == "reported":
                trace.counted_tokens = lease.settle(tokens)
            else:
                trace.counted_tokens = self._settle_unknown(lease, tokens)
        if isinstance(relay, Whole):
            trace.chunks, trace.longest_gap_s, trace.chunks_at_once = relay.chunks, 0.0, 0
            if relay.chunks:
                trace.first_chunk_s = trace.last_chunk_s = round(relay.at - self.started, 6)
        elif relay is not None:
            statistics = relay.statistics
            trace.chunks, trace.paused_s = relay.chunks, round(relay.paused_s, 6)
            trace.longest_gap_s = round(statistics.longest_gap, 6)
            trace.chunks_at_once = statistics.at_once
            if (first_at := statistics.first_at) is not None:
                trace.first_chunk_s = round(first_at - self.started, 6)
                trace.last_chunk_s = round(statistics.last_at - self.started, 6)

    def body(self) -> Body | None:
        """Return how the response came from the provider; None where none began.

        Call it before :meth:`close`.
        """
        relay = self.relay
        if relay is None:
            return None
        statistics, started = relay.statistics, self.started
        chunks = [(round(at - started, 6), size) for at, size in statistics.last_chunks]
        first_at = statistics.first_at
        return Body(
            status=self.status,
            content_type=_text(self.content_type),
            content_encoding=_text(self.content_encoding),
            length=int(self.length) if self.length and self.length.isdigit() else None,
            chunks=statistics.chunks,
            bytes=statistics.byte_count,
            events=self.trace.events,
            first_chunk_s=None if first_at is None else round(first_at - started, 6),
            last_chunk_s=chunks[-1][0] if chunks else None,
            longest_gap_s=round(statistics.longest_gap, 6),
            chunks_at_once=statistics.at_once,
            ends_between_events=self._is_between_events(),
            last_chunks=chunks,
            fields=shown(self.fields),
            last_bytes=None if self.last is None else self.last.kept,
        )

    def _settle_unknown(self, lease: Lease, reported: int) -> int | None:
        """Settle where no whole usage was reported: about one token came with each event."""
        seen = 0 if self.tap is None else self.tap.events
        return lease.settle_unknown(reported, seen, self.at_work > 0)

    def labels(self) -> tuple[str, str, str, str, str]:
        """Return route, provider, client, method and status class, from closed sets."""
        trace = self.trace
        status = "none" if trace.status is None else f"{trace.status // 100}xx"
        method = trace.method if self.request.method in _LABELLED else "other"
        return trace.route or "", trace.provider or "", trace.client or "", method, status

    @property
    def takes_comments(self) -> bool:
        """Whether something of ours can stand in the body: it is events, as they are read."""
        if self.content_encoding is not None or self.length is not None:
            return False
        return is_stream(self.content_type) and not is_ndjson(self.content_type)

    def _is_between_events(self) -> bool:
        """Return whether the stream stands between two events, so that one more can be added."""
        if self.relay is None or self.response is None:
            return False
        tail = self.relay.statistics.tail
        if self.takes_comments:
            return is_between_events(tail)
        is_lines = is_ndjson(self.content_type)
        is_plain = self.content_encoding is None and self.length is None
        return is_lines and is_plain and (not tail or tail.endswith(b"\n"))


def _text(value: bytes | None) -> str | None:
    return None if value is None else value.decode("latin-1")[:256]


def end_failed(failure: Failure) -> None:
    """Log that a request could not be ended; nobody else would see it."""
    _log.failure("a request's end failed", failure)
