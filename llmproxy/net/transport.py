"""What a transport still holds, and whether a quiet connection is still good.

Twisted's transports queue what the kernel does not take, and have no public name for how much that
is.  A proxy must know it: to know a slow client from a stalled one, and to close a connection only
after everything was sent.  The private attributes that are read here are those of
``twisted.internet.abstract.FileDescriptor`` and ``twisted.protocols.tls``;
``tests/net/test_transport.py`` fails when they change.  No provider, client or message is known
here.
"""

from __future__ import annotations

import fcntl
import select
import socket
import sys
from typing import Any

from twisted.protocols.tls import TLSMemoryBIOProtocol

_KEEPALIVE = (
    (socket.TCP_KEEPIDLE, 30),
    (socket.TCP_KEEPINTVL, 10),
    (socket.TCP_KEEPCNT, 3),
)
"""Seconds of silence before a probe, between probes, and how many."""

_MAPPED = "::ffff:"

_SIOCOUTQ = 0x5411
"""linux/sockios.h: bytes in the send queue that the peer has not acknowledged."""

_SIOCOUTQNSD = 0x894B
"""linux/sockios.h: bytes in the send queue that were not sent, for which the peer has no room."""

_NONE = b"\0\0\0\0"
"""None, as the kernel answers both."""

_answer = bytearray(_NONE)
"""What the kernel answers into: with bytes, each call would raise and drop an exception first."""


def host_of(address: Any) -> str | None:
    """Return the host of an address, or None: that of a Unix socket has none.

    A client that comes by IPv4 to a socket of IPv6 has its IPv4 address (RFC 4291, 2.5.5.2), so
    that it is one client on whichever socket it comes.
    """
    host: str | None = getattr(address, "host", None)
    if host is not None and host.startswith(_MAPPED) and "." in host:
        return host.removeprefix(_MAPPED)
    return host


def raw_transport(transport: Any) -> Any:
    """Return the TCP transport at the bottom, below any TLS layer."""
    while (below := getattr(transport, "transport", None)) is not None:
        transport = below
    return transport


def tls_of(transport: Any) -> Any:
    """Return OpenSSL's side of a transport with TLS, ours or Twisted's layer.

    What a layer lacks it takes from the transport below, which may be one of ours with TLS, too.
    """
    is_layer = isinstance(transport, TLSMemoryBIOProtocol)
    ours = None if is_layer else getattr(transport, "tls", None)
    return transport.getHandle() if ours is None else ours


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
    return _ask_kernel(transport, _SIOCOUTQ)


def unsent_bytes(transport: Any) -> int:
    """Return how many bytes the kernel holds that it could not send yet; 0 if closed."""
    return _ask_kernel(transport, _SIOCOUTQNSD)


def has_sent_all(handle: socket.socket) -> bool:
    """Return whether the kernel has sent all that it was given for an open TCP socket."""
    fcntl.ioctl(handle, _SIOCOUTQNSD, _answer)
    return _answer == _NONE


def _ask_kernel(transport: Any, request: int) -> int:
    handle = getattr(raw_transport(transport), "socket", None)
    if not isinstance(handle, socket.socket) or (number := handle.fileno()) < 0:
        return 0
    try:
        fcntl.ioctl(number, request, _answer)
        return int.from_bytes(_answer, sys.byteorder)
    except OSError:
        return 0  # a Unix socket knows nothing that is not sent


def is_quiet(transport: Any) -> bool:
    """Return whether nothing waits to be read: no byte, no end of file, no error.

    An idle connection on which something waits must not be used again: what waits is the peer's end
    of the connection, or bytes that nobody asked for.  What a TLS layer has read and not forwarded
    yet cannot be seen here, but a layer forwards everything within one turn of the reactor.
    """
    raw = raw_transport(transport)
    handle = getattr(raw, "socket", None)
    if handle is None or raw.disconnecting or handle.fileno() < 0:
        return False
    watch: Any = getattr(raw, "watch", None)
    if watch is None:
        watch = raw.watch = select.poll()  # its next look costs a third of making another
        watch.register(handle.fileno(), select.POLLIN)
    return not watch.poll(0)


def has_peer_left(transport: Any) -> bool:
    """Return whether the peer has ended or reset its side, also behind bytes that were not read."""
    handle = getattr(raw_transport(transport), "socket", None)
    if handle is None or handle.fileno() < 0:
        return True
    poll = select.poll()
    poll.register(handle.fileno(), select.POLLRDHUP)
    return bool(poll.poll(0))  # errors and hang-ups are always reported, too


def has_failed(transport: Any) -> bool:
    """Return whether the kernel has found the connection broken, as by a reset."""
    handle = getattr(raw_transport(transport), "socket", None)
    if not isinstance(handle, socket.socket) or handle.fileno() < 0:
        return False
    poll = select.poll()
    poll.register(handle.fileno(), 0)  # errors are always reported, and so are hang-ups
    return any(event & select.POLLERR for _, event in poll.poll(0))


def has_input(handle: socket.socket) -> bool:
    """Return whether something waits at a socket: bytes, an end, an error, or a connection."""
    poll = select.poll()
    poll.register(handle.fileno(), select.POLLIN)
    return bool(poll.poll(0))


def send_at_once(port: Any) -> None:
    """Let no connection that a listening port accepts hold small writes back, if it is of TCP."""
    if port.socket.family in (socket.AF_INET, socket.AF_INET6):
        port.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)


def notice_vanished_peer(transport: Any, user_timeout: float | None = 60.0) -> None:
    """Let the kernel end a connection whose peer is gone without a word.

    A quiet connection is probed after 30 s, and ended after ``user_timeout``, or else a minute.

    Args:
        transport: a connection, or a listening port of TCP, from which its connections inherit it.
        user_timeout: seconds for which what was sent may stay unacknowledged; None for as long as
            the kernel sends it again.  It also ends a connection whose peer acknowledges and takes
            nothing (tcp(7), ``TCP_USER_TIMEOUT``): it must not be shorter than such a peer may do
            so.
    """
    if not isinstance(handle := getattr(transport, "socket", None), socket.socket):
        handle = getattr(raw_transport(transport), "socket", None)
    if isinstance(handle, socket.socket) and handle.family in (socket.AF_INET, socket.AF_INET6):
        handle.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        for option, value in _KEEPALIVE:
            handle.setsockopt(socket.IPPROTO_TCP, option, value)
        if user_timeout is not None:
            milliseconds = min(int(user_timeout * 1000), 2**31 - 1)
            handle.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, milliseconds)
