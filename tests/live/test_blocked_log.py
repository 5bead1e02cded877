"""A log that nobody reads, or that has no room, stops nothing (ADR-0021)."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import threading
import time
from contextlib import suppress
from itertools import pairwise
from pathlib import Path
from typing import Any

from llmproxy.record.log_writer import QUEUE
from tests.support.daemon import Daemon, environment, provider_config, twistd
from tests.support.live_proxy import begin, read_response, until
from tests.support.scripts import PacedStream, event
from tests.support.sockets import WAIT, Provider, connect, request

MANY = 400
"""Requests whose access lines do not fit into the pipe."""

QUICK = 5.0
"""Seconds that no request and no page may take; a blocked daemon takes for ever."""


def ask_many(port: int, count: int, *, first: int = 0) -> None:
    """Send requests on one connection, each after the response to the one before."""
    with connect(port) as client:
        for number in range(first, first + count):
            client.send(request("GET", f"/none/{number}"))
            assert read_response(client).status == 404


def flood(port: int, count: int) -> None:
    """Send requests on one connection, many at once."""
    with connect(port) as client:
        sent = threading.Thread(
            target=lambda: client.send(
                b"".join(request("GET", f"/none/{number}") for number in range(count))
            )
        )
        sent.start()
        for _ in range(count):
            assert read_response(client).status == 404
        sent.join()


def paths(daemon: Daemon) -> list[str]:
    """Return the paths of the access lines so far."""
    lines = [line for line in list(daemon.log) if line["logger"] == "llmproxy.access"]
    return [line["path"] for line in lines]


def losses(daemon: Daemon) -> list[dict[str, Any]]:
    """Return the lines that say how many lines were lost."""
    return [line for line in list(daemon.log) if "were lost" in line["message"]]


def test_a_pipe_that_nobody_reads_holds_nothing_up(tmp_path: Path) -> None:
    """Requests, pages and a stream go on; later every line is there, in its order."""
    stream = PacedStream(event(0), event(1))
    with (
        Provider(stream) as provider,
        Daemon(tmp_path, provider_config(provider.url)) as daemon,
    ):
        with begin(connect(daemon.port), "/p/x") as client:
            assert client.read_chunk() == event(0)
            with daemon.unread():
                began = time.monotonic()
                ask_many(daemon.port, MANY)
                assert daemon.admin("/livez")
                assert daemon.metrics()["llmproxy_log_lines_lost_total"] == 0
                daemon.process.send_signal(signal.SIGUSR1)
                stream.turn.give()
                assert client.read_chunk() == event(1)
                assert time.monotonic() - began < QUICK
        daemon.wait_ended(MANY + 1)
        assert paths(daemon)[:MANY] == [f"/none/{number}" for number in range(MANY)]
        assert losses(daemon) == []


def test_what_does_not_fit_is_counted_and_reported(tmp_path: Path) -> None:
    """The oldest lines are kept; behind them a line says how many are missing; then all goes on."""
    count = QUEUE + 2000
    with Daemon(tmp_path, provider_config("http://127.0.0.1:1")) as daemon:
        with daemon.unread():
            flood(daemon.port, count)
            assert daemon.metrics()["llmproxy_log_lines_lost_total"] > 0
        (line,) = until(lambda: losses(daemon), "the loss is reported")
        lost = line["count"]
        assert line["level"] == "warn"
        assert 0 < lost <= count - QUEUE + 64  # access lines are put together
        kept = until(lambda: len(got := paths(daemon)) == count - lost and got, "all others")
        numbers = [int(path.removeprefix("/none/")) for path in kept]
        steps = [after - before for before, after in pairwise([-1, *numbers, count])]
        assert [step - 1 for step in steps if step != 1] == [lost], "they are missing in one place"
        ask_many(daemon.port, 1)
        until(lambda: len(paths(daemon)) == len(kept) + 1, "the next line")
        assert daemon.metrics()["llmproxy_log_lines_lost_total"] == lost
        assert len(losses(daemon)) == 1


def test_a_stop_does_not_wait_for_a_pipe_that_nobody_reads(tmp_path: Path) -> None:
    """The process ends within a bound, and by itself."""
    with Daemon(tmp_path, provider_config("http://127.0.0.1:1")) as daemon, daemon.unread():
        ask_many(daemon.port, MANY)
        daemon.terminate()
        assert daemon.process.wait(10) == 0


def test_a_stop_writes_what_waits(tmp_path: Path) -> None:
    """The last lines are there, and the very last says how the drain went."""
    with Daemon(tmp_path, provider_config("http://127.0.0.1:1")) as daemon:
        ask_many(daemon.port, MANY)
        daemon.terminate()
        assert daemon.process.wait(10) == 0
    assert len(paths(daemon)) == MANY
    assert daemon.log[-1]["message"] == "drained: 0 finished, 0 cut"


def test_a_daemon_starts_and_serves_with_a_full_pipe(tmp_path: Path) -> None:
    """A container that is started again may find its log's pipe as full as the last one left it."""
    out, into = os.pipe()
    os.set_blocking(into, False)
    with suppress(BlockingIOError):
        while True:
            os.write(into, bytes(4096))
    os.set_blocking(into, True)
    path = tmp_path / "admin"
    config = tmp_path / "llmproxy.toml"
    config.write_text(
        f'[proxy]\nlisten = ["unix:{tmp_path}/proxy"]\nanonymous = true\n'
        f'[admin]\nlisten = "unix:{path}"\n' + provider_config("http://127.0.0.1:1")
    )
    with subprocess.Popen(twistd(config), stdout=into, cwd=tmp_path, env=environment()) as process:
        try:
            until(path.exists, "it listens")
            with socket.socket(socket.AF_UNIX) as client:
                client.settimeout(WAIT)
                client.connect(str(path))
                client.sendall(request("GET", "/livez"))
                assert client.recv(100).startswith(b"HTTP/1.1 200")
        finally:
            process.terminate()
            process.wait(WAIT)
    os.close(out)
    os.close(into)
