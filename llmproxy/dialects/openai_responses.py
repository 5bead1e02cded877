"""OpenAI's responses: named events; the last one holds the whole response and its usage.

``response.created`` has the id and the model.  ``response.completed``, ``.incomplete`` and
``.failed`` end the stream.  A failed response, and an event ``error``, are the provider's own
failure.
"""

from __future__ import annotations

import re

import msgspec

from llmproxy.dialects.accumulated import Accumulated
from llmproxy.dialects.dialect import Dialect
from llmproxy.dialects.endpoint import (
    Count,
    Endpoint,
    ErrorMember,
    Part,
    read_error,
)
from llmproxy.dialects.failures import read_unknown
from llmproxy.dialects.lenient import FAULTS, decoder, raw_text
from llmproxy.dialects.openai import InputDetails, OutputDetails

_ENDINGS = frozenset(("response.completed", "response.incomplete", "response.failed"))

_ITEMS = 1024
"""Most output items, and most parts of one, that are looked at."""

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
    error: ErrorMember = None


class _Content(Part, gc=False):
    type: str = ""
    text: str | None = None


class _Contents(Part, gc=False):
    content: list[_Content] | None = None


class _Item(Part, gc=False):
    """An output item: a message, a tool call, or one of many others."""

    type: str = ""
    call_id: str | None = None
    name: msgspec.Raw = msgspec.Raw()
    arguments: msgspec.Raw = msgspec.Raw()
    input: msgspec.Raw = msgspec.Raw()
    content: msgspec.Raw = msgspec.Raw()


class _Document(_Response, gc=False):
    output: list[_Item] | None = None


class _Event(Part, gc=False):
    """An event, as far as usage needs it."""

    type: str = ""
    response: _Response | None = None
    error: ErrorMember = None


class _Other(Part, gc=False):
    """An object of which nothing is read."""


class _WholeEvent(_Event, gc=False):
    delta: str | _Other | None = None
    item: _Item | None = None
    output_index: int = 0


_event = decoder(_Event)
_whole_event = decoder(_WholeEvent)
_response = decoder(_Response)
_document = decoder(_Document)
_contents = decoder(_Contents)

_CALLS = ("function_call", "custom_tool_call")
_ARGUMENTS = ("response.function_call_arguments.delta", "response.custom_tool_call_input.delta")


def _read_event(data: bytes, seen: Accumulated) -> None:
    if seen.keeps:
        whole = _whole_event(data, seen)
        event: _Event = whole
        _keep_event(whole, seen)
    else:
        event = _event(data, seen)
    kind = event.type
    if event.response is not None:
        is_end = kind in _ENDINGS
        _take(event.response, seen, is_opening=not is_end)
        if is_end:
            seen.has_ended = True
            _finish(event.response, seen)
    elif event.error is not None:
        read_error(event.error, seen)
    elif kind in ("", "error"):
        read_unknown(data, seen)


def _keep_event(event: _WholeEvent, seen: Accumulated) -> None:
    kind = event.type
    if kind == "response.output_text.delta":
        if isinstance(event.delta, str):
            seen.add_text(event.delta)
    elif kind in _ARGUMENTS:
        if isinstance(event.delta, str):
            seen.add_arguments(event.output_index, event.delta)
    elif (
        kind == "response.output_item.added"
        and event.item is not None
        and event.item.type in _CALLS
    ):
        seen.open_call(event.output_index, event.item.call_id, raw_text(event.item.name))


def _read_document(data: bytes, seen: Accumulated) -> None:
    if seen.keeps:
        document = _document(data, seen)
        response: _Response = document
        _keep(document.output or [], seen)
    else:
        response = _response(data, seen)
    _take(response, seen)
    _finish(response, seen)
    if response.id is None and response.usage is None:
        read_unknown(data, seen)


def _take(response: _Response, seen: Accumulated, *, is_opening: bool = False) -> None:
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
            is_opening=is_opening,
        )


def _finish(response: _Response, seen: Accumulated) -> None:
    """Take the finish reason: the reason for being incomplete if there is one, else the status."""
    if response.status not in ("queued", "in_progress"):
        details = response.incomplete_details
        seen.finish((details and details.reason) or response.status)


def _keep(output: list[_Item], seen: Accumulated) -> None:
    for key, item in enumerate(output[:_ITEMS]):
        if item.type in _CALLS:
            seen.open_call(key, item.call_id, raw_text(item.name))
            seen.add_arguments(key, raw_text(item.arguments) or raw_text(item.input))
        elif item.type == "message":
            for part in _parts(item.content, seen)[:_ITEMS]:
                if part.type == "output_text" and part.text:
                    seen.add_text(part.text)


def _parts(content: msgspec.Raw, seen: Accumulated) -> list[_Content]:
    try:
        return _contents(b'{"content":%b}' % bytes(content), seen).content or []
    except FAULTS:
        seen.is_odd = True
        return []


RESPONSES = Endpoint(
    "openai responses",
    Dialect.OPENAI,
    "chat",
    _read_event,
    _read_document,
    end_marker="response.completed, .incomplete or .failed",
    may_end=re.compile(rb"response\.(?:completed|incomplete|failed)"),
    needs_blank_line=True,
    has_long_marker=True,
    text_only=_TEXT_ONLY,
)
COMPACT = msgspec.structs.replace(RESPONSES, name="openai compact")
"""``POST /responses/compact``: a document with ``output`` and ``usage``, and no status."""
