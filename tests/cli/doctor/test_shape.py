"""From arrival times to a word: each picture of a stream, and its neighbours that look alike."""

from __future__ import annotations

import random

import pytest

from llmproxy.cli.doctor.exchange import Event, Read, Seen
from llmproxy.cli.doctor.shape import Pattern, block_of, shape_of, taken_unread
from tests.cli.doctor.made import SENT_AT, arrived, every, paced

HELD, STREAMS, BLOCKS = Pattern.HELD, Pattern.STREAMS, Pattern.BLOCKS
LATE, AT_FIRST, UNKNOWN = Pattern.LATE, Pattern.HELD_AT_FIRST, Pattern.UNKNOWN
ON_TIME = every(0.25, 20)


def together(count: int, times: list[float]) -> list[float]:
    """Let events wait for the last one of their group of ``count``."""
    return [times[min(len(times), at - at % count + count) - 1] for at in range(len(times))]


@pytest.mark.parametrize(
    ("arrivals", "pattern"),
    [
        pytest.param(ON_TIME, STREAMS, id="each on its own"),
        pytest.param(every(0.25, 20, late=3.0), STREAMS, id="far away: all of them late alike"),
        pytest.param([4.752] * 20, HELD, id="all at the end"),
        pytest.param([4.7 + at / 1000 for at in range(20)], HELD, id="all just before the end"),
        pytest.param([4.5] * 19 + [4.752], HELD, id="a block that is nearly the whole stream"),
        pytest.param(together(5, ON_TIME), BLOCKS, id="five at a time"),
        pytest.param(together(2, ON_TIME), BLOCKS, id="two at a time"),
        pytest.param([2.252] * 10 + ON_TIME[10:], AT_FIRST, id="the first ten together"),
        pytest.param([0.502] * 3 + ON_TIME[3:], AT_FIRST, id="the first three together"),
        pytest.param([0.252] * 2 + ON_TIME[2:], STREAMS, id="the first two together"),
        pytest.param([at + 0.2 for at in ON_TIME[:-1]] + ON_TIME[-1:], LATE, id="200 ms late"),
        pytest.param([at + 0.03 for at in ON_TIME[:-1]] + ON_TIME[-1:], STREAMS, id="30 ms late"),
        pytest.param(every(0.25, 4), UNKNOWN, id="too few events"),
        pytest.param([], UNKNOWN, id="nothing"),
    ],
)
def test_a_paced_stream(arrivals: list[float], pattern: Pattern) -> None:
    """Sending times are known: how late an event is says it, whatever the clocks say."""
    shape = shape_of(paced(arrivals))
    assert shape.pattern is pattern
    assert shape.is_sure is (len(arrivals) > 1)
    assert shape.events == len(arrivals)


def test_a_network_that_trembles_is_no_hop_that_holds() -> None:
    """Delays of up to 80 ms, each another one, do not make blocks."""
    drawn = random.Random(1)
    for _ in range(50):
        seen = paced([at + drawn.uniform(0, 0.08) for at in ON_TIME])
        assert shape_of(seen).pattern is STREAMS


def test_a_far_end_that_stutters_is_no_hop_that_holds() -> None:
    """Events that were sent together come together."""
    seen = paced(ON_TIME)
    moments = together(5, ON_TIME)
    seen.events = [Event(at + 0.01, 192, SENT_AT + at) for at in moments]
    assert shape_of(seen).pattern is STREAMS


@pytest.mark.parametrize(
    ("size", "count"), [pytest.param(1000, 5, id="1000 bytes"), pytest.param(400, 2, id="400")]
)
def test_the_size_of_blocks(size: int, count: int) -> None:
    """It is what came at a time, without what the end of the stream left over."""
    shape = shape_of(paced(together(count, ON_TIME[:-1])))
    assert (shape.block_bytes, shape.alike) == (size, True)


def test_a_block_that_comes_in_several_reads() -> None:
    """They belong together."""
    groups = together(5, ON_TIME)
    shape = shape_of(paced([at + number % 5 / 1000 for number, at in enumerate(groups)]))
    assert (shape.pattern, shape.bursts, shape.block_bytes) == (BLOCKS, 4, 1000)


def test_the_size_of_what_is_held_at_first() -> None:
    """It is all that came at once."""
    assert shape_of(paced([2.252] * 10 + ON_TIME[10:])).block_bytes == 2000


@pytest.mark.parametrize(
    ("sizes", "block"),
    [
        ([953, *[1024] * 70, 199], 1024),
        ([953, *[1024, 2048, 3072] * 12, 1024, 199], 1024),
        ([4025, *[4096] * 18, 2247], 4096),
        ([4025, *[8192, 4096] * 6, 2247], 4096),
        ([12000] * 6 + [8000], None),
        ([4000] * 12 + [8000] * 4, None),
        ([1237, 2763, 3111, 889] * 5, None),
        ([80000], None),
        ([100] * 800, None),
    ],
)
def test_the_size_of_a_buffer_by_its_reads(sizes: list[int], block: int | None) -> None:
    """Also where several blocks were read at once; what is left over at both ends may be any."""
    seen = paced(ON_TIME, size=4000)
    seen.reads = [Read(at / 100, size) for at, size in enumerate(sizes)]
    assert block_of(seen) == block


def test_a_block_is_no_multiple_of_an_event() -> None:
    """A buffer is full in the middle of an event; a hop that waits sends whole events."""
    buffered = paced(ON_TIME, size=4000)
    buffered.reads = [type(one)(one.at, 4096) for one in buffered.reads[:-1]]
    assert block_of(buffered) == 4096
    assert block_of(paced(together(3, ON_TIME), size=4000)) is None
    assert block_of(paced(ON_TIME, size=4000)) is None
    assert block_of(paced([1.0] * 20, size=4000)) is None


@pytest.mark.parametrize(
    ("seen", "pattern"),
    [
        pytest.param(arrived(every(0.03, 100)), STREAMS, id="a token every 30 ms"),
        pytest.param(arrived(every(0.3, 20, late=8.0)), STREAMS, id="a model that thinks first"),
        pytest.param(arrived([6.0] * 60), HELD, id="6 s of nothing, then all"),
        pytest.param(
            arrived([6.0] * 200, reads=[(6.0, 16384), (6.001, 16384), (6.002, 7232)]),
            HELD,
            id="all at once, in three records of TLS",
        ),
        pytest.param(
            arrived([2.0 + at / 5000 for at in range(60)]),
            UNKNOWN,
            id="a model that thinks for 2 s and writes 5000 tokens a second",
        ),
        pytest.param(arrived(every(0.001, 400)), UNKNOWN, id="quick from the start on"),
        pytest.param(arrived([0.1] * 60), UNKNOWN, id="all at once, and at once"),
        pytest.param(arrived([3.0] * 4), UNKNOWN, id="a short response after 3 s"),
        pytest.param(arrived(every(0.5, 3)), UNKNOWN, id="too few events"),
        pytest.param(
            arrived([at for at in every(0.4, 8) for _ in range(12)]), BLOCKS, id="12 at a time"
        ),
        pytest.param(
            arrived([at for at in every(0.06, 30) for _ in range(6)]),
            STREAMS,
            id="so quick that several come together: nobody sees it",
        ),
        pytest.param(
            arrived([2.0] * 20 + every(0.2, 30, late=2.2)), AT_FIRST, id="the first 20 together"
        ),
        pytest.param(
            arrived([0.5] * 3 + every(0.2, 30, late=0.7)), STREAMS, id="three to begin with"
        ),
    ],
)
def test_arrivals_alone(seen: Seen, pattern: Pattern) -> None:
    """What a fast model could have made is not called held."""
    shape = shape_of(seen)
    assert shape.pattern is pattern
    assert not shape.is_sure


def test_a_body_without_events() -> None:
    """Of a type that nobody reads here, reads are counted: many of them, apart, are a stream."""
    seen = arrived([], reads=[(at, 100) for at in every(0.2, 10)])
    assert shape_of(seen).pattern is STREAMS
    seen = arrived([], reads=[(3.0, 5000)])
    assert shape_of(seen).pattern is UNKNOWN


def test_what_is_taken_while_nobody_reads() -> None:
    """The pause in the sending times is where the way was full."""
    before = [Event(0.0, 1000, SENT_AT + at / 1000) for at in range(10)]
    after = [Event(0.0, 1000, SENT_AT + 2.1 + at / 1000) for at in range(3)]
    assert taken_unread(before + after, 2.0) == (10_000, True)
    assert taken_unread(before, 2.0) == (9_000, False)
    assert taken_unread([], 2.0) == (0, False)


def test_what_a_slow_line_took_later_does_not_count() -> None:
    """The far end did not wait, and sent a little in each second: no hop kept that."""
    steady = [Event(0.0, 1000, SENT_AT + at / 2) for at in range(20)]
    assert taken_unread(steady, 2.0) == (5_000, False)
