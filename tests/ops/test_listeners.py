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
    """Certificates for a listener, and who trusts them."""
    vault = Vault(tmp_path)
    vault.put()
    return vault


class Hall:
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
async def opened() -> AsyncIterator[Hall]:
    """A hall, which is left closed."""
    hall = Hall()
    try:
        yield hall
    finally:
        await hall.close()


def ask(port: Any) -> bytes:
    """Ask whoever listens at a port of Twisted's."""
    where = port.getHost()
    with socket.create_connection((where.host, where.port), 20) as sock:
        wire = Wire(sock)
        wire.send(GET)
        return read_response(wire).body


def refuses(where: Any) -> bool:
    """Tell whether nobody listens at an address."""
    with socket.socket() as probe:
        return probe.connect_ex((where.host, where.port)) != 0


@ensureDeferred
async def test_what_stays_in_the_file_stays_open() -> None:
    """The very same sockets, also of the admin site, in whatever order they are named."""
    async with opened() as hall:
        one, two = hall.follow(HOME, OTHER)
        admin = list(hall.listeners.admin)
        sockets = [port.socket for port in (one, two, *admin)]
        assert hall.follow(OTHER, HOME) == [two, one]
        assert hall.listeners.admin == admin
        assert [port.socket for port in (one, two, *admin)] == sockets
        assert await deferToThread(ask, one) == b"127.0.0.1"


@ensureDeferred
async def test_the_same_words_twice_are_two_ports() -> None:
    """One of them stays where one is left, and a third is a new one."""
    async with opened() as hall:
        one, two = hall.follow(HOME, HOME)
        assert one is not two
        assert hall.follow(HOME) == [one]
        again = hall.follow(HOME, HOME, HOME)
        assert again[0] is one
        assert len(set(again)) == 3


@ensureDeferred
async def test_a_listener_comes_and_goes(logged: Listening) -> None:
    """It is told of both; whoever has connected stays connected."""
    async with opened() as hall:
        (home,) = hall.follow(HOME)
        hall.listeners.report()
        _, other = hall.follow(HOME, OTHER)
        before = len(logged)
        hall.listeners.report()
        hall.listeners.report()
        where = other.getHost()
        assert [formatEvent(event) for event in logged[before:]] == [f"proxy listens on {where}"]
        assert await deferToThread(ask, other) == b"127.0.0.1"
        wire = await deferToThread(
            lambda: Wire(socket.create_connection((where.host, where.port), 20))
        )
        with wire:
            await until(lambda: len(hall.site.connections) == 1)
            assert hall.follow(HOME) == [home]
            assert formatEvent(logged[-1]) == f"proxy listens no more on {where}"
            await until(lambda: refuses(where))
            wire.send(GET)
            assert (await deferToThread(read_response, wire)).body == b"127.0.0.1"
        await until(lambda: not hall.site.connections)


@ensureDeferred
async def test_who_waits_at_a_port_that_closes_is_served() -> None:
    """It had connected before: the kernel would reset it."""
    async with opened() as hall:
        _, other = hall.follow(HOME, OTHER)
        where = other.getHost()
        early = Wire(socket.create_connection((where.host, where.port), 20))  # no turn until ...
        hall.follow(HOME)  # ... here
        with early:
            early.send(GET)
            assert (await deferToThread(read_response, early)).body == b"127.0.0.1"
        await until(lambda: not hall.site.connections)


@pytest.mark.parametrize("admin", ["", 'metrics_listen = "{taken}"'])
@ensureDeferred
async def test_an_address_that_is_taken_changes_nothing(admin: str) -> None:
    """What was opened before it is closed again, and what was open is open."""
    with socket.create_server(("127.0.0.4", 0)) as taker:
        taken = f"tcp:{taker.getsockname()[1]}:interface=127.0.0.4"
        wanted = [OTHER] if admin else [OTHER, taken]
        async with opened() as hall:
            (home,) = hall.follow(HOME)
            names = set(hall.reactor.getReaders())
            with pytest.raises(OSError, match=f"^{taken}: "):
                hall.prepare(*wanted, admin=admin.format(taken=taken))
            await turn()
            assert set(hall.reactor.getReaders()) == names
            assert hall.listeners.proxy == [home]
            assert await deferToThread(ask, home) == b"127.0.0.1"


@ensureDeferred
async def test_what_was_opened_for_nothing_is_closed() -> None:
    """What was open before stays."""
    async with opened() as hall:
        (home,) = hall.follow(HOME)
        _, listeners = hall.prepare(HOME, OTHER)
        (new,) = (
            port for _, port in listeners if port is not home and "0.2" in str(port.getHost())
        )
        where = new.getHost()
        hall.listeners.abandon(listeners)
        await until(lambda: refuses(where))
        assert await deferToThread(ask, home) == b"127.0.0.1"


@ensureDeferred
async def test_admin_listeners_move_like_others() -> None:
    """One for metrics alone comes and goes; the admin site's own stays meanwhile."""
    async with opened() as hall:
        hall.follow(HOME)
        (admin,) = hall.listeners.admin
        hall.follow(HOME, admin='metrics_listen = "tcp:0:interface=127.0.0.3"')
        assert hall.listeners.admin[0] is admin
        metrics = hall.listeners.admin[1]
        assert metrics.factory is hall.metrics
        hall.follow(HOME)
        assert hall.listeners.admin == [admin]


@ensureDeferred
async def test_a_listener_with_tls_comes_and_goes(vault: Vault) -> None:
    """It stays while there is the same TLS for it, whatever that shows."""
    async with opened() as hall:
        first = vault.put()
        hall.tls = ListenerTls(first.keypair())
        _, secure = hall.follow(HOME, vault=vault)
        second = vault.issue()
        hall.tls.show(ListenerTls(second.keypair()))
        assert hall.follow(HOME, vault=vault)[1] is secure

        def seen() -> bytes | None:
            with connect(secure.getHost().port, tls=vault.client()) as wire:
                return shown_to(wire)

        assert await deferToThread(seen) == second.der
        where, hall.tls = secure.getHost(), None
        assert len(hall.follow(HOME)) == 1
        await until(lambda: refuses(where))
        await until(lambda: not hall.site.connections)


@ensureDeferred
async def test_an_open_port_can_be_shared_from_now_on() -> None:
    """`reuse_port` counts for what is open, too; without it the address is taken."""
    async with opened() as hall, opened() as second:
        (port,) = hall.follow(HOME)
        same = f"tcp:{port.getHost().port}:interface=127.0.0.1"
        with pytest.raises(OSError, match="in use"):
            second.prepare(same, more="reuse_port = true")
        assert hall.follow(HOME, more="reuse_port = true") == [port]
        (other,) = second.follow(same, more="reuse_port = true")
        assert other.getHost() == port.getHost()
        assert hall.follow(HOME) == [port]
        assert port.socket.getsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT) == 0


# --- sockets that systemd handed over -------------------------------------------------------------


@pytest.mark.parametrize("below", ["", "haproxy:"])
@ensureDeferred
async def test_what_systemd_handed_over_can_be_come_back_to(
    monkeypatch: pytest.MonkeyPatch, systemds: socket.socket, below: str
) -> None:
    """Left, taken up again, and read in another way: it is always that socket."""
    handed_over(monkeypatch, systemds)
    where = systemds.getsockname()
    async with opened() as hall:
        (first,) = hall.follow(INHERITED)
        number = first.given
        hall.follow(HOME)
        await turn()
        # Whatever is opened meanwhile does not get the number that systemd's socket has.
        with socket.socket() as other:
            assert other.fileno() != number
            (again,) = hall.follow(below + INHERITED)
        assert again is not first
        assert again.socket.getsockname() == where
        if not below:
            assert await deferToThread(ask, again) == b"127.0.0.1"


@ensureDeferred
async def test_the_end_lets_go_of_what_systemd_handed_over(
    monkeypatch: pytest.MonkeyPatch, systemds: socket.socket
) -> None:
    """Also of what a reload had left: when systemd closes its own, nobody waits for nothing."""
    handed_over(monkeypatch, systemds)
    where = systemds.getsockname()
    async with opened() as hall:
        hall.follow(INHERITED)
        hall.follow(HOME)
        await hall.listeners.close_proxy()
        systemds.close()
        with socket.socket() as probe, suppress(ConnectionRefusedError):
            probe.connect(where)
            pytest.fail("somebody listens")
