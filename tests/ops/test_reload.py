"""A reload by itself: what is read, made, used or abandoned, and what is reported."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from pytest_twisted import ensureDeferred
from twisted.internet import reactor
from twisted.internet.defer import Deferred
from twisted.logger import LogLevel, formatEvent

from llmproxy.config import Config, ConfigError, parse
from llmproxy.ops.reload import Reload, aside, changes, settled
from tests.conftest import LoggedFailures
from tests.ops.conftest import Listening

BASE = """
[proxy]
anonymous = true
via = "us"
[providers.a]
url = "http://a.example"
dialect = "openai"
[[routes]]
path = "/a"
providers = ["a"]
"""


def config(text: str = "") -> Config:
    """Return a configuration, with more than the least."""
    return parse(BASE + text, environ={})


class Setup:
    """Stands in for the setup that follows the file; it prepares the configuration itself."""

    def __init__(self) -> None:
        self.config = config()
        self.prepared: list[Config] = []
        self.abandoned: list[Config] = []
        self.why_not_made: Exception | None = None
        self.why_not_used: Exception | None = None

    def prepare(self, config: Config) -> Config:
        """Make it, or fail."""
        if self.why_not_made is not None:
            raise self.why_not_made
        self.prepared.append(config)
        return config

    def use(self, prepared: Config) -> None:
        """Use it, or fail."""
        if self.why_not_used is not None:
            raise self.why_not_used
        self.config = prepared

    def abandon(self, prepared: Config) -> None:
        """Note it."""
        self.abandoned.append(prepared)


class PlayedReload:
    """A reload whose file, signals and thread are the test's.

    Attributes:
        file: what reading it returns or raises.
        events: what was done, in order.
    """

    def __init__(self) -> None:
        self.file: Config | Exception = config('[clients.x]\nkeys = ["sha256:' + "0" * 64 + '"]')
        self.setup = Setup()
        self.events: list[str] = []
        self.time = 100.0
        self._jobs: list[tuple[Callable[[], Any], Deferred[Any]]] = []
        self.reload = Reload(
            self._reread,
            self.setup,  # type: ignore[arg-type]  # another kind of setup
            aside=self._aside,
            wall=lambda: self.time,
            reopen=lambda: self.events.append("reopened"),
            reporting=self._reporting,
            report=lambda: self.events.append("reported"),
        )

    def run(self, most: int = 10) -> int:
        """Let the thread do what it was given; return how many jobs that was."""
        count = 0
        while self._jobs and count < most:
            count += 1
            job, done = self._jobs.pop(0)
            try:
                result = job()
            except Exception as error:
                done.errback(error)
            else:
                done.callback(result)
        return count

    def _reread(self) -> Config:
        self.events.append("read")
        if isinstance(self.file, Exception):
            raise self.file
        return self.file

    def _aside(self, job: Callable[[], Any]) -> Deferred[Any]:
        done: Deferred[Any] = Deferred()
        self._jobs.append((job, done))
        return done

    @contextmanager
    def _reporting(self) -> Iterator[None]:
        self.events.append("reloading")
        yield
        self.events.append("ready")


@pytest.fixture
def played() -> PlayedReload:
    """A reload that has not begun."""
    return PlayedReload()


def test_a_start_counts_as_a_success(played: PlayedReload) -> None:
    """There was a file that could be read."""
    assert (played.reload.succeeded, played.reload.succeeded_at) == (True, 100.0)


def test_a_good_file_is_used(played: PlayedReload, logged: Listening) -> None:
    """In order: logs are reopened, the file is read on a thread, and the manager is notified."""
    played.time = 200.0
    played.reload()
    assert played.events == ["reopened", "reloading"]
    played.run()
    assert played.setup.config is played.file
    assert played.events == ["reopened", "reloading", "read", "reported", "ready"]
    assert (played.reload.succeeded, played.reload.succeeded_at) == (True, 200.0)
    assert formatEvent(logged[-1]) == "reloaded; changed: clients.x"
    assert played.setup.abandoned == []


def test_the_same_file_changes_nothing(played: PlayedReload, logged: Listening) -> None:
    """The log says that nothing has changed."""
    played.file = config()
    played.reload()
    played.run()
    assert formatEvent(logged[-1]) == "reloaded; nothing has changed"


@pytest.mark.parametrize("where", ["file", "made", "used"])
def test_a_reload_that_fails_changes_nothing(
    played: PlayedReload, logged: Listening, where: str
) -> None:
    """In every step; the next good file is used."""
    before, good = played.setup.config, played.file
    if where == "file":
        played.file = ConfigError(["a.b: expected c", "d: unknown key"])
        problems = ["a.b: expected c", "d: unknown key"]
    elif where == "made":
        played.setup.why_not_made, problems = OSError("no such file"), ["no such file"]
    else:
        played.setup.why_not_used, problems = ValueError("no endpoint"), ["no endpoint"]
    played.time = 200.0
    played.reload()
    played.run()
    assert played.setup.config is before
    assert (played.reload.succeeded, played.reload.succeeded_at) == (False, 100.0)
    assert logged[-1]["log_level"] is LogLevel.error
    assert logged[-1]["problems"] == problems
    assert formatEvent(logged[-1]).endswith(f"nothing has changed: {'; '.join(problems)}")
    assert played.events[-1] == "ready"

    played.file, played.setup.why_not_made, played.setup.why_not_used = good, None, None
    played.reload()
    played.run()
    assert (played.reload.succeeded, played.reload.succeeded_at) == (True, 200.0)
    assert played.setup.config is good


def test_an_error_of_ours_fails_a_reload_too(
    played: PlayedReload, logged_failures: LoggedFailures
) -> None:
    """It is logged with its traceback, and the next reload is done."""
    played.setup.why_not_made = KeyError("ours")
    played.reload()
    played.run()
    (failure,) = logged_failures.flush(KeyError)
    assert "ours" in failure.getErrorMessage()
    assert not played.reload.succeeded
    played.setup.why_not_made = None
    played.reload()
    played.run()
    assert played.reload.succeeded


def test_calls_in_quick_succession_are_two_readings(played: PlayedReload) -> None:
    """However many signals come during the first reading, one more reading serves them all."""
    first = played.file
    for _ in range(5):
        played.reload()
    assert played.events.count("reopened") == 5
    assert played.run(1) == 1
    assert played.setup.config is first
    played.file = config("[limits]\ndrains = 7")
    assert played.run() == 1
    assert played.setup.config is played.file
    assert [played.events.count(event) for event in ("reloading", "read", "ready")] == [1, 2, 1]


def test_a_reload_may_follow_another(played: PlayedReload) -> None:
    """A signal behind a finished reload begins another one."""
    played.reload()
    played.run()
    played.file = config("[limits]\ndrains = 7")
    played.reload()
    played.run()
    assert played.setup.config.limits.drains == 7


def test_a_process_that_shuts_down_reads_no_file(played: PlayedReload, logged: Listening) -> None:
    """Logs are reopened all the same, and the log says that there is no reload."""
    played.reload.end()
    played.reload()
    assert played.run() == 0
    assert played.events == ["reopened"]
    assert formatEvent(logged[-1]) == "no reload: the process shuts down"
    assert played.reload.succeeded


def test_a_setup_that_a_shutdown_overtakes_is_abandoned(
    played: PlayedReload, logged: Listening
) -> None:
    """The setup is not used, and that is no failure."""
    before = played.setup.config
    played.reload()
    played.reload()
    played.reload.end()
    assert played.run() == 1
    assert played.setup.config is before
    assert played.setup.abandoned == [played.file]
    assert formatEvent(logged[-1]) == "no reload: the process shuts down"
    assert played.events[-1] == "ready"


def test_a_running_loop_is_kept(played: PlayedReload, logged: Listening) -> None:
    """A change of the loop waits for the next start; every other change takes effect."""
    played.file = parse(
        BASE.replace('"us"', '"them"\ntuned_loop = false\nwatch_turns = true'), environ={}
    )
    played.reload()
    played.run()
    assert played.setup.config.proxy.tuned_loop
    assert not played.setup.config.proxy.watch_turns
    assert played.setup.config.proxy.via == "them"
    assert formatEvent(logged[-1]) == (
        "reloaded; changed: proxy; at the next start: proxy.tuned_loop, proxy.watch_turns"
    )
    played.file = config()
    played.reload()
    played.run()
    assert formatEvent(logged[-1]) == "reloaded; changed: proxy"


def test_a_configuration_that_can_be_used_whole_is_used_as_it_is() -> None:
    """The file's own configuration is used where no change waits."""
    new = config("[limits]\ndrains = 7")
    assert settled(new, config()) == (new, [])
    assert settled(new, config())[0] is new


def test_changes_are_named() -> None:
    """By table, or by name where a table has names: whatever is new, changed or gone."""
    more = (
        '[providers.b]\nurl = "http://b.example"\ndialect = "raw"\n'
        '[[routes]]\npath = "/b"\nproviders = ["b"]\n[timeouts]\nconnect = "1s"\n'
    )
    assert changes(config(), config()) == []
    assert changes(config(), config(more)) == ["timeouts", "providers.b", "routes"]
    assert changes(config(more), config()) == ["timeouts", "providers.b", "routes"]
    other = parse(BASE.replace("a.example", "c.example"), environ={})
    assert changes(config(), other) == ["providers.a"]


@ensureDeferred
async def test_a_blocking_call_is_made_on_another_thread() -> None:
    """On a daemon thread; its result or its exception comes back here."""
    seen: list[threading.Thread] = []

    def job() -> str:
        seen.append(threading.current_thread())
        return "done"

    def fail() -> str:
        raise OSError("not today")

    assert await aside(reactor, job) == "done"
    assert seen[0] is not threading.current_thread()
    assert seen[0].daemon
    with pytest.raises(OSError, match="not today"):
        await aside(reactor, fail)
