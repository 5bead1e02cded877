"""What the demo provider says: its models, and the words and counts of a response.

A dialect reads a request into an :class:`Asked`; :func:`response` turns it into a
:class:`Response`, which the dialect then spells in its own way.  A response depends on the request
alone: the same question gets the same words and the same counts, streamed or not, in every dialect.
Only a prompt cache, where the provider has one, makes its counts depend on what came before.

This module knows no dialect, no HTTP, no reactor and nothing else of the program.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

MODELS = (
    "demo-fast",
    "demo-slow",
    "demo-20tps",
    "demo-429",
    "demo-500",
    "demo-503",
    "demo-break",
    "demo-stall",
    "demo-malformed",
    "demo-unfinished",
    "demo-fail",
    "demo-redirect",
)
"""The models that lists show; beside them every ``demo-Ntps`` with N from 1 to 9999 exists."""

_REST = (
    "This is the demo provider. No model stands behind it: it repeats what you wrote and adds these"
    " words, one at a time, so that you can watch them arrive."
)
_SLOW_TPS = 2.0
_FAILS = "demo-fail"
_FAILURE = "The demo provider gave up in the middle, as this model always does."
_TOKENS_BEFORE_FAILURE = 3
_PACED = re.compile(r"demo-([1-9][0-9]{0,3})tps")
_TOKEN = re.compile(r"\s*\S+")
_ASKS_FOR_TOOL = re.compile(r"\btool\b", re.IGNORECASE)
_SAMPLE_VALUES: Mapping[str, object] = {
    "integer": 1,
    "number": 1.5,
    "boolean": True,
    "array": [],
    "object": {},
    "null": None,
}


class BadAsk(Exception):
    """A request that the dialect answers with 400.

    Args:
        message: a sentence for the caller.
        param: the field of the body at fault, or None.
    """

    def __init__(self, message: str, param: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.param = param


@dataclass(frozen=True, slots=True)
class Tool:
    """A function the caller offers: its name, and its arguments as a JSON schema."""

    name: str
    schema: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Asked:
    """One request, whatever its dialect.

    Args:
        model: as the request names it.
        stream: the response is wanted piece by piece.
        prompt: the text of every message, system text included.
        said: the text of the last message of the user that has any.
        user_last: the last message is the user's own.
        tools: those that may be called; empty where the request forbids it.
        forced: the request says that a tool must be called.
        max_tokens: the longest text wanted, in tokens; None: no limit.
        reasoning: tokens to be spent on reasoning, beside those of the text.
        caches: how many parts of the prompt, from its beginning, are kept between requests.
        include_usage: an OpenAI stream ends with a chunk of usage.
        echo: members of the request that the response repeats, where the endpoint does so.
        dimensions: how long each embedding is to be.
        base64: embeddings are wanted as base64 of little-endian floats.
    """

    model: str
    stream: bool
    prompt: tuple[str, ...]
    said: str
    user_last: bool
    tools: tuple[Tool, ...] = ()
    forced: bool = False
    max_tokens: int | None = None
    reasoning: int = 0
    caches: int = 0
    include_usage: bool = False
    echo: Mapping[str, Any] = field(default_factory=dict)
    dimensions: int = 0
    base64: bool = False


@dataclass(frozen=True, slots=True)
class Response:
    """What is said: a text, or the call of one tool.

    Args:
        model: as the request named it.
        tokens: words with the space before them; joined they are the text, or the tool's
            arguments as JSON.
        prompt_tokens: the words of the prompt, cached or not.
        read_tokens: those of them that came out of the cache.
        written_tokens: those of them that went into it.
        reasoning_tokens: made before the first of ``tokens``, and not shown.
        tool: the name of the tool that is called; None: this is a text.
        cut: ``max_tokens`` ended the text.
        failure: why the provider gives up after these tokens; None: it does not.
        seconds: how long all tokens take at the model's pace.
    """

    model: str
    tokens: tuple[str, ...]
    prompt_tokens: int
    read_tokens: int = 0
    written_tokens: int = 0
    reasoning_tokens: int = 0
    tool: str | None = None
    cut: bool = False
    failure: str | None = None
    seconds: float = 0.0

    @property
    def made(self) -> int:
        """How many tokens were made, with those of the reasoning."""
        return self.reasoning_tokens + len(self.tokens)

    @property
    def text(self) -> str:
        """The text, or the tool's arguments as JSON."""
        return "".join(self.tokens)

    @property
    def arguments(self) -> Any:
        """The tool's arguments, decoded."""
        return json.loads(self.text)

    def timed(self) -> Iterator[tuple[str, int]]:
        """Each token, and how many had to be made for it; the reasoning comes before the first."""
        before = self.reasoning_tokens
        for token in self.tokens:
            yield token, 1 + before
            before = 0


def model_exists(name: str) -> bool:
    """Whether a request may name this model."""
    return name in MODELS or _PACED.fullmatch(name) is not None


def tokens_per_second(name: str) -> float | None:
    """The pace that a model's name sets; None: as fast as the client reads."""
    paced = _PACED.fullmatch(name)
    if paced is not None:
        return float(paced[1])
    return _SLOW_TPS if name == "demo-slow" else None


def response(
    ask: Asked, pace: float | None = None, cached: tuple[int, int] | None = None
) -> Response:
    """What the demo provider says to a request, at so many tokens per second (None: at once).

    A tool is called, the first one offered, where the request forces it, or where tools are offered
    and the last message is the user's and contains the word "tool".  ``max_tokens`` cuts a text,
    never a tool's arguments: half a JSON object would help nobody.

    ``cached`` says how many words of the prompt came out of a cache and how many went into it.
    Without a cache (None) they depend on the request alone: where the prompt is to be kept, its
    first part was there already, its last is new and is not kept, and what stands between goes into
    the cache; of a prompt of one part, nothing is.
    """
    tool = _tool_to_call(ask)
    text = _echo(ask.said) if tool is None else json.dumps(_sample_arguments(tool.schema))
    tokens = tuple(_TOKEN.findall(text))
    kept = tokens if tool is not None else tokens[: ask.max_tokens]
    fails = ask.model == _FAILS
    words = [len(part.split()) for part in ask.prompt]
    if cached is None:
        kept_words = words[:-1] if ask.caches else []
        cached = sum(kept_words[:1]), sum(kept_words[1:])
    return Response(
        model=ask.model,
        tokens=kept[:_TOKENS_BEFORE_FAILURE] if fails else kept,
        prompt_tokens=sum(words),
        read_tokens=cached[0],
        written_tokens=cached[1],
        reasoning_tokens=ask.reasoning,
        tool=None if tool is None else tool.name,
        cut=len(kept) < len(tokens),
        failure=_FAILURE if fails else None,
        seconds=(ask.reasoning + len(kept)) / pace if pace else 0.0,
    )


def _echo(said: str) -> str:
    return f"You said: {said.strip()}. {_REST}"


def _tool_to_call(ask: Asked) -> Tool | None:
    wanted = ask.forced or (ask.user_last and _ASKS_FOR_TOOL.search(ask.said) is not None)
    return ask.tools[0] if ask.tools and wanted else None


def _sample_arguments(schema: Mapping[str, Any]) -> dict[str, object]:
    """A value of the right type for each property; a string where the schema does not say."""
    properties = schema.get("properties")
    if not isinstance(properties, dict):
        return {}
    return {name: _sample_value(rule) for name, rule in properties.items()}


def _sample_value(rule: object) -> object:
    if not isinstance(rule, dict):
        return "demo"
    if isinstance(rule.get("enum"), list) and rule["enum"]:
        return rule["enum"][0]
    kind = rule.get("type")
    return _SAMPLE_VALUES.get(kind, "demo") if isinstance(kind, str) else "demo"
