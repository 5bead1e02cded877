"""What is accumulated from one response so far, within a budget of bytes.

The readers of all dialects write here what they find, under our own names; the tap makes its result
of it.  Text and tool calls are held as UTF-8 in one buffer each, so that the bytes that are counted
are the bytes that are held.  Nothing here knows a dialect, JSON or a framing.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import msgspec

Provenance = Literal["reported", "partial", "none"]

_NAME = 256
"""Most characters of a model's name, an id or a finish reason."""

_MESSAGE = 1024
"""Most characters of an error's message."""

_FAILURES = frozenset(("error", "failed", "abort", "network_error", "insufficient_system_resource"))
"""Finish reasons that say that the provider failed: OpenRouter and Mistral, vLLM, SGLang, Zhipu and
DeepSeek send them in place of an error."""

_CALL = 256
"""Bytes of the budget that one tool call takes, in addition to its id, name and arguments."""

_PATIENCE = 256
"""How many short odd events of a response are read tolerantly."""

_NAMELESS = 8
"""How many events are searched for the model and the id; Azure's first one has neither."""


class Usage(msgspec.Struct, frozen=True, kw_only=True):
    """Tokens as the provider counted them, under our names; None for what was not reported.

    ``provenance`` is ``reported`` if these are the final counts, ``partial`` if the stream ended
    before the final counts came, and ``none`` if no count came.  The input of OpenAI and Ollama
    includes tokens that were read from the cache, the input of Anthropic does not.
    """

    input_tokens: int | None = None
    output_tokens: int | None = None
    cache_read_tokens: int | None = None
    cache_write_tokens: int | None = None
    reasoning_tokens: int | None = None
    provenance: Provenance = "none"


class ToolCall(msgspec.Struct, frozen=True):
    """A tool call: the provider's id, the tool's name, and the arguments (mostly JSON)."""

    id: str | None
    name: str | None
    arguments: str


class ProviderError(NamedTuple):
    """The error that a provider put into its response.

    ``kind`` is the provider's own word.  The message may quote the request, so it is no label.
    """

    kind: str | None
    message: str | None


class _Call:
    """A tool call that is not complete yet."""

    __slots__ = ("arguments", "id", "name")

    def __init__(self, id_: str | None, name: str | None) -> None:
        self.id = id_
        self.name = name
        self.arguments = bytearray()


class Accumulated(msgspec.Struct, kw_only=True, eq=False):
    """What was found so far.

    Attributes:
        keeps: whether text and tool calls are held.
        budget: most bytes of text and tool calls that are held, in UTF-8.
        held_bytes: how many bytes of that are used.
        wants_all: whether the whole event must be read.  If not, usage, finish reason, end marker
            and error are enough.
        has_counts: whether any count came.
        has_ended: whether the dialect's end marker was seen.
        patience: how many short events may still be read tolerantly, if they are odd.
        is_odd: whether a part of an event was left out because it could not be read.
        is_cut: whether text or tool calls were longer than the budget.
        text_bytes: how long the text is, together with the part that is not held.
    """

    keeps: bool
    budget: int
    wants_all: bool = True
    model: str | None = None
    response_id: str | None = None
    finish_reason: str | None = None
    error: ProviderError | None = None
    has_counts: bool = False
    has_ended: bool = False
    is_odd: bool = False
    patience: int = _PATIENCE
    is_cut: bool = False
    text_bytes: int = 0
    held_bytes: int = 0
    _nameless: int = _NAMELESS
    _text: bytearray = msgspec.field(default_factory=bytearray)
    _calls: dict[int, _Call] = msgspec.field(default_factory=dict)
    _tokens: dict[str, int] = msgspec.field(default_factory=dict)
    _provisional: bool = False

    @property
    def text(self) -> str:
        """The text, as far as it is held."""
        return _decoded(self._text)

    @property
    def tool_calls(self) -> tuple[ToolCall, ...]:
        """The tool calls in the order in which they began, as far as they are held."""
        return tuple(
            ToolCall(call.id, call.name, _decoded(call.arguments)) for call in self._calls.values()
        )

    def usage(self, *, is_final: bool) -> Usage:
        """Return the counts so far.

        Args:
            is_final: whether nothing more is to come.
        """
        if not self._tokens:
            return Usage()
        reported = is_final and not self._provisional
        return Usage(**self._tokens, provenance="reported" if reported else "partial")

    @property
    def _has_output(self) -> bool:
        return "output_tokens" in self._tokens

    def outdate(self) -> None:
        """The response went on behind its counts: they are not final, unless others come."""
        self._provisional = True

    def name(self, response_id: str | None, model: str | None) -> None:
        """Take the first id and the first model that are not empty."""
        if response_id and self.response_id is None:
            self.response_id = _short(response_id, _NAME)
        if model and self.model is None:
            self.model = _short(model, _NAME)
        self._nameless -= 1
        named = self.model is not None and self.response_id is not None
        self.wants_all = self.keeps or not (named or self._nameless <= 0)

    def finish(self, reason: str | None) -> None:
        """Take a finish reason if there is one; the last one counts.

        Some providers tell of their own failure by the reason alone.
        """
        if reason:
            self.finish_reason = _short(reason, _NAME)
            if reason in _FAILURES:
                self.fail(reason, None)

    def count(
        self,
        *,
        input_tokens: int | None = None,
        output_tokens: int | None = None,
        cache_read_tokens: int | None = None,
        cache_write_tokens: int | None = None,
        reasoning_tokens: int | None = None,
        is_opening: bool = False,
    ) -> None:
        """Take counts: each replaces the earlier count, and None leaves that as it is.

        Args:
            is_opening: these are counts of the beginning, as an event gives them that opens a
                response.  They are not final until a count of the output follows.
        """
        tokens = self._tokens
        came = False
        if input_tokens is not None:
            tokens["input_tokens"] = input_tokens
            came = True
        if output_tokens is not None:
            tokens["output_tokens"] = output_tokens
            came = True
        if cache_read_tokens is not None:
            tokens["cache_read_tokens"] = cache_read_tokens
            came = True
        if cache_write_tokens is not None:
            tokens["cache_write_tokens"] = cache_write_tokens
            came = True
        if reasoning_tokens is not None:
            tokens["reasoning_tokens"] = reasoning_tokens
            came = True
        if came:
            self.has_counts = True
            if is_opening or output_tokens is not None or not self._has_output:
                self._provisional = is_opening

    def fail(self, kind: str | None, message: str | None) -> None:
        """Take the provider's error; the first one counts."""
        if self.error is None:
            self.error = ProviderError(
                kind and _short(kind, _NAME), message and _short(message, _MESSAGE)
            )

    def add_text(self, text: str) -> None:
        """Hold a piece of the text, or as much of it as the budget has room for."""
        piece = _encoded(text)
        self.text_bytes += len(piece)
        self._hold(self._text, piece)

    def open_call(self, key: int, id_: str | None, name: str | None) -> None:
        """Begin the tool call ``key``; if it has begun, add the id and the name it lacks."""
        call = self._call(key)
        if call is not None:
            call.id = call.id or self._affordable(id_)
            call.name = call.name or self._affordable(name)

    def add_arguments(self, key: int, arguments: str) -> None:
        """Hold a piece of the arguments of the tool call ``key``."""
        call = self._call(key)
        if call is not None:
            self._hold(call.arguments, _encoded(arguments))

    @property
    def calls(self) -> int:
        """How many tool calls are held."""
        return len(self._calls)

    def _call(self, key: int) -> _Call | None:
        call = self._calls.get(key)
        if call is None and self._spend(_CALL):
            call = self._calls[key] = _Call(None, None)
        return call

    def _affordable(self, name: str | None) -> str | None:
        name = name and _short(name, _NAME)
        return name if name and self._spend(len(name.encode())) else None

    def _spend(self, cost: int) -> bool:
        if cost > self.budget - self.held_bytes:
            # Nothing more is held from here on: there would be a hole before it.
            self.held_bytes = self.budget
            self.is_cut = True
            return False
        self.held_bytes += cost
        return True

    def _hold(self, buffer: bytearray, piece: bytes) -> None:
        room = self.budget - self.held_bytes
        if self._spend(len(piece)):
            buffer += piece
        else:
            buffer += piece[:room].decode(errors="ignore").encode()


def _encoded(text: str) -> bytes:
    """Return UTF-8; half a surrogate pair stays, for the other half may come next."""
    try:
        return text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-8", "surrogatepass")


def _decoded(data: bytes | bytearray) -> str:
    """Return what :func:`_encoded` made UTF-8 of; halves that follow each other are a pair."""
    try:
        return data.decode()
    except UnicodeDecodeError:
        return _without_halves(data.decode("utf-8", "surrogatepass"))


def _short(name: str, most: int) -> str:
    """Return the beginning of a name, which the records can encode."""
    return name[:most] if name.isascii() else _without_halves(name[:most])


def _without_halves(text: str) -> str:
    """Return the text with U+FFFD for each half of a surrogate pair that lacks the other one."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
