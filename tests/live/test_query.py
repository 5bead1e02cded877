"""Headers and parameters of the query that an operator sets or drops, for a provider or a route."""

from __future__ import annotations

import pytest

from tests.support.daemon import provider_table, route_table
from tests.support.live_proxy import LiveProxy, client_config, live_fixture, post
from tests.support.sockets import request

KEY = "llmp_" + "k" * 43
BODY = b'{"model":"cheap"}'

CONFIG = "".join(
    [
        provider_table(
            "azure",
            'headers = { x-a = "provider", x-b = "provider" }',
            'query = { "api-version" = "2024-10-21", alt = "sse" }',
            'drop_query = ["api-version", "model"]',
        ),
        provider_table("plain"),
        route_table("/azure", "azure"),
        route_table(
            "/newer",
            "azure",
            'headers = { x-b = "route", x-c = "route" }',
            'drop_headers = ["x-d"]',
            'query = { "API-Version" = "2026-01-01" }',
            'drop_query = ["trace"]',
        ),
        route_table("/plain", "plain"),
        route_table("/over", "azure", '[routes.override]\nazure = { model = "prod" }'),
        route_table("/mixed", "azure", 'models = ["cheap"]'),
        route_table("/mixed", "plain", 'name = "mixed-2"', 'models = ["dear"]'),
        client_config("team", KEY),
        client_config("limited", "limited-key", 'models = ["cheap"]'),
    ]
)

live = live_fixture(CONFIG, proxy="")
AS_TEAM, AS_LIMITED = f"x-llmproxy-key: {KEY}", "x-llmproxy-key: limited-key"


@pytest.mark.parametrize(
    ("target", "sent"),
    [
        ("/azure/x", b"/x?api-version=2024-10-21&alt=sse"),
        ("/azure/x?a=%2f&&b", b"/x?a=%2f&&b&api-version=2024-10-21&alt=sse"),
        ("/azure/x?Api-Version=theirs&alt=json", b"/x?alt=json&api-version=2024-10-21"),
        ("/newer/x?trace=1&a;api-version=2", b"/x?a&API-Version=2026-01-01&alt=sse"),
        ("/plain/x?api-version=theirs&trace=1", b"/x?api-version=theirs&trace=1"),
    ],
)
def test_parameters_are_added_and_dropped(live: LiveProxy, target: str, sent: bytes) -> None:
    """A route's come over the provider's; without either the query crosses as it is."""
    received, got = live.ask(request("GET", target, AS_TEAM))
    assert received.target == sent
    assert "?" not in live.trace(got)["path"]


def test_a_route_adds_and_drops_headers(live: LiveProxy) -> None:
    """Its headers come over the provider's, and what it drops comes beside the provider's list."""
    lines = ("x-d: theirs", "true-client-ip: 10.0.0.1")
    received, _ = live.ask(request("GET", "/newer/x", AS_TEAM, *lines))
    found = {name: value for name, value in received.fields if name.startswith((b"x-", b"true"))}
    del found[b"x-request-id"]
    assert found == {b"x-a": b"provider", b"x-b": b"route", b"x-c": b"route"}
    received, _ = live.ask(request("GET", "/azure/x", AS_TEAM, "x-d: theirs", "x-b: theirs"))
    assert received.values(b"x-d") == [b"theirs"]
    assert received.values(b"x-b") == [b"theirs"]
    got = live.reject(request("GET", "/azure/x", AS_TEAM, "x_d: theirs"))
    assert (got.status, got.error) == (400, "bad_header")


def test_a_key_in_a_parameter_that_is_dropped_goes_nowhere(live: LiveProxy) -> None:
    """It is not misplaced, as no provider gets it; beside it, a key still is."""
    received, _ = live.ask(request("GET", f"/newer/x?trace={KEY}&a", AS_TEAM))
    assert received.target == b"/x?a&API-Version=2026-01-01&alt=sse"
    for target in (f"/newer/x?trace=1&a={KEY}", f"/azure/x?trace={KEY}", f"/plain/x?trace={KEY}"):
        got = live.reject(request("GET", target, AS_TEAM))
        assert (got.status, got.error) == (401, "misplaced_key")
    assert KEY not in str(live.daemon.traces()) + str(live.daemon.log)


def test_a_model_in_a_parameter_that_is_dropped_does_not_count(live: LiveProxy) -> None:
    """The provider cannot read it; where it crosses, it counts as ever."""
    received, got = live.ask(post("/azure/x?model=dear&b", BODY, AS_LIMITED))
    assert received.target == b"/x?b&api-version=2024-10-21&alt=sse"
    assert live.trace(got)["model"] == "cheap"
    got = live.reject(post("/plain/x?model=dear", BODY, AS_LIMITED))
    assert (got.status, got.error) == (403, "model_forbidden")
    received, _ = live.ask(post("/over/x?model=dear", BODY, AS_TEAM))
    assert received.body == b'{"model":"prod"}'
    assert b"dear" not in received.target


def test_a_model_counts_where_some_route_at_the_path_lets_it_cross(live: LiveProxy) -> None:
    """The model itself may decide between the routes, so the strict reading holds for all."""
    got = live.reject(post("/mixed/x?model=dear", BODY, AS_TEAM))
    assert (got.status, got.error) == (404, "no_route")
