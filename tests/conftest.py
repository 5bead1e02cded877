"""What every test is held to: no failure goes unread, no timed call outlives its test, none hangs.

pytest-twisted runs each test function on the reactor's greenlet and each fixture on the main one.
It looks neither at the log nor at the reactor's delayed calls, and while the reactor waits,
pytest-timeout cannot reach the test; the hooks and fixtures here do all three.
``test_conftest.py`` proves each.

It also says how the suite runs, which ``test_running.py`` proves.  All that is drawn (Hypothesis's
examples, lives, what the fuzzer tries) comes from one seed; the header and a report of failures
name it.  It is always the same, so that no change fails by what was drawn for it alone.
``LLMPROXY_TEST_SEARCH=N`` makes a search of the run: N times as many examples, and the commit's
seed.  ``LLMPROXY_TEST_SEED=commit`` takes the commit's seed without more examples, and a number
draws again what another run has drawn.  (``LLMPROXY_TEST_TUNED=off`` runs daemons on Twisted's own
loop.)
"""

from __future__ import annotations

import gc
import inspect
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Generator, Iterator
from pathlib import Path
from types import FrameType
from typing import Any, cast

import greenlet
import hypothesis
import pytest
import pytest_twisted
from hypothesis.internal.conjecture import engine as hypothesis_engine
from twisted.internet.task import deferLater
from twisted.logger import ILogObserver, LogEvent, globalLogPublisher
from twisted.python.failure import Failure
from zope.interface import implementer


def _seed_of_commit() -> int:
    """Return a number that is the commit's; 1 where there is no commit."""
    command = ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"]
    try:
        found = subprocess.run(command, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return 1
    return int(found.stdout[:7], 16) or 1


SEARCH = int(os.environ.get("LLMPROXY_TEST_SEARCH") or 0)
"""How many times as many examples a search takes, and as much time; 0 is no search."""

_asked = os.environ.get("LLMPROXY_TEST_SEED") or ("commit" if SEARCH else "1")
SEED = _seed_of_commit() if _asked == "commit" else int(_asked)
"""What everything that is drawn comes from; a commit's is below 2 ** 28, and never 0."""

# xdist's workers, and tests that draw by themselves, read it there.
os.environ["LLMPROXY_TEST_SEED"] = str(SEED)
# Tests start the daemon and other programs of this tree hundreds of times: where the environment
# forbids Python to keep bytecode, each of them would compile the whole tree again.
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
sys.dont_write_bytecode = False
hypothesis.core.global_force_seed = SEED  # type: ignore[assignment]  # None is only its default

SHRINKING_S = 20
"""Seconds for which Hypothesis makes a failing example smaller: its own five minutes, which no
setting changes, end behind the timeout, and then no example is shown at all."""

hypothesis_engine.MAX_SHRINKING_SECONDS = SHRINKING_S
# A time limit for one example would measure what else the machine does; the test's timeout stays.
hypothesis.settings.register_profile(
    "usual",
    derandomize=False,  # it would draw the same for every seed
    database=None,
    deadline=None,
    suppress_health_check=[hypothesis.HealthCheck.too_slow],
    phases=[phase for phase in hypothesis.Phase if phase is not hypothesis.Phase.explain],
)
hypothesis.settings.register_profile(
    "search",
    parent=hypothesis.settings.get_profile("usual"),
    max_examples=SEARCH * 100 or 1,
    print_blob=True,
)
hypothesis.settings.load_profile("search" if SEARCH else "usual")


_MANY = 5000
"""Objects that may stay after tests before the collector is told to look at them no more."""


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add the option that ``tests/traps`` has; only here does pytest see it early enough."""
    parser.addoption(
        "--stock",
        action="store_true",
        help="run tests/traps on Twisted's and treq's own parts, to see them fail",
    )


def pytest_sessionstart() -> None:
    """Say at once what a machine lacks without which half of the tests fail, each otherwise."""
    try:
        socket.getaddrinfo("localhost", 0, socket.AF_INET)
    except OSError as error:
        pytest.exit(
            f'this machine does not know the name "localhost" ({error}): '
            'the tests need "127.0.0.1 localhost" in /etc/hosts',
            returncode=pytest.ExitCode.USAGE_ERROR,
        )


def pytest_report_header() -> str:
    """Say where everything that is drawn comes from."""
    return f"drawn from: LLMPROXY_TEST_SEED={SEED}"


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, exitstatus: int) -> None:
    """Say it behind failures, too: a quiet run has no header."""
    if exitstatus == pytest.ExitCode.TESTS_FAILED:
        terminalreporter.write_line(f"drawn from: LLMPROXY_TEST_SEED={SEED}")


@implementer(ILogObserver)
class LoggedFailures:
    """The failures and errors that were logged during one test and that it has not asked for."""

    def __init__(self) -> None:
        self._events: list[LogEvent] = []

    def __call__(self, event: LogEvent) -> None:
        """Keep the event if it speaks of a failure, in Twisted's new logging or in the old."""
        if "log_failure" in event or event.get("isError"):
            self._events.append(event)

    def flush(self, *types: type[BaseException]) -> list[Failure]:
        """Take out, and so expect, what was logged up to now.

        Args:
            types: only failures of these types; without any, everything.

        Returns:
            The failures in the order in which they were logged.  An error that was logged as text
            is taken out too where no types are given, but is not among them.
        """
        gc.collect()  # a Deferred that nobody looked at logs its failure when it is collected
        taken: list[Failure] = []
        left: list[LogEvent] = []
        for event in self._events:
            failure: Failure | None = event.get("log_failure")
            if types and (failure is None or failure.check(*types) is None):
                left.append(event)
            elif failure is not None:
                taken.append(failure)
        self._events = left
        return taken

    def report(self) -> str:
        """One paragraph for each event that is left; empty if there is none."""
        gc.collect()
        return "\n".join(_text(event) for event in self._events)


def _spare_the_collector() -> None:
    """Take what stays after a test out of the collector's sight, where it is much.

    The collector runs after each test, and has just run: what is left is not garbage.  Caches,
    modules and SDKs' models grow all the time; to look at them again took half a second a test.
    """
    if len(gc.get_objects()) > _MANY:
        gc.freeze()


def _text(event: LogEvent) -> str:
    if "log_failure" in event:
        failure: Failure = event["log_failure"]
        return f"{event.get('log_format') or 'failure'}\n{failure.getTraceback()}"
    return str(event.get("log_text") or event.get("message") or event)


@pytest.fixture(autouse=True)
def logged_failures() -> Iterator[LoggedFailures]:
    """Fail the test if a failure was logged that it did not take with ``flush``."""
    failures = LoggedFailures()
    observer = cast(ILogObserver, failures)
    globalLogPublisher.addObserver(observer)
    try:
        yield failures
        report = failures.report()
        _spare_the_collector()
    finally:
        globalLogPublisher.removeObserver(observer)
    if report:
        pytest.fail(f"failures were logged and not expected:\n{report}", pytrace=False)


@pytest.fixture(autouse=True)
def _no_delayed_call_stays(logged_failures: LoggedFailures) -> Iterator[None]:
    """Fail the test if a timed call that it caused still stands in the reactor.

    A call of a fixture with a wider scope that runs again and again (``HTTPFactory`` tells itself
    the time each second) is a new call each time; it is known by what it calls.  Nothing else is
    let through.
    """
    from twisted.internet import reactor

    clock: Any = reactor
    before = [call.func for call in clock.getDelayedCalls()]
    yield
    # Transports finish their closing in a call that is due at once, and may make another one in
    # it: that is the present, not something left for later.  Like trial, give it two turns.
    for _ in range(2):
        pytest_twisted.blockon(deferLater(clock, 0))
    left = [call for call in clock.getDelayedCalls() if call.func not in before]
    report = "\n".join(str(call) for call in left)
    for call in left:
        call.cancel()
    if report:
        pytest.fail(f"delayed calls were left in the reactor:\n{report}", pytrace=False)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Begin with the files whose tests may take longest: none is left for the end, to run alone.

    A search has the more time.
    """
    limits: dict[Path, float] = {}
    for item in items:
        mark = item.get_closest_marker("timeout")
        limits[item.path] = max(limits.get(item.path, 0), mark.args[0] if mark else 0)
        if SEARCH and hypothesis.is_hypothesis_test(getattr(item, "function", None)):
            item.add_marker(pytest.mark.timeout(120 * SEARCH))
    items.sort(key=lambda item: -limits[item.path])


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Drop what a worker of xdist's keeps of the tests before: only its controller reads reports.

    The collector would look at all of it after each test.
    """
    if hasattr(item.config, "workerinput"):
        reporter: Any = item.config.pluginmanager.get_plugin("terminalreporter")
        reporter.stats.clear()


def pytest_collection_finish() -> None:
    """Take what was imported out of the collector's sight: it runs after each test."""
    gc.collect()
    gc.freeze()


@pytest.hookimpl(wrapper=True)
def pytest_timeout_set_timer(item: pytest.Item) -> Generator[None, object, object]:
    """Let a timeout end the test also where the reactor waits for something that does not come.

    pytest-timeout raises out of its signal handler.  While the test itself runs, that ends it.
    While the reactor runs, the reactor's main loop would log the exception and go on waiting: then
    it is thrown into the greenlet that waits for the test's Deferred.
    """
    result = yield
    handler = signal.getsignal(signal.SIGALRM)
    if callable(handler):
        main = greenlet.getcurrent()
        code = inspect.unwrap(getattr(item, "function", lambda: None)).__code__

        def ring(signum: int, frame: FrameType | None) -> None:
            in_place = greenlet.getcurrent() is main or _runs(code, frame)
            try:
                handler(signum, frame)
            except BaseException as error:
                if in_place:
                    raise
                main.throw(error)

        signal.signal(signal.SIGALRM, ring)
    return result


def _runs(code: object, frame: FrameType | None) -> bool:
    while frame is not None and frame.f_code is not code:
        frame = frame.f_back
    return frame is not None
