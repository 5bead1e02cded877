"""A client that does not read stops the reading from the provider (design 6)."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import pytest

from tests.support.daemon import provider_config
from tests.support.sockets import Wire
from tests.support.stage import (
    Link,
    Stage,
    assert_settles,
    open_stage,
    post,
    trace_of,
    until,
)

BOUND = 128 * 1024
SIZE = 40_000_000


@pytest.fixture(scope="module")
def stage(tmp_path_factory: pytest.TempPathFactory, link: Link) -> Iterator[Stage]:
    """One route."""
    folder = tmp_path_factory.mktemp("pressure")
    with open_stage(
        folder, lambda url: provider_config(url, provider=link.keys), link=link
    ) as stage:
        yield stage


class Flood:
    """A script that sends a large body as fast as it is taken.

    Attributes:
        sent: bytes of it that the kernel has taken.
    """

    def __init__(self) -> None:
        self.sent = 0
        self.done = threading.Event()

    def __call__(self, wire: Wire) -> None:
        """Play."""
        wire.read_request()
        head = b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\nConnection: close\r\n\r\n"
        wire.send(head % SIZE)
        for _ in range(SIZE // 100_000):
            wire.send(b"x" * 100_000)
            self.sent += 100_000
        self.done.set()


def test_what_is_held_for_a_stalled_client_is_bounded(stage: Stage) -> None:
    """The provider cannot send it all, we hold 128 KiB at most, and every byte arrives."""
    flood = stage.script = Flood()
    with stage.connect(receive_buffer=16_384) as client:
        client.send(post("/p/flood"))
        client.read_head()
        until(lambda: stage.daemon.metrics()["llmproxy_paused_streams"] == 1, "it is paused")
        for _ in range(50):
            assert stage.daemon.metrics()["llmproxy_buffered_bytes"] <= BOUND
        assert not flood.done.is_set()
        assert flood.sent < SIZE
        left = SIZE
        while left:
            got = client.read(min(left, 1_000_000))
            assert got.count(b"x") == len(got)
            left -= len(got)
    record = trace_of(stage.daemon, path="/p/flood")
    assert (record["end_reason"], record["bytes_out"]) == ("complete", SIZE)
    assert record["paused_s"] > 0
    assert_settles(stage.daemon)


def test_many_stalled_clients_hold_their_own_share_alone(stage: Stage) -> None:
    """The sum stays bounded; a client that reads is not held up by those who do not."""
    count = 10
    stage.script = Flood()
    stalled = [stage.connect(receive_buffer=16_384) for _ in range(count)]
    for number, client in enumerate(stalled):
        client.send(post(f"/p/stalled/{number}"))
        client.read_head()
    until(lambda: stage.daemon.metrics()["llmproxy_paused_streams"] == count, "all are paused")
    assert stage.daemon.metrics()["llmproxy_buffered_bytes"] <= count * BOUND
    stage.script = _response
    assert stage.get(post("/p/quick")).body == b"ok"
    for client in stalled:
        client.sock.close()
    assert_settles(stage.daemon)


def _response(wire: Wire) -> None:
    wire.read_request()
    wire.send(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\nConnection: close\r\n\r\nok")
