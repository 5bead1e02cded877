"""Google's Gemini API: content, streamed or not, and embeddings.

The path names the model and what is asked of it, and says whether a stream is asked for
(``:streamGenerateContent``).  All chunks of a stream have one shape, that of a whole response, and
each has the counts so far.  A stream has no end marker of its own: its last chunk has a
``finishReason``, or a ``blockReason`` if the prompt was blocked.  With ``alt=sse`` a stream is SSE,
without it one JSON array.

Google counts thoughts apart from the candidates, and the results of its own tools apart from the
prompt.  Here each is added to the other, so that input and output mean what they mean for the
other dialects.  Protobuf leaves zeros out; the total says what a missing count was.
"""

from __future__ import annotations

import re
from typing import Annotated

import msgspec

from llmproxy.dialects.accumulated import Accumulated
from llmproxy.dialects.dialect import Dialect
from llmproxy.dialects.endpoint import Count, Endpoint, ErrorObject, Part, read_error
from llmproxy.dialects.failures import read_unknown
from llmproxy.dialects.lenient import decoder, raw_text

_CANDIDATES = 128
"""Most candidates of a chunk."""

_PARTS = 1024
"""Most parts of a candidate that are looked at in one chunk."""

_UNSPECIFIED = "FINISH_REASON_UNSPECIFIED"


class _Error(ErrorObject, gc=False):
    """An error; ``status`` is Google's word for it, ``code`` the status of HTTP."""

    status: str | int | None = None


class _Usage(Part, gc=False, rename="camel"):
    prompt_token_count: Count | None = None
    candidates_token_count: Count | None = None
    thoughts_token_count: Count | None = None
    cached_content_token_count: Count | None = None
    tool_use_prompt_token_count: Count | None = None
    total_token_count: Count | None = None


class _Call(Part, gc=False):
    id: str | None = None
    name: str | None = None
    args: msgspec.Raw = msgspec.Raw()


class _Piece(Part, gc=False, rename="camel"):
    """A part of a content; a thought is no text of the response."""

    text: str | None = None
    thought: bool | None = None
    function_call: _Call | None = None


class _Content(Part, gc=False):
    parts: list[_Piece] | None = None


class _Ending(Part, gc=False, rename="camel"):
    """A candidate, as far as usage needs it."""

    finish_reason: str | None = None


class _Candidate(_Ending, gc=False, rename="camel"):
    index: int = 0
    content: _Content | None = None


class _Feedback(Part, gc=False, rename="camel"):
    block_reason: str | None = None


class _Tail(Part, gc=False, rename="camel"):
    """A chunk or a whole response, as far as usage needs it."""

    candidates: Annotated[list[_Ending], msgspec.Meta(max_length=_CANDIDATES)] | None = None
    prompt_feedback: _Feedback | None = None
    usage_metadata: _Usage | None = None
    model_version: str | None = None
    response_id: str | None = None
    error: _Error | str | None = None


class _Whole(_Tail, gc=False, rename="camel"):
    candidates: Annotated[list[_Candidate], msgspec.Meta(max_length=_CANDIDATES)] | None = None  # type: ignore[assignment]  # more members of each


class _Embeddings(Part, gc=False, rename="camel"):
    usage_metadata: _Usage | None = None
    error: _Error | str | None = None


_tail = decoder(_Tail)
_whole = decoder(_Whole)
_embeddings = decoder(_Embeddings)


def _read(data: bytes, seen: Accumulated) -> None:
    chunk: _Tail
    if seen.keeps:
        chunk = whole = _whole(data, seen)
        _keep(whole.candidates, seen)
    else:
        chunk = _tail(data, seen)
    seen.name(chunk.response_id, chunk.model_version)
    candidates, usage = chunk.candidates, chunk.usage_metadata
    if candidates:
        reasons = [one.finish_reason for one in candidates]
        for reason in reasons:
            if reason != _UNSPECIFIED:
                seen.finish(reason)
        # Several candidates end one by one: where one goes on, the stream has not ended.
        seen.has_ended = all(reason not in (None, _UNSPECIFIED) for reason in reasons)
        if usage is None and seen.has_counts and not seen.has_ended:
            seen.outdate()
    elif chunk.prompt_feedback is not None and chunk.prompt_feedback.block_reason:
        seen.finish(chunk.prompt_feedback.block_reason)
        seen.has_ended = True
    if usage is not None:
        _count(usage, seen)
    if chunk.error is not None:
        _fail(chunk.error, seen)
    elif candidates is None and usage is None and chunk.prompt_feedback is None:
        read_unknown(data, seen)


def _keep(candidates: list[_Candidate] | None, seen: Accumulated) -> None:
    """Hold the content of the first candidate; nothing of the others is held."""
    for candidate in candidates or ():
        if candidate.index == 0 and candidate.content is not None:
            for part in (candidate.content.parts or ())[:_PARTS]:
                if part.text and not part.thought:
                    seen.add_text(part.text)
                if part.function_call is not None:
                    key = seen.calls
                    seen.open_call(key, part.function_call.id, part.function_call.name)
                    if arguments := raw_text(part.function_call.args):
                        seen.add_arguments(key, arguments)


def _count(usage: _Usage, seen: Accumulated) -> None:
    prompt, total = usage.prompt_token_count, usage.total_token_count
    tools, thoughts = usage.tool_use_prompt_token_count, usage.thoughts_token_count
    said = usage.candidates_token_count
    if said is None and total is not None and prompt is not None:
        said = max(0, total - prompt - (tools or 0) - (thoughts or 0))
    seen.count(
        input_tokens=_sum(prompt, tools),
        output_tokens=_sum(said, thoughts),
        cache_read_tokens=usage.cached_content_token_count,
        reasoning_tokens=thoughts,
    )


def _sum(one: int | None, other: int | None) -> int | None:
    return other if one is None else one + (other or 0)


def _fail(error: _Error | str, seen: Accumulated) -> None:
    if isinstance(error, _Error) and error.status is not None:
        seen.fail(str(error.status), error.message)
    else:
        read_error(error, seen)


def _read_embeddings(data: bytes, seen: Accumulated) -> None:
    response = _embeddings(data, seen)
    if response.usage_metadata is not None:
        seen.count(input_tokens=response.usage_metadata.prompt_token_count)
    if response.error is not None:
        _fail(response.error, seen)
    elif response.usage_metadata is None:
        read_unknown(data, seen)


STREAM = Endpoint(
    "gemini stream",
    Dialect.GEMINI,
    "generate_content",
    _read,
    _read,
    end_marker="finishReason or blockReason",
    may_end=re.compile(rb'"(?:finish|block)Reason"'),
    needs_blank_line=True,
    has_long_marker=True,
    has_array=True,
    streams=True,
)
GENERATE = msgspec.structs.replace(STREAM, name="gemini generate", streams=False)
EMBED = Endpoint(
    "gemini embed",
    Dialect.GEMINI,
    "embeddings",
    _read_embeddings,
    _read_embeddings,
    streams=False,
)
