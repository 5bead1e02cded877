"""How the daemon stops: refuse, wait, cut; and what the world sees of it (design 13)."""

from __future__ import annotations

import signal
import socket
import time
import urllib.error
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest

from tests.support.daemon import Daemon
from tests.support.live_proxy import (
    PLAIN,
    Link,
    begin,
    post,
    read_response,
    tls_link,
    trace_of,
    until,
)
from tests.support.scripts import KEPT, Notes, PacedStream, Turn, event, hold, keep_replying, reply
from tests.support.sockets import WAIT, Script, Wire, connect, request
from tests.support.tls import Authority


@contextmanager
def running(folder: Path, script: Script, link: Link = PLAIN, **keys: Any) -> Iterator[Daemon]:
    """Run a daemon before a provider that plays ``script``."""
    with link.provider(script) as provider, Daemon(folder, link.config(provider), **keys) as daemon:
        yield daemon


def begin_stream(daemon: Daemon) -> Wire:
    """Begin a stream, and read its first event."""
    client = begin(connect(daemon.port), "/p/x")
    assert client.read_chunk() == event(0)
    return client


def is_refused(port: int) -> bool:
    """Tell whether nobody listens any more."""
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) != 0


def last_line(daemon: Daemon) -> dict[str, Any]:
    """Return the last line that the daemon itself logged."""
    return [line for line in daemon.log if line["logger"].startswith("llmproxy")][-1]


def assert_ended(daemon: Daemon, *, finished: int, cut: int) -> None:
    """Check the exit code, and what stands in the log's last line."""
    assert daemon.process.wait(WAIT) == 0
    until(lambda: not daemon._reader.is_alive(), "the log is read")
    line = last_line(daemon)
    assert (line["finished"], line["cut"]) == (finished, cut)


def test_a_running_body_finishes(tmp_path: Path, link: Link) -> None:
    """SIGTERM closes the listener; the stream goes on to its end, and the exit code is 0."""
    script = PacedStream(event(0), event(1))
    with running(tmp_path, script, link) as daemon, begin_stream(daemon) as client:
        daemon.terminate()
        daemon.wait_log("draining")
        until(lambda: is_refused(daemon.port), "the listener is closed")
        with pytest.raises(urllib.error.HTTPError, match="503") as not_ready:
            daemon.admin("/readyz")
        not_ready.value.close()
        assert daemon.admin("/livez")
        assert daemon.metrics()["llmproxy_draining"] == 1
        assert daemon.process.poll() is None
        script.turn.give()
        assert client.read_chunks() == event(1)
        assert client.wait_closed() == "fin"
        script.ended.read()
        assert_ended(daemon, finished=1, cut=0)
        assert trace_of(daemon, path="/p/x")["end_reason"] == "complete"


def test_a_response_that_is_waited_for_still_comes(tmp_path: Path, link: Link) -> None:
    """It says that the connection ends with it."""
    asked, turn = Turn(), Turn()

    def script(wire: Wire) -> None:
        wire.read_request()
        asked.give()
        turn.take()
        wire.send(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok")
        wire.wait_closed()

    with running(tmp_path, script, link) as daemon, connect(daemon.port) as client:
        client.send(post("/p/x"))
        asked.take()
        daemon.terminate()
        daemon.wait_log("draining")
        turn.give()
        got = read_response(client)
        assert (got.status, got.body) == (200, b"ok")
        assert got.values(b"connection") == [b"close"]
        assert client.wait_closed() == "fin"
        assert_ended(daemon, finished=1, cut=0)


def test_idle_connections_are_closed(tmp_path: Path, authority: Authority) -> None:
    """Clients that ask nothing, before or after a response, and kept provider connections."""
    with ExitStack() as stack:
        drains = []
        for name, link in (("plain", PLAIN), ("tls", tls_link(authority))):
            (tmp_path / name).mkdir()
            ended = Notes()
            script = hold(ended, KEPT)
            daemon = stack.enter_context(running(tmp_path / name, script, link))
            new, served = (stack.enter_context(connect(daemon.port)) for _ in range(2))
            served.send(request("GET", "/p/x"))
            assert read_response(served).body == b"ok"
            drains.append((daemon, ended, (new, served)))
        for daemon, _, _ in drains:  # a client that has just come is given some seconds
            daemon.terminate()
        for daemon, ended, clients in drains:
            for client in clients:
                assert client.wait_closed() == "fin"
                assert client.buffer == b""
            ended.read()
            assert_ended(daemon, finished=0, cut=0)


@pytest.mark.parametrize("before", [b"", b"GET /p", b"GET /p/x HTTP/1.1\r\nHo"])
def test_a_request_on_a_live_connection_is_still_served(tmp_path: Path, before: bytes) -> None:
    """It may begin before the signal or just after it; the response says Connection: close."""
    with running(tmp_path, reply(KEPT)) as daemon, connect(daemon.port) as client:
        client.send(before)
        until(lambda: daemon.metrics()["llmproxy_client_connections"] == 1, "it is connected")
        daemon.terminate()
        daemon.wait_log("draining")
        client.send(request("GET", "/p/x").removeprefix(before))
        got = read_response(client)
        assert got.body == b"ok"
        assert got.values(b"connection") == [b"close"]
        assert client.wait_closed() == "fin"
        assert daemon.process.wait(WAIT) == 0


def assert_cut(daemon: Daemon, client: Wire, script: PacedStream) -> None:
    """Check that one stream was cut, on both sides and in the record."""
    client.wait_closed()
    assert client.buffer == b""
    script.ended.read()
    assert_ended(daemon, finished=0, cut=1)
    record = trace_of(daemon, path="/p/x")
    assert (record["end_reason"], record["is_complete"]) == ("drained", False)


def test_the_drain_timeout_cuts_what_runs(tmp_path: Path, link: Link) -> None:
    """One signal is enough in the end."""
    script = PacedStream(event(0))
    proxy = 'anonymous = true\ndrain_timeout = "400ms"'
    with running(tmp_path, script, link, proxy=proxy) as daemon, begin_stream(daemon) as client:
        daemon.terminate()
        assert_cut(daemon, client, script)


def test_a_body_that_is_still_coming_is_cut_too(tmp_path: Path) -> None:
    """Nobody serves that request yet; the last line counts it, and it has a record."""
    with (
        running(tmp_path, PacedStream(event(0), event(1))) as daemon,
        connect(daemon.port) as client,
    ):
        client.send(post("/p/x")[:-1])
        until(lambda: daemon.metrics()["llmproxy_request_bytes_held"] > 0, "a body is coming")
        daemon.terminate()
        assert daemon.wait_log("draining")["running"] == 1
        until(lambda: daemon.metrics()["llmproxy_drain_remaining_requests"] == 1, "it is seen")
        assert 0 < daemon.metrics()["llmproxy_drain_remaining_seconds"] <= 300
        daemon.terminate()
        client.wait_closed()
        assert client.buffer == b""
        assert_ended(daemon, finished=0, cut=1)
        assert trace_of(daemon, path="/p/x")["end_reason"] == "drained"


def test_the_service_manager_hears_of_a_life(tmp_path: Path) -> None:
    """Ready once it listens; then a reload; how far a drain is; and nothing that comes later."""
    script = PacedStream(event(0), event(1))
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.bind(str(tmp_path / "notify"))
        manager.settimeout(WAIT)

        def hear(*words: str) -> list[str]:
            """Return the lines of the next message that is no ping, and check how they begin."""
            while (lines := manager.recv(4096).decode().splitlines()) == ["WATCHDOG=1"]:
                pings.append(lines[0])
            for word in words:
                assert any(line.startswith(word) for line in lines), lines
            return lines

        pings: list[str] = []
        environ = {"NOTIFY_SOCKET": str(tmp_path / "notify"), "WATCHDOG_USEC": "200000"}
        with running(tmp_path, script, environ=environ) as daemon:
            hear("READY=1", "STATUS=0 streams, 0 connections, version ")
            daemon.process.send_signal(signal.SIGHUP)
            (_, said) = hear("RELOADING=1", "MONOTONIC_USEC=")
            assert int(said.partition("=")[2]) < time.monotonic() * 1e6
            hear("READY=1")
            with begin_stream(daemon) as client:
                daemon.terminate()
                hear("STOPPING=1")
                hear("EXTEND_TIMEOUT_USEC=", "STATUS=")
                while "draining: 1 streams are left" not in hear("STATUS=")[-1]:
                    pass
                script.turn.give()
                assert client.read_chunks() == event(1)
            assert daemon.process.wait(WAIT) == 0
            assert pings


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_second_signal_cuts_what_runs_and_more_are_no_error(
    tmp_path: Path, number: signal.Signals
) -> None:
    """The second signal cuts what runs; nothing is logged as an error, and the exit code is 0."""
    script = PacedStream(event(0))
    with running(tmp_path, script) as daemon, begin_stream(daemon) as client:
        for _ in range(2):  # of a burst, the kernel may make one signal
            for _ in range(20):
                with suppress(ProcessLookupError):
                    daemon.process.send_signal(number)
            daemon.wait_log("draining")
        assert_cut(daemon, client, script)


def test_signals_up_to_the_last_moment_are_no_error(tmp_path: Path) -> None:
    """The interpreter gives up its handlers before it ends; the exit code is 0 all the same."""
    with running(tmp_path, keep_replying) as daemon:
        assert daemon.admin("/readyz") == "ready\n"  # it runs, so it has its handlers
        while daemon.process.poll() is None:
            with suppress(ProcessLookupError):
                daemon.process.send_signal(signal.SIGTERM)
        assert daemon.process.returncode == 0
