"""OpenAI's responses: named events, the last of which holds the whole response and its usage.

``response.created`` tells id and model; ``response.completed``, ``.incomplete`` and ``.failed`` end
the stream.  A failed response, and an event ``error``, are the provider's own failure.
"""

from __future__ import annotations

from typing import Any

import msgspec

from llmproxy.dialects.accumulated import Accumulated
from llmproxy.dialects.dialect import Dialect
from llmproxy.dialects.endpoint import Count, Endpoint, Part, json_text, read_error
from llmproxy.dialects.openai import InputDetails, OutputDetails

_ENDINGS = frozenset(("response.completed", "response.incomplete", "response.failed"))

_TEXT_ONLY = frozenset(
    b"response." + name
    for name in (
        b"output_text.delta",
        b"output_text.done",
        b"refusal.delta",
        b"reasoning_text.delta",
        b"reasoning_text.done",
        b"reasoning_summary_text.delta",
        b"reasoning_summary_text.done",
        b"function_call_arguments.delta",
        b"function_call_arguments.done",
        b"custom_tool_call_input.delta",
        b"custom_tool_call_input.done",
        b"content_part.added",
        b"content_part.done",
        b"output_item.added",
        b"output_item.done",
        b"image_generation_call.partial_image",
    )
)


class _Usage(Part, gc=False):
    input_tokens: Count | None = None
    output_tokens: Count | None = None
    input_tokens_details: InputDetails | None = None
    output_tokens_details: OutputDetails | None = None


class _Incomplete(Part, gc=False):
    reason: str | None = None


class _Response(Part, gc=False):
    id: str | None = None
    model: str | None = None
    status: str | None = None
    incomplete_details: _Incomplete | None = None
    usage: _Usage | None = None
    error: Any = None


class _Content(Part, gc=False):
    type: str = ""
    text: str | None = None


class _Item(Part, gc=False):
    """An output item: a message, a tool call, or one of many others."""

    type: str = ""
    call_id: str | None = None
    name: Any = None
    arguments: Any = None
    input: Any = None
    content: Any = None


class _Document(_Response, gc=False):
    output: list[_Item] | None = None


class _Event(Part, gc=False):
    type: str = ""
    response: _Response | None = None
    delta: Any = None
    item: _Item | None = None
    output_index: int = 0
    error: Any = None
    code: Any = None
    message: Any = None


_event = msgspec.json.Decoder(_Event).decode
_response = msgspec.json.Decoder(_Response).decode
_document = msgspec.json.Decoder(_Document).decode

_CALLS = ("function_call", "custom_tool_call")
_ARGUMENTS = ("response.function_call_arguments.delta", "response.custom_tool_call_input.delta")


def _read_event(data: bytes, seen: Accumulated) -> None:
    event = _event(data)
    kind = event.type
    if event.response is not None:
        _take(event.response, seen)
        if kind in _ENDINGS:
            seen.has_ended = True
            _finish(event.response, seen)
    elif kind == "response.output_text.delta":
        if seen.keeps and isinstance(event.delta, str):
            seen.add_text(event.delta)
    elif kind in _ARGUMENTS:
        if seen.keeps and isinstance(event.delta, str):
            seen.add_arguments(event.output_index, event.delta)
    elif kind == "response.output_item.added":
        if seen.keeps and event.item is not None and event.item.type in _CALLS:
            name = event.item.name
            seen.open_call(event.output_index, event.item.call_id, json_text(name))
    elif kind == "error" or event.error is not None:
        own = {"code": event.code, "message": event.message}
        read_error(event.error or own, seen)


def _read_document(data: bytes, seen: Accumulated) -> None:
    if seen.keeps:
        document = _document(data)
        _keep(document.output or [], seen)
        response: _Response = document
    else:
        response = _response(data)
    _take(response, seen)
    _finish(response, seen)


def _take(response: _Response, seen: Accumulated) -> None:
    seen.name(response.id, response.model)
    if response.error is not None:
        read_error(response.error, seen)
    elif response.status == "failed":
        seen.fail(None, None)
    usage = response.usage
    if usage is not None:
        read = usage.input_tokens_details or InputDetails()
        made = usage.output_tokens_details or OutputDetails()
        seen.count(
            input_tokens=usage.input_tokens,
            output_tokens=usage.output_tokens,
            cache_read_tokens=read.cached_tokens,
            cache_write_tokens=read.cache_write_tokens,
            reasoning_tokens=made.reasoning_tokens,
        )


def _finish(response: _Response, seen: Accumulated) -> None:
    """The status is the finish reason, unless it has one itself (``max_output_tokens``)."""
    if response.status not in ("queued", "in_progress"):
        details = response.incomplete_details
        seen.finish((details and details.reason) or response.status)


def _keep(output: list[_Item], seen: Accumulated) -> None:
    for key, item in enumerate(output):
        if item.type in _CALLS:
            seen.open_call(key, item.call_id, json_text(item.name))
            given = item.input if item.arguments is None else item.arguments
            seen.add_arguments(key, json_text(given))
        elif item.type == "message":
            for part in msgspec.convert(item.content, list[_Content]):
                if part.type == "output_text" and part.text:
                    seen.add_text(part.text)


RESPONSES = Endpoint(
    "openai responses",
    Dialect.OPENAI,
    "chat",
    _read_event,
    _read_document,
    end_marker="response.completed, .incomplete or .failed",
    text_only=_TEXT_ONLY,
)
