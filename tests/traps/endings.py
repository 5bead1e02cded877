"""ClientResponse a response to its end, and saying how it ended."""

from __future__ import annotations

import socket
import ssl
from typing import NamedTuple

from tests.support.sockets import Wire


class Ending(NamedTuple):
    """Everything that a client got behind the head, and what came then.

    Attributes:
        raw: the bytes.
        how: ``fin`` (with close_notify where there is TLS), ``truncated`` (without it),
            ``reset``, or ``open`` where the connection stood still.
    """

    raw: bytes
    how: str

    def chunks(self) -> tuple[bytes, bool]:
        """Return the content of a chunked body, and whether its last chunk was there."""
        content, rest = b"", self.raw
        while b"\r\n" in rest:
            line, _, rest = rest.partition(b"\r\n")
            size = int(line, 16)
            content += rest[:size]
            if size == 0 or len(rest) < size:
                return content, size == 0
            rest = rest[size + 2 :]
        return content, False


_TCP_CLOSE = 7
"""linux/tcp_states.h: nothing is left of the connection, as behind a RST and never behind a FIN."""


def _tcp_state(sock: socket.socket) -> int:
    return sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 1)[0]


def read_ending(wire: Wire, seconds: float) -> Ending:
    """Read until the peer's end, or until nothing comes for so many seconds."""
    wire.sock.settimeout(seconds)
    try:
        while wire.receive():
            pass
        how = "fin"
    except ssl.SSLEOFError:
        # OpenSSL calls a reset by this name, too.
        how = "reset" if _tcp_state(wire.sock) == _TCP_CLOSE else "truncated"
    except ConnectionError:
        how = "reset"
    except TimeoutError:
        how = "open"
    raw, wire.buffer = wire.buffer, b""
    return Ending(raw, how)
