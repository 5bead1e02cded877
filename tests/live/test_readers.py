"""Clients that read slowly, and clients that do not read at all: plainly connected, and by TLS."""

from __future__ import annotations

import random
import ssl
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from typing import NamedTuple

import pytest

from tests.support.keypairs import LISTEN_TLS
from tests.support.live_proxy import (
    ONE_ROUTE,
    LiveProxy,
    assert_settles,
    begin,
    listener_credentials,
    open_live_proxy,
    post,
    trace_of,
    until,
)
from tests.support.scripts import Notes
from tests.support.sockets import WAIT, Wire, connect
from tests.support.tls import Authority

STALL = 2.0
"""Seconds of ``client_stall``.

The kernels report what is read in steps of up to 64 KiB. A reader that is to live must be some
times quicker than one step in this time.
"""

BOUND = 128 * 1024
"""Bytes that may be held for one response."""

SIZE = 16_000_000
"""Bytes of a response: more than the kernel takes on the way to a client that reads slowly."""

PACE = threading.Event()
"""Never set: a wait for it is a pause."""

TIMEOUTS = f"""
[timeouts]
client_stall = "{STALL:.0f}s"
"""


class ClientPath(NamedTuple):
    """A live proxy, and one way for clients to reach it: plainly or by TLS."""

    live: LiveProxy
    context: ssl.SSLContext | None

    def connect(self) -> Wire:
        """Connect as a client whose kernel takes little for it."""
        daemon = self.live.daemon
        port = daemon.tls_port if self.context else daemon.port
        return connect(port, receive_buffer=16_384, tls=self.context)

    @property
    def buffered(self) -> float:
        """Bytes that the daemon holds for its clients."""
        return self.live.gauge("buffered_bytes")


@pytest.fixture(scope="module")
def client_paths(
    tmp_path_factory: pytest.TempPathFactory, authority: Authority
) -> Iterator[list[ClientPath]]:
    """A daemon whose clients connect plainly, and one whose clients connect by TLS."""
    proxy = f"anonymous = true\n{LISTEN_TLS}"
    with ExitStack() as stack:
        paths = []
        for context in (None, authority.client()):
            folder = tmp_path_factory.mktemp("readers")
            config = ONE_ROUTE + TIMEOUTS + listener_credentials(folder, authority)
            live = stack.enter_context(open_live_proxy(folder, config, proxy=proxy))
            paths.append(ClientPath(live, context))
        yield paths


def on_each(check: Callable[[ClientPath], None], paths: list[ClientPath]) -> None:
    """Check each way at the same time: both mostly wait."""
    with ThreadPoolExecutor() as pool:
        for one in [pool.submit(check, path) for path in paths]:
            one.result()


def test_a_slow_reader_gets_every_byte(client_paths: list[ClientPath]) -> None:
    """Some KiB each 50 ms, for some times client_stall: it lives on, and nothing is lost."""
    on_each(read_slowly, client_paths)


def read_slowly(client_path: ClientPath) -> None:
    """Read a response so, and check it."""
    body = random.Random(1).randbytes(SIZE)
    path = "/p/slow"

    def script(wire: Wire) -> None:
        wire.read_request()
        wire.send(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\nConnection: close\r\n\r\n" % SIZE)
        view = memoryview(body)
        for at in range(0, SIZE, 100_000):
            wire.sock.sendall(view[at : at + 100_000])

    client_path.live.script = script
    with begin(client_path.connect(), path) as client:
        got = bytearray(client.read(len(client.buffer)))
        held = 0.0
        over = time.monotonic() + 4 * STALL
        while time.monotonic() < over:
            got += client.sock.recv(8192)  # and no more: the kernel must not see a fast reader
            held = max(held, client_path.buffered)
            PACE.wait(0.05)
        assert 0 < held <= BOUND, "it was held up, within bounds"
        while len(got) < SIZE:
            got += client.read(min(SIZE - len(got), 100_000))
    assert bytes(got) == body
    record = trace_of(client_path.live.daemon, path=path)
    assert (record["end_reason"], record["bytes_out"]) == ("complete", SIZE)
    assert record["paused_s"] > STALL
    assert_settles(client_path.live.daemon)


def test_stuck_readers_are_cut(client_paths: list[ClientPath]) -> None:
    """client_stall ends them; until then little is held for each, and nothing after that."""
    on_each(read_nothing, client_paths)


def read_nothing(client_path: ClientPath) -> None:
    """Be some clients that read nothing behind the head, and check how they end."""
    count = 5
    ended = Notes()

    def script(wire: Wire) -> None:
        wire.read_request()
        try:
            wire.send(b"HTTP/1.1 200 OK\r\nContent-Length: 1000000000\r\n\r\n")
            while True:
                wire.send(b"x" * 100_000)
        except OSError:
            ended.put(time.monotonic())
            raise

    client_path.live.script = script
    clients = [client_path.connect() for _ in range(count)]
    for number, client in enumerate(clients):
        client.send(post(f"/p/stuck/{number}"))
        client.read_head()
    stuck = time.monotonic()
    held = 0.0
    while ended.empty():
        held = max(held, client_path.buffered)
        assert held <= count * BOUND
        assert time.monotonic() - stuck < WAIT, "nobody was cut"
    assert held > 0
    cut = [ended.read() for _ in clients]
    assert min(cut) - stuck > STALL / 2
    for number in range(count):
        record = trace_of(client_path.live.daemon, path=f"/p/stuck/{number}")
        assert (record["end_reason"], record["is_complete"]) == ("client_stalled", False)
    until(lambda: client_path.buffered == 0, "nothing is held any more")
    assert_settles(client_path.live.daemon)
    for client in clients:
        assert client.wait_closed() in ("reset", "truncated")
        client.sock.close()
