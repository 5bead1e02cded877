"""A reload shares, and shares in another way, while requests run."""

from __future__ import annotations

import signal
from pathlib import Path

from tests.shared.test_engine import Hosts, engine
from tests.support.engines import EngineServer
from tests.support.live_proxy import read_response, until

__all__ = ["engine"]


def test_what_ran_before_it_was_shared_is_taken_back(tmp_path: Path, engine: EngineServer) -> None:
    """A stream that began without an engine counts while it runs, and no longer."""
    with Hosts(tmp_path, engine, "max_streams = 1\ntokens_per_day = 9000", count=1) as hosts:
        hold, daemon = hosts.hold(), hosts.daemons[0]
        text = daemon.config_path.read_text()
        daemon.config_path.write_text(text.partition("[shared]")[0])
        daemon.process.send_signal(signal.SIGHUP)
        until(lambda: hosts.figures("up") == [-1], "nothing is shared")
        with hosts.begin(0) as client:
            until(lambda: hosts.left(0)[0] == 0, "it runs")
            daemon.config_path.write_text(text)
            daemon.process.send_signal(signal.SIGHUP)
            until(lambda: engine.hash("llmproxy:c:c").get("s") == "1", "it is told")
            hold.set()
            assert read_response(client).status == 200
        until(lambda: engine.hash("llmproxy:c:c")["s"] == "0", "nothing runs")
        assert engine.hash("llmproxy:c:c")["u"] == "100"


def test_another_timeout_counts_nothing_twice(tmp_path: Path, engine: EngineServer) -> None:
    """The engine knows already what the process did."""
    with Hosts(tmp_path, engine, "requests_per_minute = 9", count=1) as hosts:
        daemon = hosts.daemons[0]
        assert [hosts.ask(0) for _ in range(5)] == [200] * 5
        text = daemon.config_path.read_text()
        daemon.config_path.write_text(text.replace('timeout = "1s"', 'timeout = "2s"'))
        before = engine.command("ZRANGE", "llmproxy:procs", 0, -1)
        daemon.process.send_signal(signal.SIGHUP)
        until(lambda: engine.command("ZRANGE", "llmproxy:procs", 0, -1) not in (before, []), "it")
        assert engine.hash("llmproxy:c:c")["r"] == "5"
        assert [hosts.ask(0) for _ in range(5)] == [200] * 4 + [429]
