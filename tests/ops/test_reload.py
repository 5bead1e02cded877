"""A reload by itself: what is read, made, used or let go of, and what is said of it."""

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
    """A configuration, with more than the least."""
    return parse(BASE + text, environ={})


class Setup:
    """Stands in for what follows the file; what is prepared is the configuration itself."""

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
        """Let it go."""
        self.abandoned.append(prepared)


class Desk:
    """An operator's desk: the file, SIGHUP, and the thread, which the test lets run.

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
            reporting=self._telling,
            report=lambda: self.events.append("told"),
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
    def _telling(self) -> Iterator[None]:
        self.events.append("reloading")
        yield
        self.events.append("ready")


@pytest.fixture
def desk() -> Desk:
    """A desk at which nothing has been done."""
    return Desk()


def test_a_start_counts_as_a_success(desk: Desk) -> None:
    """There was a file that could be read."""
    assert (desk.reload.succeeded, desk.reload.succeeded_at) == (True, 100.0)


def test_a_good_file_is_used(desk: Desk, logged: Listening) -> None:
    """In order: files are opened anew, the file is read aside, and the manager hears of it."""
    desk.time = 200.0
    desk.reload()
    assert desk.events == ["reopened", "reloading"]
    desk.run()
    assert desk.setup.config is desk.file
    assert desk.events == ["reopened", "reloading", "read", "told", "ready"]
    assert (desk.reload.succeeded, desk.reload.succeeded_at) == (True, 200.0)
    assert formatEvent(logged[-1]) == "reloaded; changed: clients.x"
    assert desk.setup.abandoned == []


def test_the_same_file_changes_nothing(desk: Desk, logged: Listening) -> None:
    """And the log says so."""
    desk.file = config()
    desk.reload()
    desk.run()
    assert formatEvent(logged[-1]) == "reloaded; nothing has changed"


@pytest.mark.parametrize("where", ["file", "made", "used"])
def test_what_fails_changes_nothing(desk: Desk, logged: Listening, where: str) -> None:
    """Wherever it does; the next one that goes well makes it good."""
    before, good = desk.setup.config, desk.file
    if where == "file":
        desk.file = ConfigError(["a.b: expected c", "d: unknown key"])
        problems = ["a.b: expected c", "d: unknown key"]
    elif where == "made":
        desk.setup.why_not_made, problems = OSError("no such file"), ["no such file"]
    else:
        desk.setup.why_not_used, problems = ValueError("no endpoint"), ["no endpoint"]
    desk.time = 200.0
    desk.reload()
    desk.run()
    assert desk.setup.config is before
    assert (desk.reload.succeeded, desk.reload.succeeded_at) == (False, 100.0)
    assert logged[-1]["log_level"] is LogLevel.error
    assert logged[-1]["problems"] == problems
    assert formatEvent(logged[-1]).endswith(f"nothing has changed: {'; '.join(problems)}")
    assert desk.events[-1] == "ready"

    desk.file, desk.setup.why_not_made, desk.setup.why_not_used = good, None, None
    desk.reload()
    desk.run()
    assert (desk.reload.succeeded, desk.reload.succeeded_at) == (True, 200.0)
    assert desk.setup.config is good


def test_an_error_of_ours_is_one_too(desk: Desk, logged_failures: LoggedFailures) -> None:
    """It is logged with its traceback, and the next reload is not held up."""
    desk.setup.why_not_made = KeyError("ours")
    desk.reload()
    desk.run()
    (failure,) = logged_failures.flush(KeyError)
    assert "ours" in failure.getErrorMessage()
    assert not desk.reload.succeeded
    desk.setup.why_not_made = None
    desk.reload()
    desk.run()
    assert desk.reload.succeeded


def test_calls_in_quick_succession_are_two_readings(desk: Desk) -> None:
    """However many come while the first is read: the second one sees what they all meant."""
    first = desk.file
    for _ in range(5):
        desk.reload()
    assert desk.events.count("reopened") == 5
    assert desk.run(1) == 1
    assert desk.setup.config is first
    desk.file = config("[limits]\ndrains = 7")
    assert desk.run() == 1
    assert desk.setup.config is desk.file
    assert [desk.events.count(event) for event in ("reloading", "read", "ready")] == [1, 2, 1]


def test_a_call_during_the_use_is_answered(desk: Desk) -> None:
    """A signal that comes between two readings is none that was lost."""
    desk.reload()
    desk.run()
    desk.file = config("[limits]\ndrains = 7")
    desk.reload()
    desk.run()
    assert desk.setup.config.limits.drains == 7


def test_at_rest_nothing_is_read(desk: Desk, logged: Listening) -> None:
    """Files are opened anew all the same; and it is said."""
    desk.reload.end()
    desk.reload()
    assert desk.run() == 0
    assert desk.events == ["reopened"]
    assert formatEvent(logged[-1]) == "no reload: the process shuts down"
    assert desk.reload.succeeded


def test_what_is_made_when_the_rest_begins_is_let_go_of(desk: Desk, logged: Listening) -> None:
    """It is not used any more, and that is no failure."""
    before = desk.setup.config
    desk.reload()
    desk.reload()
    desk.reload.end()
    assert desk.run() == 1
    assert desk.setup.config is before
    assert desk.setup.abandoned == [desk.file]
    assert formatEvent(logged[-1]) == "no reload: the process shuts down"
    assert desk.events[-1] == "ready"


def test_the_loop_stays_what_it_is(desk: Desk, logged: Listening) -> None:
    """What the file says of it waits for the next start; the rest takes effect."""
    desk.file = parse(BASE.replace('"us"', '"them"\ntuned_loop = false'), environ={})
    desk.reload()
    desk.run()
    assert desk.setup.config.proxy.tuned_loop
    assert desk.setup.config.proxy.via == "them"
    assert formatEvent(logged[-1]) == (
        "reloaded; changed: proxy; at the next start: proxy.tuned_loop"
    )
    desk.file = config()
    desk.reload()
    desk.run()
    assert formatEvent(logged[-1]) == "reloaded; changed: proxy"


def test_what_can_change_is_left_alone() -> None:
    """The file's own configuration is used where nothing waits."""
    new = config("[limits]\ndrains = 7")
    assert settled(new, config()) == (new, [])
    assert settled(new, config())[0] is new


def test_changes_are_named() -> None:
    """By table, and those with names by these: what is new, what is other, what is gone."""
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
async def test_what_blocks_is_called_on_another_thread() -> None:
    """One that keeps nobody from ending; what it returns or raises comes back here."""
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
