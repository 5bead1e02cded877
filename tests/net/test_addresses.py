"""Which addresses may be reached: each kind, each spelling, and the process's own listeners.

Python's ``ipaddress`` is the judge of what is public, and of what a spelling means.
"""

from __future__ import annotations

import ipaddress
import socket

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from llmproxy.net.addresses import AddressGuard, Kind, address_of, is_loopback_name, kind_of

V4 = "0.0.0.0/8 10.0.0.0/8 100.64.0.0/10 127.0.0.0/8 169.254.0.0/16 172.16.0.0/12 192.0.0.0/24 "
V4 += "192.0.2.0/24 192.168.0.0/16 198.18.0.0/15 198.51.100.0/24 203.0.113.0/24 224.0.0.0/4 "
V4 += "240.0.0.0/4 255.255.255.255/32 192.88.99.0/24 168.63.129.16/32"
V6 = "::/96 ::ffff:0:0/96 64:ff9b::/96 64:ff9b:1::/48 100::/64 2001::/23 2001:db8::/32 2002::/16 "
V6 += "3fff::/20 5f00::/16 fc00::/7 fe80::/10 fec0::/10 ff00::/8 2000::/3"

NEAR = (Kind.LOOPBACK, Kind.LINK_LOCAL, Kind.METADATA, Kind.PRIVATE, Kind.SHARED)
"""Behind these somebody may listen."""

KINDS = [
    ("127.0.0.1", Kind.LOOPBACK),
    ("127.255.255.255", Kind.LOOPBACK),
    ("::1", Kind.LOOPBACK),
    ("169.254.0.1", Kind.LINK_LOCAL),
    ("fe80::1", Kind.LINK_LOCAL),
    ("febf::1", Kind.LINK_LOCAL),
    ("169.254.169.254", Kind.METADATA),
    ("169.254.170.2", Kind.METADATA),
    ("169.254.170.23", Kind.METADATA),
    ("100.100.100.200", Kind.METADATA),
    ("168.63.129.16", Kind.METADATA),
    ("192.0.0.192", Kind.METADATA),
    ("fd00:ec2::254", Kind.METADATA),
    ("fd20:ce::254", Kind.METADATA),
    ("fe80::a9fe:a9fe", Kind.METADATA),
    ("10.0.0.0", Kind.PRIVATE),
    ("172.16.0.1", Kind.PRIVATE),
    ("172.31.255.255", Kind.PRIVATE),
    ("172.32.0.0", None),
    ("192.168.255.1", Kind.PRIVATE),
    ("fd12::1", Kind.PRIVATE),
    ("fec0::1", Kind.PRIVATE),
    ("100.64.0.0", Kind.SHARED),
    ("100.127.255.255", Kind.SHARED),
    ("100.128.0.0", None),
    ("224.0.0.1", Kind.MULTICAST),
    ("239.255.255.255", Kind.MULTICAST),
    ("ff02::1", Kind.MULTICAST),
    ("0.0.0.0", Kind.UNSPECIFIED),
    ("0.1.2.3", Kind.UNSPECIFIED),
    ("::", Kind.UNSPECIFIED),
    ("255.255.255.255", Kind.BROADCAST),
    ("240.0.0.1", Kind.RESERVED),
    ("192.0.2.1", Kind.RESERVED),
    ("198.18.0.1", Kind.RESERVED),
    ("198.19.255.255", Kind.RESERVED),
    ("198.51.100.1", Kind.RESERVED),
    ("203.0.113.1", Kind.RESERVED),
    ("2001:db8::1", Kind.RESERVED),
    ("3fff::1", Kind.RESERVED),
    ("100::1", Kind.RESERVED),
    ("4000::1", Kind.RESERVED),
    ("1.1.1.1", None),
    ("2606:4700:4700::1111", None),
    # IPv4 inside of IPv6
    ("::ffff:127.0.0.1", Kind.LOOPBACK),
    ("::ffff:169.254.169.254", Kind.METADATA),
    ("::ffff:1.1.1.1", None),
    ("::127.0.0.1", Kind.LOOPBACK),
    ("::1.1.1.1", Kind.RESERVED),
    ("::ffff:0:127.0.0.1", Kind.RESERVED),
    ("2002:7f00:1::", Kind.LOOPBACK),
    ("2002:a00:1::1", Kind.PRIVATE),
    ("2002:101:101::", None),
    ("64:ff9b::10.0.0.1", Kind.PRIVATE),
    ("64:ff9b::169.254.169.254", Kind.METADATA),
    ("64:ff9b::1.1.1.1", None),
    ("64:ff9b:1::10.0.0.1", Kind.PRIVATE),
    ("64:ff9b:1::1.1.1.1", None),
    ("64:ff9b:1:7f00:0:100::", Kind.LOOPBACK),  # 127.0.0.1 behind 48 bits
    ("64:ff9b:1:7f:0:1::", Kind.LOOPBACK),  # 127.0.0.1 behind 56 bits
    ("64:ff9b:1:1:7f:0:100::", Kind.LOOPBACK),  # 127.0.0.1 behind 64 bits
    ("64:ff9b:1:101:1:100::", None),  # 1.1.1.1 behind 48 bits
    ("64:ff9b:1:1f5:0:e000:100::", None),  # 1.245.0.224 behind 48 bits, 224.0.1.0 elsewhere
    ("64:ff9b:1::240.0.0.1", Kind.RESERVED),
    ("64:ff9b:1::", Kind.UNSPECIFIED),
    ("2001:0:101:101::80ff:fffe", Kind.LOOPBACK),  # Teredo: the client's address is inverted
    ("2001:0:a00:1::fefe:fefe", Kind.PRIVATE),  # Teredo: the server's address
    ("2001:0:101:101::fefe:fefe", Kind.RESERVED),
]

# What C22 of the traps measured, and its relatives: all of these reach loopback or this machine.
SPELLINGS = [
    ("127.0.0.1", "127.0.0.1"),
    ("127.0.0.1.", "127.0.0.1"),
    ("127.1", "127.0.0.1"),
    ("127.0.1", "127.0.0.1"),
    ("2130706433", "127.0.0.1"),
    ("0x7f000001", "127.0.0.1"),
    ("0X7F.1", "127.0.0.1"),
    ("0x7f.0x0.0x0.0x1", "127.0.0.1"),
    ("017700000001", "127.0.0.1"),
    ("0177.0.0.01", "127.0.0.1"),
    ("0", "0.0.0.0"),
    ("0.", "0.0.0.0"),
    ("[::1]", "::1"),
    ("[::1].", "::1"),
    ("::1", "::1"),
    ("[0:0:0:0:0:0:0:1]", "::1"),
    ("[::ffff:127.0.0.1]", "::ffff:127.0.0.1"),
    ("[::ffff:7f00:1]", "::ffff:127.0.0.1"),
    ("[::1%lo]", "::1"),
    ("fe80::1%25eth0", "fe80::1"),
]

NO_ADDRESS = ["1.2.3.4.5", "256.0.0.1", "4294967296", "0x", "a.1", "a.0x7f", "127.0.0.08", "::1::"]
NO_ADDRESS += ["[127.0.0.1", "[fe80::g]", "1.2.3.-4.5", "[127.0.0.1]", "[a.example]", "[]"]


def guard(*own: tuple[str, int], allow_private: bool = False) -> AddressGuard:
    """Return a guard of a process that listens there."""
    return AddressGuard(lambda: own, allow_private=allow_private)


def packed(address: str) -> bytes:
    """Return an address in bytes, as the judge reads it."""
    return ipaddress.ip_address(address).packed


def around(networks: str) -> st.SearchStrategy[bytes]:
    """Draw addresses: any one, and those inside, on the edges and beside the edges of networks."""
    ranges = [ipaddress.ip_network(one) for one in networks.split()]
    size = ranges[0].max_prefixlen // 8
    inside = [
        st.integers(int(one.network_address) - 1, int(one.broadcast_address) + 1) for one in ranges
    ]
    edges = [int(one.network_address) + by for one in ranges for by in (-1, 0, 1)]
    edges += [int(one.broadcast_address) + by for one in ranges for by in (-1, 0, 1)]
    drawn = st.one_of(st.integers(0, 2 ** (8 * size) - 1), st.sampled_from(edges), *inside)
    return drawn.map(lambda number: (number % 2 ** (8 * size)).to_bytes(size, "big"))


# --- kinds ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("address", "kind"), KINDS)
def test_each_address_has_its_kind(address: str, kind: Kind | None) -> None:
    """None is public; an address inside of another one counts."""
    assert kind_of(packed(address)) is kind
    forbidden = guard().forbids(address, 443)
    assert (None if forbidden is None else forbidden.kind) is kind


@given(around(V4))
def test_only_public_addresses_of_ipv4_are_reached(address: bytes) -> None:
    """The judge calls all of them global; what it calls so and is refused is known."""
    judged = ipaddress.IPv4Address(address)
    known = ("192.88.99.0/24", "192.0.0.0/24", "168.63.129.16/32")
    refused_all_the_same = any(judged in ipaddress.ip_network(one) for one in known)
    is_public = judged.is_global and not judged.is_multicast and not judged.is_reserved
    assert (kind_of(address) is None) is (is_public and not refused_all_the_same)


@given(around(V6))
def test_no_address_of_ipv6_is_reached_that_is_not_public(address: bytes) -> None:
    """By itself, and by the IPv4 address inside; but for NAT64, which the judge does not know."""
    judged = ipaddress.IPv6Address(address)
    if kind_of(address) is not None:
        return
    if judged in ipaddress.ip_network("64:ff9b:1::/48"):
        for place in ((6, 7, 9, 10), (7, 9, 10, 11), (9, 10, 11, 12), (12, 13, 14, 15)):
            assert kind_of(bytes(address[at] for at in place)) not in NEAR
        return
    inside = judged.ipv4_mapped or judged.sixtofour
    if judged in ipaddress.ip_network("64:ff9b::/96"):
        inside = ipaddress.IPv4Address(address[12:])
    if inside is None or judged.sixtofour:
        # CPython 3.13 calls no address of 6to4 global; what such a one leads to is judged below.
        assert judged.is_global or judged.sixtofour
        assert not judged.is_multicast
        assert not judged.is_reserved
    if inside is not None:
        assert kind_of(inside.packed) is None


@given(around("2000::/3 2001::/23 2001:200::/23 2002::/16 2001:db8::/32 3fff::/20"))
def test_public_addresses_of_ipv6_are_reached(address: bytes) -> None:
    """What is global unicast, and of no special purpose, is not refused."""
    judged = ipaddress.IPv6Address(address)
    special = ("2001::/23", "2001:db8::/32", "2002::/16", "3fff::/20")
    if judged in ipaddress.ip_network("2000::/3") and not any(
        judged in ipaddress.ip_network(one) for one in special
    ):
        assert kind_of(address) is None


@given(around(V4))
def test_an_address_inside_leads_where_it_leads_outside(address: bytes) -> None:
    """Mapped, 6to4 and both kinds of NAT64 refuse what is refused by itself, and pass the rest."""
    outside = kind_of(address)
    for inside in (
        bytes(10) + b"\xff\xff" + address,
        bytes.fromhex("0064ff9b") + bytes(8) + address,
        bytes.fromhex("2002") + address + bytes(10),
    ):
        assert kind_of(inside) is outside
    assert kind_of(bytes(12) + address) is not None
    local = bytes.fromhex("0064ff9b0001")
    first, last = address[:2], address[2:]
    if outside in NEAR:
        assert kind_of(local + first + b"\0" + last + bytes(5)) is not None
    if address[0]:
        assert (kind_of(local + bytes(6) + address) is None) is (outside is None)


# --- spellings ------------------------------------------------------------------------------------


@pytest.mark.parametrize(("spelling", "address"), SPELLINGS)
def test_every_spelling_is_read(spelling: str, address: str) -> None:
    """Those of URLs, of inet_aton, with a zone and with a last dot; none is taken for a name."""
    assert address_of(spelling) == packed(address)
    assert guard().forbids_name(spelling, 443) is not None


@pytest.mark.parametrize(("spelling", "address"), SPELLINGS)
def test_the_systems_own_resolver_reads_the_same(spelling: str, address: str) -> None:
    """What getaddrinfo takes for an address without asking anybody is that address to us."""
    try:
        rows = socket.getaddrinfo(spelling, 0, flags=socket.AI_NUMERICHOST)
    except socket.gaierror:
        return  # it would look the name up, or knows no such zone
    assert str(rows[0][4][0]).partition("%")[0] in (address, "::ffff:127.0.0.1")


@pytest.mark.parametrize("host", NO_ADDRESS)
def test_a_number_that_is_no_address_is_no_host(host: str) -> None:
    """Some resolver may take it for an address all the same."""
    with pytest.raises(ValueError, match="no address"):
        address_of(host)
    assert guard().forbids(host, 443) is not None
    assert guard().forbids_name(host, 443) is not None


@given(st.binary(min_size=4, max_size=4) | st.binary(min_size=16, max_size=16))
@example(bytes(16))
def test_an_address_is_read_as_it_is_written(address: bytes) -> None:
    """In the usual spelling, which is what a resolver returns; as a number, in four bases."""
    text = str(ipaddress.ip_address(address))
    assert address_of(text) == address
    assert address_of(f"{text}.") == address
    if len(address) == 4:
        number = int.from_bytes(address, "big")
        for spelling in (f"{number}", f"0x{number:x}", f"0{number:o}", f"0X{number:08X}"):
            assert address_of(spelling) == address
        assert address_of("{}.{}.{}".format(*address[:2], number & 0xFFFF)) == address


@pytest.mark.parametrize("name", ["example.com", "a", "1e3", "x0.com", "127.0.0.1.nip.io", "0x.a"])
def test_a_name_is_no_address(name: str) -> None:
    """Where it leads shows only when it is looked up."""
    assert address_of(name) is None
    assert guard().forbids_name(name, 443) is None


@pytest.mark.parametrize(
    "name", ["localhost", "LOCALHOST.", "a.localhost", "localhost.localdomain", "ip6-loopback"]
)
def test_some_names_are_this_machine_wherever_they_are_looked_up(name: str) -> None:
    """A parent proxy would take them for itself."""
    assert is_loopback_name(name)
    forbidden = guard().forbids_name(name, 443)
    assert forbidden is not None
    assert forbidden.kind is Kind.LOOPBACK
    assert guard(allow_private=True).forbids_name(name, 443) is None


def test_what_is_no_address_at_all_is_refused() -> None:
    """A resolver of one's own may return anything."""
    assert guard().forbids("example.com", 443) is not None


# --- what is opened on purpose --------------------------------------------------------------------


@pytest.mark.parametrize(("address", "kind"), KINDS)
def test_allow_private_opens_all_but_what_leads_nowhere(address: str, kind: Kind | None) -> None:
    """Multicast and the unspecified addresses stay closed."""
    forbidden = guard(allow_private=True).forbids(address, 443)
    never = kind if kind in (Kind.MULTICAST, Kind.UNSPECIFIED) else None
    assert (None if forbidden is None else forbidden.kind) is never


@pytest.mark.parametrize(("address", "kind"), [one for one in KINDS if one[1] is not None])
def test_the_sentence_names_no_address(address: str, kind: Kind) -> None:
    """It is for the caller."""
    forbidden = guard().forbids(address, 443)
    assert forbidden is not None
    assert address not in forbidden.sentence
    assert forbidden.sentence.endswith(".")


# --- the process's own listeners ------------------------------------------------------------------


@pytest.mark.parametrize(
    ("bound", "address", "is_own"),
    [
        ("127.0.0.1", "127.0.0.1", True),
        ("127.0.0.1", "::ffff:127.0.0.1", True),
        ("127.0.0.1", "[::ffff:7f00:1]", True),
        ("127.0.0.1", "127.1", True),
        ("127.0.0.1", "127.0.0.2", False),
        ("::1", "::1", True),
        ("::1", "::1%lo", True),
        ("::ffff:127.0.0.1", "127.0.0.1", True),
        ("0.0.0.0", "127.0.0.1", True),
        ("0.0.0.0", "127.5.6.7", True),
        ("0.0.0.0", "::ffff:127.0.0.1", True),
        ("0.0.0.0", "1.1.1.1", False),
        ("::", "127.0.0.1", True),
        ("::", "::1", True),
        ("::", "2606:4700:4700::1111", False),
        ("1.1.1.1", "1.1.1.1", True),
    ],
)
@pytest.mark.parametrize("allow_private", [False, True])
def test_the_processs_own_listeners_are_never_reached(
    bound: str, address: str, is_own: bool, allow_private: bool
) -> None:
    """In any spelling, and through any address of this machine where all are bound."""
    judge = guard(("127.0.0.1", 1), (bound, 8080), allow_private=allow_private)
    forbidden = judge.forbids(address, 8080)
    assert (forbidden is not None and forbidden.kind is Kind.OWN_LISTENER) is is_own
    other_port = judge.forbids(address, 8081)
    assert other_port is None or other_port.kind is not Kind.OWN_LISTENER


def test_every_address_of_this_machine_is_its_own() -> None:
    """Those that its interfaces have, too, whatever they are."""
    rows = socket.getaddrinfo(socket.gethostname(), 0, type=socket.SOCK_STREAM)
    for address in {str(row[4][0]) for row in rows}:
        forbidden = guard(("0.0.0.0", 8080), allow_private=True).forbids(address, 8080)
        assert forbidden is not None
        assert forbidden.kind is Kind.OWN_LISTENER


def test_listeners_are_asked_for_at_each_question() -> None:
    """A reload may listen elsewhere."""
    own = [("127.0.0.1", 1)]
    judge = AddressGuard(lambda: own, allow_private=True)
    assert judge.forbids("127.0.0.1", 2) is None
    own[0] = ("127.0.0.1", 2)
    assert judge.forbids("127.0.0.1", 2) is not None
