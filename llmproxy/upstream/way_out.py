"""The way out for a tunnel: from a host and port that a caller has chosen to an open connection.

The host is resolved here and its address checked (``net/addresses.py``, ADR-0031), or the parent
proxy is asked, which looks the name up itself.  Then only a host that is an address can be checked,
in whatever spelling, before the parent hears of it.

Callers choose the names, so these have a resolver of their own, with bounds: a caller that asks for
names without end delays its own tunnels, and no provider.
"""

from __future__ import annotations

import socket
from collections.abc import Callable
from functools import partial
from typing import Any, cast

from twisted.internet.defer import CancelledError, Deferred
from twisted.internet.error import ConnectingCancelledError
from twisted.internet.protocol import Protocol
from twisted.python.failure import Failure

from llmproxy.config import Config, ParentProxy
from llmproxy.config.host_pattern import as_compared
from llmproxy.config.parent_proxy import DirectHosts
from llmproxy.config.url import host as read_host
from llmproxy.config.values import Wrong
from llmproxy.errors import ProxyError, address_forbidden, upstream_timeout
from llmproxy.net.addresses import AddressGuard, address_of
from llmproxy.net.tcp import DirectClient
from llmproxy.net.transport import notice_vanished_peer
from llmproxy.upstream.deadline import limit
from llmproxy.upstream.dialer import Dial
from llmproxy.upstream.host_endpoint import HostEndpoint
from llmproxy.upstream.resolver import Resolver
from llmproxy.upstream.tunnel import Tunnel, connect_request

_MOST_LOOKUPS, _MOST_OF_ONE = 32, 8
"""Threads that look up names of tunnels; a name that hangs takes one for some ten seconds.

A caller has a part of them, so that it cannot keep the others from asking.
"""

_MOST_NAMES = 1024

_MESSAGES = {
    "upstream_unreachable": "The host cannot be reached.",
    "upstream_timeout": "The host did not answer in time.",
    "upstream_idle": "The host stopped in the middle of its response.",
    "upstream_broken": "The host broke off its response.",
    "upstream_protocol": "The host's response is not valid HTTP.",
}
"""What is said of a host where the error speaks of a provider."""


def tunnel_resolver(reactor: Any, clock: Callable[[], float]) -> Resolver:
    """Return a resolver of names that callers choose; it lasts longer than a configuration."""
    return Resolver(
        reactor,
        clock,
        most_lookups=_MOST_LOOKUPS,
        most_of_one=_MOST_OF_ONE,
        most_names=_MOST_NAMES,
    )


class OpenWay:
    """A connection that was made for a tunnel, and is nobody's yet: nothing is read from it.

    Attributes:
        transport: of ``net/tcp.py``, or Twisted's own.
        is_tunnelled: a parent proxy is on the way.
    """

    __slots__ = ("_placeholder", "is_tunnelled", "transport")

    def __init__(self, placeholder: _Placeholder | Tunnel) -> None:
        self._placeholder = placeholder
        self.is_tunnelled = isinstance(placeholder, Tunnel)
        self.transport = cast(Any, placeholder.transport)
        self.transport.setTcpNoDelay(True)
        notice_vanished_peer(self.transport)

    def begin(self, protocol: Any) -> None:
        """Let ``protocol`` have the connection, and what has come on it so far; call this once."""
        self.transport.protocol = protocol
        self.transport.resumeProducing()
        protocol.makeConnection(self.transport)
        early, self._placeholder.early = self._placeholder.early, b""
        if early:
            protocol.dataReceived(early)

    def abort(self) -> None:
        """Reset the connection, which nobody wants any more."""
        self.transport.abortConnection()


class WayOut:
    """Opens connections for the tunnels of one configuration.

    Args:
        reactor: connects and keeps time.
        resolver: looks names up; see :func:`tunnel_resolver`.
        config: of this, ``proxy.parent_proxy`` and its relatives, ``timeouts.connect``,
            ``limits.response_head`` and ``proxy.tuned_loop`` count.
        guard: judges addresses.
        timers: keep the deadline; by default the reactor does.
    """

    def __init__(
        self,
        reactor: Any,
        resolver: Resolver,
        config: Config,
        guard: AddressGuard,
        timers: Any = None,
    ) -> None:
        proxy = config.proxy
        self._reactor = reactor
        self._timers = timers or reactor
        self._resolver = resolver
        self._guard = guard
        self._seconds = config.timeouts.connect
        self._max_head = config.limits.response_head
        self._connector = DirectClient if proxy.tuned_loop else None
        self._past_parent = DirectHosts(proxy.no_parent_proxy)
        self._parent: ParentProxy | None = None
        self._first: HostEndpoint | None = None
        if proxy.parent_proxy is not None:
            parent = ParentProxy(proxy.parent_proxy, proxy.parent_proxy_credential)
            self._parent = parent
            self._first = HostEndpoint(
                reactor,
                resolver,
                parent.url.host,
                parent.url.port,
                connector=self._connector,
                is_parent=True,
            )

    def open(self, host: str, port: int, caller: str = "") -> Deferred[OpenWay]:
        """Connect to a host.

        Args:
            host: as a caller names it: in any case and spelling, IPv6 with brackets or without.
            port: from 1 to 65535.
            caller: the client's name; those who are not named share one part of the lookups.

        Returns:
            fires with the connection.  Cancelling it ends whatever is under way at once, and fails
            it with ``CancelledError``.  It fails with ``ProxyError``: 400 ``bad_authority`` where
            the host can be none; 403 ``address_forbidden``, with the kind as its cause, where no
            address of the host may be reached; 502 ``upstream_unreachable``, 503
            ``no_descriptors``, and 504 ``upstream_timeout`` behind ``timeouts.connect``.
        """
        dial: Dial[OpenWay] = Dial()
        dial.connected = Deferred.fromCoroutine(self._open(host, port, caller, dial))
        late = partial(upstream_timeout, may_have_run=False)
        limit(self._timers, self._seconds, dial.connected, lambda: dial.phase, late)
        dial.connected.addErrback(_for_caller)
        return dial.connected

    async def _open(self, host: str, port: int, caller: str, dial: Dial[OpenWay]) -> OpenWay:
        name = _plain(host)
        parent = self._parent
        first = self._first
        if parent is None or first is None or self._past_parent.match(name):
            first = HostEndpoint(
                self._reactor,
                self._resolver,
                name,
                port,
                connector=self._connector,
                guard=self._guard.forbids,
                caller=caller,
            )
            opened: Any = first.connect(_Placeholder)
        else:
            forbidden = self._guard.forbids_name(name, port)
            if forbidden is not None:
                text = f"{name} port {port} ({forbidden.kind})"
                raise address_forbidden(forbidden.kind, forbidden.sentence, text)
            made = partial(Tunnel, self._max_head, may_speak_first=True)
            opened = dial.through(first, connect_request(name, port, parent), made)
        try:
            placeholder = await opened
        except (CancelledError, ConnectingCancelledError):
            raise CancelledError from None
        except Exception as error:
            raise first.why_not(error) from error
        return OpenWay(placeholder)


class _Placeholder(Protocol):
    """Keeps a new connection still until it has a protocol.

    Attributes:
        early: what came all the same.
    """

    early = b""

    def connectionMade(self) -> None:
        """Nothing is read yet."""
        transport: Any = self.transport
        transport.pauseProducing()

    def dataReceived(self, data: bytes) -> None:
        """Keep what came in the turn in which the connection was made."""
        self.early += data

    def abort(self) -> None:
        """Another address was faster."""
        transport: Any = self.transport
        transport.abortConnection()


def _plain(host: str) -> str:
    """Return a host in its usual spelling, without brackets.

    Raises:
        ProxyError: 400, it can be no host.
    """
    try:
        packed = address_of(host)
        if packed is not None:
            return socket.inet_ntop(socket.AF_INET if len(packed) == 4 else socket.AF_INET6, packed)
        return read_host(as_compared(host))
    except (ValueError, Wrong):
        text = "The host is neither a name nor an address."
        raise ProxyError(400, "bad_authority", text) from None


def of_host(error: Exception) -> Exception:
    """Let an error of a provider's speak of a host; any other stays as it is."""
    if isinstance(error, ProxyError) and error.reason in _MESSAGES:
        error.message = _MESSAGES[error.reason]
        error.args = (error.message,)
    return error


def _for_caller(failure: Failure) -> Failure:
    of_host(failure.value)  # type: ignore[arg-type]  # a Deferred's error is an Exception
    return failure
