"""What is under way now: one row for each request, and all of them in the log.

A row is put together when it is asked for, from what requests hold anyway (ADR-0003).  It names the
caller and the route, never a path, a key or content.
"""

from __future__ import annotations

from collections.abc import Callable

from twisted.logger import Logger

from llmproxy.gateway.exchange import Exchange
from llmproxy.gateway.recorder import Recorder
from llmproxy.server.connection import Phase
from llmproxy.server.site import Site

Row = dict[str, str | int | float | None]

_COMING = (Phase.HEAD, Phase.BODY)

_log = Logger()


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

    def rows(self) -> list[Row]:
        """Return a row for each, the oldest first.

        ``age_s``, ``last_chunk_s`` (since the last chunk came, null before the first) and
        ``paused_s`` (for which the client held the response up, in all) are seconds.  ``bytes`` is
        how much of the body was written to the client.  ``ahead`` says how many requests of the
        same queue get a place before this one; it is null where the request waits in none.
        """
        now = self._clock()
        oldest_first = sorted(self._recorder.exchanges, key=lambda exchange: exchange.started)
        return [_row(exchange, now) for exchange in oldest_first]

    def log(self) -> None:
        """Write a line for each request, behind one that counts them and those still coming."""
        rows = self.rows()
        _log.info(
            "{count} requests are being served, {coming} are still coming",
            count=len(rows),
            coming=sum(channel.phase in _COMING for channel in self._site.connections),
        )
        for row in rows:
            queue = "" if row["ahead"] is None else ", {ahead} ahead of it"
            _log.info("{id} {phase} since {age_s} s, {bytes} bytes" + queue, **row)


def _row(exchange: Exchange, now: float) -> Row:
    trace, relay = exchange.trace, exchange.relay
    begun = relay is not None and relay.statistics.first_at is not None
    return {
        "id": trace.id,
        "client": trace.client,
        "route": trace.route,
        "provider": trace.provider,
        "model": trace.model,
        "phase": _phase(exchange),
        "ahead": None if exchange.waiting is None else exchange.waiting.ahead,
        "age_s": round(now - exchange.started, 3),
        "bytes": exchange.bytes_out,
        "last_chunk_s": round(now - relay.statistics.last_at, 3)
        if relay is not None and begun
        else None,
        "paused_s": 0.0 if relay is None else round(relay.paused_s, 3),
    }


def _phase(exchange: Exchange) -> str:
    """Return where a request stands, in one word of a closed set."""
    if exchange.relay is not None:
        return "paused" if exchange.relay.is_paused else "streaming"
    if exchange.match is None:
        return "routing"
    if exchange.waiting is not None:
        return "queued"
    upload = exchange.request.upload
    return "waiting" if upload is None or upload.complete else "uploading"
