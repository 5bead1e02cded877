"""What each endpoint of the demo provider says and counts, and how it fails, on a clock."""

from __future__ import annotations

import base64
import json
import math
import struct
from typing import Any

import pytest

from tests.support.demo_wire import (
    ANTHROPIC_TOOL,
    ARGUMENTS,
    ASKED,
    FUNCTION,
    SAID,
    SCHEMA,
    STREAM_ENDS,
    DemoConnection,
    dialect_of,
)

WHOLE_ONLY = [path for path in ASKED if path not in STREAM_ENDS]
LONG_TALK: Any = [
    {"role": "user", "content": "one two"},
    {"role": "assistant", "content": "three four five"},
    {"role": "user", "content": SAID},
]
RESPONSES_TOOL: Any = {"type": "function", "name": "weather", "parameters": SCHEMA}
TEXT = f"You said: {SAID}. "
FAILURE = "gave up in the middle"


def data_of(event: bytes) -> Any:
    """Return the JSON of an SSE event or of a line."""
    line = next(line for line in event.splitlines() if not line.startswith(b"event: "))
    return json.loads(line.removeprefix(b"data: "))


def message_of(document: Any) -> str:
    """Return the words of an error, in whichever shape."""
    error = document["error"]
    return str(error if isinstance(error, str) else error["message"])


# --- chats ---------------------------------------------------------------------------------------


def test_chat_calls_a_tool_in_pieces() -> None:
    """Id and name come first and the arguments in pieces; the whole response has the same call."""
    path = "/v1/chat/completions"
    asked: Any = {"tools": [FUNCTION], "tool_choice": "required"}
    (whole,) = DemoConnection().whole(path, **asked)["choices"]
    (call,) = whole["message"]["tool_calls"]
    assert whole["message"]["content"] is None
    assert call["function"]["name"] == "weather"
    assert json.loads(call["function"]["arguments"]) == ARGUMENTS

    chunks = [data_of(event)["choices"][0] for event in DemoConnection().events(path, **asked)[:-1]]
    first, *rest = [chunk["delta"]["tool_calls"][0] for chunk in chunks[:-1]]
    assert (chunks[0]["delta"]["role"], bool(first["id"])) == ("assistant", True)
    assert first["function"] == {"name": "weather", "arguments": ""}
    assert len(rest) > 1
    assert {(*piece, *piece["function"]) for piece in rest} == {("index", "function", "arguments")}
    pieces = [piece["function"]["arguments"] for piece in rest]
    assert "".join(pieces) == call["function"]["arguments"]
    assert chunks[-1]["finish_reason"] == whole["finish_reason"] == "tool_calls"


def test_message_has_its_events_in_the_published_order() -> None:
    """The text stands in blocks, and text, reason and counts are those of the whole response."""
    blocks = [{"type": "text", "text": SAID}]
    asked: Any = {"system": "Be brief.", "messages": [{"role": "user", "content": blocks}]}
    whole = DemoConnection().whole("/v1/messages", **asked)
    events = [data_of(event) for event in DemoConnection().events("/v1/messages", **asked)]
    kinds = [event["type"] for event in events if event["type"] != "ping"]
    deltas = [event["delta"]["text"] for event in events if event["type"] == "content_block_delta"]
    assert kinds == [
        *("message_start", "content_block_start"),
        *["content_block_delta"] * len(deltas),
        *("content_block_stop", "message_delta", "message_stop"),
    ]
    assert "".join(deltas) == whole["content"][0]["text"]
    assert whole["content"][0]["text"].startswith(TEXT)
    assert events[-2]["delta"]["stop_reason"] == whole["stop_reason"] == "end_turn"
    assert events[-2]["usage"]["output_tokens"] == whole["usage"]["output_tokens"] == len(deltas)
    assert events[0]["message"]["usage"]["input_tokens"] == whole["usage"]["input_tokens"] == 6


def test_message_calls_a_tool_in_pieces() -> None:
    """The tool's input comes as JSON in pieces; the whole response has the same call, decoded."""
    asked: Any = {"tools": [ANTHROPIC_TOOL], "tool_choice": {"type": "any"}}
    whole = DemoConnection().whole("/v1/messages", **asked)
    (block,) = whole["content"]
    assert (block["type"], block["name"], block["input"]) == ("tool_use", "weather", ARGUMENTS)
    events = [data_of(event) for event in DemoConnection().events("/v1/messages", **asked)]
    deltas = [event["delta"] for event in events if event["type"] == "content_block_delta"]
    pieces = [delta["partial_json"] for delta in deltas if delta["partial_json"]]
    assert len(pieces) > 1
    assert json.loads("".join(pieces)) == ARGUMENTS
    assert events[-2]["delta"]["stop_reason"] == whole["stop_reason"] == "tool_use"
    assert events[-2]["usage"]["output_tokens"] == whole["usage"]["output_tokens"]


# --- completions ---------------------------------------------------------------------------------


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions"])
def test_completion_is_the_same_in_chunks(path: str) -> None:
    """Chunks have one id, a reason in the last one alone, and the document's text together."""

    def text_of(choice: Any) -> str:
        said = choice.get("delta") or choice.get("message") or choice
        return str(said.get("content") or said.get("text") or "")

    (document,) = DemoConnection().whole(path)["choices"]
    chunks = [data_of(event) for event in DemoConnection().events(path)[:-1]]
    choices = [chunk["choices"][0] for chunk in chunks]
    assert text_of(document).startswith(TEXT)
    assert "".join(map(text_of, choices)) == text_of(document)
    assert document["finish_reason"] == "stop"
    assert [one["finish_reason"] for one in choices] == [None] * (len(chunks) - 1) + ["stop"]
    assert len({chunk["id"] for chunk in chunks}) == 1


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions"])
def test_usage_comes_in_one_more_chunk_where_it_is_asked_for(path: str) -> None:
    """Every chunk has the member then, and the last one has it and no choice; else none has it."""
    asked: Any = {"stream_options": {"include_usage": True}}
    *chunks, last = map(data_of, DemoConnection().events(path, **asked)[:-1])
    assert {chunk["usage"] for chunk in chunks} == {None}
    assert last["choices"] == []
    assert last["usage"] == DemoConnection().whole(path)["usage"]
    assert not [event for event in DemoConnection().events(path) if b'"usage"' in event]


@pytest.mark.parametrize(
    ("prompt", "tokens"),
    [("a b", 2), (["a", "b c"], 3), ([7, 8, 9, 10], 4), ([[7, 8], [9]], 3), ("", 0)],
    ids=str,
)
def test_prompt_of_any_shape_is_counted(prompt: object, tokens: int) -> None:
    """One text or several, as words or as numbers of tokens."""
    document = DemoConnection().whole("/v1/completions", prompt=prompt)
    assert document["usage"]["prompt_tokens"] == tokens


# --- responses -----------------------------------------------------------------------------------


def test_response_has_its_events_in_the_published_order() -> None:
    """Events nest as item, part and deltas, are numbered, and end with the whole response."""
    events = [data_of(event) for event in DemoConnection().events("/v1/responses")]
    kinds = [event["type"].removeprefix("response.") for event in events]
    deltas = kinds.count("output_text.delta")
    assert kinds == [
        *("created", "in_progress", "output_item.added", "content_part.added"),
        *["output_text.delta"] * deltas,
        *("output_text.done", "content_part.done", "output_item.done", "completed"),
    ]
    assert [event["sequence_number"] for event in events] == list(range(len(events)))
    final = events[-1]["response"]
    (item,) = final["output"]
    text = item["content"][0]["text"]
    assert text.startswith(TEXT)
    assert "".join(e["delta"] for e in events if e["type"].endswith("text.delta")) == text
    assert {e["item_id"] for e in events if "item_id" in e} == {item["id"]}
    assert final["id"] == events[0]["response"]["id"]
    assert events[0]["response"]["output"] == []


def test_response_calls_a_function() -> None:
    """Arguments come in pieces, and the done event and the item have them whole."""
    asked: Any = {"tools": [RESPONSES_TOOL], "tool_choice": "required"}
    events = [data_of(event) for event in DemoConnection().events("/v1/responses", **asked)]
    kinds = [event["type"].removeprefix("response.") for event in events]
    deltas = kinds.count("function_call_arguments.delta")
    assert deltas > 1
    assert kinds[2:-2] == [
        "output_item.added",
        *["function_call_arguments.delta"] * deltas,
        "function_call_arguments.done",
    ]
    (item,) = events[-1]["response"]["output"]
    arguments = "".join(event["delta"] for event in events if "delta" in event)
    assert json.loads(arguments) == ARGUMENTS
    assert item["arguments"] == events[-3]["arguments"] == arguments
    assert events[2]["item"] == {**item, "status": "in_progress", "arguments": ""}
    (whole,) = DemoConnection().whole("/v1/responses", **asked)["output"]
    assert (whole["name"], whole["arguments"]) == ("weather", arguments)


def test_response_that_was_cut_is_incomplete() -> None:
    """A limit of tokens ends it with another event, which says why."""
    last = data_of(DemoConnection().events("/v1/responses", max_output_tokens=3)[-1])
    whole = DemoConnection().whole("/v1/responses", max_output_tokens=3)
    assert last["type"] == "response.incomplete"
    for response in (last["response"], whole):
        assert response["status"] == "incomplete"
        assert response["incomplete_details"] == {"reason": "max_output_tokens"}
        assert response["output"][0]["content"][0]["text"] == "You said: the"
        assert response["usage"]["output_tokens"] == 3


def test_response_repeats_what_was_asked() -> None:
    """Instructions, tools and the like come back, filled in where they were left out."""
    asked: Any = {"instructions": "Be brief.", "tools": [RESPONSES_TOOL], "metadata": {"a": "b"}}
    document = DemoConnection().whole("/v1/responses", input=SAID, **asked)
    assert document["instructions"] == "Be brief."
    assert document["metadata"] == {"a": "b"}
    assert document["tools"] == [{**RESPONSES_TOOL, "description": None, "strict": True}]
    assert document["tool_choice"] == "auto"
    assert document["usage"]["input_tokens"] == 6


def test_output_of_a_function_is_followed_by_a_text() -> None:
    """Items that are no messages are passed over for what the user had said."""
    items = [
        {"role": "user", "content": [{"type": "input_text", "text": "use the tool"}]},
        {"type": "function_call", "call_id": "c", "name": "weather", "arguments": "{}"},
        {"type": "function_call_output", "call_id": "c", "output": "4 degrees"},
    ]
    document = DemoConnection().whole("/v1/responses", input=items, tools=[RESPONSES_TOOL])
    assert document["output"][0]["content"][0]["text"].startswith("You said: use the tool. ")


# --- embeddings ----------------------------------------------------------------------------------


def test_embedding_is_of_the_text_alone() -> None:
    """Each text has one vector of length 1, at every endpoint and beside any other texts."""
    document = DemoConnection().whole("/v1/embeddings", input=["a", "b c", "a"])
    first, other, again = (entry["embedding"] for entry in document["data"])
    assert first == again != other
    assert math.hypot(*first) == pytest.approx(1)
    assert [entry["index"] for entry in document["data"]] == [0, 1, 2]
    assert document["usage"] == {"prompt_tokens": 4, "total_tokens": 4}
    ollama = DemoConnection().whole("/api/embed", input=["a", "b c"])
    assert ollama["embeddings"] == [first, other]
    assert ollama["prompt_eval_count"] == 3
    assert DemoConnection().whole("/api/embeddings", prompt="a") == {"embedding": first}


def test_embedding_as_base64_has_the_same_numbers() -> None:
    """SDKs ask for the numbers as little-endian 32-bit floats, with the same bits."""
    asked: Any = {"input": SAID, "dimensions": 3}
    (plain,) = DemoConnection().whole("/v1/embeddings", **asked)["data"]
    (packed,) = DemoConnection().whole("/v1/embeddings", encoding_format="base64", **asked)["data"]
    assert list(struct.unpack("<3f", base64.b64decode(packed["embedding"]))) == plain["embedding"]


@pytest.mark.parametrize("path", ["/v1/embeddings", "/api/embed"])
def test_each_text_takes_the_time_of_a_token(path: str) -> None:
    """A paced model embeds so many texts a second."""
    wire = DemoConnection()
    wire.ask(path, "demo-4tps", input=["a", "b", "c"])
    wire.taken()
    assert wire.turn(0.7) == b""
    assert wire.turn(0.05).endswith(b"}")


# --- counts --------------------------------------------------------------------------------------


def test_openai_counts_cached_and_reasoning_tokens_in_its_totals() -> None:
    """All but the first and last message is written, the first is read, reasoning is output."""
    talk: Any = {"messages": LONG_TALK, "reasoning_effort": "low"}
    usage = DemoConnection().whole("/v1/chat/completions", **talk)["usage"]
    assert usage["prompt_tokens"] == 9
    assert usage["prompt_tokens_details"]["cached_tokens"] == 2
    assert usage["prompt_tokens_details"]["cache_write_tokens"] == 3
    assert usage["completion_tokens_details"]["reasoning_tokens"] == 4
    calm = DemoConnection().whole("/v1/chat/completions", messages=LONG_TALK)["usage"]
    assert usage["completion_tokens"] == calm["completion_tokens"] + 4
    assert usage["total_tokens"] == 9 + usage["completion_tokens"]


def test_responses_count_the_same_under_their_own_names() -> None:
    """The same talk has the same counts as a chat completion."""
    chat = DemoConnection().whole(
        "/v1/chat/completions", messages=LONG_TALK, reasoning_effort="high"
    )
    asked: Any = {"input": LONG_TALK, "reasoning": {"effort": "high"}}
    usage = DemoConnection().whole("/v1/responses", **asked)["usage"]
    assert usage == {
        "input_tokens": 9,
        "input_tokens_details": {"cached_tokens": 2, "cache_write_tokens": 3},
        "output_tokens": chat["usage"]["completion_tokens"],
        "output_tokens_details": {"reasoning_tokens": 16},
        "total_tokens": chat["usage"]["total_tokens"],
    }
    assert (
        usage == data_of(DemoConnection().events("/v1/responses", **asked)[-1])["response"]["usage"]
    )


def test_anthropic_counts_cached_tokens_apart() -> None:
    """Where a block asks for it, cached tokens are not among the input tokens, at both ends."""
    marked = [{"type": "text", "text": "a b c d e", "cache_control": {"type": "ephemeral"}}]
    asked: Any = {"system": marked, "messages": LONG_TALK}
    events = [data_of(event) for event in DemoConnection().events("/v1/messages", **asked)]
    expected = {
        "input_tokens": 4,
        "cache_read_input_tokens": 5,
        "cache_creation_input_tokens": 5,
    }
    assert expected.items() <= events[0]["message"]["usage"].items()
    assert expected.items() <= events[-2]["usage"].items()
    assert events[0]["message"]["usage"]["output_tokens"] == 1
    counted = DemoConnection().whole("/v1/messages/count_tokens", **asked)
    assert counted == {"input_tokens": 14}


def test_anthropic_counts_no_cache_unasked() -> None:
    """Without the mark nothing is cached, and the counts say 0."""
    usage = DemoConnection().whole("/v1/messages", messages=LONG_TALK)["usage"]
    assert usage["input_tokens"] == 9
    assert usage["cache_read_input_tokens"] == usage["cache_creation_input_tokens"] == 0
    assert "output_tokens_details" not in usage


def test_anthropic_counts_thinking_as_output() -> None:
    """Thinking tokens are among the output tokens, and stand apart beside them."""
    calm = DemoConnection().whole("/v1/messages")["usage"]["output_tokens"]
    thinking = {"type": "enabled", "budget_tokens": 1024}
    usage = DemoConnection().whole("/v1/messages", thinking=thinking)["usage"]
    assert usage["output_tokens_details"] == {"thinking_tokens": 8}
    assert usage["output_tokens"] == calm + 8


def test_counting_takes_no_time() -> None:
    """A slow model counts at once, as nothing is made."""
    assert DemoConnection().whole("/v1/messages/count_tokens", "demo-slow") == {"input_tokens": 6}


def test_reasoning_takes_its_time_before_the_first_token() -> None:
    """A paced model is silent while it reasons."""
    wire = DemoConnection()
    wire.ask("/v1/responses", "demo-4tps", reasoning={"effort": "minimal"})
    begun = wire.turn(turns=10)
    assert begun.count(b"event: ") == 4
    assert wire.turn(0.7) == b""
    assert b'"delta":"You"' in wire.turn(0.05)
    assert b'"delta":" said:"' in wire.turn(0.25)


def test_generation_ends_with_counts_and_context() -> None:
    """The last line has what the whole response has, and no other line has any of it."""
    asked: Any = {"prompt": SAID, "system": "Be brief."}
    *lines, last = map(data_of, DemoConnection().events("/api/generate", **asked))
    whole = DemoConnection().whole("/api/generate", **asked)
    assert "".join(line["response"] for line in lines) == whole["response"]
    assert whole["response"].startswith(TEXT)
    assert last | {"response": "", "created_at": ""} == whole | {"response": "", "created_at": ""}
    assert (last["prompt_eval_count"], last["eval_count"]) == (6, len(lines))
    assert last["total_duration"] > last["eval_duration"] > 0
    assert len(last["context"]) == 6 + len(lines)
    assert {key for line in lines for key in line} == {"model", "created_at", "response", "done"}


# --- failures ------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", STREAM_ENDS)
def test_failing_stream_carries_the_error_of_the_dialect(path: str) -> None:
    """After three tokens comes one error event, and then the response ends as if it were whole."""
    *events, last = DemoConnection().events(path, "demo-fail")
    assert b" the" in events[-1]
    assert b"quick" not in b"".join(events)
    assert STREAM_ENDS[path] not in b"".join([*events, last])
    document = data_of(last)
    if path == "/v1/responses":
        assert last.startswith(b"event: response.failed\n")
        assert document["response"]["status"] == "failed"
        assert document["sequence_number"] == len(events)
        document = document["response"]
    elif dialect_of(path) == "anthropic":
        assert last.startswith(b"event: error\n")
        assert document["type"] == "error"
    assert FAILURE in message_of(document)


def test_failing_tool_call_of_ollama_is_not_begun() -> None:
    """A call comes in one line or not at all."""
    asked: Any = {"tools": [FUNCTION], "messages": [{"role": "user", "content": "the tool"}]}
    (line,) = DemoConnection().events("/api/chat", "demo-fail", **asked)
    assert FAILURE in message_of(data_of(line))


@pytest.mark.parametrize("path", ASKED)
def test_failing_whole_response_is_a_500(path: str) -> None:
    """Where no stream is asked for, or none can be, the same error is a status."""
    wire = DemoConnection()
    wire.ask(path, "demo-fail", stream=False)
    status, document = wire.response()
    assert status == 500
    assert FAILURE in message_of(document)


@pytest.mark.parametrize("path", STREAM_ENDS)
def test_unfinished_stream_ends_well_without_its_end_marker(path: str) -> None:
    """The framing is whole, and what is in it stops after three tokens."""
    events = DemoConnection().events(path, "demo-unfinished")
    assert b" the" in events[-1]
    assert STREAM_ENDS[path] not in b"".join(events)


@pytest.mark.parametrize("path", ASKED)
def test_unfinished_whole_response_is_half_a_document(path: str) -> None:
    """The framing promises nothing that does not come, and what came is no JSON."""
    wire = DemoConnection()
    wire.ask(path, "demo-unfinished", stream=False)
    written = wire.turn(turns=3)
    assert b"content-length" not in written.lower()
    assert written.endswith(b"\r\n0\r\n\r\n")
    assert written.count(b"{") > written.count(b"}")


@pytest.mark.parametrize("path", ASKED)
@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
@pytest.mark.parametrize(
    ("model", "status", "code", "kind", "words"),
    [
        ("demo-429", 429, "rate_limit_exceeded", "rate_limit_error", "Rate limit reached"),
        ("demo-500", 500, None, "api_error", "had an error"),
        ("demo-503", 503, "service_unavailable", "overloaded_error", "overloaded"),
        ("gpt", 404, "model_not_found", "not_found_error", "gpt"),
    ],
)
def test_refusal_is_a_status_at_every_endpoint(
    path: str, model: str, status: int, code: str | None, kind: str, words: str, stream: bool
) -> None:
    """A model refuses wherever it is asked, in the shape and with the codes of the dialect."""
    wire = DemoConnection()
    wire.ask(path, model, stream=stream)
    got, document = wire.response()
    assert got == status
    assert words in message_of(document)
    if dialect_of(path) == "ollama":
        assert document.keys() == {"error"}
    elif dialect_of(path) == "openai":
        assert document.keys() == {"error"}
        assert document["error"]["code"] == code
    else:
        assert (document["type"], document["error"]["type"]) == ("error", kind)


@pytest.mark.parametrize("path", WHOLE_ONLY)
def test_an_endpoint_that_cannot_stream_responds_in_one_piece(path: str) -> None:
    """Asked for a stream, such an endpoint sends its document all the same."""
    wire = DemoConnection()
    wire.ask(path, "demo-fast", stream=True)
    wire.clock.advance(0)
    status, document = wire.response()
    assert (status, document) == (200, DemoConnection().whole(path))


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/completions", {}),
        ("/v1/completions", {"prompt": []}),
        ("/v1/completions", {"prompt": 7}),
        ("/v1/completions", {"prompt": ["a", 1]}),
        ("/v1/completions", {"prompt": [[True]]}),
        ("/v1/completions", {"prompt": "a", "max_tokens": 0}),
        ("/v1/responses", {"input": 7}),
        ("/v1/responses", {"input": ["a"]}),
        ("/v1/responses", {"input": "a", "tools": 7}),
        ("/v1/responses", {"input": "a", "tool_choice": {"name": "nobody"}}),
        ("/v1/embeddings", {}),
        ("/v1/embeddings", {"input": [None]}),
        ("/v1/embeddings", {"input": "a", "dimensions": "8"}),
        ("/v1/embeddings", {"input": "a", "dimensions": 100_000}),
        ("/v1/messages/count_tokens", {"messages": []}),
        ("/api/embed", {"input": {}}),
    ],
)
def test_a_request_that_cannot_be_read_is_a_400(path: str, body: dict[str, Any]) -> None:
    """A missing or misshapen field is refused, as is a model that is not named."""
    for asked in ({"model": "demo-fast", **body}, {**ASKED[path], "model": 7}):
        wire = DemoConnection()
        wire.post(path, json.dumps(asked).encode())
        assert wire.response()[0] == 400


def test_every_stream_ends_with_its_marker() -> None:
    """The table of end markers is right: each stands in the last event and in no other."""
    for path, end in STREAM_ENDS.items():
        *events, last = DemoConnection().events(path)
        assert end in last
        assert end not in b"".join(events)


# --- Gemini ---------------------------------------------------------------------------------------

CONTENTS: Any = {"contents": [{"role": "user", "parts": [{"text": SAID}]}]}
CONTENT = "/v1beta/models/{}:{}"


def contents(verb: str, model: str = "demo-fast", **more: Any) -> tuple[bytes, DemoConnection]:
    """Ask Gemini's API; return all that was written, and the connection."""
    wire = DemoConnection()
    wire.post(CONTENT.format(model, verb), json.dumps({**CONTENTS, **more}).encode())
    return wire.turn(turns=80), wire


def body_of(written: bytes) -> bytes:
    """Return the body of a whole response, chunked or not."""
    head, body = written.split(b"\r\n\r\n", 1)
    if b"transfer-encoding" not in head.lower():
        return body
    whole = b""
    while body:
        size, body = body.split(b"\r\n", 1)
        whole, body = whole + body[: int(size, 16)], body[int(size, 16) + 2 :]
    return whole


def test_content_of_gemini_in_three_ways() -> None:
    """The document, the events and the items of the array say the same, and count the same."""
    document = json.loads(body_of(contents("generateContent")[0]))
    events = body_of(contents("streamGenerateContent?alt=sse")[0]).decode().split("\n\n")
    sse = [json.loads(event.removeprefix("data: ")) for event in events if event]
    array = json.loads(body_of(contents("streamGenerateContent")[0]))
    for chunks in ([document], sse, array):
        parts = [part for one in chunks for part in one["candidates"][0]["content"]["parts"]]
        assert "".join(part["text"] for part in parts).startswith(f"You said: {SAID}.")
        assert chunks[-1]["usageMetadata"] == document["usageMetadata"]
        reasons = [one["candidates"][0].get("finishReason") for one in chunks]
        assert reasons == [None] * (len(chunks) - 1) + ["STOP"]
    assert document["usageMetadata"]["promptTokenCount"] == len(SAID.split())


def test_functions_limits_and_counts_of_gemini() -> None:
    """A function is called, a text is cut, and words are counted, where that is asked for."""
    tools = [{"functionDeclarations": [{"name": "weather", "parameters": SCHEMA}]}]
    asked: Any = {"contents": [{"parts": [{"text": "Please use the tool"}]}], "tools": tools}
    document = json.loads(body_of(contents("generateContent", **asked)[0]))
    (part,) = document["candidates"][0]["content"]["parts"]
    assert part == {"functionCall": {"name": "weather", "args": ARGUMENTS}}
    cut = json.loads(
        body_of(contents("generateContent", generationConfig={"maxOutputTokens": 2})[0])
    )
    assert cut["candidates"][0]["finishReason"] == "MAX_TOKENS"
    assert cut["usageMetadata"]["candidatesTokenCount"] == 2
    assert json.loads(body_of(contents("countTokens")[0])) == {"totalTokens": len(SAID.split())}


@pytest.mark.parametrize(
    ("model", "status", "word"),
    [
        ("no-such-model", 404, "NOT_FOUND"),
        ("demo-429", 429, "RESOURCE_EXHAUSTED"),
        ("demo-503", 503, "UNAVAILABLE"),
        ("demo-fail", 500, "INTERNAL"),
    ],
)
def test_refusals_of_gemini(model: str, status: int, word: str) -> None:
    """They have Google's shape; a stream that fails ends with such an error."""
    written, _ = contents("generateContent", model)
    assert written.startswith(b"HTTP/1.1 %d " % status)
    error = json.loads(body_of(written))["error"]
    assert (error["code"], error["status"]) == (status, word)
    if model == "demo-fail":
        events = body_of(contents("streamGenerateContent?alt=sse", model)[0]).split(b"\n\n")
        assert json.loads(events[-2].removeprefix(b"data: "))["error"]["status"] == word


def test_models_of_gemini() -> None:
    """The list has each model, and each can be read by its name."""
    wire = DemoConnection()
    wire.get("/v1beta/models")
    _, listed = wire.response()
    wire.get("/v1beta/models/demo-fast")
    assert wire.response() == (200, listed["models"][0])
    assert listed["models"][0]["name"] == "models/demo-fast"
