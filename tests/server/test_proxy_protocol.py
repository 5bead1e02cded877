"""The PROXY protocol, below TLS or not: the address of a client behind a load balancer."""

from __future__ import annotations

import json
import socket
import struct

import pytest
from pytest_twisted import ensureDeferred

from llmproxy.server.tls import ListenerTls
from tests.support.fake_transport import turn
from tests.support.keypairs import Vault
from tests.support.live_proxy import Response, read_response
from tests.support.served import GET, TCP, Served, ask, knock, limits
from tests.support.sockets import Wire, connect, request

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


class Balancer:
    """Connects as a load balancer does: first its header, then the client's bytes, TLS or not."""

    def __init__(self, vault: Vault, tls: ListenerTls | None) -> None:
        self.context = vault.client() if tls else None

    def connect(self, served: Served, header: bytes) -> Wire:
        """Connect a client."""
        wire = connect(served.port)
        wire.send(header)
        if self.context is None:
            return wire
        return Wire(
            self.context.wrap_socket(
                wire.sock, server_hostname="localhost", suppress_ragged_eofs=False
            )
        )

    def ask(self, served: Served, header: bytes) -> bytes:
        """Return the response to one request on a connection of its own."""
        with self.connect(served, header) as wire:
            return ask(wire)


@pytest.fixture
def balancer(vault: Vault, tls: ListenerTls | None) -> Balancer:
    """A load balancer before a listener with this TLS."""
    return Balancer(vault, tls)


HEADERS = {
    "v1": (ONE, b"192.0.2.1"),
    "v2": (ONE_IN_V2, b"192.0.2.1"),
    "v1 with IPv6": (SIX, b"2001:db8::1"),
    "unknown": (UNKNOWN, b"127.0.0.1"),
    "no address": (NO_ADDRESS, b"127.0.0.1"),  # a health check's (PROXY protocol, section 2.1)
    "v2, local": (LOCAL_IN_V2, b"127.0.0.1"),
}
each_header = pytest.mark.parametrize(("header", "address"), HEADERS.values(), ids=HEADERS)


@each_header
@ensureDeferred
async def test_the_address_of_a_client_is_that_of_the_header(
    balancer: Balancer, header: bytes, address: bytes, tls: ListenerTls | None
) -> None:
    """The PROXY header comes before TLS; without an address it is the balancer's."""
    async with Served(PROXIED, tls=tls) as served:
        assert await served.run(balancer.ask, served, header) == address


@ensureDeferred
async def test_what_follows_a_request_does_not_cost_its_response() -> None:
    """Our side ends first, below the header too, and what still comes is read."""

    def client() -> tuple[bytes, str]:
        with connect(served.port) as wire:
            wire.send(ONE, request("GET", "/", "Connection: close"), bytes(300_000))
            _, fields = wire.read_head()
            return wire.read_body(fields), wire.wait_closed()

    async with Served(PROXIED) as served:
        assert await served.run_turning(client) == (b"192.0.2.1", "fin")


@ensureDeferred
async def test_without_a_header_no_request_is_served(tls: ListenerTls | None) -> None:
    """A client that does not come through the balancer is closed without a response."""

    def client() -> tuple[str, bytes]:
        with connect(served.port) as wire:
            wire.send(GET)
            return wire.wait_closed(), wire.buffer

    async with Served(PROXIED, tls=tls) as served:
        assert await served.run(client) == ("fin", b"")


@each_header
@ensureDeferred
async def test_a_header_may_be_split_at_any_point(header: bytes, address: bytes) -> None:
    """Byte by byte or in one piece with the request, the request behind it is not lost."""
    async with Served(PROXIED) as served:
        with connect(served.port) as wire:
            for byte in header:
                wire.send(bytes([byte]))
                await turn()
            assert await served.run(ask, wire) == address
        with connect(served.port) as whole:
            whole.send(header, GET)
            assert (await served.run(read_response, whole)).body == address


@pytest.mark.parametrize(
    "header",
    [
        b"PROXY TCP4 192.0.2.1 192.0.2.100 port 443\r\n",
        b"PROXY TCP4 192.0.2.\xff 192.0.2.100 40000 443\r\n",
        b"PROXY TCP4 192.0.2.1\r\n",
        b"PROXY TCP4 x y 1 2\r\n" + GET,
        b"PROXY TCP4 2001:db8::1 2001:db8::2 40000 443\r\n" + GET,
        b"PROXY TCP6 192.0.2.1 192.0.2.100 40000 443\r\n" + GET,
        b"PROXY TCP4 192.0.2.1 192.0.2.256 40000 443\r\n" + GET,
        b"PROXY TCP4 192.0.2.01 192.0.2.100 40000 443\r\n" + GET,
        b"PROXY TCP6 fe80::1%eth0 2001:db8::2 40000 443\r\n" + GET,
        b"PROXY TCP4 192.0.2.1 192.0.2.100 65536 443\r\n" + GET,
        b"PROXY TCP4 192.0.2.1 192.0.2.100 -1 443\r\n" + GET,
        b"PROXY TCP4 192.0.2.1 192.0.2.100 040000 443\r\n" + GET,
        b"PROXY TCP4 192.0.2.1 192.0.2.100 40000 443 x\r\n" + GET,
        b"PROXY TCP4  192.0.2.1 192.0.2.100 40000 443\r\n" + GET,
        b"PROXY TCP5 192.0.2.1 192.0.2.100 40000 443\r\n",
        b"PROXY " + b"x" * 200,
        LOCAL_IN_V2[:12] + b"\x2f\0\0\0",
    ],
    ids=lambda header: repr(header[:50]),
)
@ensureDeferred
async def test_a_wrong_header_ends_the_connection(header: bytes) -> None:
    """There is no response, and no failure of the program is logged."""

    def client() -> bytes:
        with connect(served.port) as wire:
            wire.send(header)
            wire.wait_closed()
            return wire.buffer

    async with Served(PROXIED) as served:
        assert await served.run(client) == b""


@pytest.mark.parametrize("first", [ONE, ONE_IN_V2], ids=["v1", "v2"])
@ensureDeferred
async def test_each_client_behind_a_balancer_is_counted(
    balancer: Balancer, first: bytes, tls: ListenerTls | None
) -> None:
    """The limit of an address holds at its first request, whatever the balancer's address has."""
    limiter = limits(0, 1)

    def client() -> tuple[bytes, Response, str, bytes]:
        with balancer.connect(served, first) as one, balancer.connect(served, ONE) as again:
            own = ask(one)
            assert ask(one) == own  # its second request is not a second connection
            again.send(GET, GET)
            rejected = read_response(again)
            return own, rejected, again.wait_closed(), balancer.ask(served, OTHER)

    async with Served(PROXIED, tls=tls, limiter=limiter) as served:
        own, rejected, ended, other = await served.run_turning(client)
        assert (own, other) == (b"192.0.2.1", b"192.0.2.2")
        assert rejected.status == 503
        assert rejected.values(b"x-llmproxy-error") == [b"connections_per_address"]
        assert rejected.values(b"retry-after") == [b"1"]
        assert rejected.values(b"connection") == [b"close"]
        assert json.loads(rejected.body)["error"]["code"] == "connections_per_address"
        assert ended == "fin"
        assert limiter.refused == {"max_connections": 0, "connections_per_address": 1}
        await served.until_connected(0)
        assert limiter.enter("192.0.2.1") is None


@ensureDeferred
async def test_max_connections_needs_no_header(balancer: Balancer, tls: ListenerTls | None) -> None:
    """The connection is rejected before its header is read; on TLS there is no response."""
    async with Served(PROXIED, tls=tls, limiter=limits(1)) as served:
        with connect(served.port) as one:
            await served.until_connected(1)
            ended, received = await served.run(knock, served.port)
            if tls:
                assert (ended, received) == ("reset", b"")
            else:
                assert ended == "fin"
                assert b"x-llmproxy-error: max_connections" in received
            one.close()
            await served.until_connected(0)
        assert await served.run(balancer.ask, served, ONE) == b"192.0.2.1"
