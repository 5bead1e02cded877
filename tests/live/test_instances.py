"""Several processes on one port: restarted in turn, killed, and what a client sees of it."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from tests.support.daemon import Daemon, provider_config
from tests.support.demo import Demo
from tests.support.live_proxy import read_response, until
from tests.support.load import Load, ask
from tests.support.sockets import WAIT, Wire, connect, request

NAMED = {"LISTEN_FDNAMES": "proxy"}
LONG_S = 12
"""Seconds of a long stream, which a stop waits for: more than connecting and a request's head may
take.  The test lasts three streams."""

INHERITED = 'listen = ["systemd:domain=INET:name=proxy"]\nanonymous = true'


@pytest.fixture
def shared() -> Iterator[socket.socket]:
    """A listening socket, as systemd would hold one."""
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        sock.listen(4096)
        sock.setblocking(False)
        yield sock


class Instances:
    """Two daemons on one socket; each can be stopped and started again.

    Args:
        folder: where each has a folder of its own.
        demo: the provider behind them.
        sock: the socket that they share.
    """

    def __init__(self, folder: Path, demo: Demo, sock: socket.socket) -> None:
        self._folder = folder
        self._config = provider_config(demo.url)
        self._sock = sock
        self.port: int = sock.getsockname()[1]
        self.running: dict[str, Daemon] = {}

    def start(self, name: str) -> None:
        """Start one; it listens when this returns."""
        folder = self._folder / name
        folder.mkdir(exist_ok=True)
        daemon = Daemon(
            folder, self._config, proxy=INHERITED, environ=NAMED, instance=name, inherit=self._sock
        )
        self.running[name] = daemon.__enter__()
        assert daemon.port == self.port

    def stop(self, name: str) -> dict[str, int]:
        """Stop one, as systemd does; return what its last line says."""
        daemon = self.running.pop(name)
        daemon.terminate()
        assert daemon.process.wait(WAIT + LONG_S) == 0
        daemon.__exit__(None, None, None)
        (last,) = (line for line in daemon.log if line["message"].startswith("drained: "))
        return {"finished": last["finished"], "cut": last["cut"]}

    def restart(self, name: str) -> dict[str, int]:
        """Stop one and start it again; return what the last line of the old one says."""
        ended = self.stop(name)
        self.start(name)
        return ended

    def end(self) -> None:
        """Stop those that run, and check their logs."""
        for daemon in self.running.values():
            daemon.__exit__(None, None, None)

    def kill(self, name: str) -> None:
        """Kill one."""
        daemon = self.running.pop(name)
        daemon.process.kill()
        daemon.process.wait(WAIT)
        daemon.__exit__(None, None, None)


@pytest.fixture
def instances(tmp_path: Path, demo: Demo, shared: socket.socket) -> Iterator[Instances]:
    """Two daemons, ``1`` and ``2``, on one socket."""
    instances = Instances(tmp_path, demo, shared)
    with ExitStack() as stack:
        stack.callback(instances.end)
        for name in ("1", "2"):
            instances.start(name)
        yield instances


@pytest.mark.timeout(300)  # each of the two is stopped for as long as its streams last
def test_a_restart_in_turn_rejects_and_breaks_nothing(instances: Instances) -> None:
    """Short calls and long streams, none tried again: all are served, and whole."""
    with Load(instances.port, words=20 * LONG_S) as load:
        load.wait_more("fresh", 20)
        ended = [instances.restart(name) for name in ("1", "2")]
    load.assert_whole("fresh", "kept", "stream")
    assert [one["cut"] for one in ended] == [0, 0]
    assert sum(one["finished"] for one in ended) > 0


def test_a_client_waits_while_no_instance_runs(instances: Instances) -> None:
    """The socket's queue outlives all instances; the first that starts serves the clients in it."""
    for name in ("1", "2"):
        instances.stop(name)
    with connect(instances.port) as early:
        early.send(ask(1, "demo-fast"))
        instances.start("1")
        assert read_response(early).status == 200


def begin(instances: Instances) -> tuple[Wire, str]:
    """Begin a stream; return it, and the name of the instance that serves it."""
    before = {name: streams(daemon) for name, daemon in instances.running.items()}
    wire = connect(instances.port)
    wire.send(ask(60, "demo-20tps"))
    wire.read_head()
    (name,) = (n for n, daemon in instances.running.items() if streams(daemon) > before[n])
    return wire, name


def streams(daemon: Daemon) -> float:
    """Return how many streams an instance is serving."""
    return daemon.metrics()["llmproxy_active_streams"]


def test_a_killed_instance_loses_its_own_streams_alone(instances: Instances) -> None:
    """Those of the other one end whole, and the port goes on being served."""
    with ExitStack() as stack:
        served: dict[str, list[Wire]] = {"1": [], "2": []}

        def both() -> bool:
            wire, name = begin(instances)
            served[name].append(stack.enter_context(wire))
            return all(served.values())

        until(both, "each instance serves a stream")
        instances.kill("1")
        for wire in served["1"]:
            with pytest.raises((EOFError, ConnectionError)):
                wire.read_chunks()
        for wire in served["2"]:
            assert wire.read_chunks().endswith(b"data: [DONE]\n\n")
        with connect(instances.port) as late:
            late.send(ask(1, "demo-fast"))
            assert read_response(late).status == 200


def test_processes_share_a_port_without_systemd(tmp_path: Path, demo: Demo) -> None:
    """Two processes bind it with `reuse_port`; each serves some clients and writes its own name."""
    with ExitStack() as stack:
        with socket.socket() as free:
            free.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
            daemons = []
            for name in ("a", "b"):
                (tmp_path / name).mkdir()
                proxy = (
                    f'listen = ["tcp:{port}:interface=127.0.0.1"]\n'
                    "reuse_port = true\nanonymous = true"
                )
                config = provider_config(demo.url)
                one = Daemon(tmp_path / name, config, proxy=proxy, instance=name)
                daemons.append(stack.enter_context(one))

        def both_have_served() -> bool:
            with connect(port) as client:
                client.send(request("GET", "/p/v1/models"))
                assert read_response(client).status == 200
            return all(daemon.traces() for daemon in daemons)

        until(both_have_served, "each has served somebody")
        for daemon, name in zip(daemons, ("a", "b"), strict=True):
            assert {trace["instance"] for trace in daemon.traces()} == {name}
