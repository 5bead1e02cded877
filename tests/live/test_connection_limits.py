"""How many may connect: in all, from one address, and where the process has no descriptor left."""

from __future__ import annotations

import json
import os
import resource
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from http.client import HTTPException
from pathlib import Path

import pytest

from tests.support.daemon import Daemon, provider_config
from tests.support.keypairs import LISTEN_TLS, Vault
from tests.support.live_proxy import Response, read_response, until
from tests.support.scripts import keep_replying
from tests.support.served import knock
from tests.support.sockets import WAIT, Provider, Wire, connect, request

MOST = 5
TICK = os.sysconf("SC_CLK_TCK")
PAUSE = threading.Event()
"""Never set: a wait for it is a pause."""


@contextmanager
def running(folder: Path, *, proxy: str = "", more: str = "") -> Iterator[Daemon]:
    """Run a daemon in front of a provider that replies."""
    with (
        Provider(keep_replying) as provider,
        Daemon(
            folder, provider_config(provider.url) + more, proxy=f"anonymous = true\n{proxy}"
        ) as daemon,
    ):
        yield daemon


def connect_from(source: str, port: int) -> Wire:
    """Connect from one of loopback's many addresses."""
    sock = socket.create_connection(("127.0.0.1", port), WAIT, (source, 0))
    return Wire(sock)


def ask(wire: Wire) -> Response:
    """Ask once on a connection that stays."""
    wire.send(request("GET", "/p/x"))
    return read_response(wire)


def clients(daemon: Daemon) -> float:
    """Return how many clients the daemon says that it has."""
    return daemon.metrics()["llmproxy_client_connections"]


def limited(daemon: Daemon, limit: str) -> float:
    """Return how many connections a limit has rejected."""
    return daemon.metrics()[f'llmproxy_limited_total{{client="",limit="{limit}"}}']


def cpu_seconds(daemon: Daemon) -> float:
    """Return the processor time that the daemon has had, its own and the kernel's for it."""
    text = Path(f"/proc/{daemon.process.pid}/stat").read_text()
    fields = text.rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / TICK


def assert_quiet(daemon: Daemon) -> None:
    """Check that the daemon does not spin: it had less than half of a second's time."""
    before = cpu_seconds(daemon)
    PAUSE.wait(1.0)
    assert cpu_seconds(daemon) - before < 0.5


def assert_rejection(got: Response, limit: str) -> None:
    """Check the response of a rejected connection."""
    assert got.status == 503
    assert got.values(b"x-llmproxy-error") == [limit.encode()]
    assert got.values(b"retry-after") == [b"1"]
    assert got.values(b"connection") == [b"close"]
    assert got.values(b"content-type") == [b"application/json"]
    assert len(got.values(b"date")) == 1
    assert got.json()["error"]["code"] == limit


def read_rejection(wire: Wire) -> Response:
    """Return the response of a rejected connection, whether it asked or not."""
    got = read_response(wire)
    assert wire.wait_closed() == "fin"
    return got


# --- in all ---------------------------------------------------------------------------------------


def test_beyond_max_connections_there_is_a_503(tmp_path: Path) -> None:
    """Each further connection gets one, asking or silent; the others are served as before."""
    with running(tmp_path, proxy=f"max_connections = {MOST}") as daemon, ExitStack() as stack:
        inside = [stack.enter_context(connect(daemon.port)) for _ in range(MOST)]
        for wire in inside:
            assert ask(wire).body == b"ok"
        for asks in (True, False, True):
            with connect(daemon.port) as late:
                if asks:
                    late.send(request("GET", "/p/x"))
                assert_rejection(read_rejection(late), "max_connections")
        assert limited(daemon, "max_connections") == 3
        assert limited(daemon, "connections_per_address") == 0
        assert clients(daemon) == MOST
        for wire in inside:
            assert ask(wire).body == b"ok"
        line = daemon.wait_log("connections are rejected", limit="max_connections")
        assert (line["level"], line["address"], line["connections"]) == ("warn", "127.0.0.1", MOST)
        assert len([line for line in daemon.log if "are rejected" in line["message"]]) == 1


def test_one_that_leaves_makes_room(tmp_path: Path) -> None:
    """The place is free again however the connection ends."""
    with running(tmp_path, proxy="max_connections = 2") as daemon, connect(daemon.port) as stays:
        assert ask(stays).body == b"ok"
        for leave in ("close", "reset", "half a request") * 3:
            with connect(daemon.port) as wire:
                assert ask(wire).body == b"ok"
                with connect(daemon.port) as late:
                    assert_rejection(read_rejection(late), "max_connections")
                if leave == "reset":
                    wire.reset()
                elif leave == "half a request":
                    wire.send(b"GET /p/x HT")
            until(lambda: clients(daemon) == 1, "it is gone")
        assert ask(stays).body == b"ok"


def test_a_full_proxy_keeps_its_admin_site(tmp_path: Path) -> None:
    """An operator finds the reason there, however long the proxy is full."""
    with running(tmp_path, proxy="max_connections = 1") as daemon, connect(daemon.port) as inside:
        assert ask(inside).body == b"ok"
        for _ in range(20):
            with connect(daemon.port) as late:
                assert_rejection(read_rejection(late), "max_connections")
            for path in ("/livez", "/readyz", "/config", "/metrics"):
                assert daemon.admin(path)
        shown = json.loads(daemon.admin("/config"))
        assert shown["proxy"]["max_connections"] == 1


def test_a_full_proxy_does_not_spin(tmp_path: Path) -> None:
    """It is quiet while it is full, and while rejected connections stay open."""
    with running(tmp_path, proxy="max_connections = 1") as daemon, ExitStack() as stack:
        inside = stack.enter_context(connect(daemon.port))
        assert ask(inside).body == b"ok"
        assert_quiet(daemon)
        crowd = [stack.enter_context(connect(daemon.port)) for _ in range(80)]
        until(lambda: limited(daemon, "max_connections") == 80, "all of them are rejected")
        assert_quiet(daemon)
        for wire in crowd:
            assert_rejection(read_rejection(wire), "max_connections")
        assert ask(inside).body == b"ok"


def test_a_rejected_client_that_stays_is_dropped(tmp_path: Path) -> None:
    """A rejected client that sends on is closed after two seconds, and holds no descriptor."""
    with running(tmp_path, proxy="max_connections = 1") as daemon, connect(daemon.port):
        until(lambda: clients(daemon) == 1, "the first is inside")
        before = len(daemon.descriptors())
        with connect(daemon.port) as late:
            began = time.monotonic()
            with suppress(ConnectionError):
                while time.monotonic() - began < 15:
                    late.send(b"x" * 100)
                    PAUSE.wait(0.05)
            assert 1 < time.monotonic() - began < 10
            until(lambda: len(daemon.descriptors()) <= before, "its descriptor is free again")


def test_plain_and_tls_are_counted_together(tmp_path: Path) -> None:
    """A connection that the TLS listener rejects is closed before any handshake."""
    vault = Vault(tmp_path)
    vault.put()
    proxy = f"max_connections = 2\n{LISTEN_TLS}"
    with (
        running(tmp_path, proxy=proxy, more=vault.config) as daemon,
        connect(daemon.port) as plain,
        connect(daemon.tls_port, tls=vault.client()) as secure,
    ):
        assert (ask(plain).body, ask(secure).body) == (b"ok", b"ok")
        with connect(daemon.port) as late:
            assert_rejection(read_rejection(late), "max_connections")
        assert knock(daemon.tls_port) == ("reset", b"")
        assert limited(daemon, "max_connections") == 2
        secure.close()
        until(lambda: clients(daemon) == 1, "it is gone")
        with connect(daemon.tls_port, tls=vault.client()) as again:
            assert ask(again).body == b"ok"


# --- from one address -----------------------------------------------------------------------------

PER_ADDRESS = "[limits]\nconnections_per_address = 2\n"


def test_each_address_has_its_own_limit(tmp_path: Path) -> None:
    """An address at its limit gets a 503, and no other; a connection that ends makes room."""
    with running(tmp_path, more=PER_ADDRESS) as daemon, ExitStack() as stack:
        inside: list[Wire] = []
        for source in ("127.0.0.1", "127.0.0.2", "127.0.0.3"):
            for _ in range(2):
                inside.append(stack.enter_context(connect_from(source, daemon.port)))
                assert ask(inside[-1]).body == b"ok"
        for count, source in enumerate(("127.0.0.2", "127.0.0.3", "127.0.0.2"), 1):
            with connect_from(source, daemon.port) as late:
                assert_rejection(read_rejection(late), "connections_per_address")
            assert limited(daemon, "connections_per_address") == count
        assert limited(daemon, "max_connections") == 0
        assert clients(daemon) == 6
        with connect_from("127.0.0.4", daemon.port) as other:
            assert ask(other).body == b"ok"
        inside[-1].close()
        until(lambda: clients(daemon) == 5, "it is gone")
        with connect_from("127.0.0.3", daemon.port) as again:
            assert ask(again).body == b"ok"
        line = daemon.wait_log("connections are rejected", limit="connections_per_address")
        assert line["address"] == "127.0.0.2"


def test_behind_a_balancer_its_clients_are_counted(tmp_path: Path) -> None:
    """The address is that of the PROXY header; all of them come from the balancer's."""
    more = PER_ADDRESS.replace("= 2", "= 1")
    proxy = 'listen = ["haproxy:tcp:0:interface=127.0.0.1"]\n'

    def come(client: str) -> Wire:
        wire = connect(daemon.port)
        wire.send(f"PROXY TCP4 {client} 192.0.2.100 4000 80\r\n".encode())
        wire.send(request("GET", "/p/x"))
        return wire

    with Provider(keep_replying) as provider:
        daemon = Daemon(tmp_path, provider_config(provider.url) + more)
        text = daemon.config_path.read_text()
        ours = 'listen = ["tcp:0:interface=127.0.0.1"]\nanonymous'
        assert ours in text
        daemon.config_path.write_text(text.replace(ours, f"{proxy}anonymous"))
        with daemon, come("192.0.2.1") as one, come("192.0.2.2") as other:
            assert [read_response(one).body, read_response(other).body] == [b"ok", b"ok"]
            with come("192.0.2.1") as late:
                assert_rejection(read_rejection(late), "connections_per_address")
            assert limited(daemon, "connections_per_address") == 1
            assert [ask(one).body, ask(other).body] == [b"ok", b"ok"]
            one.close()
            until(lambda: clients(daemon) == 1, "it is gone")
            with come("192.0.2.1") as again:
                assert read_response(again).body == b"ok"


# --- no descriptor left ---------------------------------------------------------------------------

ROOM = 12
"""Descriptors that the daemon gets beyond those that it has."""


def cramped(daemon: Daemon, *, room: bool = True) -> AbstractContextManager[None]:
    """Let the daemon have few descriptors more than it has now, or none at all."""
    most = max(daemon.descriptors()) + 1 + ROOM if room else 3
    return daemon.limited(resource.RLIMIT_NOFILE, most)


def is_left_with(daemon: Daemon, count: float) -> bool:
    """Tell whether the daemon has so many clients; not so while it cannot even say."""
    with suppress(OSError, HTTPException):
        return clients(daemon) == count
    return False


def is_closed(wire: Wire) -> bool:
    """Tell whether the other side has closed a connection on which nobody speaks."""
    wire.sock.setblocking(False)
    try:
        return not wire.sock.recv(1, socket.MSG_PEEK)
    except BlockingIOError:
        return False
    except ConnectionError:
        return True
    finally:
        wire.sock.settimeout(WAIT)


@pytest.mark.parametrize("secure", [False, True])
def test_without_descriptors_it_goes_on(tmp_path: Path, secure: bool) -> None:
    """It neither dies nor spins, serves its clients, and accepts again when there is room."""
    vault = Vault(tmp_path)
    vault.put()
    with running(tmp_path, proxy=LISTEN_TLS, more=vault.config) as daemon, ExitStack() as stack:
        port = daemon.tls_port if secure else daemon.port
        kept = stack.enter_context(connect(port, tls=vault.client() if secure else None))
        assert ask(kept).body == b"ok"  # and the provider's connection is kept, too
        before = len(daemon.descriptors())
        with cramped(daemon):
            crowd = [stack.enter_context(connect(port)) for _ in range(4 * ROOM)]
            # Each beyond the last descriptor is closed; nobody is left in the queue.
            until(
                lambda: (
                    sum(map(is_closed, crowd)) + len(daemon.descriptors()) - before == len(crowd)
                ),
                "each is inside or closed",
            )
            assert 0 < sum(map(is_closed, crowd)) < len(crowd)
            for _ in range(3):
                assert ask(kept).body == b"ok"
            assert_quiet(daemon)
            assert daemon.process.poll() is None
            for wire in crowd:
                wire.close()
            until(lambda: is_left_with(daemon, 1), "the crowd is gone")
            for _ in range(2 * ROOM):  # there is room again, for one after the other
                with connect(port, tls=vault.client() if secure else None) as wire:
                    assert ask(wire).body == b"ok"
        assert ask(kept).body == b"ok"
    assert_logged_a_little(daemon)


def is_served(daemon: Daemon) -> bool:
    """Tell whether a client that comes now is served."""
    with suppress(OSError, EOFError), connect(daemon.port) as wire:
        return ask(wire).body == b"ok"
    return False


def assert_logged_a_little(daemon: Daemon) -> None:
    """Check that the log has something of it, and no more than a few lines for each client."""
    lines = [line for line in daemon.log if "EMFILE" in line["message"]]
    assert 0 < len(lines) < 20 * ROOM


def test_without_any_descriptor_it_does_not_spin(tmp_path: Path) -> None:
    """It is quiet even without the descriptor that is kept in reserve, then and later."""
    with running(tmp_path) as daemon, connect(daemon.port) as kept, ExitStack() as stack:
        assert ask(kept).body == b"ok"
        with cramped(daemon, room=False):
            waiting = stack.enter_context(connect(daemon.port))
            assert_waits_quietly(daemon, kept)
        if not is_closed(waiting):
            assert ask(waiting).body == b"ok"
        waiting.close()
        with cramped(daemon):
            crowd = [stack.enter_context(connect(daemon.port)) for _ in range(4 * ROOM)]
            assert_waits_quietly(daemon, kept)
            for wire in crowd:
                wire.close()
            until(lambda: is_served(daemon), "the crowd is gone")  # also from the kernel's queue
        # Twisted says at `critical` that it has lost the descriptor that it keeps in reserve.
        daemon.log = [line for line in daemon.log if "Could not reserve" not in line["message"]]


def assert_waits_quietly(daemon: Daemon, kept: Wire) -> None:
    """Check that waiting clients cost no time and no log, and that the kept one is served."""
    lines = len(daemon.log)
    assert_quiet(daemon)
    assert ask(kept).body == b"ok"
    assert len(daemon.log) - lines < 1000
