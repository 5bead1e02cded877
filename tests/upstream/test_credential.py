"""When a command's credential is renewed, and what is sent until then (ADR-0029)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import msgspec
import pytest
from twisted.internet.defer import Deferred
from twisted.internet.task import Clock
from twisted.logger import ILogObserver, LogEvent, formatEvent, globalLogPublisher

from llmproxy.config import Config, Secret, parse
from llmproxy.errors import ProxyError
from llmproxy.upstream.command import CommandFailed
from llmproxy.upstream.credential import CommandCredential, Credentials, credential_of

FILE = """
[proxy]
anonymous = true
[providers.p]
url = "http://p.example"
dialect = "openai"
credential = { command = ["/bin/token", "a"], ttl = "100s" }
[providers.q]
url = "http://q.example"
dialect = "openai"
[[routes]]
path = "/p"
providers = ["p"]
"""


def config(old: str = "", new: str = "") -> Config:
    """Return the configuration, with one change."""
    return parse(FILE.replace(old, new), environ={})


class Played:
    """Credentials whose commands the test answers, on a clock that it turns.

    Attributes:
        pending: the runs that have not ended, each with its command.
        replaced: the values that are sent no more.
    """

    def __init__(self) -> None:
        self.clock = Clock()
        self.pending: list[tuple[tuple[str, ...], Deferred[Secret]]] = []
        self.replaced: list[tuple[str, bytes]] = []
        self.logged: list[LogEvent] = []
        self.all = Credentials(
            self.clock, self.clock.seconds, aside=self._aside, environ={}, deadline_s=1
        )
        self.all.replaced = lambda name, value: self.replaced.append((name, value))
        self.all.run = self._run  # type: ignore[method-assign]  # no program runs here
        self.used: dict[str, CommandCredential] = {}
        self.printed: list[str | CommandFailed] = []

    def _run(self, words: tuple[str, ...]) -> Secret:
        """Stand for a run on the caller's own thread, as in a reload."""
        value = self.printed.pop(0)
        if isinstance(value, CommandFailed):
            raise value
        return Secret(value)

    def _aside(self, call: Callable[[], Secret]) -> Deferred[Secret]:
        done: Deferred[Secret] = Deferred()
        self.pending.append((cast(Any, call).args[0], done))
        return done

    def use(self, old: str = "", new: str = "") -> CommandCredential:
        """Follow a configuration."""
        self.used = self.all.prepare(config(old, new))
        self.all.use(self.used)
        return self.used["p"]

    def start(self) -> CommandCredential:
        """Start with a command that prints ``one``."""
        self.printed = ["one"]
        return self.use()

    def prints(self, value: str) -> None:
        """Let the one pending run print this."""
        ((_, done),) = self.pending
        self.pending.clear()
        done.callback(Secret(value))

    def fails(self, why: str = "it ended with exit status 1") -> None:
        """Let the one pending run fail."""
        ((_, done),) = self.pending
        self.pending.clear()
        done.errback(CommandFailed(why))

    def turn(self, seconds: float) -> int:
        """Turn the clock; return how many runs have begun and not ended."""
        self.clock.advance(seconds)
        return len(self.pending)

    def end(self) -> None:
        """No timer is left."""
        self.all.stop()
        assert not self.clock.getDelayedCalls()


@pytest.fixture
def played() -> Any:
    """Credentials, whose log is read; nothing is left of them."""
    played = Played()
    observer = cast(ILogObserver, played.logged.append)
    globalLogPublisher.addObserver(observer)
    yield played
    globalLogPublisher.removeObserver(observer)
    played.end()


def test_the_command_has_run_before_the_first_request(played: Played) -> None:
    """The configuration is prepared before anything listens."""
    assert played.start().field == (b"authorization", b"Bearer one")
    assert played.turn(79) == 0


def test_a_command_that_fails_at_the_start_runs_again_ever_later(played: Played) -> None:
    """Requests get a 503 with a reason of its own until it prints something."""
    played.printed = [CommandFailed("it ended with exit status 1")]
    used = played.use()
    with pytest.raises(ProxyError) as caught:
        _ = used.field
    error = caught.value
    assert (error.status, error.reason) == (503, "credential_unavailable")
    assert (b"retry-after", b"1") in error.fields
    for seconds in (1, 2, 4, 8, 16, 32, 60, 60):
        assert played.turn(seconds - 0.01) == 0
        assert played.turn(0.01) == 1
        played.fails()
    assert played.all.failures == {"p": 9}
    assert played.turn(60) == 1
    played.prints("one")
    assert used.field[1] == b"Bearer one"
    assert played.turn(79) == 0


def test_it_is_renewed_before_it_expires(played: Played) -> None:
    """After four fifths of its time; requests go with the old one until the new one is there."""
    used = played.start()
    for before, after in (("one", "two"), ("two", "three")):
        assert played.turn(79.9) == 0
        assert played.turn(0.1) == 1
        assert used.field[1] == b"Bearer " + before.encode()
        played.turn(1)
        played.prints(after)
        assert used.field[1] == b"Bearer " + after.encode()
    assert played.replaced == [("p", b"Bearer one"), ("p", b"Bearer two")]


def test_the_last_good_output_is_used_while_the_command_fails(played: Played) -> None:
    """Also beyond its time: the provider decides whether it still takes it."""
    used = played.start()
    played.turn(80)
    for seconds in (1, 2, 4, 8, 16, 32, 60):
        played.fails()
        assert used.field[1] == b"Bearer one"
        assert played.turn(seconds) == 1
    assert played.all.ages() == {"p": 80 + 123}
    played.prints("two")
    assert used.field[1] == b"Bearer two"
    assert played.all.ages() == {"p": 0}


def test_the_same_output_again_replaces_nothing(played: Played) -> None:
    """Connections stay, and so does the field."""
    used = played.start()
    field = used.field
    played.turn(80)
    played.prints("one")
    assert used.field is field
    assert played.replaced == []


def test_refusals_run_the_command_ever_less_often(played: Played) -> None:
    """A provider may refuse what a request asks for, for ever; after calm it is as at first."""
    long = '["/bin/token", "a"], ttl = "100s"', '["/bin/token", "a"], ttl = "1d"'
    played.printed = ["0"]
    used = played.use(*long)
    for number, gap in enumerate((5, 10, 20, 40, 80, 160, 300, 300), 1):
        used.renew_soon(used.field)
        assert played.turn(gap - 0.1) == 0
        used.renew_soon(used.field)
        assert played.turn(0.1) == 1
        played.prints(str(number))  # another one each time: what is printed does not count
    used = played.use(*long)
    used.renew_soon(used.field)
    assert played.turn(299) == 0  # a reload does not begin anew
    assert played.turn(1) == 1
    played.prints("last")
    played.turn(601)
    used.renew_soon(used.field)
    assert played.turn(0) == 1
    played.prints("last")
    used.renew_soon(used.field)
    assert played.turn(9.9) == 0
    assert played.turn(0.1) == 1
    played.prints("last")


def test_a_refusal_runs_the_command(played: Played) -> None:
    """One run at a time, and a while between two, however many requests are refused."""
    used = played.start()
    played.turn(10)
    for _ in range(3):
        used.renew_soon(used.field)
        assert played.turn(0) == 1
    played.prints("one")  # the provider refuses this one again
    for _ in range(3):
        used.renew_soon(used.field)
    assert played.turn(9.9) == 0
    used.renew_soon(used.field)
    assert played.turn(0.1) == 1
    played.prints("two")
    refusals = [formatEvent(one) for one in played.logged if "refused" in formatEvent(one)]
    assert len(refusals) == 2, refusals  # one for each run that they asked for


def test_the_refusal_of_a_value_of_before_runs_nothing(played: Played) -> None:
    """A request may have begun with it; the new one was not refused."""
    used = played.start()
    old = used.field
    played.turn(80)
    played.prints("two")
    used.renew_soon(old)
    assert played.turn(20) == 0


def test_a_refusal_does_not_put_off_what_is_due(played: Played) -> None:
    """The sooner of both is what counts."""
    used = played.start()
    played.turn(79)
    used.renew_soon(used.field)
    assert played.turn(0) == 1
    played.fails()  # tried again in a second
    used.renew_soon(used.field)
    assert played.turn(1) == 1
    played.prints("two")


@pytest.mark.parametrize(
    ("old", "new", "field"),
    [
        ("", "", (b"authorization", b"Bearer one")),
        ('dialect = "openai"\ncred', 'dialect = "anthropic"\ncred', (b"x-api-key", b"one")),
        ("100s", "200s", (b"authorization", b"Bearer one")),
    ],
    ids=["nothing", "the dialect", "the time"],
)
def test_a_reload_keeps_the_output_of_the_same_command(
    played: Played, old: str, new: str, field: tuple[bytes, bytes]
) -> None:
    """It is not run; its time goes on from when it was printed."""
    played.start()
    played.turn(50)
    used = played.use(old, new)
    assert used.field == field
    due = 110 if new == "200s" else 30
    assert played.turn(due - 0.1) == 0
    assert played.turn(0.1) == 1
    played.prints("two")
    assert used.field[1].endswith(b"two")


def test_a_reload_runs_a_new_command_before_it_is_used(played: Played) -> None:
    """No request meets the provider without a credential; a failure does not fail the reload."""
    played.start()
    played.printed = ["other"]
    used = played.use('"/bin/token"', '"/bin/other"')
    assert used.field[1] == b"Bearer other"
    assert played.turn(79) == 0
    played.printed = [CommandFailed("no")]
    used = played.use()
    assert played.all.failures == {"p": 1}
    with pytest.raises(ProxyError):
        _ = used.field
    assert played.turn(1) == 1
    played.prints("one")
    assert used.field[1] == b"Bearer one"


def test_an_output_that_comes_during_a_reload_is_kept(played: Played) -> None:
    """The configuration is prepared on another thread, while the old one is in use."""
    played.start()
    played.turn(80)
    made = played.all.prepare(config())
    played.prints("two")
    played.all.use(made)
    assert made["p"].field[1] == b"Bearer two"


def test_a_provider_that_is_gone_is_asked_no_more(played: Played) -> None:
    """Nothing of it is left, and a run that ends later changes nothing."""
    used = played.start()
    played.turn(80)
    played.all.use({})
    played.prints("two")
    assert used.field[1] == b"Bearer one"
    assert played.turn(1000) == 0
    assert played.all.ages() == {}


def test_a_file_and_no_credential_have_a_settled_field() -> None:
    """They are not renewed, whatever the provider says."""
    provider = config().providers["q"]
    assert credential_of(provider, {}) is None
    held = msgspec.structs.replace(provider, credential=Secret("key"))
    fixed = credential_of(held, {})
    assert fixed is not None
    fixed.renew_soon(fixed.field)
    assert fixed.field == (b"authorization", b"Bearer key")


def test_no_output_is_shown(played: Played) -> None:
    """Neither in the log, nor where an object is printed."""
    used = played.start()
    played.turn(80)
    played.fails()
    used.renew_soon(used.field)
    played.turn(5)
    played.prints("tok-SECRET2")
    shown = repr([used, vars(played.all), [formatEvent(one) for one in played.logged]])
    assert "works again" in shown
    assert "SECRET" not in shown + repr(played.logged)
