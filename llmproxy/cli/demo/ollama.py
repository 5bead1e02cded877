"""The demo provider's Ollama dialect: chat as lines of JSON, tags and errors.

It knows the published shapes of that API and what ``demo_dialect`` offers; no HTTP, no reactor.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from llmproxy.cli.demo.answer import MODELS, Answer, Ask, BadAsk
from llmproxy.cli.demo.dialect import (
    RELEASED,
    Clock,
    Dialect,
    Document,
    Event,
    Fields,
    function_tools,
    json_bytes,
    messages_of,
    model_named,
    new_id,
    object_or_empty,
    rfc3339,
    said_by_user,
    text_of,
)

_UNPACED_TPS = 1_000_000  # what an unpaced answer claims: clients divide by the duration


class Ollama(Dialect):
    """Chat: one JSON object a line; a stream unless the request says ``"stream": false``."""

    stream_type = b"application/x-ndjson"

    def ask(self, body: dict[str, Any]) -> Ask:
        """Read a chat request; ``options.num_predict`` below 1 means no limit."""
        messages = messages_of(body)
        said, user_last = said_by_user(messages)
        wanted = object_or_empty(body.get("options")).get("num_predict")
        return Ask(
            model=model_named(body),
            stream=body.get("stream") is not False,
            prompt=tuple(text_of(message.get("content")) for message in messages),
            said=said,
            user_last=user_last,
            tools=tuple(function_tools(body)),
            max_tokens=wanted if isinstance(wanted, int) and wanted > 0 else None,
        )

    def events(self, answer: Answer, ask: Ask, clock: Clock) -> Iterator[Event]:
        """A line for each token, or one for a tool call; then one that is ``done``."""
        if answer.tool is None:
            for token in answer.tokens:
                message: Document = {"role": "assistant", "content": token}
                yield _line({**_shell(answer, clock), "message": message, "done": False}, 1)
        else:
            shell = _shell(answer, clock)
            yield _line({**shell, "message": _message(answer), "done": False}, len(answer.tokens))
        message = {"role": "assistant", "content": ""}
        yield _line({**_shell(answer, clock), "message": message, "done": True, **_end(answer)})

    def document(self, answer: Answer, clock: Clock) -> Document:
        """The same in one object, ``done``."""
        message = _message(answer)
        return {**_shell(answer, clock), "message": message, "done": True, **_end(answer)}

    def error(self, status: int, bad: BadAsk, request_id: str) -> Document:
        """``{"error": "..."}``."""
        return {"error": bad.message}

    def unknown_model(self, name: str) -> BadAsk:
        """Ollama's words."""
        return BadAsk(f"model '{name}' not found", "model")

    def fields(self, request_id: str, remaining: int, clock: Clock) -> Fields:
        """An ``x-request-id``, though Ollama itself sends none."""
        return ((b"x-request-id", request_id.encode()),)

    def models(self) -> Document:
        """``GET /api/tags``."""
        return {"models": [self.model(name) for name in MODELS]}

    def model(self, name: str) -> Document:
        """One entry of the tags."""
        return {
            "name": name,
            "model": name,
            "modified_at": rfc3339(RELEASED),
            "size": 0,
            "digest": "0" * 64,
            "details": {"format": "demo", "family": "demo", "families": ["demo"]},
        }


def _line(document: Document, tokens: int = 0) -> Event:
    return Event(json_bytes(document) + b"\n", tokens)


def _shell(answer: Answer, clock: Clock) -> Document:
    return {"model": answer.model, "created_at": rfc3339(clock())}


def _message(answer: Answer) -> Document:
    if answer.tool is None:
        return {"role": "assistant", "content": answer.text}
    function = {"name": answer.tool, "arguments": answer.arguments}
    call = {"id": new_id("call_"), "function": function}
    return {"role": "assistant", "content": "", "tool_calls": [call]}


def _end(answer: Answer) -> Document:
    """The counts, and durations in nanoseconds at the pace that was asked for."""
    made = len(answer.tokens)
    load, prompt = 1_000_000, 1_000 * max(answer.prompt_tokens, 1)
    making = round((answer.seconds or made / _UNPACED_TPS) * 1e9)
    return {
        "done_reason": "length" if answer.cut else "stop",
        "total_duration": load + prompt + making,
        "load_duration": load,
        "prompt_eval_count": answer.prompt_tokens,
        "prompt_eval_duration": prompt,
        "eval_count": made,
        "eval_duration": making,
    }
