"""The demo provider's Gemini dialect: contents and parts, counts in each chunk, models, errors.

It knows the published shapes of that API and what ``dialect.py`` offers; no HTTP, no reactor.  The
path names the model and says whether a stream is wanted; the provider puts both into the body as
``model`` and ``stream``, where all other dialects have them.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from llmproxy.cli.demo.dialect import (
    Clock,
    Dialect,
    Document,
    Endpoint,
    Event,
    Fields,
    Streamed,
    json_bytes,
    new_id,
    sse,
)
from llmproxy.cli.demo.reading import (
    limit,
    model_named,
    object_or_empty,
    objects,
    said_by_user,
    text_of,
)
from llmproxy.cli.demo.response import MODELS, Asked, BadAsk, Response, Tool

_STATUSES = {404: "NOT_FOUND", 429: "RESOURCE_EXHAUSTED", 500: "INTERNAL", 503: "UNAVAILABLE"}


class Gemini(Dialect):
    """Errors with a status of Google's, models with a prefix."""

    def error(self, status: int, bad: BadAsk, request_id: str) -> Document:
        """``{"error": {"code", "message", "status"}}``."""
        word = _STATUSES.get(status, "INVALID_ARGUMENT")
        return {"error": {"code": status, "message": bad.message, "status": word}}

    def unknown_model(self, name: str) -> BadAsk:
        """Google's words."""
        return BadAsk(f"models/{name} is not found for API version v1beta.", "model")

    def fields(self, request_id: str, remaining: int, clock: Clock) -> Fields:
        """An ``x-request-id``, though Google itself sends none."""
        return ((b"x-request-id", request_id.encode()),)

    def models(self) -> Document:
        """``GET /v1beta/models``, the one page there is."""
        return {"models": [self.model(name) for name in MODELS]}

    def model(self, name: str) -> Document:
        """``GET /v1beta/models/NAME``."""
        return {
            "name": f"models/{name}",
            "displayName": name.replace("-", " ").capitalize(),
            "supportedGenerationMethods": ["generateContent", "countTokens"],
        }


GEMINI = Gemini()


class Generate(Streamed):
    """``:generateContent``, and ``:streamGenerateContent`` with ``alt=sse``."""

    dialect = GEMINI
    stream_type = b"text/event-stream"

    def ask(self, body: dict[str, Any]) -> Asked:
        """Read a request for content."""
        messages = _messages(body)
        if not messages:
            raise BadAsk("contents: a list with at least one content is required", "contents")
        said, user_last = said_by_user(messages)
        config = object_or_empty(body.get("generationConfig"))
        system = object_or_empty(body.get("systemInstruction"))
        return Asked(
            model=model_named(body),
            stream=body.get("stream") is True,
            prompt=(text_of(system.get("parts")), *(text_of(one["content"]) for one in messages)),
            said=said,
            user_last=user_last,
            tools=tuple(_tools(body)),
            max_tokens=limit(config, "maxOutputTokens"),
        )

    def events(self, response: Response, ask: Asked, clock: Clock) -> Iterator[Event]:
        """A chunk for each token, or one for a function call; the last one has the reason."""
        shell: Document = {"modelVersion": response.model, "responseId": new_id("")}
        if response.tool is None:
            for count, (token, tokens) in enumerate(response.timed(), 1):
                yield _chunk(shell, _content(response, [{"text": token}], count), tokens)
        elif response.failure is None:
            yield _chunk(shell, _content(response, [_call(response)], response.made), response.made)
        if response.failure is not None:
            yield Event(sse(json_bytes(GEMINI.error(500, BadAsk(response.failure), ""))))
            return
        yield _chunk(shell, _content(response, [{"text": ""}], response.made, ends=True))

    def document(self, response: Response, ask: Asked, clock: Clock) -> Document:
        """The same in one object."""
        part: Document = {"text": response.text} if response.tool is None else _call(response)
        shell: Document = {"modelVersion": response.model, "responseId": new_id("")}
        return {**shell, **_content(response, [part], response.made, ends=True)}


class GenerateArray(Generate):
    """``:streamGenerateContent`` without ``alt=sse``: the chunks are the items of one array."""

    stream_type = b"application/json; charset=UTF-8"

    def events(self, response: Response, ask: Asked, clock: Clock) -> Iterator[Event]:
        """The same chunks; the end of the array is an event of its own."""
        before = b"["
        for event in super().events(response, ask, clock):
            yield event._replace(data=before + event.data[len(b"data: ") : -1])
            before = b",\r\n"
        yield Event(b"]")


class CountTokens(Endpoint):
    """``:countTokens``: how many words the contents have."""

    dialect = GEMINI

    def ask(self, body: dict[str, Any]) -> Asked:
        """Read the contents; there may be none."""
        prompt = tuple(text_of(one["content"]) for one in _messages(body))
        return Asked(model_named(body), stream=False, prompt=prompt, said="", user_last=False)

    def document(self, response: Response, ask: Asked, clock: Clock) -> Document:
        """``{"totalTokens"}``."""
        return {"totalTokens": response.prompt_tokens}

    def work(self, response: Response, ask: Asked) -> int:
        """No token is made."""
        return 0


def _messages(body: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the contents as messages, whose content is their parts."""
    contents = objects(body, "contents")
    return [{"role": one.get("role", "user"), "content": one.get("parts")} for one in contents]


def _tools(body: dict[str, Any]) -> Iterator[Tool]:
    for tool in objects(body, "tools"):
        for function in objects(tool, "functionDeclarations"):
            if isinstance(function.get("name"), str):
                schema = function.get("parametersJsonSchema") or function.get("parameters")
                yield Tool(function["name"], object_or_empty(schema))


def _call(response: Response) -> Document:
    return {"functionCall": {"name": response.tool, "args": response.arguments}}


def _chunk(shell: Document, content: Document, tokens: int = 0) -> Event:
    return Event(sse(json_bytes({**content, **shell})), tokens)


def _content(
    response: Response, parts: list[Document], made: int, *, ends: bool = False
) -> Document:
    candidate: Document = {"content": {"parts": parts, "role": "model"}}
    if ends:
        candidate["finishReason"] = "MAX_TOKENS" if response.cut else "STOP"
    prompt = response.prompt_tokens
    usage = {
        "promptTokenCount": prompt,
        "candidatesTokenCount": made,
        "totalTokenCount": prompt + made,
    }
    return {"candidates": [{**candidate, "index": 0}], "usageMetadata": usage}
