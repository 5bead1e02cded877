"""From a provider's URL to a connection on which a request may be sent, or to why there is none.

Name lookup, TCP (to several addresses, ``race.py``) and TLS are one step for the pool.  If a parent
proxy is on the way, its name is looked up, and the tunnel (``tunnel.py``) comes before TLS; the
provider's name is the parent's affair then.  A :class:`Dial` says in which phase it is.  Pools and
requests are not known here.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from socket import AF_INET, AF_INET6
from typing import Any, cast

from twisted.internet.abstract import isIPAddress, isIPv6Address
from twisted.internet.defer import CancelledError, Deferred
from twisted.internet.endpoints import TCP4ClientEndpoint, TCP6ClientEndpoint, wrapClientTLS
from twisted.internet.error import ConnectingCancelledError, DNSLookupError
from twisted.internet.interfaces import IProtocolFactory
from twisted.internet.protocol import Factory
from twisted.protocols.tls import TLSMemoryBIOFactory

from llmproxy.config import ParentProxy, Provider
from llmproxy.errors import ProxyError, no_descriptors, upstream_tls, upstream_unreachable
from llmproxy.net.tcp import DirectConnector
from llmproxy.net.tls import TlsBehindPlain, TlsConnector
from llmproxy.upstream.http1 import Connection
from llmproxy.upstream.race import Address, first_connected, interleaved
from llmproxy.upstream.resolver import NO_MORE, Resolver
from llmproxy.upstream.tls import client_options
from llmproxy.upstream.tunnel import Tunnel, connect_request

_NO_TIMEOUT = cast("float", None)
"""The deadline is the caller's, over all three phases; an endpoint's own would end at TCP."""


class Dial:
    """One connection in the making.

    Attributes:
        phase: ``connect`` (the name included) or ``handshake``; with a parent proxy
            ``parent_proxy`` (its name, and TCP to it), then ``tunnel``, then ``handshake``.
        connected: fires with the :class:`Connection`; cancelling it closes whatever is there.  It
            fails with ``ProxyError``.
    """

    def __init__(self) -> None:
        self.phase = "connect"
        self.connected: Deferred[Connection]


class Dialer:
    """Makes connections to one provider.

    Args:
        reactor: connects and keeps time.
        resolver: resolves the provider's name.
        provider: where to connect, and whom to trust.
        max_head: most bytes of a response's head.
        became_idle: called with a connection on which another request may be sent.
        closed: called with a connection that has ended.
        direct: with the transports of ``net/``; else with Twisted's own.
        parent: the proxy through which the provider is reached, or None.

    Attributes:
        secure: whether connections are made with TLS.
    """

    def __init__(
        self,
        reactor: Any,
        resolver: Resolver,
        provider: Provider,
        *,
        max_head: int,
        became_idle: Callable[[Connection], None],
        closed: Callable[[Connection], None],
        direct: bool = True,
        parent: ParentProxy | None = None,
    ) -> None:
        self._reactor = reactor
        self._resolver = resolver
        first = provider.url if parent is None else parent.url
        self._host, self._port = first.host, first.port
        self._connect_request = None if parent is None else connect_request(provider.url, parent)
        self._tls = client_options(provider)
        self.secure = self._tls is not None
        self._make: Callable[..., Any] | None = None
        if direct and (self._tls is None or parent is not None):
            self._make = DirectConnector
        elif direct:
            self._make = partial(TlsConnector, cast(Any, self._tls).on_socket)
        self._max_head = max_head
        self._became_idle = became_idle
        self._closed = closed

    def connect(self, credential: bytes) -> Dial:
        """Begin to connect; ``credential`` keeps the connection apart from others in the pool."""
        dial = Dial()
        dial.connected = Deferred.fromCoroutine(self._open(credential, dial))
        return dial

    def remember(self, connection: Connection) -> None:
        """Keep the connection's TLS session for the next one."""
        if self._tls is not None:
            self._tls.remember(connection.transport)

    async def _open(self, credential: bytes, dial: Dial) -> Connection:
        def make() -> Connection:
            connection = Connection(
                max_head=self._max_head,
                became_idle=self._became_idle,
                closed=self._closed,
                secure=self._tls is not None,
                tunnelled=self._connect_request is not None,
            )
            connection.pool_key = credential
            return connection

        connection: Connection | None = None
        try:
            if self._connect_request is None:
                connection = connected = await self._reach(make)
                if self._make is not None:
                    connected.transport.protocol = connected  # without the endpoint's wrapper
            else:
                dial.phase = "parent_proxy"
                tunnel = await self._reach(partial(Tunnel, self._max_head))
                dial.phase = "tunnel"
                await tunnel.ask(self._connect_request)
                connection = make()
                self._begin(connection, tunnel.transport)
            dial.phase = "handshake"
            return await connection.ready
        except (CancelledError, ConnectingCancelledError):
            raise CancelledError from None
        except Exception as error:
            raise self._why_not(error, connection) from error

    async def _reach(self, make: Callable[[], Any]) -> Any:
        """Connect to the first host on the way; return the protocol that ``make`` made for it."""
        factory = Factory.forProtocol(cast(Any, make))
        factory.noisy = False
        addresses = await self._addresses()
        attempts = [partial(self._attempt, address, factory) for address in addresses]
        return await first_connected(self._reactor, attempts, _give_up)

    def _begin(self, connection: Connection, transport: Any) -> None:
        """Let ``connection`` take over an open tunnel, with TLS if the provider's URL has it."""
        if self._tls is None:
            transport.protocol = connection
            connection.makeConnection(transport)
        elif self._make is not None:
            TlsBehindPlain(self._tls.on_socket, transport, connection)
        else:
            factory = Factory.forProtocol(cast(Any, lambda: connection))
            layers = TLSMemoryBIOFactory(cast(Any, self._tls), True, cast(Any, factory))
            layer = cast(Any, layers.buildProtocol(transport.getPeer()))
            transport.protocol = layer
            layer.makeConnection(transport)

    async def _addresses(self) -> list[Address]:
        """Return where to connect, in this order.

        Raises:
            DNSLookupError: the name has no address.
        """
        if isIPAddress(self._host):
            return [(AF_INET, self._host)]
        if isIPv6Address(self._host):
            return [(AF_INET6, self._host)]
        addresses = interleaved(await self._resolver.addresses(self._host))
        if not addresses:
            raise DNSLookupError(f"no results for hostname lookup: {self._host}")
        return addresses

    def _attempt(self, address: Address, factory: Any) -> Deferred[Any]:
        """Begin to connect to one address."""
        family, host = address
        kind = TCP4ClientEndpoint if family == AF_INET else TCP6ClientEndpoint
        reactor = self._reactor if self._make is None else _Connecting(self._reactor, self._make)
        endpoint: Any = kind(reactor, host, self._port, _NO_TIMEOUT)
        if self._tls is not None and self._make is None and self._connect_request is None:
            endpoint = wrapClientTLS(cast(Any, self._tls), endpoint)
        return cast("Deferred[Any]", endpoint.connect(cast(IProtocolFactory, factory)))

    def _why_not(self, error: Exception, connection: Connection | None) -> ProxyError:
        """Return the error for the way in which connecting failed, on a connection if there was."""
        if isinstance(error, ProxyError):
            return error  # the parent proxy's refusal
        underlying = None
        if isinstance(error, DNSLookupError):
            underlying = self._resolver.failures.get(self._host)
        for problem in (error, underlying):
            number = getattr(problem, "osError", getattr(problem, "errno", None))
            if number in NO_MORE:
                return no_descriptors()
        detail = f"{type(error).__name__}: {error}"
        if connection is not None:
            verdict = connection.verdict
            cause = verdict.cause if verdict is not None and verdict.cause else "protocol"
            return upstream_tls(cause, detail)
        if underlying is not None:
            detail = f"{detail} ({underlying})"
        if self._connect_request is None:
            return upstream_unreachable(detail)
        return upstream_unreachable(f"parent proxy: {detail}", cause="parent_proxy_unreachable")


def _give_up(connection: Any) -> None:
    connection.abort()


class _Connecting:
    """A reactor as an endpoint wants one, which connects with a transport of ours (``net/``)."""

    def __init__(self, reactor: Any, connector: Callable[..., Any]) -> None:
        self._reactor = reactor
        self._connector = connector

    def connectTCP(
        self,
        host: str,
        port: int,
        factory: Any,
        timeout: float = 30,
        bindAddress: Any = None,  # noqa: N803 - IReactorTCP's name
    ) -> Any:
        """Connect; see ``IReactorTCP``."""
        connector = self._connector(host, port, factory, timeout, bindAddress, self._reactor)
        connector.connect()
        return connector
