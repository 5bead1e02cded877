"""One limit for several processes, through a real Redis and a real Valkey."""

from __future__ import annotations

import json
import signal
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path

import pytest

from tests.support.daemon import Daemon, provider_table, route_table
from tests.support.engines import SERVERS, EngineServer
from tests.support.live_proxy import (
    LiveProxy,
    client_config,
    post,
    read_response,
    response,
    until,
)
from tests.support.sockets import Wire, connect

KEY = "key-of-the-team"
CHAT = "/p/v1/chat/completions"
BODY = b'{"model":"m"}'
USAGE = (
    b'{"object":"chat.completion","model":"m","usage":{"prompt_tokens":30,"completion_tokens":70}}'
)


class Hosts(ExitStack):
    """Daemons that share an engine, and one provider.

    Args:
        folder: each daemon has one of its own in it.
        engine: what they share.
        limits: of the client.
        count: how many daemons.
        shared: further lines of ``[shared]``.
    """

    def __init__(
        self, folder: Path, engine: EngineServer, limits: str, *, count: int = 2, shared: str = ""
    ) -> None:
        super().__init__()
        self.engine = engine
        self.provider = LiveProxy()
        self.provider.script = good
        self._folder = folder
        self._text = provider_table("p", url=self.provider.provider.url) + route_table("/p", "p")
        self._text += client_config("c", KEY).replace("[clients.c]", f"[clients.c]\n{limits}")
        self._text += f'[shared]\nurl = "{engine.url}"\ntimeout = "1s"\n{shared}\n'
        self._count = count
        self.daemons: list[Daemon] = []

    def __enter__(self) -> Hosts:
        self.enter_context(self.provider.provider)
        for number in range(self._count):
            folder = self._folder / str(number)
            folder.mkdir()
            self.daemons.append(self.enter_context(Daemon(folder, self._text, proxy="")))
        self.all_share()
        return self

    def all_share(self) -> None:
        """Wait until each knows of all."""
        until(lambda: self.figures("processes") == [len(self.daemons)] * len(self.daemons), "all")

    def figures(self, name: str) -> list[float]:
        """Return a figure of each, of those about the engine."""
        return [one.metrics().get(f"llmproxy_shared_{name}", -1.0) for one in self.daemons]

    def ask(self, number: int) -> int:
        """Send a request to one of them; return the status."""
        with connect(self.daemons[number].port) as client:
            client.send(post(CHAT, BODY, f"x-api-key: {KEY}", "connection: close"))
            return read_response(client).status

    def hold(self) -> threading.Event:
        """Let responses come no sooner than the event is set."""
        held = threading.Event()

        def script(wire: Wire) -> None:
            wire.read_request()
            held.wait(60)
            wire.send(
                response(200, "content-type: application/json", "connection: close", body=USAGE)
            )

        self.provider.script = script
        self.callback(held.set)
        return held

    def begin(self, number: int) -> Wire:
        """Send a request to one of them."""
        client = connect(self.daemons[number].port)
        client.send(post(CHAT, BODY, f"x-api-key: {KEY}", "connection: close"))
        return client

    def left(self, number: int) -> list[int]:
        """Return what the client has left of its limits, as one of them shows it."""
        (row,) = json.loads(self.daemons[number].admin("/clients"))
        return [use["remaining"] for use in row["limits"].values()]

    def counted(self, tokens: int) -> None:
        """Wait until so many tokens of the day are counted."""
        until(lambda: self.engine.hash("llmproxy:c:c").get("u") == str(tokens), "it is counted")

    def settled(self) -> dict[str, str] | None:
        """Return what the engine knows, once nothing runs."""
        used = self.engine.hash("llmproxy:c:c")
        return used if used.get("s") == "0" else None

    def at_once(self, count: int) -> list[int]:
        """Send so many requests, to all in turn, some at the same time; return the statuses."""
        turns = [number % len(self.daemons) for number in range(count)]
        with ThreadPoolExecutor(16) as pool:
            return list(pool.map(self.ask, turns))


def good(wire: Wire) -> None:
    """Respond to a request."""
    wire.read_request()
    answer(wire)


def answer(wire: Wire) -> None:
    """Respond, and say what it cost."""
    wire.send(response(200, "content-type: application/json", "connection: close", body=USAGE))


@pytest.fixture(params=SERVERS)
def engine(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[EngineServer]:
    """An engine that runs."""
    program = SERVERS[request.param]
    if program is None:
        pytest.skip(f"there is no {request.param}: make peers")
    with EngineServer(program, tmp_path) as engine:
        yield engine


@pytest.mark.parametrize(
    ("limit", "passes"), [("requests_per_minute = 25", 25), ("tokens_per_day = 2500", 25)]
)
def test_a_limit_is_one_figure_for_all(
    tmp_path: Path, engine: EngineServer, limit: str, passes: int
) -> None:
    """However the requests fall on them, exactly as many pass as one process would let pass."""
    with Hosts(tmp_path, engine, limit, count=3) as hosts:
        if "tokens" in limit:  # what one costs is learned first, by each
            for number in range(3):
                assert hosts.ask(number) == 200
                hosts.counted(100 * (number + 1))
            passes -= 3
        statuses = hosts.at_once(60)
        assert (statuses.count(200), statuses.count(429)) == (passes, 60 - passes)
        used = engine.hash("llmproxy:c:c")
        until(lambda: engine.hash("llmproxy:c:c")["s"] == "0", "nothing runs")
        assert used["r"] == "25"
        until(lambda: [hosts.left(number) for number in range(3)] == [[0]] * 3, "all show it")


def test_streams_count_for_all_while_they_run(tmp_path: Path, engine: EngineServer) -> None:
    """And no longer."""
    with Hosts(tmp_path, engine, "max_streams = 2") as hosts:
        hold = hosts.hold()
        with hosts.begin(0) as first, hosts.begin(1) as second:
            until(lambda: engine.hash("llmproxy:c:c").get("s") == "2", "both run")
            assert [hosts.ask(0), hosts.ask(1)] == [429, 429]
            hold.set()
            assert [read_response(one).status for one in (first, second)] == [200, 200]
        until(lambda: engine.hash("llmproxy:c:c")["s"] == "0", "nothing runs")
        assert [hosts.ask(0), hosts.ask(1)] == [200, 200]


def test_a_process_that_is_killed_frees_its_streams(tmp_path: Path, engine: EngineServer) -> None:
    """Within the lease of ten seconds; requests that it admitted count on."""
    with Hosts(tmp_path, engine, "max_streams = 1\nrequests_per_minute = 3") as hosts:
        hosts.hold()
        gone = hosts.daemons[1]
        with hosts.begin(1):
            until(lambda: engine.hash("llmproxy:c:c").get("s") == "1", "it runs")
            gone.process.kill()
            gone.process.wait(20)
            assert hosts.ask(0) == 429
            hosts.provider.script = good
            until(lambda: hosts.ask(0) == 200, "the stream counts no more", seconds=60)
        assert engine.command("ZCARD", "llmproxy:procs") == 1
        assert engine.hash("llmproxy:c:c")["r"] == "2"


def away(engine: EngineServer, how: str) -> Callable[[], None]:
    """Let the engine be away, and return what brings it back."""
    if how == "paused":
        engine.pause()
        return engine.go_on
    if how == "killed":
        engine.stop()
        return engine.start
    engine.command("CONFIG", "SET", "maxmemory", 1)
    return lambda: engine.command("CONFIG", "SET", "maxmemory", 0)


@pytest.mark.parametrize("how", ["paused", "killed", "full"])
def test_the_engine_goes_and_comes_back(tmp_path: Path, engine: EngineServer, how: str) -> None:
    """No request fails for it, each process takes its share meanwhile, and nothing counts twice."""
    with Hosts(tmp_path, engine, "requests_per_minute = 100") as hosts:
        assert set(hosts.at_once(20)) == {200}
        until(lambda: [hosts.left(0), hosts.left(1)] == [[80], [80]], "both know what is used")
        back = away(engine, how)
        assert set(hosts.at_once(30)) == {200}
        until(lambda: hosts.figures("up") == [0, 0], "both know that it is away")
        assert hosts.daemons[0].admin("/readyz").startswith("ready, but ")
        statuses = hosts.at_once(80)
        assert (statuses.count(200), statuses.count(429)) == (50, 30)
        back()
        until(lambda: hosts.figures("up") == [1, 1], "both know that it is back", seconds=20)
        assert hosts.daemons[0].admin("/readyz") == "ready\n"
        until(lambda: engine.hash("llmproxy:c:c").get("r") == "100", "all are counted")
        assert hosts.at_once(10) == [429] * 10
        used = until(lambda: hosts.settled(), "nothing runs")
        assert used["r"] == "100"
        for daemon in hosts.daemons:
            assert daemon.metrics()["llmproxy_shared_alone_total"] > 0


def test_strict_refuses_where_nobody_can_count(tmp_path: Path, engine: EngineServer) -> None:
    """With an error that an SDK tries again."""
    with Hosts(tmp_path, engine, "max_streams = 9", shared="strict = true") as hosts:
        assert hosts.ask(0) == 200
        engine.pause()
        assert [hosts.ask(0), hosts.ask(1)] == [503, 503]
        engine.go_on()
        until(lambda: hosts.ask(0) == 200, "it is back", seconds=20)


def test_a_client_that_hammers_costs_little(tmp_path: Path, engine: EngineServer) -> None:
    """What was refused a moment ago is refused without a question."""
    with Hosts(tmp_path, engine, "requests_per_minute = 1", count=1) as hosts:
        assert hosts.ask(0) == 200
        before = hosts.figures("calls_total")[0]
        began = time.monotonic()
        assert hosts.at_once(200).count(429) == 200
        lasted = time.monotonic() - began
        assert hosts.figures("calls_total")[0] - before <= 8 + 3 * lasted


def test_a_reload_may_share_and_no_longer(tmp_path: Path, engine: EngineServer) -> None:
    """What runs is told to an engine that comes, and taken from one that goes."""
    with Hosts(tmp_path, engine, "max_streams = 1", count=1) as hosts:
        hold, daemon = hosts.hold(), hosts.daemons[0]
        text = daemon.config_path.read_text()
        with hosts.begin(0) as client:
            until(lambda: engine.hash("llmproxy:c:c").get("s") == "1", "it runs")
            daemon.config_path.write_text(text.partition("[shared]")[0])
            daemon.process.send_signal(signal.SIGHUP)
            until(lambda: engine.hash("llmproxy:c:c")["s"] == "0", "it is taken back")
            assert hosts.ask(0) == 429  # it still counts here
            daemon.config_path.write_text(text)
            daemon.process.send_signal(signal.SIGHUP)
            until(lambda: engine.hash("llmproxy:c:c")["s"] == "1", "it is told again")
            hold.set()
            assert read_response(client).status == 200
        until(lambda: engine.hash("llmproxy:c:c")["s"] == "0", "nothing runs")


def test_what_began_without_an_engine_ends_with_one(tmp_path: Path, engine: EngineServer) -> None:
    """It is told when the engine comes, and taken back when it ends."""
    with Hosts(tmp_path, engine, "max_streams = 1", count=1) as hosts:
        daemon, text = hosts.daemons[0], hosts.daemons[0].config_path.read_text()
        daemon.config_path.write_text(text.partition("[shared]")[0])
        daemon.process.send_signal(signal.SIGHUP)
        until(lambda: "llmproxy_shared_up" not in daemon.metrics(), "nothing is shared")
        hold = hosts.hold()
        with hosts.begin(0) as client:
            until(lambda: hosts.left(0) == [0], "it runs")
            daemon.config_path.write_text(text)
            daemon.process.send_signal(signal.SIGHUP)
            until(lambda: engine.hash("llmproxy:c:c").get("s") == "1", "it is told")
            hold.set()
            assert read_response(client).status == 200
        until(lambda: engine.hash("llmproxy:c:c")["s"] == "0", "nothing runs")
        assert hosts.ask(0) == 200


def test_a_wrong_password_is_told(tmp_path: Path, engine: EngineServer) -> None:
    """In the log and on /readyz; requests go on."""
    engine.command("CONFIG", "SET", "requirepass", "right")
    text = provider_table("p", url="http://127.0.0.1:1") + route_table("/p", "p")
    text += client_config("c", KEY) + f'[shared]\nurl = "{engine.url}"\n'
    with Daemon(tmp_path, text, proxy="") as daemon:
        line = daemon.wait_log("the shared engine is away")
        assert "uthentication required" in line["message"], line
        assert daemon.admin("/readyz").startswith("ready, but ")
