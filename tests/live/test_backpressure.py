"""A client that does not read stops the reading from the provider (design 6)."""

from __future__ import annotations

import threading

from tests.support.live_proxy import LiveProxy, live_fixture, post
from tests.support.scripts import OK
from tests.support.sockets import Wire

BOUND = 128 * 1024
SIZE = 40_000_000

live = live_fixture(both_links=True)


class LargeBody:
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


def test_what_is_held_for_a_stalled_client_is_bounded(live: LiveProxy) -> None:
    """The provider cannot send everything, and the proxy holds 128 KiB at most.

    Another client is served meanwhile, and in the end every byte arrives.
    """
    body = live.script = LargeBody()
    with live.begin("/p/flood", receive_buffer=16_384) as client:
        live.wait_paused()
        for _ in range(50):
            assert live.gauge("buffered_bytes") <= BOUND
        assert not body.done.is_set()
        assert body.sent < SIZE
        live.reply(OK)
        assert live.get(post("/p/quick")).body == b"ok"
        left = SIZE
        while left:
            got = client.read(min(left, 1_000_000))
            assert got.count(b"x") == len(got)
            left -= len(got)
    record = live.assert_ended("/p/flood", "complete")
    assert record["bytes_out"] == SIZE
    assert record["paused_s"] > 0
