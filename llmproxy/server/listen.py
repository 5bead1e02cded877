"""From endpoints to listening sockets: what lies below a site's connections.

An endpoint is Twisted's; added here are a queue that a burst fits into, the kernel's own watch over
clients that vanish, TLS with the listener's certificate, whose address counts where a balancer
stands before us (PROXY protocol), and what several processes need that share a port (ADR-0012).
"""

from __future__ import annotations

import os
import socket
from contextlib import suppress
from functools import partial
from typing import Any

from twisted.internet import tcp
from twisted.internet.defer import Deferred, maybeDeferred
from twisted.internet.endpoints import AdoptedStreamServerEndpoint, serverFromString
from twisted.internet.interfaces import IAddress
from twisted.internet.protocol import Protocol
from twisted.protocols.tls import TLSMemoryBIOFactory, TLSMemoryBIOProtocol
from twisted.python.failure import Failure

from llmproxy.net.tcp import DirectServer
from llmproxy.net.tls import TlsServer
from llmproxy.net.transport import has_input, notice_vanished_peer
from llmproxy.server.connection_limits import RejectedConnection
from llmproxy.server.proxy_protocol import Proxied, ProxyHeaders
from llmproxy.server.site import Site
from llmproxy.server.tls import ListenerTls

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
    reuse_port: bool = False,
) -> Any:
    """Listen at an endpoint.

    Args:
        text: an endpoint string of Twisted's.
        site: serves the connections.
        tls: ends TLS on them.
        direct: with the transports of ``wire/``; else with Twisted's own.
        reuse_port: let other processes bind the same address, where it is one of TCP.

    Returns:
        the listening port; its ``given`` is the descriptor that systemd handed over, where it is
        one of those, and stays open until somebody closes that, too.

    Raises:
        OSError: the address cannot be bound, or the socket that systemd handed over not be used.
        ValueError: the text is no endpoint, or one of a socket that systemd did not hand over.
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
    binder = _Sharing(reactor) if reuse_port else reactor
    endpoint = _endpoint(binder, below)
    given: int | None = None
    if isinstance(endpoint, AdoptedStreamServerEndpoint):
        _check_family(text, endpoint)
        # The endpoint closes what it gets, and its number may then be another socket's.  So it gets
        # one of its own, and a reload can come back to what systemd handed over.
        given = endpoint.fileno
        endpoint = AdoptedStreamServerEndpoint(reactor, os.dup(given), endpoint.addressFamily)
    endpoint.listen(factory).addCallbacks(ports.append, failures.append)
    if failures:
        raise OSError(f"{text}: {failures[0].getErrorMessage()}")
    (port,) = ports
    port.given = given
    # Accepted connections inherit it.  No TCP_USER_TIMEOUT: it would end clients that take little
    # at a time, too; for what is under way the channel's own look stands in (ADR-0008).
    notice_vanished_peer(port, None)
    _accept_patiently(port, reactor)
    if direct:
        # Not below Twisted's TLS layer, which writes a farewell when it aborts: it must not leave.
        port.transport = DirectServer if tls is None else partial(TlsServer, tls.on_socket)
    return port


def is_inherited(text: str) -> bool:
    """Tell whether an endpoint is a socket that systemd opened, and keeps."""
    return text.removeprefix("haproxy:").partition(":")[0] == "systemd"


def share(port: Any, text: str, *, reuse_port: bool) -> None:
    """Let other processes bind a port's address from now on, or no more, where it is one of TCP."""
    if text.removeprefix("haproxy:").partition(":")[0] in ("tcp", "tcp6"):
        port.socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, reuse_port)


def close(port: Any, *, inherited: bool) -> Deferred[Any]:
    """Stop listening.

    Whoever waits in the queue of a socket of our own is accepted first: the kernel would reset
    them. A socket that systemd opened stays open, and its queue waits for the other processes.

    Returns:
        fires when the socket is closed here.
    """
    if not inherited and port.connected:
        most = port.sessionno + _BACKLOG
        while port.sessionno < most and has_input(port.socket):
            before = port.sessionno
            port.doRead()
            if port.sessionno == before:
                break
    return maybeDeferred(port.stopListening)


class _Sharing:
    """A reactor whose TCP ports let other processes bind the same address (SO_REUSEPORT)."""

    def __init__(self, reactor: Any) -> None:
        self._reactor = reactor

    def __getattr__(self, name: str) -> Any:
        return getattr(self._reactor, name)

    def listenTCP(self, port: int, factory: Any, backlog: int = 50, interface: str = "") -> Any:
        binding: Any = tcp.makeBinding(interface, port, reuseAddress=True, reusePort=True)
        return self._reactor.listenTCP(binding, factory, backlog, interface)


def _check_family(text: str, endpoint: AdoptedStreamServerEndpoint) -> None:
    """Refuse a socket of systemd's that is not of the family that the endpoint says.

    ``ListenStream=8080`` is one of IPv6 on most machines; as one of IPv4 its clients are misread.
    """
    with socket.socket(fileno=os.dup(endpoint.fileno)) as found:
        if found.family != endpoint.addressFamily:
            said = found.family.name.removeprefix("AF_")
            raise OSError(f"{text}: the socket from systemd is of another family: domain={said}")


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
        if is_inherited(text) and isinstance(error, LookupError):
            raise ValueError(
                f"{text}: systemd handed over no such socket, {_handed_over()}"
            ) from error
        raise ValueError(f"{text}: not an endpoint: {type(error).__name__}: {error}") from error


def _handed_over() -> str:
    """Return what systemd handed over, in words (sd_listen_fds(3))."""
    if "LISTEN_PID" in os.environ:  # Twisted takes it away where it was for us
        return "and LISTEN_PID is another process's"
    names = os.environ.get("LISTEN_FDNAMES")
    if names:
        return f"but {names.replace(':', ', ')}: FileDescriptorName= of the .socket unit names it"
    return "and LISTEN_FDNAMES is not set: start it with the .socket unit (Sockets= in the service)"


class _Wordless(Proxied):
    """Who is turned away from a TLS listener is not worth a handshake."""

    def buildProtocol(self, addr: IAddress | None) -> Protocol:
        protocol = self._site.buildProtocol(addr)
        return protocol.without_response() if isinstance(protocol, RejectedConnection) else protocol


class _TlsLayer(TLSMemoryBIOFactory):
    """TLS between the socket and the site; who is turned away is not worth a handshake."""

    def buildProtocol(self, addr: IAddress | None) -> Any:
        inner = self.wrappedFactory.buildProtocol(addr)
        if isinstance(inner, RejectedConnection):
            return inner.without_response()
        return TLSMemoryBIOProtocol(self, inner)
