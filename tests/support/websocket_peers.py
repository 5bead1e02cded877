"""A daemon between a client of ``websockets`` and a provider of the same library."""

from __future__ import annotations

import re
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from websockets.http11 import Request, Response
from websockets.sync.client import ClientConnection
from websockets.sync.client import connect as dial
from websockets.sync.server import ServerConnection, serve

from tests.support.daemon import Daemon, provider_table, route_table
from tests.support.live_proxy import client_config, write_credential
from tests.support.scripts import Notes
from tests.support.sockets import WAIT

KEY = "sk-of-team"

Serve = Callable[[ServerConnection], Any]


class Peers:
    """A daemon, and a provider of ``websockets`` behind it.

    Attributes:
        play: what the provider does on each connection.
        seen: the requests that the provider got.
        answer: its answer to a handshake; None lets it switch.
    """

    def __init__(self) -> None:
        self.play: Serve = echo
        self.seen = Notes()
        self.answer: Callable[[ServerConnection, Request], Response | None] = lambda *_: None
        self.daemon: Daemon

    def process(self, connection: ServerConnection, asked: Request) -> Response | None:
        """Note a handshake, and answer it."""
        self.seen.put(asked)
        return self.answer(connection, asked)

    def connect(self, path: str = "/p/v1/realtime", **options: Any) -> ClientConnection:
        """Connect through the daemon."""
        options.setdefault("max_size", None)
        options.setdefault("additional_headers", {"Authorization": f"Bearer {KEY}"})
        uri = f"ws://127.0.0.1:{self.daemon.port}{path}"
        connection: ClientConnection = dial(
            uri, proxy=None, open_timeout=WAIT, close_timeout=WAIT, **options
        )
        return connection

    def memory(self) -> int:
        """Return the most memory that the daemon has held, in bytes."""
        status = Path(f"/proc/{self.daemon.process.pid}/status").read_text()
        found = re.search(r"VmHWM:\s+(\d+) kB", status)
        assert found
        return int(found[1]) * 1024


@contextmanager
def running_peers(
    folder: Path,
    *,
    proxy: str = "",
    config: str = "",
    trace: str = "",
    route: str = "",
    url: str = "",
) -> Iterator[Peers]:
    """Run both.

    Args:
        proxy: keys of ``[proxy]``.
        config: further sections.
        trace: keys of ``[trace]``.
        route: further keys of the route.
        url: the provider's, where it is not ours.
    """
    peers = Peers()
    with running_provider(peers) as own:
        config = (
            trace
            + config
            + (
                write_credential(folder, "provider", "sk-of-provider")
                + provider_table("p", 'credential = "provider"', url=url or own, dialect="openai")
                + route_table("/p", "p", "websocket = true", route)
                + client_config("team", KEY)
            )
        )
        with Daemon(folder, config, proxy=proxy) as peers.daemon:
            yield peers


@contextmanager
def running_provider(peers: Peers) -> Iterator[str]:
    """Run the provider alone; yield its URL."""
    server = serve(
        lambda connection: peers.play(connection),
        "127.0.0.1",
        0,
        process_request=peers.process,
        max_size=None,
        max_queue=1,
        subprotocols=None,
        select_subprotocol=lambda connection, offered: None,
    )
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.socket.getsockname()[1]}"
    finally:
        server.shutdown()
        thread.join(WAIT)


def echo(connection: ServerConnection) -> None:
    """Send each message back."""
    for message in connection:
        connection.send(message)
