"""Parent proxies: one that the test plays, in Python."""

from __future__ import annotations

import contextlib
import queue
import re
import socket
import threading

from tests.support.sockets import WAIT, Provider, Wire

_OPENS = re.compile(rb"HTTP/1\.[01] 2")
ESTABLISHED = b"HTTP/1.1 200 Connection established\r\n\r\n"


class PlayedParent(Provider):
    """A parent proxy that answers a CONNECT as it is told, and relays to loopback behind a 200.

    As squid and tinyproxy do, it ends both sides with a FIN, whichever ended, and however.

    Args:
        answer: to each CONNECT, in pieces that are sent apart.

    Attributes:
        heads: each CONNECT: its first line, and its fields.
    """

    def __init__(self, *answer: bytes) -> None:
        super().__init__(self._relay)
        self.answer = answer or (ESTABLISHED,)
        self.heads: queue.Queue[tuple[bytes, dict[bytes, bytes]]] = queue.Queue()

    def _relay(self, wire: Wire) -> None:
        line, fields = wire.read_head()
        assert len(dict(fields)) == len(fields)
        self.heads.put((line, dict(fields)))
        for piece in self.answer:
            wire.send(piece)
        if not _OPENS.search(b"".join(self.answer)):
            wire.wait_closed()
            return
        port = int(line.split(b" ")[1].rpartition(b":")[2])
        with socket.create_connection(("127.0.0.1", port), WAIT) as far:
            back = threading.Thread(target=_pump, args=(far, wire.sock), daemon=True)
            back.start()
            _pump(wire.sock, far)
            back.join(WAIT)


def _pump(source: socket.socket, sink: socket.socket) -> None:
    """Copy until the source ends; then end both, with a FIN."""
    with contextlib.suppress(OSError):
        while data := source.recv(65536):
            sink.sendall(data)
    for one in (source, sink):
        with contextlib.suppress(OSError):
            one.shutdown(socket.SHUT_RDWR)
