"""From endpoints to listening sockets: what lies below the connections of a site.

An endpoint is Twisted's.  Added here are a queue that a burst fits into, the kernel's own watch
over clients that vanish, TLS with the listener's certificate, the client's address behind a
balancer (PROXY protocol), and what several processes need that share a port (ADR-0012).  What is
served is not known here.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Iterable, Mapping
from contextlib import suppress
from functools import partial
from typing import Any

from twisted.internet import tcp
from twisted.internet.address import IPv4Address
from twisted.internet.defer import Deferred, maybeDeferred
from twisted.internet.endpoints import AdoptedStreamServerEndpoint, serverFromString
from twisted.internet.interfaces import IAddress
from twisted.internet.protocol import Protocol
from twisted.logger import Logger
from twisted.protocols.tls import TLSMemoryBIOFactory, TLSMemoryBIOProtocol
from twisted.python.failure import Failure

from llmproxy.net.tcp import DirectServer
from llmproxy.net.tls import TlsServer
from llmproxy.net.transport import has_input, notice_vanished_peer, send_at_once
from llmproxy.server.connection_limits import RejectedConnection
from llmproxy.server.proxy_protocol import Proxied, ProxyHeaders
from llmproxy.server.site import Site
from llmproxy.server.tls import ServerTls

_BACKLOG = 4096
"""Connections that wait to be accepted; the kernel cuts it to ``net.core.somaxconn``."""

_ACCEPTS = 4
"""Clients that a port accepts in one turn.

What a client costs comes in the turns that follow: its request, a provider's connection, a record.
If more clients come than can be served, they wait in the kernel's queue, and running streams go on
in turns that stay short.
"""

_REST = 0.1
"""Seconds for which nothing is accepted where accepting failed."""

_CROWD = 1000
"""Connections that are closed in one turn then, where that is all that can be done for them."""

_UNIX_MODE = 0o660
"""Of a Unix socket: Twisted's own lets everybody on the machine connect."""

_log = Logger()

_QUEUED = ("tcp", "tcp6", "unix", "ssl", "tls")


def listen(
    reactor: Any,
    text: str,
    site: Site,
    *,
    tls: ServerTls | None = None,
    direct: bool = True,
    reuse_port: bool = False,
) -> Any:
    """Listen at an endpoint.

    Args:
        text: an endpoint string of Twisted's.
        site: serves the connections.
        tls: ends TLS on them.
        direct: with the transports of ``net/``; else with Twisted's own.
        reuse_port: let other processes bind the same address, where it is one of TCP.

    Returns:
        the listening port.  Its ``given`` is the descriptor that came from systemd, or None; that
        stays open until it is closed by itself.

    Raises:
        OSError: the address cannot be bound, or the socket from systemd cannot be used.
        ValueError: the text is no endpoint, or names a socket that did not come from systemd.
    """
    below = text.removeprefix("haproxy:")
    proxied = below != text
    direct = direct and _is_tcp(below)
    factory: Any = Proxied(site) if proxied else site
    if tls is not None and (proxied or not direct):
        # Where a PROXY header comes first, TLS does not begin with the socket.
        direct, factory = False, _TlsLayer(tls, False, factory)
    elif tls is not None:
        factory = _WithoutResponse(factory)
    if proxied:
        factory = ProxyHeaders(factory)
    ports: list[Any] = []
    failures: list[Failure] = []
    binder = _Sharing(reactor) if reuse_port else reactor
    endpoint = _endpoint(binder, below)
    given: int | None = None
    if isinstance(endpoint, AdoptedStreamServerEndpoint):
        _check_family(text, endpoint)
        # The endpoint closes the descriptor that it gets, and the number may then be another
        # socket's.  So it gets a copy, and a reload can come back to what systemd gave.
        given = endpoint.fileno
        endpoint = AdoptedStreamServerEndpoint(reactor, os.dup(given), endpoint.addressFamily)
    endpoint.listen(factory).addCallbacks(ports.append, failures.append)
    if failures:
        raise OSError(f"{text}: {failures[0].getErrorMessage()}")
    (port,) = ports
    port.given = given
    # Accepted connections inherit it.  No TCP_USER_TIMEOUT: it would also end clients that take
    # little at a time; while something is under way, the connection itself looks (ADR-0008).
    notice_vanished_peer(port, None)
    send_at_once(port)
    if direct:
        # Not below Twisted's TLS layer: it writes a close_notify when it aborts, which must not
        # leave.
        port.transport = DirectServer if tls is None else partial(TlsServer, tls.on_socket)
        if port.addressFamily == socket.AF_INET:
            _accept_directly(port, reactor)
    _accept_patiently(port, reactor)
    return port


def is_inherited(text: str) -> bool:
    """Return whether an endpoint is a socket that systemd has opened and keeps."""
    return text.removeprefix("haproxy:").partition(":")[0] == "systemd"


def share(port: Any, text: str, *, reuse_port: bool) -> None:
    """Let other processes bind a port's address from now on, or no more, where it is one of TCP."""
    if text.removeprefix("haproxy:").partition(":")[0] in ("tcp", "tcp6"):
        port.socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, reuse_port)


def close(port: Any, *, inherited: bool) -> Deferred[Any]:
    """Stop listening.

    Clients that wait in the queue of a socket of our own are accepted first, and once more right
    before Twisted closes the socket in the next turn: the kernel would reset them.  A socket that
    systemd opened stays open, and its queue waits for the other processes.

    Returns:
        fires when the socket is closed here.
    """
    if not inherited and port.connected:
        _empty(port)
        lose = port.connectionLost

        def lose_last(reason: Failure) -> None:
            _empty(port)
            lose(reason)

        port.connectionLost = lose_last
    return maybeDeferred(port.stopListening)


def _empty(port: Any) -> None:
    """Accept whoever waits in a port's queue."""
    most = port.sessionno + _BACKLOG
    while port.sessionno < most and has_input(port.socket):
        before = port.sessionno
        port.doRead()
        if port.sessionno == before:
            break


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
    """Refuse a socket from systemd that is of another family than the endpoint says.

    On most machines ``ListenStream=8080`` is of IPv6.  If it is taken for one of IPv4, its clients'
    addresses are misread.
    """
    with socket.socket(fileno=os.dup(endpoint.fileno)) as found:
        if found.family != endpoint.addressFamily:
            said = found.family.name.removeprefix("AF_")
            raise OSError(f"{text}: the socket from systemd is of another family: domain={said}")


def _is_tcp(text: str) -> bool:
    """Return whether an endpoint's connections are TCP's, with nothing of Twisted's above."""
    kind = text.partition(":")[0]
    return kind in ("tcp", "tcp6") or (kind == "systemd" and "domain=UNIX" not in text)


def _accept_directly(port: Any, reactor: Any) -> None:
    """Let ``port`` accept without a logger and a generator for each time that it is called.

    What goes wrong is left to Twisted's own, which meets it again.  ``_accept`` is private to
    CPython's ``socket``, whose ``accept`` makes two members of enumerations for each connection.
    """
    accept = port.doRead

    def accept_directly() -> Any:
        listener, most, accepted = port.socket, port.numberAccepts, 0
        while accepted < most:
            try:
                number, address = listener._accept()
            except BlockingIOError:
                break
            except OSError:
                return accept()
            accepted += 1
            handle = socket.socket(socket.AF_INET, socket.SOCK_STREAM, 0, number)
            _begin(port, reactor, handle, address)
        return None

    port.doRead = accept_directly


def _begin(port: Any, reactor: Any, handle: socket.socket, address: Any) -> None:
    """Let the port's factory serve a connection that was accepted."""
    drop = handle.close
    number, port.sessionno = port.sessionno, port.sessionno + 1
    try:
        protocol = port.factory.buildProtocol(IPv4Address("TCP", *address))
        transport = port.transport(handle, protocol, address, port, number, reactor)
        drop = transport.abortConnection
        protocol.makeConnection(transport)
    except Exception:
        _log.failure("a connection could not be begun")
        drop()


def _accept_patiently(port: Any, reactor: Any) -> None:
    """Let ``port`` rest where it cannot accept: epoll would report the same connection at once.

    Twisted keeps one descriptor in reserve for that.  Without it, and where the kernel lacks
    something else, it only logs.  If another process was faster, there is no reason to rest.
    """
    accept = port.doRead
    port.numberAccepts = _ACCEPTS

    def accept_or_rest() -> Any:
        accepted = port.sessionno
        why = accept()
        port.numberAccepts = _ACCEPTS
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
    kind = text.partition(":")[0]
    if kind in _QUEUED and ":backlog=" not in text:
        text += f":backlog={_BACKLOG}"
    if kind == "unix" and ":mode=" not in text:
        text += f":mode={_UNIX_MODE:o}"
    try:
        return serverFromString(reactor, text)
    except Exception as error:
        if is_inherited(text) and isinstance(error, LookupError):
            raise ValueError(
                f"{text}: systemd handed over no such socket, {_handed_over()}"
            ) from error
        raise ValueError(f"{text}: not an endpoint: {type(error).__name__}: {error}") from error


def unclaimed(texts: Iterable[str], environ: Mapping[str, str], *, pid: int) -> list[str]:
    """Return the names of sockets that systemd handed to this process, and that no endpoint names.

    Args:
        texts: the endpoints of the configuration.
        environ: where systemd says what it handed over, and to whom; Twisted may have taken
            ``LISTEN_PID`` away by now.
        pid: this process's number.
    """
    if environ.get("LISTEN_PID", str(pid)) != str(pid):
        return []
    inherited = [text for text in texts if is_inherited(text)]
    if any(":index=" in text for text in inherited):
        return []  # whatever its name is
    claimed = {part for text in inherited for part in text.split(":")}
    names = environ.get("LISTEN_FDNAMES", "").split(":")
    return [name for name in names if name and f"name={name}" not in claimed]


def _handed_over() -> str:
    """Return what systemd handed over, in words (sd_listen_fds(3))."""
    if "LISTEN_PID" in os.environ:  # Twisted takes it away where it was for us
        return "and LISTEN_PID is another process's"
    names = os.environ.get("LISTEN_FDNAMES")
    if names:
        return f"but {names.replace(':', ', ')}: FileDescriptorName= of the .socket unit names it"
    return "and LISTEN_FDNAMES is not set: start it with the .socket unit (Sockets= in the service)"


class _WithoutResponse(Proxied):
    """A connection that is rejected at a TLS listener is not worth a handshake."""

    def buildProtocol(self, addr: IAddress | None) -> Protocol:
        protocol = self._site.buildProtocol(addr)
        return protocol.without_response() if isinstance(protocol, RejectedConnection) else protocol


class _TlsLayer(TLSMemoryBIOFactory):
    """TLS between the socket and the site; a rejected connection is not worth a handshake."""

    def buildProtocol(self, addr: IAddress | None) -> Any:
        inner = self.wrappedFactory.buildProtocol(addr)
        if isinstance(inner, RejectedConnection):
            return inner.without_response()
        return TLSMemoryBIOProtocol(self, inner)
