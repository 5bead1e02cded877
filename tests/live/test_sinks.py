"""A running daemon and its sinks: what they get, and that no stream ever feels their troubles."""

from __future__ import annotations

import os
import resource
import signal
import sqlite3
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest

from tests.support.collector import OtlpCollector
from tests.support.live_proxy import (
    ONE_ROUTE,
    STREAM_BODY,
    LiveProxy,
    client_config,
    open_live_proxy,
    post,
    read_stepwise,
    until,
)
from tests.support.records import query
from tests.support.scripts import OK, event, reply
from tests.support.sockets import request

LOST = 'llmproxy_records_lost_total{sink="%s"}'


ok = reply(OK)


@pytest.fixture
def live(tmp_path: Path, collector: OtlpCollector) -> Iterator[LiveProxy]:
    """A daemon with every sink, its ledger named by instance, and one known client."""
    trace = (
        f'ledger = "{tmp_path}/ledger-{{instance}}.db"\n'
        f'otlp = "{collector.url}"\nsession_header = "X-Conversation"\n'
    )
    with open_live_proxy(tmp_path, trace + ONE_ROUTE + client_config("team", "k")) as live:
        live.script = ok
        yield live


def ask(live: LiveProxy, *fields: str, count: int = 1) -> None:
    """Send requests, each of which must be served as ever."""
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


def test_every_sink_has_every_request(live: LiveProxy, collector: OtlpCollector) -> None:
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

    usage = live.daemon.usage("--by", "client,provider,session", "--since", "1h")
    groups = usage["groups"]
    counted = [(one["client"], one["session"], one["requests"], one["complete"]) for one in groups]
    assert counted == [("team", "s-1", 2, 2)]
    assert ([one["unreported"] for one in groups], usage["refused"]) == ([2], 1)
    (session,) = live.daemon.usage("--sessions")["sessions"]
    assert (session["requests"], session["last_trace"]) == (2, records[1]["id"])
    metrics = live.daemon.metrics()
    assert [metrics[LOST % name] for name in ("jsonl", "ledger", "otlp")] == [0, 0, 0]


def test_a_caller_that_is_not_known_adds_no_session(live: LiveProxy) -> None:
    """Its requests are in the ledger; but nobody without a key can fill the table of sessions."""
    for number in range(3):
        live.reject(
            post("/p/v1/chat", STREAM_BODY, f"X-Conversation: s-{number}", "x-api-key: wrong")
        )
    ask(live, "X-Conversation: mine", "x-api-key: k")
    until(lambda: kept(live) == 4, "the ledger has all")
    assert query(ledger_of(live), "SELECT count(DISTINCT session) FROM traces") == [(4,)]
    assert query(ledger_of(live), "SELECT session, client FROM sessions") == [("mine", "team")]


def test_records_are_closed_to_others(live: LiveProxy) -> None:
    """They name callers and paths."""
    ask(live)
    until(lambda: kept(live) == 1, "the ledger has it")
    for file in (live.daemon.trace_path, *live.daemon.folder.glob("ledger-0.db*")):
        assert os.stat(file).st_mode & 0o007 == 0


@pytest.mark.parametrize("good", [True, False])
def test_sighup_opens_the_trace_file_anew(live: LiveProxy, good: bool) -> None:
    """No record is lost when logrotate asks for it, even with a bad configuration."""
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
    assert bool(daemon.take_errors()) is not good


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
    assert live.daemon.take_errors() == ["ledger: records are being lost: database is locked"]


def test_a_full_disk_costs_no_stream(live: LiveProxy) -> None:
    """A stream that runs meanwhile arrives event by event; there is room again, and all is kept."""
    ask(live)
    until(lambda: kept(live) == 1, "the first is written")
    events = [*map(event, range(6))]
    turn = live.stream(*events)

    def lost() -> list[float]:
        return [live.daemon.metrics()[LOST % name] for name in ("jsonl", "ledger")]

    with live.begin("/p/stream") as client:
        read_stepwise(client, turn, *events[:2])
        with live.daemon.limited(resource.RLIMIT_FSIZE, 0):
            live.script = ok
            ask(live, count=5)
            until(lambda: lost() == [5, 5], "they are counted")
            read_stepwise(client, turn, *events[2:4])
        read_stepwise(client, turn, *events[4:], b"")
    until(lambda: kept(live) == 2, "the stream's record is written")
    assert [record["path"] for record in live.daemon.traces()] == ["/p/v1/chat", "/p/stream"]
    assert live.daemon.traces()[1]["end_reason"] == "complete"
    assert lost() == [5, 5]
    assert len(live.daemon.take_errors()) == 2


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


def test_a_stop_writes_what_waits(tmp_path: Path, collector: OtlpCollector) -> None:
    """The last request before the end is in every sink."""
    trace = f'ledger = "{tmp_path}/ledger-0.db"\notlp = "{collector.url}"\n'
    with open_live_proxy(tmp_path, trace + ONE_ROUTE) as live:
        live.script = ok
        ask(live, count=20)
    assert len(live.daemon.traces()) == kept(live) == len(collector.spans()) == 20
