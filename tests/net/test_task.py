"""A task: a coroutine that waits for Deferreds, and can be cancelled where it waits."""

from __future__ import annotations

from typing import Any

from twisted.internet.defer import CancelledError, Deferred, fail, succeed
from twisted.python.failure import Failure

from llmproxy.net.task import Task


class Recorded:
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


def test_a_task_runs_to_its_first_wait_at_once() -> None:
    """It does not wait for results and failures that are there."""
    recorded, error, later = Recorded(), ValueError(), Deferred[int]()
    recorded.run(succeed(1), fail(error), later)
    assert recorded.steps == [1, error]
    later.callback(2)
    assert recorded.steps == [1, error, 2, "end"]
    assert not recorded.failures


def test_a_task_goes_on_with_the_result() -> None:
    """A result is the value of the wait; a failure is raised there."""
    recorded, first, second = Recorded(), Deferred[str](), Deferred[str]()
    recorded.run(first, second)
    first.callback("one")
    error = KeyError("two")
    second.errback(error)
    assert recorded.steps == ["one", error, "end"]


def test_cancelling_fails_the_wait() -> None:
    """The coroutine gets the failure, and goes on."""
    recorded, cancelled = Recorded(), list[object]()
    task = recorded.run(Deferred(cancelled.append))
    task.cancel()
    assert len(cancelled) == 1
    assert isinstance(recorded.steps[0], CancelledError)
    assert recorded.steps[1] == "end"
    task.cancel()  # nothing is waited for any more


def test_an_exception_of_a_task_is_reported() -> None:
    """Before or behind a wait, its exception comes out as a failure, and is not raised."""
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
