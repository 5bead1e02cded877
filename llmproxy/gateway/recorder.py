"""A record of every request: opened when the request comes in, closed once, however it ends.

The end of every request comes here and is written into a trace, an access line and the counters.
Two things that never became a request have a record, too: a client that left inside its own body,
and a head that is not HTTP.  This module knows no provider and no socket.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Collection
from typing import Literal

from twisted.logger import Logger

from llmproxy.errors import ClientGone, EndReason, ProxyError
from llmproxy.gateway.exchange import Exchange
from llmproxy.gateway.hints import NOT_FOUND, hint_for_operator
from llmproxy.gateway.resends import Resends, key_of
from llmproxy.policy.auth import holds_made_key
from llmproxy.record.flight import Body, FlightRecorder, capsule
from llmproxy.record.log import ACCESS, access_event
from llmproxy.record.metrics import Metrics
from llmproxy.record.trace import Sink, Trace, timestamp, trace_id
from llmproxy.server.error_response import bare_response
from llmproxy.server.request import Request

_log = Logger(namespace=ACCESS)

_ids = random.Random()
"""Ids are to be unique, not secret; it is seeded by the system, and asks it for nothing more."""


def log_access(trace: Trace, cause: str | None, detail: str | None) -> None:
    """Write an access line to ``twisted.logger``."""
    _log.info("{method} {path} {end_reason}", **access_event(trace, cause, detail))


class Recorder:
    """The records of one process.

    Args:
        metrics: counts what ended.
        sink: keeps traces.
        access: writes the access line of a trace, with a failure's cause and detail.
        clock: monotonic seconds.
        wall: seconds since the epoch.
        instance: this process's name among several.

    Attributes:
        flights: the last requests that did not end as they should.
        resends: tells requests that come again.
    """

    def __init__(
        self,
        metrics: Metrics,
        sink: Sink,
        *,
        access: Callable[[Trace, str | None, str | None], None] = log_access,
        clock: Callable[[], float],
        wall: Callable[[], float],
        instance: str,
    ) -> None:
        self._metrics = metrics
        self._sink = sink
        self._access = self._access_line = access
        self._clock = clock
        self.now = wall
        self._instance = instance
        self._session_headers: tuple[bytes, ...] = (b"x-session-id",)
        self._running: set[Exchange] = set()
        self.flights = FlightRecorder()
        self.resends = Resends(clock)

    @property
    def running(self) -> int:
        """How many requests are being served."""
        return len(self._running)

    @property
    def exchanges(self) -> Collection[Exchange]:
        """The requests that are being served."""
        return self._running

    def follow(self, session_headers: tuple[str, ...]) -> None:
        """Take a request's session from the first of these fields that it has from now on.

        Args:
            session_headers: names in lower case.
        """
        self._session_headers = tuple(name.encode("ascii") for name in session_headers)

    def write_access(self, which: bool | Literal["errors"]) -> None:
        """Write the access lines of all requests from now on, of none, or of those that failed."""
        if which == "errors":
            self._access = self._access_if_failed
        else:
            self._access = self._access_line if which else _no_access

    def _access_if_failed(self, trace: Trace, cause: str | None, detail: str | None) -> None:
        if trace.end_reason != EndReason.COMPLETE:
            self._access_line(trace, cause, detail)

    def begin(self, request: Request) -> Exchange:
        """Open the record of ``request``."""
        if (seen := request.seen) is None:
            known, trace = None, self.new_trace(request, self.now())
        else:
            known = seen.found
            trace = new_trace_like(known.trace, request, self.now())
        exchange = Exchange(request, trace, self._clock(), known)
        self._running.add(exchange)
        self._metrics.request_began()
        return exchange

    def note_sent(self, exchange: Exchange, client: str, body: bytes) -> None:
        """Note what a request sends, and that it did so before, if it did."""
        exchange.sent_key = key = key_of(client, exchange.trace.path, body)
        exchange.trace.resent = first = self.resends.begins(key)
        if first is not None:
            self._metrics.resent(client, first)

    def new_trace(self, request: Request, time: float) -> Trace:
        """Return the record of a request that came at ``time``, with a new id."""
        return new_trace(request, self._session_headers, time=time, instance=self._instance)

    def close(
        self,
        exchange: Exchange,
        end: EndReason,
        error: ProxyError | None,
        *,
        writes_access: bool = True,
        detail: str | None = None,
    ) -> None:
        """Close a record, with why the request ended and the error that its client got.

        Args:
            writes_access: whether the request has an access line.
            detail: what that says of an end without an error.
        """
        body = None if end is EndReason.COMPLETE else exchange.body()
        exchange.close(end, error, self._clock())
        if exchange.trace.first_chunk_s is not None:
            self._metrics.first_chunk.note(exchange.trace.first_chunk_s)
        self._running.discard(exchange)
        if exchange.sent_key is not None:
            self.resends.ends(exchange.sent_key, end)
        if exchange.status == NOT_FOUND:
            detail = hint_for_operator(exchange)
        self._write(
            exchange.trace,
            exchange.labels(),
            error,
            detail,
            body,
            to_client=exchange.to_client,
            writes_access=writes_access,
        )

    def record_part(self, trace: Trace) -> None:
        """Keep the record of one response of a WebSocket; its connection has the access line."""
        if trace.end_reason != EndReason.COMPLETE:
            self.flights.keep(capsule(trace))
        self._sink.write(trace)

    def close_all(self) -> None:
        """End the requests that outlive their clients, each with what is known of it so far."""
        for exchange in list(self._running):
            exchange.cancel()

    def abandoned(self, request: Request, why: ClientGone) -> None:
        """Record a request that ended before it was served."""
        self.close(self.begin(request), why.end, None)

    def malformed(self, peer: str, error: ProxyError) -> bytes:
        """Record a head that is not a request; return the response, which has the record's id."""
        now = self.now()
        self._metrics.request_began()
        trace = Trace(
            time=timestamp(now),
            id=_new_id(),
            instance=self._instance,
            peer=peer,
            method="",
            path="",
            status=error.status,
            end_reason=error.end,
            error=error.reason,
        )
        self._write(trace, ("", "", "", "other", f"{error.status // 100}xx"), None)
        return bare_response(error, now=now, request_id=trace.id)

    def _write(
        self,
        trace: Trace,
        labels: tuple[str, ...],
        error: ProxyError | None,
        detail: str | None = None,
        body: Body | None = None,
        *,
        to_client: str | None = None,
        writes_access: bool = True,
    ) -> None:
        cause = None
        if error is not None and error.detail:
            cause, detail = error.cause, error.detail
        if trace.end_reason != EndReason.COMPLETE:
            self.flights.keep(capsule(trace, cause, detail, body, to_client))
        bytes_in = 0 if trace.tunnel is not None else trace.bytes_in
        if self._metrics.wants_example(trace.duration_s):
            self._exemplify(trace)
        self._metrics.request_ended(labels, trace.end_reason, bytes_in)
        self._sink.write(trace)
        if writes_access:
            self._access(trace, cause, detail)

    def _exemplify(self, trace: Trace) -> None:
        answered = trace.attempts and trace.attempts[-1].outcome == "ok"
        self._metrics.exemplify(
            trace_id(trace),
            self.now(),
            head_s=trace.attempts[-1].seconds if answered else None,
            first_chunk_s=trace.first_chunk_s,
            gap_s=trace.longest_gap_s if trace.chunks > 1 else None,
            queued_s=trace.queued_s,
        )


def _no_access(trace: Trace, cause: str | None, detail: str | None) -> None:
    """Write nothing."""


def new_trace(
    request: Request, session_headers: tuple[bytes, ...], *, time: float, instance: str
) -> Trace:
    """Return the record of a request that has just come in, with a new id.

    Args:
        session_headers: the fields in which callers name their session, in lower case.
        time: seconds since the epoch.
    """
    first = request.first
    session = None
    for name in session_headers:
        if name in first:
            session = _text(first[name])
            break
    return Trace(
        time=timestamp(time),
        id=_new_id(),
        client_request_id=_text(first.get(b"x-request-id")),
        instance=instance,
        peer=request.channel.peer_name,
        user_agent=_text(first.get(b"user-agent")),
        session=session,
        method=request.method.decode("ascii", "backslashreplace"),
        path=_path(request.path),
    )


def new_trace_like(known: Trace, request: Request, time: float) -> Trace:
    """Return the record of a request whose head is known, with a new id.

    Args:
        known: the record that was made of that head; it stays as it is.
        time: seconds since the epoch.
    """
    trace: Trace = known.__copy__()  # type: ignore[attr-defined]  # msgspec declares it nowhere
    trace.time, trace.id = timestamp(time), _new_id()
    trace.peer = request.channel.peer_name
    trace.attempts, trace.degraded = [], []
    return trace


def _new_id() -> str:
    return f"{_ids.getrandbits(96):024x}"


def _path(path: bytes) -> str:
    """Return the path for the record; nothing of one with a key, or of a target with a password."""
    if not path.startswith(b"/") or holds_made_key(path):
        return ""
    return path.decode("ascii", "backslashreplace")[:2048]


def _text(value: bytes | None) -> str | None:
    """Return a header's value for the record, where it is short and printable."""
    if value is None or holds_made_key(value):
        return None
    text = value.decode("utf-8", "replace")[:256]
    return text if text.isprintable() else None
