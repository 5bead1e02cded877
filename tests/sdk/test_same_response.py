"""What an SDK gives through the proxy is what it gives without it."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Mapping
from typing import Any

import pytest

from tests.sdk.sdks import (
    ARGUMENTS,
    KEY,
    SAID,
    WAYS,
    Outcome,
    Question,
    Way,
    access_line,
    looks_complete,
    plain,
    route,
    text_of,
)
from tests.support.daemon import Daemon
from tests.support.demo import Demo

CUT: Mapping[str, Mapping[str, Any]] = {
    "openai": {"max_completion_tokens": 3},
    "anthropic": {"max_tokens": 3},
    "ollama": {"options": {"num_predict": 3}},
}
CUT_ENDS = {"openai": "length", "anthropic": "max_tokens", "ollama": "length"}


def both(way: Way, demo: Demo, proxy: Daemon, **question: Any) -> tuple[Outcome, Outcome]:
    """Ask the provider itself, and through the proxy."""
    direct = way.ask(Question(base=demo.url, **question))
    return direct, way.ask(Question(base=route(proxy, way.sdk), **question))


def arguments_of(sdk: str, objects: list[Any]) -> Any:
    """Return the arguments of the one tool call in what an SDK gave."""
    if sdk == "ollama":
        calls = [call for item in objects for call in item.message.tool_calls or []]
        assert [call.function.name for call in calls] == ["weather"]
        return calls[0].function.arguments
    if sdk == "openai":
        choices = [choice for item in objects for choice in item.choices]
        parts = [getattr(choice, "delta", None) or choice.message for choice in choices]
        functions = [call.function for part in parts for call in part.tool_calls or []]
        assert [function.name for function in functions if function.name] == ["weather"]
        return json.loads("".join(function.arguments or "" for function in functions))
    if objects[0].type == "message":
        (block,) = objects[0].content
        assert block.name == "weather"
        return block.input
    deltas = [item.delta for item in objects if item.type == "content_block_delta"]
    return json.loads("".join(delta.partial_json for delta in deltas))


@pytest.mark.parametrize("way", WAYS, ids=str)
def test_text_is_the_same(way: Way, demo: Demo, proxy: Daemon) -> None:
    """Each object that the SDK gives is equal, in order, and together they say the response."""
    direct, through = both(way, demo, proxy)
    assert plain(through.response) == plain(direct.response)
    text = text_of(way.sdk, through.response)
    assert text.startswith(f"You said: {SAID}. This is the demo provider.")
    assert looks_complete(way.sdk, through.response)
    assert (len(through.response) > 30) is way.stream


@pytest.mark.parametrize("way", WAYS, ids=str)
def test_tool_calls_are_the_same(way: Way, demo: Demo, proxy: Daemon) -> None:
    """A tool call, in one piece or in many, is equal and has its arguments."""
    direct, through = both(way, demo, proxy, said="Use the tool for Oslo", tools=True)
    assert plain(through.response) == plain(direct.response)
    assert arguments_of(way.sdk, through.response) == ARGUMENTS


@pytest.mark.parametrize("way", WAYS, ids=str)
def test_response_that_was_cut_at_a_limit_is_the_same(way: Way, demo: Demo, proxy: Daemon) -> None:
    """The limit reaches the provider, and the reason of the end reaches the caller."""
    direct, through = both(way, demo, proxy, more=CUT[way.sdk])
    assert plain(through.response) == plain(direct.response)
    assert text_of(way.sdk, through.response) == "You said: the"
    assert f"'{CUT_ENDS[way.sdk]}'" in str(plain(through.response))


@pytest.mark.parametrize("way", WAYS, ids=str)
def test_text_beyond_ascii_is_the_same(way: Way, demo: Demo, proxy: Daemon) -> None:
    """Characters of two to four bytes arrive as they were sent, in both directions."""
    said = "grüße 你好 🎈🎈 \u2028"
    direct, through = both(way, demo, proxy, said=said)
    assert plain(through.response) == plain(direct.response)
    assert "grüße 你好 🎈🎈" in text_of(way.sdk, through.response)


@pytest.mark.parametrize("way", WAYS, ids=str)
def test_record_knows_who_asked_for_what(way: Way, proxy: Daemon) -> None:
    """The access line names client, route, model, dialect and whether a stream was asked for."""
    outcome = way.ask(Question(base=route(proxy, way.sdk), more=CUT[way.sdk]))
    line = access_line(proxy, outcome.session)
    expected = {"client": "team", "route": way.sdk, "provider": way.sdk, "dialect": way.sdk}
    assert expected.items() <= line.items()
    assert (line["model"], line["stream"], line["status"]) == ("demo-fast", way.stream, 200)
    assert KEY not in str(proxy.log)


@pytest.mark.parametrize("way", [way for way in WAYS if way.is_async], ids=str)
def test_many_answers_at_once_do_not_mix(way: Way, proxy: Daemon) -> None:
    """Thirty callers at the same time get their own responses, from the first word to the last."""
    base = route(proxy, way.sdk)

    async def ask_all() -> list[Outcome]:
        questions = [Question(base=base, said=f"caller {n} says {n * n}") for n in range(30)]
        return await asyncio.gather(*(way.ask_async(question) for question in questions))

    outcomes = asyncio.run(ask_all())
    texts = [text_of(way.sdk, outcome.response) for outcome in outcomes]
    for n, text in enumerate(texts):
        assert text.startswith(f"You said: caller {n} says {n * n}. This is")
        assert text.endswith("so that you can watch them arrive.")
