"""What one process has learned of a provider, another one knows: through a real engine."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from tests.support.daemon import Daemon, provider_table, route_table
from tests.support.engines import SERVERS, EngineServer
from tests.support.live_proxy import client_config, post, read_response, response, until
from tests.support.sockets import Provider, Wire, connect

KEY = "key-of-the-team"
CHAT = "/r/v1/chat/completions"
JSON = "content-type: application/json"


class Two:
    """Two processes that share an engine, with a route of two providers.

    Attributes:
        says: what each provider does with a request: a status, and further fields.
        asked: how often each was asked.
    """

    def __init__(self, folder: Path, engine: EngineServer, route: str, health: str = "") -> None:
        self.says: dict[str, tuple[int, tuple[str, ...]]] = {"a": (200, ()), "b": (200, ())}
        self.asked = {"a": 0, "b": 0}
        self.providers = {name: Provider(self._script(name)) for name in self.says}
        text = client_config("c", KEY) + f'[shared]\nurl = "{engine.url}"\ntimeout = "1s"\n'
        for name, provider in self.providers.items():
            text += provider_table(name, health, url=provider.url)
        text += route_table("/r", 'a", "b', 'name = "r"', route)
        self.daemons = []
        for number in range(2):
            (folder / str(number)).mkdir()
            self.daemons.append(Daemon(folder / str(number), text, proxy=""))

    def _script(self, name: str) -> Any:
        def script(wire: Wire) -> None:
            wire.read_request()
            self.asked[name] += 1
            status, fields = self.says[name]
            wire.send(response(status, JSON, "connection: close", *fields, body=b"{}"))

        return script

    def ask(self, number: int, *fields: str) -> str:
        """Send a request to one of the processes; return who responded."""
        with connect(self.daemons[number].port) as client:
            client.send(post(CHAT, b'{"model":"m"}', f"x-api-key: {KEY}", *fields))
            (name,) = read_response(client).values(b"x-llmproxy-provider")
            return name.decode()

    def row(self, number: int, name: str) -> dict[str, Any]:
        """Return how a provider stands, as one of the processes shows it."""
        rows = json.loads(self.daemons[number].admin("/providers"))
        return next(one for one in rows if one["name"] == name)


@pytest.fixture(params=SERVERS)
def engine(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[EngineServer]:
    """An engine that runs."""
    program = SERVERS[request.param]
    if program is None:
        pytest.skip(f"there is no {request.param}: make peers")
    with EngineServer(program, tmp_path) as engine:
        yield engine


def running(two: Two) -> Any:
    """Return a context in which all of them run, and know each other."""
    stack = ExitStack()
    for one in (*two.providers.values(), *two.daemons):
        stack.enter_context(one)  # type: ignore[arg-type]
    figure = "llmproxy_shared_processes"
    until(lambda: [one.metrics().get(figure) for one in two.daemons] == [2, 2], "both know both")
    return stack


def test_a_cooldown_is_known_to_all(tmp_path: Path, engine: EngineServer) -> None:
    """The provider that refused one process is not asked by the other."""
    two = Two(tmp_path, engine, "retry_on = [429]")
    with running(two):
        two.says["a"] = 429, ("retry-after: 60",)
        assert two.ask(0) == "b"
        until(lambda: two.row(1, "a")["cooldowns"], "the other knows")
        (cooldown,) = two.row(1, "a")["cooldowns"]
        assert (cooldown["model"], cooldown["status"]) == ("m", 429)
        assert 40 < cooldown["seconds"] <= 60
        assert [two.ask(1), two.ask(1)] == ["b", "b"]
        assert two.asked["a"] == 1


def test_a_circuit_is_known_to_all_and_closes_for_all(tmp_path: Path, engine: EngineServer) -> None:
    """One process finds it open, another one finds out that the provider works again."""
    health = 'health = { failures = 2, window = "60s", open_for = "3s" }'
    two = Two(tmp_path, engine, "retry_on = [503]", health)
    with running(two):
        two.says["a"] = 503, ()
        assert [two.ask(0), two.ask(0)] == ["b", "b"]
        until(lambda: two.row(1, "a")["circuits"], "the other knows")
        assert two.row(1, "a")["circuits"][0]["client"] == "c"
        two.says["a"] = 200, ()
        until(lambda: two.ask(1) == "a", "it is asked again")
        until(lambda: not two.row(0, "a")["circuits"], "the first one knows")
        assert two.ask(0) == "a"


def test_a_session_stays_where_it_was_on_another_host(tmp_path: Path, engine: EngineServer) -> None:
    """The second process has never seen it, and asks the engine."""
    two = Two(tmp_path, engine, 'sticky = "session"\nretry_on = [500]')
    with running(two):
        two.says["a"] = 500, ()
        assert two.ask(0, "x-session-id: one") == "b"
        two.says["a"] = 200, ()
        assert two.ask(0, "x-session-id: one") == "b"
        until(lambda: [*engine.command("KEYS", "llmproxy:s:*")], "the engine knows")
        assert two.ask(1, "x-session-id: one") == "b"
        assert two.ask(1, "x-session-id: two") == "a"
        engine.pause()
        assert two.ask(1, "x-session-id: three") == "a"
        engine.go_on()
