"""What answers where an engine should be, and is none, or none that can be used."""

from __future__ import annotations

import socketserver
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import msgspec
import pytest

from tests.shared.test_engine import BODY, CHAT, KEY, good
from tests.support.daemon import Daemon, provider_table, route_table
from tests.support.live_proxy import LiveProxy, client_config, post, read_response, until
from tests.support.sockets import connect


def bulk(data: bytes) -> bytes:
    """Return a bulk string."""
    return b"$%d\r\n%b\r\n" % (len(data), data)


def says(*head: object, more: bytes = b"") -> bytes:
    """Return what the script would say."""
    return b"*2\r\n" + bulk(msgspec.msgpack.encode(head)) + bulk(more)


LOADED = bulk(b"0" * 40)
NEW = says("unknown", 0, "1", 1_700_000_000_000)

SAYS: dict[str, list[bytes | None]] = {
    "closes": [b""],
    "nothing": [None],
    "replica": [LOADED, b"-READONLY You can't write against a read only replica.\r\n"],
    "loads": [b"-LOADING Redis is loading the dataset in memory\r\n"],
    "busy": [LOADED, b"-BUSY Redis is busy running a script.\r\n"],
    "moved": [LOADED, b"-MOVED 3999 127.0.0.1:6381\r\n"],
    "html": [b"HTTP/1.1 400 Bad Request\r\n\r\n<html>"],
    "binary": [b"\x00\xff*99999999999999\r\n"],
    "number": [LOADED, b":1\r\n"],
    "null": [LOADED, b"*-1\r\n"],
    "never knows": [LOADED, NEW],
    "stops": [LOADED, NEW, None],
    "too few": [LOADED, NEW, says("done", 1, "1", 1, more=b"\x90")],
    "no results": [LOADED, NEW, says("done", 1, "1", 1, more=b"\xc1")],
}
"""What it says to one command after the other; the last stands for all that follow, an empty one
closes, and None is silence."""


@contextmanager
def served(says: list[bytes | None]) -> Iterator[int]:
    """Serve at the port that is given."""

    class Says(socketserver.BaseRequestHandler):
        def handle(self) -> None:
            turn = 0
            while self.request.recv(1 << 16):
                said = says[min(turn, len(says) - 1)]
                turn += 1
                if said == b"":
                    return
                if said:
                    self.request.sendall(said)

    class Server(socketserver.ThreadingTCPServer):
        daemon_threads = True

        def handle_error(self, *_: object) -> None:
            """Be silent: a connection is aborted here as a rule."""

    with Server(("127.0.0.1", 0), Says) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server.server_address[1]
        server.shutdown()


@pytest.mark.parametrize("case", SAYS)
def test_requests_go_on(tmp_path: Path, case: str) -> None:
    """None waits for longer than a moment, the log has no error, and the process ends at once."""
    proxy = LiveProxy()
    proxy.script = good
    with served(SAYS[case]) as port, proxy.provider:
        text = provider_table("p", url=proxy.provider.url) + route_table("/p", "p")
        text += client_config("c", KEY).replace("[clients.c]", "[clients.c]\nmax_streams = 9")
        text += f'[shared]\nurl = "redis://127.0.0.1:{port}/0"\n'
        with Daemon(tmp_path, text, proxy="") as daemon:
            for turn in range(12):
                with connect(daemon.port) as client:
                    client.send(post(CHAT, BODY, f"x-api-key: {KEY}", "connection: close"))
                    assert read_response(client).status == 200, turn
            if case not in ("nothing", "stops"):
                daemon.wait_log("the shared engine is away")
            until(lambda: not daemon.metrics()["llmproxy_shared_up"], "it does not count as up")
