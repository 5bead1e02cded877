"""The queue and its thread: nothing waits for an output, and every loss is counted once."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from math import inf
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec import UNSET

from llmproxy.record.sink_queue import Dropped, Retry
from llmproxy.record.trace import Trace
from llmproxy.record.writer import Writer
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
        self.done.append("chore")
        return self.rest_s

    def reopen(self) -> None:
        self.done.append("reopen")

    def close(self) -> None:
        self.done.append("close")


def fail(_: list[Trace]) -> None:
    """Take nothing."""
    raise OSError("no")


def busy(_: list[Trace]) -> None:
    """Take nothing for a moment."""
    raise Retry("locked", again_s=0.001)


@contextmanager
def writing(*shelves: Shelf, **settings: Any) -> Iterator[Writer]:
    """Run a writer, and let it end."""
    settings = {"clock": time.monotonic, "gather_s": 0.0, **settings}
    writer = Writer(shelves, **settings)
    yield writer
    end(writer)


def end(writer: Writer, seconds: float = WAIT) -> None:
    """End a writer."""
    writer.finish()
    writer.join(seconds)


def test_traces_are_kept_in_order() -> None:
    """Each once, in every output, in batches that are bounded."""
    one, two = Shelf("one"), Shelf("two")
    with writing(one, two, batch=10) as writer:
        for number in range(1000):
            writer.write(trace(number))
    assert one.ids == two.ids == list(range(1000))
    assert max(one.batches) <= 10
    assert writer.losses() == {"one": 0, "two": 0}
    assert one.done == ["chore", "close"]


def test_a_trace_is_kept_soon() -> None:
    """Nobody has to end the writer for a trace to be kept."""
    shelf = Shelf()
    with writing(shelf) as writer:
        for number in range(3):
            writer.write(trace(number))
            eventually(lambda number=number: shelf.ids[-1:] == [number])  # type: ignore[misc]  # the lambda's default


def test_a_full_queue_loses_at_once_and_for_every_output() -> None:
    """Who writes never waits; what found no room is counted for each output, the rest is kept."""
    shelf, other = Shelf(), Shelf("other")
    stuck, go_on = threading.Event(), threading.Event()

    def hang(_: list[Trace]) -> None:
        stuck.set()
        assert go_on.wait(WAIT)

    shelf.fault = hang
    with writing(shelf, other, queue=10) as writer:
        writer.write(trace(0))
        assert stuck.wait(WAIT)
        began = time.monotonic()
        for number in range(1, 100):
            writer.write(trace(number))
        assert time.monotonic() - began < 1
        assert writer.losses() == {"shelf": 89, "other": 89}
        go_on.set()
    assert shelf.ids == other.ids == list(range(11))
    assert writer.losses() == {"shelf": 89, "other": 89}


def test_an_output_that_fails_costs_no_other_one(logged: list[str]) -> None:
    """Its losses are counted and told once; it is tried again with each batch, and told again."""
    shelf, other = Shelf(), Shelf("other")
    shelf.fault = fail
    with writing(shelf, other) as writer:
        for number in range(3):
            writer.write(trace(number))
            eventually(lambda number=number: len(other.ids) == number + 1)  # type: ignore[misc]  # the lambda's default
        shelf.fault = lambda _: None
        writer.write(trace(3))
    assert (shelf.ids, other.ids) == ([3], [0, 1, 2, 3])
    assert writer.losses() == {"shelf": 3, "other": 0}
    assert [line for line in logged if "being lost" in line] == [
        "shelf: records are being lost: no"
    ]
    assert "shelf: records are kept again, 3 were lost so far" in logged


def test_a_part_that_is_lost_is_counted_alone() -> None:
    """An output that kept most of a batch loses the rest only."""
    shelf = Shelf()

    def keep_all_but_one(traces: list[Trace]) -> None:
        shelf.ids += [int(one.id) for one in traces[1:]]
        raise Dropped(1, "one too many")

    shelf.fault = keep_all_but_one
    with writing(shelf, gather_s=WAIT) as writer:
        for number in range(5):
            writer.write(trace(number))
    assert shelf.ids == [1, 2, 3, 4]
    assert writer.losses() == {"shelf": 1}


def test_what_is_busy_for_a_moment_loses_nothing() -> None:
    """Traces wait for it, in order, while the other outputs have them already."""
    shelf, other = Shelf(), Shelf("other")
    shelf.fault = busy
    with writing(shelf, other) as writer:
        for number in range(50):
            writer.write(trace(number))
        eventually(lambda: len(other.ids) == 50)
        assert (shelf.ids, writer.losses()["shelf"]) == ([], 0)
        shelf.fault = lambda _: None
        eventually(lambda: len(shelf.ids) == 50)  # nothing new had to come for that
    assert shelf.ids == other.ids == list(range(50))


def test_what_is_busy_for_longer_loses_what_waits() -> None:
    """Once its patience is over the traces are lost, and those after it, until it has time."""
    shelf = Shelf(patience_s=0.05)
    shelf.fault = busy
    with writing(shelf) as writer:
        for number in range(2):
            writer.write(trace(number))
            eventually(lambda number=number: writer.losses() == {"shelf": number + 1})  # type: ignore[misc]  # the lambda's default
        shelf.fault = lambda _: None
        writer.write(trace(2))
        eventually(lambda: shelf.ids == [2])
        shelf.fault = busy  # and the patience begins anew
        writer.write(trace(3))
        threading.Event().wait(0.01)
        shelf.fault = lambda _: None
    assert shelf.ids == [2, 3]
    assert writer.losses() == {"shelf": 2}


def test_what_waits_for_a_busy_output_is_bounded() -> None:
    """Memory does not grow with its patience."""
    shelf, other = Shelf(), Shelf("other")
    shelf.fault = busy
    with writing(shelf, other, queue=20) as writer:
        for number in range(100):
            writer.write(trace(number))
            eventually(lambda number=number: len(other.ids) == number + 1)  # type: ignore[misc]  # the lambda's default
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
        for number in range(count):
            writer.write(trace(number))
    assert shelf.ids == sorted(set(shelf.ids))
    assert len(shelf.ids) + writer.losses()["shelf"] == count


def test_content_is_given_to_those_who_keep_it() -> None:
    """Nobody else holds it, not even in the queue."""
    one, two = Shelf("one"), Shelf("two")
    two.keeps_content = False
    with writing(one, two) as writer:
        writer.write(trace(0, text="text", tool_calls=[]))
    assert (one.texts, two.texts) == (["text"], [UNSET])
    with writing(two) as writer:
        writer.write(trace(1, text="text"))
    assert two.texts == [UNSET, UNSET]


def test_content_that_waits_is_bounded() -> None:
    """Beyond that a record is kept without it, and says so; what was written makes room."""
    shelf = Shelf()
    stuck, go_on = threading.Event(), threading.Event()
    degraded: list[list[str]] = []

    def hang(traces: list[Trace]) -> None:
        stuck.set()
        assert go_on.wait(WAIT)
        degraded.extend(one.degraded for one in traces)

    shelf.fault = hang
    with writing(shelf, content=100) as writer:
        for number, size in enumerate((60, 41, 30, 10, 1)):
            call = SimpleNamespace(arguments="x" * 10)
            writer.write(trace(number, text="x" * (size - 10), tool_calls=[call]))
            assert stuck.wait(WAIT)
        go_on.set()
        eventually(lambda: len(shelf.ids) == 5)
        writer.write(trace(5))  # once it is written, what was written before it has made room
        eventually(lambda: len(shelf.ids) == 6)
        writer.write(trace(6, text="x" * 100))
    assert [one if one is UNSET else len(str(one)) for one in shelf.texts] == [
        50,
        UNSET,
        20,
        0,
        UNSET,
        UNSET,
        100,
    ]
    assert degraded == [[], ["content"], [], [], ["content"], [], []]


def test_a_large_content_ends_a_batch() -> None:
    """While it is encoded the streams wait."""
    shelf = Shelf()
    with writing(shelf, gather_s=WAIT) as writer:
        for number in range(4):
            writer.write(trace(number, text="x" * (600 * 1024)))
    assert shelf.batches == [2, 2]


def test_reopening_reaches_every_output_without_a_trace() -> None:
    """It is asked of the thread, and does not wait for the next record."""
    one, two = Shelf(), Shelf("two")

    def refuse() -> None:
        raise OSError("no")

    one.reopen = refuse  # type: ignore[method-assign]  # a fault
    with writing(one, two) as writer:
        writer.reopen()
        eventually(lambda: "reopen" in two.done)
        writer.write(trace(1))
    assert one.ids == two.ids == [1]


def test_chores_are_done_at_their_time_without_a_trace() -> None:
    """An output says itself when it wants the next; one that fails costs nothing else."""
    shelf, other = Shelf(), Shelf("other")
    shelf.rest_s = 0.001

    def refuse() -> float:
        raise OSError("no")

    other.maintenance = refuse  # type: ignore[method-assign]  # a fault
    with writing(shelf, other) as writer:
        eventually(lambda: shelf.done.count("chore") > 3)
        writer.write(trace(1))
    assert shelf.ids == other.ids == [1]


def test_the_end_writes_what_waits(logged: list[str]) -> None:
    """Without waiting for more, and with another try at what is busy."""
    shelf = Shelf()
    tries: list[int] = []

    def busy_at_first(traces: list[Trace]) -> None:
        tries.append(len(traces))
        if len(tries) < 5:
            raise Retry("locked", again_s=0.001)

    shelf.fault = busy_at_first
    began = time.monotonic()
    with writing(shelf, gather_s=WAIT) as writer:
        for number in range(3):
            writer.write(trace(number))
    assert time.monotonic() - began < WAIT
    assert shelf.ids == [0, 1, 2]
    assert not [line for line in logged if "lost" in line]


def test_the_end_does_not_wait_for_ever(logged: list[str]) -> None:
    """What is in the hands of an output that hangs, and what waits, is counted, and told."""
    shelf = Shelf()
    stuck, go_on = threading.Event(), threading.Event()

    def hang(_: list[Trace]) -> None:
        stuck.set()
        go_on.wait(WAIT)
        raise OSError("too late to be counted a second time")

    shelf.fault = hang
    writer = Writer([shelf], clock=time.monotonic, gather_s=0.0)
    writer.write(trace(0))
    assert stuck.wait(WAIT)
    for number in (1, 2):
        writer.write(trace(number))
    end(writer, 0.01)
    assert writer.losses() == {"shelf": 3}
    assert "shelf: 3 records could not be written before the end" in logged
    go_on.set()
    eventually(lambda: writer.ended)
    assert writer.losses() == {"shelf": 3}


def test_what_comes_after_the_end_is_counted() -> None:
    """It is not queued for nobody."""
    shelf = Shelf()
    with writing(shelf) as writer:
        writer.write(trace(0))
    writer.write(trace(1))
    assert shelf.ids == [0]
    assert writer.losses() == {"shelf": 1}


def test_an_output_that_does_not_close_is_told(logged: list[str]) -> None:
    """The thread ends all the same."""
    shelf, other = Shelf(), Shelf("other")

    def refuse() -> None:
        raise OSError("no")

    shelf.close = refuse  # type: ignore[method-assign]  # a fault
    with writing(shelf, other):
        pass
    assert other.done[-1] == "close"
    assert "shelf did not close: no" in logged


@pytest.mark.parametrize("error", [ValueError(), OSError("why")])
def test_a_loss_has_a_reason(error: Exception, logged: list[str]) -> None:
    """In the error's words, or by its name where it has none."""
    shelf = Shelf()

    def break_down(_: list[Trace]) -> None:
        raise error

    shelf.fault = break_down
    with writing(shelf) as writer:
        writer.write(trace(0))
    assert f"shelf: records are being lost: {str(error) or 'ValueError'}" in logged
