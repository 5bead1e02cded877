"""The pump: what comes in goes out at once, who may stop it, and how it ends."""

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
from llmproxy.stream.relay import Batch, Relay, State
from tests.support.fake_transport import FakeTransport

WHOLE = Failure(ResponseDone())


class Sink:
    """Takes chunks; ``full`` pauses the producer at its registration, as a full wire does."""

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
    """A body that the test pushes; what ``early`` holds comes as soon as it is asked for."""

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
        """What the copy got so far."""
        self.batch.read()
        return self._copied

    @property
    def gaps(self) -> list[float]:
        """The gaps that were told so far."""
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


# --- flowing --------------------------------------------------------------------------------------


def test_each_chunk_goes_out_at_once_and_alone() -> None:
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
    """Counts, first and last time, and the gaps between chunks, of which the first has none."""
    pump = Pump()
    assert (pump.relay.statistics.first_at, pump.relay.statistics.last_at) == (None, 1000.0)
    pump.feed(b"abc", after=7)
    assert (pump.relay.statistics.first_at, pump.relay.statistics.longest_gap, pump.gaps) == (
        1007.0,
        0.0,
        [],
    )
    pump.feed(b"d", b"efgh", after=2)
    pump.feed(b"i", after=1)

    relay = pump.relay
    assert (relay.chunks, relay.byte_count) == (4, 9)
    assert (relay.statistics.first_at, relay.statistics.last_at) == (1007.0, 1012.0)
    assert (relay.statistics.longest_gap, pump.gaps) == (2.0, [2.0, 2.0, 1.0])
    assert (relay.paused_s, relay.is_paused) == (0.0, False)
    relay.connectionLost(WHOLE)


@given(st.lists(st.binary(min_size=1, max_size=6), max_size=8))
def test_the_tail_is_the_end_of_all_that_came(chunks: list[bytes]) -> None:
    """The last four bytes are told, wherever the chunks were cut."""
    pump = Pump(idle=None)
    pump.feed(*chunks)

    assert pump.relay.statistics.tail == b"".join(chunks)[-4:]


def test_bytes_that_came_before_the_start_go_out_first() -> None:
    """What the source already holds is forwarded within ``start``, the end included."""
    pump = Pump(start=False)
    pump.source.early = [b"all of it"]
    pump.source.early_end = WHOLE
    pump.relay.start()

    assert pump.sink.chunks == [b"all of it"]
    assert pump.outcomes == [None]
    assert "pause" not in pump.source.transport.calls
    pump.assert_let_go()


@pytest.mark.parametrize("end", [WHOLE, Failure(upstream_broken("reset"))])
def test_an_end_within_the_start_is_told_to_whoever_started(end: Failure) -> None:
    """The Deferred that ``start`` returns is the one that fires, also where it has already."""
    pump = Pump(start=False)
    pump.source.early = [b"some of it"]
    pump.source.early_end = end
    done = pump.relay.done
    assert pump.relay.start() is done
    assert pump.outcomes == [None if end is WHOLE else end.value]


# --- pausing --------------------------------------------------------------------------------------


def test_a_full_sink_stops_the_reading() -> None:
    """Pause and resume reach the source's transport, once each, however often they are said."""
    pump = Pump()
    calls = pump.source.transport.calls
    calls.clear()
    for _ in range(2):
        pump.sink.producer.pauseProducing()
    assert (calls, pump.relay.is_paused) == (["pause"], True)
    for _ in range(2):
        pump.sink.producer.resumeProducing()
    assert (calls, pump.relay.is_paused) == (["pause", "resume"], False)
    pump.relay.connectionLost(WHOLE)


def test_a_sink_that_is_full_already_is_not_fed() -> None:
    """A pause at the registration holds, although the source resumes when it delivers."""
    pump = Pump(start=False)
    pump.sink.full = True
    pump.relay.start()
    assert pump.source.transport.is_paused()
    assert pump.relay.is_paused
    pump.clock.advance(99)
    pump.sink.producer.resumeProducing()
    assert not pump.source.transport.is_paused()
    assert pump.relay.paused_s == 99.0
    pump.relay.connectionLost(WHOLE)


def test_a_sink_that_fills_up_within_start_is_not_fed() -> None:
    """A pause on the bytes that came early holds, too."""
    pump = Pump(start=False)
    pump.source.early = [b"x"]
    pump.sink.on_write = lambda: pump.sink.producer.pauseProducing()
    pump.relay.start()

    assert pump.source.transport.is_paused()
    pump.relay.connectionLost(WHOLE)


def test_what_was_in_flight_at_a_pause_goes_out() -> None:
    """A chunk that arrives in spite of the pause is not kept back."""
    pump = Pump()
    pump.sink.producer.pauseProducing()
    pump.feed(b"late")

    assert pump.sink.chunks == [b"late"]
    pump.relay.connectionLost(WHOLE)


def test_pauses_are_summed_up_and_no_gaps() -> None:
    """``paused_s`` grows while a pause lasts, and a pause is no silence of the provider's."""
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
    """The connection may serve another by then: late pauses and resumes do not reach it."""
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
    """After ``idle`` without a byte the source is aborted and the body broken, and not before."""
    pump = Pump(idle=30)
    pump.clock.advance(29.9)
    pump.feed(b"x")
    pump.clock.advance(29.9)
    assert not pump.outcomes
    pump.clock.advance(0.2)

    assert isinstance(pump.outcomes[0], ProxyError)
    assert pump.outcomes[0].end is EndReason.UPSTREAM_IDLE
    assert pump.source.aborts == 1
    pump.assert_let_go()


def test_the_first_chunk_has_as_long_as_the_others() -> None:
    """A head without any body runs into the idle deadline, too."""
    pump = Pump(idle=30)
    pump.clock.advance(30)

    assert pump.outcomes[0].end is EndReason.UPSTREAM_IDLE


def test_chunks_do_not_touch_the_timer() -> None:
    """However many chunks come, there is one timer, set anew only when it rings."""
    pump = Pump(idle=30)
    (timer,) = pump.clock.getDelayedCalls()
    pump.feed(*[b"x"] * 100, after=0.1)

    assert pump.clock.getDelayedCalls() == [timer]
    pump.relay.connectionLost(WHOLE)


def test_a_slow_client_is_no_silent_provider() -> None:
    """The idle clock stands still for as long as a pause lasts."""
    pump = Pump(idle=30)
    pump.sink.producer.pauseProducing()
    pump.clock.pump([10] * 100)
    assert not pump.outcomes
    pump.sink.producer.resumeProducing()
    pump.clock.advance(29.9)
    assert not pump.outcomes
    pump.clock.advance(0.2)

    assert pump.outcomes[0].end is EndReason.UPSTREAM_IDLE


@pytest.mark.parametrize("before", [1, 15, 29])
@pytest.mark.parametrize("pause", [0.5, 2, 29, 100])
def test_silence_before_a_pause_counts(before: float, pause: float) -> None:
    """Before and after a pause together the provider has ``idle``, to the second."""
    pump = Pump(idle=30)
    pump.clock.advance(before)
    pump.sink.producer.pauseProducing()
    pump.clock.advance(pause)
    pump.sink.producer.resumeProducing()
    pump.clock.advance(30 - before - 0.1)
    assert not pump.outcomes
    pump.clock.advance(0.2)

    assert pump.outcomes[0].end is EndReason.UPSTREAM_IDLE


def test_without_an_idle_deadline_there_is_no_timer() -> None:
    """``idle`` off is really off."""
    pump = Pump(idle=None)
    assert not pump.clock.getDelayedCalls()
    pump.sink.producer.pauseProducing()
    pump.sink.producer.resumeProducing()
    assert not pump.clock.getDelayedCalls()
    pump.relay.connectionLost(WHOLE)
    pump.assert_let_go()


# --- the end --------------------------------------------------------------------------------------


def test_a_broken_body_fails_with_its_reason() -> None:
    """What the source says about the break is what ``done`` fails with."""
    pump = Pump()
    error = upstream_broken("reset")
    pump.feed(b"x")
    pump.relay.connectionLost(Failure(error))

    assert pump.outcomes == [error]
    pump.assert_let_go()


@pytest.mark.parametrize("paused", [True, False])
def test_a_client_that_goes_ends_the_reading(paused: bool) -> None:
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


def test_cancelling_ends_the_reading() -> None:
    """Cancelling ``done`` aborts the source once, and nothing that comes later fires it again."""
    pump = Pump()
    pump.relay.done.cancel()
    pump.relay.cancel()
    pump.relay.connectionLost(Failure(upstream_broken("our own abort")))

    assert isinstance(pump.outcomes[0], CancelledError)
    assert pump.source.aborts == 1
    pump.assert_let_go()


def test_cancel_alone_does_not_fire() -> None:
    """``cancel`` closes the source and is silent; whoever calls it knows."""
    pump = Pump()
    pump.relay.cancel()

    assert not pump.outcomes
    assert pump.source.aborts == 1
    assert not pump.clock.getDelayedCalls()


def test_a_chunk_in_its_coding_is_handed_on_as_it_is() -> None:
    """Not a byte of it changes; what is counted and copied is its content."""
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
def test_chunks_are_read_in_the_same_lots_in_whatever_form_they_come(
    framed: bool, size: int
) -> None:
    """Thirty-two short ones, or up to a long one."""
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


def test_a_client_that_has_left_gets_no_chunks_as_they_are() -> None:
    """What is read on for the copy's sake goes to nobody, and is not counted as forwarded."""
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
    """A relay that is cancelled by its own write has counted that chunk and ends once."""
    pump = Pump()
    pump.sink.on_write = pump.relay.done.cancel
    pump.feed(b"x")
    pump.relay.connectionLost(WHOLE)

    assert pump.relay.chunks == 1
    assert isinstance(pump.outcomes[0], CancelledError)
    pump.assert_let_go()


# -- what is copied and measured ------------------------------------------------------------------


def test_the_copy_comes_after_the_write() -> None:
    """Whoever reads along gets each chunk once the client has it, and in the same order."""
    pump = Pump()
    seen: list[tuple[int, int]] = []
    pump.sink.on_write = lambda: seen.append((len(pump.sink.chunks), len(pump.copied)))
    for chunk in (b"a", b"b", b"c"):
        pump.relay.dataReceived(chunk)
    assert pump.copied == pump.sink.chunks == [b"a", b"b", b"c"]
    assert seen == [(1, 0), (2, 1), (3, 2)]


def test_the_delay_of_some_chunks_is_followed_to_the_kernel() -> None:
    """The delay of each backlog's second chunk ends when the sink says so."""
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
