"""What is under way now: a row for each request, windows of them, and all of them in the log.

A row is put together when it is asked for, from what requests hold anyway (ADR-0003).  It names the
caller and the route, never a path, a key or content.  Of thousands of requests only those in the
window become rows; a :class:`Window` says which these are, and in which order.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

import msgspec
from twisted.logger import Logger

from llmproxy.config.values import Wrong
from llmproxy.gateway.exchange import Exchange
from llmproxy.gateway.recorder import Recorder
from llmproxy.server.connection import Phase
from llmproxy.server.site import Site

MOST_ROWS = 1000
"""Most rows of one window."""

_USUAL_ROWS = 100
_COMING = (Phase.HEAD, Phase.BODY)
_NUMBER = re.compile(r"[0-9]{1,6}\Z")

_log = Logger()


def _last_chunk_s(exchange: Exchange, now: float) -> float:
    relay = exchange.relay
    if relay is None or relay.statistics.first_at is None:
        return -1.0
    return now - relay.statistics.last_at


_ORDERS: Mapping[str, Callable[[Exchange, float], Any]] = {
    "age": lambda one, now: now - one.started,
    "bytes": lambda one, now: one.bytes_out,
    "events": lambda one, now: 0 if one.tap is None else one.tap.events,
    "last_chunk": _last_chunk_s,
    "paused": lambda one, now: 0.0 if one.relay is None else one.relay.paused_s,
    "ahead": lambda one, now: -1 if one.waiting is None else one.waiting.ahead,
    "client": lambda one, now: one.trace.client or "",
    "route": lambda one, now: one.trace.route or "",
    "provider": lambda one, now: one.trace.provider or "",
    "model": lambda one, now: one.trace.model or "",
    "phase": lambda one, now: phase_of(one),
}
"""What rows are sorted by, by its name in a query."""

_FILTERS: Mapping[str, Callable[[Exchange], str | None]] = {
    "client": lambda one: one.trace.client,
    "route": lambda one: one.trace.route,
    "provider": lambda one: one.trace.provider,
    "model": lambda one: one.trace.model,
    "session": lambda one: one.trace.session,
    "phase": lambda one: phase_of(one),
}
"""What rows are chosen by, by its name in a query."""

PARAMETERS = (*_FILTERS, "sort", "limit", "offset")
"""The names that a query for a window may have."""


class StreamRow(msgspec.Struct, frozen=True):
    """One request that is being served.

    Attributes:
        id: ours, which the response carries in ``x-llmproxy-request-id``.
        client, session, route, provider, model: as its record will have them.
        phase: where it stands: ``routing``, ``uploading``, ``queued``, ``waiting`` (for the head of
            the response), ``streaming``, or ``paused`` while the client holds the response up.
        ahead: how many requests of the same queue get a place before it; None in no queue.
        age_s: seconds since it came.
        bytes: how much of the body was written to the client.
        events: how many events were found in the response, about one for each token of a stream;
            None where nothing reads it.
        tokens: how many output tokens the provider has reported so far; None for no report.
        last_chunk_s: seconds since the last chunk came; None before the first.
        paused_s: seconds for which the client has held the response up, in all.
        attempts: how many tries at providers are over.
        detached: the client has left, and the response is read on for its usage.
    """

    id: str
    client: str | None
    session: str | None
    route: str | None
    provider: str | None
    model: str | None
    phase: str
    ahead: int | None
    age_s: float
    bytes: int
    events: int | None
    tokens: int | None
    last_chunk_s: float | None
    paused_s: float
    attempts: int
    detached: bool


class StreamWindow(msgspec.Struct, frozen=True):
    """A window of the requests that are being served.

    Attributes:
        total: how many there are in all.
        matching: how many of them have what was asked for.
        offset: how many of these stand before the first row.
        streams: the rows.
    """

    total: int
    matching: int
    offset: int
    streams: list[StreamRow]


class Window(msgspec.Struct, frozen=True):
    """Which rows are wanted, and in which order.

    Attributes:
        wanted: the value that a row must have, by the name of a filter.
        sort: a name of :data:`_ORDERS`.
        descending: the greatest first.
        limit: most rows.
        offset: how many are left out before the first.
    """

    wanted: dict[str, str] = {}
    sort: str = "age"
    descending: bool = True
    limit: int = _USUAL_ROWS
    offset: int = 0


def window_of(given: Mapping[str, str]) -> Window:
    """Return the window that a query asks for.

    Args:
        given: what it says, by name; names other than :data:`PARAMETERS` are left alone.

    Raises:
        Wrong: it says something that cannot be meant.
    """
    sort = given.get("sort", "-age")
    if (name := sort.removeprefix("-")) not in _ORDERS:
        raise Wrong(f"`sort` to be one of {', '.join(_ORDERS)}, with - before it for the reverse")
    return Window(
        wanted={name: given[name] for name in _FILTERS if name in given},
        sort=name,
        descending=sort.startswith("-"),
        limit=number(given, "limit", _USUAL_ROWS, MOST_ROWS),
        offset=number(given, "offset", 0, 999_999),
    )


def number(given: Mapping[str, str], name: str, usual: int, most: int) -> int:
    """Return a number that a query may give.

    Raises:
        Wrong: it is no whole number from 0 to ``most``.
    """
    if name not in given:
        return usual
    if _NUMBER.match(given[name]) is None or (found := int(given[name])) > most:
        raise Wrong(f"`{name}` to be a whole number from 0 to {most}")
    return found


class Streams:
    """The requests that one process is serving.

    Args:
        site: the site that clients are connected to.
        recorder: knows what is being served.
        clock: monotonic seconds.
    """

    def __init__(self, site: Site, recorder: Recorder, clock: Callable[[], float]) -> None:
        self._site = site
        self._recorder = recorder
        self._clock = clock

    def rows(self) -> list[StreamRow]:
        """Return a row for each, the oldest first."""
        now = self._clock()
        oldest_first = sorted(self._recorder.exchanges, key=lambda exchange: exchange.started)
        return [row_of(exchange, now) for exchange in oldest_first]

    def window(self, window: Window) -> StreamWindow:
        """Return the rows of a window, how many there are like them, and how many in all."""
        now, chosen = self._clock(), list(self._recorder.exchanges)
        total = len(chosen)
        for name, value in window.wanted.items():
            of = _FILTERS[name]
            chosen = [one for one in chosen if of(one) == value]
        order = _ORDERS[window.sort]
        chosen.sort(key=lambda one: one.started)  # those that are alike: the oldest first
        chosen.sort(key=lambda one: order(one, now), reverse=window.descending)
        shown = chosen[window.offset : window.offset + window.limit]
        rows = [row_of(one, now) for one in shown]
        return StreamWindow(total, len(chosen), window.offset, rows)

    def find(self, name: str) -> Exchange | None:
        """Return the request with this id, or None where it is not being served (any more)."""
        return next((one for one in self._recorder.exchanges if one.trace.id == name), None)

    def row(self, exchange: Exchange) -> StreamRow:
        """Return the row of a request."""
        return row_of(exchange, self._clock())

    def log(self) -> None:
        """Write a line for each request, behind one that counts them and those still coming."""
        rows = self.rows()
        _log.info(
            "{count} requests are being served, {coming} are still coming",
            count=len(rows),
            coming=sum(channel.phase in _COMING for channel in self._site.connections),
        )
        for row in rows:
            queue = "" if row.ahead is None else ", {ahead} ahead of it"
            text = "{id} {phase} since {age_s} s, {bytes} bytes" + queue
            _log.info(text, **msgspec.structs.asdict(row))


def row_of(exchange: Exchange, now: float) -> StreamRow:
    """Return the row of a request."""
    trace, relay, tap = exchange.trace, exchange.relay, exchange.tap
    last_chunk = _last_chunk_s(exchange, now)
    return StreamRow(
        id=trace.id,
        client=trace.client,
        session=trace.session,
        route=trace.route,
        provider=trace.provider,
        model=trace.model,
        phase=phase_of(exchange),
        ahead=None if exchange.waiting is None else exchange.waiting.ahead,
        age_s=round(now - exchange.started, 3),
        bytes=exchange.bytes_out,
        events=None if tap is None else tap.events,
        tokens=None if tap is None else tap.usage.output_tokens,
        last_chunk_s=None if last_chunk < 0 else round(last_chunk, 3),
        paused_s=0.0 if relay is None else round(relay.paused_s, 3),
        attempts=len(trace.attempts),
        detached=exchange.is_detached,
    )


def phase_of(exchange: Exchange) -> str:
    """Return where a request stands, in one word of a closed set."""
    if exchange.relay is not None:
        return "paused" if exchange.relay.is_paused else "streaming"
    if exchange.match is None:
        return "routing"
    if exchange.waiting is not None:
        return "queued"
    upload = exchange.request.upload
    return "waiting" if upload is None or upload.complete else "uploading"
