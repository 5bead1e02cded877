"""From endpoints to listening sockets: what lies below a site's connections.

An endpoint is Twisted's; added here are a queue that a burst fits into, the kernel's own watch over
clients that vanish, TLS with the listener's certificate, and whose address counts where a balancer
stands before us (PROXY protocol).
"""

from __future__ import annotations

import os
from contextlib import suppress
from functools import partial
from typing import Any

from twisted.internet import tcp
from twisted.internet.endpoints import serverFromString
from twisted.internet.interfaces import IAddress
from twisted.internet.protocol import Protocol
from twisted.protocols.tls import TLSMemoryBIOFactory, TLSMemoryBIOProtocol
from twisted.python.failure import Failure

from llmproxy.front.balancer import Proxied, ProxyHeaders
from llmproxy.front.door import TurnedAway
from llmproxy.front.http import Site
from llmproxy.front.tls import ListenerTls
from llmproxy.wire.direct import DirectServer
from llmproxy.wire.secure import SecureServer
from llmproxy.wire.transport import has_input, notice_vanished_peer

_BACKLOG = 4096
"""Connections that wait to be accepted; the kernel cuts it to ``net.core.somaxconn``."""

_REST = 0.1
"""Seconds for which nothing is accepted where accepting failed."""

_CROWD = 1000
"""Connections that are closed in one turn then, where that is all that can be done for them."""

_QUEUED = ("tcp", "tcp6", "unix", "ssl", "tls")


def listen(
    reactor: Any,
    text: str,
    site: Site,
    *,
    tls: ListenerTls | None = None,
    direct: bool = True,
) -> Any:
    """Listen at an endpoint.

    Args:
        text: an endpoint string of Twisted's.
        site: serves the connections.
        tls: ends TLS on them.
        direct: with the transports of ``wire/``; else with Twisted's own.

    Returns:
        the listening port.

    Raises:
        OSError: the address cannot be bound.
        ValueError: the text is no endpoint.
    """
    below = text.removeprefix("haproxy:")
    proxied = below != text
    direct = direct and _is_tcp(below)
    factory: Any = Proxied(site) if proxied else site
    if tls is not None and (proxied or not direct):
        # Where a PROXY header comes first, TLS does not begin with the socket.
        direct, factory = False, _TlsLayer(tls, False, factory)
    elif tls is not None:
        factory = _Wordless(factory)
    if proxied:
        factory = ProxyHeaders(factory)
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
    if direct:
        # Not below Twisted's TLS layer, which writes a farewell when it aborts: it must not leave.
        port.transport = DirectServer if tls is None else partial(SecureServer, tls.on_socket)
    return port


def _is_tcp(text: str) -> bool:
    """Tell whether an endpoint's connections are TCP's, with nothing of Twisted's above."""
    kind = text.partition(":")[0]
    return kind in ("tcp", "tcp6") or (kind == "systemd" and "domain=UNIX" not in text)


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


class _Wordless(Proxied):
    """Who is turned away from a TLS listener is not worth a handshake."""

    def buildProtocol(self, addr: IAddress | None) -> Protocol:
        protocol = self._site.buildProtocol(addr)
        return protocol.without_a_word() if isinstance(protocol, TurnedAway) else protocol


class _TlsLayer(TLSMemoryBIOFactory):
    """TLS between the socket and the site; who is turned away is not worth a handshake."""

    def buildProtocol(self, addr: IAddress | None) -> Any:
        inner = self.wrappedFactory.buildProtocol(addr)
        if isinstance(inner, TurnedAway):
            return inner.without_a_word()
        return TLSMemoryBIOProtocol(self, inner)
