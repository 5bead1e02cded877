"""Tunnels: from CONNECT to a host, byte for byte, and what they may reach."""

from __future__ import annotations

import hashlib
import random
import shutil
import socket
import ssl
import subprocess
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from tests.support.keypairs import Vault
from tests.support.live_proxy import assert_settles, read_response, trace_of, until
from tests.support.sandbox import Sandbox, connect_head, open_sandbox
from tests.support.sockets import WAIT, Provider, Wire, connect

SIZE = 100_000_000
TUNNELS = """
[tunnel]
allow = ["127.0.0.1:*", "localhost:*"]
allow_private = true
max_per_client = 1000
"""
MOST = 1000
LOST = "Connection to the other side was lost in a non-clean fashion."


@pytest.fixture(scope="module")
def live(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Sandbox]:
    """A proxy whose tunnels may reach this machine."""
    with open_sandbox(tmp_path_factory.mktemp("tunnels"), more=TUNNELS) as live:
        yield live


@pytest.fixture(scope="module")
def closed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Sandbox]:
    """A proxy whose list lets everything pass, and whose addresses are checked all the same."""
    more = '[tunnel]\nallow = ["*.example:443"]\nobserve = true\n'
    with open_sandbox(tmp_path_factory.mktemp("closed"), more=more) as live:
        yield live


def echo(wire: Wire) -> None:
    """Send everything back, and end when the other side does."""
    while data := wire.receive():
        wire.buffer = b""
        wire.send(data)
    wire.sock.shutdown(socket.SHUT_WR)


def test_bytes_cross_both_ways_and_each_side_ends_by_itself(live: Sandbox) -> None:
    """What comes with the CONNECT reaches the host first; a half-closed tunnel goes on."""
    with Provider(echo) as far, connect(live.daemon.port) as wire:
        wire.send(connect_head("127.0.0.1", "User-Agent: halves/1", port=far.port), b"early ")
        assert wire.read_until(b"\r\n\r\n") == b"HTTP/1.1 200 OK\r\n\r\n"
        wire.send(b"and late")
        assert wire.read(14) == b"early and late"
        wire.sock.shutdown(socket.SHUT_WR)
        assert wire.wait_closed() == "fin"
    record = trace_of(live.daemon, user_agent="halves/1")
    assert (record["tunnel"], record["end_reason"]) == ("tunnelled", "complete")
    assert (record["bytes_in"], record["bytes_out"]) == (14, 14)
    assert (record["client"], record["path"]) == ("team", f"127.0.0.1:{far.port}")
    assert live.gauge("tunnels") == 0
    assert_settles(live.daemon)


@pytest.mark.parametrize("at", [0, 1, 30, -1])
def test_a_connect_may_come_behind_another_request(live: Sandbox, at: int) -> None:
    """In the same write or split; the first request has its response before the tunnel begins."""
    with Provider(echo) as far, connect(live.daemon.port) as wire:
        first = connect_head("127.0.0.1", key="wrong", port=far.port)
        sent = connect_head("127.0.0.1", port=far.port) + b"early"
        wire.send(first + sent[:at])
        wire.send(sent[at:])
        assert read_response(wire).error == "unknown_key"
        assert wire.read_until(b"\r\n\r\n") == b"HTTP/1.1 200 OK\r\n\r\n"
        assert wire.read(5) == b"early"


def test_a_hundred_megabytes_each_way_are_exact_in_flat_memory(live: Sandbox) -> None:
    """The far side sends back what it gets, so that both directions are full at once."""
    block = random.Random(1).randbytes(1_000_000)
    before = memory(live)
    with Provider(echo) as far, live.tunnel("127.0.0.1", port=far.port) as wire:

        def send() -> None:
            for _ in range(SIZE // len(block)):
                wire.sock.sendall(block)
            wire.sock.shutdown(socket.SHUT_WR)

        sending = threading.Thread(target=send)
        sending.start()
        digest, count = hashlib.sha256(), 0
        while data := wire.sock.recv(1 << 20):
            digest.update(data)
            count += len(data)
        sending.join(WAIT)
    expected = hashlib.sha256()
    for _ in range(SIZE // len(block)):
        expected.update(block)
    assert (count, digest.digest()) == (SIZE, expected.digest())
    assert memory(live) - before < 8_000_000
    assert_settles(live.daemon)


def test_a_stuck_side_stops_the_other(live: Sandbox) -> None:
    """What the proxy and the kernels hold is bounded, and the rest waits at the sender."""
    stuck = threading.Event()

    def sleep(wire: Wire) -> None:
        stuck.wait(WAIT)

    with Provider(sleep) as far, live.tunnel("127.0.0.1", port=far.port) as wire:
        wire.sock.settimeout(0.5)
        sent = 0
        try:
            while sent < SIZE:
                sent += wire.sock.send(bytes(1 << 20))
        except TimeoutError:
            pass
        assert sent < SIZE
        stuck.set()


def test_a_thousand_idle_tunnels_stay(live: Sandbox) -> None:
    """As many as one client may have; each is still a tunnel afterwards."""
    with socket.create_server(("127.0.0.1", 0), backlog=4096) as listening:
        port = listening.getsockname()[1]
        wires, far = [], []
        for _ in range(MOST):
            wires.append(live.tunnel("127.0.0.1", port=port))
            far.append(listening.accept()[0])
        assert live.gauge("tunnels") == MOST
        with connect(live.daemon.port) as one_more:
            one_more.send(connect_head("127.0.0.1", port=port))
            got = read_response(one_more)
            assert (got.status, got.values(b"x-llmproxy-limit")) == (429, [b"max_per_client"])
        for wire, end in zip(wires, far, strict=True):
            wire.send(b"x")
            assert end.recv(2) == b"x"
            wire.close()
            end.close()
        until(lambda: live.gauge("tunnels") == 0, "no tunnel is left")


@pytest.mark.parametrize("end", ["fin", "reset"])
def test_the_end_of_the_host_is_the_client_s(live: Sandbox, end: str) -> None:
    """A reset is one, and no end of what was to come; the log says how the connection was lost."""

    def leave(wire: Wire) -> None:
        wire.send(b"some")
        wire.read(2)
        wire.reset() if end == "reset" else wire.close()

    with (
        Provider(leave) as far,
        live.tunnel("127.0.0.1", f"User-Agent: ends/{end}", port=far.port) as wire,
    ):
        assert wire.read(4) == b"some"
        wire.send(b"go")
        assert wire.wait_closed() == end
        wire.close()
    record = trace_of(live.daemon, user_agent=f"ends/{end}")
    assert record["end_reason"] == ("complete" if end == "fin" else "upstream_broken")
    assert how_it_was_lost(live, f"ends/{end}") == (None if end == "fin" else LOST)


def test_a_client_that_resets_is_gone(live: Sandbox) -> None:
    """The log says how its connection was lost."""
    with (
        Provider(echo) as far,
        live.tunnel("127.0.0.1", "User-Agent: resets/1", port=far.port) as wire,
    ):
        wire.reset()
    record = trace_of(live.daemon, user_agent="resets/1")
    assert (record["end_reason"], record["error"]) == ("client_gone", None)
    assert how_it_was_lost(live, "resets/1") == LOST


def how_it_was_lost(live: Sandbox, user_agent: str) -> str | None:
    """Return the detail of a CONNECT's access line."""

    def line() -> dict[str, Any] | None:
        found = (one for one in live.daemon.log if one["logger"] == "llmproxy.access")
        return next((one for one in found if one.get("user_agent") == user_agent), None)

    detail: str | None = until(line, "it has an access line").get("detail")
    return detail


# --- what may be reached --------------------------------------------------------------------------


@pytest.mark.parametrize(
    "host",
    ["127.0.0.1", "127.1", "2130706433", "0x7f000001", "0", "017700000001", "0.0.0.0",
     "[::1]", "[::ffff:127.0.0.1]", "[::]", "[64:ff9b::7f00:1]", "169.254.169.254",
     "[fd00:ec2::254]", "10.0.0.1", "192.168.1.1", "100.64.0.1", "224.0.0.1", "[fe80::1]",
     "localhost", "localhost.", "a.localhost"],
)  # fmt: skip
def test_no_spelling_reaches_what_is_not_public(closed: Sandbox, host: str) -> None:
    """Nothing listens to the proxy's asking: a listener of this machine is not connected to."""
    with socket.create_server(("127.0.0.1", 0)) as listening, connect(closed.daemon.port) as wire:
        port = listening.getsockname()[1]
        wire.send(connect_head(host, f"User-Agent: spelt/{host}", port=port))
        first, fields = wire.read_head()
        wire.read_body(fields)
        assert first.startswith((b"HTTP/1.1 403 ", b"HTTP/1.1 400 ")), first
        listening.settimeout(0)
        with pytest.raises(BlockingIOError):
            listening.accept()
    record = trace_of(closed.daemon, user_agent=f"spelt/{host}")
    assert (record["end_reason"], record["tunnel"]) == ("rejected", "refused")


@pytest.mark.parametrize("which", ["admin", "proxy"])
def test_the_proxy_s_own_ports_are_never_reached(live: Sandbox, which: str) -> None:
    """Also where every private address may be."""
    port = live.daemon.admin_port if which == "admin" else live.daemon.port
    for host in ("127.0.0.1", "localhost"):
        with connect(live.daemon.port) as wire:
            wire.send(connect_head(host, port=port))
            got = read_response(wire)
            assert (got.status, got.error) == (403, "address_forbidden")


def test_a_name_that_has_no_address_is_a_502(closed: Sandbox) -> None:
    """And says so in the status line."""
    with connect(closed.daemon.port) as wire:
        wire.send(connect_head("no-such-host.example"))
        first, _ = wire.read_head()
    assert first == b"HTTP/1.1 502 The host cannot be reached"


# --- programs -------------------------------------------------------------------------------------


class Quiet(SimpleHTTPRequestHandler):
    """Serves files, and writes no lines."""

    def log_message(self, *_: Any) -> None:
        """Write nothing."""


@contextmanager
def serving(folder: Path, vault: Vault) -> Iterator[int]:
    """Serve a folder by HTTPS; yield the port."""
    vault.put()
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.load_cert_chain(vault.directory / "certificate", vault.directory / "key")
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(folder)))
    server.socket = context.wrap_socket(server.socket, server_side=True)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield server.server_address[1]
    finally:
        server.shutdown()
        server.server_close()


@pytest.mark.skipif(shutil.which("git") is None, reason="git is not installed")
def test_git_clones_over_a_tunnel(live: Sandbox, tmp_path: Path) -> None:
    """It shows its key only behind a 407, on the same connection."""

    def git(*arguments: str, **environ: str) -> None:
        command = ["git", "-c", "user.name=t", "-c", "user.email=t@example.com", *arguments]
        environ = {**live.environment(), "GIT_TERMINAL_PROMPT": "0", **environ}
        done = subprocess.run(
            command, env=environ, capture_output=True, text=True, timeout=60, check=False
        )
        assert done.returncode == 0, done.stderr

    work, bare = str(tmp_path / "work"), str(tmp_path / "served" / "x.git")
    git("init", "-q", work)
    git("-C", work, "commit", "-q", "--allow-empty", "-m", "one")
    git("clone", "-q", "--bare", work, bare)
    git("-C", bare, "update-server-info")
    vault = Vault(tmp_path)
    with serving(tmp_path / "served", vault) as port:
        trust = {"GIT_SSL_CAINFO": str(vault.ca_path), "NO_PROXY": ""}
        git("clone", "-q", f"https://localhost:{port}/x.git", str(tmp_path / "cloned"), **trust)
    records = [one for one in live.daemon.traces() if one["path"] == f"localhost:{port}"]
    assert [one["status"] for one in records][:2] == [407, 200]
    git("-C", str(tmp_path / "cloned"), "rev-parse", "HEAD")


def memory(live: Sandbox) -> float:
    """Return the bytes that the daemon has in memory."""
    return live.daemon.metrics()["process_resident_memory_bytes"]
