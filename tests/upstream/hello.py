"""A TLS ClientHello, read as far as the tests ask (RFC 8446, section 4.1.2)."""

from __future__ import annotations

import struct
from typing import NamedTuple

SNI, ALPN, VERSIONS = 0, 16, 43


class Hello(NamedTuple):
    """What a client offers.

    Attributes:
        name: the server's name, or None.
        protocols: what ALPN offers, in order.
        versions: the TLS versions, as in ``0x0304``.
    """

    name: bytes | None
    protocols: list[bytes]
    versions: set[int]


def read_hello(data: bytes) -> Hello:
    """Read the first record of a connection."""
    assert data[0] == 22, "a handshake record"
    assert data[5] == 1, "a ClientHello"
    at = 5 + 4 + 2 + 32
    at += 1 + data[at]  # session id
    at += 2 + _short(data, at)  # cipher suites
    at += 1 + data[at]  # compression methods
    end = at + 2 + _short(data, at)
    at += 2
    found: dict[int, bytes] = {}
    while at < end:
        size = _short(data, at + 2)
        found[_short(data, at)] = data[at + 4 : at + 4 + size]
        at += 4 + size
    versions = found[VERSIONS][1:]
    return Hello(
        found[SNI][5:] if SNI in found else None,
        _protocols(found.get(ALPN, b"\0\0")[2:]),
        {_short(versions, place) for place in range(0, len(versions), 2)},
    )


def _short(data: bytes, at: int) -> int:
    return int(struct.unpack_from("!H", data, at)[0])


def _protocols(data: bytes) -> list[bytes]:
    resolver = []
    while data:
        resolver.append(data[1 : 1 + data[0]])
        data = data[1 + data[0] :]
    return resolver
