"""When a heartbeat is written: in silence, between events, and to a client that takes it."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from twisted.internet.task import Clock
from twisted.python.failure import Failure
from twisted.web.client import ResponseDone

from llmproxy.stream.heartbeat import Heartbeat
from llmproxy.stream.relay import Batch, Relay

BEAT = b": heartbeat\n\n"


class Ends:
    """A provider that never sends by itself, and a client that keeps what it gets."""

    def __init__(self) -> None:
        self.got: list[bytes] = []

    def deliverBody(self, protocol: object) -> None:
        """Send nothing."""

    def abort(self) -> None:
        """Nothing is open."""

    def write(self, data: bytes) -> None:
        """Keep it."""
        self.got.append(data)

    write_last = write

    def verbatim(self) -> None:
        """Take content alone."""

    def registerProducer(self, producer: object, streaming: bool) -> None:
        """Pause nobody."""

    def unregisterProducer(self) -> None:
        """Nobody is paused."""

    def when_sent(self, call: object) -> None:
        """Do not say."""


class Stream:
    """A relay with a heartbeat each 10 s."""

    def __init__(self) -> None:
        self.clock, self.ends = Clock(), Ends()
        self.relay = Relay(
            self.ends,
            self.ends,
            self.clock,
            self.clock.seconds,
            idle=None,
            batch=Batch(),
            gaps=lambda gap: None,
            delays=lambda delay: None,
        )
        self.done = self.relay.start()
        self.beats = Heartbeat(
            self.relay, self.ends.write, self.clock, self.clock.seconds, every=10, beat=BEAT
        )

    def passes(self, seconds: float) -> list[bytes]:
        """Let time pass; return what the client got meanwhile."""
        before = len(self.ends.got)
        self.clock.pump([1.0] * int(seconds))
        return self.ends.got[before:]


@pytest.fixture
def stream() -> Iterator[Stream]:
    """One that is stopped at the end, and then has no timer."""
    made = Stream()
    yield made
    made.beats.stop()
    assert made.clock.getDelayedCalls() == []


def test_it_beats_in_silence(stream: Stream) -> None:
    """Before the first event, too, and again after each interval."""
    assert stream.passes(9) == []
    assert stream.passes(1) == [BEAT]
    assert stream.passes(20) == [BEAT, BEAT]


def test_a_chunk_begins_the_silence_anew(stream: Stream) -> None:
    """A provider that speaks needs none."""
    for _ in range(5):
        assert stream.passes(9) == []
        stream.relay.dataReceived(b"data: a\n\n")
    assert stream.passes(9) == []
    assert stream.passes(1) == [BEAT]


@pytest.mark.parametrize("begun", [b"data: a", b"data: a\n", b"data: a\r\n", b"x\n\ndata: b"])
def test_never_within_an_event(stream: Stream, begun: bytes) -> None:
    """A silence there passes without one; behind the event's end it beats again."""
    stream.relay.dataReceived(begun)
    assert stream.passes(35) == []
    stream.relay.dataReceived(b"\n\n")
    assert stream.passes(10) == [BEAT]


@pytest.mark.parametrize("end", [b"\n\n", b"\r\r", b"\r\n\r\n"])
def test_every_form_of_an_event_s_end(stream: Stream, end: bytes) -> None:
    """Those of the standard, whole in one chunk or split."""
    stream.relay.dataReceived(b"data: a")
    for at in range(len(end)):
        stream.relay.dataReceived(end[at : at + 1])
    assert stream.passes(10) == [BEAT]


def test_not_while_the_client_takes_nothing(stream: Stream) -> None:
    """What is written to it then would only wait."""
    stream.relay.pauseProducing()
    assert stream.passes(35) == []
    stream.relay.resumeProducing()
    assert BEAT in stream.passes(10)


def test_not_behind_the_end(stream: Stream) -> None:
    """The timer that still runs finds that all is over, and is the last."""
    stream.relay.connectionLost(Failure(ResponseDone()))
    assert stream.passes(25) == []
    assert stream.clock.getDelayedCalls() == []
