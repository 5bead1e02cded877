"""Clients that leave when they have the end marker, before the body's framing has ended.

OpenAI's SDKs close their connection at ``[DONE]``.  The provider's connection must outlive that.
"""

from __future__ import annotations

import time
from collections.abc import Iterator

import openai
import pytest

from tests.live.test_disconnects import leave
from tests.support.live_proxy import (
    ONE_ROUTE,
    LiveProxy,
    assert_settles,
    begin,
    client_config,
    live_fixture,
    post,
    trace_of,
    until,
)
from tests.support.scripts import DONE, LAST, OK, Notes, Turn
from tests.support.sockets import Script, Wire, chunked

HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"
FIRST = b'data: {"choices":[{"delta":{"content":"a"}}]}\n\n'
CHAT, MESSAGES = "v1/chat/completions", "v1/messages"
STOP = b'event: message_stop\ndata: {"type":"message_stop"}\n\n'
COMPLETED = b'event: response.completed\ndata: {"type":"response.completed","response":{}}\n\n'
LINE = b'{"model":"m","message":{"content":"a"},"done":false}\n'
LINES_END = b'{"model":"m","done":true}\n'
NDJSON = HEAD.replace(b"text/event-stream", b"application/x-ndjson")
ENDS = {
    "openai": (CHAT, HEAD, DONE),
    "anthropic": (MESSAGES, HEAD, STOP),
    "responses": ("v1/responses", HEAD, COMPLETED),
    "ollama": ("api/chat", NDJSON, LINES_END),
}
KEY = "team-client-key"

_shared = live_fixture(ONE_ROUTE + client_config("team", KEY), both_links=True)


@pytest.fixture
def live(_shared: LiveProxy) -> Iterator[LiveProxy]:
    """A proxy whose connections to the provider end with the test: what is kept has a script."""
    yield _shared
    assert _shared.get(post("/p/over")).body == b"ok"


def playing(play: Script) -> Script:
    """Return a script that plays for each request of a connection, up to ``/over``."""

    def script(wire: Wire) -> None:
        while wire.read_request().target != b"/over":
            play(wire)
        wire.send(OK)

    return script


class Marked:
    """A provider that sends a stream up to the end marker, and what else there is at a turn.

    Args:
        marker: the last event.
        rest: what follows it on the wire.
    """

    def __init__(self, marker: bytes = DONE, rest: bytes = LAST, head: bytes = HEAD) -> None:
        self.turn = Turn()
        self.told = (LINE if head is NDJSON else FIRST) + marker
        self._head, self._rest = head, rest

    def __call__(self, wire: Wire) -> None:
        """Respond to one request."""
        wire.send(self._head, chunked(self.told))
        self.turn.take()
        wire.send(self._rest)


def leave_at_marker(
    live: LiveProxy, path: str, told: bytes = FIRST + DONE, how: str = "fin"
) -> None:
    """Read a stream up to its marker, and leave; return when the proxy knows."""
    with begin(live.connect(), path) as client:
        assert client.read_chunk() == told
        leave(client, how)
        until(lambda: live.gauge("client_connections") == 0, "the client is gone")


@pytest.mark.parametrize("how", ["fin", "half", "reset"])
@pytest.mark.parametrize("api", ENDS)
def test_the_provider_s_connection_is_kept(live: LiveProxy, api: str, how: str) -> None:
    """The rest of the framing is read, and the next request goes over the same connection."""
    name, head, marker = ENDS[api]
    provider = Marked(marker, head=head)
    live.script = playing(provider)
    before = live.provider.accepted
    for number in range(3):
        path = f"/p/{api}/{how}/{number}/{name}"
        leave_at_marker(live, path, provider.told, how)
        provider.turn.give()
        record = trace_of(live.daemon, path=path)
        assert (record["end_reason"], record["is_complete"]) == ("complete", True)
        assert record["on_disconnect"] is None
    assert_settles(live.daemon)
    assert live.provider.accepted - before <= 1


def test_a_hundred_streams_of_an_sdk_take_one_connection(live: LiveProxy) -> None:
    """openai's SDK closes its connection at ``[DONE]``, mostly before the provider's last chunk."""

    def play(wire: Wire) -> None:
        wire.send(HEAD, chunked(FIRST + DONE))
        time.sleep(0.002)  # a provider's last chunk is a segment of its own
        wire.send(LAST)

    live.script = playing(play)
    before = live.provider.accepted
    with openai.OpenAI(
        base_url=f"http://127.0.0.1:{live.daemon.port}/p/v1", api_key=KEY, max_retries=0
    ) as sdk:
        for _ in range(100):
            stream = sdk.chat.completions.create(
                model="m", messages=[{"role": "user", "content": "x"}], stream=True
            )
            assert [part.choices[0].delta.content for part in stream] == ["a"]
            until(lambda: live.gauge("active_streams") == 0, "the stream is over")
    assert live.provider.accepted - before <= 1


def test_the_rest_is_waited_for_a_second(live: LiveProxy) -> None:
    """A provider that never ends its body loses the connection; the response is whole."""
    ended = live.hold(HEAD, chunked(FIRST + DONE))
    path = f"/p/never/{CHAT}"
    leave_at_marker(live, path)
    assert live.gauge("active_streams") == 1
    ended.read()
    record = trace_of(live.daemon, path=path)
    assert (record["end_reason"], record["on_disconnect"]) == ("complete", "cancel")
    assert record["duration_s"] >= 1
    live.script = playing(ended.put)


def test_the_rest_is_bounded(live: LiveProxy) -> None:
    """A provider that goes on and on behind its marker loses the connection at 16 KiB."""
    ended = Notes()

    def play(wire: Wire) -> None:
        wire.send(HEAD, chunked(FIRST + DONE))
        turn.take()
        try:
            while True:
                wire.send(chunked(b": x\n\n" * 100))
        finally:
            ended.put("cut")

    turn = Turn()
    live.script = playing(play)
    path = f"/p/endless/{CHAT}"
    leave_at_marker(live, path)
    turn.give()
    assert ended.read() == "cut"
    record = trace_of(live.daemon, path=path)
    assert record["end_reason"] == "complete"
    assert_settles(live.daemon)


@pytest.mark.parametrize("rest", [FIRST, b'data: {"error":{"message":"x"}}\n\n'])
def test_what_follows_the_marker_reaches_nobody(live: LiveProxy, rest: bytes) -> None:
    """The record has the client's bytes; an event behind the marker was not forwarded."""
    provider = Marked(rest=chunked(rest) + LAST)
    live.script = playing(provider)
    path = f"/p/follows/{len(rest)}/{CHAT}"
    leave_at_marker(live, path)
    provider.turn.give()
    record = trace_of(live.daemon, path=path)
    assert record["bytes_out"] == len(FIRST + DONE)
    assert record["chunks"] == 1


@pytest.mark.parametrize(
    "fields", ["Connection: close\r\nTransfer-Encoding: chunked", "Connection: close"]
)
def test_a_connection_that_cannot_be_kept_is_dropped_at_once(live: LiveProxy, fields: str) -> None:
    """Nothing is won by waiting for the end of a response whose connection ends with it."""
    head = f"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\n{fields}\r\n\r\n".encode()
    is_chunked = b"chunked" in head
    ended = Notes()

    def play(wire: Wire) -> None:
        wire.send(head, chunked(FIRST + DONE) if is_chunked else FIRST + DONE)
        ended.put(wire.wait_closed())

    live.script = playing(play)
    path = f"/p/close/{len(fields)}/{CHAT}"
    leave_at_marker(live, path)
    ended.read()
    record = trace_of(live.daemon, path=path)
    assert (record["end_reason"], record["on_disconnect"]) == ("complete", "cancel")
    assert record["duration_s"] < 0.9
    assert_settles(live.daemon)
