"""WebSocket handshakes: what a client must say, what is sent on, and what proves the response.

A handshake is a request like any other, but for four things (RFC 6455, section 4): its fields must
be these, the provider gets ``Upgrade`` and ``Connection`` on purpose, the 101 is proved by
``Sec-WebSocket-Accept``, and browsers, which cannot set header fields, put the caller's key into
the list of subprotocols.  ``Sec-WebSocket-Key``, ``-Version``, ``-Extensions`` and ``-Protocol``
cross as they came, so that proof and compression are end to end (ADR-0032).  Nothing here knows
frames, sockets, clients or providers.
"""

from __future__ import annotations

import base64
import hashlib
import re

import msgspec

from llmproxy.errors import ProxyError, upstream_protocol
from llmproxy.http1.grammar import Fields, field_values, list_tokens
from llmproxy.http1.headers import nominated

EXTENSIONS = b"sec-websocket-extensions"

UPGRADE: Fields = [(b"upgrade", b"websocket"), (b"connection", b"Upgrade")]
"""What a handshake and a 101 say beside their other fields."""

USE_HTTP = ((b"upgrade", b"HTTP/1.1"), (b"connection", b"upgrade"))
"""What a 426 must say (RFC 9110, section 15.5.22); clients then use HTTP at once."""

_KEY, _VERSION, _PROTOCOL, _ACCEPT = (
    *(b"sec-websocket-key", b"sec-websocket-version", b"sec-websocket-protocol"),
    b"sec-websocket-accept",
)
_WANTED = b"13"
_GUID = b"258EAFA5-E914-47DA-95CA-C5AB0DC85B11"
"""What a server adds to the key before it hashes it (RFC 6455, section 1.3)."""

_is_key = re.compile(rb"[A-Za-z0-9+/]{21}[AQgw]==").fullmatch
"""16 bytes in base64."""

_REALTIME = b"realtime"
_MEANT = {
    b"openai-insecure-api-key.": (b"authorization", b"Bearer %b"),
    b"openai-organization.": (b"openai-organization", b"%b"),
    b"openai-project.": (b"openai-project", b"%b"),
}
"""Subprotocols of OpenAI's that stand for header fields, by how they begin."""


class Handshake(msgspec.Struct, frozen=True):
    """A client's handshake.

    Attributes:
        fields: the request's, with header fields in the place of the subprotocols that mean them.
        key: the client's, in base64.
        protocols: the subprotocols that are offered to the provider.
    """

    fields: Fields
    key: bytes
    protocols: tuple[bytes, ...]

    def prove(self, fields: Fields) -> None:
        """Check that a 101 is the response to this handshake.

        Raises:
            ProxyError: 502, ``upstream_protocol``.
        """
        upgraded = list_tokens(field_values(fields, b"upgrade"))
        if upgraded != [b"websocket"] or b"upgrade" not in nominated(fields):
            raise upstream_protocol("a 101 that does not switch to WebSocket")
        if field_values(fields, _ACCEPT) != [accept_of(self.key)]:
            raise upstream_protocol("a 101 whose Sec-WebSocket-Accept does not fit the key")

    def subprotocol(self, fields: Fields) -> Fields:
        """Return the subprotocol that the client gets beside those fields of a 101.

        A browser that offers some fails without one.
        """
        if _REALTIME in self.protocols and not field_values(fields, _PROTOCOL):
            return [(_PROTOCOL, _REALTIME)]
        return []


def is_handshake(fields: Fields, version: bytes) -> bool:
    """Return whether a request asks for WebSocket (RFC 9110, section 7.8; RFC 6455, 4.1)."""
    if version != b"HTTP/1.1" or b"upgrade" not in nominated(fields):
        return False
    asked = list_tokens(field_values(fields, b"upgrade"))
    return any(protocol.partition(b"/")[0] == b"websocket" for protocol in asked)


def read_handshake(method: bytes, fields: Fields, *, has_body: bool) -> Handshake:
    """Return the handshake that a request is.

    Raises:
        ProxyError: 426, where it is of another version of the protocol; 400, where it is none.
    """
    if method != b"GET" or has_body:
        raise _bad("A WebSocket handshake is a GET without a body.")
    versions = field_values(fields, _VERSION)
    if versions != [_WANTED]:
        text = "WebSockets are served in version 13 of their protocol."
        wanted = (*UPGRADE, (_VERSION, _WANTED))
        raise ProxyError(426, "websocket_version", text, fields=wanted)
    keys = field_values(fields, _KEY)
    if len(keys) != 1 or not _is_key(keys[0]):
        raise _bad("A WebSocket handshake has one Sec-WebSocket-Key, of 16 bytes in base64.")
    protocols = [
        token.strip(b" \t")
        for value in field_values(fields, _PROTOCOL)
        for token in value.split(b",")
    ]
    meant = [field for token in protocols if (field := _field_of(token)) is not None]
    if meant:
        protocols = [token for token in protocols if _field_of(token) is None]
        fields = [field for field in fields if field[0] != _PROTOCOL]
        if protocols:
            fields.append((_PROTOCOL, b", ".join(protocols)))
        fields += meant
    return Handshake(fields, keys[0], tuple(protocols))


def accept_of(key: bytes) -> bytes:
    """Return what proves that a server has read the handshake with this key."""
    return base64.b64encode(hashlib.sha1(key + _GUID, usedforsecurity=False).digest())


def _field_of(token: bytes) -> tuple[bytes, bytes] | None:
    """Return the header field that a subprotocol stands for, or None."""
    for prefix, (name, value) in _MEANT.items():
        if token.startswith(prefix):
            return name, value % token.removeprefix(prefix)
    return None


def _bad(text: str) -> ProxyError:
    return ProxyError(400, "websocket", text)
