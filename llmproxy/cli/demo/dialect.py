"""What the demo provider's dialects have in common: the promise each keeps, and how JSON is read.

A dialect stands between the wire and ``demo_answer``: it reads a decoded body into an
:class:`~.answer.Ask` and spells an :class:`~.answer.Answer`.  The shapes are those of the
providers' published APIs, and are written down here a second time on purpose: the demo provider
must not share them with the proxy that it stands behind.

This module knows no HTTP beyond status codes and header fields, no reactor and nothing else of the
program.
"""

from __future__ import annotations

import json
import secrets
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from datetime import UTC, datetime
from typing import Any, ClassVar, NamedTuple

from llmproxy.cli.demo.answer import Answer, Ask, BadAsk, Tool

Clock = Callable[[], float]
"""Tells the seconds since 1970."""

Document = dict[str, object]
"""A JSON object on its way out."""

Fields = Sequence[tuple[bytes, bytes]]
"""Header fields, in order, names in lower case."""

RELEASED = 1735689600
"""The demo models' birthday, 2025-01-01, in seconds since 1970."""

REQUESTS_PER_MINUTE = 10000
"""The limit that the rate limit headers claim; nobody enforces it."""


class Event(NamedTuple):
    """One write on a stream, and how many tokens had to be made for it."""

    data: bytes
    tokens: int = 0


class Dialect(ABC):
    """One provider's shapes: requests in, answers, models and errors out."""

    stream_type: ClassVar[bytes]
    """The content type of a stream."""

    @abstractmethod
    def ask(self, body: dict[str, Any]) -> Ask:
        """Read the body of a chat request.

        Raises:
            BadAsk: a field is missing or of the wrong type.
        """

    @abstractmethod
    def events(self, answer: Answer, ask: Ask, clock: Clock) -> Iterator[Event]:
        """The events of a stream, each a whole one, to the dialect's own end marker."""

    @abstractmethod
    def document(self, answer: Answer, clock: Clock) -> Document:
        """The same answer in one piece."""

    @abstractmethod
    def error(self, status: int, bad: BadAsk, request_id: str) -> Document:
        """An error of that status."""

    @abstractmethod
    def unknown_model(self, name: str) -> BadAsk:
        """The words with which this provider says that a model does not exist."""

    @abstractmethod
    def fields(self, request_id: str, remaining: int, clock: Clock) -> Fields:
        """The header fields such a provider adds; ``remaining`` requests are left this minute."""

    @abstractmethod
    def models(self) -> Document:
        """The list of models."""

    @abstractmethod
    def model(self, name: str) -> Document:
        """One model, as the list shows it."""


def model_named(body: dict[str, Any]) -> str:
    """The model that a body names.

    Raises:
        BadAsk: it names none.
    """
    name = body.get("model")
    if not isinstance(name, str) or not name:
        raise BadAsk("model: a string is required", "model")
    return name


def messages_of(body: dict[str, Any]) -> list[dict[str, Any]]:
    """The messages of a body, at least one.

    Raises:
        BadAsk: there is none, or one is not an object.
    """
    messages = objects(body, "messages")
    if not messages:
        raise BadAsk("messages: a list with at least one message is required", "messages")
    return messages


def objects(body: dict[str, Any], key: str) -> list[dict[str, Any]]:
    """A list of objects; a missing or null one is empty.

    Raises:
        BadAsk: it is something else.
    """
    value = body.get(key)
    if value is None:
        return []
    if not isinstance(value, list) or not all(isinstance(item, dict) for item in value):
        raise BadAsk(f"{key}: a list of objects is required", key)
    return value


def object_or_empty(value: object) -> dict[str, Any]:
    """An object as it is, anything else as an empty one."""
    return value if isinstance(value, dict) else {}


def limit(body: dict[str, Any], key: str) -> int | None:
    """A count of tokens; None where the body has none.

    Raises:
        BadAsk: it is not an integer of at least 1.
    """
    value = body.get(key)
    if value is not None and (not isinstance(value, int) or value < 1):
        raise BadAsk(f"{key}: an integer of at least 1 is required", key)
    return value


def text_of(content: object) -> str:
    """The text of a message's content: itself, or its text parts."""
    if isinstance(content, str):
        return content
    parts = content if isinstance(content, list) else []
    texts = (object_or_empty(part).get("text") for part in parts)
    return " ".join(text for text in texts if isinstance(text, str))


def said_by_user(messages: list[dict[str, Any]]) -> tuple[str, bool]:
    """The last text of the user, and whether it is the last message.

    A message that only carries a tool's result, as Anthropic's users do, has no text.
    """
    for message in reversed(messages):
        text = text_of(message.get("content"))
        if message.get("role") == "user" and text:
            return text, message is messages[-1]
    return "", False


def function_tools(body: dict[str, Any]) -> list[Tool]:
    """The tools of a body as OpenAI and Ollama write them.

    Raises:
        BadAsk: ``tools`` is not a list of objects.
    """
    functions = (object_or_empty(tool.get("function")) for tool in objects(body, "tools"))
    return [
        Tool(function["name"], object_or_empty(function.get("parameters")))
        for function in functions
        if isinstance(function.get("name"), str)
    ]


def tools_named(tools: list[Tool], name: object) -> tuple[Tool, ...]:
    """All tools where the request names none, else the one it names.

    Raises:
        BadAsk: no tool has that name.
    """
    chosen = tuple(tool for tool in tools if name is None or tool.name == name)
    if name is not None and not chosen:
        raise BadAsk(f"tool_choice: no tool is called {name}", "tool_choice")
    return chosen


def json_bytes(value: object) -> bytes:
    """Compact JSON in UTF-8; half a surrogate pair becomes a question mark."""
    return json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode("utf-8", "replace")


def sse(data: bytes) -> bytes:
    """One SSE event without a name."""
    return b"data: %s\n\n" % data


def new_id(prefix: str) -> str:
    """A random id as providers write them."""
    return prefix + secrets.token_hex(12)


def rfc3339(seconds: float) -> str:
    """A time in UTC, from seconds since 1970."""
    return datetime.fromtimestamp(seconds, UTC).isoformat().replace("+00:00", "Z")
