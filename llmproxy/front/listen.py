"""From endpoints to listening sockets: what lies below a site's connections.

An endpoint is Twisted's; added here are a queue that a burst fits into, the kernel's own watch over
clients that vanish, TLS with the listener's certificate, and whose address counts where a balancer
stands before us (PROXY protocol).
"""

from __future__ import annotations

import os
from contextlib import suppress
from typing import Any

from twisted.internet import tcp
from twisted.internet.endpoints import serverFromString
from twisted.internet.interfaces import IAddress
from twisted.internet.protocol import Factory, Protocol
from twisted.protocols.haproxy._info import ProxyInfo
from twisted.protocols.haproxy._v1parser import V1Parser
from twisted.protocols.haproxy._v2parser import V2Parser
from twisted.protocols.haproxy._wrapper import HAProxyProtocolWrapper, HAProxyWrappingFactory
from twisted.protocols.tls import TLSMemoryBIOFactory, TLSMemoryBIOProtocol
from twisted.python.failure import Failure

from llmproxy.front.door import TurnedAway
from llmproxy.front.http import Site
from llmproxy.front.tls import ListenerTls
from llmproxy.wire.transport import has_input, notice_vanished_peer

_BACKLOG = 4096
"""Connections that wait to be accepted; the kernel cuts it to ``net.core.somaxconn``."""

_REST = 0.1
"""Seconds for which nothing is accepted where accepting failed."""

_CROWD = 1000
"""Connections that are closed in one turn then, where that is all that can be done for them."""

_PROXY_START = 16
"""Bytes that Twisted wants at once of a PROXY header (the protocol's text, section 2)."""

_UNKNOWN = b"PROXY UNKNOWN\r\n"

_QUEUED = ("tcp", "tcp6", "unix", "ssl", "tls")


def listen(
    reactor: Any,
    text: str,
    site: Site,
    *,
    tls: ListenerTls | None = None,
) -> Any:
    """Listen at an endpoint.

    Args:
        text: an endpoint string of Twisted's.
        site: serves the connections.
        tls: ends TLS on them.

    Returns:
        the listening port.

    Raises:
        OSError: the address cannot be bound.
        ValueError: the text is no endpoint.
    """
    below = text.removeprefix("haproxy:")
    proxied = below != text
    factory: Any = _Proxied(site) if proxied else site
    if tls is not None:
        factory = _TlsLayer(tls, False, factory)
    if proxied:
        factory = _ProxyHeaders(factory)
    ports: list[Any] = []
    failures: list[Failure] = []
    _endpoint(reactor, below).listen(factory).addCallbacks(ports.append, failures.append)
    if failures:
        raise OSError(f"{text}: {failures[0].getErrorMessage()}")
    (port,) = ports
    # Accepted connections inherit it.  No TCP_USER_TIMEOUT: it would end clients that take little
    # at a time, too; for what is under way the channel's own look stands in (ADR-0008).
    notice_vanished_peer(port, None)
    _accept_patiently(port, reactor)
    return port


def _accept_patiently(port: Any, reactor: Any) -> None:
    """Let ``port`` rest where it cannot accept: epoll would tell of the same connection at once.

    Twisted keeps one descriptor in reserve for that; without it, and where the kernel lacks
    something else, it only logs.  Another process that was faster is no reason to rest.
    """
    accept = port.doRead

    def accept_or_rest() -> Any:
        accepted = port.sessionno
        why = accept()
        if port.sessionno == accepted and port.connected and has_input(port.socket):
            port.numberAccepts = _CROWD
            port.stopReading()
            reactor.callLater(_REST, go_on)
        return why

    def go_on() -> None:
        if port.connected:
            with suppress(OSError):  # the reserve does not come back by itself once it was lost
                os.close(os.dup(port.fileno()))
                tcp._reservedFD.reserve()
            port.startReading()

    port.doRead = accept_or_rest


def _endpoint(reactor: Any, text: str) -> Any:
    if text.partition(":")[0] in _QUEUED and "backlog=" not in text:
        text += f":backlog={_BACKLOG}"
    try:
        return serverFromString(reactor, text)
    except Exception as error:
        raise ValueError(f"{text}: not an endpoint: {type(error).__name__}: {error}") from error


class _Proxied(Factory):
    """Below it the peer is a balancer, whose address says nothing: the client's comes later."""

    noisy = False

    def __init__(self, site: Site) -> None:
        self._site = site

    def doStart(self) -> None:
        self._site.doStart()

    def doStop(self) -> None:
        self._site.doStop()

    def buildProtocol(self, addr: IAddress | None) -> Protocol:
        return self._site.buildProtocol(None)


class _ProxyHeader(HAProxyProtocolWrapper):
    """One connection that begins with a PROXY header, of either version, cut anywhere."""

    _start: bytes = b""

    def dataReceived(self, data: bytes) -> None:
        if self._proxyInfo is None and self._parser is None:
            data = self._start = self._start + data
            if _is_undecided(data):
                return
            if data.startswith(_UNKNOWN):  # Twisted knows the long form alone
                self._proxyInfo = ProxyInfo(_UNKNOWN, None, None)
                data = data[len(_UNKNOWN) :]
                if not data:
                    return
        if self._proxyInfo is not None:
            self.wrappedProtocol.dataReceived(data)
            return
        try:
            super().dataReceived(data)
        except ValueError:  # Twisted's parsers let it through where a number or an address is none
            if self._proxyInfo is not None:
                raise  # it is not the header's
            self.loseConnection()


def _is_undecided(data: bytes) -> bool:
    """Tell whether this may become a PROXY header of which there is not enough yet."""
    second = V2Parser.PREFIX.startswith(data[: len(V2Parser.PREFIX)])
    first = V1Parser.PROXYSTR.startswith(data[:5]) and b"\r\n" not in data
    return len(data) < _PROXY_START and (first or second)


class _ProxyHeaders(HAProxyWrappingFactory):
    protocol = _ProxyHeader  # type: ignore[assignment]  # a subclass of what stands there
    noisy = False


class _TlsLayer(TLSMemoryBIOFactory):
    """TLS between the socket and the site; who is turned away is not worth a handshake."""

    def buildProtocol(self, addr: IAddress | None) -> Any:
        inner = self.wrappedFactory.buildProtocol(addr)
        if isinstance(inner, TurnedAway):
            return inner.without_a_word()
        return TLSMemoryBIOProtocol(self, inner)
