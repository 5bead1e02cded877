"""Proof that the suite's own safety nets hold: each is given a test that must not pass."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support.suites import outcomes


def test_a_logged_failure_fails_its_test(pytester: pytest.Pytester) -> None:
    """A failure fails the test in which it was logged, in Twisted's new logging and in the old.

    A failed Deferred that nobody looks at is found, also where only the collector frees it, and
    ``flush`` of one type leaves the failures of all others.
    """
    counts, output = outcomes(
        pytester,
        """
        from twisted.internet.defer import Deferred
        from twisted.logger import Logger
        from twisted.python import log
        from twisted.python.failure import Failure

        def test_new():
            try:
                raise LookupError("lost in the log")
            except LookupError:
                Logger().failure("while looking away")

        def test_old():
            log.err(LookupError("by log.err"))

        def test_text():
            log.msg("only a text", isError=True)

        def test_unseen():
            deferred = Deferred()
            deferred.itself = deferred
            deferred.errback(LookupError("nobody looked"))

        def test_other(logged_failures):
            Logger().failure("other", Failure(OSError("not asked for")))
            assert logged_failures.flush(LookupError) == []

        def test_the_next_one():
            pass
        """,
        "-v",
    )
    assert counts == {"passed": 6, "errors": 5}
    for name in ("new", "old", "text", "unseen", "other"):
        assert f"ERROR test_a_logged_failure_fails_its_test.py::test_{name} " in output
    assert "while looking away" in output
    assert "LookupError: lost in the log" in output
    for words in ("by log.err", "only a text", "nobody looked", "not asked for"):
        assert words in output


def test_what_stays_is_not_collected_after_each_test(pytester: pytest.Pytester) -> None:
    """The collector does not look at it again; what a later test leaves is still found."""
    counts, output = outcomes(
        pytester,
        """
        import gc
        from twisted.internet.defer import Deferred

        STAYS = []

        def test_much():
            STAYS.extend([] for _ in range(10_000))

        def test_a_little():
            assert len(gc.get_objects()) < 10_000
            STAYS.append([])

        def test_unseen():
            assert any(thing is STAYS[-1] for thing in gc.get_objects())
            deferred = Deferred()
            deferred.itself = deferred
            deferred.errback(LookupError("nobody looked"))
        """,
        "-v",
    )
    assert counts == {"passed": 3, "errors": 1}
    assert "LookupError: nobody looked" in output


def test_what_is_expected_fails_no_test(pytester: pytest.Pytester) -> None:
    """A failure that ``flush`` takes out is expected, and so are four things more.

    These are an error line for an operator, a call that is due at once with one that it makes, and
    the calls of a fixture with a wider scope, old and made anew.
    """
    counts, _ = outcomes(
        pytester,
        """
        import pytest
        import pytest_twisted
        from twisted.internet import reactor
        from twisted.internet.task import LoopingCall, deferLater
        from twisted.logger import Logger
        from twisted.python.failure import Failure

        def test_flush(logged_failures):
            Logger().failure("one", Failure(LookupError("1")))
            Logger().failure("two", Failure(OSError("2")))
            assert [str(f.value) for f in logged_failures.flush(LookupError)] == ["1"]
            assert [str(f.value) for f in logged_failures.flush()] == ["2"]
            assert logged_failures.flush() == []

        def test_error_line():
            Logger().error("the file is not there")

        def test_due_at_once():
            reactor.callLater(0, reactor.callLater, 0, lambda: None)

        @pytest.fixture(scope="module")
        def ticking():
            loop = LoopingCall(lambda: None)
            loop.start(0.01)
            yield loop
            loop.stop()

        @pytest_twisted.ensureDeferred
        async def test_wider_scope(ticking):
            await deferLater(reactor, 0.05)
        """,
    )
    assert counts == {"passed": 4}


def test_a_delayed_call_left_behind_fails_the_test(pytester: pytest.Pytester) -> None:
    """The test that leaves a timed call is blamed, the one after it is not."""
    counts, output = outcomes(
        pytester,
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


def test_a_test_that_waits_for_ever_is_ended(pytester: pytest.Pytester) -> None:
    """The timeout ends a wait for a Deferred and a busy test; the next test is unharmed."""
    counts, output = outcomes(
        pytester,
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


def test_a_mark_that_nobody_declared_is_an_error(pytester: pytest.Pytester) -> None:
    """A misspelt mark stops the run, by the project's own settings."""
    pytester.makefile(".cfg", setup=(Path(__file__).parents[1] / "setup.cfg").read_text())
    counts, output = outcomes(
        pytester,
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
