"""The rows of running requests: their order, and the phase of each request."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import msgspec
import pytest

from llmproxy.admin.streams import Streams, Window, window_of
from llmproxy.config.values import Wrong
from tests.admin.one_site import exchange, relay, tap


def rows(*exchanges: Any) -> list[dict[str, Any]]:
    """Return the rows at second 15, as JSON has them."""
    recorder: Any = SimpleNamespace(exchanges=exchanges)
    site: Any = SimpleNamespace(connections=())
    return [msgspec.structs.asdict(row) for row in Streams(site, recorder, lambda: 15.0).rows()]


@pytest.mark.parametrize(
    ("changes", "phase"),
    [
        ({"match": None}, "routing"),
        ({}, "waiting"),
        ({"request": SimpleNamespace(upload=SimpleNamespace(complete=False))}, "uploading"),
        ({"request": SimpleNamespace(upload=SimpleNamespace(complete=True))}, "waiting"),
        ({"relay": relay()}, "streaming"),
        ({"relay": relay(paused=True)}, "paused"),
        ({"waiting": SimpleNamespace(ahead=2)}, "queued"),
    ],
)
def test_a_row_has_the_phase_of_its_request(changes: dict[str, Any], phase: str) -> None:
    """Each phase is one word."""
    (row,) = rows(exchange(**changes))
    assert row["phase"] == phase


def test_a_row_has_the_facts_of_its_request() -> None:
    """Ages are in seconds, and bytes are those that the client got."""
    (row,) = rows(exchange(relay=relay(), tap=tap(5, 9)))
    assert row == {
        "id": "i",
        "client": "c",
        "session": None,
        "route": "r",
        "provider": "p",
        "model": "m",
        "phase": "streaming",
        "ahead": None,
        "age_s": 5.0,
        "bytes": 7,
        "events": 5,
        "tokens": 9,
        "last_chunk_s": 3.0,
        "paused_s": 0.5,
        "attempts": 0,
        "detached": False,
    }


def test_a_queued_request_has_its_place() -> None:
    """How many get theirs before it."""
    (row,) = rows(exchange(waiting=SimpleNamespace(ahead=2)))
    assert row["ahead"] == 2


@pytest.mark.parametrize("response", [None, relay(first_at=None)])
def test_before_the_first_chunk_there_is_no_last(response: Any) -> None:
    """A row without a response, or with a head only, has no age of a chunk."""
    (row,) = rows(exchange(relay=response))
    assert row["last_chunk_s"] is None


def test_the_oldest_request_is_first() -> None:
    """The rows are sorted by age."""
    ages = [row["age_s"] for row in rows(exchange(12.0), exchange(9.0), exchange(14.0))]
    assert ages == [6, 3, 1]


# --- windows --------------------------------------------------------------------------------------


def names(window: Window, *exchanges: Any) -> list[Any]:
    """Return the ids in a window at second 15, and how many requests are like them, and in all."""
    recorder: Any = SimpleNamespace(exchanges=exchanges)
    site: Any = SimpleNamespace(connections=())
    found = Streams(site, recorder, lambda: 15.0).window(window)
    return [*(row.id for row in found.streams), found.matching, found.total]


MANY = [
    exchange(12.0, name="a", client="x", bytes_out=5, relay=relay(), tap=tap(3)),
    exchange(11.0, name="b", client="y", bytes_out=9, tap=tap(8)),
    exchange(13.0, name="c", client="x", bytes_out=7, waiting=SimpleNamespace(ahead=4)),
    exchange(14.0, name="d", client=None, bytes_out=7, relay=relay(paused=True, first_at=None)),
]


@pytest.mark.parametrize(
    ("query", "wanted"),
    [
        ({}, "bacd"),
        ({"sort": "age"}, "dcab"),
        ({"sort": "-bytes"}, "bcda"),
        ({"sort": "bytes"}, "acdb"),
        ({"sort": "-events"}, "bacd"),
        ({"sort": "-last_chunk"}, "abcd"),
        ({"sort": "-paused"}, "adbc"),
        ({"sort": "-ahead"}, "cbad"),
        ({"sort": "client"}, "dacb"),
        ({"sort": "phase"}, "dcab"),
        ({"client": "x"}, "ac"),
        ({"client": "x", "phase": "queued"}, "c"),
        ({"client": ""}, ""),
        ({"provider": "p", "route": "r", "model": "m"}, "bacd"),
        ({"session": "s"}, ""),
    ],
)
def test_a_window_is_chosen_and_sorted(query: dict[str, str], wanted: str) -> None:
    """Those that are alike stand in the order of their age, the oldest first."""
    assert names(window_of(query), *MANY) == [*wanted, len(wanted), 4]


def test_a_window_has_a_place_and_a_size() -> None:
    """What is left out is counted."""
    assert names(window_of({"limit": "2"}), *MANY) == ["b", "a", 4, 4]
    assert names(window_of({"limit": "2", "offset": "3"}), *MANY) == ["d", 4, 4]
    assert names(window_of({"limit": "0"}), *MANY) == [4, 4]
    assert names(window_of({"offset": "9"}), *MANY) == [4, 4]


@pytest.mark.parametrize(
    "query",
    [
        {"sort": "colour"},
        {"sort": ""},
        {"sort": "--age"},
        {"limit": "1001"},
        {"limit": "-1"},
        {"limit": ""},
        {"limit": "1e2"},
        {"offset": "1000000"},
        {"offset": "\u0661"},
    ],
)
def test_a_window_that_cannot_be_meant_is_wrong(query: dict[str, str]) -> None:
    """The sentence names the parameter."""
    with pytest.raises(Wrong, match=next(iter(query))):
        window_of(query)
