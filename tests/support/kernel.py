"""What the kernel holds for this process's TCP connections, read from outside their owners.

A test that runs both ends and the program between them in one process sees all their sockets; a
connection is known by its two ports.
"""

from __future__ import annotations

import fcntl
import os
import socket
import struct
import termios
from collections.abc import Iterator
from typing import NamedTuple


class SocketTotals(NamedTuple):
    """What is held for some connections' ends.

    Attributes:
        sockets: how many ends there are.
        received: bytes that arrived so far, read or not.
        unread: those of them that nobody has read.
        written: bytes that were handed to the kernel so far, sent or not.
        unsent: those of them that the peer's kernel has not acknowledged.
    """

    sockets: int
    received: int
    unread: int
    written: int
    unsent: int


NOTHING = SocketTotals(0, 0, 0, 0, 0)


def held(*, local: int = 0, peer: int = 0) -> SocketTotals:
    """Sum up this process's TCP sockets with these ports; 0 is any port."""
    ends: list[SocketTotals] = []
    for sock in _sockets():
        with sock:
            try:
                ours, theirs = sock.getsockname(), sock.getpeername()
                if local not in (0, ours[1]) or peer not in (0, theirs[1]):
                    continue
                ends.append(_read(sock))
            except OSError:
                continue  # it listens, or was closed while we looked
    return SocketTotals(*(sum(figures) for figures in zip(*ends, strict=True))) if ends else NOTHING


def _read(sock: socket.socket) -> SocketTotals:
    unread, unsent = _figure(sock, termios.FIONREAD), _figure(sock, termios.TIOCOUTQ)
    # linux/tcp.h, struct tcp_info: behind 8 bytes, 24 words and 2 longs stand tcpi_bytes_acked and
    # tcpi_bytes_received.
    info = sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 136)
    acked, received = struct.unpack_from("=QQ", info, 120)
    return SocketTotals(1, received, unread, acked + unsent, unsent)


def _sockets() -> Iterator[socket.socket]:
    for name in os.listdir("/proc/self/fd"):
        try:
            if not os.readlink(f"/proc/self/fd/{name}").startswith("socket:"):
                continue
            copy = os.dup(int(name))
        except OSError:
            continue
        sock = socket.socket(fileno=copy)
        if sock.family == socket.AF_INET and sock.type == socket.SOCK_STREAM:
            yield sock
        else:
            sock.close()


def unsent(sock: socket.socket) -> int:
    """Return the bytes that the peer's kernel has not acknowledged."""
    return _figure(sock, termios.TIOCOUTQ)


def _figure(sock: socket.socket, question: int) -> int:
    response = fcntl.ioctl(sock.fileno(), question, b"\0\0\0\0")
    return int(struct.unpack("i", response)[0])
