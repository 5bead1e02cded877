"""Whose address counts where a balancer stands before us: the PROXY protocol, below TLS or not."""

from __future__ import annotations

import json
import socket
import struct
from pathlib import Path

import pytest
from pytest_twisted import ensureDeferred

from llmproxy.server.tls import ListenerTls
from tests.support.fake_transport import turn
from tests.support.keypairs import Vault
from tests.support.live_proxy import Response, read_response
from tests.support.served import GET, TCP, Served, ask, knock, limits
from tests.support.sockets import Wire, connect

PROXIED = f"haproxy:{TCP}"
ONE = b"PROXY TCP4 192.0.2.1 192.0.2.100 40000 443\r\n"
OTHER = b"PROXY TCP4 192.0.2.2 192.0.2.100 40000 443\r\n"
SIX = b"PROXY TCP6 2001:db8::1 2001:db8::2 40000 443\r\n"
UNKNOWN = b"PROXY UNKNOWN ffff::1 ffff::2 1 1\r\n"
NO_ADDRESS = b"PROXY UNKNOWN\r\n"
LOCAL_IN_V2 = b"\r\n\r\n\0\r\nQUIT\n\x20\0\0\0"
ONE_IN_V2 = (  # PROXY protocol, version 2: PROXY over TCP and IPv4
    b"\r\n\r\n\0\r\nQUIT\n\x21\x11\0\x0c"
    + socket.inet_aton("192.0.2.1")
    + socket.inet_aton("192.0.2.100")
    + struct.pack(">HH", 40000, 443)
)


@pytest.fixture
def vault(tmp_path: Path) -> Vault:
    """An authority, and what it issues."""
    return Vault(tmp_path)


def proxied(served: Served, header: bytes, vault: Vault | None = None) -> Wire:
    """Connect as a balancer does: its header first, then the client's bytes, TLS or not."""
    wire = connect(served.port)
    wire.send(header)
    if vault is not None:
        context = vault.client()
        sock = context.wrap_socket(
            wire.sock, server_hostname="localhost", suppress_ragged_eofs=False
        )
        wire = Wire(sock)
    return wire


def ask_proxied(served: Served, header: bytes, vault: Vault | None) -> bytes:
    """Ask once on a connection of its own."""
    with proxied(served, header, vault) as wire:
        return ask(wire)


@pytest.mark.parametrize("secure", [False, True])
@pytest.mark.parametrize(
    ("header", "address"),
    [
        (ONE, b"192.0.2.1"),
        (ONE_IN_V2, b"192.0.2.1"),
        (SIX, b"2001:db8::1"),
        (UNKNOWN, b"127.0.0.1"),
        (LOCAL_IN_V2, b"127.0.0.1"),
    ],
    ids=["v1", "v2", "v1 with IPv6", "unknown", "v2, local"],
)
@ensureDeferred
async def test_a_balancers_client_is_known(
    vault: Vault, header: bytes, address: bytes, secure: bool
) -> None:
    """Its address is the one in the PROXY header, which comes before TLS."""
    tls = ListenerTls(vault.issue().keypair()) if secure else None
    async with Served(PROXIED, tls=tls) as served:
        trusted = vault if secure else None
        assert await served.run(ask_proxied, served, header, trusted) == address


@pytest.mark.parametrize("secure", [False, True])
@ensureDeferred
async def test_without_a_header_nobody_is_served(vault: Vault, secure: bool) -> None:
    """Whoever does not come by way of the balancer is closed without a response."""
    tls = ListenerTls(vault.issue().keypair()) if secure else None

    def client() -> tuple[str, bytes]:
        with connect(served.port) as wire:
            wire.send(GET)
            return wire.wait_closed(), wire.buffer

    async with Served(PROXIED, tls=tls) as served:
        assert await served.run(client) == ("fin", b"")


@ensureDeferred
async def test_a_header_without_an_address_is_a_header() -> None:
    """A balancer's own health check comes with no more than this (PROXY protocol, section 2.1)."""
    async with Served(PROXIED) as served:
        told = await served.run(ask_proxied, served, NO_ADDRESS, None)
        assert told == b"127.0.0.1"


@pytest.mark.parametrize(
    ("header", "address"),
    [
        (ONE, b"192.0.2.1"),
        (ONE_IN_V2, b"192.0.2.1"),
        (LOCAL_IN_V2, b"127.0.0.1"),
        (UNKNOWN, b"127.0.0.1"),
        (NO_ADDRESS, b"127.0.0.1"),
    ],
    ids=["v1", "v2", "v2, local", "unknown", "no address"],
)
@ensureDeferred
async def test_a_header_may_be_split_at_any_point(header: bytes, address: bytes) -> None:
    """However few bytes come at a time, the request behind it is not lost."""
    async with Served(PROXIED) as served:
        with connect(served.port) as wire:
            for byte in header:
                wire.send(bytes([byte]))
                await turn()
            assert await served.run(ask, wire) == address
        whole = await served.run(ask_at_once, served.port, header)
        assert whole.body == address


def ask_at_once(port: int, header: bytes) -> Response:
    """Send a header and the request behind it in one piece."""
    with connect(port) as wire:
        wire.send(header, GET)
        return read_response(wire)


@pytest.mark.parametrize(
    "header",
    [
        b"PROXY TCP4 192.0.2.1 192.0.2.100 port 443\r\n",
        b"PROXY TCP4 192.0.2.\xff 192.0.2.100 40000 443\r\n",
        b"PROXY TCP4 192.0.2.1\r\n",
        b"PROXY TCP5 192.0.2.1 192.0.2.100 40000 443\r\n",
        b"PROXY " + b"x" * 200,
        LOCAL_IN_V2[:12] + b"\x2f\0\0\0",
    ],
    ids=["port", "not ASCII", "short", "protocol", "endless", "v2, command"],
)
@ensureDeferred
async def test_a_header_that_is_none_ends_the_connection(header: bytes) -> None:
    """Without a response, and without being logged as a failure of the program's."""

    def client() -> bytes:
        with connect(served.port) as wire:
            wire.send(header)
            wire.wait_closed()
            return wire.buffer

    async with Served(PROXIED) as served:
        assert await served.run(client) == b""


@pytest.mark.parametrize("secure", [False, True])
@pytest.mark.parametrize("first", [ONE, ONE_IN_V2], ids=["v1", "v2"])
@ensureDeferred
async def test_a_balancers_clients_are_counted_each(
    vault: Vault, first: bytes, secure: bool
) -> None:
    """One address is full at its first request, whatever there is of the balancer's."""
    limiter = limits(0, 1)
    trusted = vault if secure else None

    def client() -> tuple[bytes, Response, str, bytes]:
        with proxied(served, first, trusted) as one, proxied(served, ONE, trusted) as again:
            own = ask(one)
            assert ask(one) == own  # its second request is not a second connection
            again.send(GET, GET)
            refused = read_response(again)
            ended = again.wait_closed()
            with proxied(served, OTHER, trusted) as other:
                return own, refused, ended, ask(other)

    tls = ListenerTls(vault.issue().keypair()) if secure else None
    async with Served(PROXIED, tls=tls, limiter=limiter) as served:
        own, refused, ended, other = await served.run_turning(client)
        assert (own, other) == (b"192.0.2.1", b"192.0.2.2")
        assert refused.status == 503
        assert refused.values(b"x-llmproxy-error") == [b"connections_per_address"]
        assert refused.values(b"retry-after") == [b"1"]
        assert refused.values(b"connection") == [b"close"]
        assert json.loads(refused.body)["error"]["code"] == "connections_per_address"
        assert ended == "fin"
        assert limiter.refused == {"max_connections": 0, "connections_per_address": 1}
        await served.until_connected(0)
        assert limiter.enter("192.0.2.1") is None


@pytest.mark.parametrize("secure", [False, True])
@ensureDeferred
async def test_a_balancers_connection_counts_in_all(vault: Vault, secure: bool) -> None:
    """`max_connections` needs no address: it is told before the header is read, or closed."""
    trusted = vault if secure else None
    tls = ListenerTls(vault.issue().keypair()) if secure else None
    async with Served(PROXIED, tls=tls, limiter=limits(1)) as served:
        with connect(served.port) as one:
            await served.until_connected(1)
            ended, told = await served.run(knock, served.port)
            if secure:
                assert (ended, told) == ("reset", b"")
            else:
                assert ended == "fin"
                assert b"x-llmproxy-error: max_connections" in told
            one.close()
            await served.until_connected(0)
        assert await served.run(ask_proxied, served, ONE, trusted) == b"192.0.2.1"
