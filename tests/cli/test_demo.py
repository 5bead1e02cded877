"""The demo provider on a clock: its pace, its endings, and what it refuses, byte by byte.

What real SDKs make of it stands in ``tests/sdk``.
"""

from __future__ import annotations

import hashlib
import json
import re
import shlex
import tomllib
from typing import Any, cast

import pytest
from twisted.internet.interfaces import IReactorTime
from twisted.internet.task import Clock

from llmproxy.cli.demo import curl_lines, demo_config, demo_site
from llmproxy.cli.demo.response import MODELS
from llmproxy.cli.main import main
from tests.support.daemon import ROOT
from tests.support.demo_wire import (
    ANTHROPIC_TOOL,
    FUNCTION,
    STREAM_ENDS,
    TOOL_MESSAGES,
    DemoConnection,
    dialect_of,
)

CHATS = ["/v1/chat/completions", "/v1/messages", "/api/chat"]


def shape(document: dict[str, Any]) -> str:
    """Return whose error this is."""
    if isinstance(document["error"], str):
        return "ollama"
    if "status" in document["error"]:
        return "gemini"
    return "anthropic" if document.get("type") == "error" else "openai"


@pytest.mark.parametrize("path", STREAM_ENDS)
def test_head_leaves_at_once(path: str) -> None:
    """The head is written before the first token's time has come."""
    wire = DemoConnection()
    wire.ask(path, "demo-slow")
    written = wire.taken()
    assert written.startswith(b"HTTP/1.1 200 OK\r\n")
    assert written.endswith(b"\r\n\r\n")
    assert b"transfer-encoding: chunked" in written.lower()


@pytest.mark.parametrize("path", STREAM_ENDS)
def test_each_event_is_one_write(path: str) -> None:
    """Every turn writes one whole event, in one chunk of its own."""
    wire = DemoConnection()
    wire.ask(path, "demo-fast")
    wire.taken()
    turns = [turn for turn in iter(wire.turn, b"") if turn]
    sizes = [turn.split(b"\r\n", 1) for turn in turns]
    assert turns.pop() == b"0\r\n\r\n"
    for size, rest in sizes[:-1]:
        assert len(rest) == int(size, 16) + 2
        assert rest.endswith(b"\n\r\n")
    assert STREAM_ENDS[path] in turns[-1]


@pytest.mark.parametrize(
    ("model", "pace", "step"),
    [
        ("demo-slow", None, 0.5),
        ("demo-20tps", None, 0.05),
        ("demo-4tps", None, 0.25),
        ("demo-slow", 8.0, 0.125),
    ],
)
def test_pace_is_what_the_name_says(model: str, pace: float | None, step: float) -> None:
    """A token takes its time, and no longer; a pace given to the site wins over the name."""
    wire = DemoConnection(pace=pace)
    wire.ask("/api/chat", model)
    wire.taken()
    assert wire.turn(step * 0.75) == b""
    assert b'"You"' in wire.turn(step * 0.25)
    assert wire.turn(step * 0.75) == b""
    assert b'" said:"' in wire.turn(step * 0.25)


def test_whole_response_takes_as_long_as_its_stream() -> None:
    """A paced model's document comes when its last token would have come."""
    wire = DemoConnection()
    wire.ask("/api/chat", "demo-slow", stream=False, options={"num_predict": 4})
    assert b"content-length:" in wire.taken().lower()
    assert wire.turn(1.75) == b""
    document = json.loads(wire.turn(0.25))
    assert document["done_reason"] == "length"
    assert document["eval_duration"] == 2_000_000_000


def test_pace_must_be_above_zero() -> None:
    """A site that could never say a word is refused."""
    with pytest.raises(ValueError, match="pace"):
        demo_site(cast(IReactorTime, Clock()), pace=0)


@pytest.mark.parametrize("model", ["demo-fast", "demo-slow"])
def test_paused_flow_stands_still(model: str) -> None:
    """Nothing is due while the transport is full, and the next event comes after it has drained."""
    wire = DemoConnection()
    wire.ask("/api/chat", model)
    wire.turn(0.5)
    wire.transport.producer.pauseProducing()
    assert wire.timers() == 0
    assert wire.turn(0.5, turns=9) == b""
    wire.transport.producer.resumeProducing()
    assert b'" said:"' in wire.turn(0.5)


@pytest.mark.parametrize("path", STREAM_ENDS)
@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
def test_leaving_cancels_the_flow(path: str, stream: bool) -> None:
    """When the client leaves, no event is due any more."""
    wire = DemoConnection()
    wire.ask(path, "demo-slow", stream=stream)
    wire.turn(0.5)
    assert wire.timers() == 1
    wire.leave()
    assert wire.timers() == 0


@pytest.mark.parametrize("path", STREAM_ENDS)
@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
def test_stalled_response_stays_open_and_silent(path: str, stream: bool) -> None:
    """After its beginning there is neither a byte nor an end, nor a timer that could bring one."""
    wire = DemoConnection()
    wire.ask(path, "demo-stall", stream=stream)
    begun = wire.turn(turns=20)
    assert b"You said: the" in begun or b'" the"' in begun
    assert b"arrive" not in begun if stream else begun.count(b"{") > begun.count(b"}")
    assert wire.turn(turns=100) == b""
    assert wire.timers() == 0
    assert not wire.transport.disconnecting
    assert not wire.transport.disconnected


@pytest.mark.parametrize("path", STREAM_ENDS)
def test_broken_whole_response_promises_more_than_it_sends(path: str) -> None:
    """Content-Length says the whole, half of it is sent, and then the connection is aborted."""
    wire = DemoConnection()
    wire.ask(path, "demo-break", stream=False)
    head, sent = wire.turn().split(b"\r\n\r\n", 1)
    length = re.search(rb"(?i)\r\ncontent-length: (\d+)", head)
    assert length is not None
    assert 0 < len(sent) < int(length[1])
    assert not wire.transport.disconnected
    wire.turn()
    assert wire.transport.disconnected


@pytest.mark.parametrize("path", STREAM_ENDS)
def test_broken_stream_is_aborted_after_three_tokens(path: str) -> None:
    """Neither a fourth token nor the end of the response is sent."""
    wire = DemoConnection()
    wire.ask(path, "demo-break")
    written = wire.turn(turns=20)
    assert b" the" in written
    assert b"quick" not in written
    assert STREAM_ENDS[path] not in written
    assert not written.endswith(b"\r\n0\r\n\r\n")
    assert wire.transport.disconnected


@pytest.mark.parametrize("path", STREAM_ENDS)
@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
def test_malformed_response_has_a_chunk_size_that_is_no_number(path: str, stream: bool) -> None:
    """Where a chunk should begin stand other bytes, and then the connection closes."""
    wire = DemoConnection()
    wire.ask(path, "demo-malformed", stream=stream)
    assert wire.turn(turns=20).endswith(b"\r\nnot-a-size\r\n")
    assert wire.transport.disconnecting


def test_tool_call_is_broken_before_its_ending() -> None:
    """A failing stream with fewer than three pieces ends without what should follow them."""
    wire = DemoConnection()
    tool = {"type": "function", "function": {"name": "now"}}
    wire.ask(CHATS[0], "demo-stall", tools=[tool], tool_choice=tool)
    written = wire.turn(turns=20)
    assert b'"arguments":"{}"' in written
    assert b'"finish_reason":"tool_calls"' not in written
    assert b"[DONE]" not in written


def test_connection_is_used_again_after_a_proper_end() -> None:
    """A second request on the same connection gets its response too."""
    wire = DemoConnection()
    for _ in range(2):
        wire.ask(CHATS[0], "demo-fast")
        assert wire.turn(turns=100).endswith(b"data: [DONE]\n\n\r\n0\r\n\r\n")


@pytest.mark.parametrize(
    ("path", "content_type", "fields"),
    [
        (CHATS[0], b"text/event-stream; charset=utf-8", [b"x-request-id", b"openai-processing-ms"]),
        (
            CHATS[1],
            b"text/event-stream; charset=utf-8",
            [b"request-id", b"anthropic-ratelimit-requests-remaining"],
        ),
        (CHATS[2], b"application/x-ndjson", [b"x-request-id"]),
    ],
)
def test_head_has_what_such_a_provider_sends(
    path: str, content_type: bytes, fields: list[bytes]
) -> None:
    """The content type of a stream and the provider's own fields are there."""
    wire = DemoConnection()
    wire.ask(path, "demo-fast")
    head = wire.taken().lower()
    assert b"\r\ncontent-type: " + content_type + b"\r\n" in head
    for field in fields:
        assert b"\r\n" + field + b": " in head


@pytest.mark.parametrize("path", CHATS[:2])
def test_rate_limit_says_when_to_come_back(path: str) -> None:
    """A 429 has retry-after and no request left; Anthropic's body repeats the request's id."""
    wire = DemoConnection()
    wire.ask(path, "demo-429")
    head, body = wire.taken().split(b"\r\n\r\n", 1)
    fields = dict(line.lower().split(b": ", 1) for line in head.split(b"\r\n")[1:])
    limit = b"x-ratelimit-remaining-requests"
    if path == "/v1/messages":
        limit = b"anthropic-ratelimit-requests-remaining"
        assert json.loads(body)["request_id"].lower().encode() == fields[b"request-id"]
    assert (fields[b"retry-after"], fields[limit]) == (b"1", b"0")


@pytest.mark.parametrize("path", STREAM_ENDS)
def test_redirect_is_a_307_to_another_path(path: str) -> None:
    """The response is empty and says where to go."""
    wire = DemoConnection()
    wire.ask(path, "demo-redirect")
    written = wire.taken()
    assert written.startswith(b"HTTP/1.1 307 ")
    assert b"location: /redirected" + path.encode() in written.replace(b"Location", b"location")
    assert written.endswith(b"\r\n\r\n")


@pytest.mark.parametrize("path", CHATS)
@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"[]",
        b"\xff",
        b"[" * 100_000,
        b'{"messages":[{"role":"user"}]}',
        b'{"model":"demo-fast"}',
        b'{"model":"demo-fast","messages":[]}',
        b'{"model":"demo-fast","messages":["hi"]}',
        b'{"model":"demo-fast","messages":[{"role":"user","content":"hi"}],"tools":7}',
    ],
    ids=lambda body: body[:40].decode("latin-1"),
)
def test_malformed_request_is_a_400_of_the_dialect(path: str, body: bytes) -> None:
    """What cannot be read is refused in the shape that the caller's SDK understands."""
    wire = DemoConnection()
    wire.post(path, body)
    status, document = wire.response()
    assert (status, shape(document)) == (400, dialect_of(path))


@pytest.mark.parametrize(
    ("path", "fields", "dialect"),
    [
        ("/", [], "openai"),
        ("/v1/files", [], "openai"),
        ("/v1/files", ["anthropic-version: 2023-06-01"], "anthropic"),
        ("/v1/messages/batches", [], "anthropic"),
        ("/api/pull", [], "ollama"),
        ("/v1beta/files", [], "gemini"),
        ("/v1beta/models/demo-fast:predict", [], "gemini"),
        *(("/redirected" + path, [], dialect_of(path)) for path in CHATS),
    ],
)
def test_unknown_path_is_a_404_of_the_dialect(path: str, fields: list[str], dialect: str) -> None:
    """What is not there is missing in the shape that the path or the caller's header suggests."""
    wire = DemoConnection()
    wire.post(path, b"{}", *fields)
    posted = wire.response()
    wire.get(path, *fields)
    for status, document in (posted, wire.response()):
        assert (status, shape(document)) == (404, dialect)


@pytest.mark.parametrize(
    ("path", "field", "key", "name"),
    [
        ("/v1/models", "x: y", "data", "id"),
        ("/v1/models", "anthropic-version: 2023-06-01", "data", "id"),
        ("/api/tags", "x: y", "models", "model"),
    ],
)
def test_every_model_is_listed(path: str, field: str, key: str, name: str) -> None:
    """The list has the shape of the dialect, and holds every model."""
    wire = DemoConnection()
    wire.get(path, field)
    status, document = wire.response()
    assert (status, [model[name] for model in document[key]]) == (200, list(MODELS))
    assert ("has_more" in document) == field.startswith("anthropic")


@pytest.mark.parametrize(
    ("field", "dialect"), [("x: y", "openai"), ("anthropic-version: 2023-06-01", "anthropic")]
)
def test_one_model_is_looked_up(field: str, dialect: str) -> None:
    """A model of any pace is there; another name is not found."""
    wire = DemoConnection()
    wire.get("/v1/models/demo-50tps", field)
    status, document = wire.response()
    assert (status, document["id"]) == (200, "demo-50tps")
    assert document.get("display_name") == ("Demo 50tps" if dialect == "anthropic" else None)
    wire.get("/v1/models/gpt-4o", field)
    status, document = wire.response()
    assert (status, shape(document)) == (404, dialect)


@pytest.mark.parametrize("body", [b"{}", b'{"model": ""}', b"[]", b"no JSON"])
def test_ollama_shows_no_model_without_a_name(body: bytes) -> None:
    """A body that names no model is a 400 with a sentence."""
    wire = DemoConnection()
    wire.post("/api/show", body)
    status, document = wire.response()
    assert (status, shape(document)) == (400, "ollama")


def test_ollama_has_a_version() -> None:
    """The version is there for clients that ask for it first."""
    wire = DemoConnection()
    wire.get("/api/version")
    status, document = wire.response()
    assert (status, list(document)) == (200, ["version"])


@pytest.mark.parametrize(
    ("said", "choice", "called"),
    [
        ("use the Tool, please", None, True),
        ("use the tool", "none", False),
        ("the toolbox", None, False),
        ("hello", None, False),
        ("hello", "required", True),
        ("hello", {"type": "function", "function": {"name": "weather"}}, True),
    ],
)
def test_tool_is_called_when_asked_for_or_forced(said: str, choice: object, called: bool) -> None:
    """The word "tool" of the user or a forcing tool_choice calls it, and "none" forbids it."""
    messages = [{"role": "user", "content": said}]
    document = DemoConnection().whole(
        CHATS[0], messages=messages, tools=[FUNCTION], tool_choice=choice
    )
    assert ("tool_calls" in document["choices"][0]["message"]) == called


def test_tool_result_is_followed_by_a_text() -> None:
    """After the tool's result the conversation goes on with the user's text."""
    call = [{"type": "tool_use", "id": "toolu_1", "name": "weather"}]
    result = [{"type": "tool_result", "tool_use_id": "toolu_1", "content": "4 degrees"}]
    messages = [
        *TOOL_MESSAGES,
        {"role": "assistant", "content": call},
        {"role": "user", "content": result},
    ]
    document = DemoConnection().whole("/v1/messages", messages=messages, tools=[ANTHROPIC_TOOL])
    assert document["stop_reason"] == "end_turn"
    assert document["content"][0]["text"].startswith("You said: Please use the tool for Oslo. ")


@pytest.mark.parametrize(
    ("path", "asked", "reason"),
    [
        (CHATS[0], {"max_tokens": 3}, b'"finish_reason":"length"'),
        (CHATS[1], {"max_tokens": 3}, b'"stop_reason":"max_tokens"'),
        (CHATS[2], {"options": {"num_predict": 3}}, b'"done_reason":"length"'),
    ],
)
def test_limit_of_tokens_ends_the_text(path: str, asked: dict[str, Any], reason: bytes) -> None:
    """The response has so many tokens, and says why it ended."""
    written = b"".join(DemoConnection().events(path, **asked))
    assert b" the" in written
    assert b"quick" not in written
    assert reason in written


# --- configuration and commands ------------------------------------------------------------------


def test_config_names_the_provider_for_each_dialect_and_a_route_to_each() -> None:
    """The text is TOML that holds these keys and no other."""
    text = demo_config(provider_port=1, proxy_port=2, admin_port=3)
    dialects = ("openai", "anthropic", "ollama", "gemini")
    assert tomllib.loads(text) == {
        "proxy": {
            "listen": ["tcp:2:interface=127.0.0.1"],
            "anonymous": True,
            "drain_timeout": "1s",
            "max_connections": 500,
        },
        "clients": {"demo": {"keys": [f"sha256:{hashlib.sha256(b'demo').hexdigest()}"]}},
        "admin": {"listen": "tcp:3:interface=127.0.0.1"},
        "providers": {
            f"demo-{name}": {"url": "http://127.0.0.1:1", "dialect": name} for name in dialects
        },
        "routes": [{"path": f"/{name}", "providers": [f"demo-{name}"]} for name in dialects],
    }


@pytest.mark.parametrize("path", ["/tmp/trace.jsonl", 'a "b" \\ \n \x7f é 😀'])
def test_config_names_the_trace_file_whatever_its_name(path: str) -> None:
    """Any file name survives the quoting."""
    text = demo_config(provider_port=1, proxy_port=2, admin_port=3, trace=path)
    assert tomllib.loads(text)["trace"] == {"jsonl": path}


def test_curl_lines_stream_from_each_dialect() -> None:
    """Each command asks the proxy for a stream that the demo provider then gives."""
    words = shlex.split(curl_lines(8080, admin_port=9081), comments=True)
    urls = [word for word in words if word.startswith("http://")]
    assert urls.pop() == "http://127.0.0.1:9081/metrics"
    names = ("openai", "anthropic", "ollama", "gemini")
    prefixes = [f"http://127.0.0.1:8080/{name}" for name in names]
    bodies = [word for word in words if word.startswith("{")]
    content = "/v1beta/models/demo-20tps:streamGenerateContent?alt=sse"
    ends = {**STREAM_ENDS, content: b'"finishReason":"STOP"'}
    for url, prefix, path, body in zip(urls, prefixes, (*CHATS, content), bodies, strict=True):
        assert url == prefix + path
        wire = DemoConnection()
        wire.post(path, body.encode())
        written = wire.turn(1.0, turns=60)
        assert written.startswith(b"HTTP/1.1 200 OK\r\n")
        assert ends[path] in written


@pytest.mark.parametrize("model", MODELS)
def test_texts_name_every_model(model: str, capsys: pytest.CaptureFixture[str]) -> None:
    """The README, the command's help and what it prints name the models that there are."""
    name = "demo-Ntps" if model == "demo-20tps" else model
    with pytest.raises(SystemExit):
        main(["demo", "--help"])
    texts = [(ROOT / "README.rst").read_text("utf-8"), curl_lines(1), capsys.readouterr().out]
    assert [text for text in texts if name not in re.sub(r"-\s+", "-", text)] == []
