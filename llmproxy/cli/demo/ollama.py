"""The demo provider's Ollama dialect: lines of JSON, embeddings, models and errors.

It knows the published shapes of that API and what ``dialect.py`` offers; no HTTP, no reactor.
"""

from __future__ import annotations

from collections.abc import Iterator
from hashlib import sha256
from typing import Any

from llmproxy.cli.demo.dialect import (
    RELEASED,
    Clock,
    Dialect,
    Document,
    Endpoint,
    Event,
    Fields,
    Streamed,
    json_bytes,
    new_id,
    rfc3339,
)
from llmproxy.cli.demo.reading import (
    dimensions_of,
    function_tools,
    messages_of,
    model_named,
    object_or_empty,
    said_by_user,
    text_of,
    texts_of,
)
from llmproxy.cli.demo.response import MODELS, Asked, BadAsk, Response
from llmproxy.cli.demo.vector import vector

STREAM_TYPE = b"application/x-ndjson"

_UNPACED_TPS = 1_000_000  # what an unpaced response claims: clients divide by the duration
_CONTEXT_TOKENS = 8192  # what a model claims to hold; nothing is cut off for it
_FAR = 4_102_444_800  # 2100-01-01: the demo's models never leave the memory


class Ollama(Dialect):
    """Errors as a mere sentence, models as tags."""

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
            "digest": sha256(name.encode()).hexdigest(),  # clients take equal ones for one model
            "details": _details(),
        }

    def running(self) -> Document:
        """``GET /api/ps``: all models, as if they were in memory for ever."""
        more = {"expires_at": rfc3339(_FAR), "size_vram": 0, "context_length": _CONTEXT_TOKENS}
        return {"models": [{**self.model(name), **more} for name in MODELS]}

    def shown(self) -> Document:
        """``POST /api/show``: what a model is and can do, the same for each."""
        return {
            "modified_at": rfc3339(RELEASED),
            "template": "{{ .Prompt }}",
            "details": _details(),
            "model_info": {
                "general.architecture": "demo",
                "demo.context_length": _CONTEXT_TOKENS,
            },
            "capabilities": ["completion", "tools", "embedding"],
        }


OLLAMA = Ollama()


class Chat(Streamed):
    """``POST /api/chat``: a JSON object a line; a stream unless ``"stream": false`` is said."""

    dialect = OLLAMA
    stream_type = STREAM_TYPE

    def ask(self, body: dict[str, Any]) -> Asked:
        """Read a chat request; ``options.num_predict`` below 1 means no limit."""
        messages = messages_of(body)
        said, user_last = said_by_user(messages)
        return Asked(
            model=model_named(body),
            stream=body.get("stream") is not False,
            prompt=tuple(text_of(message.get("content")) for message in messages),
            said=said,
            user_last=user_last,
            tools=tuple(function_tools(body)),
            max_tokens=_num_predict(body),
        )

    def events(self, response: Response, ask: Asked, clock: Clock) -> Iterator[Event]:
        """A line for each token, or one for a tool call; then one that is ``done``."""
        if response.tool is None:
            for token, tokens in response.timed():
                message: Document = {"role": "assistant", "content": token}
                yield _line({**_shell(response, clock), "message": message, "done": False}, tokens)
        elif response.failure is None:
            shell = _shell(response, clock)
            yield _line({**shell, "message": _message(response), "done": False}, response.made)
        if response.failure is not None:
            yield _failure(response.failure)
            return
        message = {"role": "assistant", "content": ""}
        yield _line({**_shell(response, clock), "message": message, "done": True, **_end(response)})

    def document(self, response: Response, ask: Asked, clock: Clock) -> Document:
        """The same in one object, ``done``."""
        message = _message(response)
        return {**_shell(response, clock), "message": message, "done": True, **_end(response)}


class Generate(Streamed):
    """``POST /api/generate``: the same for one prompt, without messages and tools."""

    dialect = OLLAMA
    stream_type = STREAM_TYPE

    def ask(self, body: dict[str, Any]) -> Asked:
        """Read a request; its prompt may be empty."""
        prompt = text_of(body.get("prompt"))
        return Asked(
            model=model_named(body),
            stream=body.get("stream") is not False,
            prompt=(text_of(body.get("system")), prompt),
            said=prompt,
            user_last=True,
            max_tokens=_num_predict(body),
        )

    def events(self, response: Response, ask: Asked, clock: Clock) -> Iterator[Event]:
        """A line for each token; then one that is ``done``."""
        for token, tokens in response.timed():
            yield _line({**_shell(response, clock), "response": token, "done": False}, tokens)
        if response.failure is not None:
            yield _failure(response.failure)
            return
        yield _line(_generated(response, clock, ""))

    def document(self, response: Response, ask: Asked, clock: Clock) -> Document:
        """The same in one object, ``done``."""
        return _generated(response, clock, response.text)


class Embed(Endpoint):
    """``POST /api/embed``: a vector for each text, each in the time of one token."""

    dialect = OLLAMA

    def ask(self, body: dict[str, Any]) -> Asked:
        """Read a request whose ``input`` is a text or a list of texts."""
        return Asked(
            model=model_named(body),
            stream=False,
            prompt=texts_of(body, "input"),
            said="",
            user_last=False,
            dimensions=dimensions_of(body),
        )

    def document(self, response: Response, ask: Asked, clock: Clock) -> Document:
        """The vectors in the order of their texts, with the words of all texts."""
        load, prompt = _durations(response)
        return {
            "model": response.model,
            "embeddings": [vector(text, ask.dimensions) for text in ask.prompt],
            "total_duration": load + prompt,
            "load_duration": load,
            "prompt_eval_count": response.prompt_tokens,
        }

    def work(self, response: Response, ask: Asked) -> int:
        """A token's time for each text."""
        return len(ask.prompt)


class OldEmbeddings(Embed):
    """``POST /api/embeddings``: what there was before ``/api/embed``, for one text."""

    def ask(self, body: dict[str, Any]) -> Asked:
        """Read a request that has a ``prompt``."""
        return super().ask({**body, "input": text_of(body.get("prompt"))})

    def document(self, response: Response, ask: Asked, clock: Clock) -> Document:
        """One vector, and nothing of counts."""
        return {"embedding": vector(ask.prompt[0], ask.dimensions)}


def _details() -> Document:
    return {
        "parent_model": "",
        "format": "demo",
        "family": "demo",
        "families": ["demo"],
        "parameter_size": "0B",
        "quantization_level": "none",
    }


def _line(document: Document, tokens: int = 0) -> Event:
    return Event(json_bytes(document) + b"\n", tokens)


def _failure(failure: str) -> Event:
    return _line(OLLAMA.error(500, BadAsk(failure), ""))


def _num_predict(body: dict[str, Any]) -> int | None:
    wanted = object_or_empty(body.get("options")).get("num_predict")
    return wanted if isinstance(wanted, int) and wanted > 0 else None


def _shell(response: Response, clock: Clock) -> Document:
    return {"model": response.model, "created_at": rfc3339(clock())}


def _message(response: Response) -> Document:
    if response.tool is None:
        return {"role": "assistant", "content": response.text}
    function = {"name": response.tool, "arguments": response.arguments}
    call = {"id": new_id("call_"), "function": function}
    return {"role": "assistant", "content": "", "tool_calls": [call]}


def _generated(response: Response, clock: Clock, text: str) -> Document:
    """The end of a generation; its ``context`` stands for all tokens so far."""
    context = list(range(response.prompt_tokens + response.made))
    shell = {**_shell(response, clock), "response": text, "done": True}
    return {**shell, **_end(response), "context": context}


def _durations(response: Response) -> tuple[int, int]:
    """Nanoseconds that loading the model and reading the prompt are said to have taken."""
    return 1_000_000, 1_000 * max(response.prompt_tokens, 1)


def _end(response: Response) -> Document:
    """The counts, and durations in nanoseconds at the pace that was asked for."""
    load, prompt = _durations(response)
    making = round((response.seconds or response.made / _UNPACED_TPS) * 1e9)
    return {
        "done_reason": "length" if response.cut else "stop",
        "total_duration": load + prompt + making,
        "load_duration": load,
        "prompt_eval_count": response.prompt_tokens,
        "prompt_eval_duration": prompt,
        "eval_count": response.made,
        "eval_duration": making,
    }
