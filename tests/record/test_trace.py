"""The record of a request: its names, its time, and the fields that are left out."""

from __future__ import annotations

import json
from typing import Any

import msgspec
import pytest

from llmproxy.record.log import access_event
from llmproxy.record.trace import (
    CONTENT,
    NAMES,
    Attempt,
    content_size,
    timestamp,
    without_content,
)
from tests.support.records import trace

DESIGN_10 = (
    "time id client_request_id instance peer user_agent client session route provider dialect "
    "method path model served_model stream status end_reason error is_complete attempts bytes_in "
    "bytes_out chunks head_s first_chunk_s duration_s longest_gap_s paused_s input_tokens "
    "output_tokens cache_read_tokens cache_write_tokens reasoning_tokens usage degraded "
    "on_disconnect model_from queued_s counted_tokens tunnel responses events "
    "chunks_at_once last_chunk_s buffered_upstream resent"
)


class Call(msgspec.Struct):
    """A tool call."""

    arguments: str


def test_a_record_has_the_names_of_the_design_in_order() -> None:
    """Every field is there; an unknown one is null."""
    one = trace(attempts=[Attempt("p", "ok", 0.5)], model="gpt-\N{SNOWMAN}")
    record = json.loads(msgspec.json.encode(one))

    assert list(record) == DESIGN_10.split() == list(NAMES)
    assert record["model"] == "gpt-\N{SNOWMAN}"
    assert record["status"] is None
    assert record["is_complete"] is False
    attempt = {"provider": "p", "outcome": "ok", "seconds": 0.5}
    assert attempt.items() <= record["attempts"][0].items()


def test_content_is_in_a_record_only_if_it_is_set() -> None:
    """Content fields come last, and unset ones are left out."""
    content: dict[str, Any] = {
        "finish_reason": "stop",
        "response_id": "r",
        "text": "",
        "tool_calls": [Call("{}")],
    }
    record = json.loads(msgspec.json.encode(trace(**content)))

    assert list(record) == [*NAMES, *CONTENT]
    assert {name: record[name] for name in CONTENT} == content | {
        "tool_calls": [{"arguments": "{}"}]
    }


def test_the_size_of_content() -> None:
    """Text and arguments count; the other fields of the trace stay the same."""
    one = trace(model="m", text="abc", tool_calls=[Call("{}"), Call("[]")], response_id="r")
    assert content_size(one) == 7
    assert content_size(trace()) == content_size(without_content(one)) == 0
    assert without_content(one) == trace(model="m", response_id="r")
    assert one.text == "abc"


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.0, "1970-01-01T00:00:00.000Z"),
        (1_700_000_000.123456, "2023-11-14T22:13:20.123Z"),
        (1_709_251_199.9994, "2024-02-29T23:59:59.999Z"),
    ],
)
def test_times_are_rfc_3339_in_utc(seconds: float, text: str) -> None:
    """To the millisecond, whatever the machine's time zone."""
    assert timestamp(seconds) == text


def test_the_access_line_leaves_out_unknown_fields() -> None:
    """It has no nulls, no lists, no content, and not the time, which the log adds."""
    one = trace(status=200, attempts=[Attempt("p", "ok", 0.5)], text="secret", finish_reason="stop")
    event = access_event(one, None, None)

    assert event["status"] == 200
    assert event["bytes_out"] == 0
    assert not {"model", "attempts", "degraded", "time", *CONTENT} & set(event)
    assert None not in event.values()
