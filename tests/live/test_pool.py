"""Connections to providers are kept, apart by credential, and used only while they are good."""

from __future__ import annotations

import time

import pytest

from tests.support.daemon import provider_table, route_table
from tests.support.live_proxy import (
    ONE_ROUTE,
    LiveProxy,
    live_fixture,
    read_response,
    response,
    until,
)
from tests.support.scripts import LAST, Notes
from tests.support.sockets import Wire, chunked, request

POOLS = {
    "short": 'timeouts = { pool_idle = "300ms" }',
    "none": "pool = 0",
    "pass": "pass_credential = true",
}

live = live_fixture(
    ONE_ROUTE
    + "".join(provider_table(name, key, "KEYS") for name, key in POOLS.items())
    + "".join(route_table(f"/{name}", name) for name in POOLS),
    both_links=True,
)


def idle(live: LiveProxy, provider: str = "p") -> float:
    """Return how many connections are kept."""
    name = f'llmproxy_upstream_connections{{provider="{provider}",state="idle"}}'
    return live.daemon.metrics()[name]


def assert_no_idle(live: LiveProxy) -> None:
    """Wait until the daemon has seen that its idle connections were closed."""
    until(lambda: idle(live) == 0, "no connection is idle")


def keep_alive(live: LiveProxy, count: int, *fields: bytes) -> Notes:
    """Let each connection serve so many requests, then end; it notes its own number and its end."""
    seen = Notes()

    def script(wire: Wire) -> None:
        for _ in range(count):
            wire.read_request()
            lines = b"".join(field + b"\r\n" for field in fields)
            wire.send(b"HTTP/1.1 200 OK\r\n%bTransfer-Encoding: chunked\r\n\r\n" % lines)
            wire.send(chunked(b"ok"), LAST)
        seen.put(wire.wait_closed())

    live.script = script
    return seen


def test_a_quiet_connection_is_used_again(live: LiveProxy) -> None:
    """Requests one after the other need one connection, whole responses given."""
    seen = Notes()

    def script(wire: Wire) -> None:
        for number in range(3):
            seen.put(wire.read_request().target)
            wire.send(b"HTTP/1.1 200 OK\r\nContent-Length: 1\r\n\r\n%d" % number)

    live.script = script
    before = live.provider.accepted
    for number in range(3):
        assert live.get(request("GET", f"/p/{number}")).body == b"%d" % number
    assert live.provider.accepted == before + 1
    assert_no_idle(live)


@pytest.mark.parametrize("ended", [b"Connection: Close\r\n", b"Connection: x, close\r\n"])
def test_a_connection_that_the_provider_closes_is_not_used_again(
    live: LiveProxy, ended: bytes
) -> None:
    """Every spelling of `close` counts; an idle one that ends is in test_upstream_wire_once."""
    live.reply(b"HTTP/1.1 200 OK\r\n%bContent-Length: 2\r\n\r\nok" % ended)
    before = live.provider.accepted
    for _ in range(3):
        assert live.get(request("GET", "/p/x")).body == b"ok"
    assert live.provider.accepted == before + 3
    assert live.ask(request("GET", "/p/x"), response(200))[1].status == 200


def test_connections_are_kept_apart_by_credential(live: LiveProxy) -> None:
    """Nothing of one caller's connection can reach another's."""
    keep_alive(live, 2)
    before = live.provider.accepted
    for key in ("a", "b", "a", "b"):
        got = live.get(request("GET", "/pass/x", f"Authorization: Bearer {key}"))
        assert got.body == b"ok"
    assert live.provider.accepted == before + 2
    assert idle(live, "pass") == 2


def test_an_idle_connection_is_closed_in_time(live: LiveProxy) -> None:
    """pool_idle is the provider's own where it sets one."""
    ended = keep_alive(live, 1)
    began = time.monotonic()
    assert live.get(request("GET", "/short/x")).body == b"ok"
    assert idle(live, "short") == 1
    ended.read()
    assert 0.2 < time.monotonic() - began < 10
    until(lambda: idle(live, "short") == 0, "it is gone from the gauge")


def test_the_providers_own_hint_shortens_the_time(live: LiveProxy) -> None:
    """Keep-Alive: timeout=1 is less than our minute."""
    ended = keep_alive(live, 1, b"Keep-Alive: timeout=1, max=100")
    began = time.monotonic()
    assert live.get(request("GET", "/p/x")).body == b"ok"
    ended.read()
    assert time.monotonic() - began < 10
    assert_no_idle(live)


def test_a_pool_may_be_empty(live: LiveProxy) -> None:
    """With `pool = 0` each request has a connection of its own."""
    ended = keep_alive(live, 1)
    before = live.provider.accepted
    for _ in range(2):
        with live.connect() as client:
            client.send(request("GET", "/none/x"))
            assert read_response(client).body == b"ok"
        ended.read()
    assert live.provider.accepted == before + 2
