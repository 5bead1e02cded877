"""Every endpoint through the proxy, and what the SDKs report of its responses."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import pytest

from tests.sdk.reports import Report, reported
from tests.sdk.sdks import (
    ARGUMENTS,
    CALLS_TOOLS,
    ENDPOINT_WAYS,
    KEY,
    SAID,
    STREAMING,
    WAYS,
    WORDS_SAID,
    Outcome,
    Question,
    Way,
    access_line,
    plain,
    route,
    text_of,
    trace_of,
)
from tests.support.daemon import Daemon
from tests.support.demo import Demo

SAYING = [way for way in ENDPOINT_WAYS if way.endpoint in STREAMING]
CALLING = [way for way in ENDPOINT_WAYS if way.endpoint in CALLS_TOOLS]
STREAMS = [way for way in SAYING if way.stream]

ENDS = {"openai": "stop", "anthropic": "end_turn", "ollama": "stop"}
TOOL_ENDS = {"openai": "tool_calls", "anthropic": "tool_use", "ollama": "stop"}
CUT_ENDS = {"openai": "length", "anthropic": "max_tokens", "ollama": "length"}
CUTS: Mapping[tuple[str, str], Mapping[str, Any]] = {
    ("openai", "chat"): {"max_completion_tokens": 3},
    ("openai", "completions"): {"max_tokens": 3},
    ("openai", "responses"): {"max_output_tokens": 3},
    ("anthropic", "chat"): {"max_tokens": 3},
    ("ollama", "chat"): {"options": {"num_predict": 3}},
    ("ollama", "generate"): {"options": {"num_predict": 3}},
}
TALK: Any = [
    {"role": "user", "content": "one two"},
    {"role": "assistant", "content": "three four five"},
    {"role": "user", "content": SAID},
]
MARKED: Any = [{"type": "text", "text": "a b", "cache_control": {"type": "ephemeral"}}]
DETAILS: Mapping[tuple[str, str], Mapping[str, Any]] = {
    ("openai", "chat"): {"messages": TALK, "reasoning_effort": "high"},
    ("openai", "responses"): {"input": TALK, "reasoning": {"effort": "high"}},
    ("anthropic", "chat"): {
        "system": MARKED,
        "messages": TALK,
        "thinking": {"type": "enabled", "budget_tokens": 1024},
    },
}
COUNTED = {
    ("openai", "chat"): {"input": 9, "read": 2, "write": 3, "reasoning": 16},
    ("openai", "responses"): {"input": 9, "read": 2, "write": 3, "reasoning": 16},
    ("anthropic", "chat"): {"input": 4, "read": 2, "write": 5, "reasoning": 8},
}


def through(proxy: Daemon, way: Way, **question: Any) -> Report:
    """Ask through the proxy."""
    return reported(way, Question(base=route(proxy, way.sdk), **question))


def comparable(report: Report) -> Report:
    """Return a report without what is never the same twice."""
    return replace(report, session="", response_id=None)


ASKED: list[tuple[str, list[Way], dict[str, Any]]] = [
    ("a text", ENDPOINT_WAYS, {}),
    ("a tool call", CALLING, {"said": "Use the tool for Oslo", "tools": True}),
    ("beyond ASCII", SAYING, {"said": "grüße 你好 🎈🎈 \u2028"}),
]
QUESTIONS = [
    pytest.param(way, question, id=f"{way}, {name}")
    for name, ways, question in ASKED
    for way in ways
]


@pytest.mark.parametrize(("way", "question"), QUESTIONS)
def test_every_endpoint_responds_the_same(
    way: Way, question: dict[str, Any], demo: Demo, proxy: Daemon
) -> None:
    """Each object that the SDK gives is equal to the one without the proxy, in order."""
    direct = way.ask(Question(base=demo.url, **question))
    outcome = way.ask(Question(base=route(proxy, way.sdk), **question))
    assert plain(outcome.response) == plain(direct.response)
    assert (len(outcome.response) > 1) is way.stream
    line = access_line(proxy, outcome.session)
    expected = {"client": "team", "route": way.sdk, "provider": way.sdk, "dialect": way.sdk}
    assert expected.items() <= line.items()
    assert (line["status"], line["end_reason"], line["model"]) == (200, "complete", "demo-fast")
    assert line["stream"] is way.stream
    assert KEY not in str(proxy.log)


@pytest.mark.parametrize("way", SAYING, ids=str)
def test_report_of_a_text(way: Way, proxy: Daemon) -> None:
    """Text, reason, model and counts are there, at every endpoint that says something."""
    report = through(proxy, way)
    words = len(report.text.split())
    end = "completed" if way.endpoint == "responses" else ENDS[way.sdk]
    assert report.text.startswith(f"You said: {SAID}. ")
    assert (report.finish_reason, report.model, report.tool_calls) == (end, "demo-fast", ())
    assert (report.input_tokens, report.output_tokens) == (WORDS_SAID, words)
    assert bool(report.response_id) is (way.sdk != "ollama")


@pytest.mark.parametrize("way", [w for w in ENDPOINT_WAYS if w not in SAYING], ids=str)
def test_report_of_what_says_nothing(way: Way, proxy: Daemon) -> None:
    """Embeddings and counts report their input, but for the old endpoint that has no counts."""
    report = through(proxy, way)
    expected = None if way.endpoint == "embeddings" and way.sdk == "ollama" else WORDS_SAID
    assert (report.input_tokens, report.text, report.output_tokens) == (expected, "", None)


@pytest.mark.parametrize("way", CALLING, ids=str)
def test_report_of_a_tool_call(way: Way, proxy: Daemon) -> None:
    """Name and decoded arguments are there, and no text."""
    report = through(proxy, way, said="Use the tool for Oslo", tools=True)
    assert report.tool_calls == (("weather", ARGUMENTS),)
    assert report.text == ""
    end = "completed" if way.endpoint == "responses" else TOOL_ENDS[way.sdk]
    assert report.finish_reason == end
    assert report.output_tokens == len(json.dumps(ARGUMENTS).split())


@pytest.mark.parametrize("way", SAYING, ids=str)
def test_report_of_what_was_cut(way: Way, proxy: Daemon) -> None:
    """The reason is the limit's, in the provider's words."""
    report = through(proxy, way, more=CUTS[way.sdk, way.endpoint])
    end = "max_output_tokens" if way.endpoint == "responses" else CUT_ENDS[way.sdk]
    assert (report.text, report.finish_reason) == ("You said: the", end)
    assert report.output_tokens == 3


@pytest.mark.parametrize(
    "way", [way for way in ENDPOINT_WAYS if (way.sdk, way.endpoint) in DETAILS], ids=str
)
def test_report_of_cached_and_reasoning_tokens(way: Way, proxy: Daemon) -> None:
    """The details have the provider's own numbers, none of which is 0 or equal to another."""
    report = through(proxy, way, more=DETAILS[way.sdk, way.endpoint])
    expected = COUNTED[way.sdk, way.endpoint]
    assert report.input_tokens == expected["input"]
    assert report.cache_read_tokens == expected["read"]
    assert report.cache_write_tokens == expected["write"]
    assert report.reasoning_tokens == expected["reasoning"]
    assert report.output_tokens == len(report.text.split()) + expected["reasoning"]


@pytest.mark.parametrize("way", STREAMS, ids=str)
def test_report_of_a_stream_that_fails(way: Way, demo: Demo, proxy: Daemon) -> None:
    """The provider's own error reaches the caller as without the proxy, with what came before."""
    report = through(proxy, way, model="demo-fail")
    assert report.text == "You said: the"
    assert comparable(report) == comparable(reported(way, Question(demo.url, model="demo-fail")))
    if way.endpoint == "responses":  # an event as others for the SDK, which raises nothing
        assert (report.error, report.finish_reason) == (None, "failed")
    else:
        assert "gave up in the middle" in str(report.error)
        assert report.finish_reason is None
    assert trace_of(proxy, report.session)["status"] == 200


@pytest.mark.parametrize("way", STREAMS, ids=str)
def test_report_of_a_stream_without_its_end_marker(way: Way, proxy: Daemon) -> None:
    """No SDK raises if only the end marker lacks; what came has neither reason nor counts."""
    report = through(proxy, way, model="demo-unfinished")
    assert (report.text, report.error) == ("You said: the", None)
    assert report.finish_reason == ("in_progress" if way.endpoint == "responses" else None)
    if way.sdk != "anthropic":  # whose counts of the input come first
        assert (report.input_tokens, report.output_tokens) == (None, None)


@pytest.mark.parametrize("way", ENDPOINT_WAYS, ids=str)
@pytest.mark.parametrize(
    ("model", "status", "words"), [("demo-429", 429, "Rate limit"), ("demo-503", 503, "overloaded")]
)
def test_refusal_reaches_every_endpoint(
    way: Way, model: str, status: int, words: str, proxy: Daemon
) -> None:
    """The SDK raises its error for the status, and the record has the status, too."""
    report = through(proxy, way, model=model)
    assert words in str(report.error)
    line = access_line(proxy, report.session)
    assert (line["status"], line["end_reason"]) == (status, "upstream_refused")


@pytest.mark.parametrize(
    "way", [w for w in STREAMS if w.sdk == "openai" and w.endpoint != "responses"], ids=str
)
def test_counts_come_unasked_where_the_route_asks_for_them(way: Way, proxy: Daemon) -> None:
    """The last event is one more, with the counts; a caller that said no has none."""
    base = route(proxy, "counted-openai")
    plainly = way.ask(Question(base=route(proxy, "openai"))).response
    counted = way.ask(Question(base=base)).response
    assert len(counted) == len(plainly) + 1
    assert counted[-1].choices == []
    assert counted[-1].usage.prompt_tokens == WORDS_SAID
    refused = {"stream_options": {"include_usage": False}}
    assert len(way.ask(Question(base=base, more=refused)).response) == len(plainly)


@pytest.mark.parametrize("way", [way for way in WAYS if way.is_async], ids=str)
def test_many_responses_at_once_do_not_mix(way: Way, proxy: Daemon) -> None:
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
