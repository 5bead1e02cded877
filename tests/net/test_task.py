"""A coroutine runs to its end, waits for Deferreds, and can be cancelled where it waits."""

from __future__ import annotations

from typing import Any

from twisted.internet.defer import CancelledError, Deferred, fail, succeed
from twisted.python.failure import Failure

from llmproxy.net.task import Task


class Told:
    """What a coroutine did, and how it failed."""

    def __init__(self) -> None:
        self.steps: list[Any] = []
        self.failures: list[Failure] = []

    def run(self, *waits: Deferred[Any]) -> Task:
        """Await each in turn; what comes out of it is a step."""

        async def story() -> None:
            for wait in waits:
                try:
                    self.steps.append(await wait)
                except Exception as error:
                    self.steps.append(error)
            self.steps.append("end")

        return Task(story(), self.failures.append)


def test_it_runs_to_its_first_wait_at_once() -> None:
    """What is there already is not waited for, failures included."""
    told, error, later = Told(), ValueError(), Deferred[int]()
    told.run(succeed(1), fail(error), later)
    assert told.steps == [1, error]
    later.callback(2)
    assert told.steps == [1, error, 2, "end"]
    assert not told.failures


def test_it_goes_on_with_what_was_waited_for() -> None:
    """A result is the value of the wait, a failure is raised in it."""
    told, first, second = Told(), Deferred[str](), Deferred[str]()
    told.run(first, second)
    first.callback("one")
    error = KeyError("two")
    second.errback(error)
    assert told.steps == ["one", error, "end"]


def test_cancelling_fails_what_is_waited_for() -> None:
    """The coroutine sees the failure, and goes on."""
    told, cancelled = Told(), list[object]()
    task = told.run(Deferred(cancelled.append))
    task.cancel()
    assert len(cancelled) == 1
    assert isinstance(told.steps[0], CancelledError)
    assert told.steps[1] == "end"
    task.cancel()  # nothing is waited for any more


def test_a_coroutine_that_fails_is_told() -> None:
    """Its exception comes out as a failure, before or behind a wait, and nothing is raised."""
    failures: list[Failure] = []
    error, later = RuntimeError(), Deferred[None]()

    async def wrong(wait: Deferred[None]) -> None:
        await wait
        raise error

    Task(wrong(succeed(None)), failures.append)
    Task(wrong(later), failures.append)
    assert len(failures) == 1
    later.callback(None)
    assert [failure.value for failure in failures] == [error, error]
