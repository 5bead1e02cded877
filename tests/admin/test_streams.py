"""The rows of what is under way: in which order, and where each request stands."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from llmproxy.admin.streams import Streams


def exchange(started: float = 10.0, **changes: Any) -> Any:
    """Return one request, as its exchange knows it; by default it waits for the provider."""
    trace = SimpleNamespace(id="i", client="c", route="r", provider="p", model="m")
    request = SimpleNamespace(upload=None)
    known = {"trace": trace, "request": request, "match": object(), "relay": None, **changes}
    return SimpleNamespace(started=started, bytes_out=7, **known)


def relay(*, paused: bool = False, first_at: float | None = 11.0) -> Any:
    """Return the relay of a response that began at 11 and had its last chunk at 12."""
    statistics = SimpleNamespace(first_at=first_at, last_at=12.0)
    return SimpleNamespace(is_paused=paused, statistics=statistics, paused_s=0.5)


def rows(*exchanges: Any) -> list[dict[str, Any]]:
    """Return the rows; it is 15."""
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
    ],
)
def test_where_a_request_stands(changes: dict[str, Any], phase: str) -> None:
    """One word for each place on its way."""
    (row,) = rows(exchange(**changes))
    assert row["phase"] == phase


def test_a_row_tells_what_is_known() -> None:
    """Ages in seconds, and bytes as they were handed to the client."""
    (row,) = rows(exchange(relay=relay()))
    assert row == {
        "id": "i",
        "client": "c",
        "route": "r",
        "provider": "p",
        "model": "m",
        "phase": "streaming",
        "age_s": 5.0,
        "bytes": 7,
        "last_chunk_s": 3.0,
        "paused_s": 0.5,
    }


@pytest.mark.parametrize("response", [None, relay(first_at=None)])
def test_before_the_first_chunk_there_is_no_last(response: Any) -> None:
    """Neither without a response nor with a head alone."""
    (row,) = rows(exchange(relay=response))
    assert row["last_chunk_s"] is None


def test_the_oldest_stands_first() -> None:
    """Whatever the order in which they are kept."""
    assert [row["age_s"] for row in rows(exchange(12.0), exchange(9.0), exchange(14.0))] == [
        6,
        3,
        1,
    ]
