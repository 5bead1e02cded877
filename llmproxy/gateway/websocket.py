"""A WebSocket from the provider's 101 to its end: the part of a request's story that is its own.

The handshake was admitted, routed and sent as any request is, until a candidate answered with a
101.  From here on the client's socket and the provider's connection belong to a relay
(``stream/websocket_relay.py``), and the request waits for its end.  Here it is decided what that
end was, which responses there were, and which a client may have (ADR-0032).

A client's limits, and the models that it may use, are looked at again with each
``response.create``.  For that its messages are held until they are whole, on connections where
something may be refused, and there alone; binary ones as well, because some servers read JSON in
either.  A refusal is an event of the API's own on the open connection: clients take a refused
handshake for a broken network, and try again.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from typing import TYPE_CHECKING, Any

import msgspec

from llmproxy.config import Client, Limits
from llmproxy.dialects.lenient import FAULTS
from llmproxy.dialects.websocket import (
    ClientEvent,
    SocketApi,
    error_message,
    read_client_event,
    socket_api,
)
from llmproxy.errors import ClientGone, EndReason, ProxyError, upstream_broken
from llmproxy.gateway.attempt import SWITCHING
from llmproxy.gateway.exchange import Exchange
from llmproxy.gateway.inspection import Inspection
from llmproxy.gateway.recorder import Recorder
from llmproxy.http1.grammar import Fields, first_values
from llmproxy.http1.websocket import EXTENSIONS, UPGRADE, Handshake
from llmproxy.policy.limits import ClientLimits, Lease
from llmproxy.policy.routes import Named, NoModel, PathMatch, RouteMatch
from llmproxy.record.metrics import Metrics
from llmproxy.record.trace import Trace, timestamp
from llmproxy.stream.frames import NO_CODE, TEXT, frame
from llmproxy.stream.gate import Gate
from llmproxy.stream.tap import Degraded
from llmproxy.stream.websocket_relay import GOING_AWAY, Ending, WebSocketRelay
from llmproxy.upstream.held_response import HeldResponse
from llmproxy.upstream.response import Response

if TYPE_CHECKING:  # wsproto, for routes with WebSockets alone
    from llmproxy.stream.websocket import SocketResponse, WebSocketTap

_GOOD = (1000, GOING_AWAY, NO_CODE)
"""The codes of a provider's close frame that say of no failure."""

_LAST_STANDARD = 1015
"""Codes up to it mean the same for every protocol; what others mean, only the two sides know."""

_TOKENS = (
    *("input_tokens", "output_tokens", "cache_read_tokens", "cache_write_tokens"),
    "reasoning_tokens",
)


class Caller(msgspec.Struct, frozen=True):
    """Who opens a WebSocket, and what may be refused on it.

    Attributes:
        client: as the configuration has it.
        handshake: the client's.
        place: the routes at its path that take WebSockets.
        api: the API that is spoken, or None where it is not known.
        is_limited: the client has limits.
    """

    client: Client
    handshake: Handshake
    place: PathMatch
    api: SocketApi | None
    is_limited: bool

    @property
    def may_be_refused(self) -> bool:
        """Whether anything that is asked for on the open connection may be refused."""
        decides = self.is_limited or self.place.needs_model(self.client)
        return self.api is not None and decides


def opens_websocket(
    exchange: Exchange, match: RouteMatch, place: PathMatch, client: Client, *, is_limited: bool
) -> Caller | None:
    """Return who opens a WebSocket with a request, or None where it does not ask for one.

    Where messages of the client's may be refused, the provider is offered no compression: a
    message that is left out would be missing in the context of the next ones.
    """
    handshake = exchange.handshake
    if handshake is None or place.websockets is None:
        return None
    api = socket_api(match.candidates[0].provider.dialect, match.path)
    caller = Caller(client, handshake, place.websockets, api, is_limited)
    if caller.may_be_refused:
        request = exchange.request
        request.fields = [field for field in request.fields if field[0] != EXTENSIONS]
        request.first = first_values(request.fields)
    return caller


class WebSockets:
    """Serves the WebSockets of one configuration.

    Args:
        limits: of what is held.
        client_limits: what clients use.
        inspection: writes down what responses hold.
        recorder: keeps their records.
        metrics: counts what is on the way.
        reactor: runs timers.
        clock: monotonic seconds.
    """

    def __init__(
        self,
        limits: Limits,
        client_limits: ClientLimits,
        inspection: Inspection,
        recorder: Recorder,
        metrics: Metrics,
        reactor: Any,
        clock: Callable[[], float],
    ) -> None:
        self.limits = limits
        self.client_limits = client_limits
        self.inspection = inspection
        self.recorder = recorder
        self.metrics = metrics
        self.reactor = reactor
        self.clock = clock

    async def serve(
        self,
        exchange: Exchange,
        match: RouteMatch,
        caller: Caller,
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
        fields = [*fields, *caller.handshake.subprotocol(response.fields), *UPGRADE]
        conversation = Conversation(self, exchange, match, caller, response.first.get(EXTENSIONS))
        exchange.keep_of(response)
        exchange.trace.stream = True
        relay = exchange.relay = conversation.relay
        self.metrics.began(relay)
        self.metrics.websockets += 1
        end: EndReason = EndReason.INTERNAL
        try:
            response.deliverBody(relay.provider)
            is_draining = exchange.request.site.draining
            behind = relay.take_early()
            exchange.request.hand_over(SWITCHING, fields, relay.client, behind=behind)
            if is_draining:
                relay.end_soon()
            try:
                ending = await relay.over()
            except Exception:  # it was cancelled: the exchange knows why
                if relay.ending is None:
                    end = EndReason.UPSTREAM_TIMEOUT
                    if exchange.is_killed:
                        end = EndReason.KILLED
                    relay.end(None)
                    await relay.over()
                    raise
                ending = relay.ending  # the process ends, and the provider's side has not closed
                relay.drop()
            end = conversation.judged(ending)
        except (ProxyError, ClientGone) as error:
            end = error.end
            raise
        finally:
            self.metrics.websockets -= 1
            self.metrics.finished(relay)
            conversation.conclude(end)
        return end


class Conversation:
    """One WebSocket: its relay, its tap, and what it holds of its client's limits.

    Args:
        sockets: serves it.
        extensions: the 101's.

    Attributes:
        relay: forwards its bytes.
    """

    def __init__(
        self,
        sockets: WebSockets,
        exchange: Exchange,
        match: RouteMatch,
        caller: Caller,
        extensions: bytes | None,
    ) -> None:
        self._sockets = sockets
        self._exchange = exchange
        self._match = match
        self._caller = caller
        self._number = 0
        self._sums: dict[str, int] = {}
        self._usage: set[str] = set()
        self._warms_up = True  # the provider knows what asks for no response, as far as is seen
        self._api = caller.api
        self._tap: WebSocketTap | None = None
        gate: Gate | None = None
        if self._api is not None:
            self._tap = self._open_tap(extensions)
            if caller.may_be_refused:
                gate = Gate(self._passes, self._hold, exchange.request.release)
        timeouts = (exchange.candidate or match.candidates[0]).timeouts
        self._is_gated = gate is not None
        self.relay = WebSocketRelay(
            sockets.reactor,
            sockets.clock,
            idle=timeouts.idle,
            stall=timeouts.client_stall,
            is_busy=self._is_busy,
            client_copy=self._client_sent,
            provider_copy=self._provider_sent,
            gate=None if gate is None else gate.feed,
        )

    def _open_tap(self, extensions: bytes | None) -> WebSocketTap:
        from llmproxy.stream.websocket import WebSocketTap

        limits, sockets = self._sockets.limits, self._sockets
        return WebSocketTap(
            extensions=extensions,
            model=self._exchange.trace.model,
            capture=self._match.route.capture,
            accumulate=limits.accumulate,
            event=limits.event,
            clock=sockets.clock,
            name=self._exchange.trace.id,
            ended=lambda one: self._record(one, EndReason.COMPLETE),
            degraded=sockets.metrics.degraded,
        )

    # -- what goes by -----------------------------------------------------------------------------

    def _client_sent(self, data: bytes) -> None:
        self._exchange.request.body_bytes += len(data)
        if self._tap is not None and not self._is_gated:
            self._tap.feed_client(data)

    def _provider_sent(self, data: bytes) -> None:
        self._exchange.request.sent += len(data)
        if self._tap is not None:
            self._tap.feed_provider(data)

    def _is_busy(self) -> bool:
        """Return whether a response may be under way; where that is not known it may."""
        return self._tap is None or self._tap.is_busy or not self._tap.knows_all

    # -- what may be refused ----------------------------------------------------------------------

    def _passes(self, message: bytes) -> bool:
        """Return whether a message of the client's is forwarded; if it is not, tell the client."""
        tap = self._tap
        if tap is None:
            return True
        try:
            try:
                event = read_client_event(message)
            except FAULTS:
                text = "The message cannot be read, and this client's limits depend on it."
                raise ProxyError(400, "bad_event", text) from None
            self._permit(event, tap)
            lease = self._admit(event, tap, len(message)) if event.asks else None
        except ProxyError as error:
            self._tell(error)
            return False
        if event.asks:
            tap.expect(event).lease = lease
        elif event.session is not None and event.session.model:
            tap.model = event.session.model
        return True

    def _permit(self, event: ClientEvent, tap: WebSocketTap) -> None:
        """Refuse a model that the client may not use here."""
        caller, request = self._caller, self._exchange.request
        names: tuple[Named, ...] = event.names
        if not caller.place.needs_model(caller.client) or not (names or event.asks):
            return
        asked = names or ((NoModel.WITH_BODY,) if tap.model is None else (tap.model,))
        match = caller.place.choose(caller.client, request.uri, asked)
        if match.route is not self._match.route:
            text = "This model takes another route; open a WebSocket that names it in its query."
            raise ProxyError(403, "model_forbidden", text)

    def _admit(self, event: ClientEvent, tap: WebSocketTap, size: int) -> Lease | None:
        if not self._caller.is_limited or not (event.is_wanted or not self._warms_up):
            return None
        if tap.is_full:
            text = f"{tap.most_running} responses are asked for on this WebSocket; none has begun."
            raise ProxyError(429, "too_many_responses", text)
        model = event.named or tap.model
        return self._sockets.client_limits.admit(self._caller.client, model, size)

    def _hold(self, count: int, size: int) -> bool:
        """Count bytes of a message as those of a request's body; return whether they may be."""
        try:
            if size > self._match.body_limit:
                text = "The message is longer than the route allows."
                raise ProxyError(413, "too_large", text)
            self._exchange.request.hold(count)
        except ProxyError as error:
            self._tell(error)
            return False
        return True

    def _tell(self, error: ProxyError) -> None:
        if self._api is not None:
            self.relay.tell(frame(TEXT, error_message(self._api, error), masked=False))

    # -- what responses there were ----------------------------------------------------------------

    def _record(self, response: SocketResponse, end: EndReason) -> None:
        """Write the record of a response that has ended; of a warm-up if it made something."""
        result = response.result(end)
        if not response.is_wanted:
            if not result.usage.output_tokens:
                return
            self._warms_up = False
        self._number += 1
        sockets, whole = self._sockets, self._exchange.trace
        now = sockets.clock()
        age = now - response.asked_at
        trace = msgspec.structs.replace(
            whole,
            time=timestamp(sockets.recorder.now() - age),
            id=f"{whole.id}-{self._number}",
            model=response.model,
            end_reason=result.end_reason,
            is_complete=result.end_reason is EndReason.COMPLETE,
            status=SWITCHING,
            attempts=[],
            degraded=[],
            chunks=response.events,
            duration_s=round(age, 6),
            head_s=None,
        )
        if response.first_at is not None:
            trace.first_chunk_s = round(response.first_at - response.asked_at, 6)
        sockets.inspection.note(trace, result, keeps=self._match.route.capture == "content")
        self._settle(response, trace)
        self._add(trace)
        sockets.recorder.record_part(trace)

    def _settle(self, response: SocketResponse, trace: Trace) -> None:
        lease = response.lease
        if lease is None and self._caller.is_limited:  # it began by itself, as in Realtime
            with suppress(ProxyError):
                admit = self._sockets.client_limits.admit
                lease = admit(self._caller.client, response.model, 0)
        if not isinstance(lease, Lease):
            return
        tokens = (trace.input_tokens or 0) + (trace.output_tokens or 0)
        if trace.usage == "reported":
            trace.counted_tokens = lease.settle(tokens)
        else:
            trace.counted_tokens = lease.settle_unknown(tokens, response.events, True)

    def _add(self, trace: Trace) -> None:
        """Add a response to what the connection's record sums up."""
        self._usage.add(trace.usage or "none")
        for name in (*_TOKENS, "counted_tokens"):
            if (count := getattr(trace, name)) is not None:
                self._sums[name] = self._sums.get(name, 0) + count

    # -- the end ----------------------------------------------------------------------------------

    def judged(self, ending: Ending) -> EndReason:
        """Return how it ended, or raise that.

        Raises:
            ProxyError, ClientGone: as :meth:`WebSockets.serve` says.
        """
        if ending.why is not None:
            raise ending.why
        if ending.by == "proxy":
            return EndReason.COMPLETE
        tap = self._tap
        is_whole = tap is not None and tap.knows_all and not tap.is_busy
        if ending.code is None:
            if ending.by == "provider":
                raise upstream_broken("the provider left without a close frame")
            if is_whole:  # as Codex does
                return EndReason.COMPLETE
            raise ClientGone("the client left without a close frame")
        if ending.closed_by == "provider":
            if ending.code not in _GOOD and ending.code <= _LAST_STANDARD:
                return EndReason.UPSTREAM_FAILED
            if tap is not None and tap.knows_all and tap.is_busy:
                return EndReason.UNFINISHED
        elif tap is not None and tap.is_busy:
            raise ClientGone("the client left within a response")
        return EndReason.COMPLETE

    def conclude(self, end: EndReason) -> None:
        """Write down what was still under way, and what all of it comes to."""
        tap, trace = self._tap, self._exchange.trace
        self._exchange.request.release()
        if tap is None:
            return
        for response in tap.finish():
            self._record(response, end)
        trace.responses = self._number
        trace.usage = "none"
        if self._usage:
            trace.usage = "partial" if len(self._usage) > 1 else next(iter(self._usage))
        for name, total in self._sums.items():
            setattr(trace, name, total)
        trace.degraded = [reason.value for reason in Degraded if reason in tap.degraded]
