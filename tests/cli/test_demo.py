"""The demo provider, asked directly: by real SDKs on real sockets, and byte by byte on a clock."""

from __future__ import annotations

import functools
import hashlib
import json
import re
import shlex
import socket
import tomllib
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from typing import Any, ParamSpec, TypeVar, cast

import anthropic
import httpx
import httpx2
import ollama
import openai
import pytest
import pytest_twisted
from twisted.internet import reactor
from twisted.internet.defer import Deferred, gatherResults
from twisted.internet.interfaces import IReactorTime
from twisted.internet.task import Clock
from twisted.internet.threads import deferToThread
from twisted.python.failure import Failure

from llmproxy.cli.demo import curl_lines, demo_config, demo_site
from llmproxy.cli.demo import flow as demo_flow
from llmproxy.cli.demo.response import MODELS
from llmproxy.cli.main import main
from tests.support.daemon import ROOT
from tests.support.demo_wire import (
    ANTHROPIC_TOOL,
    ARGUMENTS,
    FUNCTION,
    MESSAGES,
    PROMPT_WORDS,
    SAID,
    STREAM_ENDS,
    TOOL_MESSAGES,
    DemoConnection,
)

P = ParamSpec("P")
T = TypeVar("T")

CHATS = ["/v1/chat/completions", "/v1/messages", "/api/chat"]


class Listening:
    """A demo provider on a real port, and the connections it holds."""

    def __init__(self) -> None:
        self.site = demo_site(cast(IReactorTime, reactor))
        self._build: Any = self.site.buildProtocol
        self.site.buildProtocol = self._track  # type: ignore[method-assign]  # to see connections end
        self.gone: list[Deferred[None]] = []
        self.port: Any = cast(Any, reactor).listenTCP(0, self.site, interface="127.0.0.1")
        self.number: int = self.port.getHost().port
        self.url = f"http://127.0.0.1:{self.number}"

    def _track(self, address: Any) -> Any:
        protocol: Any = self._build(address)
        gone: Deferred[None] = Deferred()
        lost = protocol.connectionLost

        def connection_lost(reason: Failure) -> None:
            lost(reason)
            gone.callback(None)

        protocol.connectionLost = connection_lost
        self.gone.append(gone)
        return protocol

    async def stop(self) -> None:
        """Close the port, and wait until every connection has ended."""
        await self.port.stopListening()
        await gatherResults(self.gone)


@pytest.fixture(autouse=True)
def no_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    """The SDKs go straight to loopback, whatever the environment says."""
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")


@pytest_twisted.async_yield_fixture
async def listening() -> AsyncIterator[Listening]:
    """A demo provider on a real port."""
    provider = Listening()
    yield provider
    await provider.stop()


def in_a_thread(test: Callable[P, None]) -> Callable[P, Coroutine[Any, Any, None]]:
    """Run a test that blocks beside the reactor that serves it."""

    @functools.wraps(test)
    async def run(*args: P.args, **kwargs: P.kwargs) -> None:
        await deferToThread(test, *args, **kwargs)

    pytest_twisted.ensureDeferred(run)
    return run


def openai_client(url: str) -> openai.OpenAI:
    """The OpenAI SDK, which does not try twice."""
    return openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=30)


def anthropic_client(url: str) -> anthropic.Anthropic:
    """The Anthropic SDK, which does not try twice."""
    return anthropic.Anthropic(base_url=url, api_key="none", max_retries=0, timeout=30)


def ollama_client(url: str) -> ollama.Client:
    """The Ollama SDK."""
    return ollama.Client(host=url, timeout=30)


def until_it_breaks(stream: Iterator[T], broken: type[Exception]) -> list[T]:
    """What a stream gave before it raised."""
    got: list[T] = []
    with pytest.raises(broken):
        got.extend(stream)
    return got


# The OpenAI SDK


@in_a_thread
def test_openai_stream_says_what_the_whole_response_says(listening: Listening) -> None:
    """Text, finish reason and counts are the same in both."""
    with openai_client(listening.url) as client:
        whole = client.chat.completions.create(model="demo-fast", messages=MESSAGES)
        chunks = list(
            client.chat.completions.create(
                model="demo-fast",
                messages=MESSAGES,
                stream=True,
                stream_options={"include_usage": True},
            )
        )
    text = "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)
    assert text == whole.choices[0].message.content
    assert text.startswith(f"You said: {SAID}. ")
    assert whole.choices[0].finish_reason == chunks[-2].choices[0].finish_reason == "stop"
    assert whole.usage is not None
    assert whole.usage == chunks[-1].usage
    assert whole.usage.prompt_tokens == PROMPT_WORDS
    assert whole.usage.completion_tokens == len(text.split())
    assert len({c.id for c in chunks}) == 1


@in_a_thread
def test_openai_usage_is_null_in_every_chunk_but_the_last(listening: Listening) -> None:
    """With include_usage each chunk has the member, and the last one has it and no choice."""
    with openai_client(listening.url) as client:
        chunks = [
            chunk.to_dict()
            for chunk in client.chat.completions.create(
                model="demo-fast",
                messages=MESSAGES,
                stream=True,
                stream_options={"include_usage": True},
            )
        ]
    assert all(chunk["usage"] is None and chunk["choices"] for chunk in chunks[:-1])
    assert chunks[-1]["choices"] == []
    assert chunks[-1]["usage"] is not None


@in_a_thread
def test_openai_usage_is_not_mentioned_unasked(listening: Listening) -> None:
    """Without include_usage no chunk has the member."""
    with openai_client(listening.url) as client:
        stream = client.chat.completions.create(model="demo-fast", messages=MESSAGES, stream=True)
        chunks = [chunk.to_dict() for chunk in stream]
    assert not [chunk for chunk in chunks if "usage" in chunk]
    assert all(chunk["choices"] for chunk in chunks)


@in_a_thread
def test_openai_calls_a_tool(listening: Listening) -> None:
    """Id and name come first and the arguments in pieces; the whole response has the same call."""
    with openai_client(listening.url) as client:
        whole = client.chat.completions.create(
            model="demo-fast", messages=TOOL_MESSAGES, tools=[FUNCTION]
        )
        chunks = list(
            client.chat.completions.create(
                model="demo-fast", messages=TOOL_MESSAGES, tools=[FUNCTION], stream=True
            )
        )
    message = whole.choices[0].message
    assert message.content is None
    assert message.tool_calls is not None
    call: Any = message.tool_calls[0]
    assert (call.function.name, json.loads(call.function.arguments)) == ("weather", ARGUMENTS)
    assert whole.choices[0].finish_reason == "tool_calls"

    deltas = [
        d for c in chunks for d in (c.choices[0].delta.tool_calls or []) if d.function is not None
    ]
    first, rest = cast(Any, deltas[0]), cast(Any, deltas[1:])
    assert first.id
    assert (first.function.name, first.function.arguments) == ("weather", "")
    assert len(rest) > 1
    assert not [d for d in rest if d.id or d.function.name]
    assert "".join(d.function.arguments for d in rest) == call.function.arguments
    assert chunks[-1].choices[0].finish_reason == "tool_calls"


@in_a_thread
def test_openai_lists_its_models(listening: Listening) -> None:
    """The list holds every model; one of any pace can be looked up; another is not found."""
    with openai_client(listening.url) as client:
        assert [model.id for model in client.models.list()] == list(MODELS)
        assert client.models.retrieve("demo-50tps").id == "demo-50tps"
        with pytest.raises(openai.NotFoundError):
            client.models.retrieve("gpt-4o")


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
@pytest.mark.parametrize(
    ("model", "error", "code"),
    [
        ("demo-429", openai.RateLimitError, "rate_limit_exceeded"),
        ("demo-500", openai.InternalServerError, None),
        ("demo-503", openai.InternalServerError, "service_unavailable"),
        ("gpt-4o", openai.NotFoundError, "model_not_found"),
        ("demo-redirect", openai.NotFoundError, None),
    ],
)
@in_a_thread
def test_openai_errors_surface_in_the_sdk(
    listening: Listening, model: str, error: type[openai.APIStatusError], code: str, stream: bool
) -> None:
    """Each failure is the exception that the SDK has for it, with code and request id."""
    with openai_client(listening.url) as client, pytest.raises(error) as raised:
        client.chat.completions.create(model=model, messages=MESSAGES, stream=stream)
    assert raised.value.code == code
    assert (raised.value.request_id or "").startswith("req_")


@pytest.mark.parametrize("model", ["demo-break", "demo-malformed"])
@in_a_thread
def test_openai_broken_answers_raise(listening: Listening, model: str) -> None:
    """A whole response raises; a stream gives its role and three tokens, and then raises."""
    with openai_client(listening.url) as client:
        with pytest.raises(openai.APIConnectionError):
            client.chat.completions.create(model=model, messages=MESSAGES)
        stream = client.chat.completions.create(model=model, messages=MESSAGES, stream=True)
        got = until_it_breaks(iter(stream), openai.APIConnectionError)
    assert [c.choices[0].delta.content for c in got] == ["", "You", " said:", " the"]


# The Anthropic SDK


@in_a_thread
def test_anthropic_stream_says_what_the_whole_response_says(listening: Listening) -> None:
    """Text, stop reason and counts are the same in both, in the published order of events."""
    asked: Any = {
        "model": "demo-fast",
        "max_tokens": 1024,
        "system": "Be brief.",
        "messages": [{"role": "user", "content": [{"type": "text", "text": SAID}]}],
    }
    with anthropic_client(listening.url) as client:
        whole = client.messages.create(**asked)
        events = list(client.messages.create(**asked, stream=True))
        with client.messages.stream(**asked) as stream:
            final = stream.get_final_message()
    assert final.content[0].type == whole.content[0].type == "text"
    assert final.content[0].text == whole.content[0].text
    assert whole.content[0].text.startswith(f"You said: {SAID}. ")
    assert final.stop_reason == whole.stop_reason == "end_turn"
    assert final.usage.output_tokens == len(whole.content[0].text.split())
    assert final.usage == whole.usage
    assert whole.usage.input_tokens == PROMPT_WORDS
    kinds = [event.type for event in events]
    assert kinds[:2] == ["message_start", "content_block_start"]
    assert kinds[-3:] == ["content_block_stop", "message_delta", "message_stop"]


@in_a_thread
def test_anthropic_calls_a_tool(listening: Listening) -> None:
    """The tool's input comes as JSON in pieces; the whole response has the same call."""
    asked: Any = {
        "model": "demo-fast",
        "max_tokens": 1024,
        "tools": [ANTHROPIC_TOOL],
        "tool_choice": {"type": "any"},
        "messages": MESSAGES[1:],
    }
    with anthropic_client(listening.url) as client:
        whole = client.messages.create(**asked)
        with client.messages.stream(**asked) as stream:
            pieces = [e.partial_json for e in stream if e.type == "input_json"]
            final = stream.get_final_message()
    for message in (whole, final):
        block: Any = message.content[0]
        assert block.type == "tool_use"
        assert (block.name, block.input) == ("weather", ARGUMENTS)
        assert message.stop_reason == "tool_use"
    assert len([piece for piece in pieces if piece]) > 1
    assert whole.usage == final.usage


@in_a_thread
def test_anthropic_lists_its_models(listening: Listening) -> None:
    """The list is Anthropic's own for who sends its version header."""
    with anthropic_client(listening.url) as client:
        assert [model.id for model in client.models.list()] == list(MODELS)
        assert client.models.retrieve("demo-slow").display_name == "Demo slow"
        with pytest.raises(anthropic.NotFoundError):
            client.models.retrieve("claude")


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
@pytest.mark.parametrize(
    ("model", "error", "kind"),
    [
        ("demo-429", anthropic.RateLimitError, "rate_limit_error"),
        ("demo-500", anthropic.InternalServerError, "api_error"),
        ("demo-503", anthropic.InternalServerError, "overloaded_error"),
        ("claude", anthropic.NotFoundError, "not_found_error"),
        ("demo-redirect", anthropic.NotFoundError, "not_found_error"),
    ],
)
@in_a_thread
def test_anthropic_errors_surface_in_the_sdk(
    listening: Listening, model: str, error: type[anthropic.APIStatusError], kind: str, stream: bool
) -> None:
    """Each failure is the exception that the SDK has for it, and the id is in head and body."""
    with anthropic_client(listening.url) as client, pytest.raises(error) as raised:
        client.messages.create(model=model, max_tokens=9, messages=MESSAGES[1:], stream=stream)
    body: Any = raised.value.body
    assert body["error"]["type"] == kind
    assert body["request_id"] == raised.value.request_id


@pytest.mark.parametrize("model", ["demo-break", "demo-malformed"])
@in_a_thread
def test_anthropic_broken_answers_raise(listening: Listening, model: str) -> None:
    """A whole response raises; a stream gives three tokens, and then raises."""
    with anthropic_client(listening.url) as client:
        asked: Any = {"model": model, "max_tokens": 99, "messages": MESSAGES[1:]}
        with pytest.raises(anthropic.APIConnectionError):
            client.messages.create(**asked)
        stream = client.messages.create(**asked, stream=True)
        got = until_it_breaks(iter(stream), httpx2.TransportError)
    texts = [e.delta.text for e in got if e.type == "content_block_delta"]
    assert texts == ["You", " said:", " the"]


# The Ollama SDK


@in_a_thread
def test_ollama_stream_says_what_the_whole_response_says(listening: Listening) -> None:
    """Text, reason and counts are the same in both; durations are there to divide by."""
    with ollama_client(listening.url) as client:
        whole = client.chat(model="demo-fast", messages=MESSAGES)
        lines = list(client.chat(model="demo-fast", messages=MESSAGES, stream=True))
    text = "".join(line.message.content or "" for line in lines)
    assert text == whole.message.content
    assert text.startswith(f"You said: {SAID}. ")
    assert [line.done for line in lines] == [False] * (len(lines) - 1) + [True]
    for last in (whole, lines[-1]):
        assert last.done_reason == "stop"
        assert (last.prompt_eval_count, last.eval_count) == (PROMPT_WORDS, len(text.split()))
        assert last.eval_duration
        assert last.total_duration
        assert last.total_duration > last.eval_duration


@in_a_thread
def test_ollama_calls_a_tool(listening: Listening) -> None:
    """A tool call comes in one line with its arguments decoded; the whole response has the same."""
    with ollama_client(listening.url) as client:
        whole = client.chat(model="demo-fast", messages=TOOL_MESSAGES, tools=[FUNCTION])
        lines = list(
            client.chat(model="demo-fast", messages=TOOL_MESSAGES, tools=[FUNCTION], stream=True)
        )
    for message in (whole.message, lines[0].message):
        assert message.tool_calls is not None
        function = message.tool_calls[0].function
        assert (function.name, function.arguments) == ("weather", ARGUMENTS)
    assert lines[-1].done
    assert lines[-1].eval_count == whole.eval_count


@in_a_thread
def test_ollama_lists_its_models(listening: Listening) -> None:
    """The tags hold every model."""
    with ollama_client(listening.url) as client:
        assert [model.model for model in client.list().models] == list(MODELS)


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
@pytest.mark.parametrize(
    ("model", "status", "words"),
    [
        ("demo-429", 429, "Rate limit reached"),
        ("demo-500", 500, "had an error"),
        ("demo-503", 503, "overloaded"),
        ("llama", 404, "model 'llama' not found"),
        ("demo-redirect", 404, "Unknown request URL"),
    ],
)
@in_a_thread
def test_ollama_errors_surface_in_the_sdk(
    listening: Listening, model: str, status: int, words: str, stream: bool
) -> None:
    """Each failure is the SDK's ResponseError, with the status and the sentence."""
    with ollama_client(listening.url) as client, pytest.raises(ollama.ResponseError) as raised:
        list(cast(Any, client).chat(model=model, messages=MESSAGES, stream=stream))
    assert raised.value.status_code == status
    assert words in raised.value.error


@pytest.mark.parametrize("model", ["demo-break", "demo-malformed"])
@in_a_thread
def test_ollama_broken_answers_raise(listening: Listening, model: str) -> None:
    """A whole response raises; a stream gives three tokens, and then raises."""
    with ollama_client(listening.url) as client:
        with pytest.raises(httpx.TransportError):
            client.chat(model=model, messages=MESSAGES)
        stream = client.chat(model=model, messages=MESSAGES, stream=True)
        got = until_it_breaks(iter(stream), httpx.TransportError)
    assert [line.message.content for line in got] == ["You", " said:", " the"]


# Clients that leave, or are slow, on real sockets


def send_chat(client: socket.socket, number: int, path: str, body: dict[str, Any]) -> None:
    """Connect and ask, as a client that reads when it likes."""
    data = json.dumps(body).encode()
    client.settimeout(30)
    client.connect(("127.0.0.1", number))
    head = f"POST {path} HTTP/1.1\r\nHost: demo\r\nContent-Length: {len(data)}\r\n\r\n"
    client.sendall(head.encode() + data)


def read_until(client: socket.socket, end: bytes) -> bytes:
    """Everything up to these bytes."""
    got = b""
    while not got.endswith(end):
        piece = client.recv(65536)
        assert piece
        got += piece
    return got


def read_a_little_and_leave(number: int, path: str, model: str) -> None:
    """A client that closes its connection once a response has begun."""
    with socket.socket() as client:
        send_chat(client, number, path, {"model": model, "stream": True, "messages": MESSAGES})
        assert client.recv(4096).startswith(b"HTTP/1.1 200 OK\r\n")


def flows_waiting() -> list[Any]:
    """The reactor's calls that belong to a response on its way out."""
    return [call for call in cast(Any, reactor).getDelayedCalls() if "Flow" in repr(call.func)]


@pytest.mark.parametrize("path", CHATS)
@pytest.mark.parametrize("model", ["demo-slow", "demo-stall"])
@pytest_twisted.ensureDeferred
async def test_client_leaving_mid_stream_leaves_no_delayed_call(path: str, model: str) -> None:
    """After the client has gone and the port is closed, the reactor waits for nothing new."""
    calls = cast(Any, reactor).getDelayedCalls
    before = set(calls())
    provider = Listening()
    await deferToThread(read_a_little_and_leave, provider.number, path, model)
    await provider.stop()
    assert set(calls()) - before == set()


@pytest_twisted.ensureDeferred
async def test_slow_client_stops_the_flow(
    listening: Listening, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While the client reads nothing no event is due; once it reads, it gets the whole response."""
    paused: Deferred[None] = Deferred()
    pauses: list[demo_flow.Flow] = []
    pause = demo_flow.Flow.pauseProducing

    def _pause_and_tell(flow: demo_flow.Flow) -> None:
        pause(flow)
        pauses.append(flow)
        if len(pauses) == 1:  # the flow is paused inside its own write: look once that returned
            cast(Any, reactor).callLater(0, paused.callback, None)

    monkeypatch.setattr(demo_flow.Flow, "pauseProducing", _pause_and_tell)
    listening.port.socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 16384)
    said = " ".join(["word"] * 5000)
    body = {"model": "demo-fast", "messages": [{"role": "user", "content": said}]}
    with socket.socket() as client:
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 16384)
        await deferToThread(send_chat, client, listening.number, "/api/chat", body)
        await paused
        assert flows_waiting() == []
        got = await deferToThread(read_until, client, b"\r\n0\r\n\r\n")
    assert got.count(b'"content":" word"') == 4999
    assert got.count(b'"done":true') == 1


# Byte by byte, on a clock


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
    wire.post(
        "/api/chat",
        json.dumps(
            {
                "model": "demo-slow",
                "stream": False,
                "messages": MESSAGES,
                "options": {"num_predict": 4},
            }
        ).encode(),
    )
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
    """The client's leaving forgets what was due."""
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
    length = next(
        int(line.split(b":")[1])
        for line in head.split(b"\r\n")
        if line.lower().startswith(b"content-length:")
    )
    assert 0 < len(sent) < length
    assert not wire.transport.disconnected
    wire.turn()
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
    body = {
        "model": "demo-stall",
        "stream": True,
        "messages": MESSAGES,
        "tools": [{"type": "function", "function": {"name": "now"}}],
        "tool_choice": {"type": "function", "function": {"name": "now"}},
    }
    wire.post(CHATS[0], json.dumps(body).encode())
    written = wire.turn(turns=20)
    assert b'"arguments":"{}"' in written
    assert b'"finish_reason":"tool_calls"' not in written
    assert b"[DONE]" not in written


def test_connection_is_used_again_after_a_proper_end() -> None:
    """A second request on the same connection is answered too."""
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


def test_rate_limit_says_when_to_come_back() -> None:
    """A 429 has retry-after and no request left."""
    wire = DemoConnection()
    wire.ask(CHATS[0], "demo-429")
    head = wire.taken().lower()
    assert b"\r\nretry-after: 1\r\n" in head
    assert b"\r\nx-ratelimit-remaining-requests: 0\r\n" in head


@pytest.mark.parametrize("path", STREAM_ENDS)
def test_redirect_is_a_307_to_another_path(path: str) -> None:
    """The response is empty and says where to go."""
    wire = DemoConnection()
    wire.ask(path, "demo-redirect")
    written = wire.taken()
    assert written.startswith(b"HTTP/1.1 307 ")
    assert b"location: /redirected" + path.encode() in written.replace(b"Location", b"location")
    assert written.endswith(b"\r\n\r\n")


def shape(document: dict[str, Any]) -> str:
    """Whose error this is."""
    if isinstance(document["error"], str):
        return "ollama"
    return "anthropic" if document.get("type") == "error" else "openai"


@pytest.mark.parametrize(
    ("path", "dialect"), list(zip(CHATS, ["openai", "anthropic", "ollama"], strict=True))
)
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
def test_malformed_request_is_a_400_of_the_dialect(path: str, dialect: str, body: bytes) -> None:
    """What cannot be read is refused in the shape that the caller's SDK understands."""
    wire = DemoConnection()
    wire.post(path, body)
    status, document = wire.response()
    assert (status, shape(document)) == (400, dialect)


@pytest.mark.parametrize(
    ("path", "fields", "dialect"),
    [
        ("/", [], "openai"),
        ("/v1/files", [], "openai"),
        ("/v1/files", ["anthropic-version: 2023-06-01"], "anthropic"),
        ("/v1/messages/batches", [], "anthropic"),
        ("/api/show", [], "ollama"),
    ],
)
def test_unknown_path_is_a_404_of_the_dialect(path: str, fields: list[str], dialect: str) -> None:
    """What is not there is missing in the shape that the path or the caller's header suggests."""
    wire = DemoConnection()
    wire.post(path, b"{}", *fields)
    status, document = wire.response()
    assert (status, shape(document)) == (404, dialect)
    wire.get(path, *fields)
    status, document = wire.response()
    assert (status, shape(document)) == (404, dialect)


def test_ollama_tells_its_version() -> None:
    """The version is there for clients that ask it first."""
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
    wire = DemoConnection()
    body = {
        "model": "demo-fast",
        "messages": [{"role": "user", "content": said}],
        "tools": [FUNCTION],
        "tool_choice": choice,
    }
    wire.post(CHATS[0], json.dumps(body).encode())
    wire.clock.advance(0)
    _, document = wire.response()
    assert ("tool_calls" in document["choices"][0]["message"]) == called


def test_tool_result_is_answered_with_a_text() -> None:
    """Once the tool has answered, the conversation goes on with what the user had said."""
    wire = DemoConnection()
    result = [{"type": "tool_result", "tool_use_id": "toolu_1", "content": "4 degrees"}]
    messages = [
        *TOOL_MESSAGES,
        {
            "role": "assistant",
            "content": [{"type": "tool_use", "id": "toolu_1", "name": "weather"}],
        },
        {"role": "user", "content": result},
    ]
    body = {"model": "demo-fast", "messages": messages, "tools": [ANTHROPIC_TOOL]}
    wire.post("/v1/messages", json.dumps(body).encode())
    wire.clock.advance(0)
    _, document = wire.response()
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
def test_limit_of_tokens_cuts_the_text(path: str, asked: dict[str, Any], reason: bytes) -> None:
    """The response has so many tokens, and says why it ended."""
    wire = DemoConnection()
    body = {"model": "demo-fast", "stream": True, "messages": MESSAGES, **asked}
    wire.post(path, json.dumps(body).encode())
    written = wire.turn(turns=40)
    assert b" the" in written
    assert b"quick" not in written
    assert reason in written


# Configuration and commands


def test_config_names_the_provider_three_times_and_a_route_to_each() -> None:
    """The text is TOML that holds these keys and no other."""
    text = demo_config(provider_port=1, proxy_port=2, admin_port=3)
    dialects = ("openai", "anthropic", "ollama")
    assert tomllib.loads(text) == {
        "proxy": {
            "listen": ["tcp:2:interface=127.0.0.1"],
            "anonymous": True,
            "drain_timeout": "1s",
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
    prefixes = [f"http://127.0.0.1:8080/{name}" for name in ("openai", "anthropic", "ollama")]
    bodies = [word for word in words if word.startswith("{")]
    for url, prefix, path, body in zip(urls, prefixes, CHATS, bodies, strict=True):
        assert url == prefix + path
        wire = DemoConnection()
        wire.post(path, body.encode())
        written = wire.turn(1.0, turns=60)
        assert written.startswith(b"HTTP/1.1 200 OK\r\n")
        assert STREAM_ENDS[path] in written


@pytest.mark.parametrize("model", MODELS)
def test_texts_name_every_model(model: str, capsys: pytest.CaptureFixture[str]) -> None:
    """The README, the command's help and what it prints tell of the models that there are."""
    name = "demo-Ntps" if model == "demo-20tps" else model
    with pytest.raises(SystemExit):
        main(["demo", "--help"])
    texts = [(ROOT / "README.rst").read_text("utf-8"), curl_lines(1), capsys.readouterr().out]
    assert [text for text in texts if name not in re.sub(r"-\s+", "-", text)] == []
