"""The engine and the processes agree at rest, whatever became of the calls between them.

The script runs in a real server.  What is between it and the processes is made up: it loses calls
and answers, and lets processes look as if they had gone.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import suppress
from typing import Any

import pytest
from hypothesis import HealthCheck, settings
from hypothesis.stateful import (
    RuleBasedStateMachine,
    rule,
    run_state_machine_as_test,
)
from hypothesis.strategies import booleans, integers, sampled_from
from twisted.internet.defer import CancelledError, Deferred, succeed
from twisted.internet.task import Clock
from twisted.python.failure import Failure
from txredisapi import ConnectionError as Lost

from llmproxy.config import Client
from llmproxy.errors import ProxyError
from llmproxy.policy.limits import Lease
from llmproxy.shared import client_limits
from llmproxy.shared.client_limits import SharedLimits
from llmproxy.shared.engine import Engine
from tests.support.engines import SERVERS, EngineServer

PROCESSES = 2
NAMES = ("a", "b")
CLIENTS = {
    "a": Client(
        name="a",
        keys=(),
        max_streams=6,
        requests_per_minute=5000,
        tokens_per_minute=500_000,
        tokens_per_day=900_000,
    ),
    "b": Client(name="b", keys=(), tokens_per_day=700_000),
}


class Way:
    """The way from a process to the engine: what is sent waits until it is told what becomes of it.

    Attributes:
        is_cut: nothing can connect.
        waiting: what is sent, and what fires with its answer.
        strays: what was sent and seems lost.
    """

    def __init__(self, server: EngineServer) -> None:
        self._server = server
        self._factory: Any = None
        self.is_cut = False
        self.waiting: list[tuple[tuple[Any, ...], Deferred[Any]]] = []
        self.strays: list[tuple[Any, ...]] = []

    def connect(self, factory: Any) -> Deferred[Any]:
        """Connect, as an endpoint does."""
        if self.is_cut:
            raise Lost("refused")
        self._factory = factory
        factory.ready.callback(None)
        return succeed(Connection(self))

    def deliver(self) -> None:
        """Let the engine do the first that waits, and answer."""
        words, done = self.waiting.pop(0)
        if done.called:
            return
        try:
            done.callback(self._server.command(*words))
        except RuntimeError as error:
            done.errback(Failure(error))

    def lose(self) -> None:
        """Lose the first that waits, for now."""
        self.strays.append(self.waiting.pop(0)[0])

    def swallow(self) -> None:
        """Let the engine do the first that waits; its answer is lost."""
        words, _ = self.waiting.pop(0)
        self._server.command(*words)


class Connection:
    """One connection of a :class:`Way`."""

    def __init__(self, way: Way) -> None:
        self._way = way
        self._mine: list[Deferred[Any]] = []
        self.transport = self

    def execute_command(self, *words: Any) -> Deferred[Any]:
        """Send."""
        done: Deferred[Any] = Deferred()
        self._mine.append(done)
        self._way.waiting.append((words, done))
        return done

    def abortConnection(self) -> None:
        """End; what is on its way may be carried out all the same, and nobody hears."""
        for done in self._mine:
            if not done.called:
                done.errback(Failure(Lost("aborted")))


class Process:
    """One process: its limits, its engine and what it holds."""

    def __init__(self, server: EngineServer, number: int, wall: Clock) -> None:
        self.clock = Clock()
        self.way = Way(server)
        self.limits = SharedLimits(time.monotonic, wall.seconds)  # the engine's clock is real
        self.limits.follow(CLIENTS)
        self.leases: list[Lease] = []
        self.asking: list[Deferred[Any]] = []
        self._server = server
        self._number = number
        self.share()

    def share(self, born: str = "") -> None:
        """Share an engine."""
        self.engine = Engine(
            self.clock,
            lambda: self.way,
            name=f"p{self._number}",
            timeout=0.05,
            tellers=(self.limits,),
            born=born,
        )
        self.limits.engine = self.engine
        self.engine.start()

    def ask(self, name: str, size: int | None) -> None:
        """Ask for a request."""
        asking = Deferred.fromCoroutine(self.limits.ask(CLIENTS[name], "m", size))
        self.asking.append(asking)
        asking.addCallback(self.leases.append)
        asking.addErrback(lambda failure: failure.trap(ProxyError, CancelledError))
        asking.addBoth(lambda _: self.asking.remove(asking))

    def rest(self) -> None:
        """Let all that is under way come to its end."""
        for _ in range(200):
            while self.way.waiting:
                self.way.deliver()
            self.clock.advance(0.02)
            if self.is_at_rest:
                return
        raise AssertionError("it never comes to rest")

    @property
    def is_at_rest(self) -> bool:
        """Nothing is under way, or to be told."""
        engine = self.engine
        return (
            engine.is_up
            and not self.way.waiting
            and engine._sent is None
            and not self.limits.has_news
            and not self.asking
        )


class Agree(RuleBasedStateMachine):
    """Whatever order things come in."""

    server: EngineServer

    def __init__(self) -> None:
        super().__init__()
        self.server.command("FLUSHALL")
        self.wall = Clock()
        self.wall.advance(int(self.server.command("TIME")[0]))
        self.processes = [Process(self.server, n, self.wall) for n in range(PROCESSES)]
        self.was_lost = False
        for process in self.processes:
            process.rest()

    def at(self, number: int) -> Process:
        """Return a process."""
        return self.processes[number]

    who = integers(0, PROCESSES - 1)

    @rule(who=who, name=sampled_from(NAMES), size=sampled_from([None, 0, 4000]))
    def ask(self, who: int, name: str, size: int | None) -> None:
        """A request waits for the engine."""
        self.at(who).ask(name, size)

    @rule(who=who, name=sampled_from(NAMES), size=sampled_from([None, 0, 4000]))
    def admit(self, who: int, name: str, size: int | None) -> None:
        """A message cannot wait."""
        process = self.at(who)
        with suppress(ProxyError):
            process.leases.append(process.limits.admit(CLIENTS[name], "m", size))

    @rule(who=who, which=integers(0, 9), tokens=sampled_from([0, 10, 5000]), is_known=booleans())
    def settle(self, who: int, which: int, tokens: int, is_known: bool) -> None:
        """A request ends."""
        leases = self.at(who).leases
        if leases:
            leases.pop(which % len(leases)).settle(tokens, is_known)

    @rule(who=who)
    def leave(self, who: int) -> None:
        """A client leaves while its question waits."""
        if asking := self.at(who).asking:
            asking[0].cancel()

    @rule(who=who)
    def deliver(self, who: int) -> None:
        """A call is carried out and answered."""
        if self.at(who).way.waiting:
            self.at(who).way.deliver()

    @rule(who=who)
    def swallow(self, who: int) -> None:
        """A call is carried out, and the answer is lost."""
        if self.at(who).way.waiting:
            self.at(who).way.swallow()

    @rule(who=who)
    def lose(self, who: int) -> None:
        """A call is lost on its way."""
        if self.at(who).way.waiting:
            self.at(who).way.lose()

    @rule(who=who)
    def arrive(self, who: int) -> None:
        """What seemed lost arrives after all, behind others."""
        if strays := self.at(who).way.strays:
            self.server.command(*strays.pop(0))

    @rule(who=who)
    def reload(self, who: int) -> None:
        """The engine is reached in another way from now on."""
        process = self.at(who)
        process.rest()
        before, process.limits.engine = process.engine, None
        before.stop()
        while process.way.waiting:
            process.way.deliver()
        process.share(before.born)

    @rule()
    def forget(self) -> None:
        """The engine loses all that it knew, but not the script."""
        self.server.command("FLUSHDB")
        self.was_lost = True

    @rule(who=who, seconds=sampled_from([0, 0.02, 0.06, 0.2, 2.1]))
    def wait(self, who: int, seconds: float) -> None:
        """Time goes by for timers of one of them."""
        self.at(who).clock.advance(seconds)

    @rule(who=who)
    def take_for_gone(self, who: int) -> None:
        """A process says nothing for so long that it counts as gone; it goes on."""
        name = self.at(who).engine._name.decode()
        if self.server.command("ZSCORE", "llmproxy:procs", name) is not None:
            self.server.command("ZADD", "llmproxy:procs", 0, name)
        other = self.at(1 - who)
        if other.is_at_rest:
            other.clock.advance(1)
            while other.way.waiting:
                other.way.deliver()

    @rule()
    def at_rest(self) -> None:
        """They agree."""
        for _ in range(2):  # one may take another for gone
            for process in self.processes:
                process.clock.advance(1)
                process.rest()
        for name in NAMES:
            used = self.server.hash(f"llmproxy:c:{name}")
            found = [int(used.get(key, 0)) for key in "srtu"]
            own = [process.limits._used[name] for process in self.processes]
            sums = [
                sum(one.streams for one in own),
                sum(one.window.requests for one in own),
                sum(one.window.tokens for one in own),
                sum(one.day.used for one in own),
            ]
            if self.was_lost:  # what they know of the day is not of one moment
                assert max(one.day.used for one in own) <= found[3] <= sums[3]
                sums[3] = found[3]
            assert found == sums, (name, found, sums)
            for kind, total in zip("qk", found[1:3], strict=True):
                parts = [int(used[key]) for key in used if key[0] == kind]
                assert sum(parts) == total
                assert self.was_lost or all(part >= 0 for part in parts)

    def teardown(self) -> None:
        """Everything ends, and nothing is held."""
        self.at_rest()
        for process in self.processes:
            for lease in process.leases:
                lease.settle(7)
            process.leases.clear()
        self.at_rest()
        for name in NAMES:
            assert self.server.hash(f"llmproxy:c:{name}").get("s", "0") == "0"


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[EngineServer]:
    """An engine that runs."""
    program = SERVERS["redis"] or SERVERS["valkey"]
    if program is None:
        pytest.skip("there is no engine: make peers")
    with EngineServer(program, tmp_path_factory.mktemp("engine")) as engine:
        yield engine


def test_a_message_is_admitted_by_what_this_process_knows_beside_the_engine(
    server: EngineServer,
) -> None:
    """What has ended here makes room at once, also while the engine says what was before."""
    server.command("FLUSHALL")
    process, client = Process(server, 1, Clock()), Client(name="a", keys=(), max_streams=1)
    process.rest()
    lease = process.limits.admit(client, "m", None)
    process.rest()
    lease.settle(0)
    lease = process.limits.admit(client, "m", None)
    with pytest.raises(ProxyError):
        process.limits.admit(client, "m", None)
    process.clock.advance(0.05)
    lease.settle(0)
    process.way.deliver()  # it says that one runs
    process.limits.admit(client, "m", None)


def test_the_engine_and_the_processes_agree_at_rest(
    server: EngineServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Streams, requests and tokens, whatever was lost on the way, late, or cancelled."""
    monkeypatch.setattr(client_limits, "_AT_ONCE", 2)
    Agree.server = server
    run_state_machine_as_test(
        Agree,
        settings=settings(
            max_examples=300,
            stateful_step_count=30,
            deadline=None,
            suppress_health_check=list(HealthCheck),
        ),
    )
