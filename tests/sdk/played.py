"""A proxy, and a provider behind it that gives every request the response that a test has set."""

from __future__ import annotations

from dataclasses import dataclass, field

from tests.support.daemon import Daemon
from tests.support.live_proxy import Response, read_response
from tests.support.scripts import LAST
from tests.support.sockets import Received, Wire, chunked, connect


@dataclass
class Played:
    """The proxy, and the provider behind it.

    Attributes:
        response: the whole response to each request; its connection is closed then.
        received: the requests so far, oldest first.
        session: the ``x-session-id`` of this test's requests, by which their record is found.
    """

    response: bytes = b""
    received: list[Received] = field(default_factory=list)
    session: str = ""
    daemon: Daemon = field(init=False)

    def play(self, wire: Wire) -> None:
        """Serve one request; a script for ``tests.support.sockets.Provider``."""
        self.received.append(wire.read_request())
        wire.send(self.response)

    def says(self, body: bytes, kind: str = "application/json; charset=UTF-8") -> None:
        """Respond with a whole body from now on."""
        head = f"HTTP/1.1 200 OK\r\nContent-Type: {kind}\r\nContent-Length: {len(body)}\r\n"
        self.response = head.encode() + b"Connection: close\r\n\r\n" + body

    def streams(self, body: bytes, kind: str = "text/event-stream", last: bytes = LAST) -> None:
        """Respond with a chunk for each line end of a body from now on."""
        head = f"HTTP/1.1 200 OK\r\nContent-Type: {kind}\r\nTransfer-Encoding: chunked\r\n"
        pieces = chunked(*body.splitlines(keepends=True))
        self.response = head.encode() + b"Connection: close\r\n\r\n" + pieces + last

    def get(self, sent: bytes) -> Response:
        """Send one request without the SDK, and return the response."""
        with connect(self.daemon.port) as wire:
            wire.send(sent)
            return read_response(wire)
