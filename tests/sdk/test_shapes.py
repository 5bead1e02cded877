"""What the demo provider writes is what the SDKs' own models say that a provider writes.

The SDKs read leniently: a member that lacks or has another type passes unseen.  Here their models
are asked strictly, on the bytes, and a member that no model knows is a finding, too.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Iterator, Mapping
from typing import Any

import anthropic.types
import ollama
import openai.types.chat
import openai.types.responses
import openai.types.shared
import pydantic
import pytest

from tests.sdk.sdks import FUNCTION, RESPONSES_TOOLS, TOOLS
from tests.support.demo_wire import ASKED, STREAM_ENDS, DemoConnection, dialect_of

WHOLES: Mapping[str, Any] = {
    "/v1/chat/completions": openai.types.chat.ChatCompletion,
    "/v1/completions": openai.types.Completion,
    "/v1/responses": openai.types.responses.Response,
    "/v1/embeddings": openai.types.CreateEmbeddingResponse,
    "/v1/messages": anthropic.types.Message,
    "/v1/messages/count_tokens": anthropic.types.MessageTokensCount,
    "/api/chat": ollama.ChatResponse,
    "/api/generate": ollama.GenerateResponse,
    "/api/embed": ollama.EmbedResponse,
    "/api/embeddings": ollama.EmbeddingsResponse,
}
EVENTS: Mapping[str, Any] = {
    "/v1/chat/completions": openai.types.chat.ChatCompletionChunk,
    "/v1/completions": openai.types.Completion,
    "/v1/responses": openai.types.responses.ResponseStreamEvent,
    "/v1/messages": anthropic.types.RawMessageStreamEvent,
    "/api/chat": ollama.ChatResponse,
    "/api/generate": ollama.GenerateResponse,
}
ERRORS: Mapping[str, Any] = {
    "openai": openai.types.shared.ErrorObject,
    "anthropic": anthropic.types.ErrorResponse,
}
WITH_USAGE = {"stream_options": {"include_usage": True}}
CASES: list[tuple[str, dict[str, Any]]] = [
    *((path, {}) for path in WHOLES),
    ("/v1/chat/completions", WITH_USAGE),
    ("/v1/chat/completions", {"tools": [FUNCTION], "tool_choice": "required"}),
    ("/v1/chat/completions", {"max_completion_tokens": 3, "reasoning_effort": "low"}),
    ("/v1/completions", {**WITH_USAGE, "max_tokens": 3}),
    ("/v1/responses", {"tools": RESPONSES_TOOLS, "tool_choice": "required"}),
    ("/v1/responses", {"max_output_tokens": 3, "reasoning": {"effort": "low"}, "temperature": 1}),
    ("/v1/responses", {"instructions": "Be brief.", "metadata": {"a": "b"}, "top_p": None}),
    ("/v1/embeddings", {"input": ["a", "b"]}),
    ("/v1/messages", {"tools": TOOLS["anthropic"], "tool_choice": {"type": "any"}}),
    ("/v1/messages", {"max_tokens": 3, "thinking": {"type": "enabled"}}),
    ("/api/chat", {"tools": [FUNCTION], "messages": [{"role": "user", "content": "a tool"}]}),
    ("/api/chat", {"options": {"num_predict": 3}}),
    ("/api/embed", {"input": ["a", "b"]}),
]

# OpenAI's published types give a chunk of completions the document's type, in which the reason is
# never null; the API itself sends null until the last chunk.
NULL_UNLIKE_ITS_TYPE = ("choices", 0, "finish_reason")
# Ollama gives its tool calls an id; the SDK has no member for it.
UNKNOWN_TO_ITS_SDK = {"message.tool_calls[0].id"}


@functools.cache
def reader(kind: Any) -> pydantic.TypeAdapter[Any]:
    """Return what reads a type of an SDK's; making that of OpenAI's events is slow."""
    return pydantic.TypeAdapter(kind)


def complaints(kind: Any, data: bytes) -> list[str]:
    """Return what an SDK's model finds wrong in JSON, strictly, and the members unknown to it."""
    try:
        model = reader(kind).validate_json(data, strict=True)
    except pydantic.ValidationError as error:
        return [
            f"{found['loc']}: {found['msg']}"
            for found in error.errors()
            if found["loc"] != NULL_UNLIKE_ITS_TYPE or found["input"] is not None
        ]
    return [path for path in unknown(model, json.loads(data)) if path not in UNKNOWN_TO_ITS_SDK]


def unknown(model: Any, data: Any, path: str = "") -> Iterator[str]:
    """Yield where a document has members that the model made of it does not know."""
    if isinstance(model, pydantic.BaseModel):
        fields = type(model).model_fields
        names = {field.alias or name: name for name, field in fields.items()}
        for key, value in data.items():
            below = f"{path}.{key}".lstrip(".")
            if key in names:
                yield from unknown(getattr(model, names[key]), value, below)
            else:
                yield below
    elif isinstance(data, list):
        for at, (one, value) in enumerate(zip(model, data, strict=True)):
            yield from unknown(one, value, f"{path}[{at}]")


def data_of(event: bytes) -> bytes:
    """Return the JSON of an SSE event or of a line."""
    lines = event.splitlines()
    line = next(line for line in lines if not line.startswith(b"event: "))
    return line.removeprefix(b"data: ")


def name_of(asked: Any) -> str:
    """Return a short name for what is asked, by its members."""
    return asked if isinstance(asked, str) else ",".join(asked)


@pytest.mark.parametrize(("path", "asked"), CASES, ids=name_of)
def test_document_is_of_its_type(path: str, asked: dict[str, Any]) -> None:
    """Every needed member is there, each has its type, and none is made up."""
    document = DemoConnection().whole(path, **asked)
    assert complaints(WHOLES[path], json.dumps(document).encode()) == []


@pytest.mark.parametrize("model", ["demo-fast", "demo-fail"])
@pytest.mark.parametrize(("path", "asked"), [c for c in CASES if c[0] in EVENTS], ids=name_of)
def test_events_are_of_their_type(path: str, asked: dict[str, Any], model: str) -> None:
    """The same holds for each event, and an SSE event's name is the type that its data says."""
    events = DemoConnection().events(path, model, **asked)
    if model == "demo-fail" and path != "/v1/responses":
        events.pop()  # an error, which has a type of its own
    for event in events:
        data = data_of(event)
        if data == b"[DONE]":
            continue
        if event.startswith(b"event: "):
            kind = json.loads(data)["type"].encode()
            assert event.startswith(b"event: %b\n" % kind)
            if kind == b"ping":  # which the SDK drops before it looks for a type
                continue
        assert complaints(EVENTS[path], data) == []


@pytest.mark.parametrize("path", [path for path in ASKED if dialect_of(path) in ERRORS])
@pytest.mark.parametrize("model", ["demo-429", "demo-500", "demo-503", "demo-fail", "no-such"])
def test_error_is_of_its_type(path: str, model: str) -> None:
    """A refusal has the published shape of errors."""
    wire = DemoConnection()
    wire.ask(path, model, stream=False)
    status, document = wire.response()
    assert status >= 400
    error = document["error"] if dialect_of(path) == "openai" else document
    assert complaints(ERRORS[dialect_of(path)], json.dumps(error).encode()) == []


@pytest.mark.parametrize("path", [path for path in STREAM_ENDS if path != "/v1/responses"])
def test_error_inside_a_stream_is_of_its_type(path: str) -> None:
    """The event that a failing stream ends with has the shape in which the SDK looks for it."""
    document = json.loads(data_of(DemoConnection().events(path, "demo-fail")[-1]))
    dialect = dialect_of(path)
    if dialect == "ollama":
        assert document.keys() == {"error"}
        assert isinstance(document["error"], str)
        return
    if dialect == "anthropic":
        document = {"request_id": None, **document}  # the stream's head has it
    error = document["error"] if dialect == "openai" else document
    assert complaints(ERRORS[dialect], json.dumps(error).encode()) == []


@pytest.mark.parametrize(
    ("kind", "document"),
    [
        (anthropic.types.MessageTokensCount, {}),
        (anthropic.types.MessageTokensCount, {"input_tokens": "1"}),
        (anthropic.types.MessageTokensCount, {"input_tokens": 1, "made_up": 1}),
        (ollama.EmbeddingsResponse, {"embedding": [1.0], "made_up": None}),
        (openai.types.Completion, {"choices": [{"finish_reason": "why"}]}),
    ],
    ids=str,
)
def test_what_is_not_of_its_type_is_found(kind: Any, document: dict[str, Any]) -> None:
    """A member that lacks, has another type or is made up makes a finding."""
    assert complaints(kind, json.dumps(document).encode())
