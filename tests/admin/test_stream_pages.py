"""``/streams`` and what is below it: windows, one request, its end, and those that have ended."""

from __future__ import annotations

import json
from typing import Any

import pytest

from llmproxy.record.flight import capsule
from llmproxy.record.trace import Trace
from tests.admin.one_site import BEARER, Admin, exchange, with_host, with_token


def admin_of(*names: str) -> Admin:
    """Return a site with these requests."""
    admin = Admin()
    admin.clock.advance(20)
    admin.exchanges += [exchange(10.0 + at, name=name) for at, name in enumerate(names)]
    return admin


def test_the_streams_are_shown_to_whoever_reaches_the_site() -> None:
    """The oldest first, with the age of each."""
    found = json.loads(admin_of("a", "b").get("/streams")[2])
    assert (found["total"], found["matching"], found["offset"]) == (2, 2, 0)
    assert [(row["id"], row["age_s"]) for row in found["streams"]] == [("a", 10.0), ("b", 9.0)]


def test_a_query_chooses_a_window() -> None:
    """By the names of ``admin/streams.py``; a value may hold what a query must encode."""
    admin = admin_of("a", "b")
    admin.exchanges[0].trace.client = "x y"
    found = json.loads(admin.get("/streams?client=x%20y&sort=-bytes&limit=5")[2])
    assert [row["id"] for row in found["streams"]] == ["a"]


@pytest.mark.parametrize(
    "query", ["sort=size", "limit=ten", "clients=a", "client=a&client=b", "limit=1&limit=1"]
)
@pytest.mark.parametrize("path", ["/streams", "/streams/ended", "/events"])
def test_a_query_that_is_not_understood_is_refused(path: str, query: str) -> None:
    """The sentence names what can be asked for."""
    status, _, body = Admin().get(f"{path}?{query}")
    assert status == 400
    assert json.loads(body)["error"]["message"].startswith("Expected ")


def test_one_stream_is_shown() -> None:
    """By its id; a HEAD has no body."""
    admin = admin_of("a", "b")
    status, _, body = admin.get("/streams/b")
    assert (status, json.loads(body)["id"]) == (200, "b")
    assert admin.get("/streams/b", method="HEAD")[::2] == (200, "")
    assert admin.get("/streams/c")[0] == 404


def test_a_stream_is_ended_with_the_token_alone() -> None:
    """The response is the row as it was; the others go on."""
    admin = admin_of("a", "b")
    assert admin.post("/streams/a", "X-None: 1", method="DELETE")[0] == 401
    assert not admin.exchanges[0].killed
    status, row = admin.post("/streams/a", method="DELETE")
    assert (status, row["id"]) == (200, "a")
    assert [one.killed for one in admin.exchanges] == [True, False]
    assert admin.post("/streams/none", method="DELETE")[0] == 404


def test_no_stream_is_ended_where_the_file_has_no_token() -> None:
    """It is a 403, whatever is shown."""
    admin = admin_of("a")
    admin.followed = with_token(None)
    assert admin.post("/streams/a", "Authorization: Bearer ", method="DELETE")[0] == 403
    assert not admin.exchanges[0].killed


@pytest.mark.parametrize("method", ["POST", "PUT", "PATCH", "OPTIONS"])
def test_other_methods_end_nothing(method: str) -> None:
    """The response is 405, with what can be done in ``allow``."""
    admin = admin_of("a")
    status, fields, _ = admin.get("/streams/a", BEARER, method=method)
    assert (status, fields["allow"]) == (405, "GET, HEAD, DELETE")
    assert not admin.exchanges[0].killed


@pytest.mark.parametrize("path", ["/", "/streams", "/streams/a", "/streams/ended", "/events"])
def test_a_page_of_another_name_sees_nothing(path: str) -> None:
    """It would be a page whose name points here for a moment."""
    admin = admin_of("a")
    assert with_host(admin, "evil.example", path) == 421
    head = f"DELETE {path} HTTP/1.1\r\nHost: evil.example\r\n{BEARER}\r\n\r\n"
    admin.channel.dataReceived(head.encode())
    assert admin.transport.take().startswith(b"HTTP/1.1 421 ")
    assert not admin.exchanges[0].killed


# --- those that have ended ------------------------------------------------------------------------


def ended(admin: Admin, name: str, **fields: Any) -> None:
    """Keep the capsule of a request."""
    given: dict[str, Any] = {"end_reason": "client_gone", "client": "c", **fields}
    given |= {"instance": "0", "peer": "127.0.0.1", "method": "POST", "path": "/"}
    trace = Trace(time=f"2026-01-01T00:00:{name}Z", id=name, **given)
    admin.flights.keep(capsule(trace))


def test_the_ends_can_be_chosen() -> None:
    """By reason, client, provider and route; the newest first."""
    admin = Admin()
    ended(admin, "01", provider="p")
    ended(admin, "02", client="d", route="r")
    ended(admin, "03", end_reason="unfinished")
    for query, wanted in {
        "": ["03", "02", "01"],
        "?limit=1": ["03"],
        "?reason=client_gone": ["02", "01"],
        "?reason=client_gone&client=c": ["01"],
        "?client=d": ["02"],
        "?provider=p": ["01"],
        "?route=r": ["02"],
        "?route=s": [],
    }.items():
        found = json.loads(admin.get(f"/streams/ended{query}")[2])
        assert [one["id"] for one in found] == wanted, query
    assert json.loads(admin.get("/streams/ended/02")[2])["client"] == "d"
