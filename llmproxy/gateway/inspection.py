"""What a response said, for the record of its request: the tap is opened and read out here.

This module stands between the gateway, which relays, and ``stream/tap.py``, which reads the copy.
It knows which responses are worth reading, and to which field of a trace and which counter each
finding goes.
"""

from __future__ import annotations

from collections.abc import Callable, Collection

from twisted.logger import Logger

from llmproxy.config import Config
from llmproxy.dialects.dialect import Dialect
from llmproxy.dialects.endpoint import Endpoint
from llmproxy.dialects.endpoints import endpoint
from llmproxy.errors import EndReason
from llmproxy.gateway.exchange import Exchange
from llmproxy.policy.routes import RouteMatch
from llmproxy.record.metrics import Metrics
from llmproxy.record.trace import Trace
from llmproxy.stream.arrivals import are_held_back
from llmproxy.stream.relay import Relay, Whole
from llmproxy.stream.tap import Degraded, DocumentTap, Result, StreamAccumulator, read_document
from llmproxy.stream.websocket_relay import WebSocketRelay

_log = Logger()

Tap = StreamAccumulator | DocumentTap

_ANSWERED = range(200, 204)
"""The statuses of an endpoint's own responses: no refusal, no redirect, nothing without a body."""


class Inspection:
    """Opens taps, and writes down what they found; an error of ours in that stays here.

    Args:
        config: the limits of a tap, and the models that a metric may name.
        metrics: counts tokens and what taps did not understand.
        clock: monotonic seconds.
        catch_up: feeds the taps the chunks that still wait; called before a tap is asked anything.
    """

    def __init__(
        self,
        config: Config,
        metrics: Metrics,
        clock: Callable[[], float],
        catch_up: Callable[[], object] = lambda: None,
    ) -> None:
        self._limits = config.limits
        self._metrics, self._degraded = metrics, metrics.degraded
        self._models = named_models(config)
        self._clock = clock
        self._catch_up = catch_up

    def open(self, exchange: Exchange, match: RouteMatch) -> StreamAccumulator | None:
        """Return the tap for a response whose head has come, or None where it cannot be read."""
        if exchange.endpoint is None or exchange.status not in _ANSWERED:
            return None
        try:
            tap = StreamAccumulator(
                exchange.endpoint,
                content_type=exchange.content_type,
                content_encoding=exchange.content_encoding,
                capture=match.route.capture,
                accumulate=self._limits.accumulate,
                event=self._limits.event,
                name=exchange.trace.id,
                degraded=self._degraded,
                clock=self._clock,
                catch_up=self._catch_up,
            )
        except Exception:
            self._broke(exchange.trace)
            return None
        return tap if tap.is_reading or tap.degraded else None

    def read(self, exchange: Exchange, match: RouteMatch, body: bytes) -> Tap | None:
        """Read a whole body, of a response whose head has come; None where it cannot be read."""
        if exchange.endpoint is None or exchange.status not in _ANSWERED:
            return None
        try:
            found = read_document(
                exchange.endpoint,
                body,
                content_type=exchange.content_type,
                content_encoding=exchange.content_encoding,
                capture=match.route.capture,
                accumulate=self._limits.accumulate,
                event=self._limits.event,
            )
        except Exception:
            self._broke(exchange.trace)
            return None
        if found is not None:
            return found
        if (tap := self.open(exchange, match)) is not None:
            tap.feed(body)
        return tap

    def conclude(self, exchange: Exchange, end: EndReason) -> EndReason:
        """Write down what was found; return why the request ended, now that its content is known.

        It never raises: whatever was found, the request has its record.

        Args:
            end: why it ended, as far as the wires know.
        """
        trace = exchange.trace
        if exchange.is_detached:
            trace.on_disconnect = "drain"
        elif exchange.left is not None and not exchange.is_read_out:
            trace.on_disconnect = "cancel"
        if exchange.endpoint is not None:
            trace.usage = "none"
        try:
            found = self._read_out(exchange, end)
        except Exception:
            self._broke(trace)
            return end
        # What came after the client had left, or found no room there, was forwarded to nobody.
        left = exchange.left
        return end if exchange.is_detached or (left and not left.had_room) else found

    def _read_out(self, exchange: Exchange, end: EndReason) -> EndReason:
        trace, tap = exchange.trace, exchange.tap
        if tap is None:
            return end
        result = tap.finish(end)
        if exchange.relay is not None:
            self._note_arrivals(exchange, exchange.relay, tap.events)
        match = exchange.match
        self.note(trace, result, keeps=match is not None and match.route.capture == "content")
        return result.end_reason

    def _note_arrivals(
        self, exchange: Exchange, relay: Relay | Whole | WebSocketRelay, events: int
    ) -> None:
        """Write down how the response came, and whether some hop on its way held it back.

        What waited in the kernel while the client took nothing comes at once, whoever sent it.
        """
        trace, statistics = exchange.trace, relay.statistics
        trace.events = events
        if trace.stream and not relay.paused_s:
            seconds = statistics.last_at - exchange.started
            trace.buffered_upstream = are_held_back(
                events=events,
                chunks=statistics.chunks,
                at_once=statistics.at_once,
                seconds=seconds,
            )
            if trace.buffered_upstream:
                self._metrics.held_back(trace.provider or "")

    def note(self, trace: Trace, result: Result, *, keeps: bool) -> None:
        """Write down what was in one response, and count its tokens.

        Args:
            keeps: the content as well.
        """
        usage = result.usage
        trace.served_model, trace.usage = result.model, usage.provenance
        trace.input_tokens, trace.output_tokens = usage.input_tokens, usage.output_tokens
        trace.cache_read_tokens = usage.cache_read_tokens
        trace.cache_write_tokens = usage.cache_write_tokens
        trace.reasoning_tokens = usage.reasoning_tokens
        if result.degraded:
            trace.degraded = [reason.value for reason in result.degraded]
        if keeps:
            _keep_content(trace, result)
        model = trace.model if trace.model in self._models else "other"
        self._metrics.used(
            (trace.client or "", trace.provider or "", model or "other"),
            usage.input_tokens or 0,
            usage.output_tokens or 0,
            usage.cache_read_tokens or 0,
            usage.cache_write_tokens or 0,
            usage.reasoning_tokens or 0,
        )

    def _broke(self, trace: Trace) -> None:
        _log.failure("{id}: what its response holds could not be read", id=trace.id)
        trace.degraded = [Degraded.INTERNAL.value]
        self._metrics.degraded(Degraded.INTERNAL)


def endpoint_of(method: bytes, dialect: Dialect, target: bytes) -> Endpoint | None:
    """Return how the response to such a request is to be read, or None where it is not."""
    return endpoint(dialect, target) if method == b"POST" else None


def _keep_content(trace: Trace, result: Result) -> None:
    trace.text, trace.tool_calls = result.text, result.tool_calls
    if result.finish_reason is not None:
        trace.finish_reason = result.finish_reason
    if result.response_id is not None:
        trace.response_id = result.response_id
    if result.is_cut:
        trace.degraded = [*trace.degraded, "cut"]


def named_models(config: Config) -> Collection[str]:
    """Return the models that a configuration names in full: a closed set, fit for labels."""
    patterns = [p for route in config.routes for p in route.models or ()]
    patterns += [p for client in config.clients.values() for p in client.models]
    overrides = [o.model for route in config.routes for o in route.override.values()]
    named = {pattern for pattern in patterns if "*" not in pattern and pattern != "-"}
    return frozenset(named | {model for model in overrides if model is not None})
