"""Recorded streams of the providers: each is read the same, split at any point."""

from __future__ import annotations

import gzip
import json
import re
import zlib
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import anthropic.types
import ollama
import openai.types
import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec import structs
from openai.types.chat import ChatCompletion, ChatCompletionChunk
from openai.types.responses import Response, ResponseStreamEvent
from pydantic import TypeAdapter

from llmproxy.cli.demo.anthropic import Messages
from llmproxy.cli.demo.chat import ChatCompletions
from llmproxy.cli.demo.completions import Completions
from llmproxy.cli.demo.dialect import Streamed
from llmproxy.cli.demo.gemini import Generate as GenerateContent
from llmproxy.cli.demo.ollama import Chat, Generate
from llmproxy.cli.demo.openai_responses import Responses
from llmproxy.cli.demo.response import Asked, Tool, response
from llmproxy.dialects.dialect import Dialect
from llmproxy.errors import EndReason
from llmproxy.stream.events import ServerSentEvents
from tests.stream.splits import drawn_split, every_split
from tests.support.golden import BY_FILE, GOLDEN, RECORDED, GoldenStream

every_one = pytest.mark.parametrize("one", RECORDED, ids=lambda one: one.file)


@every_one
def test_a_recording_is_read(one: GoldenStream) -> None:
    """The result is the expected one; without capture, all but the content is the same."""
    assert one.read([one.data]) == one.result
    assert one.read([one.data], "usage") == one.without_content


@every_one
@pytest.mark.parametrize("capture", ["usage", "content"])
def test_a_recording_may_be_split_at_any_point(one: GoldenStream, capture: Any) -> None:
    """The result is the same for all halves, and byte by byte."""
    expected = one.result if capture == "content" else one.without_content
    for chunks in every_split(one.data):
        assert one.read(chunks, capture) == expected


@every_one
def test_a_compressed_recording_may_be_split_at_any_point(one: GoldenStream) -> None:
    """The gzip copy has two members."""
    half = len(one.data) // 2
    packed = gzip.compress(one.data[:half]) + gzip.compress(one.data[half:])
    for chunks in every_split(packed):
        assert one.read(chunks, "usage", content_encoding=b"gzip") == one.without_content
    assert one.read([packed], content_encoding=b"gzip") == one.result


@every_one
def test_a_recording_is_read_line_by_line_through_deflate(one: GoldenStream) -> None:
    """A server may flush its compressor after each line."""
    packer = zlib.compressobj()
    tap = one.tap(content_encoding=b"deflate")
    for piece in one.data.splitlines(keepends=True):
        tap.feed(packer.compress(piece) + packer.flush(zlib.Z_SYNC_FLUSH))
    tap.feed(packer.flush())
    assert tap.finish(EndReason.COMPLETE) == one.result


@given(st.data())
def test_a_recording_may_be_split_many_times(data: st.DataObject) -> None:
    """The result does not depend on the chunks."""
    one = data.draw(st.sampled_from(RECORDED))
    chunks = drawn_split(data, one.data)
    assert one.read(chunks) == one.result
    assert one.read(chunks, "usage") == one.without_content


def test_every_file_is_read() -> None:
    """The table has every recorded file."""
    assert {path.name for path in GOLDEN.iterdir()} == set(BY_FILE)


# --- the recordings are what the providers send ---------------------------------------------------


def events(one: GoldenStream) -> list[Any]:
    """Return the decoded events of a recorded stream; this reader is not the tap's."""
    lines = one.data.decode().splitlines()
    data = [line.removeprefix("data: ") for line in lines if line.startswith(("data: ", "{"))]
    return [json.loads(line) for line in data if line != "[DONE]"]


_CHUNK = ChatCompletionChunk.model_validate
_RESPONSE = TypeAdapter[Any](ResponseStreamEvent).validate_python
_MESSAGE = TypeAdapter[Any](anthropic.types.RawMessageStreamEvent).validate_python
_OLLAMA = ollama.ChatResponse.model_validate

SDK: dict[str, Callable[[Any], object]] = {
    **{f"openai-chat{name}.sse": _CHUNK for name in ("", "-usage", "-tools", "-two")},
    **{
        f"openai-responses{name}.sse": _RESPONSE
        for name in ("", "-incomplete", "-failed", "-error", "-tools")
    },
    **{f"anthropic-messages{name}.sse": _MESSAGE for name in ("", "-tools", "-partial")},
    "ollama-chat.ndjson": _OLLAMA,
    "ollama-chat-tools.ndjson": _OLLAMA,
    "ollama-generate.ndjson": ollama.GenerateResponse.model_validate,
}


@pytest.mark.parametrize("file", SDK)
def test_the_providers_own_sdk_accepts_the_recording(file: str) -> None:
    """Each event but ``ping``, which the SDK drops, has the shape of the provider's SDK."""
    found = [one for one in events(BY_FILE[file]) if one.get("type") != "ping"]
    assert found
    for event in found:
        SDK[file](event)


@pytest.mark.parametrize(
    ("file", "type_"),
    [
        ("openai-chat.json", ChatCompletion),
        ("openai-completions.json", openai.types.Completion),
        ("openai-embeddings.json", openai.types.CreateEmbeddingResponse),
        ("openai-responses.json", Response),
        ("anthropic-messages.json", anthropic.types.Message),
        ("ollama-chat.json", ollama.ChatResponse),
        ("ollama-generate.json", ollama.GenerateResponse),
        ("ollama-embed.json", ollama.EmbedResponse),
    ],
)
def test_the_providers_own_sdk_accepts_the_document(file: str, type_: Any) -> None:
    """Each document has the shape of the provider's SDK."""
    type_.model_validate_json(BY_FILE[file].data)


# --- the demo provider ----------------------------------------------------------------------------

ASK = Asked(model="demo-fast", stream=True, prompt=("a b c",), said="a tool", user_last=True)
TOOL = Tool("look", {"properties": {"what": {"type": "string"}}})


DEMO: list[tuple[Streamed, str]] = [
    (ChatCompletions(), "openai-chat.sse"),
    (Completions(), "openai-completions.sse"),
    (Responses(), "openai-responses.sse"),
    (Messages(), "anthropic-messages.sse"),
    (Chat(), "ollama-chat.ndjson"),
    (Generate(), "ollama-generate.ndjson"),
    (GenerateContent(), "gemini-generate.sse"),
]
TOOLLESS = (Completions, Generate)


@pytest.mark.parametrize(
    ("demo", "recorded", "tools"),
    [
        pytest.param(demo, BY_FILE[file], tools, id=f"{type(demo).__name__}-{len(tools)}")
        for demo, file in DEMO
        for tools in ((), (TOOL,))
        if not (tools and isinstance(demo, TOOLLESS))
    ],
)
def test_the_demo_provider_is_read(
    demo: Streamed, recorded: GoldenStream, tools: tuple[Tool, ...]
) -> None:
    """Usage, text and tool calls of its streams and documents are the demo's own."""
    ask = replace(ASK, tools=tools, include_usage=recorded.dialect is Dialect.OPENAI)
    said = response(ask)
    stream = [event.data for event in demo.events(said, ask, lambda: 0.0)]
    document = json.dumps(demo.document(said, ask, lambda: 0.0)).encode()
    for result in (
        recorded.read(stream),
        recorded.read([b"".join(stream)]),
        recorded.read([document], content_type=b"application/json"),
    ):
        assert result.is_complete
        assert not result.degraded
        assert result.model == "demo-fast"
        assert result.usage.provenance == "reported"
        assert (result.usage.input_tokens, result.usage.output_tokens) == (3, len(said.tokens))
        if tools:
            (call,) = result.tool_calls
            assert (call.name, json.loads(call.arguments)) == ("look", {"what": "demo"})
        else:
            assert result.text == said.text


# --- skipped events -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "file", [f for f in BY_FILE if re.match(r".*(responses|messages).*sse", f)]
)
def test_skipped_events_have_only_content(file: str) -> None:
    """Decoding them, too, does not change the result for ``capture = "usage"``."""
    one = BY_FILE[file]
    tap = one.tap("usage")
    plain = one.tap("usage", row=structs.replace(one.row, text_only=frozenset()))
    framing = ServerSentEvents(1024**2, lambda: None)
    passed = [name for name, _ in framing.feed(one.data) if name in one.row.text_only]
    assert passed
    for each in (tap, plain):
        each.feed(one.data)
    assert tap.finish(EndReason.COMPLETE) == plain.finish(EndReason.COMPLETE)
