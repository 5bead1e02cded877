"""The three SDKs, each endpoint in up to four ways: sync or async, whole or streamed.

A :class:`Way` asks one question as a program would that was written with that SDK, and returns an
:class:`Outcome`: what the SDK gave, and what it raised.  Nothing here speaks HTTP itself.
"""

from __future__ import annotations

import asyncio
import inspect
import uuid
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from operator import attrgetter
from typing import Any

import anthropic
import httpx
import httpx2
import ollama
import openai

from tests.support import live_proxy
from tests.support.daemon import Daemon
from tests.support.sockets import WAIT

KEY = "team-client-key"
"""What the SDKs are given as their key: the proxy's, not the provider's."""

SAID = "the quick brown fox"
WORDS_SAID = 4
SCHEMA: Any = {
    "type": "object",
    "properties": {"city": {"type": "string"}, "days": {"type": "integer"}},
    "required": ["city", "days"],
    "additionalProperties": False,
}
ARGUMENTS = {"city": "demo", "days": 1}
FUNCTION: Any = {
    "type": "function",
    "function": {"name": "weather", "parameters": SCHEMA, "strict": True},
}
TOOLS: Mapping[str, Any] = {
    "openai": [FUNCTION],
    "anthropic": [{"name": "weather", "input_schema": SCHEMA}],
    "ollama": [FUNCTION],
}
RESPONSES_TOOLS: Any = [
    {"type": "function", "name": "weather", "parameters": SCHEMA, "strict": True}
]

METHODS = {
    ("openai", "chat"): "chat.completions.create",
    ("openai", "completions"): "completions.create",
    ("openai", "responses"): "responses.create",
    ("openai", "embeddings"): "embeddings.create",
    ("anthropic", "chat"): "messages.create",
    ("anthropic", "count_tokens"): "messages.count_tokens",
    ("ollama", "chat"): "chat",
    ("ollama", "generate"): "generate",
    ("ollama", "embed"): "embed",
    ("ollama", "embeddings"): "embeddings",
}
"""What to call for an endpoint of an SDK; a conversation is ``chat`` everywhere."""

STREAMING = frozenset({"chat", "completions", "responses", "generate"})
CALLS_TOOLS = frozenset({"chat", "responses"})

SDK_ERRORS = (
    openai.APIError,
    anthropic.APIError,
    ollama.ResponseError,
    httpx.TransportError,
    httpx2.TransportError,
)
"""Everything that an SDK raises over what comes back to it."""

_CHANGING = """
id item_id call_id request_id created created_at completed_at
total_duration load_duration prompt_eval_duration eval_duration
"""
NEVER_THE_SAME = frozenset(_CHANGING.split())
"""What differs between two responses to one question: ids, timestamps and durations."""


def user(text: str) -> Any:
    """Return a conversation of one message, in the shape that all three share."""
    return [{"role": "user", "content": text}]


@dataclass
class Outcome:
    """What came of one question.

    Args:
        session: the ``x-session-id`` of the question, which the access line and the trace have.
        objects: what the SDK gave, in order; one object where the response was not streamed.
        error: what it raised, or None.
        headers: the response's header fields, where the SDK shows them.
    """

    session: str
    objects: list[Any] = field(default_factory=list)
    error: Exception | None = None
    headers: Mapping[str, str] = field(default_factory=dict)

    def fail(self, error: Exception) -> None:
        """Keep what the SDK raised, and the fields of the response that it is about."""
        self.error = error
        response = getattr(error, "response", None)
        if response is not None:
            self.headers = response.headers

    @property
    def failure(self) -> Any:
        """The error, of which there must be one."""
        assert self.error is not None, self.objects
        return self.error

    @property
    def response(self) -> list[Any]:
        """The objects, of a question that did not fail."""
        if self.error is not None:
            raise self.error
        return self.objects


@dataclass(frozen=True)
class Question:
    """What to ask, and where.

    Args:
        base: the URL under which the provider's own paths stand.
        key: what the SDK is given as its key; None: it sends none.
        more: further arguments of the SDK's call.
        headers: further header fields.
        patience: seconds that the SDK waits for anything.
        each: called with each object of a stream; where it returns True, the caller stops reading.
    """

    base: str
    model: str = "demo-fast"
    said: str = SAID
    tools: bool = False
    key: str | None = KEY
    more: Mapping[str, Any] = field(default_factory=dict)
    headers: Mapping[str, str] = field(default_factory=dict)
    patience: float = WAIT
    retries: int = 0
    each: Callable[[Any], bool] = lambda _: False


@dataclass(frozen=True)
class Way:
    """One way to use one endpoint of one SDK."""

    sdk: str
    is_async: bool
    stream: bool
    endpoint: str = "chat"

    def __str__(self) -> str:
        name = self.sdk if self.endpoint == "chat" else f"{self.sdk}-{self.endpoint}"
        mode = "async" if self.is_async else "sync"
        return f"{name}-{mode}-{'stream' if self.stream else 'whole'}"

    def ask(self, question: Question) -> Outcome:
        """Ask, read the response to its end or to where the question says, and close the client."""
        if self.is_async:
            return asyncio.run(self.ask_async(question))
        outcome = Outcome(uuid.uuid4().hex)
        try:
            self._ask(question, outcome)
        except SDK_ERRORS as error:
            outcome.fail(error)
        return outcome

    async def ask_async(self, question: Question) -> Outcome:
        """Do what :meth:`ask` does, on the loop that runs; for an async way."""
        outcome = Outcome(uuid.uuid4().hex)
        try:
            await self._ask_async(question, outcome)
        except SDK_ERRORS as error:
            outcome.fail(error)
        return outcome

    def _ask(self, question: Question, outcome: Outcome) -> None:
        with self._client(question, outcome) as client:
            response = self._call(client, question)
            if not self.stream:
                outcome.objects.append(response)
                return
            for item in response:
                outcome.objects.append(item)
                if question.each(item):
                    break
            response.close()

    async def _ask_async(self, question: Question, outcome: Outcome) -> None:
        async with self._client(question, outcome) as client:
            response = await self._call(client, question)
            if not self.stream:
                outcome.objects.append(response)
                return
            async for item in response:
                outcome.objects.append(item)
                if question.each(item):
                    break
            await (response.aclose() if inspect.isasyncgen(response) else response.close())

    def _client(self, question: Question, outcome: Outcome) -> Any:
        headers = {"x-session-id": outcome.session, **question.headers}
        if self.sdk == "ollama":
            return self._ollama_client(question, outcome, headers)
        common: dict[str, Any] = {
            "api_key": question.key or "not sent",
            "max_retries": question.retries,
            "timeout": question.patience,
            "default_headers": headers,
        }
        if self.sdk == "openai":
            kind: Any = openai.AsyncOpenAI if self.is_async else openai.OpenAI
            return kind(base_url=f"{question.base}/v1", **common)
        kind = anthropic.AsyncAnthropic if self.is_async else anthropic.Anthropic
        return kind(base_url=question.base, **common)

    def _ollama_client(self, question: Question, outcome: Outcome, headers: dict[str, str]) -> Any:
        """Its responses and errors show no header fields: they are seen as they pass."""

        def see(response: httpx.Response) -> None:
            outcome.headers = response.headers

        async def see_async(response: httpx.Response) -> None:
            see(response)

        if question.key is not None:
            headers["authorization"] = f"Bearer {question.key}"
        hooks = {"response": [see_async if self.is_async else see]}
        kind: Any = ollama.AsyncClient if self.is_async else ollama.Client
        return kind(
            host=question.base, headers=headers, timeout=question.patience, event_hooks=hooks
        )

    def _call(self, client: Any, question: Question) -> Any:
        asked: dict[str, Any] = {"model": question.model, **self._said(question.said)}
        if self.endpoint in STREAMING:
            asked["stream"] = self.stream
        if question.tools:
            is_responses = self.endpoint == "responses"
            asked["tools"] = RESPONSES_TOOLS if is_responses else TOOLS[self.sdk]
        if question.key is None and self.sdk != "ollama":
            omit: Any = {"openai": openai.Omit(), "anthropic": anthropic.Omit()}[self.sdk]
            asked["extra_headers"] = {"Authorization": omit}
        if (self.sdk, self.endpoint) == ("anthropic", "chat"):
            asked["max_tokens"] = 1024
        call = attrgetter(METHODS[self.sdk, self.endpoint])(client)
        return call(**{**asked, **question.more})

    def _said(self, said: str) -> dict[str, Any]:
        """Return the argument that has what is said, under its name at this endpoint."""
        if self.endpoint in ("chat", "count_tokens"):
            return {"messages": user(said)}
        if self.endpoint == "responses":
            return {"input": user(said)}
        is_prompt = self.endpoint in ("completions", "generate")
        is_prompt = is_prompt or (self.sdk, self.endpoint) == ("ollama", "embeddings")
        return {"prompt" if is_prompt else "input": said}


SDKS = ("openai", "anthropic", "ollama")
WAYS = [
    Way(sdk, is_async, stream)
    for sdk in SDKS
    for is_async in (False, True)
    for stream in (False, True)
]
ENDPOINT_WAYS = [
    Way(sdk, is_async, stream, endpoint)
    for sdk, endpoint in METHODS
    for is_async in (False, True)
    for stream in (False, True)
    if endpoint in STREAMING or not stream
]
"""Every endpoint in every way that it has."""

STREAMS = [way for way in WAYS if way.stream]
WHOLES = [way for way in WAYS if not way.stream]


def text_of(sdk: str, objects: Iterable[Any]) -> str:
    """Return the text in what an SDK gave, streamed or whole."""
    return "".join(_text(sdk, item) for item in objects)


def _text(sdk: str, item: Any) -> str:
    if sdk == "ollama":
        return item.message.content or ""
    if sdk == "openai":
        parts = [getattr(choice, "delta", None) or choice.message for choice in item.choices]
        return "".join(part.content or "" for part in parts)
    if item.type == "message":
        return "".join(block.text for block in item.content if block.type == "text")
    is_text = item.type == "content_block_delta" and item.delta.type == "text_delta"
    return item.delta.text if is_text else ""


def looks_complete(sdk: str, objects: Iterable[Any]) -> bool:
    """Tell whether anything that an SDK gave says that the response is whole."""
    return any(_is_an_end(sdk, item) for item in objects)


def _is_an_end(sdk: str, item: Any) -> bool:
    if sdk == "ollama":
        return bool(item.done)
    if sdk == "openai":
        return any(choice.finish_reason for choice in item.choices)
    if item.type == "message":
        return item.stop_reason is not None
    return item.type in ("message_delta", "message_stop")


def plain(value: Any) -> Any:
    """Return what the SDK made, as plain data without what is never the same twice."""
    if hasattr(value, "model_dump"):
        # Generic models of the SDKs warn about their own type parameters.
        return plain(value.model_dump(warnings=False))
    if isinstance(value, dict):
        return {name: plain(item) for name, item in value.items() if name not in NEVER_THE_SAME}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    return value


def route(proxy: Daemon, name: str) -> str:
    """Return the URL of one of a proxy's routes."""
    return f"http://127.0.0.1:{proxy.port}/{name}"


def access_line(proxy: Daemon, session: str) -> dict[str, Any]:
    """Wait for the end of the request of that session; return its access line."""
    return proxy.wait_log("", logger="llmproxy.access", session=session)


def trace_of(proxy: Daemon, session: str) -> dict[str, Any]:
    """Wait for the trace of the request of that session."""
    return live_proxy.trace_of(proxy, session=session)
