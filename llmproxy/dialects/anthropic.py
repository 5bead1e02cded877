"""Anthropic's messages: named events around content blocks, usage at both ends.

``message_start`` has the id, the model and the first counts.  The counts of ``message_delta`` are
totals and replace the first ones: without them, the first ones are not final.  ``message_stop``
ends the stream.  ``error`` and ``ping`` may come anywhere.  Bedrock adds its own counts to the last
event.
"""

from __future__ import annotations

import re

import msgspec

from llmproxy.dialects.accumulated import Accumulated
from llmproxy.dialects.dialect import Dialect
from llmproxy.dialects.endpoint import Count, Endpoint, ErrorMember, Part, read_error
from llmproxy.dialects.failures import read_unknown
from llmproxy.dialects.lenient import decoder, raw_text

_TEXT_ONLY = frozenset(
    (b"content_block_start", b"content_block_delta", b"content_block_stop", b"ping")
)
_BLOCKS = 1024
"""Most content blocks that are looked at in a document."""

_CALLS = ("tool_use", "server_tool_use", "mcp_tool_use")


class _Details(Part, gc=False):
    thinking_tokens: Count | None = None


class _Usage(Part, gc=False):
    input_tokens: Count | None = None
    output_tokens: Count | None = None
    cache_read_input_tokens: Count | None = None
    cache_creation_input_tokens: Count | None = None
    output_tokens_details: _Details | None = None


class _Metrics(Part, gc=False, rename="camel"):
    """Bedrock's ``amazon-bedrock-invocationMetrics``."""

    input_token_count: Count | None = None
    output_token_count: Count | None = None
    cache_read_input_token_count: Count | None = None
    cache_write_input_token_count: Count | None = None


class _Block(Part, gc=False):
    type: str = ""
    id: msgspec.Raw = msgspec.Raw()
    name: msgspec.Raw = msgspec.Raw()
    text: msgspec.Raw = msgspec.Raw()
    input: msgspec.Raw = msgspec.Raw()


class _Message(Part, gc=False):
    """A message as ``message_start`` holds it, or a whole response without its content."""

    id: str | None = None
    model: str | None = None
    stop_reason: str | None = None
    usage: _Usage | None = None
    error: ErrorMember = None


class _Document(_Message, gc=False):
    content: list[_Block] | None = None


class _Ending(Part, gc=False):
    """The ``delta`` of an event, as far as usage needs it."""

    stop_reason: str | None = None
    usage: _Usage | None = None  # servers that put it one level too deep


class _Delta(_Ending, gc=False):
    type: str = ""
    text: str | None = None
    partial_json: str | None = None


class _Event(Part, gc=False):
    """An event, as far as usage needs it."""

    type: str = ""
    message: _Message | str | None = None
    delta: _Ending | None = None
    usage: _Usage | None = None
    error: ErrorMember = None
    metrics: _Metrics | None = msgspec.field(default=None, name="amazon-bedrock-invocationMetrics")


class _WholeEvent(_Event, gc=False):
    index: int = 0
    content_block: _Block | None = None
    delta: _Delta | None = None


_event = decoder(_Event)
_whole_event = decoder(_WholeEvent)
_message = decoder(_Message)
_document = decoder(_Document)


def _read_event(data: bytes, seen: Accumulated) -> None:
    if seen.keeps:
        whole = _whole_event(data, seen)
        event: _Event = whole
        _keep(whole, seen)
    else:
        event = _event(data, seen)
    kind = event.type
    if kind == "message_start":
        if isinstance(event.message, _Message):
            _take(event.message, seen, is_opening=True)
    elif kind == "message_delta":
        delta = event.delta or _Ending()
        usage = event.usage or delta.usage
        if usage is not None:
            _count(usage, seen)
        seen.finish(delta.stop_reason)
    elif kind == "message_stop":
        seen.has_ended = True
        if event.metrics is not None:
            _count_metrics(event.metrics, seen)
    if event.error is not None:
        read_error(event.error, seen)
    elif kind in ("", "error"):
        read_unknown(data, seen)


def _read_document(data: bytes, seen: Accumulated) -> None:
    if seen.keeps:
        document = _document(data, seen)
        for index, block in enumerate((document.content or ())[:_BLOCKS]):
            _open(index, block, seen)
            if block.type in _CALLS and (arguments := raw_text(block.input)):
                seen.add_arguments(index, arguments)
        message: _Message = document
    else:
        message = _message(data, seen)
    _take(message, seen)
    if message.id is None and message.usage is None and message.error is None:
        read_unknown(data, seen)


def _take(message: _Message, seen: Accumulated, *, is_opening: bool = False) -> None:
    seen.name(message.id, message.model)
    seen.finish(message.stop_reason)
    if message.usage is not None:
        _count(message.usage, seen, is_opening=is_opening)
    if message.error is not None:
        read_error(message.error, seen)


def _open(index: int, block: _Block, seen: Accumulated) -> None:
    if block.type == "text":
        seen.add_text(raw_text(block.text))
    elif block.type in _CALLS:
        seen.open_call(index, raw_text(block.id), raw_text(block.name))


def _keep(event: _WholeEvent, seen: Accumulated) -> None:
    """Hold the content of an event of a block."""
    delta = event.delta
    if event.type == "content_block_start" and event.content_block is not None:
        _open(event.index, event.content_block, seen)
    elif event.type == "content_block_delta" and delta is not None:
        if delta.type == "text_delta" and delta.text:
            seen.add_text(delta.text)
        elif delta.type == "input_json_delta" and delta.partial_json:
            seen.add_arguments(event.index, delta.partial_json)


def _count(usage: _Usage, seen: Accumulated, *, is_opening: bool = False) -> None:
    details = usage.output_tokens_details or _Details()
    seen.count(
        input_tokens=usage.input_tokens,
        output_tokens=usage.output_tokens,
        cache_read_tokens=usage.cache_read_input_tokens,
        cache_write_tokens=usage.cache_creation_input_tokens,
        reasoning_tokens=details.thinking_tokens,
        is_opening=is_opening,
    )


def _count_metrics(metrics: _Metrics, seen: Accumulated) -> None:
    seen.count(
        input_tokens=metrics.input_token_count,
        output_tokens=metrics.output_token_count,
        cache_read_tokens=metrics.cache_read_input_token_count,
        cache_write_tokens=metrics.cache_write_input_token_count,
    )


MESSAGES = Endpoint(
    "anthropic messages",
    Dialect.ANTHROPIC,
    "chat",
    _read_event,
    _read_document,
    end_marker="message_stop",
    may_end=re.compile(rb"message_stop"),
    needs_blank_line=True,
    input_has_cached=False,
    text_only=_TEXT_ONLY,
)
