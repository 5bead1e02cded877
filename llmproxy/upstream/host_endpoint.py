"""The first phase of every connection: a host's addresses, and TCP to the first that lets us in.

The host is a provider's, a parent proxy's, or one that a caller has chosen for a tunnel.  In the
last case a guard judges each address that was found, and only those that pass are connected to.
The name is looked up once, so that no second lookup can lead elsewhere (ADR-0031).  TLS, tunnels
and pools are not known here.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from socket import AF_INET, AF_INET6
from typing import Any, cast

from twisted.internet.abstract import isIPAddress, isIPv6Address
from twisted.internet.defer import Deferred
from twisted.internet.endpoints import TCP4ClientEndpoint, TCP6ClientEndpoint
from twisted.internet.error import DNSLookupError
from twisted.internet.interfaces import IProtocolFactory
from twisted.internet.protocol import Factory

from llmproxy.errors import (
    ProxyError,
    address_forbidden,
    no_descriptors,
    upstream_unreachable,
)
from llmproxy.net.addresses import Forbidden
from llmproxy.net.tcp import MadeTransport
from llmproxy.upstream.race import Address, first_connected, interleaved
from llmproxy.upstream.resolver import NO_MORE, Resolver

Guard = Callable[[str, int], Forbidden | None]
"""Returns why an address and a port may not be connected to, or None where they may."""

_NO_TIMEOUT = cast("float", None)
"""The deadline is the caller's, over all phases; an endpoint's own would end at TCP."""


class HostEndpoint:
    """A host and a port.

    Args:
        reactor: connects.
        resolver: looks the host's name up.
        host: a name, or an address without brackets.
        port: where it listens.
        connector: makes a transport of ``net/``, of the reactor and what makes its protocol; None
            for Twisted's own.
        wrap: makes of a Twisted endpoint what is connected with instead.
        guard: judges each address; without one every address may be connected to.
        caller: who has chosen the host, for whom the name is looked up.
        is_parent: whether it is a parent proxy, for what an operator reads.
    """

    def __init__(
        self,
        reactor: Any,
        resolver: Resolver,
        host: str,
        port: int,
        *,
        connector: Callable[[Any, Callable[[], Any]], MadeTransport] | None,
        wrap: Callable[[Any], Any] | None = None,
        guard: Guard | None = None,
        caller: str = "",
        is_parent: bool = False,
    ) -> None:
        self._reactor = reactor
        self._connector = connector
        self._resolver = resolver
        self._host, self._port = host, port
        self._wrap = wrap
        self._guard = guard
        self._caller = caller
        self._is_parent = is_parent

    async def connect(self, make: Callable[[], Any]) -> Any:
        """Connect, and return the protocol that ``make`` made for it.

        Raises:
            ProxyError: 403, where the guard lets no address pass.
            Exception: the host cannot be reached, as :meth:`why_not` takes it.
        """
        addresses = self._permitted(await self._addresses())
        attempts = [partial(self._attempt, address, make) for address in addresses]
        return await first_connected(self._reactor, attempts, _give_up)

    async def _addresses(self) -> list[Address]:
        """Return where to connect, in this order.

        Raises:
            DNSLookupError: the name has no address.
        """
        if isIPAddress(self._host):
            return [(AF_INET, self._host)]
        if isIPv6Address(self._host):
            return [(AF_INET6, self._host)]
        addresses = interleaved(await self._resolver.addresses(self._host, self._caller))
        if not addresses:
            raise DNSLookupError(f"no results for hostname lookup: {self._host}")
        return addresses

    def _permitted(self, addresses: list[Address]) -> list[Address]:
        """Return the addresses that the guard lets pass."""
        if self._guard is None:
            return addresses
        judged = [(one, self._guard(one[1], self._port)) for one in addresses]
        permitted = [one for one, forbidden in judged if forbidden is None]
        for (_, address), forbidden in judged:
            if forbidden is not None and not permitted:
                text = f"{self._host} port {self._port} is {address} ({forbidden.kind})"
                raise address_forbidden(forbidden.kind, forbidden.sentence, text)
        return permitted

    def _attempt(self, address: Address, make: Callable[[], Any]) -> Deferred[Any]:
        """Begin to connect to one address."""
        family, host = address
        if self._connector is not None:
            return self._connector(self._reactor, make).connect(family, host, self._port)
        factory = Factory.forProtocol(cast(Any, make))
        factory.noisy = False
        kind = TCP4ClientEndpoint if family == AF_INET else TCP6ClientEndpoint
        endpoint: Any = kind(self._reactor, host, self._port, _NO_TIMEOUT)
        if self._wrap is not None:
            endpoint = self._wrap(endpoint)
        return cast("Deferred[Any]", endpoint.connect(cast(IProtocolFactory, factory)))

    def why_not(self, error: Exception) -> ProxyError:
        """Return the error for the way in which connecting failed."""
        if isinstance(error, ProxyError):
            return error
        underlying = None
        if isinstance(error, DNSLookupError):
            underlying = self._resolver.failures.get(self._host)
        for problem in (error, underlying):
            number = getattr(problem, "osError", getattr(problem, "errno", None))
            if number in NO_MORE:
                return no_descriptors()
        detail = f"{type(error).__name__}: {error}"
        if underlying is not None:
            detail = f"{detail} ({underlying})"
        if not self._is_parent:
            return upstream_unreachable(detail)
        return upstream_unreachable(f"parent proxy: {detail}", cause="parent_proxy_unreachable")


def _give_up(connection: Any) -> None:
    connection.abort()
