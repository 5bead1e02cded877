"""The SDKs' own helpers and views of a response, through the proxy and without it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import openai
import pytest

from tests.sdk.clients import ANTHROPIC, KITS, OPENAI, TOOL_SAID, Kit
from tests.sdk.sdks import ARGUMENTS, KEY, SAID, WORDS_SAID, plain, route, user
from tests.support.daemon import Daemon
from tests.support.demo import Demo

ADDED = {"x-llmproxy-request-id", "x-llmproxy-provider", "x-llmproxy-attempts"}
CHANGING = {"date", "x-request-id", "request-id", "anthropic-ratelimit-requests-reset"}
SHOWN = {
    "openai": {"x-ratelimit-limit-requests", "openai-version", "content-length"},
    "anthropic": {"anthropic-organization-id", "content-length"},
}


@pytest.fixture(params=KITS, ids=str)
def kit(request: pytest.FixtureRequest) -> Kit:
    """An SDK."""
    found: Kit = request.param
    return found


@pytest.fixture
def through(kit: Kit, proxy: Daemon) -> Iterator[Any]:
    """A client of the proxy."""
    with kit.open(route(proxy, kit.name)) as client:
        yield client


@pytest.fixture
def direct(kit: Kit, demo: Demo) -> Iterator[Any]:
    """A client of the provider itself."""
    with kit.open(demo.url) as client:
        yield client


@pytest.mark.parametrize("tool", [False, True], ids=["text", "tool"])
def test_stream_helper_assembles_the_same(
    kit: Kit, through: Any, direct: Any, proxy: Daemon, tool: bool
) -> None:
    """Events, snapshots and the final object are equal to those without the proxy.

    So is the final object of the async helper.
    """
    asked = kit.asked_tool() if tool else kit.asked()

    def read(client: Any) -> tuple[list[Any], Any]:
        with kit.calls(client).stream(**asked) as stream:
            return list(stream), kit.final_of(stream)

    async def scene(client: Any) -> Any:
        async with kit.calls(client).stream(**asked) as stream:
            return await kit.final_of(stream)

    events, final = read(through)
    direct_events, direct_final = read(direct)
    assert plain(events) == plain(direct_events)
    assert plain(final) == plain(direct_final)
    assert plain(kit.run_async(route(proxy, kit.name), scene)) == plain(final)
    assert ("weather" if tool else f"You said: {SAID}.") in str(final)


def test_models_are_the_same(kit: Kit, through: Any, direct: Any, proxy: Daemon) -> None:
    """The list, one model looked up by its name, and the async list are those of the provider."""

    async def scene(client: Any) -> Any:
        return [model async for model in client.models.list()]

    models = list(through.models.list())
    assert models == list(direct.models.list())
    assert "demo-slow" in [model.id for model in models]
    assert through.models.retrieve("demo-50tps") == direct.models.retrieve("demo-50tps")
    assert kit.run_async(route(proxy, kit.name), scene) == models


def test_raw_response_has_the_headers_of_the_provider(
    kit: Kit, through: Any, direct: Any, proxy: Daemon
) -> None:
    """Every field of the provider is there with its value; one is added, which names our record.

    The provider's own id is what the SDK shows.
    """
    raw = kit.calls(through).with_raw_response.create(**kit.asked())
    expected_raw = kit.calls(direct).with_raw_response.create(**kit.asked())
    headers, expected = dict(raw.headers), dict(expected_raw.headers)
    assert headers.keys() == expected.keys() | ADDED
    same = expected.keys() - CHANGING
    assert {name: headers[name] for name in same} == {name: expected[name] for name in same}
    assert same >= SHOWN[kit.name]
    assert plain(raw.parse()) == plain(expected_raw.parse())
    assert raw.request_id.startswith("req_")
    assert raw.parse()._request_id == raw.request_id
    proxy.wait_log("", logger="llmproxy.access", id=headers["x-llmproxy-request-id"])


def test_headers_of_a_stream_tell_every_hop_not_to_buffer(
    kit: Kit, through: Any, direct: Any
) -> None:
    """A stream's fields are the provider's, but for those against buffering, and not doubled."""

    def read(client: Any) -> Any:
        create = kit.calls(client).with_streaming_response.create
        with create(**kit.asked(), stream=True) as response:
            return response.headers

    headers, expected = read(through), read(direct)
    assert headers.keys() == expected.keys() | ADDED | {"x-accel-buffering"}
    assert headers.get_list("cache-control") == ["no-cache, no-transform"]
    assert headers.get_list("x-accel-buffering") == ["no"]
    assert headers["content-type"] == expected["content-type"]


def test_streaming_response_gives_every_line(
    kit: Kit, through: Any, direct: Any, proxy: Daemon
) -> None:
    """Read as lines, a stream is the provider's events, to the end marker; async, too."""

    def read(client: Any) -> list[Any]:
        create = kit.calls(client).with_streaming_response.create
        with create(**kit.asked(), stream=True) as response:
            lines = list(response.iter_lines())
        assert lines[-2:] == [kit.marker, ""]
        data = [line.removeprefix("data: ") for line in lines]
        return [plain(json.loads(line)) if line.startswith("{") else line for line in data]

    async def scene(client: Any) -> tuple[str, str]:
        create = kit.calls(client).with_streaming_response.create
        async with create(**kit.asked(), stream=True) as response:
            kind = response.headers["content-type"]
            return kind, "".join([text async for text in response.iter_text()])

    lines = read(through)
    assert lines == read(direct)
    assert len(lines) > 60
    kind, body = kit.run_async(route(proxy, kit.name), scene)
    assert kind == "text/event-stream; charset=utf-8"
    assert body.endswith(f"{kit.marker}\n\n")


# -- OpenAI ----------------------------------------------------------------------------------------

only_openai = pytest.mark.parametrize("kit", [OPENAI], ids=str)
only_anthropic = pytest.mark.parametrize("kit", [ANTHROPIC], ids=str)


@only_openai
def test_openai_helper_parses_tool_arguments(kit: Kit, through: openai.OpenAI) -> None:
    """The pieces of a tool call become its arguments, decoded."""
    with through.chat.completions.stream(**kit.asked_tool()) as stream:
        deltas = [e.arguments_delta for e in stream if e.type.endswith("arguments.delta")]  # type: ignore[union-attr]  # by its type
        call = stream.get_final_completion().choices[0].message.tool_calls
    assert len(deltas) > 1
    assert call is not None
    assert json.loads("".join(deltas)) == call[0].function.parsed_arguments == ARGUMENTS


@only_openai
def test_openai_usage_is_in_the_last_chunk_where_it_is_asked_for(kit: Kit, through: Any) -> None:
    """With include_usage the last chunk has all counts and no choice; without, no chunk has any."""
    create = through.chat.completions.create
    whole = create(**kit.asked())
    chunks = list(create(**kit.asked(), stream=True, stream_options={"include_usage": True}))
    assert whole.usage.prompt_tokens == WORDS_SAID
    assert whole.usage.completion_tokens == len(str(whole.choices[0].message.content).split())
    assert chunks[-1].usage == whole.usage
    assert chunks[-1].choices == []
    assert [chunk for chunk in chunks[:-1] if chunk.usage is not None] == []
    unasked = list(create(**kit.asked(), stream=True))
    assert unasked
    assert [chunk for chunk in unasked if "usage" in chunk.to_dict()] == []


@only_openai
def test_openai_result_of_a_tool_goes_back(kit: Kit, through: Any) -> None:
    """The second turn of a tool call gets a text."""
    asked, create = kit.asked_tool(), through.chat.completions.create
    called = create(**asked).choices[0].message
    result = {"role": "tool", "tool_call_id": called.tool_calls[0].id, "content": "sunny"}
    response = create(**{**asked, "messages": [*asked["messages"], called, result]})
    assert response.choices[0].finish_reason == "stop"
    assert TOOL_SAID in str(response.choices[0].message.content)


@only_openai
def test_openai_redirect_is_forwarded(kit: Kit, through: Any, proxy: Daemon) -> None:
    """The SDK itself follows the provider's 307, away from the route, and gets a 404 there."""
    session = "a-redirected-one"
    with pytest.raises(openai.NotFoundError) as raised:
        through.chat.completions.create(
            model="demo-redirect", messages=user(SAID), extra_headers={"x-session-id": session}
        )
    assert raised.value.response.headers["x-llmproxy-error"] == "no_route"
    (first,) = raised.value.response.history
    assert first.headers["location"] == "/redirected/v1/chat/completions"
    line = proxy.wait_log("", logger="llmproxy.access", session=session, status=307)
    assert line["end_reason"] == "complete"
    assert KEY not in str(proxy.log)


# -- Anthropic -------------------------------------------------------------------------------------


@only_anthropic
def test_anthropic_helper_gives_the_text_and_the_input_of_a_tool(kit: Kit, through: Any) -> None:
    """The text stream joins to the final text; the pieces of a tool's input become the input."""
    with through.messages.stream(**kit.asked()) as stream:
        assert stream.request_id.startswith("req_")
        pieces = list(stream.text_stream)
        assert "".join(pieces) == stream.get_final_text()
    assert len(pieces) > 30
    with through.messages.stream(**kit.asked_tool()) as stream:
        (block,) = stream.get_final_message().content
    assert (block.type, block.input) == ("tool_use", ARGUMENTS)


@only_anthropic
def test_anthropic_usage_stands_at_both_ends_of_a_stream(kit: Kit, through: Any) -> None:
    """The first event counts the input, the last but one the output, as the whole response does."""
    whole = through.messages.create(**kit.asked())
    events = list(through.messages.create(**kit.asked(), stream=True))
    start, end = events[0], events[-2]
    assert (start.type, end.type) == ("message_start", "message_delta")
    assert start.message.usage.input_tokens == whole.usage.input_tokens == WORDS_SAID
    assert end.usage.output_tokens == whole.usage.output_tokens > 30


@only_anthropic
def test_anthropic_result_of_a_tool_goes_back(kit: Kit, through: Any) -> None:
    """The second turn of a tool call gets a text."""
    asked, create = kit.asked_tool(), through.messages.create
    called = create(**asked)
    (call,) = called.content
    result = {"type": "tool_result", "tool_use_id": call.id, "content": "sunny"}
    turns = [
        {"role": "assistant", "content": called.content},
        {"role": "user", "content": [result]},
    ]
    response = create(**{**asked, "messages": [*asked["messages"], *turns]})
    assert response.stop_reason == "end_turn"
    assert [block.type for block in response.content] == ["text"]
