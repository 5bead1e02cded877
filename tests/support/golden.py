"""The recorded streams of ``tests/stream/golden``: how each is read, and what is in it."""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

from llmproxy.dialects.accumulated import ProviderError, ToolCall, Usage
from llmproxy.dialects.dialect import Dialect
from llmproxy.dialects.endpoint import Endpoint
from llmproxy.dialects.endpoints import endpoint
from llmproxy.errors import EndReason
from llmproxy.stream.tap import Result, StreamAccumulator

GOLDEN = Path(__file__).parents[1] / "stream" / "golden"

CONTENT_TYPES = {
    ".sse": b"text/event-stream; charset=utf-8",
    ".ndjson": b"application/x-ndjson",
    ".json": b"application/json",
    ".array": b"application/json; charset=UTF-8",
}


NOT_REPORTED = Usage()


class GoldenStream(NamedTuple):
    """A file, the endpoint that sends such files, and the result of reading it to its end."""

    file: str
    dialect: Dialect
    path: bytes
    result: Result

    @property
    def data(self) -> bytes:
        """The bytes of the file."""
        return (GOLDEN / self.file).read_bytes()

    @property
    def without_content(self) -> Result:
        """The result with ``capture = "usage"``."""
        fields = {name: getattr(self.result, name) for name in self.result.__struct_fields__}
        return Result(**{**fields, "text": "", "text_bytes": 0, "tool_calls": ()})

    @property
    def row(self) -> Endpoint:
        """The row of the endpoint."""
        row = endpoint(self.dialect, self.path)
        assert row is not None
        return row

    def tap(
        self, capture: Literal["usage", "content"] = "content", **options: Any
    ) -> StreamAccumulator:
        """Return a tap for such a response."""
        suffix = Path(self.file).suffix
        options.setdefault("content_type", CONTENT_TYPES[suffix])
        return StreamAccumulator(options.pop("row", self.row), capture=capture, **options)

    def read(
        self,
        chunks: Iterable[bytes],
        capture: Literal["usage", "content"] = "content",
        end: EndReason = EndReason.COMPLETE,
        **options: Any,
    ) -> Result:
        """Return the result of these chunks."""
        tap = self.tap(capture, **options)
        for chunk in chunks:
            tap.feed(chunk)
        return tap.finish(end)


def _golden(
    kind: tuple[str, Dialect, bytes],
    suffix: str,
    sender: tuple[str | None, str | None],
    events: int,
    finish: str | None = None,
    text: str = "",
    *,
    calls: tuple[ToolCall, ...] = (),
    usage: Usage = NOT_REPORTED,
    error: tuple[str | None, str] | None = None,
    end: EndReason = EndReason.COMPLETE,
) -> GoldenStream:
    """Return the entry of a file: the model and the id that sent it, and what it holds."""
    name, dialect, path = kind
    result = Result(
        end_reason=end if error is None else EndReason.UPSTREAM_FAILED,
        text=text,
        text_bytes=len(text.encode()),
        tool_calls=calls,
        usage=usage,
        events=events,
        finish_reason=finish,
        model=sender[0],
        response_id=sender[1],
        error=error and ProviderError(*error),
    )
    return GoldenStream(name + suffix, dialect, path, result)


def _usage(
    input_: int | None,
    output: int | None = None,
    read: int | None = None,
    write: int | None = None,
    reasoning: int | None = None,
    provenance: Literal["reported", "partial"] = "reported",
) -> Usage:
    """Return counts of tokens: input, output, cache read, cache write, reasoning."""
    return Usage(
        input_tokens=input_,
        output_tokens=output,
        cache_read_tokens=read,
        cache_write_tokens=write,
        reasoning_tokens=reasoning,
        provenance=provenance,
    )


_chat = partial(_golden, ("openai-chat", Dialect.OPENAI, b"/v1/chat/completions"))
_completions = partial(_golden, ("openai-completions", Dialect.OPENAI, b"/v1/completions"))
_embeddings = partial(_golden, ("openai-embeddings", Dialect.OPENAI, b"/v1/embeddings"))
_responses = partial(_golden, ("openai-responses", Dialect.OPENAI, b"/v1/responses"))
_messages = partial(_golden, ("anthropic-messages", Dialect.ANTHROPIC, b"/v1/messages"))
_ollama = partial(_golden, ("ollama-chat", Dialect.OLLAMA, b"/api/chat"))
_generate = partial(_golden, ("ollama-generate", Dialect.OLLAMA, b"/api/generate"))
_embed = partial(_golden, ("ollama-embed", Dialect.OLLAMA, b"/api/embed"))
_gemini = partial(
    _golden,
    ("gemini-generate", Dialect.GEMINI, b"/v1beta/models/gemini-2.5-flash:streamGenerateContent"),
)

# Who sent it: the model, and the id of the response.
_NOBODY = (None, None)
_4O = ("gpt-4o-2024-08-06", "chatcmpl-B9MBs8CjcvOU2jLn4n570S5qMJKcT")
_41 = ("gpt-4.1-2025-04-14", "resp_67c9fdcecf488190bdd9a0409de3a1ec07b8b0ad4e5eb654")
_INSTRUCT = ("gpt-3.5-turbo-instruct", "cmpl-7iA7iJjj8V2zOkCGvWF2hAkWhkvIs")
_SONNET = ("claude-sonnet-4-5-20250929", "msg_014p7gG3wDgGV9EUtLvnow3U")
_LLAMA = ("llama3.2", None)
_FLASH = ("gemini-2.5-flash", "fOcrae2KNY-k7dcPx5ukwQk")

_WEATHER = "call_unDUaX7dlAFXEZyhtVoGqMhN"
_TOOLU = "toolu_01T1x1fJ34qAmk2tNTrN7Up6"
_GREETING = 'Grüße "usage": {"prompt_tokens": 7} aus 東京 🗼\n\ndata: [DONE]'
_HELLO = "Hello! How can I assist you today? 😀"
_37 = _usage(37, 11, 5, 0, 2)
_TOKYO = 'Grüße aus 東京 🗼 {"finishReason": "STOP"}]'

RECORDED = (
    _chat(".sse", _4O, 10, "stop", _GREETING),
    _chat("-usage.sse", _4O, 6, "length", "Hello there", usage=_usage(19, 10, 0, 3, 4)),
    _chat(
        "-tools.sse",
        _4O,
        8,
        "tool_calls",
        calls=(
            ToolCall("call_DdmO9pD3xa9XTPNJ32zg2hcA", "get_weather", '{"city":"Łódź"}'),
            ToolCall("call_2Hb7", "get_time", "{}"),
        ),
    ),
    _chat("-azure.sse", _4O, 5, "stop", "Hi"),
    _chat("-running.sse", ("qwen2.5", "cmpl-7"), 4, "stop", "Zwölf Boxkämpfer", usage=_usage(5, 4)),
    _chat(
        "-error.sse",
        _4O,
        3,
        text="Hel",
        error=("server_error", "The server had an error while processing your request."),
    ),
    _chat("-two.sse", _4O, 8, "length", "ab"),
    _chat("-odd.sse", ("m", "x-1"), 3, "stop", "one two", usage=_usage(0, 2)),
    _chat(
        ".json",
        ("gpt-4.1-2025-04-14", _4O[1]),
        1,
        "stop",
        _HELLO,
        calls=(ToolCall("call_abc123", "f", '{\n"a": 1\n}'),),
        usage=_usage(19, 10, 8, None, 4),
    ),
    _golden(
        ("openai-error", Dialect.OPENAI, b"/v1/chat/completions"),
        ".json",
        _NOBODY,
        1,
        error=("insufficient_quota", "You exceeded your current quota."),
    ),
    _completions(".sse", _INSTRUCT, 5, "stop", "This is a test", usage=_usage(5, 7)),
    _completions(".json", _INSTRUCT, 1, "length", "\n\nThis is indeed a test", usage=_usage(5, 7)),
    _embeddings(".json", ("text-embedding-3-small", None), 1, usage=_usage(8)),
    _responses(".sse", _41, 12, "completed", 'Hi there! "response": {"usage": 1} 🎉', usage=_37),
    _responses("-incomplete.sse", _41, 6, "max_output_tokens", "Hi", usage=_usage(37, 0, 5, 0, 2)),
    _responses(
        "-failed.sse",
        _41,
        6,
        "failed",
        "Hi",
        error=("server_error", "The model failed to generate a response."),
    ),
    _responses("-error.sse", _41, 5, error=("rate_limit_exceeded", "Rate limit reached")),
    _responses(
        "-tools.sse",
        _41,
        8,
        "completed",
        calls=(ToolCall(_WEATHER, "get_weather", '{"city":"Paris"}'),),
        usage=_37,
    ),
    _responses(
        ".json",
        _41,
        1,
        "completed",
        "Hello 🌍",
        calls=(ToolCall(_WEATHER, "get_weather", "{}"),),
        usage=_37,
    ),
    _messages(
        ".sse",
        _SONNET,
        15,
        "end_turn",
        'Okay, "type":"message_stop" für 日本🗾',
        usage=_usage(472, 89, 100, 21, 30),
    ),
    _messages(
        "-tools.sse",
        _SONNET,
        13,
        "tool_use",
        "I'll look.",
        calls=(ToolCall(_TOOLU, "get_weather", '{"location": "San Francisco"}'),),
        usage=_usage(472, 0, 0, 21),
    ),
    _messages(
        "-error.sse",
        _SONNET,
        4,
        text="I",
        usage=_usage(472, 2, 0, 21, provenance="partial"),
        error=("overloaded_error", "Overloaded"),
    ),
    _messages(
        "-partial.sse",
        _SONNET,
        4,
        text="Half",
        usage=_usage(472, 2, 0, 21, provenance="partial"),
        end=EndReason.UNFINISHED,
    ),
    _messages(
        ".json",
        _SONNET,
        1,
        "end_turn",
        "Hi! My name is Claude.",
        calls=(ToolCall(_TOOLU, "get_weather", '{"location":"Zürich"}'),),
        usage=_usage(472, 503, 7, 21),
    ),
    _golden(
        ("anthropic-error", Dialect.ANTHROPIC, b"/v1/messages"),
        ".json",
        _NOBODY,
        1,
        error=("not_found_error", "The requested resource could not be found."),
    ),
    _ollama(".ndjson", _LLAMA, 5, "stop", 'The sky "done":true är blå 🟦', usage=_usage(26, 282)),
    _ollama(
        "-tools.ndjson",
        _LLAMA,
        4,
        "stop",
        calls=(ToolCall("call_1", "get_weather", '{"city":"Tōkyō"}'), ToolCall(None, "now", "{}")),
        usage=_usage(0, 282),
    ),
    _ollama(
        "-error.ndjson",
        _LLAMA,
        2,
        text="The",
        error=(None, "an error was encountered while running the model: unexpected EOF"),
    ),
    _generate(".ndjson", _LLAMA, 3, "stop", "The sky", usage=_usage(26, 282)),
    _ollama(".json", _LLAMA, 1, "stop", "Hello! How are you today?", usage=_usage(None, 282)),
    _generate(".json", _LLAMA, 1, "stop", "Hi", usage=_usage(26, 282)),
    _embed(".json", ("all-minilm", None), 1, usage=_usage(8)),
    _golden(
        ("ollama-error", Dialect.OLLAMA, b"/api/chat"),
        ".json",
        _NOBODY,
        1,
        error=(None, 'model "llama9" not found, try pulling it first'),
    ),
    _gemini(".sse", _FLASH, 4, "STOP", _TOKYO, usage=_usage(12, 27, 4, None, 18)),
    _gemini(".array", _FLASH, 4, "STOP", _TOKYO, usage=_usage(12, 27, 4, None, 18)),
    _gemini(
        "-tools.sse",
        _FLASH,
        2,
        "STOP",
        calls=(
            ToolCall(None, "get_weather", '{"city":"Łódź"}'),
            ToolCall("fc_1", "now", "{}"),
        ),
        usage=_usage(65, 61, None, None, 40),
    ),
    _gemini("-cut.sse", _FLASH, 2, "MAX_TOKENS", "Half of", usage=_usage(12, 2)),
    _gemini(
        "-partial.sse",
        _FLASH,
        1,
        text="Half",
        usage=_usage(12, 1, provenance="partial"),
        end=EndReason.UNFINISHED,
    ),
    _gemini("-blocked.sse", _FLASH, 1, "PROHIBITED_CONTENT", usage=_usage(7, 0)),
    _gemini(
        "-error.sse",
        _FLASH,
        2,
        text="Hel",
        usage=_usage(12, 1, provenance="partial"),
        error=("UNAVAILABLE", "The model is overloaded. Please try again later."),
    ),
    _gemini(
        ".json",
        _FLASH,
        1,
        "STOP",
        "Hello 🌍",
        calls=(ToolCall(None, "f", '{"a":1}'),),
        usage=_usage(17, 27, 4, None, 18),
    ),
    _golden(
        ("gemini-blocked", Dialect.GEMINI, b"/v1beta/models/gemini-2.5-flash:generateContent"),
        ".json",
        _FLASH,
        1,
        "PROHIBITED_CONTENT",
        usage=_usage(7, 0),
    ),
    _golden(
        ("gemini-embed", Dialect.GEMINI, b"/v1beta/models/gemini-embedding-2:embedContent"),
        ".json",
        _NOBODY,
        1,
        usage=_usage(8),
    ),
    _golden(
        ("gemini-batch-embed", Dialect.GEMINI, b"/v1/models/e:batchEmbedContents"),
        ".json",
        _NOBODY,
        1,
        usage=_usage(3),
    ),
    _golden(
        ("gemini-error", Dialect.GEMINI, b"/v1beta/models/gemini-9:generateContent"),
        ".json",
        _NOBODY,
        1,
        error=("NOT_FOUND", "models/gemini-9 is not found for API version v1beta."),
    ),
)
"""Every file, with what it holds."""

BY_FILE = {one.file: one for one in RECORDED}
