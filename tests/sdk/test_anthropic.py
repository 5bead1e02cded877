"""The Anthropic SDK's own helpers and views of a response, through the proxy."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterator
from typing import Any

import anthropic
import pytest

from tests.sdk.sdks import ARGUMENTS, KEY, SAID, TOOLS, WORDS_SAID, plain, route, user
from tests.support.daemon import Daemon
from tests.support.demo import Demo
from tests.support.sockets import WAIT

ASKED: Any = {"model": "demo-fast", "max_tokens": 1024, "messages": user(SAID)}
TOOL_ASKED: Any = {
    "model": "demo-fast",
    "max_tokens": 1024,
    "messages": user("Use the tool for Oslo"),
    "tools": TOOLS["anthropic"],
}
ADDED = {"x-llmproxy-request-id"}
CHANGING = {"date", "request-id", "anthropic-ratelimit-requests-reset"}


def client_at(base: str) -> anthropic.Anthropic:
    """The SDK's client."""
    return anthropic.Anthropic(base_url=base, api_key=KEY, max_retries=0, timeout=WAIT)


def run_async(base: str, scene: Callable[[anthropic.AsyncAnthropic], Awaitable[Any]]) -> Any:
    """Play a scene with an async client."""

    async def play() -> Any:
        async with anthropic.AsyncAnthropic(
            base_url=base, api_key=KEY, max_retries=0, timeout=WAIT
        ) as client:
            return await scene(client)

    return asyncio.run(play())


@pytest.fixture
def client(proxy: Daemon) -> Iterator[anthropic.Anthropic]:
    """A client of the proxy."""
    with client_at(route(proxy, "anthropic")) as client:
        yield client


@pytest.fixture
def direct(demo: Demo) -> Iterator[anthropic.Anthropic]:
    """A client of the provider itself."""
    with client_at(demo.url) as client:
        yield client


@pytest.mark.parametrize("asked", [ASKED, TOOL_ASKED], ids=["text", "tool"])
def test_stream_helper_assembles_the_same(
    client: anthropic.Anthropic, direct: anthropic.Anthropic, asked: Any
) -> None:
    """Events, snapshots and the final message are equal to those without the proxy."""

    def play(client: anthropic.Anthropic) -> tuple[list[Any], Any]:
        with client.messages.stream(**asked) as stream:
            return list(stream), stream.get_final_message()

    events, final = play(client)
    direct_events, direct_final = play(direct)
    assert plain(events) == plain(direct_events)
    assert plain(final) == plain(direct_final)
    assert final.stop_reason == ("end_turn" if asked is ASKED else "tool_use")


def test_stream_helper_gives_the_text_and_the_input_of_a_tool(client: anthropic.Anthropic) -> None:
    """The text stream joins to the final text; the pieces of a tool's input become the input."""
    with client.messages.stream(**ASKED) as stream:
        pieces = list(stream.text_stream)
        assert "".join(pieces) == stream.get_final_text()
    assert len(pieces) > 30
    with client.messages.stream(**TOOL_ASKED) as stream:
        (block,) = stream.get_final_message().content
    assert block.type == "tool_use"
    assert block.input == ARGUMENTS


def test_async_stream_helper_assembles_the_same(proxy: Daemon, direct: anthropic.Anthropic) -> None:
    """The async helper's final message is the one without the proxy."""

    async def scene(client: anthropic.AsyncAnthropic) -> Any:
        async with client.messages.stream(**ASKED) as stream:
            return await stream.get_final_message()

    final = run_async(route(proxy, "anthropic"), scene)
    with direct.messages.stream(**ASKED) as stream:
        assert plain(final) == plain(stream.get_final_message())
    assert final.content[0].text.startswith(f"You said: {SAID}.")


def test_usage_stands_at_both_ends_of_a_stream(client: anthropic.Anthropic) -> None:
    """The first event counts the input, the last but one the output, as the whole response does."""
    whole = client.messages.create(**ASKED)
    events = list(client.messages.create(**ASKED, stream=True))
    start, end = events[0], events[-2]
    assert start.type == "message_start"
    assert end.type == "message_delta"
    assert start.message.usage.input_tokens == whole.usage.input_tokens == WORDS_SAID
    assert end.usage.output_tokens == whole.usage.output_tokens > 30


def test_models_are_the_same(client: anthropic.Anthropic, direct: anthropic.Anthropic) -> None:
    """The list, and one model looked up by its name, are those of the provider."""
    models = list(client.models.list())
    assert models == list(direct.models.list())
    assert "demo-slow" in [model.id for model in models]
    assert client.models.retrieve("demo-50tps") == direct.models.retrieve("demo-50tps")


def test_async_models_are_the_same(proxy: Daemon, direct: anthropic.Anthropic) -> None:
    """The async client's list is that of the provider."""

    async def scene(client: anthropic.AsyncAnthropic) -> Any:
        return [model async for model in client.models.list()]

    models = run_async(route(proxy, "anthropic"), scene)
    assert models
    assert models == list(direct.models.list())


def test_result_of_a_tool_goes_back(client: anthropic.Anthropic) -> None:
    """The second turn of a tool call gets a text."""
    called = client.messages.create(**TOOL_ASKED)
    (call,) = called.content
    assert call.type == "tool_use"
    result = {"type": "tool_result", "tool_use_id": call.id, "content": "sunny"}
    messages = [
        *TOOL_ASKED["messages"],
        {"role": "assistant", "content": called.content},
        {"role": "user", "content": [result]},
    ]
    response = client.messages.create(**{**TOOL_ASKED, "messages": messages})
    assert response.stop_reason == "end_turn"
    assert [block.type for block in response.content] == ["text"]


def test_raw_response_has_the_headers_of_the_provider(
    client: anthropic.Anthropic, direct: anthropic.Anthropic
) -> None:
    """Every field of the provider is there with its value; one is added, which names our record."""
    raw = client.messages.with_raw_response.create(**ASKED)
    plain_raw = direct.messages.with_raw_response.create(**ASKED)
    headers, expected = dict(raw.headers), dict(plain_raw.headers)
    assert headers.keys() == expected.keys() | ADDED
    same = expected.keys() - CHANGING
    assert {name: headers[name] for name in same} == {name: expected[name] for name in same}
    assert {"anthropic-organization-id", "content-length"} <= same
    assert plain(raw.parse()) == plain(plain_raw.parse())


def test_request_id_is_the_one_of_the_provider(client: anthropic.Anthropic, proxy: Daemon) -> None:
    """Where the provider answers, its own id is what the SDK shows, and ours stands beside it."""
    raw = client.messages.with_raw_response.create(**ASKED)
    assert (raw.request_id or "").startswith("req_")
    assert raw.parse()._request_id == raw.request_id
    proxy.wait_log("", logger="llmproxy.access", id=raw.headers["x-llmproxy-request-id"])
    with client.messages.stream(**ASKED) as stream:
        assert (stream.request_id or "").startswith("req_")
        stream.until_done()


def test_headers_of_a_stream_tell_every_hop_not_to_buffer(
    client: anthropic.Anthropic, direct: anthropic.Anthropic
) -> None:
    """A stream's fields are the provider's, but for those against buffering, and not doubled."""
    with client.messages.with_streaming_response.create(**ASKED, stream=True) as response:
        headers = response.headers
    with direct.messages.with_streaming_response.create(**ASKED, stream=True) as response:
        expected = response.headers
    assert headers.keys() == expected.keys() | ADDED | {"x-accel-buffering"}
    assert headers.get_list("cache-control") == ["no-cache, no-transform"]
    assert headers.get_list("x-accel-buffering") == ["no"]
    assert headers["content-type"] == expected["content-type"]


def test_streaming_response_gives_every_line(
    client: anthropic.Anthropic, direct: anthropic.Anthropic
) -> None:
    """Read as lines, a stream is the provider's events, pings too, to the end marker."""

    def lines(client: anthropic.Anthropic) -> list[str]:
        with client.messages.with_streaming_response.create(**ASKED, stream=True) as response:
            return list(response.iter_lines())

    through = lines(client)
    names = [line for line in through if line.startswith("event: ")]
    assert names == [line for line in lines(direct) if line.startswith("event: ")]
    assert "event: ping" in names
    assert through[-3:] == ["event: message_stop", 'data: {"type":"message_stop"}', ""]


def test_async_streaming_response_gives_headers_and_body(proxy: Daemon) -> None:
    """The async view has the head first and then the whole body."""

    async def scene(client: anthropic.AsyncAnthropic) -> tuple[str, str]:
        create = client.messages.with_streaming_response.create
        async with create(**ASKED, stream=True) as response:
            kind = response.headers["content-type"]
            return kind, "".join([text async for text in response.iter_text()])

    kind, body = run_async(route(proxy, "anthropic"), scene)
    assert kind == "text/event-stream; charset=utf-8"
    assert body.endswith('data: {"type":"message_stop"}\n\n')
