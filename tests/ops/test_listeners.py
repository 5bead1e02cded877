"""What a process listens on, from one configuration to the next: kept, opened, closed."""

from __future__ import annotations

import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
from pytest_twisted import ensureDeferred
from twisted.internet.threads import deferToThread
from twisted.logger import formatEvent

from llmproxy.config import Config, parse
from llmproxy.ops.listeners import Listener, Listeners
from llmproxy.server.handler import Router
from llmproxy.server.site import Site
from llmproxy.server.tls import ListenerTls
from tests.ops.conftest import Listening
from tests.server.test_listen import INHERITED, handed_over, systemds
from tests.support.fake_transport import TurnedReactor, turn, until
from tests.support.keypairs import LISTEN_TLS, Vault, shown_to
from tests.support.live_proxy import read_response
from tests.support.served import GET, AddressHandler
from tests.support.sockets import Wire, connect

__all__ = ["systemds"]  # a fixture

HOME, OTHER = "tcp:0:interface=127.0.0.1", "tcp:0:interface=127.0.0.2"

REST = """
[admin]
listen = "tcp:0:interface=127.0.0.3"
{admin}
[providers.p]
url = "http://127.0.0.1:1"
dialect = "openai"
[[routes]]
path = "/p"
providers = ["p"]
"""


@pytest.fixture
def vault(tmp_path: Path) -> Vault:
    """Certificates for a listener, and their authority."""
    vault = Vault(tmp_path)
    vault.put()
    return vault


class ListeningSites:
    """Listeners, and the sites that are reached by them."""

    def __init__(self) -> None:
        self.reactor = TurnedReactor()
        self.site, self.admin, self.metrics = (
            Site(Router(AddressHandler()), self.reactor, self.reactor.seconds, wall=lambda: 0.0)
            for _ in range(3)
        )
        self.listeners = Listeners(
            self.reactor, site=self.site, admin=self.admin, metrics=self.metrics, direct=True
        )
        self.tls: ListenerTls | None = None

    def prepare(
        self, *listen: str, more: str = "", admin: str = "", vault: Vault | None = None
    ) -> tuple[Config, list[Listener]]:
        """Prepare to listen there."""
        texts = ", ".join(f'"{text}"' for text in listen)
        tls = "" if vault is None else LISTEN_TLS + vault.config
        text = f"[proxy]\nanonymous = true\nlisten = [{texts}]\n{more}\n{tls}"
        config = parse(text + REST.format(admin=admin), environ={})
        return config, self.listeners.prepare(config, self.tls)

    def follow(self, *listen: str, **parts: Any) -> list[Any]:
        """Listen there and nowhere else; return the proxy's ports."""
        config, listeners = self.prepare(*listen, **parts)
        self.listeners.use(listeners, reuse_port=config.proxy.reuse_port)
        return list(self.listeners.proxy)

    async def close(self) -> None:
        """Listen no more; nothing may be left."""
        await self.listeners.close_proxy()
        await self.listeners.close_admin()
        for site in (self.site, self.admin, self.metrics):
            site.cut()
            await site.when_empty()
        assert not self.reactor.timers()


@asynccontextmanager
async def opened() -> AsyncIterator[ListeningSites]:
    """Sites without a listener, which are closed behind the test."""
    sites = ListeningSites()
    try:
        yield sites
    finally:
        await sites.close()


def ask(port: Any) -> bytes:
    """Send a request to a port of Twisted's; return the body of the response."""
    where = port.getHost()
    with socket.create_connection((where.host, where.port), 20) as sock:
        wire = Wire(sock)
        wire.send(GET)
        return read_response(wire).body


def refuses(where: Any) -> bool:
    """Return whether an address refuses connections."""
    with socket.socket() as probe:
        return probe.connect_ex((where.host, where.port)) != 0


@ensureDeferred
async def test_every_address_that_is_listened_on_is_known(tmp_path: Path) -> None:
    """Those of operators, too; a reload changes the list that others hold."""
    async with opened() as sites:
        held = sites.listeners.addresses
        metrics = 'metrics_listen = "tcp:0:interface=127.0.0.4"'
        sites.follow(HOME, OTHER, f"unix:{tmp_path}/socket", admin=metrics)
        hosts = [host for host, _ in held]
        assert hosts == ["127.0.0.1", "127.0.0.2", "127.0.0.3", "127.0.0.4"]
        ports = [*sites.listeners.proxy[:2], *sites.listeners.admin]
        assert [port for _, port in held] == [one.getHost().port for one in ports]
        sites.follow(OTHER)
        assert [host for host, _ in held] == ["127.0.0.2", "127.0.0.3"]


@ensureDeferred
async def test_a_listener_that_stays_in_the_file_stays_open() -> None:
    """The very same sockets, also of the admin site, in whatever order they are named."""
    async with opened() as sites:
        one, two = sites.follow(HOME, OTHER)
        admin = list(sites.listeners.admin)
        sockets = [port.socket for port in (one, two, *admin)]
        assert sites.follow(OTHER, HOME) == [two, one]
        assert sites.listeners.admin == admin
        assert [port.socket for port in (one, two, *admin)] == sockets
        assert await deferToThread(ask, one) == b"127.0.0.1"


@ensureDeferred
async def test_the_same_address_twice_is_two_ports() -> None:
    """One of them stays where one is left, and a third is a new one."""
    async with opened() as sites:
        one, two = sites.follow(HOME, HOME)
        assert one is not two
        assert sites.follow(HOME) == [one]
        again = sites.follow(HOME, HOME, HOME)
        assert again[0] is one
        assert len(set(again)) == 3


@ensureDeferred
async def test_a_listener_comes_and_goes(logged: Listening) -> None:
    """Both are logged, and a client that is connected stays connected."""
    async with opened() as sites:
        (home,) = sites.follow(HOME)
        sites.listeners.report()
        _, other = sites.follow(HOME, OTHER)
        before = len(logged)
        sites.listeners.report()
        sites.listeners.report()
        where = other.getHost()
        named = f"127.0.0.2:{where.port}"
        assert [formatEvent(event) for event in logged[before:]] == [f"proxy listens on {named}"]
        assert await deferToThread(ask, other) == b"127.0.0.1"
        wire = await deferToThread(
            lambda: Wire(socket.create_connection((where.host, where.port), 20))
        )
        with wire:
            await until(lambda: len(sites.site.connections) == 1)
            assert sites.follow(HOME) == [home]
            assert formatEvent(logged[-1]) == f"proxy listens no more on {named}"
            await until(lambda: refuses(where))
            wire.send(GET)
            assert (await deferToThread(read_response, wire)).body == b"127.0.0.1"
        await until(lambda: not sites.site.connections)


@ensureDeferred
async def test_a_client_in_the_queue_of_a_closing_port_is_served() -> None:
    """It was connected before the port closed, and the kernel would reset it."""
    async with opened() as sites:
        _, other = sites.follow(HOME, OTHER)
        where = other.getHost()
        early = Wire(socket.create_connection((where.host, where.port), 20))  # no turn until ...
        sites.follow(HOME)  # ... here
        with early:
            early.send(GET)
            assert (await deferToThread(read_response, early)).body == b"127.0.0.1"
        await until(lambda: not sites.site.connections)


@pytest.mark.parametrize("admin", ["", 'metrics_listen = "{taken}"'])
@ensureDeferred
async def test_an_address_that_is_taken_changes_nothing(admin: str) -> None:
    """New listeners are closed again, and the open ones stay open."""
    with socket.create_server(("127.0.0.4", 0)) as taker:
        taken = f"tcp:{taker.getsockname()[1]}:interface=127.0.0.4"
        wanted = [OTHER] if admin else [OTHER, taken]
        async with opened() as sites:
            (home,) = sites.follow(HOME)
            names = set(sites.reactor.getReaders())
            with pytest.raises(OSError, match=f"^{taken}: "):
                sites.prepare(*wanted, admin=admin.format(taken=taken))
            await turn()
            assert set(sites.reactor.getReaders()) == names
            assert sites.listeners.proxy == [home]
            assert await deferToThread(ask, home) == b"127.0.0.1"


@ensureDeferred
async def test_abandoned_listeners_are_closed() -> None:
    """Listeners that were open before stay open."""
    async with opened() as sites:
        (home,) = sites.follow(HOME)
        _, listeners = sites.prepare(HOME, OTHER)
        (new,) = (
            port for _, port in listeners if port is not home and "0.2" in str(port.getHost())
        )
        where = new.getHost()
        sites.listeners.abandon(listeners)
        await until(lambda: refuses(where))
        assert await deferToThread(ask, home) == b"127.0.0.1"


@ensureDeferred
async def test_admin_listeners_move_like_others() -> None:
    """One for metrics alone comes and goes; the admin site's own stays meanwhile."""
    async with opened() as sites:
        sites.follow(HOME)
        (admin,) = sites.listeners.admin
        sites.follow(HOME, admin='metrics_listen = "tcp:0:interface=127.0.0.3"')
        assert sites.listeners.admin[0] is admin
        metrics = sites.listeners.admin[1]
        assert metrics.factory is sites.metrics
        sites.follow(HOME)
        assert sites.listeners.admin == [admin]


@ensureDeferred
async def test_a_listener_with_tls_comes_and_goes(vault: Vault) -> None:
    """It stays while there is TLS for it, whatever certificate that shows."""
    async with opened() as sites:
        first = vault.put()
        sites.tls = ListenerTls(first.keypair())
        _, secure = sites.follow(HOME, vault=vault)
        second = vault.issue()
        sites.tls.show(ListenerTls(second.keypair()))
        assert sites.follow(HOME, vault=vault)[1] is secure

        def seen() -> bytes | None:
            with connect(secure.getHost().port, tls=vault.client()) as wire:
                return shown_to(wire)

        assert await deferToThread(seen) == second.der
        where, sites.tls = secure.getHost(), None
        assert len(sites.follow(HOME)) == 1
        await until(lambda: refuses(where))
        await until(lambda: not sites.site.connections)


@ensureDeferred
async def test_an_open_port_can_be_shared_from_now_on() -> None:
    """`reuse_port` counts for open ports, too; without it the address is taken."""
    async with opened() as sites, opened() as second:
        (port,) = sites.follow(HOME)
        same = f"tcp:{port.getHost().port}:interface=127.0.0.1"
        with pytest.raises(OSError, match="in use"):
            second.prepare(same, more="reuse_port = true")
        assert sites.follow(HOME, more="reuse_port = true") == [port]
        (other,) = second.follow(same, more="reuse_port = true")
        assert other.getHost() == port.getHost()
        assert sites.follow(HOME) == [port]
        assert port.socket.getsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT) == 0


# --- sockets that systemd handed over -------------------------------------------------------------


@pytest.mark.parametrize("below", ["", "haproxy:"])
@ensureDeferred
async def test_a_socket_of_systemd_can_be_listened_on_again(
    monkeypatch: pytest.MonkeyPatch, systemds: socket.socket, below: str
) -> None:
    """Left, listened on again, or read in another way: it is always that socket."""
    handed_over(monkeypatch, systemds)
    where = systemds.getsockname()
    async with opened() as sites:
        (first,) = sites.follow(INHERITED)
        number = first.given
        sites.follow(HOME)
        await turn()
        # Whatever is opened meanwhile does not get the number that systemd's socket has.
        with socket.socket() as other:
            assert other.fileno() != number
            (again,) = sites.follow(below + INHERITED)
        assert again is not first
        assert again.socket.getsockname() == where
        if not below:
            assert await deferToThread(ask, again) == b"127.0.0.1"


@ensureDeferred
async def test_a_shutdown_closes_the_sockets_of_systemd(
    monkeypatch: pytest.MonkeyPatch, systemds: socket.socket
) -> None:
    """Also those that a reload had left: no client waits in a queue without a server."""
    handed_over(monkeypatch, systemds)
    where = systemds.getsockname()
    async with opened() as sites:
        sites.follow(INHERITED)
        sites.follow(HOME)
        await sites.listeners.close_proxy()
        systemds.close()
        with socket.socket() as probe, suppress(ConnectionRefusedError):
            probe.connect(where)
            pytest.fail("the address accepts connections")


@pytest.mark.parametrize(
    ("endpoint", "words"),
    [
        ("tcp:0:interface=127.0.0.1", "127.0.0.1:{port}"),
        (r"tcp6:0:interface=\\:\\:1", "[::1]:{port}"),
        ("unix:{folder}/socket", "unix:{folder}/socket"),
    ],
)
@ensureDeferred
async def test_an_address_is_written_as_people_write_it(
    endpoint: str, words: str, tmp_path: Path, logged: Listening
) -> None:
    """Whatever kind of socket it is, no object of Twisted's is shown."""
    if "tcp6" in endpoint and not socket.has_dualstack_ipv6():
        pytest.skip("no IPv6 here")
    async with opened() as sites:
        (port,) = sites.follow(endpoint.replace("{folder}", str(tmp_path)))
        sites.listeners.report()
        number = getattr(port.getHost(), "port", None)
        address = words.format(port=number, folder=tmp_path)
        (line,) = [one for one in logged if one.get("site") == "proxy"]
        assert (line["address"], formatEvent(line)) == (address, f"proxy listens on {address}")
