"""``/-/pace`` on real sockets: pace, backpressure, ends, limits and a reload, and the drain."""

from __future__ import annotations

import json
import signal
import time
from contextlib import closing
from http.client import HTTPConnection
from pathlib import Path
from typing import Any

import pytest

from tests.support.daemon import Daemon, provider_config
from tests.support.live_proxy import (
    LiveProxy,
    assert_settles,
    client_config,
    live_fixture,
    read_response,
    trace_of,
    until,
)
from tests.support.sockets import WAIT, Wire, connect, request

KEY = "sk-team"
SHOWN = f"Authorization: Bearer {KEY}"
live = live_fixture(
    provider_config("URL")
    + client_config("team", KEY)
    + client_config("few", "sk-few", "max_streams = 1"),
    proxy="",
)


def begin(wire: Wire, query: str, *fields: str, version: str = "1.1") -> list[tuple[bytes, bytes]]:
    """Ask for a stream; return the fields of its head."""
    wire.send(request("GET", f"/-/pace?{query}", *(fields or (SHOWN,)), version=version))
    line, got = wire.read_head()
    assert b" 200 " in line, line
    return got


def event(data: bytes) -> dict[str, Any]:
    """Return the object of an event."""
    assert data.startswith(b"data: ")
    assert data.endswith(b"\n\n")
    found: dict[str, Any] = json.loads(data[6:])
    return found


def ended(daemon: Daemon, mark: str) -> dict[str, Any]:
    """Return what became of a stream, as the daemon says."""
    with connect(daemon.port) as wire:
        wire.send(request("GET", f"/-/pace?ended={mark}", SHOWN))
        found: dict[str, Any] = read_response(wire).json()
    return found


def test_each_event_is_a_chunk_and_leaves_when_it_says(live: LiveProxy) -> None:
    """The head comes first; no event leaves earlier than its interval allows."""
    with live.connect() as wire:
        fields = begin(wire, "n=4&interval_ms=50&bytes=120")
        assert (b"transfer-encoding", b"chunked") in fields
        assert (b"x-accel-buffering", b"no") in fields
        found = []
        while data := wire.read_chunk():
            assert len(data) == 120
            found.append((event(data), time.time()))
    assert [one["n"] for one, _ in found] == [1, 2, 3, 4]
    for number, (one, arrived) in enumerate(found):
        assert one["ms"] >= number * 50
        assert one["sent"] <= arrived
    record = trace_of(live.daemon, path="/-/pace", bytes_out=480)
    assert (record["route"], record["client"], record["chunks"]) == (None, "team", 4)


def test_any_client_of_http_reads_it(live: LiveProxy) -> None:
    """Python's own, without an SDK; lines instead of events."""
    client = HTTPConnection("127.0.0.1", live.daemon.port, timeout=WAIT)
    client.request("GET", "/-/pace?n=3&interval_ms=1&format=ndjson", headers={"x-api-key": KEY})
    with closing(client), client.getresponse() as response:
        assert response.getheader("content-type") == "application/x-ndjson"
        assert [json.loads(line)["n"] for line in response] == [1, 2, 3]


def test_a_client_of_http_1_0_gets_it_without_chunks(live: LiveProxy) -> None:
    """As nginx asks by default; the end of the connection is the end of the body."""
    with live.connect() as wire:
        begin(wire, "n=2&interval_ms=1&bytes=100", version="1.0")
        assert wire.wait_closed() == "fin"
        assert len(wire.buffer) == 200


@pytest.mark.parametrize(("version", "end"), [("1.1", "fin"), ("1.0", "reset")])
def test_it_breaks_off_where_that_is_asked_for(live: LiveProxy, version: str, end: str) -> None:
    """What came before arrives, and no client can take the rest for a whole body."""
    with live.connect() as wire:
        begin(wire, f"n=9&interval_ms=1&bytes=100&break_after=3&mark=b{end}", version=version)
        if version == "1.1":
            for number in (1, 2, 3):
                assert event(wire.read_chunk())["n"] == number
        else:
            while b'"n":3' not in wire.buffer:
                wire.receive()
        assert wire.wait_closed() == end
    until(lambda: ended(live.daemon, f"b{end}")["ended"] == "broken", "it has ended")


def test_a_cancel_reaches_it_in_a_silence(live: LiveProxy) -> None:
    """And whoever asks is told of it."""
    with live.connect() as wire:
        begin(wire, "n=2&silence_ms=600000&mark=cancel", SHOWN, "Via: 1.0 hop")
        assert event(wire.read_chunk())["n"] == 1
        running = ended(live.daemon, "cancel")
        assert (running["ended"], running["events"]) == (None, 1)
        assert running["request"]["via"] == "1.0 hop"
    until(lambda: ended(live.daemon, "cancel")["ended"] == "client_gone", "it has ended")
    assert_settles(live.daemon)


def test_a_slow_reader_holds_it_up(live: LiveProxy) -> None:
    """Of 64 MiB no more is made than the kernels hold; the rest comes when it is read."""
    with live.connect(receive_buffer=4096) as wire:
        begin(wire, "n=1024&interval_ms=0&bytes=65536&mark=slow")
        live.wait_paused()
        held = ended(live.daemon, "slow")["events"]
        assert held < 512
        assert live.gauge("buffered_bytes") < 256 * 1024
        for number in range(held + 16):
            assert event(wire.read_chunk())["n"] == number + 1
    until(lambda: ended(live.daemon, "slow")["ended"] == "client_gone", "it has ended")
    assert_settles(live.daemon)


def test_limits_of_a_client_count_it(live: LiveProxy) -> None:
    """A second stream of a client that may have one is a 429, and the place is given back."""
    key = "Authorization: Bearer sk-few"
    asked = request("GET", "/-/pace?n=1", key)
    with live.connect() as wire:
        begin(wire, "n=2&silence_ms=600000", key)
        got = live.get(asked)
        assert (got.status, got.error) == (429, "limited")
        assert got.values(b"x-llmproxy-limit") == [b"max_streams"]
    until(lambda: live.get(asked).status == 200, "the place is free again")


def test_a_stream_outlives_a_reload_and_is_known_behind_it(live: LiveProxy) -> None:
    """It ends with what it began with; names are the process's."""
    with live.connect() as wire:
        begin(wire, "n=9&silence_ms=600000&mark=reload")
        wire.read_chunk()
        live.daemon.process.send_signal(signal.SIGHUP)
        live.daemon.wait_log("reloaded")
        assert ended(live.daemon, "reload")["ended"] is None
    until(lambda: ended(live.daemon, "reload")["ended"] == "client_gone", "it has ended")


def test_the_path_is_exact(live: LiveProxy) -> None:
    """What is beside it is no route's, and asks for a key first."""
    for path in ("/-/pacer", "/-/pace//", "/-/pace/page.py", "/-"):
        assert live.reject(request("GET", path, SHOWN)).status == 404
    assert live.reject(request("GET", "/-/pace")).status == 401


def test_the_metrics_count_it(live: LiveProxy) -> None:
    """With the client, and no route."""
    labels = ('client="team"', 'method="GET"', 'provider=""', 'route=""', 'status="2xx"')

    def count() -> float:
        values = live.daemon.metrics().items()
        return sum(value for name, value in values if _has(name, "requests_total", *labels))

    before = count()
    assert live.get(request("GET", "/-/pace?n=1", SHOWN)).status == 200
    until(lambda: count() == before + 1, "it is counted")


def _has(metric: str, name: str, *labels: str) -> bool:
    return metric.startswith(f"llmproxy_{name}{{") and all(one in metric for one in labels)


@pytest.mark.parametrize("times", [1, 2])
def test_a_drain_ends_it(tmp_path: Path, times: int) -> None:
    """At its deadline, or with the second signal; the client sees that it is not whole."""
    proxy = 'anonymous = true\ndrain_timeout = "200ms"' if times == 1 else "anonymous = true"
    with Daemon(tmp_path, provider_config("http://127.0.0.1:1"), proxy=proxy) as daemon:
        with connect(daemon.port) as wire:
            begin(wire, "n=9&silence_ms=600000", "Accept: */*")
            wire.read_chunk()
            daemon.terminate()
            if times == 2:
                daemon.wait_log("draining")
                daemon.terminate()
            assert wire.wait_closed() in ("fin", "reset")
        daemon.process.wait(WAIT)
        (record,) = daemon.traces()
    assert (record["end_reason"], record["client"]) == ("drained", "anonymous")


def test_the_admin_site_has_a_stream_of_its_own(live: LiveProxy) -> None:
    """Without a key, and without a record."""
    before = len(live.daemon.traces())
    with connect(live.daemon.admin_port) as wire:
        wire.send(request("GET", "/pace/stream?n=2&interval_ms=1"))
        line, _ = wire.read_head()
        assert b" 200 " in line
        assert [event(wire.read_chunk())["n"], event(wire.read_chunk())["n"]] == [1, 2]
        assert wire.read_chunk() == b""
    with connect(live.daemon.admin_port) as wire:
        wire.send(request("GET", "/pace"))
        got = read_response(wire)
    assert b'data-site="admin"' in got.body
    assert len(live.daemon.traces()) == before
