"""Responses that are read on after their client has left, for their token counts.

A provider sends its counts last.  A route with ``on_disconnect = "drain"`` wants them also where
the client did not wait for the end.  Such a response is read for ``drain_for`` at most, and only
``limits.drains`` of them at once; beyond these bounds a response is cancelled, as on any other
route (ADR-0024).
"""

from __future__ import annotations

from typing import Any

from llmproxy.errors import ClientGone, ClientStalled
from llmproxy.gateway.exchange import Exchange


class DetachedStreams:
    """The responses that are read on now, without a client.

    Args:
        most: how many may be at once.
        reactor: keeps their deadlines.
    """

    def __init__(self, most: int, reactor: Any) -> None:
        self._most = most
        self._reactor = reactor
        self._running: set[Exchange] = set()

    def __len__(self) -> int:
        return len(self._running)

    def takes(self, exchange: Exchange, why: ClientGone) -> bool:
        """Return whether to keep reading the response after its client left.

        The first call decides for the request.  The result is no if the tap cannot yield usage, has
        seen the end or an error, if the provider does not have the whole request yet, or if the
        proxy itself is ending the request.
        """
        if exchange in self._running:
            return True
        match, tap = exchange.match, exchange.tap
        if match is None or match.route.on_disconnect != "drain":
            return False
        upload = exchange.request.upload
        if type(why) not in (ClientGone, ClientStalled) or not (upload is None or upload.complete):
            return False
        if tap is None:
            awaits_head = exchange.has_asked and exchange.status == 0
            wanted = awaits_head and exchange.endpoint is not None
        else:
            wanted = tap.is_promising and not tap.has_ended and tap.error is None
        if not wanted or len(self._running) >= self._most or exchange.is_detached:
            return False
        exchange.is_detached = True
        self._running.add(exchange)
        exchange.detached_timer = self._reactor.callLater(match.route.drain_for, exchange.cancel)
        return True

    def allow(self, most: int) -> None:
        """Allow so many at once from now on; those that run go on."""
        self._most = most

    def over(self, exchange: Exchange) -> None:
        """The request has ended."""
        self._running.discard(exchange)
