"""Anthropic's messages: named events around content blocks, usage at both ends.

``message_start`` tells id, model and first counts.  Those of ``message_delta`` are totals, which
replace them; ``message_stop`` ends the stream.  ``error`` may come anywhere, ``ping`` too.
"""

from __future__ import annotations

from typing import Any

import msgspec

from llmproxy.dialects.accumulated import Accumulated
from llmproxy.dialects.dialect import Dialect
from llmproxy.dialects.endpoint import Count, Endpoint, Part, json_text, read_error

_TEXT_ONLY = frozenset(
    (b"content_block_start", b"content_block_delta", b"content_block_stop", b"ping")
)
_CALLS = ("tool_use", "server_tool_use", "mcp_tool_use")


class _Details(Part, gc=False):
    thinking_tokens: Count | None = None


class _Usage(Part, gc=False):
    input_tokens: Count | None = None
    output_tokens: Count | None = None
    cache_read_input_tokens: Count | None = None
    cache_creation_input_tokens: Count | None = None
    output_tokens_details: _Details | None = None


class _Block(Part, gc=False):
    type: str = ""
    id: Any = None
    name: Any = None
    text: Any = None
    input: Any = None


class _Message(Part, gc=False):
    """A message as ``message_start`` holds it, or a whole response without its content."""

    id: str | None = None
    model: str | None = None
    stop_reason: str | None = None
    usage: _Usage | None = None
    error: Any = None


class _Document(_Message, gc=False):
    content: list[_Block] | None = None


class _Delta(Part, gc=False):
    type: str = ""
    text: str | None = None
    partial_json: str | None = None
    stop_reason: str | None = None


class _Event(Part, gc=False):
    type: str = ""
    message: _Message | None = None
    index: int = 0
    content_block: _Block | None = None
    delta: _Delta | None = None
    usage: _Usage | None = None
    error: Any = None


_event = msgspec.json.Decoder(_Event).decode
_message = msgspec.json.Decoder(_Message).decode
_document = msgspec.json.Decoder(_Document).decode


def _read_event(data: bytes, seen: Accumulated) -> None:
    event = _event(data)
    kind = event.type
    if kind == "content_block_delta":
        if seen.keeps and event.delta is not None:
            _keep(event.index, event.delta, seen)
    elif kind == "content_block_start":
        if seen.keeps and event.content_block is not None:
            _open(event.index, event.content_block, seen)
    elif kind == "message_start":
        if event.message is not None:
            _take(event.message, seen)
    elif kind == "message_delta":
        if event.usage is not None:
            _count(event.usage, seen)
        if event.delta is not None:
            seen.finish(event.delta.stop_reason)
    elif kind == "message_stop":
        seen.has_ended = True
    elif kind == "error":
        read_error(event.error or "error", seen)


def _read_document(data: bytes, seen: Accumulated) -> None:
    if seen.keeps:
        document = _document(data)
        for index, block in enumerate(document.content or ()):
            _open(index, block, seen)
            if block.type in _CALLS and block.input is not None:
                seen.add_arguments(index, json_text(block.input))
        message: _Message = document
    else:
        message = _message(data)
    _take(message, seen)


def _take(message: _Message, seen: Accumulated) -> None:
    seen.name(message.id, message.model)
    seen.finish(message.stop_reason)
    if message.usage is not None:
        _count(message.usage, seen)
    if message.error is not None:
        read_error(message.error, seen)


def _open(index: int, block: _Block, seen: Accumulated) -> None:
    if block.type == "text":
        if block.text and isinstance(block.text, str):
            seen.add_text(block.text)
    elif block.type in _CALLS:
        seen.open_call(index, json_text(block.id), json_text(block.name))


def _keep(index: int, delta: _Delta, seen: Accumulated) -> None:
    if delta.type == "text_delta":
        if delta.text:
            seen.add_text(delta.text)
    elif delta.type == "input_json_delta" and delta.partial_json:
        seen.add_arguments(index, delta.partial_json)


def _count(usage: _Usage, seen: Accumulated) -> None:
    details = usage.output_tokens_details or _Details()
    seen.count(
        input_tokens=usage.input_tokens,
        output_tokens=usage.output_tokens,
        cache_read_tokens=usage.cache_read_input_tokens,
        cache_write_tokens=usage.cache_creation_input_tokens,
        reasoning_tokens=details.thinking_tokens,
    )


MESSAGES = Endpoint(
    "anthropic messages",
    Dialect.ANTHROPIC,
    "chat",
    _read_event,
    _read_document,
    end_marker="message_stop",
    text_only=_TEXT_ONLY,
)
