"""The OpenAI SDK's own helpers and views of a response, through the proxy."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable, Iterator
from typing import Any

import openai
import pytest

from tests.sdk.sdks import ARGUMENTS, FUNCTION, KEY, SAID, WORDS_SAID, plain, route, user
from tests.support.daemon import Daemon
from tests.support.demo import Demo
from tests.support.sockets import WAIT

ASKED: Any = {"model": "demo-fast", "messages": user(SAID)}
TOOL_ASKED: Any = {
    "model": "demo-fast",
    "messages": user("Use the tool for Oslo"),
    "tools": [FUNCTION],
}
ADDED = {"x-llmproxy-request-id"}
CHANGING = {"date", "x-request-id"}


def client_at(base: str) -> openai.OpenAI:
    """The SDK's client."""
    return openai.OpenAI(base_url=f"{base}/v1", api_key=KEY, max_retries=0, timeout=WAIT)


def async_client_at(base: str) -> openai.AsyncOpenAI:
    """The SDK's async client."""
    return openai.AsyncOpenAI(base_url=f"{base}/v1", api_key=KEY, max_retries=0, timeout=WAIT)


def run_async(base: str, scene: Callable[[openai.AsyncOpenAI], Awaitable[Any]]) -> Any:
    """Play a scene with an async client."""

    async def play() -> Any:
        async with async_client_at(base) as client:
            return await scene(client)

    return asyncio.run(play())


@pytest.fixture
def client(proxy: Daemon) -> Iterator[openai.OpenAI]:
    """A client of the proxy."""
    with client_at(route(proxy, "openai")) as client:
        yield client


@pytest.fixture
def direct(demo: Demo) -> Iterator[openai.OpenAI]:
    """A client of the provider itself."""
    with client_at(demo.url) as client:
        yield client


@pytest.mark.parametrize("asked", [ASKED, TOOL_ASKED], ids=["text", "tool"])
def test_stream_helper_assembles_the_same(
    client: openai.OpenAI, direct: openai.OpenAI, asked: Any
) -> None:
    """Events, snapshots and the final completion are equal to those without the proxy."""

    def play(client: openai.OpenAI) -> tuple[list[Any], Any]:
        with client.chat.completions.stream(**asked) as stream:
            return list(stream), stream.get_final_completion()

    events, final = play(client)
    direct_events, direct_final = play(direct)
    assert plain(events) == plain(direct_events)
    assert plain(final) == plain(direct_final)
    assert final.choices[0].finish_reason == ("stop" if asked is ASKED else "tool_calls")


def test_stream_helper_parses_tool_arguments(client: openai.OpenAI) -> None:
    """The pieces of a tool call become its arguments, decoded."""
    with client.chat.completions.stream(**TOOL_ASKED) as stream:
        deltas = [e.arguments_delta for e in stream if e.type.endswith("arguments.delta")]  # type: ignore[union-attr]  # by its type
        call = stream.get_final_completion().choices[0].message.tool_calls
    assert len(deltas) > 1
    assert call is not None
    assert json.loads("".join(deltas)) == call[0].function.parsed_arguments == ARGUMENTS


def test_async_stream_helper_assembles_the_same(proxy: Daemon, direct: openai.OpenAI) -> None:
    """The async helper's final completion is the one without the proxy."""

    async def scene(client: openai.AsyncOpenAI) -> Any:
        async with client.chat.completions.stream(**ASKED) as stream:
            return await stream.get_final_completion()

    final = run_async(route(proxy, "openai"), scene)
    with direct.chat.completions.stream(**ASKED) as stream:
        assert plain(final) == plain(stream.get_final_completion())
    assert final.choices[0].message.content.startswith(f"You said: {SAID}.")


def test_usage_of_a_stream_is_in_its_last_chunk(client: openai.OpenAI) -> None:
    """With include_usage the last chunk has the counts of the whole response, and no choice."""
    whole = client.chat.completions.create(**ASKED)
    chunks = list(
        client.chat.completions.create(**ASKED, stream=True, stream_options={"include_usage": True})
    )
    assert whole.usage is not None
    assert whole.usage.prompt_tokens == WORDS_SAID
    assert whole.usage.completion_tokens == len(str(whole.choices[0].message.content).split())
    assert chunks[-1].usage == whole.usage
    assert chunks[-1].choices == []
    assert [chunk for chunk in chunks[:-1] if chunk.usage is not None] == []


def test_usage_of_a_stream_is_not_added_unasked(client: openai.OpenAI) -> None:
    """Without include_usage no chunk has the member."""
    chunks = list(client.chat.completions.create(**ASKED, stream=True))
    assert chunks
    assert [chunk for chunk in chunks if "usage" in chunk.to_dict()] == []


def test_models_are_the_same(client: openai.OpenAI, direct: openai.OpenAI) -> None:
    """The list, and one model looked up by its name, are those of the provider."""
    models = client.models.list()
    assert plain(list(models)) == plain(list(direct.models.list()))
    assert "demo-slow" in [model.id for model in models]
    assert client.models.retrieve("demo-50tps") == direct.models.retrieve("demo-50tps")


def test_async_models_are_the_same(proxy: Daemon, direct: openai.OpenAI) -> None:
    """The async client's list is that of the provider."""

    async def scene(client: openai.AsyncOpenAI) -> Any:
        return [model async for model in client.models.list()]

    models = run_async(route(proxy, "openai"), scene)
    assert models
    assert models == list(direct.models.list())


def test_result_of_a_tool_goes_back(client: openai.OpenAI) -> None:
    """The second turn of a tool call gets a text."""
    called = client.chat.completions.create(**TOOL_ASKED).choices[0].message
    assert called.tool_calls
    messages = [
        *TOOL_ASKED["messages"],
        called,
        {"role": "tool", "tool_call_id": called.tool_calls[0].id, "content": "sunny"},
    ]
    response = client.chat.completions.create(**{**TOOL_ASKED, "messages": messages})
    assert response.choices[0].finish_reason == "stop"
    assert "Use the tool for Oslo" in str(response.choices[0].message.content)


def test_raw_response_has_the_headers_of_the_provider(
    client: openai.OpenAI, direct: openai.OpenAI
) -> None:
    """Every field of the provider is there with its value; one is added, which names our record."""
    raw = client.chat.completions.with_raw_response.create(**ASKED)
    plain_raw = direct.chat.completions.with_raw_response.create(**ASKED)
    headers, expected = dict(raw.headers), dict(plain_raw.headers)
    assert headers.keys() == expected.keys() | ADDED
    same = expected.keys() - CHANGING
    assert {name: headers[name] for name in same} == {name: expected[name] for name in same}
    assert {"x-ratelimit-limit-requests", "openai-version", "content-length"} <= same
    assert plain(raw.parse()) == plain(plain_raw.parse())


def test_request_id_is_the_one_of_the_provider(client: openai.OpenAI, proxy: Daemon) -> None:
    """Where the provider answers, its own id is what the SDK shows, and ours stands beside it."""
    raw = client.chat.completions.with_raw_response.create(**ASKED)
    assert (raw.request_id or "").startswith("req_")
    assert raw.parse()._request_id == raw.request_id
    proxy.wait_log("", logger="llmproxy.access", id=raw.headers["x-llmproxy-request-id"])


def test_headers_of_a_stream_tell_every_hop_not_to_buffer(
    client: openai.OpenAI, direct: openai.OpenAI
) -> None:
    """A stream's fields are the provider's, but for those against buffering, and not doubled."""
    with client.chat.completions.with_streaming_response.create(**ASKED, stream=True) as response:
        headers = response.headers
    with direct.chat.completions.with_streaming_response.create(**ASKED, stream=True) as response:
        expected = response.headers
    assert headers.keys() == expected.keys() | ADDED | {"x-accel-buffering"}
    assert headers.get_list("cache-control") == ["no-cache, no-transform"]
    assert headers.get_list("x-accel-buffering") == ["no"]
    assert headers["content-type"] == expected["content-type"]


def test_streaming_response_gives_every_line(client: openai.OpenAI, direct: openai.OpenAI) -> None:
    """Read as lines, a stream is the provider's events, to the end marker."""

    def read(client: openai.OpenAI) -> list[Any]:
        create = client.chat.completions.with_streaming_response.create
        with create(**ASKED, stream=True) as response:
            lines = list(response.iter_lines())
        assert lines[-2:] == ["data: [DONE]", ""]
        data = [line.removeprefix("data: ") for line in lines[:-2]]
        return [plain(json.loads(line)) if line else line for line in data]

    through = read(client)
    assert through == read(direct)
    assert len(through) > 60


def test_async_streaming_response_gives_headers_and_body(proxy: Daemon) -> None:
    """The async view has the head first and then the whole body."""

    async def scene(client: openai.AsyncOpenAI) -> tuple[str, str]:
        create = client.chat.completions.with_streaming_response.create
        async with create(**ASKED, stream=True) as response:
            kind = response.headers["content-type"]
            return kind, "".join([text async for text in response.iter_text()])

    kind, body = run_async(route(proxy, "openai"), scene)
    assert kind == "text/event-stream; charset=utf-8"
    assert body.endswith("data: [DONE]\n\n")


def test_redirect_is_handed_on(client: openai.OpenAI, proxy: Daemon) -> None:
    """The SDK itself follows the provider's 307, away from the route, and is told so."""
    session = "a-redirected-one"
    with pytest.raises(openai.NotFoundError) as raised:
        client.chat.completions.create(
            model="demo-redirect", messages=user(SAID), extra_headers={"x-session-id": session}
        )
    assert raised.value.response.headers["x-llmproxy-error"] == "no_route"
    (first,) = raised.value.response.history
    assert first.headers["location"] == "/redirected/v1/chat/completions"
    line = proxy.wait_log("", logger="llmproxy.access", session=session, status=307)
    assert line["end_reason"] == "complete"
