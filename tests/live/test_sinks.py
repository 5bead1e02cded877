"""A running daemon and its sinks: what they get, and that no stream ever feels their troubles."""

from __future__ import annotations

import json
import os
import resource
import signal
import sqlite3
import subprocess
import sys
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from tests.live.test_starting import HEAD, assert_refused, start
from tests.support.collector import Collector
from tests.support.daemon import ROOT, Daemon, provider_config
from tests.support.live_proxy import (
    ONE_ROUTE,
    STREAM_BODY,
    LiveProxy,
    client_config,
    open_live_proxy,
    post,
    until,
)
from tests.support.records import query
from tests.support.scripts import LAST, OK, SSE, Turn, event, reply
from tests.support.sockets import Wire, chunked, request

LOST = 'llmproxy_records_lost_total{sink="%s"}'


ok = reply(OK)


@pytest.fixture
def collector() -> Iterator[Collector]:
    """A collector without TLS."""
    collector = Collector()
    yield collector
    collector.close()


@pytest.fixture
def live(tmp_path: Path, collector: Collector) -> Iterator[LiveProxy]:
    """A daemon with every sink, its ledger named by instance, and one known client."""
    trace = (
        f'ledger = "{tmp_path}/ledger-{{instance}}.db"\n'
        f'otlp = "{collector.url}"\nsession_header = "X-Conversation"\n'
    )
    with open_live_proxy(tmp_path, trace + ONE_ROUTE + client_config("team", "k")) as live:
        live.script = ok
        yield live


def ask(live: LiveProxy, *fields: str, count: int = 1) -> None:
    """Send requests, each of which must be answered as ever."""
    for _ in range(count):
        assert live.get(post("/p/v1/chat", STREAM_BODY, *fields)).body == b"ok"


def ledger_of(live: LiveProxy) -> Path:
    """Where the daemon's ledger is."""
    return live.daemon.folder / "ledger-0.db"


def kept(live: LiveProxy) -> int:
    """How many traces the ledger holds; none where it is just being made."""
    try:
        return int(query(ledger_of(live), "SELECT count(*) FROM traces")[0][0])
    except sqlite3.OperationalError:
        return 0


def take_errors(daemon: Daemon) -> list[str]:
    """Take the errors out of the log, where they would fail the test."""
    errors = [line for line in daemon.log if line["level"] == "error"]
    for line in errors:
        daemon.log.remove(line)
    return [line["message"] for line in errors]


def usage(live: LiveProxy, *arguments: str) -> Any:
    """Return what ``llmproxy usage`` tells of the running daemon."""
    command = [sys.executable, "-m", "llmproxy.cli.main", "usage", "--json"]
    ended = subprocess.run(
        [*command, "--config", str(live.daemon.config_path), *arguments],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    return json.loads(ended.stdout)


def test_every_sink_has_every_request(live: LiveProxy, collector: Collector) -> None:
    """The same record; the session is named by the header that is configured."""
    ask(live, "x-api-key: k", "x-conversation: s-1", count=2)
    live.get(request("GET", "/nowhere"))
    until(lambda: kept(live) == 3, "the ledger has all")
    until(lambda: len(collector.spans()) == 3, "the collector has all")
    records = live.daemon.traces()
    ids = [(record["id"],) for record in records]
    assert query(ledger_of(live), "SELECT id FROM traces ORDER BY rowid") == ids
    assert [span["spanId"] for span in collector.spans()] == [one[0][-16:] for one in ids]
    assert [record["session"] for record in records] == ["s-1", "s-1", None]

    groups = usage(live, "--by", "client,provider,session", "--since", "1h")["groups"]
    told = [(one["client"], one["session"], one["requests"], one["complete"]) for one in groups]
    assert told == [("anonymous", None, 1, 0), ("team", "s-1", 2, 2)]
    assert {one["unreported"] for one in groups} == {1, 2}
    (session,) = usage(live, "--sessions")["sessions"]
    assert (session["requests"], session["last_trace"]) == (2, records[1]["id"])
    metrics = live.daemon.metrics()
    assert [metrics[LOST % name] for name in ("jsonl", "ledger", "otlp")] == [0, 0, 0]


def test_the_ledger_is_closed_to_others(live: LiveProxy) -> None:
    """It names callers and paths, and so do the files beside it."""
    ask(live)
    until(lambda: kept(live) == 1, "the ledger has it")
    for file in live.daemon.folder.glob("ledger-0.db*"):
        assert os.stat(file).st_mode & 0o007 == 0


@pytest.mark.parametrize("good", [True, False])
def test_sighup_opens_the_trace_file_anew(live: LiveProxy, good: bool) -> None:
    """As logrotate asks, whether or not the configuration is one: nothing is lost."""
    daemon = live.daemon
    ask(live, count=3)
    until(lambda: kept(live) == 3, "all are written")
    rotated = daemon.trace_path.rename(daemon.folder / "trace.1")
    ask(live, count=2)
    if not good:
        daemon.config_path.write_text("nothing = 1")
    daemon.process.send_signal(signal.SIGHUP)
    until(daemon.trace_path.exists, "the file is there again")
    ask(live, count=4)
    until(lambda: kept(live) == 9, "all are written")
    until(lambda: len(daemon.traces()) >= 4, "the new file has the last ones")
    assert len(rotated.read_text().splitlines()) + len(daemon.traces()) == 9
    daemon.wait_log("reloaded" if good else "reload failed")
    assert bool(take_errors(daemon)) is not good


def test_a_locked_ledger_costs_no_stream(live: LiveProxy) -> None:
    """What was written under the lock is counted; the rest is kept, without a restart."""
    ask(live)
    until(lambda: kept(live) == 1, "the first is written")
    with closing(sqlite3.connect(ledger_of(live), isolation_level=None)) as other:
        other.execute("BEGIN EXCLUSIVE")
        ask(live, count=5)
        until(lambda: live.daemon.metrics()[LOST % "ledger"] == 5, "they are counted")
        other.execute("ROLLBACK")
    ask(live)
    until(lambda: kept(live) == 2, "the last is written")
    assert len(live.daemon.traces()) == 7
    assert live.daemon.metrics()[LOST % "jsonl"] == 0
    live.daemon.wait_log("ledger: records are kept again, 5 were lost so far")
    assert take_errors(live.daemon) == ["ledger: records are being lost: database is locked"]


def test_a_full_disk_costs_no_stream(live: LiveProxy) -> None:
    """A stream that runs meanwhile arrives event by event; there is room again, and all is kept."""
    turn = Turn()

    def script(wire: Wire) -> None:
        wire.read_request()
        wire.send(SSE)
        for number in range(6):
            turn.take()
            wire.send(chunked(event(number)))
        wire.send(LAST)

    ask(live)
    until(lambda: kept(live) == 1, "the first is written")
    live.script = script
    pid, full = live.daemon.process.pid, resource.RLIMIT_FSIZE
    limits = resource.prlimit(pid, full)
    with live.begin("/p/stream") as client:
        for number in range(6):
            if number == 2:
                resource.prlimit(pid, full, (0, limits[1]))
                live.script = ok
                ask(live, count=5)
                for name in ("jsonl", "ledger"):
                    until(lambda name=name: live.daemon.metrics()[LOST % name] == 5, "counted")  # type: ignore[misc]  # the lambda's default
                resource.prlimit(pid, full, limits)
            turn.give()
            assert client.read_chunk() == event(number)
        assert client.read_chunk() == b""
    until(lambda: kept(live) == 2, "the stream's record is written")
    assert [record["path"] for record in live.daemon.traces()] == ["/p/v1/chat", "/p/stream"]
    assert live.daemon.traces()[1]["end_reason"] == "complete"
    assert [live.daemon.metrics()[LOST % name] for name in ("jsonl", "ledger")] == [5, 5]
    assert len(take_errors(live.daemon)) == 2


def test_files_that_are_gone_cost_no_stream(live: LiveProxy) -> None:
    """Both are made again with the next request."""
    ask(live)
    until(lambda: kept(live) == 1 and len(live.daemon.traces()) == 1, "the first is written")
    for file in [live.daemon.trace_path, *live.daemon.folder.glob("ledger-0.db*")]:
        file.unlink()
    ask(live)
    until(lambda: live.daemon.trace_path.exists() and ledger_of(live).exists(), "they are back")
    until(lambda: kept(live) == 1 and len(live.daemon.traces()) == 1, "the second is written")
    assert {live.daemon.metrics()[LOST % name] for name in ("jsonl", "ledger")} == {0}


def test_a_dead_collector_costs_no_stream(live: LiveProxy, collector: Collector) -> None:
    """Its losses are counted under its name, and the files have everything."""
    collector.status = 500
    ask(live, count=3)
    until(lambda: live.daemon.metrics()[LOST % "otlp"] == 3, "they are counted")
    until(lambda: kept(live) == 3, "the ledger has them")
    assert len(live.daemon.traces()) == 3
    assert take_errors(live.daemon) == ["otlp: records are being lost: the collector answered 500"]


def test_a_stop_writes_what_waits(tmp_path: Path, collector: Collector) -> None:
    """The last request before the end is in every sink."""
    trace = f'ledger = "{tmp_path}/ledger-0.db"\notlp = "{collector.url}"\n'
    with open_live_proxy(tmp_path, trace + ONE_ROUTE) as live:
        live.script = ok
        ask(live, count=20)
    assert len(live.daemon.traces()) == kept(live) == len(collector.spans()) == 20


def test_a_newer_ledger_stops_the_start(tmp_path: Path) -> None:
    """With one line that says so; it is not touched."""
    path = tmp_path / "ledger"
    with closing(sqlite3.connect(path)) as connection:
        connection.execute(f"PRAGMA application_id = {0x6C6C6D70}")
        connection.execute("PRAGMA user_version = 99")
    config = HEAD.format(proxy=0, admin=0) + provider_config("http://127.0.0.1:1")
    ended = start(tmp_path, f'{config}[trace]\nledger = "{path}"\n')
    assert_refused(ended, "llmproxy cannot start:", "ledger of a newer version (99")
