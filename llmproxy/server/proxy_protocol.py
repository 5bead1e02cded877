"""Clients behind a balancer: their address stands before their first byte (PROXY protocol).

Twisted's parsers read the header.  What they lack is added here: a header that is split at any
point, the short form without an address, a look at the addresses themselves, and an end without a
traceback for what is no header.  Whoever reaches such a listener is believed.
"""

from __future__ import annotations

import ipaddress
import re
from typing import Any

from twisted.internet.error import ConnectionDone
from twisted.internet.interfaces import IAddress, IHalfCloseableProtocol
from twisted.internet.protocol import Factory, Protocol
from twisted.protocols.haproxy._exceptions import InvalidProxyHeader
from twisted.protocols.haproxy._info import ProxyInfo
from twisted.protocols.haproxy._v1parser import V1Parser
from twisted.protocols.haproxy._v2parser import V2Parser
from twisted.protocols.haproxy._wrapper import HAProxyProtocolWrapper, HAProxyWrappingFactory
from twisted.python.failure import Failure
from zope.interface import implementer

from llmproxy.net.transport import raw_transport
from llmproxy.server.site import Site

_PROXY_START = 16
"""Bytes that Twisted wants at once of a PROXY header (the protocol's text, section 2)."""

_UNKNOWN = b"PROXY UNKNOWN\r\n"


class Proxied(Factory):
    """A site whose clients' addresses come later: the peer of the socket is a balancer."""

    noisy = False

    def __init__(self, site: Site) -> None:
        self._site = site

    def doStart(self) -> None:
        """Listening begins."""
        self._site.doStart()

    def doStop(self) -> None:
        """Listening ends."""
        self._site.doStop()

    def buildProtocol(self, addr: IAddress | None) -> Protocol:
        """Serve one more connection; the address of its socket is the balancer's."""
        return self._site.buildProtocol(None)


_V1_ADDRESSES = re.compile(rb"PROXY TCP([46]) ([!-$&-~]+) ([!-$&-~]+) ([0-9]{1,5}) ([0-9]{1,5})")
"""The line of the first version with addresses; a scope (``%``) is none of them (section 2.1)."""


class _CheckedV1Parser(V1Parser):
    """The first version, whose addresses are addresses of the family that the line says.

    They are counted and recorded; Twisted takes any words for them.
    """

    @classmethod
    def parse(cls, line: bytes) -> ProxyInfo:
        info = super().parse(line)
        if info.source is not None and not _has_addresses(line):
            raise InvalidProxyHeader
        return info


def _has_addresses(line: bytes) -> bool:
    found = _V1_ADDRESSES.fullmatch(line)
    if found is None:
        return False
    kind = ipaddress.IPv4Address if found[1] == b"4" else ipaddress.IPv6Address
    try:
        for address in found[2], found[3]:
            kind(address.decode("ascii"))
    except ValueError:
        return False
    return all(int(port) <= 65535 and b"%d" % int(port) == port for port in (found[4], found[5]))


@implementer(IHalfCloseableProtocol)
class _ProxyHeader(HAProxyProtocolWrapper):
    """One connection that begins with a PROXY header, of either version, split at any point."""

    _start: bytes = b""

    def readConnectionLost(self) -> None:
        """The client has ended its side."""
        if (above := self._half_closeable) is None:
            raw_transport(self).connectionLost(Failure(ConnectionDone()))
        else:
            above.readConnectionLost()

    def writeConnectionLost(self) -> None:
        """Our side is ended."""
        if (above := self._half_closeable) is not None:
            above.writeConnectionLost()

    @property
    def _half_closeable(self) -> Any:
        """What stands above, where its own class knows half closes.

        Twisted's TLS does not, although its objects provide what is provided below them.
        """
        above = self.wrappedProtocol
        return above if IHalfCloseableProtocol.implementedBy(type(above)) else None

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
            if data.startswith(V1Parser.PROXYSTR):
                self._parser = _CheckedV1Parser()
        if self._proxyInfo is not None:
            self.wrappedProtocol.dataReceived(data)
            return
        try:
            super().dataReceived(data)
        except ValueError:  # from Twisted's parsers, where a number or an address is malformed
            if self._proxyInfo is not None:
                raise  # the header was read: it comes from what stands behind it
            self.loseConnection()


def _is_undecided(data: bytes) -> bool:
    """Return whether this may become a PROXY header of which there is not enough yet."""
    second = V2Parser.PREFIX.startswith(data[: len(V2Parser.PREFIX)])
    first = V1Parser.PROXYSTR.startswith(data[:5]) and b"\r\n" not in data
    return len(data) < _PROXY_START and (first or second)


class ProxyHeaders(HAProxyWrappingFactory):
    """Reads the header of each connection, and gives what follows to the wrapped factory's."""

    protocol = _ProxyHeader  # type: ignore[assignment]  # a subclass of what stands there
    noisy = False
