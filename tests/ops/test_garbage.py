"""When the collector looks at everything, by a turned clock and figures that are given."""

from __future__ import annotations

import subprocess
import sys

import pytest
from twisted.internet.task import Clock

from llmproxy.ops import garbage
from llmproxy.ops.garbage import Garbage


class Collector:
    """Stands for the module ``gc``; notes what it is asked for."""

    def __init__(self) -> None:
        self.calls: list[str] = []

    def __getattr__(self, name: str) -> object:
        return lambda: self.calls.append(name)

    def take(self) -> list[str]:
        """Return what it was asked for since the last time."""
        taken, self.calls = self.calls, []
        return taken


FULL = ["unfreeze", "collect", "freeze"]


class Process:
    """A process with so many requests and blocks of memory."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.collector = Collector()
        monkeypatch.setattr(garbage, "gc", self.collector)
        self.clock = Clock()
        self.running, self.blocks = 0, 300_000
        self.garbage = Garbage(self.clock, lambda: self.running, lambda: self.blocks)

    def look(self) -> list[str]:
        """Let a second pass."""
        self.clock.advance(1)
        return self.collector.take()


@pytest.fixture
def process(monkeypatch: pytest.MonkeyPatch) -> Process:
    """A process that has just started."""
    made = Process(monkeypatch)
    made.garbage.start()
    return made


def test_it_looks_at_all_at_the_start(process: Process) -> None:
    """It does not run by itself any more."""
    assert process.collector.take() == ["disable", *FULL]


def test_what_lives_is_put_aside_each_second(process: Process) -> None:
    """Also while much is made: a stream that begins holds no other one up."""
    process.collector.take()
    process.running = 5000
    for _ in range(10):
        process.blocks += 150_000
        assert process.look() == ["freeze"]


@pytest.mark.parametrize(("running", "looks"), [(0, True), (8, True), (9, False), (5000, False)])
def test_it_looks_when_it_is_quiet_and_memory_has_grown(
    process: Process, running: int, looks: bool
) -> None:
    """Few streams would be held up by that."""
    process.collector.take()
    process.running, process.blocks = running, process.blocks + 100_001
    assert process.look() == (FULL if looks else ["freeze"])


def test_it_does_not_look_again_for_what_stays(process: Process) -> None:
    """What was there at the last look is no reason for another."""
    process.blocks += 100_001
    process.look()
    assert process.look() == ["freeze"]
    process.blocks += 100_000
    assert process.look() == ["freeze"]
    process.blocks += 1
    assert process.look() == FULL


def test_it_looks_in_any_case_when_memory_has_grown_by_much(process: Process) -> None:
    """By two million blocks, and at least to the double of what it was."""
    process.collector.take()
    process.running = 5000
    process.blocks = 2_300_000
    assert process.look() == ["freeze"]
    process.blocks += 1
    assert process.look() == FULL
    process.blocks = 2 * 2_300_001
    assert process.look() == ["freeze"]
    process.blocks += 2
    assert process.look() == FULL


def test_when_it_stops_the_collector_is_on_again(process: Process) -> None:
    """Nothing is left to be called; to stop once more, or without a start, is harmless."""
    process.collector.take()
    process.garbage.stop()
    process.garbage.stop()
    assert process.collector.take() == ["enable"]
    assert not process.clock.getDelayedCalls()
    Garbage(process.clock, lambda: 0).stop()
    assert process.collector.take() == []


def test_cycles_of_objects_that_were_put_aside_are_freed() -> None:
    """With CPython's own collector and counts, in a process of its own."""
    script = """
import gc, weakref
from twisted.internet.task import Clock
from llmproxy.ops.garbage import Garbage

class Node:
    pass

clock = Clock()
Garbage(clock, lambda: 0).start()
assert not gc.isenabled() and gc.get_freeze_count() > 10_000
node = Node()
node.itself, node.much = node, [[n] for n in range(200_000)]
gone = weakref.ref(node)
gc.freeze()
del node
assert gone() is not None
clock.advance(1)
assert gone() is None
"""
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=60
    )
    assert (done.returncode, done.stderr) == (0, "")
