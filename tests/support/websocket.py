"""WebSockets on raw sockets for tests: handshakes, frames, and what a played provider does."""

from __future__ import annotations

import base64
import hashlib
from typing import NamedTuple

from tests.support.live_proxy import Response, read_response
from tests.support.sockets import Received, Wire, request

KEY = "dGhlIHNhbXBsZSBub25jZQ=="  # of RFC 6455, section 1.3
ACCEPT = "s3pPLMBiTxaQ9kYGzzhZRbK+xOo="

TEXT, BINARY, CLOSE, PING, PONG = 1, 2, 8, 9, 10


class Frame(NamedTuple):
    """A frame as it came."""

    fin: bool
    opcode: int
    payload: bytes
    rsv: int = 0
    masked: bool = False


def handshake(target: str = "/p", *fields: str, key: str = KEY, version: str = "13") -> bytes:
    """Return a handshake as it goes on the wire."""
    usual = ("Upgrade: websocket", "Connection: Upgrade", f"Sec-WebSocket-Version: {version}")
    return request("GET", target, *usual, f"Sec-WebSocket-Key: {key}", *fields)


def accept_of(key: bytes) -> bytes:
    """Return what proves that the handshake was read."""
    digest = hashlib.sha1(key + b"258EAFA5-E914-47DA-95CA-C5AB0DC85B11", usedforsecurity=False)
    return base64.b64encode(digest.digest())


def switch(asked: Received, *fields: bytes, behind: bytes = b"") -> bytes:
    """Return the 101 for a handshake."""
    (key,) = asked.values(b"sec-websocket-key")
    lines = (
        b"HTTP/1.1 101 Switching Protocols",
        *(b"Upgrade: websocket", b"Connection: Upgrade", b"Sec-WebSocket-Accept: "),
    )
    return (
        b"\r\n".join(lines)
        + accept_of(key)
        + b"".join(b"\r\n" + f for f in fields)
        + (b"\r\n\r\n" + behind)
    )


def frame(
    payload: bytes = b"",
    opcode: int = TEXT,
    *,
    fin: bool = True,
    rsv: int = 0,
    mask: bytes = b"",
) -> bytes:
    """Return a frame as it goes on the wire; ``mask`` is four bytes, or none."""
    first, bit, size = (0x80 if fin else 0) | rsv << 4 | opcode, 0x80 if mask else 0, len(payload)
    if size < 126:
        lengths = bytes((bit | size,))
    elif size < 65536:
        lengths = bytes((bit | 126,)) + size.to_bytes(2, "big")
    else:
        lengths = bytes((bit | 127,)) + size.to_bytes(8, "big")
    if mask:
        payload = bytes(byte ^ mask[at % 4] for at, byte in enumerate(payload))
    return bytes((first,)) + lengths + mask + payload


def close(code: int | None = 1000, words: bytes = b"", *, mask: bytes = b"") -> bytes:
    """Return a close frame."""
    payload = b"" if code is None else code.to_bytes(2, "big") + words
    return frame(payload, CLOSE, mask=mask)


def read_frame(wire: Wire) -> Frame:
    """Take one frame."""
    first, second = wire.read(2)
    size = second & 0x7F
    if size > 125:
        size = int.from_bytes(wire.read(2 if size == 126 else 8), "big")
    mask = wire.read(4) if second & 0x80 else b""
    payload = wire.read(size)
    if mask:
        payload = bytes(byte ^ mask[at % 4] for at, byte in enumerate(payload))
    return Frame(bool(first & 0x80), first & 15, payload, first >> 4 & 7, bool(mask))


def read_switch(wire: Wire) -> Response:
    """Take the 101."""
    first, fields = wire.read_head()
    assert first == b"HTTP/1.1 101 Switching Protocols", (first, fields)
    return Response(101, fields, b"")


def ask(wire: Wire, sent: bytes) -> Response:
    """Send a handshake; return the response to it, whatever it is."""
    wire.send(sent)
    head = wire.read_until(b"\r\n\r\n")
    wire.buffer = head + wire.buffer
    return read_switch(wire) if head.startswith(b"HTTP/1.1 101") else read_response(wire)
