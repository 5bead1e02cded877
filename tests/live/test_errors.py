"""Errors of the proxy's own: their shape, their headers and their statuses (design 8)."""

from __future__ import annotations

from typing import Any

import pytest

from tests.support.daemon import provider_table, route_table
from tests.support.live_proxy import LiveProxy, Response, live_fixture, post, read_response
from tests.support.sockets import request

live = live_fixture(
    "".join(
        provider_table(name, dialect=name) + route_table(f"/{name}", name, 'models = ["m"]')
        for name in ("openai", "anthropic", "ollama", "raw")
    )
)


def shape_of(got: Response) -> str:
    """Return the dialect whose error shape this is, after checking all of it."""
    body: dict[str, Any] = got.json()
    (name,) = got.values(b"x-llmproxy-request-id")
    if body.get("type") == "error":
        assert set(body) == {"type", "error", "request_id"}
        assert set(body["error"]) == {"type", "message"}
        assert body["request_id"] == name.decode()
        return "anthropic"
    assert set(body) == {"error"}
    if isinstance(body["error"], str):
        return "ollama"
    assert set(body["error"]) == {"message", "type", "code", "param"}
    (reason,) = got.values(b"x-llmproxy-error")
    assert body["error"]["code"] == reason.decode()
    return "openai"


@pytest.mark.parametrize(
    ("target", "shape"),
    [
        ("/openai/x", "openai"),
        ("/anthropic/x", "anthropic"),
        ("/ollama/x", "ollama"),
        ("/raw/x", "openai"),
        ("/nowhere", "openai"),
        ("/v1/messages", "anthropic"),
        ("/v1/messages/batches", "anthropic"),
        ("/api/chat", "ollama"),
        ("/v1/chat/completions", "openai"),
    ],
)
def test_an_error_has_the_shape_of_the_routes_dialect(
    live: LiveProxy, target: str, shape: str
) -> None:
    """The matching route decides, else the path; the client need not be known."""
    got = live.reject(post(target, b'{"model":"other"}'))
    assert got.status == 404
    assert shape_of(got) == shape
    got = live.reject(post(target, b"{}", "x-api-key: wrong"))
    assert got.status == 401
    assert shape_of(got) == shape


def test_an_error_carries_our_id_where_sdks_look_for_it(live: LiveProxy) -> None:
    """Three fields have the id of the record; beside them are only reason, type and length."""
    got = live.reject(post("/openai/x", b'{"model":"other"}', "X-Request-Id: mine"))
    record = live.trace(got)
    assert (record["end_reason"], record["error"], record["status"]) == (
        "rejected",
        "no_route",
        404,
    )
    name = record["id"].encode()
    fields = dict(got.fields)
    assert len(fields) == len(got.fields)
    assert len(fields.pop(b"date")) == len("Fri, 01 Jan 2038 00:00:00 GMT")
    assert fields == {
        b"content-type": b"application/json",
        b"content-length": b"%d" % len(got.body),
        b"x-llmproxy-error": b"no_route",
        b"x-should-retry": b"false",
        b"x-llmproxy-request-id": name,
        b"x-request-id": name,
        b"request-id": name,
    }


@pytest.mark.parametrize("method", ["TRACE", "PROPFIND", "get", "X"])
def test_other_methods_are_not_served(live: LiveProxy, method: str) -> None:
    """They get a 405, and Allow names the methods that are served."""
    got = live.reject(request(method, "/openai/x"))
    assert got.status == 405
    assert got.values(b"allow") == [b"GET, HEAD, POST, PUT, PATCH, DELETE, OPTIONS"]
    assert shape_of(got) == "openai"


def test_an_error_to_head_has_no_body(live: LiveProxy) -> None:
    """The connection goes on with the next request."""
    with live.connect() as client:
        client.send(request("HEAD", "/nowhere"))
        got = read_response(client, bodiless=True)
        assert got.status == 404
        client.send(request("GET", "/api/nowhere"))
        got = read_response(client)
        assert got.status == 404
        assert shape_of(got) == "ollama"


def test_a_connection_goes_on_after_an_error(live: LiveProxy) -> None:
    """A refused request with a body leaves nothing of that in the way of the next."""
    with live.connect() as client:
        for _ in range(3):
            client.send(post("/openai/x", b'{"model":"other"}'))
            assert read_response(client).status == 404
        client.send(post("/openai/x", b"{nonsense"))
        assert read_response(client).status == 400
