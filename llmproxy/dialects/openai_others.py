"""OpenAI's further endpoints whose responses have counts: of these, nothing but the counts is read.

Decisions and images come in one piece, with a ``usage`` as responses have it; images may stream,
and so may transcriptions.  Drawing an SVG has counts of its own, which are added.  A run of a
thread (the assistants' API) has its counts in the last of its events.
"""

from __future__ import annotations

import re

import msgspec

from llmproxy.dialects.accumulated import Accumulated
from llmproxy.dialects.dialect import Dialect
from llmproxy.dialects.endpoint import Count, Endpoint, ErrorMember, Part, read_error
from llmproxy.dialects.failures import read_unknown
from llmproxy.dialects.lenient import decoder
from llmproxy.dialects.openai import MAY_END, InputDetails, OutputDetails

_IMAGE_ENDS = ("image_generation.completed", "image_edit.completed")
_TRANSCRIPT_ENDS = ("transcript.text.done",)


class _Usage(Part, gc=False):
    """The counts under both of OpenAI's names; a transcription may have seconds in their place."""

    input_tokens: Count | None = None
    output_tokens: Count | None = None
    prompt_tokens: Count | None = None
    completion_tokens: Count | None = None
    input_tokens_details: InputDetails | None = None
    output_tokens_details: OutputDetails | None = None


class _Drawing(Part, gc=False):
    """``svg_usage``; its output includes the reasoning."""

    input_tokens: Count | None = None
    output_tokens: Count | None = None
    reasoning_tokens: Count | None = None


class _Response(Part, gc=False):
    """A response in one piece, or an event."""

    type: str = ""
    model: str | None = None
    usage: _Usage | None = None
    svg_usage: _Drawing | None = None
    error: ErrorMember = None


class _Run(Part, gc=False):
    object: str = ""
    id: str | None = None
    model: str | None = None
    status: str | None = None
    usage: _Usage | None = None
    last_error: ErrorMember = None
    error: ErrorMember = None


_response = decoder(_Response)
_run = decoder(_Run)


def _read(data: bytes, seen: Accumulated) -> None:
    response = _response(data, seen)
    seen.name(None, response.model)
    if response.type in _IMAGE_ENDS or response.type in _TRANSCRIPT_ENDS:
        seen.has_ended = True
    if response.usage is not None or response.svg_usage is not None:
        _count(response.usage or _Usage(), response.svg_usage or _Drawing(), seen)
    if response.error is not None:
        read_error(response.error, seen)
    elif response.usage is None and response.model is None:
        read_unknown(data, seen)


def _read_run(data: bytes, seen: Accumulated) -> None:
    run = _run(data, seen)
    if run.object == "thread.run":
        seen.name(run.id, run.model)
        if run.last_error is not None:
            read_error(run.last_error, seen)
        if run.status not in ("queued", "in_progress", "cancelling"):
            seen.finish(run.status)
        if run.usage is not None:
            _count(run.usage, _Drawing(), seen)
    elif run.error is not None:
        read_error(run.error, seen)
    elif not run.object.startswith("thread."):
        read_unknown(data, seen)


def _count(usage: _Usage, drawing: _Drawing, seen: Accumulated) -> None:
    read = usage.input_tokens_details or InputDetails()
    made = usage.output_tokens_details or OutputDetails()
    taken = usage.prompt_tokens if usage.input_tokens is None else usage.input_tokens
    given = usage.completion_tokens if usage.output_tokens is None else usage.output_tokens
    seen.count(
        input_tokens=_sum(taken, drawing.input_tokens),
        output_tokens=_sum(given, drawing.output_tokens),
        cache_read_tokens=read.cached_tokens,
        cache_write_tokens=read.cache_write_tokens,
        reasoning_tokens=_sum(made.reasoning_tokens, drawing.reasoning_tokens),
    )


def _sum(one: int | None, other: int | None) -> int | None:
    return other if one is None else one + (other or 0)


DECISIONS = Endpoint("openai decisions", Dialect.OPENAI, "generate_content", _read, _read)
TRANSCRIPTIONS = msgspec.structs.replace(DECISIONS, name="openai transcriptions")
"""A stream has no end marker here: other servers end theirs in their own way."""

IMAGES = msgspec.structs.replace(
    DECISIONS,
    name="openai images",
    end_marker="image_generation.completed or image_edit.completed",
    may_end=re.compile(rb"image_(?:generation|edit)\.completed"),
    needs_blank_line=True,
    has_long_marker=True,
)
RUNS = Endpoint(
    "openai runs",
    Dialect.OPENAI,
    "chat",
    _read_run,
    _read_run,
    end_marker="[DONE]",
    may_end=MAY_END,
)
