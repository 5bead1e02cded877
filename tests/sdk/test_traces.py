"""The record of a request says what its caller's SDK reports of the response."""

from __future__ import annotations

import json
from typing import Any

import pytest

from tests.sdk.reports import Report, reported
from tests.sdk.sdks import ENDPOINT_WAYS, SAID, Question, Way, route, trace_of
from tests.sdk.test_endpoints import CALLING, CUTS, DETAILS, SAYING
from tests.support.daemon import Daemon

WAYS = [way for way in ENDPOINT_WAYS if not way.is_async]
TOKENS = (
    "input_tokens",
    "output_tokens",
    "cache_read_tokens",
    "cache_write_tokens",
    "reasoning_tokens",
)
CONTENT = ("text", "tool_calls", "finish_reason", "response_id")
COUNTLESS = {("anthropic", "count_tokens"), ("ollama", "embeddings")}
"""What counts without using any token, and what says nothing of tokens."""

QUESTIONS: dict[str, list[tuple[Way, dict[str, Any]]]] = {
    "a text": [(way, {}) for way in WAYS],
    "a tool call": [
        (way, {"said": "Use the tool for Oslo", "tools": True})
        for way in CALLING
        if not way.is_async
    ],
    "a cut text": [
        (way, {"more": CUTS[way.sdk, way.endpoint]}) for way in SAYING if not way.is_async
    ],
    "details": [
        (way, {"more": DETAILS[way.sdk, way.endpoint]})
        for way in WAYS
        if (way.sdk, way.endpoint) in DETAILS
    ],
}
CASES = [
    pytest.param(way, question, id=f"{way}, {name}")
    for name, asked in QUESTIONS.items()
    for way, question in asked
]
STREAMS = [way for way in SAYING if way.stream and not way.is_async]


def ask(proxy: Daemon, way: Way, prefix: str = "", **question: Any) -> tuple[Report, Any]:
    """Ask on a route of the SDK; return the SDK's report, and the record of the request."""
    report = reported(way, Question(base=route(proxy, f"{prefix}{way.sdk}"), **question))
    return report, trace_of(proxy, report.session)


def tokens_of(record: Any) -> tuple[int | None, ...]:
    """Return the numbers of a record."""
    return tuple(record[name] for name in TOKENS)


def calls_of(record: Any) -> tuple[tuple[str, Any], ...]:
    """Return names and decoded arguments of the tool calls in a record."""
    return tuple((call["name"], json.loads(call["arguments"])) for call in record["tool_calls"])


def is_counted(way: Way) -> bool:
    """Tell whether the responses of an endpoint have counts."""
    return (way.sdk, way.endpoint) not in COUNTLESS


@pytest.mark.parametrize(("way", "question"), CASES)
def test_a_record_with_content_is_what_the_sdk_reports(
    way: Way, question: dict[str, Any], proxy: Daemon
) -> None:
    """Numbers, text, tool calls, reason, model and id, at every endpoint, streamed or not."""
    report, record = ask(proxy, way, "kept-", **question)
    assert report.error is None
    assert (record["end_reason"], record["is_complete"], record["degraded"]) == (
        "complete",
        True,
        [],
    )
    assert record["stream"] is way.stream
    if not is_counted(way):
        assert tokens_of(record) == (None,) * len(TOKENS)
        assert record["usage"] in (None, "none")
        return
    assert tokens_of(record) == tuple(getattr(report, name) for name in TOKENS)
    assert record["usage"] == "reported"
    assert record["served_model"] == report.model == record["model"]
    assert (record["text"], calls_of(record)) == (report.text, report.tool_calls)
    assert record.get("finish_reason") == report.finish_reason
    if way.endpoint == "embeddings":
        assert "response_id" not in record
    else:
        assert record.get("response_id") == report.response_id


@pytest.mark.parametrize(("way", "question"), CASES)
def test_a_record_of_usage_has_the_same_numbers_and_no_content(
    way: Way, question: dict[str, Any], proxy: Daemon
) -> None:
    """It has no text, question or tool call."""
    report, record = ask(proxy, way, **question)
    expected = [getattr(report, name) if is_counted(way) else None for name in TOKENS]
    assert tokens_of(record) == tuple(expected)
    assert (record["end_reason"], record["degraded"]) == ("complete", [])
    assert record["served_model"] == (report.model if is_counted(way) else None)
    assert not set(CONTENT) & set(record)
    line = json.dumps(record)
    for word in (SAID, "You said", "weather", "Oslo"):
        assert word not in line
    assert report.response_id is None or report.response_id not in line


@pytest.mark.parametrize("way", STREAMS, ids=str)
@pytest.mark.parametrize(
    ("model", "end"),
    [
        ("demo-fail", "upstream_failed"),
        ("demo-unfinished", "unfinished"),
        ("demo-break", "upstream_broken"),
    ],
)
def test_a_record_of_half_a_stream_has_what_the_sdk_got(
    way: Way, model: str, end: str, proxy: Daemon
) -> None:
    """The text as far as it came; what failed or lacks its end is not complete."""
    report, record = ask(proxy, way, "kept-", model=model)
    assert (record["end_reason"], record["is_complete"]) == (end, False)
    assert record["text"] == report.text == "You said: the"
    assert record["status"] == 200
    assert record.get("response_id") == report.response_id
    assert record["usage"] == ("partial" if way.sdk == "anthropic" else "none")
    assert tokens_of(record) == tuple(getattr(report, name) for name in TOKENS)


@pytest.mark.parametrize("way", STREAMS, ids=str)
def test_a_caller_that_leaves_on_a_route_that_drains_is_counted_in_full(
    way: Way, proxy: Daemon
) -> None:
    """The numbers are those of the whole response, of which the caller read one event."""
    whole, _ = ask(proxy, way)
    _, record = ask(proxy, way, "drained-", model="demo-40tps", each=lambda _: True)
    assert tokens_of(record) == tuple(getattr(whole, name) for name in TOKENS)
    assert (record["end_reason"], record["on_disconnect"]) == ("client_gone", "drain")
    assert (record["usage"], record["is_complete"]) == ("reported", False)
