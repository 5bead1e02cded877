"""Proof that the suite's own safety nets hold: each is given a test that must not pass."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support.suites import CONFTEST, outcomes


@pytest.fixture
def suite(pytester: pytest.Pytester) -> pytest.Pytester:
    """An empty test suite with our conftest, to be run in a process (and a reactor) of its own."""
    pytester.makeconftest(CONFTEST)
    return pytester


def test_a_logged_failure_fails_the_test(suite: pytest.Pytester) -> None:
    """A failure logged in passing makes an error of a test that asserted nothing wrong."""
    counts, output = outcomes(
        suite,
        """
        from twisted.logger import Logger

        def test_it():
            try:
                raise LookupError("lost in the log")
            except LookupError:
                Logger().failure("while looking away")
        """,
    )
    assert counts == {"passed": 1, "errors": 1}
    assert "while looking away" in output
    assert "LookupError: lost in the log" in output


def test_an_error_logged_the_old_way_fails_the_test(suite: pytest.Pytester) -> None:
    """``log.err`` and ``isError`` of twisted.python.log count like a failure of twisted.logger."""
    counts, output = outcomes(
        suite,
        """
        from twisted.python import log

        def test_failure():
            log.err(LookupError("by log.err"))

        def test_text():
            log.msg("only a text", isError=True)
        """,
    )
    assert counts == {"passed": 2, "errors": 2}
    assert "by log.err" in output
    assert "only a text" in output


def test_a_deferred_that_failed_unseen_fails_the_test(suite: pytest.Pytester) -> None:
    """A failed Deferred that nobody looks at is found, also where only the collector frees it."""
    counts, output = outcomes(
        suite,
        """
        from twisted.internet.defer import Deferred

        def test_it():
            deferred = Deferred()
            deferred.itself = deferred
            deferred.errback(LookupError("nobody looked"))

        def test_the_next_one():
            pass
        """,
        "-v",
    )
    assert counts == {"passed": 2, "errors": 1}
    assert "ERROR test_a_deferred_that_failed_unseen_fails_the_test.py::test_it" in output
    assert "nobody looked" in output


def test_a_flushed_failure_is_expected(suite: pytest.Pytester) -> None:
    """What ``flush`` took out fails nothing, and comes back to be looked at."""
    counts, _ = outcomes(
        suite,
        """
        from twisted.logger import Logger
        from twisted.python.failure import Failure

        def test_it(logged_failures):
            Logger().failure("one", Failure(LookupError("1")))
            Logger().failure("two", Failure(OSError("2")))
            assert [str(f.value) for f in logged_failures.flush(LookupError)] == ["1"]
            assert [str(f.value) for f in logged_failures.flush()] == ["2"]
            assert logged_failures.flush() == []
        """,
    )
    assert counts == {"passed": 1}


def test_a_failure_of_another_type_is_not_flushed(suite: pytest.Pytester) -> None:
    """``flush`` of one type leaves the failures of all others to fail the test."""
    counts, output = outcomes(
        suite,
        """
        from twisted.logger import Logger
        from twisted.python.failure import Failure

        def test_it(logged_failures):
            Logger().failure("other", Failure(OSError("not asked for")))
            assert logged_failures.flush(LookupError) == []
        """,
    )
    assert counts == {"passed": 1, "errors": 1}
    assert "not asked for" in output


def test_an_error_line_without_a_failure_is_no_failure(suite: pytest.Pytester) -> None:
    """What an operator is told at the level "error" passes: it is output, not an accident."""
    counts, _ = outcomes(
        suite,
        """
        from twisted.logger import Logger

        def test_it():
            Logger().error("the file is not there")
        """,
    )
    assert counts == {"passed": 1}


def test_a_delayed_call_left_behind_fails_the_test(suite: pytest.Pytester) -> None:
    """The test that leaves a timed call is blamed, the one after it is not."""
    counts, output = outcomes(
        suite,
        """
        from twisted.internet import reactor

        def left_behind():
            pass

        def test_it():
            reactor.callLater(3600, left_behind)

        def test_the_next_one():
            assert reactor.getDelayedCalls() == []
        """,
        "-v",
    )
    assert counts == {"passed": 2, "errors": 1}
    assert "ERROR test_a_delayed_call_left_behind_fails_the_test.py::test_it" in output
    assert "left_behind" in output


def test_a_call_that_is_due_at_once_may_finish(suite: pytest.Pytester) -> None:
    """A call that is due now, and one more that it makes, are let run and not blamed."""
    counts, _ = outcomes(
        suite,
        """
        from twisted.internet import reactor

        def test_it():
            reactor.callLater(0, reactor.callLater, 0, lambda: None)
        """,
    )
    assert counts == {"passed": 1}


def test_the_calls_of_a_wider_fixture_are_its_own(suite: pytest.Pytester) -> None:
    """A call that stood before the test, or that such a call made anew, is not the test's."""
    counts, _ = outcomes(
        suite,
        """
        import pytest
        import pytest_twisted
        from twisted.internet import reactor
        from twisted.internet.task import LoopingCall, deferLater

        @pytest.fixture(scope="module")
        def ticking():
            loop = LoopingCall(lambda: None)
            loop.start(0.01)
            yield loop
            loop.stop()

        @pytest_twisted.ensureDeferred
        async def test_it(ticking):
            await deferLater(reactor, 0.05)
        """,
    )
    assert counts == {"passed": 1}


def test_a_test_that_waits_for_ever_is_ended(suite: pytest.Pytester) -> None:
    """The timeout ends a wait for a Deferred and a busy test alike; the next test is unharmed."""
    counts, output = outcomes(
        suite,
        """
        import time
        import pytest_twisted
        from twisted.internet import reactor
        from twisted.internet.defer import Deferred
        from twisted.internet.task import deferLater

        def test_returned():
            return Deferred()

        @pytest_twisted.ensureDeferred
        async def test_awaited():
            await Deferred()

        def test_busy():
            time.sleep(50)

        @pytest_twisted.ensureDeferred
        async def test_busy_coroutine():
            time.sleep(50)

        @pytest_twisted.ensureDeferred
        async def test_the_next_one():
            await deferLater(reactor, 0.01)
        """,
        "--timeout=0.5",
    )
    assert counts == {"passed": 1, "failed": 4}
    assert output.count("Failed: Timeout (>0.5s) from pytest-timeout.") >= 4


def test_a_mark_that_nobody_declared_is_an_error(suite: pytest.Pytester) -> None:
    """A misspelt mark stops the run, by the project's own settings."""
    suite.makefile(".cfg", setup=(Path(__file__).parents[1] / "setup.cfg").read_text())
    counts, output = outcomes(
        suite,
        """
        import pytest

        @pytest.mark.trop("P1")
        def test_it():
            pass
        """,
        "test_a_mark_that_nobody_declared_is_an_error.py",
    )
    assert counts == {"errors": 1}
    assert "'trop' not found in `markers` configuration option" in output
