"""Which tunnels may be opened: the list of hosts and ports, and how many a client may have at once.

A host is compared as it is named; where it leads is checked later, on its address
(``net/addresses.py``).  One exception: a caller that asks for ``localhost`` means its own machine,
and is told how to reach that without the proxy.  How a tunnel is opened is not known here, nor
which hosts are intercepted.
"""

from __future__ import annotations

from llmproxy.config import Tunnel
from llmproxy.config.host_pattern import HostPatterns, as_compared
from llmproxy.errors import ProxyError
from llmproxy.net.addresses import Kind, address_of, is_loopback_name, kind_of

REFUSED, TOO_MANY = "tunnel_refused", "too_many_tunnels"
"""The reason words."""

_NO_PROXY = "localhost is the caller's own machine: put localhost,127.0.0.1 into NO_PROXY."
_NOT_LISTED = "Host not on the tunnel list."
_PORT_NOT_LISTED = "Port not on the tunnel list for this host."
_NO_LIST = "No host is on the tunnel list."
_MOST = "This client has as many tunnels open as it may have."


class Tunnels:
    """The list of one configuration.

    Args:
        tunnel: the section of the configuration.
    """

    def __init__(self, tunnel: Tunnel) -> None:
        self._observe = tunnel.observe
        self._allow_private = tunnel.allow_private
        by_port: dict[int | None, list[str]] = {}
        for target in tunnel.allow:
            by_port.setdefault(target.port, []).append(target.host)
        self._by_port = {port: HostPatterns(hosts) for port, hosts in by_port.items()}
        self._at_any_port = HostPatterns(target.host for target in tunnel.allow)

    def is_listed(self, host: str, port: int) -> bool:
        """Return whether the list has this authority; the host may be in any case, with a dot."""
        name = as_compared(host)
        return any(
            (patterns := self._by_port.get(one)) is not None and patterns.match(name)
            for one in (port, None)
        )

    def permit(self, host: str, port: int) -> bool:
        """Let a tunnel to this authority pass, or refuse it.

        Returns:
            whether the list would refuse it, and it passes only because all are observed.

        Raises:
            ProxyError: 403; the message is for people, and short enough for a status line.
        """
        is_loopback = _is_loopback(host)
        if is_loopback and not self._allow_private:
            raise _refusal(_NO_PROXY, "localhost")
        if self.is_listed(host, port):
            return False
        if self._observe:
            return True
        if self._at_any_port.match(as_compared(host)):
            raise _refusal(_PORT_NOT_LISTED, "port")
        if is_loopback:
            raise _refusal(_NO_PROXY, "localhost")
        if not self._by_port:
            raise _refusal(_NO_LIST, "host")
        raise _refusal(_NOT_LISTED, "host")


class OpenTunnels:
    """How many tunnels each client has; this lasts over reloads.

    Attributes:
        refused: how many were too many.
    """

    def __init__(self) -> None:
        self._by_client: dict[str, int] = {}
        self.refused = 0

    def __len__(self) -> int:
        return sum(self._by_client.values())

    def enter(self, client: str, most: int) -> None:
        """Count one more tunnel of ``client``, which must :meth:`leave` again.

        Args:
            client: its name.
            most: how many it may have; 0 is no limit.

        Raises:
            ProxyError: 429; then nothing was counted.
        """
        count = self._by_client.get(client, 0)
        if most and count >= most:
            self.refused += 1
            raise ProxyError(
                429,
                TOO_MANY,
                _MOST,
                fields=((b"retry-after", b"1"), (b"x-llmproxy-limit", b"max_per_client")),
                detail=f"tunnel.max_per_client = {most} of client {client}",
                cause="max_per_client",
            )
        self._by_client[client] = count + 1

    def leave(self, client: str) -> None:
        """One tunnel of ``client`` has ended."""
        self._by_client[client] -= 1
        if not self._by_client[client]:
            del self._by_client[client]


def _is_loopback(host: str) -> bool:
    if is_loopback_name(host):
        return True
    try:
        packed = address_of(host)
    except ValueError:
        return False
    return packed is not None and kind_of(packed) in (Kind.LOOPBACK, Kind.UNSPECIFIED)


def _refusal(message: str, cause: str) -> ProxyError:
    return ProxyError(403, REFUSED, message, detail=message, cause=cause)
