"""A client's connection that goes on behind CONNECT with the same site: TLS ends here.

A client asks for a tunnel to some host, and gets this proxy instead (``Request.turn_inside``).
What it says first decides how the connection goes on: with TLS, with HTTP in the clear, or not at
all.  From then on requests come as on any other connection; what they may ask for is their
handler's affair, which reads :class:`Inside`.  Nothing is known here of certificates or clients'
keys.

TLS begins on the socket itself where that is possible (``net/tls.py``).  Where bytes came together
with the CONNECT, where the listener has TLS already, and with Twisted's own transports, Twisted's
layer of TLS is put between.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

from OpenSSL import SSL
from twisted.internet.interfaces import IHalfCloseableProtocol
from twisted.internet.protocol import Factory, Protocol, connectionDone
from twisted.protocols.policies import ProtocolWrapper
from twisted.protocols.tls import TLSMemoryBIOFactory, TLSMemoryBIOProtocol
from twisted.python.failure import Failure
from zope.interface import implementer

from llmproxy.net.tcp import DirectServer
from llmproxy.net.tls import begin_tls

_TLS_RECORD = b"\x16\x03"
"""How a client of TLS begins: a handshake record of some TLS (RFC 8446, section 5.1)."""

_HTTP = re.compile(rb"[A-Z]{1,8}(?: |$)|[A-Z]{8}")
"""How a client of HTTP begins, as far as the first bytes show it."""

_DISTRUST = re.compile(r"alert (unknown ca|bad certificate|certificate unknown)")
"""How OpenSSL names the alerts of clients that do not know who signed; Go and Java differ."""

TIMEOUT, SILENT, STRANGE = "tls_timeout", "no_hello", "no_tls"
LEFT, HANDSHAKE = "left", "tls_handshake"
"""Why a connection did not go on, in a word; what a handshake fails of is told in words."""


class Inside:
    """What a client's connection was opened to by CONNECT.

    Args:
        host: the name that was asked for, in lower case.
        port: likewise.
        authorization: the ``Proxy-Authorization`` that names the caller of every request, or None.
        tls: makes the TLS of a connection, as ``ListenerTls`` does.
        ended: called once: with None when requests can come, or with why they cannot, as a word and
            words for the operator.

    Attributes:
        name: what the client asked for in TLS, in lower case; None where it named nothing.
        is_secure: TLS ends here; else the client speaks HTTP in the clear.
    """

    __slots__ = ("_ended", "authorization", "host", "is_secure", "name", "port", "tls")

    def __init__(
        self,
        host: str,
        port: int,
        *,
        authorization: bytes | None,
        tls: Any,
        ended: Callable[[tuple[str, str] | None], object],
    ) -> None:
        self.host = host
        self.port = port
        self.authorization = authorization
        self.tls = tls
        self._ended: Callable[[tuple[str, str] | None], object] | None = ended
        self.name: str | None = None
        self.is_secure = False

    def begin(self, connection: Any, early: bytes) -> None:
        """Wait for what the client says first, of which ``early`` has come."""
        transport = connection.transport
        if early or not isinstance(transport, DirectServer):
            _Hello(self, connection).begin(early)
        else:
            transport.peek(lambda first: self.go_on(connection, first, b""))

    def go_on(self, connection: Any, first: bytes, read: bytes) -> None:
        """Go on as the client begins.

        Args:
            first: what it said first.
            read: as much of it as was read.
        """
        if first.startswith(_TLS_RECORD[: len(first)]):
            self.is_secure = True
            if read or not isinstance(connection.transport, DirectServer):
                connection.transport.unregisterProducer()
                _layer(self.tls, connection).dataReceived(read)
            else:
                begin_tls(connection.transport, self.tls.on_socket)
        elif _HTTP.match(first):
            self.end(None)
            connection.await_request()
            if read:
                connection.dataReceived(read)
        else:
            self.end((STRANGE, "the client spoke neither TLS nor HTTP"))
            connection.abort()

    def shaken(self, tls: Any) -> None:
        """The handshake is done; ``tls`` is OpenSSL's side of it."""
        name = tls.get_servername()
        self.name = None if name is None else name.decode("ascii", "replace").lower()
        self.end(None)

    def late(self) -> None:
        """The client has not said enough in time."""
        if self.is_secure:
            self.end((TIMEOUT, "the client did not finish the TLS handshake in time"))
        else:
            self.end((SILENT, "the client sent nothing behind its CONNECT"))

    def lost(self, reason: Failure) -> None:
        """The connection is gone."""
        if self._ended is None:
            return
        if reason.check(SSL.Error):
            self.end((HANDSHAKE, _failed(reason.getErrorMessage())))
        else:
            self.end((LEFT, reason.getErrorMessage()))

    def end(self, why: tuple[str, str] | None) -> None:
        """Report that requests can come, or why not, unless that is reported already."""
        ended, self._ended = self._ended, None
        if ended is not None:
            ended(why)


def _failed(said: str) -> str:
    """Return what a handshake failed of, for the operator; ``said`` is what OpenSSL says."""
    if (alert := _DISTRUST.search(said)) is None:
        return f"the TLS handshake failed: {said}"
    return (
        f"the client does not trust the certificate (TLS alert: {alert[1]}): "
        "it needs the root of the authority"
    )


@implementer(IHalfCloseableProtocol)
class _Hello(Protocol):
    """Stands in a connection's place until it is known what the client speaks."""

    def __init__(self, inside: Inside, connection: Any) -> None:
        self._inside = inside
        self._connection = connection
        self._below = connection.transport

    def begin(self, early: bytes) -> None:
        """Wait, unless something has come."""
        self._stand_in(self)
        if early:
            self.dataReceived(early)

    def dataReceived(self, data: bytes) -> None:
        """Take the first bytes, and let the connection go on."""
        self._stand_in(self._connection)
        self._inside.go_on(self._connection, data[: len(_TLS_RECORD) + 6], data)

    def readConnectionLost(self) -> None:
        """The client has ended its side."""
        self._connection.readConnectionLost()

    def writeConnectionLost(self) -> None:
        """Our side is ended."""
        self._connection.writeConnectionLost()

    def connectionLost(self, reason: Failure = connectionDone) -> None:
        """The client is gone."""
        self._connection.connectionLost(reason)

    def _stand_in(self, protocol: Any) -> None:
        _put_on(self._below, protocol)


class _Layer(TLSMemoryBIOProtocol):
    """Twisted's layer of TLS; one that is aborted sends no close_notify first."""

    transport: Any

    def abortConnection(self) -> None:
        self.transport.abortConnection()
        super().abortConnection()


class _Layers(TLSMemoryBIOFactory):
    protocol = _Layer


def _layer(tls: Any, connection: Any) -> Any:
    """Put a layer of TLS between a connection and its transport, and return it."""
    below = connection.transport
    wrapped = Factory.forProtocol(lambda: connection)
    layer = _Layers(tls, False, wrapped).buildProtocol(below.getPeer())
    _put_on(below, layer)
    layer.makeConnection(below)
    return layer


def _put_on(transport: Any, protocol: Any) -> None:
    """Let a protocol have what comes in on a transport, or on a layer such as Twisted's TLS."""
    if isinstance(transport, ProtocolWrapper):
        transport.wrappedProtocol = protocol
    else:
        transport.protocol = protocol
