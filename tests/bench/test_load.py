"""The benchmark's provider and load generator agree with each other, and see what is wrong."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from bench import build, capacity, peers, works
from bench.rig import Bench, open_bench
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
    return bench.load(port, "/v1/chat/completions", args.split())


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
        line = bench.load(port, f"/openai{peers.PATH}", SMALL["stream"].split())
        assert works.failures(line) == 0
        assert proxy.cpu_us() > before
        assert proxy.pss_kib() > 0
