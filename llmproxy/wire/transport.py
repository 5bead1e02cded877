"""What a transport still holds, and whether a quiet connection is still good.

Twisted's transports queue what the kernel does not take, and have no public name for how much that
is; a proxy must know, to tell a slow client from a stalled one and to close a connection only after
everything was sent.  The private attributes that are read here are those of
``twisted.internet.abstract.FileDescriptor`` and ``twisted.protocols.tls``;
``tests/wire/test_transport.py`` fails when they change.  No provider, client or message is known
here.
"""

from __future__ import annotations

import errno
import fcntl
import select
import socket
import struct
from typing import Any

_KEEPALIVE = (
    (socket.TCP_KEEPIDLE, 30),
    (socket.TCP_KEEPINTVL, 10),
    (socket.TCP_KEEPCNT, 3),
    (socket.TCP_USER_TIMEOUT, 60_000),
)
"""Seconds of silence before a probe, between probes, how many; milliseconds for what was sent."""

_SIOCOUTQ = 0x5411
"""linux/sockios.h: bytes in the send queue that the peer has not acknowledged."""


def raw_transport(transport: Any) -> Any:
    """Return the TCP transport at the bottom, below any TLS layer."""
    while (below := getattr(transport, "transport", None)) is not None:
        transport = below
    return transport


def pending_bytes(transport: Any) -> int:
    """Return how many bytes were written but not yet taken by the kernel, TLS layers included."""
    pending = 0
    while (below := getattr(transport, "transport", None)) is not None:
        # TLSMemoryBIOProtocol queues here what OpenSSL does not take; its aggregator joins the
        # small writes of one reactor turn.
        pending += sum(map(len, getattr(transport, "_appSendBuffer", ())))
        joined = getattr(transport, "_aggregator", None)
        pending += sum(map(len, getattr(joined, "_buffer", ())))
        transport = below
    # FileDescriptor: one string that is being sent from an offset, and a list behind it.
    return int(len(transport.dataBuffer) - transport.offset + transport._tempDataLen) + pending


def unacknowledged_bytes(transport: Any) -> int:
    """Return how many bytes the kernel holds that the peer has not acknowledged; 0 if closed."""
    handle = getattr(raw_transport(transport), "socket", None)
    if not isinstance(handle, socket.socket) or handle.fileno() < 0:
        return 0
    answer = fcntl.ioctl(handle.fileno(), _SIOCOUTQ, b"\0\0\0\0")
    return int(struct.unpack("i", answer)[0])


def is_quiet(transport: Any) -> bool:
    """Tell whether nothing waits to be read: no byte, no end of file, no error.

    An idle connection on which something waits must not be used again: it is the peer's end of
    connection, or bytes that nobody asked for.
    """
    handle = getattr(raw_transport(transport), "socket", None)
    if handle is None:
        return False
    try:
        handle.recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT)
    except OSError as error:
        return error.errno in (errno.EAGAIN, errno.EWOULDBLOCK)
    return False


def has_peer_left(transport: Any) -> bool:
    """Tell whether the peer has ended or reset its side, even behind bytes that were not read."""
    handle = getattr(raw_transport(transport), "socket", None)
    if handle is None or handle.fileno() < 0:
        return True
    poll = select.poll()
    poll.register(handle.fileno(), select.POLLRDHUP)
    return bool(poll.poll(0))  # errors and hang-ups are always reported, too


def notice_vanished_peer(transport: Any) -> None:
    """Let the kernel end a connection whose peer is gone without a word.

    A quiet one after a minute (30 s, then three probes), one with bytes under way after 60 s.
    """
    handle = getattr(raw_transport(transport), "socket", None)
    if isinstance(handle, socket.socket) and handle.family in (socket.AF_INET, socket.AF_INET6):
        handle.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        for option, value in _KEEPALIVE:
            handle.setsockopt(socket.IPPROTO_TCP, option, value)
