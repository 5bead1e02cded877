"""From a provider's URL to a connection on which a request may be sent, or to why there is none.

Name lookup and TCP (``host_endpoint.py``) and TLS are one step for the pool.  If a parent proxy is
on the way, its name is looked up, and the tunnel (``tunnel.py``) comes before TLS; the provider's
name is the parent's affair then.  A :class:`Dial` says in which phase it is.  Pools and requests
are not known here.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, Generic, TypeVar, cast

from twisted.internet.defer import CancelledError, Deferred
from twisted.internet.endpoints import wrapClientTLS
from twisted.internet.error import ConnectingCancelledError
from twisted.internet.protocol import Factory
from twisted.protocols.tls import TLSMemoryBIOFactory

from llmproxy.config import ParentProxy, Provider
from llmproxy.errors import ProxyError, upstream_tls
from llmproxy.net.tcp import DirectClient, MadeTransport
from llmproxy.net.tls import TlsClient, begin_tls
from llmproxy.upstream.host_endpoint import HostEndpoint
from llmproxy.upstream.http1 import Connection
from llmproxy.upstream.resolver import Resolver
from llmproxy.upstream.tls import client_options
from llmproxy.upstream.tunnel import Tunnel, connect_request

T = TypeVar("T")


class Dial(Generic[T]):
    """One connection in the making.

    Attributes:
        phase: ``connect`` (the name included) or ``handshake``; with a parent proxy
            ``parent_proxy`` (its name, and TCP to it), then ``tunnel``, then ``handshake``.
        connected: fires with the connection; cancelling it closes whatever is there.  It fails
            with ``ProxyError``.
    """

    def __init__(self) -> None:
        self.phase = "connect"
        self.connected: Deferred[T]

    async def through(
        self, parent: HostEndpoint, request: bytes, make: Callable[[], Tunnel]
    ) -> Tunnel:
        """Connect to a parent proxy and ask it for a tunnel; return that once it is there."""
        self.phase = "parent_proxy"
        tunnel: Tunnel = await parent.connect(make)
        self.phase = "tunnel"
        await tunnel.ask(request)
        return tunnel


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
        url = provider.url
        self._connect_request = (
            None if parent is None else connect_request(url.host, url.port, parent)
        )
        self._tls = client_options(provider)
        self.secure = self._tls is not None
        self._direct = direct
        connector: Callable[[Any, Callable[[], Any]], MadeTransport] | None = None
        wrap: Callable[[Any], Any] | None = None
        if direct and (self._tls is None or parent is not None):
            connector = DirectClient
        elif direct:
            connector = partial(TlsClient, cast(Any, self._tls).on_socket)
        elif self._tls is not None and parent is None:
            wrap = partial(wrapClientTLS, cast(Any, self._tls))
        first = url if parent is None else parent.url
        self._first = HostEndpoint(
            reactor,
            resolver,
            first.host,
            first.port,
            connector=connector,
            wrap=wrap,
            is_parent=parent is not None,
        )
        self._max_head = max_head
        self._became_idle = became_idle
        self._closed = closed

    def connect(self, credential: bytes) -> Dial[Connection]:
        """Begin to connect; ``credential`` keeps the connection apart from others in the pool."""
        dial: Dial[Connection] = Dial()
        dial.connected = Deferred.fromCoroutine(self._open(credential, dial))
        return dial

    def remember(self, connection: Connection) -> None:
        """Keep the connection's TLS session for the next one."""
        if self._tls is not None:
            self._tls.remember(connection.transport)

    async def _open(self, credential: bytes, dial: Dial[Connection]) -> Connection:
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
                connection = await self._first.connect(make)
            else:
                made = partial(Tunnel, self._max_head)
                tunnel = await dial.through(self._first, self._connect_request, made)
                connection = make()
                self._begin(connection, tunnel.transport)
            dial.phase = "handshake"
            await connection.ready
            connection.forget_beginning()
            return connection
        except (CancelledError, ConnectingCancelledError):
            raise CancelledError from None
        except Exception as error:
            raise self._why_not(error, connection) from error

    def _begin(self, connection: Connection, transport: Any) -> None:
        """Let ``connection`` take over an open tunnel, with TLS if the provider's URL has it."""
        if self._tls is None or self._direct:
            if self._tls is not None:
                begin_tls(transport, self._tls.on_socket)
            transport.protocol = connection
            connection.makeConnection(transport)
        else:
            factory = Factory.forProtocol(cast(Any, lambda: connection))
            layers = TLSMemoryBIOFactory(cast(Any, self._tls), True, cast(Any, factory))
            layer = cast(Any, layers.buildProtocol(transport.getPeer()))
            transport.protocol = layer
            layer.makeConnection(transport)

    def _why_not(self, error: Exception, connection: Connection | None) -> ProxyError:
        """Return the error for the way in which connecting failed, on a connection if there was."""
        why = self._first.why_not(error)
        if connection is None or isinstance(error, ProxyError) or why.reason == "no_descriptors":
            return why
        verdict = connection.verdict
        cause = verdict.cause if verdict is not None and verdict.cause else "protocol"
        return upstream_tls(cause, f"{type(error).__name__}: {error}")
