"""WebSockets to intercepted hosts: through CONNECT and TLS, and as ``ws://`` in the clear."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.support.live_proxy import assert_settles, trace_of
from tests.support.sandbox import KEY, Sandbox, open_sandbox
from tests.support.scripts import Notes
from tests.support.sockets import Wire
from tests.support.websocket import ask, close, frame, handshake, read_frame, switch

MASK = b"\x01\x02\x03\x04"
HOST = "api.openai.com"
ROUTE = f"""
[[routes]]
path = "/v1/realtime"
hosts = ["{HOST}"]
providers = ["p"]
strip = false
websocket = true
name = "realtime"
"""


@pytest.fixture(scope="module")
def live(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Sandbox]:
    """A daemon with a route that takes WebSockets, beside others that do not."""
    folder = tmp_path_factory.mktemp("inside")
    with open_sandbox(folder, more=ROUTE, intercept="plain_http = true\n") as live:
        yield live


@pytest.mark.parametrize("scheme", ["wss", "ws"])
def test_frames_cross_behind_a_connect(live: Sandbox, scheme: str) -> None:
    """The key of the proxy's URL names the caller, and the placeholder inside is dropped."""
    seen = Notes()

    def script(wire: Wire) -> None:
        asked = wire.read_request()
        seen.put(asked)
        wire.send(switch(asked, behind=frame(b"first")))
        got = read_frame(wire)
        wire.send(frame(got.payload), close())
        wire.close_notify()

    live.script = script
    target = f"/v1/realtime/{scheme}"
    sent = handshake(target, "Authorization: Bearer placeholder")
    opened = live.inside(HOST) if scheme == "wss" else live.tunnel(HOST, port=80)
    with opened as wire:
        assert ask(wire, sent.replace(b"Host: proxy", f"Host: {HOST}".encode())).status == 101
        assert read_frame(wire).payload == b"first"
        wire.send(frame(b"x" * 100_000, mask=MASK))
        assert read_frame(wire).payload == b"x" * 100_000
        assert read_frame(wire).payload == b"\x03\xe8"
    assert seen.read().values(b"authorization") == [b"Bearer the-provider-s-own"]
    record = trace_of(live.daemon, path=target)
    assert (record["client"], record["route"], record["status"]) == ("team", "realtime", 101)
    assert record["end_reason"] == "complete"
    assert_settles(live.daemon)


def test_a_key_may_stand_among_the_subprotocols_inside(live: Sandbox) -> None:
    """Where the CONNECT names nobody, as a browser's in a sandbox."""
    live.script = lambda wire: wire.send(switch(wire.read_request()), close())
    protocols = f"Sec-WebSocket-Protocol: realtime, openai-insecure-api-key.{KEY}"
    sent = handshake("/v1/realtime/key", protocols).replace(
        b"Host: proxy", b"Host: " + HOST.encode()
    )
    with live.inside(HOST, key=None) as wire:
        got = ask(wire, sent)
        assert (got.status, got.values(b"sec-websocket-protocol")) == (101, [b"realtime"])
    assert trace_of(live.daemon, path="/v1/realtime/key")["client"] == "team"


def test_a_route_without_the_key_answers_426_inside(live: Sandbox) -> None:
    """Codex falls back to HTTP on it."""
    sent = handshake("/v1/responses").replace(b"Host: proxy", b"Host: " + HOST.encode())
    with live.inside(HOST) as wire:
        assert ask(wire, sent).status == 426
