"""The relay: each chunk is forwarded at once, a full client pauses it, and it ends once."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from twisted.internet.defer import CancelledError
from twisted.internet.task import Clock
from twisted.python.failure import Failure
from twisted.web.client import ResponseDone

from llmproxy.errors import ClientGone, EndReason, ProxyError, upstream_broken
from llmproxy.stream.relay import KEPT_CHUNKS, Batch, Relay, State
from tests.support.fake_transport import FakeTransport

WHOLE = Failure(ResponseDone())


class Sink:
    """Takes chunks; ``full`` pauses the producer when it registers, as a full transport does."""

    def __init__(self) -> None:
        self.chunks: list[bytes] = []
        self.as_they_are: list[bytes] = []
        self.takes_chunks = False
        self.producer: Any = None
        self.full = False
        self.on_write: Callable[[], None] = lambda: None
        self.unregistered = 0
        self.waiting: Callable[[], object] | None = None
        self.slow = False

    def when_sent(self, call: Callable[[], object]) -> None:
        if self.slow:
            self.waiting = call
        else:
            call()

    def write(self, data: bytes) -> None:
        self.chunks.append(data)
        self.on_write()

    def write_last(self, data: bytes) -> None:
        self.write(data + b"<end>")

    def verbatim(self) -> Callable[[bytes], object] | None:
        return self.as_they_are.append if self.takes_chunks else None

    def registerProducer(self, producer: Any, streaming: bool) -> None:
        assert streaming
        assert self.producer is None
        self.producer = producer
        if self.full:
            producer.pauseProducing()

    def unregisterProducer(self) -> None:
        self.producer = None
        self.unregistered += 1


class Source:
    """A body that the test pushes; the chunks in ``early`` come when the body is requested."""

    def __init__(self) -> None:
        self.transport = FakeTransport()
        self.aborts = 0
        self.early: list[bytes] = []
        self.early_end: Failure | None = None

    def deliverBody(self, protocol: Any) -> None:
        self.transport.connect(protocol)
        self.transport.calls.clear()
        self.transport.resumeProducing()  # as a connection does when its body is asked for
        for data in self.early:
            protocol.dataReceived(data)
        if self.early_end is not None:
            protocol.connectionLost(self.early_end)

    def abort(self) -> None:
        self.aborts += 1


class Pump:
    """A relay between a source and a sink, and its outcome."""

    def __init__(
        self, idle: float | None = 30.0, *, start: bool = True, stays: bool = False
    ) -> None:
        self.clock = Clock()
        self.clock.advance(1000)
        self.source, self.sink = Source(), Sink()
        self._gaps: list[float] = []
        self.delays: list[float] = []
        self._copied: list[bytes] = []
        self.batch = Batch()
        self.relay = Relay(
            self.source,
            self.sink,
            self.clock,
            self.clock.seconds,
            idle=idle,
            batch=self.batch,
            gaps=self._gaps.append,
            delays=self.delays.append,
            copy=self._copied.append,
            stays=lambda: stays,
        )
        self.outcomes: list[Any] = []
        self.relay.done.addBoth(self._keep)
        if start:
            assert self.relay.start() is self.relay.done

    @property
    def copied(self) -> list[bytes]:
        """The chunks that were copied so far."""
        self.batch.read()
        return self._copied

    @property
    def gaps(self) -> list[float]:
        """The gaps that were reported so far."""
        self.batch.read()
        return self._gaps

    def _keep(self, outcome: Any) -> None:
        self.outcomes.append(outcome.value if isinstance(outcome, Failure) else outcome)

    def feed(self, *chunks: bytes, after: float = 0.0) -> None:
        """Let chunks come in, each after some seconds."""
        for data in chunks:
            self.clock.advance(after)
            self.relay.dataReceived(data)

    def assert_let_go(self) -> None:
        """The relay has ended and holds nothing any more."""
        assert self.relay.state is State.ENDED
        assert len(self.outcomes) == 1
        assert self.sink.producer is None
        assert self.sink.unregistered == 1
        assert not self.clock.getDelayedCalls()

    def assert_idle_in(self, seconds: float) -> None:
        """The source is given up after these seconds, and not before."""
        self.clock.advance(seconds - 0.1)
        assert not self.outcomes
        self.clock.advance(0.2)
        assert isinstance(self.outcomes[0], ProxyError)
        assert self.outcomes[0].end is EndReason.UPSTREAM_IDLE
        assert self.source.aborts == 1
        self.assert_let_go()


# --- flowing --------------------------------------------------------------------------------------


def test_each_chunk_is_forwarded_at_once_and_alone() -> None:
    """One read is one write, unchanged, before the next one comes."""
    pump = Pump()
    for data in (b"data: 1", b"\n\n", b"\xff\x00"):
        pump.feed(data)
        assert pump.sink.chunks[-1] == data
    pump.relay.connectionLost(WHOLE)

    assert pump.sink.chunks == [b"data: 1", b"\n\n", b"\xff\x00"]
    assert pump.outcomes == [None]
    assert pump.source.aborts == 0
    pump.assert_let_go()


def test_chunks_bytes_and_times_are_counted() -> None:
    """The statistics have counts, first and last time, and gaps; the first chunk has no gap."""
    pump = Pump()
    assert (pump.relay.statistics.first_at, pump.relay.statistics.last_at) == (None, 1000.0)
    pump.feed(b"abc", after=7)
    statistics = pump.relay.statistics
    assert (statistics.first_at, statistics.longest_gap, pump.gaps) == (1007.0, 0.0, [])
    pump.feed(b"d", b"efgh", after=2)
    pump.feed(b"i", after=1)

    relay = pump.relay
    assert (relay.chunks, relay.byte_count) == (4, 9)
    assert (statistics.first_at, statistics.last_at) == (1007.0, 1012.0)
    assert (statistics.longest_gap, pump.gaps) == (2.0, [2.0, 2.0, 1.0])
    assert (relay.paused_s, relay.is_paused) == (0.0, False)


def test_chunks_that_come_at_once_are_counted() -> None:
    """Those within a millisecond of the one before; the first one is not behind another."""
    pump = Pump()
    for after in (1.0, 0.0, 0.0005, 0.0011, 0.0009):
        pump.feed(b"a", after=after)
    assert pump.relay.statistics.at_once == 3


@given(st.lists(st.tuples(st.integers(1, 9), st.integers(1, 9)), max_size=3 * KEPT_CHUNKS))
def test_the_last_chunks_are_kept_with_time_and_size(chunks: list[tuple[int, int]]) -> None:
    """In their order, whether there were few or many."""
    pump, came = Pump(idle=None), []
    for seconds, size in chunks:
        pump.feed(b"x" * size, after=seconds)
        came.append((pump.clock.seconds(), size))
    assert pump.relay.statistics.last_chunks == came[-KEPT_CHUNKS:]


@given(st.lists(st.binary(min_size=1, max_size=6), max_size=8))
def test_the_tail_is_the_end_of_all_that_came(chunks: list[bytes]) -> None:
    """The last four bytes are reported, wherever the chunks were split."""
    pump = Pump(idle=None)
    pump.feed(*chunks)

    assert pump.relay.statistics.tail == b"".join(chunks)[-4:]


@pytest.mark.parametrize("end", [WHOLE, Failure(upstream_broken("reset"))])
def test_bytes_that_came_before_the_start_are_forwarded_first(end: Failure) -> None:
    """``start`` forwards them, the end included; the Deferred that it returns has fired."""
    pump = Pump(start=False)
    pump.source.early = [b"all of it"]
    pump.source.early_end = end
    done = pump.relay.done
    assert pump.relay.start() is done

    assert pump.sink.chunks == [b"all of it"]
    assert pump.outcomes == [None if end is WHOLE else end.value]
    assert "pause" not in pump.source.transport.calls
    pump.assert_let_go()


# --- pausing --------------------------------------------------------------------------------------


def test_a_full_sink_pauses_the_source() -> None:
    """Pause and resume reach the transport of the source once, however often they are called."""
    pump = Pump()
    calls = pump.source.transport.calls
    calls.clear()
    for _ in range(2):
        pump.sink.producer.pauseProducing()
    assert (calls, pump.relay.is_paused) == (["pause"], True)
    for _ in range(2):
        pump.sink.producer.resumeProducing()
    assert (calls, pump.relay.is_paused) == (["pause", "resume"], False)


@pytest.mark.parametrize("at", ["registration", "first chunk"])
def test_a_sink_that_is_full_within_start_is_not_fed(at: str) -> None:
    """The pause holds, although the source resumes when it delivers its body."""
    pump = Pump(start=False)
    if at == "registration":
        pump.sink.full = True
    else:
        pump.source.early = [b"x"]
        pump.sink.on_write = lambda: pump.sink.producer.pauseProducing()
    pump.relay.start()
    assert pump.source.transport.is_paused()
    assert pump.relay.is_paused
    pump.clock.advance(99)
    pump.sink.producer.resumeProducing()
    assert not pump.source.transport.is_paused()
    assert pump.relay.paused_s == 99.0


def test_a_chunk_in_flight_at_a_pause_is_forwarded() -> None:
    """A chunk that arrives during the pause does not wait."""
    pump = Pump()
    pump.sink.producer.pauseProducing()
    pump.feed(b"late")

    assert pump.sink.chunks == [b"late"]


def test_pauses_are_summed_up_and_are_no_gaps() -> None:
    """``paused_s`` grows during a pause, and a pause is not the provider's silence."""
    pump = Pump()
    pump.feed(b"a")
    for _ in range(2):
        pump.clock.advance(1)
        pump.sink.producer.pauseProducing()
        pump.clock.advance(10)
        assert pump.relay.paused_s in (10.0, 20.0)
        pump.sink.producer.resumeProducing()
        pump.feed(b"b", after=1)

    assert pump.relay.paused_s == 20.0
    assert pump.gaps == [2.0, 2.0]
    pump.sink.producer.pauseProducing()
    pump.clock.advance(5)
    pump.relay.connectionLost(WHOLE)
    pump.clock.advance(5)
    assert pump.relay.paused_s == 25.0
    assert not pump.relay.is_paused


@pytest.mark.parametrize("end", ["whole", "cancel", "gone"])
def test_an_ended_relay_leaves_the_transport_alone(end: str) -> None:
    """The connection may serve another request: late pauses and resumes do not reach it."""
    pump = Pump()
    producer = pump.sink.producer
    {
        "whole": lambda: pump.relay.connectionLost(WHOLE),
        "cancel": pump.relay.done.cancel,
        "gone": producer.stopProducing,
    }[end]()
    pump.source.transport.calls.clear()
    producer.pauseProducing()
    producer.resumeProducing()
    producer.stopProducing()
    pump.clock.advance(0)

    assert not pump.source.transport.calls
    pump.assert_let_go()


# --- the idle clock -------------------------------------------------------------------------------


def test_a_silent_source_is_given_up() -> None:
    """After ``idle`` seconds without a byte the source is aborted, and not before."""
    pump = Pump(idle=30)
    pump.clock.advance(29.9)
    pump.feed(b"x")
    pump.assert_idle_in(30)


def test_chunks_do_not_touch_the_timer() -> None:
    """However many chunks come, the one timer is not set again."""
    pump = Pump(idle=30)
    (timer,) = pump.clock.getDelayedCalls()
    pump.feed(*[b"x"] * 100, after=0.1)

    assert pump.clock.getDelayedCalls() == [timer]


@pytest.mark.parametrize("before", [0, 1, 15, 29])
@pytest.mark.parametrize("pause", [0, 0.5, 2, 29, 100])
def test_the_idle_clock_stands_still_during_a_pause(before: float, pause: float) -> None:
    """Before and after a pause together the provider has ``idle`` seconds."""
    pump = Pump(idle=30)
    pump.clock.advance(before)
    if pause:
        pump.sink.producer.pauseProducing()
        pump.clock.pump([pause / 4] * 4)
        pump.sink.producer.resumeProducing()
    pump.assert_idle_in(30 - before)


def test_without_an_idle_deadline_there_is_no_timer() -> None:
    """A pause starts no timer either."""
    pump = Pump(idle=None)
    assert not pump.clock.getDelayedCalls()
    pump.sink.producer.pauseProducing()
    pump.sink.producer.resumeProducing()
    assert not pump.clock.getDelayedCalls()
    pump.relay.connectionLost(WHOLE)
    pump.assert_let_go()


# --- the end --------------------------------------------------------------------------------------


def test_a_broken_body_fails_with_its_reason() -> None:
    """``done`` fails with the error of the source."""
    pump = Pump()
    error = upstream_broken("reset")
    pump.feed(b"x")
    pump.relay.connectionLost(Failure(error))

    assert pump.outcomes == [error]
    pump.assert_let_go()


@pytest.mark.parametrize("paused", [True, False])
def test_a_client_that_leaves_aborts_the_source(paused: bool) -> None:
    """The source is aborted once, and ``done`` fails with ``ClientGone``."""
    pump = Pump()
    if paused:
        pump.sink.producer.pauseProducing()
    pump.sink.producer.stopProducing()

    assert (pump.source.aborts, pump.outcomes) == (1, [])
    pump.clock.advance(0)
    assert isinstance(pump.outcomes[0], ClientGone)
    assert pump.source.aborts == 1
    pump.relay.connectionLost(Failure(upstream_broken("our own abort")))
    pump.assert_let_go()


def test_cancelling_aborts_the_source() -> None:
    """The source is aborted once, and ``done`` fires once."""
    pump = Pump()
    pump.relay.done.cancel()
    pump.relay.cancel()
    pump.relay.connectionLost(Failure(upstream_broken("our own abort")))

    assert isinstance(pump.outcomes[0], CancelledError)
    assert pump.source.aborts == 1
    pump.assert_let_go()


def test_cancel_alone_does_not_fire() -> None:
    """``cancel`` aborts the source, and ``done`` does not fire."""
    pump = Pump()
    pump.relay.cancel()

    assert not pump.outcomes
    assert pump.source.aborts == 1
    assert not pump.clock.getDelayedCalls()


def test_a_framed_chunk_is_forwarded_as_it_is() -> None:
    """No byte changes; only its content is counted and copied."""
    pump = Pump()
    framed = ((b"3\r\nabc\r\n", 3), (b"00a\r\n0123456789\r\n", 5), (b"1\r\n!\r\n", 3))
    for wire, start in framed:
        pump.clock.advance(1)
        pump.relay.framedReceived(wire, start)
        pump.sink.takes_chunks = True
    assert (pump.sink.chunks, pump.sink.as_they_are) == ([b"abc", b"0123456789"], [framed[2][0]])

    assert (pump.relay.chunks, pump.relay.byte_count, pump.relay.statistics.verbatim) == (3, 14, 1)
    assert pump.copied == [b"abc", b"0123456789", b"!"]
    assert (pump.relay.statistics.first_at, pump.relay.statistics.last_at) == (1001.0, 1003.0)
    assert (pump.gaps, pump.relay.statistics.tail) == ([1.0, 1.0], b"789!")
    assert len(pump.delays) == 1


@pytest.mark.parametrize("size", [1, 4096, 4097])
@pytest.mark.parametrize("framed", [True, False])
def test_framed_and_plain_chunks_make_the_same_batches(framed: bool, size: int) -> None:
    """A batch ends with the thirty-second chunk or with a long one."""
    pump = Pump()
    pump.sink.takes_chunks = True
    data, head = b"x" * size, b"%x\r\n" % size
    wire = head + data + b"\r\n"
    for count in range(1, 70):
        before = len(pump._copied)
        if framed:
            pump.relay.framedReceived(wire, len(head))
        else:
            pump.relay.dataReceived(data)
        is_long = len(wire if framed and count > 1 else data) > 4096
        whole = is_long or count - before == 32
        assert len(pump._copied) == (count if whole else before)


def test_the_last_chunk_leaves_with_the_end() -> None:
    """It is counted, copied and measured as any other."""
    pump = Pump()
    pump.feed(b"first")
    pump.relay.lastReceived(b"last")
    assert pump.sink.chunks == [b"first", b"last<end>"]
    pump.relay.connectionLost(WHOLE)
    assert (pump.relay.chunks, pump.relay.byte_count) == (2, 9)
    assert (pump.copied, len(pump.delays)) == ([b"first", b"last"], 1)
    pump.assert_let_go()


def test_a_client_that_has_left_gets_no_chunks() -> None:
    """The chunks of a detached stream are copied, but not forwarded, and not counted as such."""
    pump = Pump(stays=True)
    pump.sink.takes_chunks = True
    for _ in range(2):
        pump.relay.framedReceived(b"1\r\n!\r\n", 3)
    assert pump.sink.as_they_are == [b"1\r\n!\r\n"]
    pump.sink.takes_chunks = False
    pump.sink.producer.stopProducing()
    pump.relay.framedReceived(b"1\r\n?\r\n", 3)
    assert pump.sink.as_they_are == [b"1\r\n!\r\n"]
    assert (pump.relay.byte_count, pump.relay.statistics.verbatim) == (2, 1)
    assert pump.copied == [b"!", b"!", b"?"]


def test_a_sink_may_cancel_inside_a_write() -> None:
    """A relay that its own write cancels has counted that chunk and ends once."""
    pump = Pump()
    pump.sink.on_write = pump.relay.done.cancel
    pump.feed(b"x")
    pump.relay.connectionLost(WHOLE)

    assert pump.relay.chunks == 1
    assert isinstance(pump.outcomes[0], CancelledError)
    pump.assert_let_go()


# -- what is copied and measured ------------------------------------------------------------------


def test_the_copy_comes_after_the_write() -> None:
    """The copy has each chunk after the client, in the same order."""
    pump = Pump()
    seen: list[tuple[int, int]] = []
    pump.sink.on_write = lambda: seen.append((len(pump.sink.chunks), len(pump.copied)))
    for chunk in (b"a", b"b", b"c"):
        pump.relay.dataReceived(chunk)
    assert pump.copied == pump.sink.chunks == [b"a", b"b", b"c"]
    assert seen == [(1, 0), (2, 1), (3, 2)]


def test_the_delay_of_some_chunks_is_measured_to_the_kernel() -> None:
    """The delay of the second chunk of a batch ends when the sink has sent it."""
    pump = Pump()
    pump.sink.slow = True
    for _ in range(2):
        pump.relay.dataReceived(b"x")
    pump.clock.advance(3)
    assert pump.sink.waiting is not None
    assert not pump.delays
    pump.sink.waiting()
    assert pump.delays == [3.0]
    pump.sink.slow = False
    for _ in range(64):
        pump.relay.dataReceived(b"x")
    assert pump.delays == [3.0, 0.0, 0.0]
