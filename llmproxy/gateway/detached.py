"""Responses that are read on after their client has left.

A provider sends its token counts last.  A route with ``on_disconnect = "drain"`` wants them also
where the client did not wait for the end.  Such a response is read for ``drain_for`` at most, and
only ``limits.drains`` of them at once; beyond these bounds a response is cancelled, as on any other
route (ADR-0024).

OpenAI's SDKs leave when they have the end marker.  The provider has done its work then, and only
the end of the body's framing is missing.  It is read for a second and 16 KiB at most, so that the
provider's connection can be used again.
"""

from __future__ import annotations

import math
from typing import Any

from llmproxy.errors import ClientGone, ClientStalled
from llmproxy.gateway.exchange import Exchange

_REST_S, _REST_BYTES = 1.0, 16 * 1024
"""How long what follows the end marker is read, and how much of it."""


class DetachedStreams:
    """The responses that are read on now, without a client; ``len`` counts those read for tokens.

    Args:
        most: how many may be at once.
        reactor: keeps their deadlines.
    """

    def __init__(self, most: int, reactor: Any) -> None:
        self._most = most
        self._reactor = reactor
        self._running: set[Exchange] = set()
        self._ending: set[Exchange] = set()

    def __len__(self) -> int:
        return len(self._running)

    def takes(self, exchange: Exchange, why: ClientGone) -> float:
        """Return how many bytes of the response to read after its client left; 0 to cancel it.

        The first call decides for the request.  It is cancelled if the tap cannot yield usage or
        has seen an error, if the provider does not have the whole request yet, or if the proxy
        itself is ending the request.
        """
        if exchange in self._running:
            return math.inf
        if exchange in self._ending:
            return _REST_BYTES
        match, tap = exchange.match, exchange.tap
        upload = exchange.request.upload
        if type(why) not in (ClientGone, ClientStalled) or not (upload is None or upload.complete):
            return 0
        if tap is not None and tap.has_ended:
            return self._takes_end(exchange)
        if match is None or match.route.on_disconnect != "drain":
            return 0
        if tap is None:
            awaits_head = exchange.at_work > 0 and exchange.status == 0
            wanted = awaits_head and exchange.endpoint is not None
        else:
            wanted = tap.is_promising and tap.error is None
        if not wanted or len(self._running) >= self._most or exchange.is_detached:
            return 0
        exchange.is_detached = True
        self._running.add(exchange)
        exchange.detached_timer = self._reactor.callLater(match.route.drain_for, exchange.cancel)
        return math.inf

    def _takes_end(self, exchange: Exchange) -> float:
        """Return how much may follow the end marker, where the connection can be kept then."""
        if exchange.response is None or not exchange.response.is_kept or exchange.detached_timer:
            return 0
        self._ending.add(exchange)
        exchange.detached_timer = self._reactor.callLater(_REST_S, exchange.drop)
        return _REST_BYTES

    def allow(self, most: int) -> None:
        """Allow so many at once from now on; those that run go on."""
        self._most = most

    def over(self, exchange: Exchange) -> None:
        """The request has ended."""
        self._running.discard(exchange)
        self._ending.discard(exchange)
