"""The places at a provider, shared by processes through a real engine."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Self

import pytest

from tests.support.daemon import Daemon, provider_table, route_table
from tests.support.engines import SERVERS, EngineServer
from tests.support.live_proxy import client_config, post, read_response, response, until
from tests.support.sockets import Provider, Wire, connect

CHAT = "/r/v1/chat/completions"
JSON = "content-type: application/json"


class Shared(ExitStack):
    """Processes that share a provider's places; its responses come when the test says so.

    Args:
        folder: of the test.
        engine: what they share.
        places: of the provider, and its queue.
        count: how many processes.
    """

    def __init__(self, folder: Path, engine: EngineServer, places: str, *, count: int = 2) -> None:
        super().__init__()
        self._waiting: list[threading.Event] = []
        self._lock = threading.Lock()
        self.most = self.running = self.ended = 0
        self.provider = Provider(self._script)
        text = f'[shared]\nurl = "{engine.url}"\ntimeout = "1s"\n' + route_table(
            "/r", "p", 'name = "r"'
        )
        text += provider_table("p", places, url=self.provider.url)
        text += client_config("c", "k") + client_config("heavy", "h")
        text = text.replace("[clients.heavy]", "[clients.heavy]\nweight = 3")
        self.daemons = []
        for number in range(count):
            (folder / str(number)).mkdir()
            self.daemons.append(Daemon(folder / str(number), text, proxy=""))

    def __enter__(self) -> Self:
        for one in (self.provider, *self.daemons):
            self.enter_context(one)  # type: ignore[arg-type]  # each is a context
        self.callback(self.end_all)
        figure, count = "llmproxy_shared_processes", len(self.daemons)
        until(lambda: {one.metrics().get(figure) for one in self.daemons} == {count}, "all share")
        return self

    def _script(self, wire: Wire) -> None:
        wire.read_request()
        event = threading.Event()
        with self._lock:
            self.running += 1
            self.most = max(self.most, self.running)
            self._waiting.append(event)
        event.wait(60)
        with self._lock:
            self.running -= 1
            self.ended += 1
        wire.send(response(200, JSON, "connection: close", body=b"{}"))

    def end(self, count: int = 1) -> None:
        """Let so many responses come, those that run longest."""
        with self._lock:
            ended, self._waiting = self._waiting[:count], self._waiting[count:]
        for event in ended:
            event.set()

    def end_all(self) -> None:
        """Let all come."""
        self.end(1 << 20)

    def ends_all(self) -> bool:
        """Let all come that have been asked for by now; return whether none runs."""
        self.end_all()
        return self.running == 0

    def begin(self, number: int, count: int = 1, key: str = "k") -> list[Wire]:
        """Send requests to one of the processes."""
        found = []
        for _ in range(count):
            client = self.enter_context(connect(self.daemons[number].port))
            client.send(post(CHAT, b'{"model":"m"}', f"x-api-key: {key}", "connection: close"))
            found.append(client)
        return found

    def waiting(self, number: int) -> int:
        """Return how many requests wait for a place at one of the processes."""
        (row,) = json.loads(self.daemons[number].admin("/providers"))
        return int(row["places"]["waiting"])

    def ends_one_unless(self, parts: list[float]) -> bool:
        """Return whether the places are taken so; if all are taken otherwise, end a request."""
        if (busy := self.busy()) == parts:
            return True
        if sum(busy) == sum(parts):
            self.end()
        return False

    def busy(self) -> list[float]:
        """Return how many places each process uses, by its streams at the provider."""
        name = 'llmproxy_upstream_connections{provider="p",state="active"}'
        return [one.metrics().get(name, 0.0) for one in self.daemons]


@pytest.fixture(params=SERVERS)
def engine(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[EngineServer]:
    """An engine that runs."""
    program = SERVERS[request.param]
    if program is None:
        pytest.skip(f"there is no {request.param}: make peers")
    with EngineServer(program, tmp_path) as engine:
        yield engine


def test_places_are_one_figure_for_all(tmp_path: Path, engine: EngineServer) -> None:
    """Never more run than the provider may have, and all of its places are used."""
    places = 'max_streams = 4\nqueue = { size = 100, timeout = "60s" }'
    with Shared(tmp_path, engine, places, count=3) as shared:
        clients = [client for number in range(3) for client in shared.begin(number, 10)]
        for ended in range(26):
            until(lambda: shared.ended == ended and shared.running == 4, "four run")  # noqa: B023
            shared.end()
        until(lambda: shared.ended == 26 and shared.running == 4, "the last four run")
        shared.end_all()
        assert [read_response(client).status for client in clients] == [200] * 30
        assert shared.most == 4


def test_one_process_may_have_all(tmp_path: Path, engine: EngineServer) -> None:
    """Where nobody else wants any; another one gets its share as requests end."""
    places = 'max_streams = 4\nqueue = { size = 100, timeout = "60s" }'
    with Shared(tmp_path, engine, places) as shared:
        shared.begin(0, 12)
        until(lambda: shared.busy() == [4, 0], "one has all")
        shared.begin(1, 12)
        until(lambda: shared.waiting(1) == 12, "the other wants some")
        until(lambda: shared.ends_one_unless([2, 2]), "half goes to the other")
        assert shared.most == 4


def test_parts_go_by_the_weight_of_who_waits(tmp_path: Path, engine: EngineServer) -> None:
    """A client of weight 3 at one process has three times as many places."""
    places = 'max_streams = 8\nqueue = { size = 100, timeout = "60s" }'
    with Shared(tmp_path, engine, places) as shared:
        shared.begin(0, 20)
        until(lambda: shared.busy() == [8, 0], "one has all")
        shared.begin(1, 20, "h")
        until(lambda: shared.waiting(1) == 20, "the other wants some")
        until(lambda: shared.ends_one_unless([2, 6]), "by weight")
        assert shared.most == 8


def test_without_a_queue_a_place_of_another_is_asked_for(
    tmp_path: Path, engine: EngineServer
) -> None:
    """And where there is none the client is told at once."""
    with Shared(tmp_path, engine, "max_streams = 3") as shared:
        shared.begin(0, 3)
        until(lambda: shared.busy() == [3, 0], "one has all")
        (client,) = shared.begin(1)
        got = read_response(client)
        assert (got.status, got.error) == (503, "provider_busy")
        shared.end(1)
        until(lambda: shared.running == 2, "one has ended")
        shared.begin(1)
        until(lambda: shared.busy() == [2, 1], "the other has it")


def test_the_places_of_one_that_is_killed_are_free(tmp_path: Path, engine: EngineServer) -> None:
    """When its lease is over."""
    places = 'max_streams = 2\nqueue = { size = 100, timeout = "60s" }'
    with Shared(tmp_path, engine, places) as shared:
        shared.begin(1, 2)
        until(lambda: shared.busy() == [0, 2], "one has all")
        shared.daemons[1].process.kill()
        until(shared.ends_all, "nothing runs")
        (client,) = shared.begin(0)
        until(lambda: shared.running == 1, "the other has one", seconds=60)
        shared.end_all()
        assert read_response(client).status == 200


def test_without_the_engine_each_has_a_part(tmp_path: Path, engine: EngineServer) -> None:
    """And what runs goes on."""
    places = 'max_streams = 4\nqueue = { size = 100, timeout = "60s" }'
    with Shared(tmp_path, engine, places) as shared:
        engine.pause()
        figure = "llmproxy_shared_up"
        until(lambda: [one.metrics()[figure] for one in shared.daemons] == [0, 0], "it is away")
        shared.begin(0, 4)
        shared.begin(1, 4)
        until(lambda: shared.busy() == [2, 2], "each has half")
        engine.go_on()
        until(lambda: [one.metrics()[figure] for one in shared.daemons] == [1, 1], "it is back")
        shared.end(4)
        until(lambda: shared.busy() == [2, 2], "all get theirs")
        assert shared.most == 4
