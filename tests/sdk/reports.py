"""What an SDK itself reports of a response, as plain data under names of ours.

:func:`reported` asks a question and puts together what the SDK's own objects say, by the SDK's own
means where it has some.  Nothing here looks at the wire, or shares a line with the program's
reading of it: so a record of the same request can be compared with it.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from anthropic.lib.streaming._messages import accumulate_event  # private: its helper for streams
from openai.lib.streaming.chat import ChatCompletionStreamState

from tests.sdk.sdks import Question, Way


@dataclass(frozen=True)
class Report:
    """What one response came to, as its SDK has it.

    Counts are the provider's own, under our names; None is what the SDK does not have.

    Args:
        session: the ``x-session-id`` of the request.
        text: all of the text, up to where the response broke off.
        tool_calls: names and decoded arguments; a call that broke off has none (None).
        finish_reason: in the provider's words; for responses the reason of an incomplete one, else
            its status.
        model: the one that served.
        response_id: the response's own id.
        error: what the SDK raised, or None.
    """

    session: str = ""
    text: str = ""
    tool_calls: tuple[tuple[str, Any], ...] = ()
    finish_reason: str | None = None
    model: str | None = None
    response_id: str | None = None
    input_tokens: int | None = None
    output_tokens: int | None = None
    cache_read_tokens: int | None = None
    cache_write_tokens: int | None = None
    reasoning_tokens: int | None = None
    error: str | None = None


def reported(way: Way, question: Question) -> Report:
    """Ask, and return what the SDK reports; an OpenAI stream is asked for its counts, too."""
    if way.stream and way.sdk == "openai" and way.endpoint in ("chat", "completions"):
        counts = {"stream_options": {"include_usage": True}}
        question = replace(question, more={**counts, **question.more})
    outcome = way.ask(question)
    read = _READERS[way.sdk, way.endpoint]
    report = read(outcome.objects, way.stream) if outcome.objects else Report()
    error = None if outcome.error is None else str(outcome.error)
    return replace(report, session=outcome.session, error=error)


def _chat(objects: list[Any], stream: bool) -> Report:
    completion = objects[0]
    if stream:
        state: ChatCompletionStreamState[None] = ChatCompletionStreamState()
        for chunk in objects:
            state.handle_chunk(chunk)
        completion = state.current_completion_snapshot
    choice = completion.choices[0]
    calls = [call.function for call in choice.message.tool_calls or ()]
    return Report(
        text=choice.message.content or "",
        tool_calls=tuple((call.name, _decoded(call.arguments)) for call in calls),
        finish_reason=choice.finish_reason,
        model=completion.model,
        response_id=completion.id,
        **_completion_usage(completion.usage),
    )


def _completions(objects: list[Any], _stream: bool) -> Report:
    choices = [choice for item in objects for choice in item.choices]
    (usage,) = [item.usage for item in objects if item.usage is not None] or [None]
    return Report(
        text="".join(choice.text for choice in choices),
        finish_reason=choices[-1].finish_reason,
        model=objects[-1].model,
        response_id=objects[-1].id,
        **_completion_usage(usage),
    )


def _completion_usage(usage: Any) -> dict[str, Any]:
    if usage is None:
        return {}
    return {
        "input_tokens": usage.prompt_tokens,
        "output_tokens": usage.completion_tokens,
        "cache_read_tokens": usage.prompt_tokens_details.cached_tokens,
        "cache_write_tokens": usage.prompt_tokens_details.cache_write_tokens,
        "reasoning_tokens": usage.completion_tokens_details.reasoning_tokens,
    }


def _responses(objects: list[Any], stream: bool) -> Report:
    response = objects[0]
    if stream:
        response = [event.response for event in objects if hasattr(event, "response")][-1]
        deltas = [event.delta for event in objects if event.type == "response.output_text.delta"]
        items = [event.item for event in objects if event.type == "response.output_item.done"]
    else:
        deltas, items = [response.output_text], response.output
    calls = [item for item in items if item.type == "function_call"]
    details, usage = response.incomplete_details, response.usage
    report = Report(
        text="".join(deltas),
        tool_calls=tuple((call.name, _decoded(call.arguments)) for call in calls),
        finish_reason=response.status if details is None else details.reason,
        model=response.model,
        response_id=response.id,
    )
    if usage is None:
        return report
    return replace(
        report,
        input_tokens=usage.input_tokens,
        output_tokens=usage.output_tokens,
        cache_read_tokens=usage.input_tokens_details.cached_tokens,
        cache_write_tokens=usage.input_tokens_details.cache_write_tokens,
        reasoning_tokens=usage.output_tokens_details.reasoning_tokens,
    )


def _embeddings(objects: list[Any], _stream: bool) -> Report:
    (embedded,) = objects
    return Report(model=embedded.model, input_tokens=embedded.usage.prompt_tokens)


def _messages(objects: list[Any], stream: bool) -> Report:
    message = objects[0]
    if stream:
        message, pieces = None, dict[int, bytes]()
        for event in objects:
            message = accumulate_event(event=event, current_snapshot=message, json_bufs=pieces)
    usage = message.usage
    thinking = getattr(usage, "output_tokens_details", None)
    calls = [block for block in message.content if block.type == "tool_use"]
    return Report(
        text="".join(block.text for block in message.content if block.type == "text"),
        tool_calls=tuple((call.name, call.input) for call in calls),
        finish_reason=message.stop_reason,
        model=message.model,
        response_id=message.id,
        input_tokens=usage.input_tokens,
        output_tokens=usage.output_tokens,
        cache_read_tokens=usage.cache_read_input_tokens,
        cache_write_tokens=usage.cache_creation_input_tokens,
        reasoning_tokens=None if thinking is None else thinking.thinking_tokens,
    )


def _count_tokens(objects: list[Any], _stream: bool) -> Report:
    return Report(input_tokens=objects[0].input_tokens)


def _ollama_chat(objects: list[Any], _stream: bool) -> Report:
    calls = [call.function for item in objects for call in item.message.tool_calls or ()]
    report = replace(
        _ollama(objects), tool_calls=tuple((call.name, call.arguments) for call in calls)
    )
    return replace(report, text="".join(item.message.content or "" for item in objects))


def _generate(objects: list[Any], _stream: bool) -> Report:
    return replace(_ollama(objects), text="".join(item.response or "" for item in objects))


def _embed(objects: list[Any], _stream: bool) -> Report:
    return _ollama(objects)


def _ollama(objects: list[Any]) -> Report:
    last = objects[-1]
    return Report(
        finish_reason=last.done_reason,
        model=last.model,
        input_tokens=last.prompt_eval_count,
        output_tokens=last.eval_count,
    )


def _old_embeddings(_objects: list[Any], _stream: bool) -> Report:
    return Report()


def _decoded(arguments: str) -> Any:
    try:
        return json.loads(arguments)
    except ValueError:
        return None


_READERS: dict[tuple[str, str], Callable[[list[Any], bool], Report]] = {
    ("openai", "chat"): _chat,
    ("openai", "completions"): _completions,
    ("openai", "responses"): _responses,
    ("openai", "embeddings"): _embeddings,
    ("anthropic", "chat"): _messages,
    ("anthropic", "count_tokens"): _count_tokens,
    ("ollama", "chat"): _ollama_chat,
    ("ollama", "generate"): _generate,
    ("ollama", "embed"): _embed,
    ("ollama", "embeddings"): _old_embeddings,
}
