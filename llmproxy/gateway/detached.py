"""Answers that are read on after their client has left, for what they will have cost.

A route with ``on_disconnect = "drain"`` wants a provider's counts, which come last, also of what
nobody waits for any more.  Each such response is read for ``drain_for`` at most, and only so many
at once; whatever is beyond is cancelled, as on any other route (ADR-0024).
"""

from __future__ import annotations

from typing import Any

from llmproxy.errors import ClientGone, ClientStalled
from llmproxy.gateway.exchange import Exchange


class DetachedStreams:
    """The responses that are read on now.

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
        """Tell whether the response of a client that has left is read on; the first asking decides.

        It is not where it cannot tell its usage any more, has told all that it had to or has
        failed, where the provider was not asked yet or not in full, or where the proxy ends it.
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
            wanted = tap.is_reading and not tap.has_ended and tap.error is None
        if not wanted or len(self._running) >= self._most or exchange.detached:
            return False
        exchange.detached = True
        self._running.add(exchange)
        exchange.detached_timer = self._reactor.callLater(match.route.drain_for, exchange.cancel)
        return True

    def allow(self, most: int) -> None:
        """Let so many be at once from now on; those that are go on."""
        self._most = most

    def over(self, exchange: Exchange) -> None:
        """The request has ended."""
        self._running.discard(exchange)
