"""The recorded streams of ``tests/stream/golden``: how each is read, and what is in it."""

from __future__ import annotations

from collections.abc import Iterable
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
}


class GoldenStream(NamedTuple):
    """A file, the endpoint that sends such, and the result of reading it to its end."""

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
        """What ``capture = "usage"`` finds."""
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
        """Return what these chunks hold."""
        tap = self.tap(capture, **options)
        for chunk in chunks:
            tap.feed(chunk)
        return tap.finish(end)


def _result(
    text: str = "", calls: tuple[ToolCall, ...] = (), usage: Usage | None = None, **rest: Any
) -> Result:
    return Result(
        end_reason=rest.pop("end", EndReason.COMPLETE),
        text=text,
        text_bytes=len(text.encode()),
        tool_calls=calls,
        usage=usage or Usage(),
        **rest,
    )


def _usage(input_: int | None, output: int | None = None, **rest: Any) -> Usage:
    rest.setdefault("provenance", "reported")
    return Usage(input_tokens=input_, output_tokens=output, **rest)


def _openai(file: str, path: bytes, *what: Any, **rest: Any) -> GoldenStream:
    return GoldenStream(f"openai-{file}", Dialect.OPENAI, path, _result(*what, **rest))


def _chat(file: str, *what: Any, **rest: Any) -> GoldenStream:
    return _openai(f"chat{file}", b"/v1/chat/completions", *what, **rest)


def _responses(file: str, *what: Any, **rest: Any) -> GoldenStream:
    return _openai(f"responses{file}", b"/v1/responses", *what, **rest)


def _anthropic(file: str, *what: Any, **rest: Any) -> GoldenStream:
    return GoldenStream(
        f"anthropic-{file}", Dialect.ANTHROPIC, b"/v1/messages", _result(*what, **rest)
    )


def _ollama(file: str, path: bytes, *what: Any, **rest: Any) -> GoldenStream:
    return GoldenStream(f"ollama-{file}", Dialect.OLLAMA, path, _result(*what, **rest))


FAILED = EndReason.UPSTREAM_FAILED
_4O: dict[str, Any] = {
    "model": "gpt-4o-2024-08-06",
    "response_id": "chatcmpl-B9MBs8CjcvOU2jLn4n570S5qMJKcT",
}
_41: dict[str, Any] = {
    "model": "gpt-4.1-2025-04-14",
    "response_id": "resp_67c9fdcecf488190bdd9a0409de3a1ec07b8b0ad4e5eb654",
}
_INSTRUCT: dict[str, Any] = {
    "model": "gpt-3.5-turbo-instruct",
    "response_id": "cmpl-7iA7iJjj8V2zOkCGvWF2hAkWhkvIs",
}
_SONNET: dict[str, Any] = {
    "model": "claude-sonnet-4-5-20250929",
    "response_id": "msg_014p7gG3wDgGV9EUtLvnow3U",
}
_LLAMA: dict[str, Any] = {"model": "llama3.2"}
_DETAILS: dict[str, Any] = {"cache_read_tokens": 0, "cache_write_tokens": 3, "reasoning_tokens": 4}
_RESPONSE: dict[str, Any] = {"cache_read_tokens": 5, "cache_write_tokens": 0, "reasoning_tokens": 2}
_WEATHER = "call_unDUaX7dlAFXEZyhtVoGqMhN"

RECORDED = (
    _chat(
        ".sse",
        'Grüße "usage": {"prompt_tokens": 7} aus 東京 🗼\n\ndata: [DONE]',
        events=10,
        finish_reason="stop",
        **_4O,
    ),
    _chat(
        "-usage.sse",
        "Hello there",
        usage=_usage(19, 10, **_DETAILS),
        events=6,
        finish_reason="length",
        **_4O,
    ),
    _chat(
        "-tools.sse",
        calls=(
            ToolCall("call_DdmO9pD3xa9XTPNJ32zg2hcA", "get_weather", '{"city":"Łódź"}'),
            ToolCall("call_2Hb7", "get_time", "{}"),
        ),
        events=8,
        finish_reason="tool_calls",
        **_4O,
    ),
    _chat("-azure.sse", "Hi", events=5, finish_reason="stop", **_4O),
    _chat(
        "-running.sse",
        "Zwölf Boxkämpfer",
        usage=_usage(5, 4),
        events=4,
        finish_reason="stop",
        model="qwen2.5",
        response_id="cmpl-7",
    ),
    _chat(
        "-error.sse",
        "Hel",
        end=FAILED,
        events=3,
        error=ProviderError(
            "server_error", "The server had an error while processing your request."
        ),
        **_4O,
    ),
    _chat("-two.sse", "ab", events=8, finish_reason="length", **_4O),
    _chat(
        "-odd.sse",
        "one two",
        usage=_usage(0, 2),
        events=3,
        finish_reason="stop",
        model="m",
        response_id="x-1",
    ),
    _chat(
        ".json",
        "Hello! How can I assist you today? 😀",
        (ToolCall("call_abc123", "f", '{\n"a": 1\n}'),),
        _usage(19, 10, cache_read_tokens=8, reasoning_tokens=4),
        events=1,
        finish_reason="stop",
        response_id=_4O["response_id"],
        model="gpt-4.1-2025-04-14",
    ),
    _openai(
        "error.json",
        b"/v1/chat/completions",
        end=FAILED,
        events=1,
        error=ProviderError("insufficient_quota", "You exceeded your current quota."),
    ),
    _openai(
        "completions.sse",
        b"/v1/completions",
        "This is a test",
        usage=_usage(5, 7),
        events=5,
        finish_reason="stop",
        **_INSTRUCT,
    ),
    _openai(
        "completions.json",
        b"/v1/completions",
        "\n\nThis is indeed a test",
        usage=_usage(5, 7),
        events=1,
        finish_reason="length",
        **_INSTRUCT,
    ),
    _openai(
        "embeddings.json",
        b"/v1/embeddings",
        usage=_usage(8),
        events=1,
        model="text-embedding-3-small",
    ),
    _responses(
        ".sse",
        'Hi there! "response": {"usage": 1} 🎉',
        usage=_usage(37, 11, **_RESPONSE),
        events=12,
        finish_reason="completed",
        **_41,
    ),
    _responses(
        "-incomplete.sse",
        "Hi",
        usage=_usage(37, 0, **_RESPONSE),
        events=6,
        finish_reason="max_output_tokens",
        **_41,
    ),
    _responses(
        "-failed.sse",
        "Hi",
        end=FAILED,
        events=6,
        finish_reason="failed",
        error=ProviderError("server_error", "The model failed to generate a response."),
        **_41,
    ),
    _responses(
        "-error.sse",
        end=FAILED,
        events=5,
        error=ProviderError("rate_limit_exceeded", "Rate limit reached"),
        **_41,
    ),
    _responses(
        "-tools.sse",
        calls=(ToolCall(_WEATHER, "get_weather", '{"city":"Paris"}'),),
        usage=_usage(37, 11, **_RESPONSE),
        events=8,
        finish_reason="completed",
        **_41,
    ),
    _responses(
        ".json",
        "Hello 🌍",
        (ToolCall(_WEATHER, "get_weather", "{}"),),
        _usage(37, 11, **_RESPONSE),
        events=1,
        finish_reason="completed",
        **_41,
    ),
    _anthropic(
        "messages.sse",
        'Okay, "type":"message_stop" für 日本🗾',
        usage=_usage(472, 89, cache_read_tokens=100, cache_write_tokens=21, reasoning_tokens=30),
        events=15,
        finish_reason="end_turn",
        **_SONNET,
    ),
    _anthropic(
        "messages-tools.sse",
        "I'll look.",
        (
            ToolCall(
                "toolu_01T1x1fJ34qAmk2tNTrN7Up6", "get_weather", '{"location": "San Francisco"}'
            ),
        ),
        _usage(472, 0, cache_read_tokens=0, cache_write_tokens=21),
        events=13,
        finish_reason="tool_use",
        **_SONNET,
    ),
    _anthropic(
        "messages-error.sse",
        "I",
        end=FAILED,
        usage=_usage(472, 2, cache_read_tokens=0, cache_write_tokens=21, provenance="partial"),
        events=4,
        error=ProviderError("overloaded_error", "Overloaded"),
        **_SONNET,
    ),
    _anthropic(
        "messages-partial.sse",
        "Half",
        end=EndReason.UNFINISHED,
        usage=_usage(472, 2, cache_read_tokens=0, cache_write_tokens=21, provenance="partial"),
        events=4,
        **_SONNET,
    ),
    _anthropic(
        "messages.json",
        "Hi! My name is Claude.",
        (ToolCall("toolu_01T1x1fJ34qAmk2tNTrN7Up6", "get_weather", '{"location":"Zürich"}'),),
        _usage(472, 503, cache_read_tokens=7, cache_write_tokens=21),
        events=1,
        finish_reason="end_turn",
        **_SONNET,
    ),
    _anthropic(
        "error.json",
        end=FAILED,
        events=1,
        error=ProviderError("not_found_error", "The requested resource could not be found."),
    ),
    _ollama(
        "chat.ndjson",
        b"/api/chat",
        'The sky "done":true är blå 🟦',
        usage=_usage(26, 282),
        events=5,
        finish_reason="stop",
        **_LLAMA,
    ),
    _ollama(
        "chat-tools.ndjson",
        b"/api/chat",
        calls=(ToolCall("call_1", "get_weather", '{"city":"Tōkyō"}'), ToolCall(None, "now", "{}")),
        usage=_usage(0, 282),
        events=4,
        finish_reason="stop",
        **_LLAMA,
    ),
    _ollama(
        "chat-error.ndjson",
        b"/api/chat",
        "The",
        end=FAILED,
        events=2,
        error=ProviderError(
            None, "an error was encountered while running the model: unexpected EOF"
        ),
        **_LLAMA,
    ),
    _ollama(
        "generate.ndjson",
        b"/api/generate",
        "The sky",
        usage=_usage(26, 282),
        events=3,
        finish_reason="stop",
        **_LLAMA,
    ),
    _ollama(
        "chat.json",
        b"/api/chat",
        "Hello! How are you today?",
        usage=_usage(None, 282),
        events=1,
        finish_reason="stop",
        **_LLAMA,
    ),
    _ollama(
        "generate.json",
        b"/api/generate",
        "Hi",
        usage=_usage(26, 282),
        events=1,
        finish_reason="stop",
        **_LLAMA,
    ),
    _ollama("embed.json", b"/api/embed", usage=_usage(8), events=1, model="all-minilm"),
    _ollama(
        "error.json",
        b"/api/chat",
        end=FAILED,
        events=1,
        error=ProviderError(None, 'model "llama9" not found, try pulling it first'),
    ),
)
"""Every file, with what it holds."""

BY_FILE = {one.file: one for one in RECORDED}
