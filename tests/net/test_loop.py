"""The tuned loop keeps what a reactor promises.

Each test runs a reactor of its own, beside that of the tests; signals need a process of their own.
Those tests fail, too, when the private names change on which ``net/loop.py`` leans.
"""

from __future__ import annotations

import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from twisted.internet.abstract import FileDescriptor
from twisted.internet.epollreactor import EPollReactor
from twisted.internet.error import ConnectionDone, ConnectionLost
from twisted.internet.main import CONNECTION_DONE, CONNECTION_LOST
from twisted.internet.posixbase import _DisconnectSelectableMixin
from twisted.internet.task import Clock
from twisted.python import log
from twisted.python.failure import Failure

from llmproxy.net.loop import Lag, tune
from tests.support.sockets import WAIT

ROOT = Path(__file__).parents[2]


@pytest.fixture
def loop() -> Iterator[Any]:
    """A tuned reactor that is not the process's."""
    made: Any = EPollReactor()
    undo = tune(made)
    late = made.callLater(WAIT, made.stop)
    yield made
    undo()
    if late.active():
        late.cancel()
    else:
        pytest.fail("the loop had to be stopped")
    made.removeAll()
    for fd in (made.waker.i, made.waker.o):
        socket.close(fd)
    made._poller.close()


MakeSocket = Callable[..., "Socket"]


class Socket(FileDescriptor):
    """A socket that is read.

    Args:
        loop: the reactor.
        then: called at each read.

    Attributes:
        reads: how often there was something to read.
        lost: the reasons of its end.
    """

    def __init__(self, loop: Any, then: Callable[[Socket], Any]) -> None:
        super().__init__(loop)
        self.sock, self.other = socket.socketpair()
        self.sock.setblocking(False)
        self.fileno = self.sock.fileno  # type: ignore[method-assign]  # as Twisted's own do
        self.then = then
        self.reads = 0
        self.lost: list[Any] = []
        self.connected = 1
        self.startReading()

    def doRead(self) -> Any:
        self.sock.recv(65536)
        self.reads += 1
        return self.then(self)

    def connectionLost(self, reason: Failure) -> None:
        super().connectionLost(reason)
        self.lost.append(reason.value)

    def close(self) -> None:
        """Close both ends."""
        self.sock.close()
        self.other.close()


@pytest.fixture
def make_socket(loop: Any) -> Iterator[MakeSocket]:
    """Make sockets, which can be read at once unless the test says otherwise, and close them."""
    made: list[Socket] = []

    def make(then: Callable[[Socket], Any], readable: bool = True) -> Socket:
        made.append(Socket(loop, then))
        if readable:
            made[-1].other.send(b"go")
        return made[-1]

    yield make
    for one in made:
        one.stopReading()
        one.close()


def _send_again(sock: Socket) -> None:
    sock.other.send(b"again")


def _run(loop: Any) -> None:
    loop.run(installSignalHandlers=False)


def test_what_was_reported_of_a_closed_socket_is_not_taken_for_the_next_one(
    loop: Any, make_socket: MakeSocket
) -> None:
    """One poll reports both; the first one's read closes the second, whose number is used again."""
    lost: list[list[Any]] = []

    def replace(_: Socket) -> None:
        number = gone.fileno()
        gone.stopWriting()
        gone.sock.close()
        held: list[Socket] = []
        while not held or held[-1].fileno() != number:
            held.append(make_socket(lambda _: None, readable=False))
        loop.callLater(0, lambda: lost.append(list(held[-1].lost)))
        loop.callLater(0, loop.stop)

    make_socket(replace)
    gone = make_socket(lambda _: None, readable=False)
    gone.stopReading()
    gone.startWriting()
    gone.other.close()
    _run(loop)
    assert lost == [[]]


# -- what is tuned --------------------------------------------------------------------------


def test_only_twisteds_own_epoll_reactor_is_tuned() -> None:
    """A subclass, or any other reactor, may iterate in its own way."""

    class Other(EPollReactor):
        pass

    other = Other.__new__(Other)
    before = dict(vars(other))
    tune(other)()
    assert vars(other) == before
    something = object()
    tune(something)()


def test_the_tuning_can_be_undone(loop: Any) -> None:
    """Nothing is left; a second undo is harmless."""
    fresh = EPollReactor.__new__(EPollReactor)
    fresh.__dict__.update(loop.__dict__)
    fresh.__dict__.pop("doIteration")
    undo = tune(fresh)
    assert "doIteration" in vars(fresh)
    undo()
    undo()
    assert "doIteration" not in vars(fresh)
    assert fresh.doIteration.__func__ is EPollReactor.doPoll  # type: ignore[attr-defined]  # a bound method


# -- what else is due -----------------------------------------------------------------------


def test_a_timer_is_in_time_while_sockets_are_busy(loop: Any, make_socket: MakeSocket) -> None:
    """There is always something to read, and the timer gets its turns."""
    busy = make_socket(_send_again)
    late: list[float] = []

    def tick(due: float) -> None:
        late.append(loop.seconds() - due)
        if len(late) == 30:
            loop.stop()
        else:
            loop.callLater(0.01, tick, loop.seconds() + 0.01)

    loop.callLater(0.01, tick, loop.seconds() + 0.01)
    _run(loop)
    assert busy.reads > 30
    assert sorted(late)[15] < 0.05
    assert max(late) < 2


def test_a_call_without_delay_is_made_in_the_next_turn(loop: Any, make_socket: MakeSocket) -> None:
    """A socket asks for it, and gets few more reads before the call."""
    reads: list[int] = []

    def then(busy: Socket) -> None:
        _send_again(busy)
        if busy.reads in (10, 500):
            loop.callLater(0, lambda: reads.append(busy.reads))
        if busy.reads == 1000:
            loop.stop()

    make_socket(then)
    _run(loop)
    assert reads == [10, 500]


def test_a_timer_that_is_brought_forward_is_in_time(loop: Any, make_socket: MakeSocket) -> None:
    """A socket may bring it forward, and nothing else wakes the loop."""
    timer = loop.callLater(WAIT * 2, loop.stop)
    make_socket(lambda sock: timer.reset(0.01))
    _run(loop)
    assert not timer.active()


def test_a_timer_of_many_days_is_no_error(
    loop: Any, make_socket: MakeSocket, logged_failures: Any
) -> None:
    """Epoll cannot wait so long."""
    for call in loop.getDelayedCalls():
        call.reset(80 * 86400)
    far = loop.callLater(60 * 86400, loop.stop)

    def then(busy: Socket) -> None:
        if busy.reads == 5:
            loop.stop()
        else:
            busy.other.send(b"again")

    make_socket(then)
    _run(loop)
    assert logged_failures.report() == ""
    far.cancel()


@pytest.mark.parametrize("busy", [True, False], ids=["busy", "idle"])
def test_a_call_of_a_thread_is_made(loop: Any, make_socket: MakeSocket, busy: bool) -> None:
    """It wakes an idle loop, and gets its turn in a busy one."""
    make_socket(_send_again, readable=busy)
    calls: list[int] = []

    def call() -> None:
        calls.append(1)
        if len(calls) == 20:
            loop.stop()

    def ask() -> None:
        for _ in range(20):
            loop.callFromThread(call)
            time.sleep(0.002)

    thread = threading.Thread(target=ask)
    loop.callWhenRunning(thread.start)
    _run(loop)
    thread.join(WAIT)
    assert len(calls) == 20


@pytest.mark.parametrize("how", ["stop", "crash"])
def test_the_reactor_ends_out_of_a_busy_socket(
    loop: Any, make_socket: MakeSocket, how: str
) -> None:
    """It ends at once, not after more rounds."""

    def then(busy: Socket) -> None:
        _send_again(busy)
        if busy.reads == 7:
            getattr(loop, how)()

    busy = make_socket(then)
    _run(loop)
    assert busy.reads <= 9


def test_one_turn_without_waiting_does_not_wait(loop: Any, make_socket: MakeSocket) -> None:
    """``iterate(0)`` returns, also inside of a running loop that has nothing to do."""
    done: list[float] = []

    def inside() -> None:
        begun = time.monotonic()
        one.other.send(b"go")
        loop.iterate(0)
        done.append(time.monotonic() - begun)
        loop.stop()

    one = make_socket(lambda sock: None, readable=False)
    loop.callLater(0, inside)
    _run(loop)
    assert one.reads == 1
    assert done[0] < WAIT / 2


# -- what breaks ----------------------------------------------------------------------------


@pytest.mark.parametrize("where", ["doRead", "doWrite", "connectionLost"])
def test_an_exception_ends_only_its_connection(
    loop: Any, make_socket: MakeSocket, logged_failures: Any, where: str
) -> None:
    """It is logged once, and the other connections are served."""

    class Broken(Socket):
        def doRead(self) -> Any:
            if where == "doRead":
                raise LookupError("only this one")
            return None if where == "doWrite" else CONNECTION_DONE

        def doWrite(self) -> Any:
            raise LookupError("only this one")

        def connectionLost(self, reason: Failure) -> None:
            super().connectionLost(reason)
            if where == "connectionLost":
                raise LookupError("only this one")

    broken = Broken(loop, _send_again)
    whole = make_socket(lambda one: loop.stop() if one.reads == 50 else _send_again(one))
    if where == "doWrite":
        broken.startWriting()
    else:
        broken.other.send(b"go")
    _run(loop)
    broken.close()
    reason = ConnectionDone if where == "connectionLost" else LookupError
    assert [type(error) for error in broken.lost] == [reason]
    assert whole.reads == 50
    assert logged_failures.report().count("LookupError: only this one") == 1
    logged_failures.flush()


@pytest.mark.parametrize("why", [ConnectionDone(), ConnectionLost(), OSError("why")])
def test_a_reason_is_reported_once(loop: Any, make_socket: MakeSocket, why: Exception) -> None:
    """The value that ``doRead`` returns is the reason of the loss."""
    one = make_socket(lambda sock: why)
    loop.callLater(0.05, loop.stop)
    _run(loop)
    assert [type(error) for error in one.lost] == [type(why)]


@pytest.mark.parametrize("event", ["read", "write", "hang-up"])
def test_an_event_costs_no_context(
    loop: Any, make_socket: MakeSocket, monkeypatch: pytest.MonkeyPatch, event: str
) -> None:
    """Reading, also an end of both sides, and writing are called straight from the loop."""
    calls: list[str] = []

    def then(one: Socket) -> Any:
        calls.append("read")
        loop.stop()
        return CONNECTION_DONE if event == "hang-up" else None

    def write() -> Any:
        calls.append("write")
        loop.stop()
        return CONNECTION_LOST

    monkeypatch.setattr(log, "callWithLogger", lambda *_: calls.append("context"))
    one: Any = make_socket(then, readable=event == "read")
    one.doWrite = write
    if event == "write":
        one.startWriting()
    elif event == "hang-up":
        one.other.close()
    _run(loop)
    assert calls == ["write" if event == "write" else "read"]
    lost = ConnectionDone if event == "hang-up" else ConnectionLost  # that of a reactor that stops
    assert [type(error) for error in one.lost] == [lost]


def test_a_hang_up_is_reported(loop: Any, make_socket: MakeSocket) -> None:
    """It is the end of what is read."""

    def then(one: Socket) -> Any:
        loop.stop()
        return CONNECTION_DONE

    one = make_socket(then, readable=False)
    loop.callLater(0, one.other.close)
    _run(loop)
    assert [type(error) for error in one.lost] == [ConnectionDone]


def test_a_socket_that_is_removed_in_the_same_turn_is_not_read(
    loop: Any, make_socket: MakeSocket
) -> None:
    """Two sockets can be read; the first removes the other."""

    def then(one: Socket) -> None:
        (right if one is left else left).stopReading()
        loop.callLater(0.05, loop.stop)

    left, right = make_socket(then), make_socket(then)
    _run(loop)
    assert left.reads + right.reads == 1


# -- signals --------------------------------------------------------------------------------

SCRIPT = """
import os, signal, socket, sys
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background ignores it
from twisted.internet import reactor
from twisted.internet.protocol import Factory, Protocol
from llmproxy.net.loop import Lag, tune

class Echo(Protocol):
    def connectionMade(self):
        self.transport.write(b"x")
    def dataReceived(self, data):
        self.transport.write(data)

if sys.argv[1] == "busy":
    from twisted.internet.protocol import ClientFactory
    port = reactor.listenTCP(0, Factory.forProtocol(Echo), interface="127.0.0.1")
    reactor.connectTCP("127.0.0.1", port.getHost().port, ClientFactory.forProtocol(Echo))
tune(reactor)
assert "doIteration" in vars(reactor)
reactor.callLater(0.1, print, "runs", flush=True)
reactor.callLater(60, os._exit, 9)
reactor.addSystemEventTrigger("before", "shutdown", print, "stops", flush=True)
reactor.run()
"""


@pytest.mark.parametrize("what", ["busy", "idle"])
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_stops_the_reactor(what: str, number: signal.Signals) -> None:
    """It may interrupt a wait or come between two reads."""
    process = subprocess.Popen(
        [sys.executable, "-c", SCRIPT, what], cwd=ROOT, stdout=subprocess.PIPE, text=True
    )
    with process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == "runs\n"
            process.send_signal(number)
            assert process.wait(WAIT) in (0, -number)
            assert process.stdout.read() == "stops\n"
        finally:
            process.kill()


# -- Twisted's private names ----------------------------------------------------------------


def test_the_queues_have_their_private_names(loop: Any) -> None:
    """Each queue of the reactor has its name and its content."""
    assert loop.threadCallQueue == []
    loop.callFromThread(int)
    assert len(loop.threadCallQueue) == 1
    far = loop.callLater(100, int)
    assert far in loop._newTimedCalls
    loop.runUntilCurrent()
    assert (loop.threadCallQueue, loop._newTimedCalls) == ([], [])
    near = loop.callLater(1, int)
    loop.runUntilCurrent()
    assert loop._pendingTimedCalls[0] is near
    assert near.time > loop.seconds()
    assert loop._justStopped is False
    assert loop.running is False
    near.cancel()
    far.cancel()


def test_the_poller_and_the_readers_have_their_private_names(
    loop: Any, make_socket: MakeSocket
) -> None:
    """The poller returns a descriptor; one lasting mapping knows its reader."""
    mapping = loop._selectables
    one = make_socket(lambda sock: None, readable=False)
    assert loop._selectables is mapping
    assert mapping[one.fileno()] is one
    one.other.send(b"go")
    assert (one.fileno(), 1) in loop._poller.poll(1, len(mapping))
    one.stopReading()
    assert one.fileno() not in mapping
    loop.removeAll()
    assert loop._selectables is mapping


def test_the_private_methods_of_the_reactor_are_there() -> None:
    """The tuned loop leaves other events, and ends, to these methods."""
    assert callable(EPollReactor._doReadOrWrite)
    assert EPollReactor._disconnectSelectable is _DisconnectSelectableMixin._disconnectSelectable
    assert EPollReactor.doIteration is EPollReactor.doPoll


def test_a_late_reactor_is_measured() -> None:
    """The lag is the lateness of a timer, and never below zero."""
    clock, late = Clock(), 0.0
    lags: list[float] = []
    lag = Lag(clock, lambda: clock.seconds() + late, lags.append)
    lag.stop()
    lag.start()
    clock.advance(1)
    late = 0.25
    clock.advance(1)
    late = 0.125
    clock.advance(1)
    lag.stop()
    assert lags == [0.0, 0.25, 0.0]
    assert not clock.getDelayedCalls()
