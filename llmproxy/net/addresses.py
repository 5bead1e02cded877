"""Which addresses may be reached for a caller who chooses the host, and which may not (ADR-0031).

A name says nothing about where it leads: ``2130706433``, ``0x7f.1`` and a name of anybody's can
all be this machine.  So what is judged here is an address, in the form in which it is connected to.
An address that carries an IPv4 address inside (mapped, 6to4, Teredo, NAT64) leads where that leads,
and is judged by it.  What is not known to be public is refused.

:func:`address_of` reads every spelling that a resolver of this or another machine takes for an
address.  :class:`AddressGuard` also knows where the process itself listens.  No name is looked up.
"""

from __future__ import annotations

import errno
import re
import socket
from collections.abc import Callable, Iterable
from enum import StrEnum

import msgspec


class Kind(StrEnum):
    """Why an address may not be reached: the word in the log and in the trace."""

    LOOPBACK = "loopback"
    LINK_LOCAL = "link_local"
    METADATA = "metadata"
    PRIVATE = "private"
    SHARED = "shared"
    MULTICAST = "multicast"
    UNSPECIFIED = "unspecified"
    BROADCAST = "broadcast"
    RESERVED = "reserved"
    OWN_LISTENER = "own_listener"


class Forbidden(msgspec.Struct, frozen=True):
    """Why an address may not be reached; ``sentence`` is for the caller, and names no address."""

    kind: Kind
    sentence: str


_SENTENCES = {
    Kind.LOOPBACK: "The host is the proxy's own machine, which tunnels do not reach.",
    Kind.LINK_LOCAL: "The host has a link-local address, which tunnels do not reach.",
    Kind.METADATA: "The host is a cloud's metadata service, which tunnels do not reach.",
    Kind.PRIVATE: "The host has a private address, which tunnels do not reach.",
    Kind.SHARED: "The host has an address that carriers share, which tunnels do not reach.",
    Kind.MULTICAST: "The host has a multicast address, which tunnels do not reach.",
    Kind.UNSPECIFIED: "The host has the unspecified address, which tunnels do not reach.",
    Kind.BROADCAST: "The host has the broadcast address, which tunnels do not reach.",
    Kind.RESERVED: "The host has a reserved address, which tunnels do not reach.",
    Kind.OWN_LISTENER: "The host and port are the proxy's own, which tunnels do not reach.",
}

_NEAR = frozenset({Kind.LOOPBACK, Kind.LINK_LOCAL, Kind.METADATA, Kind.PRIVATE, Kind.SHARED})
"""Behind these somebody may listen."""

_NEVER = frozenset({Kind.MULTICAST, Kind.UNSPECIFIED, Kind.OWN_LISTENER})
"""What is refused where everything private is allowed."""

# --- the table ------------------------------------------------------------------------------------

_V4 = {
    # The metadata services stand first: the first range that an address is in counts.
    "169.254.169.254/32": Kind.METADATA,  # AWS, Azure, Google, OpenStack, Oracle, DigitalOcean ...
    "169.254.170.2/32": Kind.METADATA,  # AWS: credentials of containers (ECS)
    "169.254.170.23/32": Kind.METADATA,  # AWS: credentials of pods (EKS)
    "169.254.0.23/32": Kind.METADATA,  # Tencent
    "169.254.42.42/32": Kind.METADATA,  # Scaleway
    "100.100.100.200/32": Kind.METADATA,  # Alibaba
    "168.63.129.16/32": Kind.METADATA,  # Azure's host, in a public range
    "192.0.0.192/32": Kind.METADATA,  # Oracle, in an older form
    "0.0.0.0/8": Kind.UNSPECIFIED,  # Linux connects 0.0.0.0 to itself
    "10.0.0.0/8": Kind.PRIVATE,
    "100.64.0.0/10": Kind.SHARED,
    "127.0.0.0/8": Kind.LOOPBACK,
    "169.254.0.0/16": Kind.LINK_LOCAL,
    "172.16.0.0/12": Kind.PRIVATE,
    "192.0.0.0/24": Kind.RESERVED,  # IETF protocol assignments
    "192.0.2.0/24": Kind.RESERVED,  # documentation
    "192.88.99.0/24": Kind.RESERVED,  # 6to4 relays, not used any more
    "192.168.0.0/16": Kind.PRIVATE,
    "198.18.0.0/15": Kind.RESERVED,  # benchmarking
    "198.51.100.0/24": Kind.RESERVED,  # documentation
    "203.0.113.0/24": Kind.RESERVED,  # documentation
    "224.0.0.0/4": Kind.MULTICAST,
    "255.255.255.255/32": Kind.BROADCAST,
    "240.0.0.0/4": Kind.RESERVED,
}
"""IANA's special purposes (RFC 6890 and its registry) and the clouds' own; all else is public."""

_V6 = {
    "fd00:ec2::254/128": Kind.METADATA,  # AWS
    "fd00:ec2::23/128": Kind.METADATA,  # AWS: credentials of pods (EKS)
    "fd20:ce::254/128": Kind.METADATA,  # Google
    "fd00:42::42/128": Kind.METADATA,  # Scaleway
    "fd00:c1::a9fe:a9fe/128": Kind.METADATA,  # Oracle
    "fe80::a9fe:a9fe/128": Kind.METADATA,  # OpenStack
    "::/128": Kind.UNSPECIFIED,
    "::1/128": Kind.LOOPBACK,
    "fc00::/7": Kind.PRIVATE,
    "fec0::/10": Kind.PRIVATE,  # site-local, not used any more
    "fe80::/10": Kind.LINK_LOCAL,
    "ff00::/8": Kind.MULTICAST,
    "2001::/23": Kind.RESERVED,  # IETF protocol assignments, Teredo among them
    "2001:db8::/32": Kind.RESERVED,  # documentation
    "3fff::/20": Kind.RESERVED,  # documentation
}
"""The same for IPv6; beside it, whatever is not in 2000::/3 is not public."""


def _range(text: str, kind: Kind) -> tuple[int, int, Kind]:
    address, _, length = text.partition("/")
    packed = socket.inet_pton(socket.AF_INET6 if ":" in address else socket.AF_INET, address)
    shift = len(packed) * 8 - int(length)
    return int.from_bytes(packed, "big") >> shift, shift, kind


_RANGES_V4 = tuple(_range(*one) for one in _V4.items())
_RANGES_V6 = tuple(_range(*one) for one in _V6.items())

_MAPPED = bytes(10) + b"\xff\xff"  # ::ffff:0:0/96
_COMPATIBLE = bytes(12)  # ::/96
_NAT64 = bytes.fromhex("0064ff9b") + bytes(8)  # 64:ff9b::/96 (RFC 6052)
_LOCAL_NAT64 = bytes.fromhex("0064ff9b0001")  # 64:ff9b:1::/48 (RFC 8215)
_6TO4 = bytes.fromhex("2002")
_TEREDO = bytes.fromhex("20010000")
_PLACES = ((6, 7, 9, 10), (7, 9, 10, 11), (9, 10, 11, 12), (12, 13, 14, 15))
"""Where a translator with a prefix of 48, 56, 64 or 96 bits finds the IPv4 address (RFC 6052, 2.2).

Which of them the network's translator has is not known here.
"""


def kind_of(packed: bytes) -> Kind | None:
    """Return why an address, in 4 or 16 bytes, is not public; None where it is."""
    if len(packed) == 4:
        return _listed(packed, _RANGES_V4)
    if packed.startswith(_MAPPED):
        return kind_of(packed[12:])
    if (kind := _listed(packed, _RANGES_V6)) not in (None, Kind.RESERVED):
        return kind
    if packed.startswith(_COMPATIBLE):
        return kind_of(packed[12:]) or Kind.RESERVED
    if packed.startswith(_NAT64):
        return kind_of(packed[12:])
    if packed.startswith(_LOCAL_NAT64):
        return _kind_behind_local_nat64(packed)
    if packed.startswith(_6TO4):
        return kind_of(packed[2:6])
    if packed.startswith(_TEREDO):
        client = bytes(byte ^ 0xFF for byte in packed[12:])
        return kind_of(client) or kind_of(packed[4:8]) or Kind.RESERVED
    if packed[0] >> 5 != 1:  # not in 2000::/3
        return Kind.RESERVED
    return kind


def _listed(packed: bytes, ranges: tuple[tuple[int, int, Kind], ...]) -> Kind | None:
    number = int.from_bytes(packed, "big")
    for first, shift, kind in ranges:
        if number >> shift == first:
            return kind
    return None


def _kind_behind_local_nat64(packed: bytes) -> Kind | None:
    """Return the kind of an address by the four places.

    A place where somebody could be reached counts wherever it is; one that leads nowhere, as most
    wrong places do, counts only if no place is public.
    """
    kinds = [kind_of(bytes(packed[at] for at in place)) for place in _PLACES]
    found = next((kind for kind in kinds if kind in _NEAR), None)
    return found if found is not None or None in kinds else kinds[-1]


# --- spellings ------------------------------------------------------------------------------------

_LOOPBACK_NAMES = frozenset(
    ("localhost", "localhost.localdomain", "localhost6", "ip6-localhost", "ip6-loopback")
)
_LAST_IS_NUMBER = re.compile(r"(?:.*\.)?(?:[0-9]+|0x[0-9a-f]*)", re.IGNORECASE)
"""A host whose last label is a number is an address or nothing (WHATWG URL, "ends in a number")."""


def address_of(host: str) -> bytes | None:
    """Return the address that ``host`` spells, in 4 or 16 bytes; None where it is a name.

    The spellings are those of a URL, a resolver and inet_aton(3): ``127.1``, ``2130706433``,
    ``0x7f000001``, ``017700000001``, ``[::1]``, ``fe80::1%eth0``, each with a last dot, too.

    Raises:
        ValueError: it ends in a number, but spells no address.
    """
    name = host.removesuffix(".")
    in_brackets = name.startswith("[") and name.endswith("]")
    if in_brackets:
        name = name[1:-1]
    if in_brackets or ":" in name:
        try:
            return socket.inet_pton(socket.AF_INET6, name.partition("%")[0])
        except OSError:
            raise ValueError("no address of IPv6") from None
    if not _LAST_IS_NUMBER.fullmatch(name):
        return None
    try:
        return socket.inet_aton(name)
    except OSError:
        raise ValueError("a number, but no address of IPv4") from None


def is_loopback_name(host: str) -> bool:
    """Return whether ``host`` is a name that every machine gives to itself (RFC 6761, 6.3)."""
    name = host.lower().removesuffix(".")
    return name in _LOOPBACK_NAMES or name.endswith(".localhost")


# --- the guard ------------------------------------------------------------------------------------

_NOT_OURS = (errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT)


class AddressGuard:
    """Judges the addresses that may be connected to for a caller.

    Args:
        own: returns the host and port of each socket on which the process listens now, as
            ``getHost()`` of a port has them; ``0.0.0.0`` and ``::`` stand for all of this machine's
            addresses.
        allow_private: let everything pass but the process's own listeners, multicast and the
            unspecified addresses.
    """

    __slots__ = ("_own", "allow_private")

    def __init__(
        self, own: Callable[[], Iterable[tuple[str, int]]], *, allow_private: bool = False
    ) -> None:
        self._own = own
        self.allow_private = allow_private

    def forbids(self, address: str, port: int) -> Forbidden | None:
        """Return why an address may not be connected to; None where it may.

        Args:
            address: as a resolver returns it, or as :func:`address_of` reads it.
            port: the port that would be connected to.
        """
        try:
            packed = address_of(address)
        except ValueError:
            packed = None
        kind: Kind | None = Kind.RESERVED
        if packed is not None:
            kind = Kind.OWN_LISTENER if self._is_own(packed, port) else kind_of(packed)
        return self._judge(kind)

    def forbids_name(self, host: str, port: int) -> Forbidden | None:
        """Return why a host may not be asked for that somebody else looks up; None where it may.

        Only a host that is an address, in whatever spelling, and the names that each machine gives
        to itself say where they lead.
        """
        try:
            is_address = address_of(host) is not None
        except ValueError:
            return self._judge(Kind.RESERVED)
        if is_address:
            return self.forbids(host, port)
        return self._judge(Kind.LOOPBACK if is_loopback_name(host) else None)

    def _judge(self, kind: Kind | None) -> Forbidden | None:
        if kind is None or (self.allow_private and kind not in _NEVER):
            return None
        return Forbidden(kind, _SENTENCES[kind])

    def _is_own(self, packed: bytes, port: int) -> bool:
        packed = _plain(packed)
        for host, own_port in self._own():
            if own_port == port:
                own = _plain(address_of(host) or b"")
                if own == packed or (not any(own) and _is_of_this_machine(packed)):
                    return True
        return False


def _plain(packed: bytes) -> bytes:
    """Return an address as the kernel connects to it: IPv4 within IPv6 is IPv4."""
    return packed[12:] if len(packed) == 16 and packed.startswith(_MAPPED) else packed


def _is_of_this_machine(packed: bytes) -> bool:
    """Return whether the kernel would let a socket have this address; yes in doubt."""
    family = socket.AF_INET if len(packed) == 4 else socket.AF_INET6
    try:
        with socket.socket(family, socket.SOCK_STREAM) as trial:
            trial.bind((socket.inet_ntop(family, packed), 0))
    except OSError as error:
        return error.errno not in _NOT_OURS
    return True
