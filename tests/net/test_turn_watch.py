"""The watch over the reactor's turns names what makes them long, and is nowhere if it is off."""

from __future__ import annotations

import gc
import socket
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from twisted.internet.epollreactor import EPollReactor
from twisted.internet.task import Clock, LoopingCall

from llmproxy.net.loop import tune
from llmproxy.net.timers import Timers
from llmproxy.net.turn_watch import TurnWatch
from tests.net.test_loop import MakeSocket, Socket, make_socket
from tests.support.sockets import WAIT

__all__ = ["make_socket"]


class Watched:
    """A watch whose time is turned by what it times.

    Attributes:
        turns: the seconds of all turns so far.
    """

    def __init__(self) -> None:
        self.clock, self.cpu = Clock(), Clock()
        self.turns: list[float] = []
        self.watch = TurnWatch(self.clock.seconds, self.cpu.seconds, self.turns.append)

    def work(self, ms: float, waits: float = 0.0) -> None:
        """Let time pass: all of it on a processor, but for what is waited."""
        self.clock.advance((ms + waits) / 1000)
        self.cpu.advance(ms / 1000)

    def rows(self) -> dict[str, dict[str, Any]]:
        """Return what is known of calls, by name."""
        return {row.pop("name"): row for row in self.watch.rows()["calls"]}


@pytest.fixture
def watched() -> Iterator[Watched]:
    """A watch that times nothing more behind the test."""
    made = Watched()
    yield made
    made.watch.stop()


@pytest.fixture
def loop(watched: Watched) -> Iterator[Any]:
    """A tuned reactor that is watched, and is not the process's."""
    made: Any = EPollReactor()
    undo = tune(made, watched.watch)
    late = made.callLater(WAIT, made.stop)
    yield made
    undo()
    assert not {"doIteration", "runUntilCurrent", "_insertNewDelayedCalls"} & vars(made).keys()
    if late.active():
        late.cancel()
    else:
        pytest.fail("the loop had to be stopped")
    made.removeAll()
    for fd in (made.waker.i, made.waker.o):
        socket.close(fd)
    made._poller.close()


def _run(loop: Any) -> None:
    loop.run(installSignalHandlers=False)


def test_a_long_read_is_named(watched: Watched, loop: Any, make_socket: MakeSocket) -> None:
    """By the protocol that reads; the turn is as long as all that it calls."""

    class Slow:
        """Has a name."""

    def then(one: Socket) -> None:
        watched.work(5, waits=2)
        loop.stop()

    one: Any = make_socket(then)
    one.protocol = Slow()
    _run(loop)
    row = watched.rows()["Slow doRead"]
    assert row == {"count": 1, "ms": 7.0, "slow": 1, "longest_ms": 7.0, "waited_ms": 2.0}
    assert max(watched.turns) == pytest.approx(0.007)
    (longest, *_) = watched.watch.rows()["longest"]
    assert longest["ms"] == 7.0
    assert longest["calls"][0] == {"name": "Slow doRead", "ms": 7.0}


def test_a_short_read_is_counted_and_not_slow(
    watched: Watched, loop: Any, make_socket: MakeSocket
) -> None:
    """So shares of all time can be seen, too."""

    def then(one: Socket) -> None:
        watched.work(0.25)
        loop.stop()

    make_socket(then)
    _run(loop)
    row = watched.rows()["Socket doRead"]
    assert row == {"count": 1, "ms": 0.25, "slow": 0, "longest_ms": 0.0, "waited_ms": 0.0}
    assert watched.watch.rows()["longest"] == []


def test_ends_and_writes_are_named(watched: Watched, loop: Any, make_socket: MakeSocket) -> None:
    """A write that says that the socket is lost, and the report of that."""

    def write() -> Any:
        watched.work(2)
        return OSError("why")

    def lost(reason: Any) -> None:
        watched.work(3)
        loop.stop()

    one: Any = make_socket(lambda _: None, readable=False)
    one.doWrite, one.connectionLost = write, lost
    one.startWriting()
    _run(loop)
    rows = watched.rows()
    assert (rows["Socket doWrite"]["ms"], rows["Socket is lost"]["ms"]) == (2.0, 3.0)


def test_a_socket_that_is_read_and_written_at_once_is_named(
    watched: Watched, loop: Any, make_socket: MakeSocket, logged_failures: Any
) -> None:
    """Twisted's own way calls both."""

    def then(one: Socket) -> None:
        watched.work(2)

    def write() -> None:
        watched.work(1)
        loop.stop()

    one: Any = make_socket(then)
    one.doWrite = write
    one.startWriting()
    _run(loop)
    assert watched.rows()["Socket doReadOrWrite"]["ms"] == 3.0
    assert logged_failures.report() == ""


def test_timers_and_calls_of_threads_are_named(watched: Watched, loop: Any) -> None:
    """A timer that is set by another one, a looping call, and a call of a thread."""

    def last() -> None:
        watched.work(4)
        again.start(0, now=False)

    def first() -> None:
        watched.work(2)
        loop.callLater(0, last)

    def of_a_thread() -> None:
        watched.work(1.5)
        loop.callLater(0, first)

    def looping() -> None:
        watched.work(1)
        again.stop()
        loop.stop()

    again = LoopingCall(looping)
    again.clock = loop
    thread = threading.Thread(target=loop.callFromThread, args=(of_a_thread,))
    loop.callWhenRunning(thread.start)
    _run(loop)
    thread.join(WAIT)
    seen = {name.replace(".<locals>", ""): row["ms"] for name, row in watched.rows().items()}
    test = "test_timers_and_calls_of_threads_are_named"
    assert seen[f"timer {test}.first"] == 2.0
    assert seen[f"timer {test}.last"] == 4.0
    assert seen[f"timer {test}.looping"] == 1.0
    assert seen[f"thread {test}.of_a_thread"] == 1.5


def test_a_call_within_a_call_has_its_own_time(watched: Watched) -> None:
    """What is inside of it does not count twice, also when it fails."""

    def inner() -> None:
        watched.work(3)
        raise LookupError

    def outer() -> None:
        watched.work(1)
        with pytest.raises(LookupError):
            watched.watch.call(lambda: "inner", inner)
        watched.work(1)

    watched.watch.call(lambda: "outer", outer)
    rows = watched.rows()
    assert (rows["inner"]["ms"], rows["outer"]["ms"]) == (3.0, 2.0)


def test_a_collection_is_not_the_time_of_the_call_that_it_interrupts(watched: Watched) -> None:
    """It is named with its generation."""

    def collecting(phase: str, info: dict[str, int]) -> None:
        if phase == "start":
            watched.work(30)

    def read() -> None:
        watched.work(1)
        gc.collect(1)

    watched.watch.start()
    gc.callbacks.append(collecting)  # behind the watch's
    try:
        watched.watch.call(lambda: "a read", read)
    finally:
        gc.callbacks.remove(collecting)
    rows = watched.rows()
    assert rows["a read"]["ms"] == 1.0
    assert rows["garbage collector, generation 1"]["ms"] == 30.0


def test_what_the_collector_frees_is_counted(watched: Watched) -> None:
    """A process that leaves no cycles behind has nothing to collect."""
    gc.collect()
    watched.watch.start()
    circle: list[Any] = []
    circle.append(circle)
    del circle
    gc.collect()
    assert watched.watch.rows()["collected"] >= 1


def test_parts_are_named_until_it_stops(watched: Watched) -> None:
    """Of one class, and of one that has a method from another class."""

    class Base:
        def work(self, ms: float) -> float:
            watched.work(ms)
            return ms

    class Part(Base):
        pass

    before = Base.work
    watched.watch.part(Part, "work", "a part")
    assert Part().work(2) == 2
    Base().work(1)
    watched.watch.stop()
    assert Part.work is before
    assert "work" not in vars(Part)
    Part().work(1)
    assert watched.rows()["a part"]["ms"] == 2.0


def test_a_part_in_another_thread_is_not_timed(watched: Watched) -> None:
    """Only the reactor's thread holds turns up by what it calls."""

    class Part:
        def work(self) -> None:
            watched.work(1)

    watched.watch.part(Part, "work", "a part")
    thread = threading.Thread(target=Part().work)
    thread.start()
    thread.join(WAIT)
    assert "a part" not in watched.rows()


def test_timers_in_queues_are_named(watched: Watched) -> None:
    """By what they call, not by the queue."""

    def ring() -> None:
        watched.work(2)

    watched.watch.later(Timers, "callLater")
    reactor = Clock()
    Timers(reactor).callLater(1.0, ring)
    reactor.advance(1.0)
    (name,) = watched.rows()
    assert name.startswith("timer ")
    assert name.endswith(".ring")


def test_only_the_longest_turns_and_the_first_names_are_kept(watched: Watched) -> None:
    """It holds little, however long it runs."""
    poll: Callable[..., list[Any]] = lambda timeout, most: []  # noqa: E731 - it stands for a poll
    for number in range(1000):
        watched.watch.poll(poll, 0, 1)
        watched.watch.call(lambda: f"call {number}", watched.work, number)  # noqa: B023 - called at once
    watched.watch.turn_ended()
    found = watched.watch.rows()
    assert [turn["ms"] for turn in found["longest"]] == [999.0 - n for n in range(32)]
    assert len(found["calls"]) == 501
    assert watched.rows()["others"]["count"] == 500
    assert len(watched.turns) == 1000
