"""The paced stream by a turned clock: when each event is made, what it holds, and what stops it."""

from __future__ import annotations

import json
from typing import Any

import pytest
from twisted.internet.task import Clock
from twisted.python.failure import Failure
from twisted.web.client import ResponseDone

from llmproxy.errors import ProxyError
from llmproxy.stream.pace import Pace, PacedSource, pace_of, read_query

WALL = 1_790_000_000.25


class Taker:
    """Takes a body, and can pause it with an event."""

    def __init__(self, source: PacedSource, clock: Clock) -> None:
        self.source, self.clock = source, clock
        self.got: list[tuple[float, bytes]] = []
        self.end: object = None
        self.pauses_at = 0
        source.deliverBody(self)

    def makeConnection(self, transport: object) -> None:
        assert transport is self.source

    def dataReceived(self, data: bytes) -> None:
        self.got.append((self.clock.seconds(), data))
        if len(self.got) == self.pauses_at:
            self.source.pauseProducing()

    def connectionLost(self, reason: Failure) -> None:
        assert self.end is None
        self.end = reason.value

    @property
    def times(self) -> list[float]:
        """When the events came."""
        return [at for at, _ in self.got]


def play(pace: Pace, *, pauses_at: int = 0) -> tuple[Taker, Clock]:
    """Let a paced stream begin."""
    clock = Clock()
    taker = Taker(PacedSource(pace, clock, clock.seconds, lambda: WALL + clock.seconds()), clock)
    taker.pauses_at = pauses_at
    assert not taker.got  # the head of the response leaves first
    return taker, clock


def event(data: bytes) -> Any:
    """Return the object of one event of SSE."""
    assert data.startswith(b"data: ")
    assert data.endswith(b"\n\n")
    return json.loads(data[6:])


def turn(clock: Clock, seconds: float, step: float = 0.125) -> None:
    """Let time pass in steps; all of them have no rest in binary."""
    clock.pump([0.0, *[step] * round(seconds / step), 0.0])


def test_events_come_at_their_times_and_say_them() -> None:
    """The first one at once; then one each interval, and the end right behind the last one."""
    taker, clock = play(Pace(events=3, interval_s=0.25))
    turn(clock, 0.5)
    assert taker.times == [0, 0.25, 0.5]
    assert isinstance(taker.end, ResponseDone)
    assert not clock.getDelayedCalls()
    found = [event(data) for _, data in taker.got]
    assert [(one["n"], one["sent"], one["ms"]) for one in found] == [
        (1, WALL, 0.0),
        (2, WALL + 0.25, 250.0),
        (3, WALL + 0.5, 500.0),
    ]


def test_an_event_that_is_late_does_not_shift_the_next_one() -> None:
    """A busy process does not slow the stream down for good."""
    taker, clock = play(Pace(events=4, interval_s=0.25))
    clock.pump([0, 0.375, 0.125, 0.75])
    assert taker.times == [0, 0.375, 0.5, 1.25]


def test_microseconds_are_in_the_event() -> None:
    """As digits: a float as Python writes it may have fewer."""
    taker, clock = play(Pace(events=1))
    turn(clock, 0)
    assert b'"sent":1790000000.250000,"ms":0.000,' in taker.got[0][1]


@pytest.mark.parametrize("form", ["sse", "ndjson"])
@pytest.mark.parametrize("size", [100, 200, 65536])
def test_an_event_has_the_size_that_was_asked_for(form: str, size: int) -> None:
    """Its framing counts; what is too small is as small as it can be."""
    taker, clock = play(Pace(events=1, size=size, form=form))
    turn(clock, 0)
    (data,) = [data for _, data in taker.got]
    assert len(data) == size
    begin, end = (b"data: {", b"}\n\n") if form == "sse" else (b"{", b"}\n")
    assert data.startswith(begin)
    assert data.endswith(end)
    small, clock = play(Pace(events=1, size=0))
    turn(clock, 0)
    assert event(small.got[0][1])["pad"] == ""


@pytest.mark.parametrize(("after", "times"), [(1, [0, 5]), (2, [0, 0.25, 5.25])])
def test_a_silence_stands_in_the_place_of_one_interval(after: int, times: list[float]) -> None:
    """The stream then goes on as before."""
    taker, clock = play(Pace(events=4, interval_s=0.25, silence_s=5, silence_after=after))
    turn(clock, 5.25)
    assert taker.times[: len(times)] == times
    turn(clock, 0.5)
    assert len(taker.times) == 4
    assert taker.end


def test_a_silence_behind_the_last_event_delays_the_end() -> None:
    """So that a hop can be silent with nothing but the end to come."""
    taker, clock = play(Pace(events=1, silence_s=5))
    turn(clock, 4.875)
    assert (taker.times, taker.end) == ([0], None)
    turn(clock, 0.125)
    assert taker.end


def test_it_stops_at_the_event_behind_which_it_breaks() -> None:
    """What reads it knows whether it breaks off there."""
    taker, clock = play(Pace(events=9, interval_s=0.25, break_after=2))
    turn(clock, 0.25)
    assert taker.times == [0, 0.25]
    assert taker.end


def test_nothing_is_made_in_a_pause_nor_made_up_for_behind_it() -> None:
    """A slow reader can see from the times that its slowness came as far as here."""
    taker, clock = play(Pace(events=4, interval_s=0.25), pauses_at=2)
    turn(clock, 10.25)
    assert taker.times == [0, 0.25]
    assert not clock.getDelayedCalls()
    taker.source.resumeProducing()
    taker.source.resumeProducing()
    turn(clock, 0.5)
    assert taker.times == [0, 0.25, 10.25, 10.5]
    assert taker.end


def test_a_short_pause_does_not_shift_the_next_event() -> None:
    """It is sent when it is due."""
    taker, clock = play(Pace(events=2, interval_s=1), pauses_at=1)
    turn(clock, 0.5)
    taker.source.resumeProducing()
    turn(clock, 0.5)
    assert taker.times == [0, 1]


def test_a_pause_with_the_last_event_still_lets_it_end() -> None:
    """The end is written by another hand."""
    taker, clock = play(Pace(events=1), pauses_at=1)
    turn(clock, 0)
    assert taker.end
    taker.source.resumeProducing()
    assert not clock.getDelayedCalls()


class Turns(Clock):
    """A clock that lets each timer wait for a turn of its own, as reactors do."""

    def pass_turn(self) -> None:
        """Ring what is due by now, and nothing that this asks for."""
        due = [call for call in self.calls if call.getTime() <= self.seconds()]
        for call in due:
            self.calls.remove(call)
            call.called = 1
            call.func()


def test_without_an_interval_there_is_one_event_a_turn() -> None:
    """Other clients have their turns between two of them."""
    clock = Turns()
    source = PacedSource(Pace(events=3, interval_s=0), clock, clock.seconds, clock.seconds)
    taker = Taker(source, clock)
    counts = []
    for _ in range(4):
        clock.pass_turn()
        counts.append(len(taker.got))
    assert counts == [1, 2, 3, 3]
    assert taker.end


def test_an_abort_leaves_nothing_behind() -> None:
    """Neither a timer nor an end."""
    taker, clock = play(Pace())
    turn(clock, 0.25)
    taker.source.abort()
    taker.source.resumeProducing()
    assert not clock.getDelayedCalls()
    turn(clock, 1)
    assert len(taker.got) == 2
    assert taker.end is None


def test_an_abort_within_the_last_event_is_no_end() -> None:
    """The client may leave while it is written."""

    class Leaving(Taker):
        def dataReceived(self, data: bytes) -> None:
            super().dataReceived(data)
            self.source.abort()

    clock = Clock()
    source = PacedSource(Pace(events=1), clock, clock.seconds, clock.seconds)
    taker = Leaving(source, clock)
    turn(clock, 0)
    assert taker.end is None


def read(query: bytes) -> Pace:
    """Return what a query asks for."""
    return pace_of(read_query(query))


def test_what_is_not_asked_for_is_usual() -> None:
    """And all of it can be asked for."""
    assert read(b"") == Pace()
    assert read(
        b"n=3&interval_ms=10&bytes=1000&format=ndjson&silence_ms=2000&silence_after=2&break_after=3"
    ) == Pace(
        events=3,
        interval_s=0.01,
        size=1000,
        form="ndjson",
        silence_s=2,
        silence_after=2,
        break_after=3,
    )


@pytest.mark.parametrize(
    ("query", "named"),
    [
        ("n=0", "n must be a whole number from 1 to 100000"),
        ("n=100001", "n must"),
        ("n=", "n must"),
        ("n=1e3", "n must"),
        ("n=-1", "n must"),
        ("n=+1", "n must"),
        ("n=1%0A", "n must"),
        ("n=%D9%A3", "n must"),
        ("n=9999999999", "n must"),
        ("interval_ms=60001", "interval_ms must be a whole number from 0 to 60000"),
        ("interval_ms=0.5", "interval_ms must"),
        ("bytes=65537", "bytes must be a whole number from 0 to 65536"),
        ("silence_ms=600001", "silence_ms must be a whole number from 0 to 600000"),
        ("n=3&silence_after=4", "silence_after must be a whole number from 1 to 3"),
        ("n=3&break_after=4", "break_after must be a whole number from 1 to 3"),
        ("break_after=0", "break_after must"),
        ("format=json", "format must be sse or ndjson"),
        ("n=1025&bytes=65536", "n times bytes"),
        ("n=62&interval_ms=60000", "interval_ms"),
        ("n=61&interval_ms=60000&silence_ms=1", "silence_ms"),
        ("x=1", "n, interval_ms, bytes, format, silence_ms, silence_after, break_after"),
        ("n=1&n=1", "once"),
        ("mark=a", "nothing else"),
    ],
)
def test_what_is_out_of_bounds_is_refused(query: str, named: str) -> None:
    """With the parameter and its range."""
    with pytest.raises(ProxyError) as raised:
        read(query.encode())
    assert (raised.value.status, raised.value.reason) == (400, "bad_query")
    assert named in raised.value.message


@pytest.mark.parametrize("query", ["n=1024&bytes=65536", "n=61&interval_ms=60000", "n=100000"])
def test_the_bounds_themselves_are_allowed(query: str) -> None:
    """As the texts say."""
    interval = "" if "interval" in query else "&interval_ms=1"
    assert read(f"{query}{interval}".encode()) != Pace()
