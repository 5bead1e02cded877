"""Connections to providers are kept, apart by credential, and used only while they are good."""

from __future__ import annotations

import time
from collections.abc import Iterator

import pytest

from tests.support.daemon import provider_config
from tests.support.sockets import Wire, chunked, request
from tests.support.stage import LAST, Link, Notes, Stage, open_stage, read_got, response, until

SHARED = """
[providers.short]
url = "{url}"
dialect = "openai"
timeouts = {{ pool_idle = "300ms" }}
{keys}
[providers.none]
url = "{url}"
dialect = "openai"
pool = 0
{keys}
[providers.pass]
url = "{url}"
dialect = "openai"
pass_credential = true
{keys}
[[routes]]
path = "/short"
providers = ["short"]
[[routes]]
path = "/none"
providers = ["none"]
[[routes]]
path = "/pass"
providers = ["pass"]
"""


@pytest.fixture(scope="module")
def stage(tmp_path_factory: pytest.TempPathFactory, link: Link) -> Iterator[Stage]:
    """Providers with pools of different sizes and patience."""
    folder = tmp_path_factory.mktemp("pool")

    def config(url: str) -> str:
        own = provider_config(url, provider=link.keys)
        return own + SHARED.format(url=url, keys=link.keys)

    with open_stage(folder, config, link=link) as stage:
        yield stage


def idle(stage: Stage, provider: str = "p") -> float:
    """Return how many connections are kept."""
    name = f'llmproxy_upstream_connections{{provider="{provider}",state="idle"}}'
    return stage.daemon.metrics()[name]


def assert_no_idle(stage: Stage) -> None:
    """Wait until the daemon has seen that its idle connections were closed."""
    until(lambda: idle(stage) == 0, "no connection is idle")


def keep_alive(stage: Stage, count: int, *fields: bytes) -> Notes:
    """Let each connection serve so many requests, then end; it notes its own number and its end."""
    seen = Notes()

    def script(wire: Wire) -> None:
        for _ in range(count):
            wire.read_request()
            lines = b"".join(field + b"\r\n" for field in fields)
            wire.send(b"HTTP/1.1 200 OK\r\n%bTransfer-Encoding: chunked\r\n\r\n" % lines)
            wire.send(chunked(b"ok"), LAST)
        seen.put(wire.wait_closed())

    stage.script = script
    return seen


def test_a_quiet_connection_is_used_again(stage: Stage) -> None:
    """Requests one after the other need one connection, whole responses given."""
    seen = Notes()

    def script(wire: Wire) -> None:
        for number in range(3):
            seen.put(wire.read_request().target)
            wire.send(b"HTTP/1.1 200 OK\r\nContent-Length: 1\r\n\r\n%d" % number)

    stage.script = script
    before = stage.provider.accepted
    for number in range(3):
        assert stage.get(request("GET", f"/p/{number}")).body == b"%d" % number
    assert stage.provider.accepted == before + 1
    assert_no_idle(stage)


@pytest.mark.parametrize("ended", [b"Connection: Close\r\n", b"Connection: x, close\r\n"])
def test_a_connection_that_the_provider_closes_is_not_used_again(
    stage: Stage, ended: bytes
) -> None:
    """Nor is one that went away while it was idle."""

    def script(wire: Wire) -> None:
        wire.read_request()
        wire.send(b"HTTP/1.1 200 OK\r\n%bContent-Length: 2\r\n\r\nok" % ended)

    stage.script = script
    before = stage.provider.accepted
    for _ in range(3):
        assert stage.get(request("GET", "/p/x")).body == b"ok"
    assert stage.provider.accepted == before + 3
    assert stage.ask(request("GET", "/p/x"), response(200))[1].status == 200


def test_a_connection_that_went_away_while_idle_is_not_used(stage: Stage) -> None:
    """The provider's end is seen, and the next request goes over a new connection."""

    def script(wire: Wire) -> None:
        wire.read_request()
        wire.send(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok")

    stage.script = script
    before = stage.provider.accepted
    for _ in range(3):
        assert stage.get(request("GET", "/p/x")).body == b"ok"
        assert_no_idle(stage)
    assert stage.provider.accepted == before + 3


def test_connections_are_kept_apart_by_credential(stage: Stage) -> None:
    """Nothing of one caller's connection can reach another's."""
    keep_alive(stage, 2)
    before = stage.provider.accepted
    for key in ("a", "b", "a", "b"):
        got = stage.get(request("GET", "/pass/x", f"Authorization: Bearer {key}"))
        assert got.body == b"ok"
    assert stage.provider.accepted == before + 2
    assert idle(stage, "pass") == 2


def test_an_idle_connection_is_closed_in_time(stage: Stage) -> None:
    """pool_idle is the provider's own where it sets one."""
    ended = keep_alive(stage, 1)
    began = time.monotonic()
    assert stage.get(request("GET", "/short/x")).body == b"ok"
    assert idle(stage, "short") == 1
    ended.read()
    assert 0.2 < time.monotonic() - began < 10
    until(lambda: idle(stage, "short") == 0, "it is gone from the gauge")


def test_the_providers_own_hint_shortens_the_time(stage: Stage) -> None:
    """Keep-Alive: timeout=1 is less than our minute."""
    ended = keep_alive(stage, 1, b"Keep-Alive: timeout=1, max=100")
    began = time.monotonic()
    assert stage.get(request("GET", "/p/x")).body == b"ok"
    ended.read()
    assert time.monotonic() - began < 10
    assert_no_idle(stage)


def test_a_pool_may_be_empty(stage: Stage) -> None:
    """With `pool = 0` each request has a connection of its own."""
    ended = keep_alive(stage, 1)
    before = stage.provider.accepted
    for _ in range(2):
        with stage.connect() as client:
            client.send(request("GET", "/none/x"))
            assert read_got(client).body == b"ok"
        ended.read()
    assert stage.provider.accepted == before + 2
