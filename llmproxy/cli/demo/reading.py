"""How a request's decoded JSON is read: models, messages, inputs, tools and limits.

What several endpoints read alike stands here, each reader with the complaint that a caller gets.
This module knows no dialect, no HTTP, no reactor and nothing else of the program.
"""

from __future__ import annotations

from typing import Any

from llmproxy.cli.demo.response import BadAsk, Tool

MOST_DIMENSIONS = 4096
"""The longest embedding that may be asked for."""

_DIMENSIONS = 8  # enough to look at


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


def dimensions_of(body: dict[str, Any]) -> int:
    """How long embeddings are to be; 8 numbers where the body does not say.

    Raises:
        BadAsk: it is not an integer of at least 1, or larger than anybody needs.
    """
    wanted = limit(body, "dimensions") or _DIMENSIONS
    if wanted > MOST_DIMENSIONS:
        raise BadAsk(
            f"dimensions: an integer of at most {MOST_DIMENSIONS} is required", "dimensions"
        )
    return wanted


def texts_of(body: dict[str, Any], key: str) -> tuple[str, ...]:
    """Texts, given as one or as a list; tokens given as numbers become words, each a number.

    Raises:
        BadAsk: there is none, or something else stands there.
    """
    value = body.get(key)
    one = isinstance(value, str) or _is_tokens(value)
    items = [value] if one else value
    if not isinstance(items, list) or not items:
        raise BadAsk(f"{key}: a text or a list of texts is required", key)
    return tuple(_text_or_tokens(item, key) for item in items)


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


def _is_tokens(value: object) -> bool:
    return isinstance(value, list) and bool(value) and all(type(item) is int for item in value)


def _text_or_tokens(item: object, key: str) -> str:
    if isinstance(item, str):
        return item
    if not isinstance(item, list) or not _is_tokens(item):
        raise BadAsk(f"{key}: a text or a list of texts is required", key)
    return " ".join(str(token) for token in item)
