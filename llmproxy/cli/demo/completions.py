"""The demo provider's OpenAI completions, the endpoint of before there were messages.

It knows the published shapes of that endpoint and what ``dialect.py`` offers; no HTTP, no reactor.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from llmproxy.cli.demo.dialect import (
    Clock,
    Document,
    Event,
    Streamed,
    json_bytes,
    new_id,
    sse,
)
from llmproxy.cli.demo.openai import DONE, OPENAI, STREAM_TYPE, failure_event, usage_of
from llmproxy.cli.demo.reading import limit, model_named, object_or_empty, texts_of
from llmproxy.cli.demo.response import Asked, Response


class Completions(Streamed):
    """``POST /v1/completions``: one choice whatever the number of prompts, and no tools."""

    dialect = OPENAI
    stream_type = STREAM_TYPE

    def ask(self, body: dict[str, Any]) -> Asked:
        """Read a completion request; several prompts are read as one."""
        model = model_named(body)
        prompt = texts_of(body, "prompt")
        options = object_or_empty(body.get("stream_options"))
        return Asked(
            model=model,
            stream=body.get("stream") is True,
            prompt=prompt,
            said=" ".join(prompt),
            user_last=True,
            max_tokens=limit(body, "max_tokens"),
            caches=len(prompt),
            include_usage=options.get("include_usage") is True,
        )

    def events(self, response: Response, ask: Asked, clock: Clock) -> Iterator[Event]:
        """Chunks of the document's own shape; ``include_usage`` does what it does in a chat."""
        shell = _shell(response, clock)
        usage: Document = {"usage": None} if ask.include_usage else {}

        def chunk(text: str, tokens: int = 0, finish: str | None = None) -> Event:
            document = {**shell, "choices": [_choice(text, finish)], **usage}
            return Event(sse(json_bytes(document)), tokens)

        for token, tokens in response.timed():
            yield chunk(token, tokens)
        if response.failure is not None:
            yield failure_event(response.failure)
            return
        yield chunk("", finish=_finish_reason(response))
        if ask.include_usage:
            yield Event(sse(json_bytes({**shell, "choices": [], "usage": usage_of(response)})))
        yield DONE

    def document(self, response: Response, ask: Asked, clock: Clock) -> Document:
        """One completion."""
        choice = _choice(response.text, _finish_reason(response))
        return {**_shell(response, clock), "choices": [choice], "usage": usage_of(response)}


def _shell(response: Response, clock: Clock) -> Document:
    return {
        "id": new_id("cmpl-"),
        "object": "text_completion",
        "created": int(clock()),
        "model": response.model,
        "system_fingerprint": "fp_demo",
    }


def _choice(text: str, finish: str | None) -> Document:
    return {"text": text, "index": 0, "logprobs": None, "finish_reason": finish}


def _finish_reason(response: Response) -> str:
    return "length" if response.cut else "stop"
