"""The rows of running requests: their order, and the phase of each request."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from llmproxy.admin.streams import Streams


def exchange(started: float = 10.0, **changes: Any) -> Any:
    """Return the exchange of one request; by default it waits for the provider."""
    trace = SimpleNamespace(id="i", client="c", route="r", provider="p", model="m")
    request = SimpleNamespace(upload=None)
    known = {"trace": trace, "request": request, "match": object(), "relay": None}
    return SimpleNamespace(started=started, bytes_out=7, **{"waiting": None, **known, **changes})


def relay(*, paused: bool = False, first_at: float | None = 11.0) -> Any:
    """Return the relay of a response that began at 11 and had its last chunk at 12."""
    statistics = SimpleNamespace(first_at=first_at, last_at=12.0)
    return SimpleNamespace(is_paused=paused, statistics=statistics, paused_s=0.5)


def rows(*exchanges: Any) -> list[dict[str, Any]]:
    """Return the rows at second 15."""
    recorder: Any = SimpleNamespace(exchanges=exchanges)
    site: Any = SimpleNamespace(connections=())
    return Streams(site, recorder, lambda: 15.0).rows()


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
    (row,) = rows(exchange(relay=relay()))
    assert row == {
        "id": "i",
        "client": "c",
        "route": "r",
        "provider": "p",
        "model": "m",
        "phase": "streaming",
        "ahead": None,
        "age_s": 5.0,
        "bytes": 7,
        "last_chunk_s": 3.0,
        "paused_s": 0.5,
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
