"""Traces as OpenTelemetry spans, in the JSON encoding of OTLP.

A trace becomes one span.  An attribute has the name that the semantic conventions give it
(``gen_ai.*``, ``http.*``, ``error.type``), else a name below ``llmproxy.*``.  What is not known is
left out.  A span that did not end as ``complete`` is an error, whatever its status was.  A
response's text and tool calls never go into a span.  Nothing here sends anything; that
is ``otlp.py``.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from datetime import datetime
from operator import attrgetter

import msgspec
from msgspec import UNSET

from llmproxy.dialects.endpoint import Endpoint
from llmproxy.dialects.endpoints import endpoint_of_record
from llmproxy.record.trace import Trace, trace_id

_CLIENT = 3  # SPAN_KIND_CLIENT, as the conventions have it for a call of a model
_ERROR = 2  # STATUS_CODE_ERROR

_SLICE = 16
"""Spans after which other threads may run: encoding for long would hold up the streams."""


def _string(value: object) -> dict[str, object]:
    return {"stringValue": value}


def _integer(value: object) -> dict[str, object]:
    return {"intValue": str(value)}  # 64 bits are text in protobuf's JSON


def _double(value: object) -> dict[str, object]:
    return {"doubleValue": value}


def _boolean(value: object) -> dict[str, object]:
    return {"boolValue": value}


def _strings(values: Iterable[object]) -> dict[str, object]:
    return {"arrayValue": {"values": [_string(value) for value in values]}}


_Kind = Callable[[object], "dict[str, object]"]

_ATTRIBUTES: tuple[tuple[str, str, _Kind], ...] = (
    ("gen_ai.provider.name", "dialect", _string),
    ("gen_ai.request.model", "model", _string),
    ("gen_ai.response.model", "served_model", _string),
    ("gen_ai.conversation.id", "session", _string),
    ("gen_ai.usage.output_tokens", "output_tokens", _integer),
    ("gen_ai.usage.cache_read.input_tokens", "cache_read_tokens", _integer),
    ("gen_ai.usage.cache_creation.input_tokens", "cache_write_tokens", _integer),
    ("gen_ai.usage.reasoning.output_tokens", "reasoning_tokens", _integer),
    ("gen_ai.response.id", "response_id", _string),
    ("http.request.method", "method", _string),
    ("http.response.status_code", "status", _integer),
    ("url.path", "path", _string),
    ("user_agent.original", "user_agent", _string),
    ("client.address", "peer", _string),
    ("llmproxy.id", "id", _string),
    ("llmproxy.client_request_id", "client_request_id", _string),
    ("llmproxy.client", "client", _string),
    ("llmproxy.route", "route", _string),
    ("llmproxy.provider", "provider", _string),
    ("llmproxy.stream", "stream", _boolean),
    ("llmproxy.end_reason", "end_reason", _string),
    ("llmproxy.error", "error", _string),
    ("llmproxy.is_complete", "is_complete", _boolean),
    ("llmproxy.bytes_in", "bytes_in", _integer),
    ("llmproxy.bytes_out", "bytes_out", _integer),
    ("llmproxy.chunks", "chunks", _integer),
    ("llmproxy.head_s", "head_s", _double),
    ("llmproxy.first_chunk_s", "first_chunk_s", _double),
    ("llmproxy.longest_gap_s", "longest_gap_s", _double),
    ("llmproxy.paused_s", "paused_s", _double),
    ("llmproxy.queued_s", "queued_s", _double),
    ("llmproxy.usage", "usage", _string),
    ("llmproxy.on_disconnect", "on_disconnect", _string),
    ("llmproxy.model_from", "model_from", _string),
    ("llmproxy.counted_tokens", "counted_tokens", _integer),
    ("llmproxy.tunnel", "tunnel", _string),
    ("llmproxy.responses", "responses", _integer),
    ("llmproxy.events", "events", _integer),
    ("llmproxy.chunks_at_once", "chunks_at_once", _integer),
    ("llmproxy.last_chunk_s", "last_chunk_s", _double),
    ("llmproxy.buffered_upstream", "buffered_upstream", _boolean),
    ("llmproxy.resent", "resent", _string),
)
_values_of = attrgetter(*(name for _, name, _ in _ATTRIBUTES))


def export_request(traces: list[Trace], resource: dict[str, str]) -> tuple[bytes, int]:
    """Return the body of an OTLP request, and how many traces cannot be a span.

    Args:
        traces: at least one.
        resource: attributes of this process.
    """
    encoder = msgspec.json.Encoder()
    spans: list[msgspec.Raw] = []
    for at in range(0, len(traces), _SLICE):
        spans += filter(None, (_encoded(trace, encoder) for trace in traces[at : at + _SLICE]))
        time.sleep(0)  # lets other threads run
    body = {
        "resourceSpans": [
            {
                "resource": {
                    "attributes": [
                        {"key": key, "value": _string(value)} for key, value in resource.items()
                    ]
                },
                "scopeSpans": [{"scope": {"name": "llmproxy"}, "spans": spans}],
            }
        ]
    }
    return encoder.encode(body), len(traces) - len(spans)


def _encoded(trace: Trace, encoder: msgspec.json.Encoder) -> msgspec.Raw | None:
    """Return the trace's span; None where it cannot be one (half a surrogate pair)."""
    try:
        return msgspec.Raw(encoder.encode(_span(trace)))
    except Exception:
        return None


def _span(trace: Trace) -> dict[str, object]:
    began = _nanoseconds(trace.time)
    span_id = trace_id(trace)
    row = endpoint_of_record(trace.path.encode())
    words = (trace.method if row is None else row.operation, trace.model or trace.route)
    return {
        "traceId": span_id,
        "spanId": span_id[-16:],
        "name": " ".join(word for word in words if word) or "request",
        "kind": _CLIENT,
        "startTimeUnixNano": str(began),
        "endTimeUnixNano": str(began + round(trace.duration_s * 1e9)),
        "attributes": list(_attributes(trace, row)),
        "status": {} if trace.is_complete else {"code": _ERROR, "message": trace.end_reason},
    }


def _attributes(trace: Trace, row: Endpoint | None) -> Iterable[dict[str, object]]:
    for (key, _, kind), value in zip(_ATTRIBUTES, _values_of(trace), strict=True):
        if value is not None and value is not UNSET:
            yield {"key": key, "value": kind(value)}
    if row is not None:
        yield {"key": "gen_ai.operation.name", "value": _string(row.operation)}
    if trace.input_tokens is not None:
        count = _whole_input(trace, trace.input_tokens, row)
        yield {"key": "gen_ai.usage.input_tokens", "value": _integer(count)}
    if not trace.is_complete:
        yield {"key": "error.type", "value": _string(trace.error or trace.end_reason)}
    if trace.finish_reason is not UNSET:
        yield {"key": "gen_ai.response.finish_reasons", "value": _strings([trace.finish_reason])}
    if trace.attempts:
        tries = (f"{one.provider} {one.outcome} {one.seconds:.3f}" for one in trace.attempts)
        yield {"key": "llmproxy.attempts", "value": _strings(tries)}
    if trace.degraded:
        yield {"key": "llmproxy.degraded", "value": _strings(trace.degraded)}


def _whole_input(trace: Trace, count: int, row: Endpoint | None) -> int:
    """Return the input with the tokens of the cache, as the conventions want it.

    A record has the provider's own number, and that of Anthropic's API lacks them.
    """
    if row is None or row.input_has_cached:
        return count
    return count + (trace.cache_read_tokens or 0) + (trace.cache_write_tokens or 0)


def _nanoseconds(time_text: str) -> int:
    """Return a record's time in nanoseconds since the epoch, exact to its millisecond."""
    return round(datetime.fromisoformat(time_text).timestamp() * 1000) * 1_000_000
