"""Listening sockets: their options, their queue, and those that systemd handed over."""

from __future__ import annotations

import os
import socket
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from pytest_twisted import ensureDeferred
from twisted.internet import reactor
from twisted.internet.endpoints import _SystemdParser
from twisted.python.systemd import ListenFDs

from llmproxy.config import parse
from llmproxy.server.listen import close, is_inherited, listen
from llmproxy.server.tls import ListenerTls
from llmproxy.service import ProxyService
from tests.support.fake_transport import until
from tests.support.keypairs import Vault
from tests.support.live_proxy import Response, read_response
from tests.support.served import GET, TCP, Served, ask, knock, limits
from tests.support.sockets import WAIT, Wire, connect


def option(sock: Any, level: int, name: int) -> int:
    """Return a socket's option."""
    return int(sock.getsockopt(level, name))


def watch(sock: Any) -> dict[str, int]:
    """Return the options by which the kernel notices that a peer vanished."""
    named = {
        name: option(sock, socket.IPPROTO_TCP, getattr(socket, name))
        for name in ("TCP_KEEPIDLE", "TCP_KEEPINTVL", "TCP_KEEPCNT", "TCP_USER_TIMEOUT")
    }
    return {**named, "SO_KEEPALIVE": option(sock, socket.SOL_SOCKET, socket.SO_KEEPALIVE)}


WATCHED = {"SO_KEEPALIVE": 1, "TCP_KEEPIDLE": 30, "TCP_KEEPINTVL": 10, "TCP_KEEPCNT": 3}
NOT_FOR_SLOW_ONES = {"TCP_USER_TIMEOUT": 0}
"""It would also end a client that takes a little all the time; the sweep knows the difference."""


# --- options of sockets ---------------------------------------------------------------------------


@pytest.mark.parametrize("text", [TCP, f"haproxy:{TCP}"])
@ensureDeferred
async def test_accepted_sockets_have_their_options(text: str, tls: ListenerTls | None) -> None:
    """Keepalive ends a client that vanished, a slow one stays, and small writes leave at once."""
    async with Served(text, tls=tls) as served:
        with connect(served.port):
            await served.until_connected(1)
            (sock,) = served.sockets()
            assert watch(sock) == {**WATCHED, **NOT_FOR_SLOW_ONES}
            assert option(sock, socket.IPPROTO_TCP, socket.TCP_NODELAY)


CONFIG = """
[proxy]
anonymous = true
listen = ["tcp:0:interface=127.0.0.1", "tcp6:0:interface=\\\\:\\\\:1"]
listen_tls = ["tcp:0:interface=127.0.0.1"]
certificate = "certificate"
key = "key"
[admin]
listen = "tcp:0:interface=127.0.0.1"
metrics_listen = "tcp:0:interface=127.0.0.1"
[providers.p]
url = "http://127.0.0.1:1"
dialect = "openai"
[[routes]]
path = "/p"
providers = ["p"]
"""


@ensureDeferred
async def test_every_listener_has_the_options(vault: Vault) -> None:
    """Plain and TLS listeners, and those of the admin site, have the options."""
    vault.put()
    service = ProxyService(parse(vault.config + CONFIG, environ={}), reactor, handle_signals=False)
    service.privilegedStartService()
    service.startService()
    try:
        watched = [watch(port.socket) for port in (*service.proxy_ports, *service.admin_ports)]
    finally:
        await service.stopService()
    assert watched == [{**WATCHED, **NOT_FOR_SLOW_ONES}] * 5


@pytest.mark.parametrize("where", ["buildProtocol", "joined"])
@ensureDeferred
async def test_a_connection_that_cannot_begin_holds_nobody_up(
    where: str, logged_failures: Any
) -> None:
    """That is logged, the connection is closed, and those behind it are served."""
    async with Served(TCP) as served:
        site: Any = served.site
        method, wanted = getattr(site, where), [True]

        def fail_once(argument: Any) -> Any:
            if wanted.pop() if wanted else False:
                raise RuntimeError("once")
            return method(argument)

        setattr(site, where, fail_once)
        with connect(served.port) as first, connect(served.port):
            await served.until_connected(1)
            first.sock.setblocking(False)
            await until(lambda: is_over(first.sock))
    assert len(logged_failures.flush(RuntimeError)) == 1


def is_over(sock: socket.socket) -> bool:
    """Return whether the other side has closed a connection."""
    try:
        return sock.recv(1) == b""
    except BlockingIOError:
        return False
    except ConnectionResetError:
        return True


# --- the queue ------------------------------------------------------------------------------------


def queue(sock: Any) -> int:
    """Return how many connections may wait on a listening socket: tcpi_sacked of linux/tcp.h."""
    info = sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 104)
    return int(struct.unpack_from("=I", info, 28)[0])


@pytest.mark.parametrize(("more", "asked"), [("", 4096), (":backlog=7", 7), (":backlog=200", 200)])
@pytest.mark.parametrize("text", [TCP, f"haproxy:{TCP}", "tcp6:0:interface=\\:\\:1"])
@ensureDeferred
async def test_a_burst_fits_into_the_queue(text: str, more: str, asked: int) -> None:
    """4096 connections may wait, or as many as the endpoint or the kernel allows."""
    if "tcp6" in text and not socket.has_dualstack_ipv6():
        pytest.skip("no IPv6 here")
    async with Served(text + more) as served:
        kernels = int(Path("/proc/sys/net/core/somaxconn").read_text())
        assert queue(served.listening.socket) == min(asked, kernels)


@pytest.fixture
def crowd() -> Iterator[list[Wire]]:
    """Clients; those that the test adds are closed behind it."""
    wires: list[Wire] = []
    yield wires
    for wire in wires:
        wire.close()


@pytest.mark.parametrize("closes", [False, True], ids=["listens", "closes"])
@ensureDeferred
async def test_every_connection_in_the_queue_is_served(crowd: list[Wire], closes: bool) -> None:
    """They are more than Twisted's queue of 50, and are accepted before the listener closes."""
    async with Served() as served:
        # The reactor does not turn meanwhile: all of them stand in the queue.
        crowd += [connect(served.port) for _ in range(300)]
        if closes:
            await close(served.listening, inherited=False)
            assert len(served.site.connections) == 300
        await served.until_connected(300)
        assert await served.run(ask, crowd[-1]) == b"127.0.0.1"


@pytest.mark.parametrize("direct", [True, False], ids=["ours", "twisteds"])
@pytest.mark.parametrize("text", [TCP, f"haproxy:{TCP}", "tcp6:0:interface=\\:\\:1", "unix"])
@ensureDeferred
async def test_a_crowd_is_accepted_few_by_few(
    crowd: list[Wire], path: Path, text: str, direct: bool
) -> None:
    """Between two few, whatever else is ready in the reactor has its turn."""
    if "tcp6" in text and not socket.has_dualstack_ipv6():
        pytest.skip("no IPv6 here")
    text = f"unix:{path}" if text == "unix" else text
    async with Served(text, direct=direct) as served:
        accepted: list[int] = []
        read = served.listening.doRead

        def accept() -> Any:
            before = served.listening.sessionno
            why = read()
            accepted.append(served.listening.sessionno - before)
            return why

        served.listening.doRead = accept
        for _ in range(30):
            crowd.append(
                connect_unix(path)
                if "unix" in text
                else Wire(socket.create_connection(served.listening.socket.getsockname()[:2]))
            )
        await served.until_connected(30)
        assert accepted == [4] * 7 + [2]


@ensureDeferred
async def test_a_client_that_comes_while_the_listener_closes_is_served(crowd: list[Wire]) -> None:
    """Twisted closes the socket a turn later; whoever comes until then is not reset."""
    async with Served() as served:
        closing = close(served.listening, inherited=False)
        crowd += [connect(served.port) for _ in range(20)]
        await closing
        await served.until_connected(20)
        assert await served.run(ask, crowd[-1]) == b"127.0.0.1"


# --- where it cannot listen -----------------------------------------------------------------------


@pytest.mark.parametrize("below", ["", "haproxy:"])
@ensureDeferred
async def test_a_taken_address_is_reported(below: str) -> None:
    """A start that would listen nowhere fails, and the error names the endpoint."""
    async with Served() as served:
        text = f"{below}tcp:{served.port}:interface=127.0.0.1"
        with pytest.raises(OSError, match=f"{text}: .*in use"):
            listen(reactor, text, served.site)


@pytest.mark.parametrize("text", ["tcp:0:interfaec=127.0.0.1", "systemd:domain=INET"])
@ensureDeferred
async def test_a_wrong_endpoint_is_reported(text: str) -> None:
    """The error quotes the words of the operator."""
    async with Served() as served:
        with pytest.raises(ValueError, match=f"{text}.*: not an endpoint: "):
            listen(reactor, text, served.site)


# --- several processes on one port ----------------------------------------------------------------


@pytest.mark.parametrize("below", ["", "haproxy:"])
@pytest.mark.parametrize("kind", ["tcp:{}:interface=127.0.0.1", "tcp6:{}:interface=\\:\\:1"])
@ensureDeferred
async def test_a_port_can_be_shared(below: str, kind: str) -> None:
    """Two listeners that both allow it bind the same address; one alone is not enough."""
    if "tcp6" in kind and not socket.has_dualstack_ipv6():
        pytest.skip("no IPv6 here")
    async with Served(below + kind.format(0), reuse_port=True) as first:
        text = below + kind.format(first.port)
        async with Served(text, reuse_port=True) as second:
            assert second.port == first.port
        with pytest.raises(OSError, match="in use"):
            listen(reactor, text, first.site)


def handed_over(monkeypatch: pytest.MonkeyPatch, sock: socket.socket, name: str = "proxy") -> None:
    """Let Twisted find ``sock`` as one that systemd handed over; it closes what it finds."""
    found = ListenFDs([os.dup(sock.fileno())], [name])
    monkeypatch.setattr(_SystemdParser, "_sddaemon", found)
    monkeypatch.setenv("LISTEN_FDNAMES", name)


@pytest.fixture
def systemds() -> Iterator[socket.socket]:
    """A listening socket that systemd would hold."""
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        sock.listen()
        yield sock


INHERITED = "systemd:domain=INET:name=proxy"


@pytest.mark.parametrize("below", ["", "haproxy:"])
@ensureDeferred
async def test_a_socket_of_systemds_stays_open(
    monkeypatch: pytest.MonkeyPatch, systemds: socket.socket, below: str
) -> None:
    """When our copy closes, a client in the queue is served by the next process that accepts."""
    handed_over(monkeypatch, systemds)
    async with Served(below + INHERITED) as served:
        early = connect(served.port)  # the reactor does not turn before the close
        assert is_inherited(below + INHERITED)
        await close(served.listening, inherited=True)
        assert not served.site.connections
        systemds.settimeout(WAIT)
        accepted, _ = systemds.accept()
        with early, Wire(accepted) as other:
            other.send(b"hello")
            assert early.read(5) == b"hello"


@pytest.mark.parametrize("text", [INHERITED, "systemd:domain=INET:index=0"])
@ensureDeferred
async def test_a_missing_socket_of_systemds_is_reported(
    monkeypatch: pytest.MonkeyPatch, text: str
) -> None:
    """The error says that the socket is missing."""
    monkeypatch.delenv("LISTEN_FDNAMES", raising=False)
    monkeypatch.delenv("LISTEN_PID", raising=False)
    async with Served() as served:
        with pytest.raises(ValueError, match=f"{text}: systemd handed over no such socket, and "):
            listen(reactor, text, served.site)


@ensureDeferred
async def test_a_socket_of_another_name_is_reported(
    monkeypatch: pytest.MonkeyPatch, systemds: socket.socket
) -> None:
    """The error lists the names that are there."""
    handed_over(monkeypatch, systemds, "web")
    async with Served() as served:
        with pytest.raises(ValueError, match=r"name=proxy: .* no such socket, but web: "):
            listen(reactor, INHERITED, served.site)


@ensureDeferred
async def test_a_socket_for_both_families_is_served(monkeypatch: pytest.MonkeyPatch) -> None:
    """`ListenStream=8080` is of IPv6, and serves clients of either family with their addresses."""
    if not socket.has_dualstack_ipv6():
        pytest.skip("no IPv6 here")
    with socket.create_server(("::", 0), family=socket.AF_INET6, dualstack_ipv6=True) as sock:
        handed_over(monkeypatch, sock)
        async with Served("systemd:domain=INET6:name=proxy") as served:
            with connect(served.port) as client:
                assert await served.run(ask, client) == b"::ffff:127.0.0.1"
            with Wire(socket.create_connection(("::1", served.port), WAIT)) as client:
                assert await served.run(ask, client) == b"::1"


FAMILIES = (socket.AF_INET, socket.AF_INET6, socket.AF_UNIX)


@pytest.mark.parametrize(
    ("said", "found"), [(a, b) for a in FAMILIES for b in FAMILIES if a is not b]
)
@ensureDeferred
async def test_a_socket_of_another_family_is_reported(
    monkeypatch: pytest.MonkeyPatch, said: socket.AddressFamily, found: socket.AddressFamily
) -> None:
    """Twisted would misread the addresses of clients; the error says what to write."""
    with socket.socket(found) as sock:
        handed_over(monkeypatch, sock)
        text = f"systemd:domain={said.name.removeprefix('AF_')}:name=proxy"
        wanted = found.name.removeprefix("AF_")
        async with Served() as served:
            with pytest.raises(OSError, match=rf"^{text}: .* another family: domain={wanted}$"):
                listen(reactor, text, served.site)


# --- a Unix socket --------------------------------------------------------------------------------


@pytest.fixture
def path(tmp_path: Path) -> Iterator[Path]:
    """Where a Unix socket may be; its name must be short."""
    path = tmp_path / "s"
    assert len(str(path)) < 100
    yield path
    assert not path.exists()


def connect_unix(path: Path) -> Wire:
    """Connect to a Unix socket."""
    sock = socket.socket(socket.AF_UNIX)
    sock.settimeout(WAIT)
    sock.connect(str(path))
    return Wire(sock)


@ensureDeferred
async def test_clients_of_a_unix_socket_are_served(path: Path, crowd: list[Wire]) -> None:
    """They have no address, and are counted together; the mode of the socket is the endpoint's."""
    async with Served(f"unix:{path}:mode=600", limiter=limits(3, 1)) as served:
        assert path.stat().st_mode & 0o777 == 0o600
        crowd += [connect_unix(path) for _ in range(3)]
        for wire in crowd:
            assert await served.run(ask, wire) == b"unix"
        with connect_unix(path) as late:
            got = await served.run(read_response, late)
            assert got.status == 503
            assert got.values(b"x-llmproxy-error") == [b"max_connections"]


@ensureDeferred
async def test_tls_over_a_unix_socket(path: Path, vault: Vault) -> None:
    """TLS works on every kind of listener."""

    def client() -> bytes:
        wire = connect_unix(path)
        with Wire(vault.client().wrap_socket(wire.sock, server_hostname="localhost")) as secure:
            return ask(secure)

    tls = ListenerTls(vault.issue().keypair())
    async with Served(f"unix:{path}", tls=tls) as served:
        assert await served.run(client) == b"unix"


# --- rejected connections -------------------------------------------------------------------------


@ensureDeferred
async def test_a_rejected_client_can_read_the_reason() -> None:
    """A clean end follows the response, although the request was not read."""

    def client() -> Response:
        with connect(served.port) as wire:
            wire.send(GET)
            got = read_response(wire)
            assert wire.wait_closed() == "fin"
            return got

    async with Served(limiter=limits(1)) as served:
        with connect(served.port):
            await served.until_connected(1)
            for _ in range(5):
                got = await served.run(client)
                assert got.status == 503
                assert got.values(b"x-llmproxy-error") == [b"max_connections"]
        await until(lambda: not served.site.connections)
        assert served.site.limiter.refused["max_connections"] == 5


@ensureDeferred
async def test_rejected_clients_that_stay_are_dropped(crowd: list[Wire]) -> None:
    """Of two hundred at most a hundred get a response; all end, and the next gets a response."""
    limiter = limits(1)
    async with Served(limiter=limiter) as served:
        with connect(served.port):
            await served.until_connected(1)
            timers = served.reactor.timers()
            crowd += [connect(served.port) for _ in range(200)]
            await until(lambda: limiter.refused["max_connections"] == 200)
            assert served.reactor.timers() == timers + 100
            await served.pass_time(3)
            await until(lambda: served.reactor.timers() == timers)
            assert b"max_connections" in (await served.run(knock, served.port))[1]
            ends = await served.run(lambda: [wire.wait_closed() for wire in crowd])
    assert set(ends) <= {"fin", "reset"}
    assert 0 < sum(b"max_connections" in wire.buffer for wire in crowd) <= 100


@ensureDeferred
async def test_on_tls_a_rejected_client_gets_no_response(vault: Vault) -> None:
    """The connection closes before a handshake, which would cost more than a served request."""
    tls = ListenerTls(vault.issue().keypair())
    async with Served(tls=tls, limiter=limits(1)) as served:
        with connect(served.port):
            await served.until_connected(1)
            timers = served.reactor.timers()
            assert await served.run(knock, served.port) == ("reset", b"")
            assert served.reactor.timers() == timers


@pytest.mark.parametrize(
    ("more", "mode"), [("", 0o660), (":mode=600", 0o600), (":mode=0666", 0o666)]
)
@pytest.mark.parametrize("kind", ["unix", "haproxy:unix"])
@ensureDeferred
async def test_a_unix_socket_is_not_open_to_all(
    tmp_path: Path, kind: str, more: str, mode: int
) -> None:
    """Owner and group may connect, where the endpoint does not say otherwise."""
    path = tmp_path / "sock"
    before = os.umask(0)
    try:
        async with Served(f"{kind}:{path}{more}"):
            assert path.stat().st_mode & 0o777 == mode
    finally:
        os.umask(before)
