"""A WebSocket from the provider's 101 to its end: the part of a request's story that is its own.

The handshake was admitted, routed and sent as any request is, until a candidate answered with a
101.  From here on the client's socket and the provider's connection belong to a relay
(``stream/websocket_relay.py``), and the request waits for its end.  Here it is decided what that
end was (ADR-0032).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from llmproxy.errors import ClientGone, EndReason, upstream_broken
from llmproxy.gateway.attempt import SWITCHING
from llmproxy.gateway.exchange import Exchange
from llmproxy.http1.grammar import Fields
from llmproxy.http1.websocket import UPGRADE, Handshake
from llmproxy.policy.routes import RouteMatch
from llmproxy.record.metrics import Metrics
from llmproxy.stream.frames import NO_CODE
from llmproxy.stream.websocket_relay import GOING_AWAY, Ending, WebSocketRelay
from llmproxy.upstream.held_response import HeldResponse
from llmproxy.upstream.response import Response

_GOOD = (1000, GOING_AWAY, NO_CODE)
"""The codes of a provider's close frame that say of no failure."""

_LAST_STANDARD = 1015
"""Codes up to it mean the same for every protocol; what others mean, only the two sides know."""


class WebSockets:
    """Serves the WebSockets of one configuration.

    Args:
        metrics: counts what is on the way.
        reactor: runs timers.
        clock: monotonic seconds.
    """

    def __init__(self, metrics: Metrics, reactor: Any, clock: Callable[[], float]) -> None:
        self._metrics = metrics
        self._reactor = reactor
        self._clock = clock

    async def serve(
        self,
        exchange: Exchange,
        match: RouteMatch,
        handshake: Handshake,
        response: Response | HeldResponse,
        fields: Fields,
    ) -> EndReason:
        """Give the client its 101, relay until the end, and return what that was.

        Args:
            response: the provider's, a 101.
            fields: those of it that the client gets.

        Raises:
            ProxyError: the provider broke it off, fell silent, or was too late.
            ClientGone: the client left, or we dropped it.
        """
        request, trace = exchange.request, exchange.trace
        candidate = exchange.candidate or match.candidates[0]
        fields = [*fields, *handshake.subprotocol(response.fields), *UPGRADE]
        exchange.keep_of(response)
        trace.stream = True

        def client_sent(data: bytes) -> None:
            request.body_bytes += len(data)

        def provider_sent(data: bytes) -> None:
            request.sent += len(data)

        relay = WebSocketRelay(
            self._reactor,
            self._clock,
            idle=candidate.timeouts.idle,
            stall=candidate.timeouts.client_stall,
            client_copy=client_sent,
            provider_copy=provider_sent,
        )
        exchange.relay = relay
        self._metrics.began(relay)
        try:
            response.deliverBody(relay.provider)
            is_draining = request.site.draining
            request.hand_over(SWITCHING, fields, relay.client, behind=relay.take_early())
            if is_draining:
                relay.end_soon()
            try:
                ending = await relay.over()
            except Exception:  # it was cancelled: the exchange knows why
                relay.end(None)
                await relay.over()
                raise
        finally:
            self._metrics.finished(relay)
        return _judged(ending)


def _judged(ending: Ending) -> EndReason:
    """Return how a WebSocket ended, or raise that.

    Raises:
        ProxyError, ClientGone: as :meth:`WebSockets.serve` says.
    """
    if ending.why is not None:
        raise ending.why
    if ending.by == "proxy":
        return EndReason.COMPLETE
    if ending.code is None:
        if ending.by == "client":
            raise ClientGone("the client left without a close frame")
        raise upstream_broken("the provider left without a close frame")
    failed = ending.closed_by == "provider" and ending.code not in _GOOD
    if failed and ending.code <= _LAST_STANDARD:
        return EndReason.UPSTREAM_FAILED
    return EndReason.COMPLETE
