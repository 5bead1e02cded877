"""The queue and its thread: no request waits for an output, and each loss is counted once."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from math import inf
from types import SimpleNamespace
from typing import Any

from hypothesis import given
from hypothesis import strategies as st
from msgspec import UNSET

from llmproxy.record.sink_queue import Dropped, Retry
from llmproxy.record.trace import Trace
from llmproxy.record.writer import Writer
from tests.record.conftest import write
from tests.support.records import eventually, trace
from tests.support.sockets import WAIT


class Shelf:
    """An output that keeps traces in memory, or does what ``fault`` does."""

    def __init__(self, name: str = "shelf", *, patience_s: float = inf) -> None:
        self.name = name
        self.patience_s = patience_s
        self.keeps_content = True
        self.texts: list[object] = []
        self.ids: list[int] = []
        self.batches: list[int] = []
        self.done: list[str] = []
        self.fault: Callable[[list[Trace]], None] = lambda _: None
        self.rest_s = inf

    def put(self, traces: list[Trace]) -> None:
        self.fault(traces)
        self.batches.append(len(traces))
        self.ids += [int(one.id) for one in traces]
        self.texts += [one.text for one in traces]

    def maintenance(self) -> float:
        self.done.append("maintenance")
        return self.rest_s

    def reopen(self) -> None:
        self.done.append("reopen")

    def close(self) -> None:
        self.done.append("close")


def fail(*_: object) -> Any:
    """Take nothing."""
    raise OSError("no")


def busy(_: list[Trace]) -> None:
    """Take nothing for a moment."""
    raise Retry("locked", again_s=0.001)


class Hang:
    """A fault that hangs until the test lets it go on."""

    def __init__(self) -> None:
        self.stuck, self.go_on = threading.Event(), threading.Event()

    def __call__(self, _: list[Trace]) -> None:
        self.stuck.set()
        assert self.go_on.wait(WAIT)


@contextmanager
def writing(*shelves: Shelf, **settings: Any) -> Iterator[Writer]:
    """Run a writer, and finish it."""
    settings = {"clock": time.monotonic, "gather_s": 0.0, **settings}
    writer = Writer(shelves, **settings)
    yield writer
    writer.finish()
    writer.join(WAIT)


def write_each(writer: Writer, numbers: range, kept: Callable[[], object]) -> None:
    """Write traces, each once ``kept`` has the number of the traces before it."""
    for count, number in enumerate(numbers, 1):
        writer.write(trace(number))
        eventually(lambda: kept() == count)  # noqa: B023 - called in this round only


def test_traces_are_kept_in_order() -> None:
    """Every output gets each trace once, in batches that are bounded."""
    one, two = Shelf("one"), Shelf("two")
    with writing(one, two, batch=10) as writer:
        write(writer, range(1000))
    assert one.ids == two.ids == list(range(1000))
    assert max(one.batches) <= 10
    assert writer.losses() == {"one": 0, "two": 0}
    assert one.done == ["maintenance", "close"]


def test_a_full_queue_drops_at_once_for_every_output() -> None:
    """A write never waits; each output counts the dropped traces and keeps the others."""
    shelf, other = Shelf(), Shelf("other")
    shelf.fault = hang = Hang()
    with writing(shelf, other, queue=10) as writer:
        writer.write(trace(0))
        assert hang.stuck.wait(WAIT)
        began = time.monotonic()
        write(writer, range(1, 100))
        assert time.monotonic() - began < 1
        assert writer.losses() == {"shelf": 89, "other": 89}
        hang.go_on.set()
    assert shelf.ids == other.ids == list(range(11))
    assert writer.losses() == {"shelf": 89, "other": 89}


def test_an_output_that_fails_costs_no_other_one(logged: list[str]) -> None:
    """Its losses are counted and logged once; each batch is another try, and success is logged."""
    shelf, other = Shelf(), Shelf("other")
    shelf.fault = fail
    with writing(shelf, other) as writer:
        write_each(writer, range(3), lambda: len(other.ids))
        shelf.fault = lambda _: None
        writer.write(trace(3))
    assert (shelf.ids, other.ids) == ([3], [0, 1, 2, 3])
    assert writer.losses() == {"shelf": 3, "other": 0}
    assert [line for line in logged if "being lost" in line] == [
        "shelf: records are being lost: no"
    ]
    assert "shelf: records are kept again, 3 were lost so far" in logged


def test_a_short_retry_loses_nothing() -> None:
    """The traces wait in order, while the other outputs have them already."""
    shelf, other = Shelf(), Shelf("other")
    shelf.fault = busy
    with writing(shelf, other) as writer:
        write(writer, range(50))
        eventually(lambda: len(other.ids) == 50)
        assert (shelf.ids, writer.losses()["shelf"]) == ([], 0)
        shelf.fault = lambda _: None
        eventually(lambda: len(shelf.ids) == 50)  # nothing new had to come for that
    assert shelf.ids == other.ids == list(range(50))


def test_a_long_retry_loses_the_traces_that_wait() -> None:
    """After its patience an output loses each trace, until it takes one; then patience restarts."""
    shelf = Shelf(patience_s=0.05)
    shelf.fault = busy
    with writing(shelf) as writer:
        write_each(writer, range(2), lambda: writer.losses()["shelf"])
        shelf.fault = lambda _: None
        writer.write(trace(2))
        eventually(lambda: shelf.ids == [2])
        shelf.fault = busy  # and the patience begins anew
        writer.write(trace(3))
        threading.Event().wait(0.01)
        shelf.fault = lambda _: None
    assert shelf.ids == [2, 3]
    assert writer.losses() == {"shelf": 2}


def test_a_retry_holds_a_bounded_number_of_traces() -> None:
    """Memory does not grow with the patience of an output."""
    shelf, other = Shelf(), Shelf("other")
    shelf.fault = busy
    with writing(shelf, other, queue=20) as writer:
        write_each(writer, range(100), lambda: len(other.ids))
        assert writer.losses() == {"shelf": 80, "other": 0}
        shelf.fault = lambda _: None
    assert shelf.ids == list(range(20))


@given(
    st.lists(st.sampled_from(["keep", "fail", "part", "busy"]), max_size=20),
    st.integers(1, 60),
    st.integers(1, 7),
)
def test_kept_and_lost_are_all(faults: list[str], count: int, batch: int) -> None:
    """Whatever an output does, each trace is kept once or counted as lost once."""
    shelf = Shelf(patience_s=0.0)

    def play(traces: list[Trace]) -> None:
        fault = faults.pop() if faults else "keep"
        if fault == "fail":
            raise OSError("no")
        if fault == "busy":
            raise Retry("no", again_s=0.0)
        if fault == "part":
            shelf.ids += [int(one.id) for one in traces[1:]]
            raise Dropped(1, "one")

    shelf.fault = play
    with writing(shelf, batch=batch) as writer:
        write(writer, range(count))
    assert shelf.ids == sorted(set(shelf.ids))
    assert len(shelf.ids) + writer.losses()["shelf"] == count


def test_content_goes_only_to_the_outputs_that_keep_it() -> None:
    """If no output keeps content, the queue does not hold it either."""
    one, two = Shelf("one"), Shelf("two")
    two.keeps_content = False
    with writing(one, two) as writer:
        writer.write(trace(0, text="text", tool_calls=[]))
    assert (one.texts, two.texts) == (["text"], [UNSET])
    with writing(two) as writer:
        writer.write(trace(1, text="text"))
    assert two.texts == [UNSET, UNSET]


def test_content_that_waits_is_bounded() -> None:
    """Beyond the bound a record is kept without content, and says so; a written one makes room."""
    shelf = Shelf()
    hang = Hang()
    degraded: list[list[str]] = []

    def hang_and_note(traces: list[Trace]) -> None:
        hang(traces)
        degraded.extend(one.degraded for one in traces)

    shelf.fault = hang_and_note
    with writing(shelf, content=100) as writer:
        for number, size in enumerate((60, 41, 30, 10, 1)):
            call = SimpleNamespace(arguments="x" * 10)
            writer.write(trace(number, text="x" * (size - 10), tool_calls=[call]))
            assert hang.stuck.wait(WAIT)
        hang.go_on.set()
        eventually(lambda: len(shelf.ids) == 5)
        writer.write(trace(5))  # once it is written, what was written before it has made room
        eventually(lambda: len(shelf.ids) == 6)
        writer.write(trace(6, text="x" * 100))
    sizes = [None if one is UNSET else len(str(one)) for one in shelf.texts]
    assert sizes == [50, None, 20, 0, None, None, 100]
    assert degraded == [[], ["content"], [], [], ["content"], [], []]


def test_a_large_content_ends_a_batch() -> None:
    """The reactor waits while a batch is encoded, so a batch is short."""
    shelf = Shelf()
    with writing(shelf, gather_s=WAIT) as writer:
        for number in range(4):
            writer.write(trace(number, text="x" * (600 * 1024)))
    assert shelf.batches == [2, 2]


def test_every_output_is_reopened_without_a_trace() -> None:
    """The thread does not wait for the next record; one failure does not stop the others."""
    one, two = Shelf(), Shelf("two")
    one.reopen = fail  # type: ignore[method-assign]  # a fault
    with writing(one, two) as writer:
        writer.reopen()
        eventually(lambda: "reopen" in two.done)
        writer.write(trace(1))
    assert one.ids == two.ids == [1]


def test_maintenance_is_done_in_time_without_a_trace() -> None:
    """Each output says when the next one is due; a failure costs nothing else."""
    shelf, other = Shelf(), Shelf("other")
    shelf.rest_s = 0.001
    other.maintenance = fail  # type: ignore[method-assign]  # a fault
    with writing(shelf, other) as writer:
        eventually(lambda: shelf.done.count("maintenance") > 3)
        writer.write(trace(1))
    assert shelf.ids == other.ids == [1]


def test_finishing_writes_the_traces_that_wait(logged: list[str]) -> None:
    """The writer does not wait for more traces, and it still retries."""
    shelf = Shelf()
    tries: list[int] = []

    def busy_at_first(traces: list[Trace]) -> None:
        tries.append(len(traces))
        if len(tries) < 5:
            raise Retry("locked", again_s=0.001)

    shelf.fault = busy_at_first
    began = time.monotonic()
    with writing(shelf, gather_s=WAIT) as writer:
        write(writer, range(3))
    assert time.monotonic() - began < WAIT
    assert shelf.ids == [0, 1, 2]
    assert not [line for line in logged if "lost" in line]


def test_joining_does_not_wait_for_ever(logged: list[str]) -> None:
    """The traces at a hanging output and in the queue are counted once, and logged."""
    shelf = Shelf()
    hang = Hang()

    def hang_and_fail(traces: list[Trace]) -> None:
        hang(traces)
        raise OSError("too late to be counted a second time")

    shelf.fault = hang_and_fail
    writer = Writer([shelf], clock=time.monotonic, gather_s=0.0)
    writer.write(trace(0))
    assert hang.stuck.wait(WAIT)
    write(writer, range(1, 3))
    writer.finish()
    writer.join(0.01)
    assert writer.losses() == {"shelf": 3}
    assert "shelf: 3 records could not be written before the end" in logged
    hang.go_on.set()
    eventually(lambda: writer.ended)
    assert writer.losses() == {"shelf": 3}


def test_a_trace_after_the_end_is_counted() -> None:
    """No thread would ever take it from the queue."""
    shelf = Shelf()
    with writing(shelf) as writer:
        writer.write(trace(0))
    writer.write(trace(1))
    assert shelf.ids == [0]
    assert writer.losses() == {"shelf": 1}


def test_an_output_that_does_not_close_is_logged(logged: list[str]) -> None:
    """The other outputs are closed, and the thread ends."""
    shelf, other = Shelf(), Shelf("other")
    shelf.close = fail  # type: ignore[method-assign]  # a fault
    with writing(shelf, other):
        pass
    assert other.done[-1] == "close"
    assert "shelf did not close: no" in logged


def test_a_loss_has_a_reason(logged: list[str]) -> None:
    """An error without words is logged by its name."""
    shelf = Shelf()

    def break_down(_: list[Trace]) -> None:
        raise ValueError

    shelf.fault = break_down
    with writing(shelf) as writer:
        writer.write(trace(0))
    assert "shelf: records are being lost: ValueError" in logged
