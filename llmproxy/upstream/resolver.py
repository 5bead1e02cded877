"""From a provider's name to its addresses: one lookup for all requests that wait for the name.

``getaddrinfo`` blocks a thread for as long as a resolver is silent, and Twisted shares a few
threads among everything.  Here each name has at most one lookup under way, on a thread of its own.
So a name that hangs delays no other name, and there are never more threads than names in the
configuration.  Addresses are kept for a short time (ADR-0006).
"""

from __future__ import annotations

import errno
import os
import socket
import threading
from collections.abc import Callable, Sequence
from typing import Any

from twisted.internet._resolver import HostResolution
from twisted.internet.address import IPv4Address, IPv6Address
from twisted.internet.interfaces import (
    IAddress,
    IHostnameResolver,
    IHostResolution,
    IReactorPluggableNameResolver,
    IResolutionReceiver,
)
from zope.interface import directlyProvides, implementer, providedBy

KEPT = 10.0
"""Seconds for which found addresses are used again; then a provider may have moved."""

NO_MORE = (errno.EMFILE, errno.ENFILE, errno.EBUSY)
"""What the lack of descriptors is called; ``getaddrinfo`` says EBUSY where nsswitch asks mdns."""

_Lookup = Callable[..., list[Any]]


@implementer(IHostnameResolver)
class Resolver:
    """Resolves names for connections to providers.

    Args:
        reactor: delivers what the threads find.
        clock: monotonic seconds.
        getaddrinfo: looks a name up, and blocks.

    Attributes:
        failures: the error of the last lookup by name, where it failed.
    """

    def __init__(
        self,
        reactor: Any,
        clock: Callable[[], float],
        *,
        getaddrinfo: _Lookup = socket.getaddrinfo,
    ) -> None:
        self._reactor = reactor
        self._clock = clock
        self._getaddrinfo = getaddrinfo
        self._kept: dict[str, tuple[float, list[Any]]] = {}
        self._waiting: dict[str, list[tuple[IResolutionReceiver, int]]] = {}
        self.failures: dict[str, Exception] = {}

    def resolveHostName(
        self,
        resolutionReceiver: IResolutionReceiver,  # noqa: N803 - IHostnameResolver's name
        hostName: str,  # noqa: N803 - as above
        portNumber: int = 0,  # noqa: N803 - as above
        addressTypes: Sequence[type[IAddress]] | None = None,  # noqa: N803 - as above
        transportSemantics: str = "TCP",  # noqa: N803 - as above
    ) -> IHostResolution:
        """Deliver every address of ``hostName`` for TCP; none where the lookup failed."""
        resolution = HostResolution(hostName)
        resolutionReceiver.resolutionBegan(resolution)
        kept = self._kept.get(hostName)
        if kept is not None and self._clock() - kept[0] < KEPT:
            _deliver(kept[1], resolutionReceiver, portNumber)
            return resolution
        waiting = self._waiting.get(hostName)
        if waiting is None:
            self._waiting[hostName] = [(resolutionReceiver, portNumber)]
            self._look_up(hostName)
        else:
            waiting.append((resolutionReceiver, portNumber))
        return resolution

    def forget(self, receiver: IResolutionReceiver) -> None:
        """Deliver nothing more to ``receiver``; its request was cancelled."""
        for waiting in self._waiting.values():
            waiting[:] = [row for row in waiting if row[0] is not receiver]

    def _look_up(self, name: str) -> None:
        # A daemon thread: one that hangs in the resolver must not keep the process from ending.
        asking = threading.Thread(target=self._ask, args=(name,), name="name", daemon=True)
        try:
            asking.start()
        except RuntimeError as error:  # no more threads: this request fails, the next asks again
            self._found(name, [], error)

    def _ask(self, name: str) -> None:
        """On a thread: look the name up, and give the result to the reactor."""
        rows: list[Any] = []
        error: Exception | None = None
        try:
            rows = self._getaddrinfo(name, 0, socket.AF_UNSPEC, socket.SOCK_STREAM)
        except Exception as problem:
            error = _no_descriptor() or problem
        self._reactor.callFromThread(self._found, name, rows, error)

    def _found(self, name: str, rows: list[Any], error: Exception | None) -> None:
        if error is None:
            self._kept[name] = self._clock(), rows
            self.failures.pop(name, None)
        else:
            self.failures[name] = error
        for receiver, port in self._waiting.pop(name):
            _deliver(rows, receiver, port)


def _no_descriptor() -> OSError | None:
    """Return why no file can be opened now, where it is for want of descriptors.

    A lookup opens files and sockets.  Where it cannot, C libraries and their modules say that the
    name is not known, that they are busy, or that somebody should try again.
    """
    try:
        os.close(os.open(os.devnull, os.O_RDONLY))
    except OSError as error:
        return error if error.errno in NO_MORE else None
    return None


def _deliver(rows: list[Any], receiver: IResolutionReceiver, port: int) -> None:
    for family, _, _, _, address in rows:
        kind = {socket.AF_INET: IPv4Address, socket.AF_INET6: IPv6Address}.get(family)
        if kind is not None:
            host, _, *rest = address
            receiver.addressResolved(kind("TCP", host, port, *rest))
    receiver.resolutionComplete()


class ReactorWithResolver:
    """A reactor as an endpoint wants one for one connection: with a resolver of its own, and ours.

    Args:
        reactor: does everything else.
        resolver: resolves.
        connector: makes what connects; None leaves that to the reactor.
    """

    def __init__(
        self, reactor: Any, resolver: Resolver, connector: Callable[..., Any] | None = None
    ) -> None:
        self._reactor = reactor
        self._resolver = resolver
        self._connector = connector
        self._receiver: IResolutionReceiver | None = None
        self.nameResolver = self
        directlyProvides(self, providedBy(reactor), IReactorPluggableNameResolver)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._reactor, name)

    def connectTCP(
        self,
        host: str,
        port: int,
        factory: Any,
        timeout: float = 30,
        bindAddress: Any = None,  # noqa: N803 - IReactorTCP's name
    ) -> Any:
        """Connect, with a transport of ours (``net/``)."""
        if self._connector is None:
            return self._reactor.connectTCP(host, port, factory, timeout, bindAddress)
        connector = self._connector(host, port, factory, timeout, bindAddress, self._reactor)
        connector.connect()
        return connector

    def resolveHostName(
        self,
        resolutionReceiver: IResolutionReceiver,  # noqa: N803 - IHostnameResolver's name
        *args: Any,
        **kwargs: Any,
    ) -> IHostResolution:
        """Resolve, and keep the receiver: a cancelled endpoint does not report that it is."""
        self._receiver = resolutionReceiver
        return self._resolver.resolveHostName(resolutionReceiver, *args, **kwargs)

    def forget(self) -> None:
        """The request for this name has ended."""
        if self._receiver is not None:
            self._resolver.forget(self._receiver)
