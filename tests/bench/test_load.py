"""The benchmark's provider and load generator agree with each other, and see what is wrong."""

from __future__ import annotations

import json
import os
import shutil
import socket
import ssl
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from bench import build, capacity, peers, works
from bench.peers import Listen
from bench.processes import Program, free_port
from bench.rig import Bench, Target, open_bench
from tests.support.sockets import Provider, Wire, chunked

pytestmark = [
    pytest.mark.skipif(shutil.which("gcc") is None, reason="gcc is not installed"),
    pytest.mark.skipif(shutil.which("taskset") is None, reason="taskset is not installed"),
]

SMALL = {
    "stream": "--mode stream --conns 5 --events 20 --interval-us 2000 --ramp 0.1 --timeout 30",
    "unpaused": "--mode stream --conns 5 --events 500 --interval-us 0 --ramp 0 --timeout 30",
    "short": "--mode short --conns 3 --seconds 0.1 --timeout 30",
    "big": "--mode big --conns 2 --requests 2 --request-bytes 300000 --answer-bytes 700000",
}


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bench]:
    """A provider that runs, and a load generator; built in a folder of their own."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(build, "CACHE", tmp_path_factory.mktemp("cache"))
        with open_bench(tmp_path_factory.mktemp("run"), secure=False) as opened:
            yield opened


def ask(bench: Bench, port: int, args: str) -> dict[str, Any]:
    """Run the load generator; return its line."""
    return bench.load(Target(port, "/v1/chat/completions"), args.split())


@pytest.mark.parametrize("name", SMALL)
def test_every_byte_is_as_expected_without_a_proxy(bench: Bench, name: str) -> None:
    """The load generator and the provider find nothing wrong in each other's bytes."""
    line = ask(bench, bench.plain.port, SMALL[name])
    assert works.failures(line) == 0, line
    assert line["whole"] > 0
    events = {"stream": 100, "unpaused": 2500}
    assert line["events"] == events.get(name, 0)
    assert line["cpu_us"] > 0


def test_leaving_clients_are_noticed(bench: Bench) -> None:
    """Each client says when it left, and the provider when it saw that."""
    args = "--mode leave --conns 4 --events 10000 --interval-us 5000 --ramp 0.1 --seconds 0.4"
    bench.tell("reset")
    line = ask(bench, bench.plain.port, args)
    assert sorted(who for who, _ in line["left"]) == [0, 1, 2, 3]
    closes = bench.closes(4)
    assert all(closes[who] >= at for who, at in line["left"])


def test_what_is_sent_to_stuck_clients_is_bounded(bench: Bench) -> None:
    """Clients that do not read let the provider send some bytes, and no more."""
    bench.tell("reset")
    ask(bench, bench.plain.port, "--mode stuck --conns 2 --seconds 0.3 --ramp 0")
    taken = json.loads(bench.tell("stats"))["stuck_bytes"]
    assert 0 < taken < 100_000_000


def stream(bench: Bench, wish: str) -> bytes:
    """Return the bytes of a stream on a connection that its provider closes."""
    body = f'{{"user":"{wish},close=1","stream":true}}'
    head = f"POST / HTTP/1.1\r\nContent-Length: {len(body)}\r\n\r\n"
    found = b""
    with socket.create_connection(("127.0.0.1", bench.plain.port), 20) as sock:
        sock.sendall((head + body).encode())
        while piece := sock.recv(65536):
            found += piece
    return found


def test_a_provider_closes_behind_a_stream_where_that_is_wished(bench: Bench) -> None:
    """The response says so and is whole; clients then come on new connections."""
    found = stream(bench, "events=2,interval_us=0")
    assert b"\r\nConnection: close\r\n" in found
    assert found.endswith(b"\r\n0\r\n\r\n")
    bench.tell("reset")
    line = ask(bench, bench.plain.port, SMALL["stream"] + " --close 1 --requests 2")
    assert (works.failures(line), line["whole"]) == (0, 10)


def test_delays_of_streams_that_ran_before_are_told_apart(bench: Bench) -> None:
    """They are told where others are opened beside them, and all streams are whole."""
    args = "--mode stream --conns 5 --events 3 --interval-us 1000 --ramp 0.1 --timeout 20"
    line = ask(bench, bench.plain.port, f"{args} --beside 2 --beside-events 20 --wait 0.2")
    assert (works.failures(line), line["events"]) == (0, 2 * 20 + 3 * 3)
    assert line["beside_us"]["max"] <= line["delay_us"]["max"]
    assert ask(bench, bench.plain.port, args)["beside_us"] is None


def test_a_gap_is_changed_by_what_an_event_is_later_than_the_one_before(bench: Bench) -> None:
    """An event that is held up for 200 ms changes its gap by as much, whatever the delays are."""
    whole = stream(bench, "events=2,interval_us=0")
    at = whole.rindex(b"data: ", 0, whole.index(b"tok000001"))

    def script(wire: Wire) -> None:
        wire.read_request()
        wire.send(whole[:at])
        time.sleep(0.2)
        wire.send(whole[at:])

    with Provider(script) as provider:
        line = ask(bench, provider.port, "--mode stream --conns 1 --events 2 --timeout 20")
    assert works.failures(line) == 0, line
    assert 190_000 < line["gap_us"]["p50"] < 2_000_000


def test_further_fields_are_sent(bench: Bench) -> None:
    """What a proxy must be told stands in the head of a request."""
    heads = []

    def script(wire: Wire) -> None:
        heads.append(wire.read_request())
        wire.send(b"HTTP/1.1 503 Full\r\nContent-Length: 0\r\n\r\n")

    with Provider(script) as provider:
        target = Target(provider.port, "/v1/chat/completions", ("x-one: 1", "x-two: 2"))
        bench.load(target, SMALL["stream"].replace("5", "1").split())
    assert {(b"x-one", b"1"), (b"x-two", b"2")} <= set(heads[0].fields)


@pytest.mark.parametrize(
    ("response", "counted"),
    [
        (b"HTTP/1.1 200 OK\r\nContent-Length: 4\r\n\r\n{}\n\n", "wrong"),
        (
            b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n" + chunked(b"data: x\n\n"),
            "failed",
        ),
        (b"HTTP/1.1 503 Full\r\nContent-Length: 0\r\n\r\n", "failed"),
        (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n", "failed"),
        (b"", "failed"),
    ],
)
def test_a_wrong_response_is_counted(bench: Bench, response: bytes, counted: str) -> None:
    """Other bytes, an end too early, an error status, and what is no HTTP never count as good."""

    def script(wire: Wire) -> None:
        wire.read_request()
        wire.send(response)

    with Provider(script) as provider:
        line = ask(bench, provider.port, "--mode stream --conns 1 --events 5 --timeout 20")
    assert line[counted] == 1, line


def test_the_reason_of_a_failed_build_is_reported(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Where the compiler fails, its last line is in the error."""
    monkeypatch.setattr(build, "CACHE", tmp_path / "missing" / "folder")
    monkeypatch.setattr(build, "SOURCES", tmp_path)
    (tmp_path / "mock.c").write_text("this is not C\n")
    with pytest.raises(build.CannotBuildError, match="mock cannot be built"):
        build.tool("mock")


def test_a_crowd_is_held_by_one_process(bench: Bench, tmp_path: Path) -> None:
    """Every stream of a small crowd is whole, and there are figures for each of them."""
    found = capacity.crowd(bench, tmp_path, 20, 1)
    assert found["failures"] == 0
    assert {"kib_stream", "core_share", "delay_p99", "us_event"} <= set(found)
    (line,) = capacity.lines({"crowd": found}, 20)
    assert line.startswith("20 streams of one event a second: ")
    assert line.endswith("failed 0")


def test_two_processes_share_a_port(bench: Bench, tmp_path: Path) -> None:
    """Both are started, and a load that goes to either is whole."""
    with ExitStack() as stack:
        proxy, port = capacity.start(bench, 2, tmp_path, stack)
        before = proxy.cpu_us()
        line = bench.load(Target(port, f"/openai{peers.PATH}"), SMALL["stream"].split())
        assert works.failures(line) == 0
        assert proxy.cpu_us() > before
        assert proxy.pss_kib() > 0


# -- by TLS ---------------------------------------------------------------------------------------

BEGINNINGS = "--mode stream --conns 5 --events 2 --interval-us 1000 --ramp 0.1 --close 1"


@pytest.fixture(scope="module")
def secure(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bench]:
    """A provider that is reached by TLS, too."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(build, "CACHE", tmp_path_factory.mktemp("cache"))
        patch.setenv("PATH", os.environ["PATH"] + ":/usr/sbin:/sbin")
        if shutil.which("haproxy") is None:
            pytest.skip("haproxy is not installed")
        try:
            build.load_by_tls()
        except build.CannotBuildError as error:
            pytest.skip(str(error))
        with open_bench(tmp_path_factory.mktemp("run"), secure=True) as opened:
            yield opened


def test_streams_by_tls_are_whole_and_no_session_is_used_again(secure: Bench) -> None:
    """Each connection has a handshake of its own, and every byte is as expected."""
    assert secure.secure is not None
    target = Target(secure.secure.port, "/v1/chat/completions", (), secure.secure.authority)
    seen = secure.observe(target, BEGINNINGS.split())
    assert (works.failures(seen.load), seen.load["whole"]) == (0, 5), seen.load
    assert set(seen.resumed) == {False}


def test_a_certificate_of_somebody_else_is_refused(secure: Bench, tmp_path: Path) -> None:
    """The load generator verifies what it is shown."""
    assert secure.secure is not None
    trustme = pytest.importorskip("trustme")
    other = tmp_path / "other.pem"
    trustme.CA().cert_pem.write_to_path(str(other))
    line = secure.load(Target(secure.secure.port, "/", (), other), BEGINNINGS.split())
    assert (line["failed"], line["whole"]) == (5, 0)


def test_the_daemon_serves_with_tls_on_both_sides(secure: Bench, tmp_path: Path) -> None:
    """It ends TLS and begins TLS, and goes on with its sessions with the provider."""
    assert secure.secure is not None
    authority, pair = build.certificates()
    listen = Listen(free_port(), pair)
    peer = peers.PEERS["llmproxy"]
    start = peer.start(peer.needs(), listen, secure.secure, tmp_path)
    with Program(start.command, secure.where.proxy, tmp_path / "log", start.environ) as proxy:
        assert proxy.wait_for(listen.port), proxy.last_word()
        context = ssl.create_default_context(cafile=authority)
        with (
            socket.create_connection(("127.0.0.1", listen.port), 20) as sock,
            context.wrap_socket(sock, server_hostname="localhost") as wrapped,
        ):
            assert wrapped.version() == "TLSv1.3"
        target = Target(listen.port, start.path, start.fields, authority)
        found = secure.observe(target, BEGINNINGS.split(), proxy)
        assert (works.failures(found.load), found.load["whole"]) == (0, 5), found.load
        assert True in secure.observe(target, BEGINNINGS.split(), proxy).resumed
