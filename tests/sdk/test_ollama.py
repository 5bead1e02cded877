"""What is the Ollama SDK's own, through the proxy."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Iterator
from typing import Any

import ollama
import pytest

from tests.sdk.sdks import KEY, SAID, TOOLS, WORDS_SAID, Question, Way, route, user
from tests.support.daemon import Daemon
from tests.support.demo import Demo
from tests.support.sockets import WAIT

HEADERS = {"Authorization": f"Bearer {KEY}"}
ADDED = {"x-llmproxy-request-id", "x-llmproxy-provider", "x-llmproxy-attempts"}
CHANGING = {"date", "x-request-id", "content-length"}
"""The length differs as timestamps do: their fractions are of any length."""


@pytest.fixture
def client(proxy: Daemon) -> Iterator[ollama.Client]:
    """A client of the proxy."""
    with ollama.Client(host=route(proxy, "ollama"), headers=HEADERS, timeout=WAIT) as client:
        yield client


@pytest.fixture
def direct(demo: Demo) -> Iterator[ollama.Client]:
    """A client of the provider itself."""
    with ollama.Client(host=demo.url, timeout=WAIT) as client:
        yield client


def test_models_are_the_same(client: ollama.Client, direct: ollama.Client, proxy: Daemon) -> None:
    """The tags are those of the provider, for the async client, too."""

    async def scene() -> Any:
        base = route(proxy, "ollama")
        async with ollama.AsyncClient(host=base, headers=HEADERS, timeout=WAIT) as client:
            return await client.list()

    tags = client.list()
    assert tags == direct.list() == asyncio.run(scene())
    assert "demo-slow" in [model.model for model in tags.models]


def test_models_are_told_apart(client: ollama.Client) -> None:
    """Each model has a digest of its own: programs take equal digests for names of one model."""
    models = client.list().models
    digests = {model.digest for model in models}
    assert len(digests) == len(models) > 1
    assert all(re.fullmatch("[0-9a-f]{64}", str(digest)) for digest in digests)


def test_each_listed_model_is_shown(client: ollama.Client, direct: ollama.Client) -> None:
    """Programs ask what a model can do before they use it; those that fail are shown, too."""
    for model in client.list().models:
        shown = client.show(str(model.model))
        assert shown == direct.show(str(model.model))
        assert shown.details == model.details
        assert set(shown.capabilities or ()) == {"completion", "tools", "embedding"}
        info = shown.modelinfo or {}
        assert info[f"{info['general.architecture']}.context_length"] > 0


def test_unknown_model_is_not_shown(client: ollama.Client) -> None:
    """It is a 404 in Ollama's words."""
    with pytest.raises(ollama.ResponseError, match="'gpt-4o' not found") as unknown:
        client.show("gpt-4o")
    assert unknown.value.status_code == 404


def test_running_models_are_those_of_the_list(client: ollama.Client) -> None:
    """All are in memory, with their digests."""
    running = client.ps().models
    listed = [(model.model, model.digest) for model in client.list().models]
    assert [(model.model, model.digest) for model in running] == listed
    assert all(model.context_length and model.expires_at for model in running)


def test_counts_stand_in_the_last_line(client: ollama.Client) -> None:
    """A stream's last line has the counts of the whole response, and its durations."""
    whole = client.chat(model="demo-fast", messages=user(SAID))
    lines = list(client.chat(model="demo-fast", messages=user(SAID), stream=True))
    assert whole.prompt_eval_count == lines[-1].prompt_eval_count == WORDS_SAID
    assert whole.eval_count == lines[-1].eval_count == len(str(whole.message.content).split())
    assert lines[-1].eval_duration == whole.eval_duration
    assert whole.eval_duration
    assert [line for line in lines[:-1] if line.eval_count is not None] == []


def test_result_of_a_tool_goes_back(client: ollama.Client) -> None:
    """The second turn of a tool call gets a text."""
    asked = user("Use the tool for Oslo")
    called = client.chat(model="demo-fast", messages=asked, tools=TOOLS["ollama"]).message
    assert called.tool_calls
    messages = [*asked, called, {"role": "tool", "tool_name": "weather", "content": "sunny"}]
    response = client.chat(model="demo-fast", messages=messages, tools=TOOLS["ollama"]).message
    assert response.tool_calls is None
    assert "Use the tool for Oslo" in str(response.content)


def test_headers_are_those_of_the_provider(proxy: Daemon, demo: Demo) -> None:
    """Every field of the provider is there with its value; one is added, which names our record."""
    way = Way("ollama", is_async=False, stream=False)
    expected = way.ask(Question(base=demo.url)).headers
    outcome = way.ask(Question(base=route(proxy, "ollama")))
    assert outcome.headers.keys() == expected.keys() | ADDED
    same = expected.keys() - CHANGING
    assert {name: outcome.headers[name] for name in same} == {name: expected[name] for name in same}
    assert "content-type" in same
    ours = outcome.headers["x-llmproxy-request-id"]
    proxy.wait_log("", logger="llmproxy.access", id=ours, session=outcome.session)


def test_headers_of_a_stream_tell_every_hop_not_to_buffer(proxy: Daemon, demo: Demo) -> None:
    """NDJSON has the fields against buffering, each once, and keeps its type."""
    way = Way("ollama", is_async=False, stream=True)
    expected = way.ask(Question(base=demo.url)).headers
    headers: Any = way.ask(Question(base=route(proxy, "ollama"))).headers
    assert headers.keys() == expected.keys() | ADDED | {"x-accel-buffering"}
    assert headers.get_list("cache-control") == ["no-cache, no-transform"]
    assert headers.get_list("x-accel-buffering") == ["no"]
    assert headers["content-type"] == expected["content-type"] == "application/x-ndjson"
