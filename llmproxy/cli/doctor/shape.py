"""From arrival times to a word: a stream streams, is held, comes in blocks, or each event is late.

Where the events say when they were sent, nothing is guessed: what counts is how late each event is
against the one that was quickest, so that the two clocks need not agree.  Where only arrivals are
known, a stream is called held only if a fast model could not have made the same picture; else the
word is ``unknown``.  ADR-0034 has the thresholds and their reasons.

Nothing here knows a socket, HTTP or a hop.
"""

from __future__ import annotations

from collections.abc import Sequence
from enum import StrEnum
from itertools import pairwise
from math import inf
from statistics import median

import msgspec

from llmproxy.cli.doctor.exchange import Event, Read, Seen

FEWEST_EVENTS = 5
"""Of fewer events nothing is said."""

LATE_S = 0.1
"""What a person notices, and more than a busy machine or a network adds for long."""

_HELD_SHARE = 0.8  # of the time that a stream took to send
_MERGED_SHARE = 0.6  # of the bursts that were sent
_SHORTEST_S = 0.4  # a paced stream that was sent within less says nothing

_TOGETHER, _ALONE = 3, 2  # most jitter lets two events meet, not three

_BURST_S = 0.02  # arrivals without sending times: closer ones are one burst
_SPREAD_S = 0.5  # a burst that lasts as long is no burst
_LONG_WAIT_S = 1.0
_ONE_GO_S = 0.02  # a held body leaves its buffer within this
_HELD_EVENTS = 8
_READ_BYTES = 16384  # a record of TLS; a plain read takes more
_BLOCK_GAP_S = 0.1
_BLOCK_EVENTS = 4
_BLOCK_BURSTS = 3
_QUICK_SHARE = 0.1  # of the time that the stream takes at the URL behind
_FIRST_EVENTS, _FIRST_BYTES = 6, 1000
_ALIKE = 0.1
_LEAST_BLOCK = 256


class Pattern(StrEnum):
    """How a stream came."""

    STREAMS = "streams"
    HELD = "held"
    """Until its end."""
    BLOCKS = "blocks"
    """Several events at a time."""
    HELD_AT_FIRST = "held_at_first"
    """The first events came together, all others one by one."""
    LATE = "late"
    """Each event came some time after it was sent."""
    UNKNOWN = "unknown"


class Shape(msgspec.Struct, frozen=True, kw_only=True):
    """How a stream came.

    Attributes:
        pattern: in a word.
        events: how many came; reads, where there are no events.
        bursts: how many times something came.
        first_s: when the first one came, since the request.
        took_s: how long it took from the first to the last one.
        longest_gap_s: the longest time between two.
        late_s: how late an event was in the middle; None where that is not known.
        latest_s: how late the latest one was.
        block_bytes: how many bytes came at a time, where that is the pattern.
        alike: whether these blocks are of one size.
        is_sure: whether sending times show it.
    """

    pattern: Pattern
    events: int = 0
    bursts: int = 0
    first_s: float | None = None
    took_s: float = 0.0
    longest_gap_s: float | None = None
    late_s: float | None = None
    latest_s: float | None = None
    block_bytes: int | None = None
    alike: bool = False
    is_sure: bool = False


def shape_of(seen: Seen, quickest: float = inf) -> Shape:
    """Return how the body of a response came.

    Args:
        quickest: the least lag of a paced event, of all exchanges with the same far end.
    """
    events = [event for event in seen.events if event.sent is not None or not seen.is_paced]
    arrivals: list[float] = [one.at for one in events or seen.reads]
    if not arrivals:
        return Shape(pattern=Pattern.UNKNOWN)
    gaps = [after - before for before, after in pairwise(arrivals)]
    pattern = _paced(seen, events, quickest) if seen.is_paced else _arrived(arrivals, seen)
    return msgspec.structs.replace(
        pattern,
        events=len(arrivals),
        first_s=arrivals[0],
        took_s=arrivals[-1] - arrivals[0],
        longest_gap_s=max(gaps, default=None),
        is_sure=seen.is_paced,
    )


def lags_of(seen: Seen) -> list[float]:
    """Return how long after it was sent each paced event came, by clocks that may disagree.

    So the figures mean something beside others of the same far end alone.  The least one is that of
    an event that nobody held; in a stream that a hop holds, there may be a single one.
    """
    return [seen.began + event.at - event.sent for event in seen.events if event.sent is not None]


def beside(shape: Shape, behind: Shape | None) -> Shape:
    """Return the shape, read once more in the light of how the stream came at the URL behind it.

    What is too quick to tell alone is held, if the same stream takes its time there.
    """
    if behind is None or shape.pattern is not Pattern.UNKNOWN or shape.events < _HELD_EVENTS:
        return shape
    takes_its_time = behind.pattern is Pattern.STREAMS and behind.took_s >= _SPREAD_S
    if takes_its_time and shape.took_s <= _QUICK_SHARE * behind.took_s:
        return msgspec.structs.replace(shape, pattern=Pattern.HELD)
    return shape


def block_of(seen: Seen) -> int | None:
    """Return the size of the pieces in which the events of a paced stream came, or None.

    A hop with a buffer of N bytes sends N bytes, wherever an event ends.  One that waits for some
    time, or for nothing, sends whole events: what it sends at a time is no block.
    """
    if len(seen.reads) < _BLOCK_BURSTS or not seen.events:
        return None
    per_event = round(seen.size / len(seen.events))
    sizes = [read.size for read in seen.reads]
    best, most = None, len(sizes) / 2
    for size in sorted({*sizes}):
        count = sum(other % size == 0 for other in sizes)  # a busy machine reads several at once
        if size >= _LEAST_BLOCK and size % per_event and count >= most:
            best, most = size, count
    return best


def taken_unread(events: Sequence[Event], stall_s: float) -> tuple[int, bool]:
    """Return how many bytes the way took while nobody read, and whether the far end then waited.

    What was sent later does not count: over a slow line, or on a busy machine, it may be much.

    Args:
        events: of a stream that is sent as fast as it is taken; after the first of them nobody read
            for ``stall_s`` seconds.
        stall_s: see there.
    """
    taken = 0
    for before, after in pairwise(events):
        taken += before.size
        if is_after(events[0], stall_s, after):
            return taken, (after.sent or 0.0) - (before.sent or 0.0) >= stall_s / 2
    return taken, False


def is_after(first: Event, stall_s: float, event: Event) -> bool:
    """Return whether an event was sent more than so many seconds after the first one."""
    return (event.sent or 0.0) - (first.sent or 0.0) > stall_s


# --- sending times are known ----------------------------------------------------------------------


def _paced(seen: Seen, events: Sequence[Event], quickest: float) -> Shape:
    sent, reads, lags = [event.sent or 0.0 for event in events], seen.reads, lags_of(seen)
    late = [lag - min(quickest, *lags) for lag in lags]
    middle = median(late)
    took = sent[-1] - sent[0]
    if len(events) < FEWEST_EVENTS or took < _SHORTEST_S:
        return Shape(pattern=Pattern.UNKNOWN, late_s=middle, latest_s=max(late))
    steps = [after - before for before, after in pairwise(sent)]
    apart = median(steps) / 4
    bursts = _bursts([event.at for event in events], apart)
    were_sent = _bursts(sent, apart)
    found = Shape(pattern=Pattern.STREAMS, bursts=len(bursts), late_s=middle, latest_s=max(late))
    if late[0] >= _HELD_SHARE * took:
        return msgspec.structs.replace(found, pattern=Pattern.HELD)
    if bursts[0] >= _TOGETHER and max(bursts[1:], default=0) <= _ALONE:
        return _in_blocks(found, bursts, _sizes(reads, apart), Pattern.HELD_AT_FIRST)
    if len(bursts) <= _MERGED_SHARE * len(were_sent):
        return _in_blocks(found, bursts, _sizes(reads, apart), Pattern.BLOCKS)
    if middle >= LATE_S:
        return msgspec.structs.replace(found, pattern=Pattern.LATE)
    return found


# --- only arrivals are known ----------------------------------------------------------------------


def _arrived(arrivals: Sequence[float], seen: Seen) -> Shape:
    bursts, sizes = _bursts(arrivals, _BURST_S), _sizes(seen.reads, _BURST_S)
    found = Shape(pattern=Pattern.STREAMS, bursts=len(bursts))
    if not seen.events or len(arrivals) < FEWEST_EVENTS:
        streams = len(bursts) >= FEWEST_EVENTS
        return found if streams else msgspec.structs.replace(found, pattern=Pattern.UNKNOWN)
    if len(bursts) == 1 and arrivals[-1] - arrivals[0] < _SPREAD_S:
        return msgspec.structs.replace(found, pattern=_in_one_go(arrivals, seen))
    starts = _starts(arrivals, _BURST_S)
    gaps = [after - before for before, after in pairwise(starts)]
    whole = bursts[:-1]  # the last one is what is left over
    if len(bursts) >= _BLOCK_BURSTS and median(gaps) >= _BLOCK_GAP_S:
        if median(whole) >= _BLOCK_EVENTS:
            return _in_blocks(found, bursts, sizes, Pattern.BLOCKS)
        together = bursts[0] >= _FIRST_EVENTS and sizes[0] >= _FIRST_BYTES
        if together and arrivals[0] >= _LONG_WAIT_S and max(bursts[1:]) <= _ALONE:
            return _in_blocks(found, bursts, sizes, Pattern.HELD_AT_FIRST)
    return found


def _in_one_go(arrivals: Sequence[float], seen: Seen) -> Pattern:
    """Return whether a stream that came at once was held, or may just have been quick.

    A model that is as quick is read in many small pieces: what leaves a buffer comes in few large
    ones.
    """
    waited = arrivals[0] >= _LONG_WAIT_S and len(arrivals) >= _HELD_EVENTS
    in_one_go = arrivals[-1] - arrivals[0] <= _ONE_GO_S
    pieces = len(seen.reads) <= 2 + seen.size // _READ_BYTES
    return Pattern.HELD if waited and in_one_go and pieces else Pattern.UNKNOWN


# --- bursts ---------------------------------------------------------------------------------------


def _bursts(times: Sequence[float], apart: float) -> list[int]:
    """Return how many came together, each time that something came."""
    counts = [1]
    for before, after in pairwise(times):
        if after - before < apart:
            counts[-1] += 1
        else:
            counts.append(1)
    return counts


def _starts(times: Sequence[float], apart: float) -> list[float]:
    """Return when each burst began."""
    starts = [times[0]]
    for before, after in pairwise(times):
        if after - before >= apart:
            starts.append(after)
    return starts


def _sizes(reads: Sequence[Read], apart: float) -> list[int]:
    """Return how many bytes came, each time that something came."""
    sizes = [reads[0].size]
    for before, after in pairwise(reads):
        if after.at - before.at < apart:
            sizes[-1] += after.size
        else:
            sizes.append(after.size)
    return sizes


def _in_blocks(
    found: Shape, bursts: Sequence[int], sizes: Sequence[int], pattern: Pattern
) -> Shape:
    """Return the shape with the size of its blocks."""
    if pattern is Pattern.HELD_AT_FIRST:
        return msgspec.structs.replace(found, pattern=pattern, block_bytes=sizes[0])
    whole = sizes[:-1] or sizes
    size = int(median(whole))
    alike = len(whole) > 1 and all(abs(one - size) <= _ALIKE * size for one in whole)
    return msgspec.structs.replace(found, pattern=pattern, block_bytes=size, alike=alike)
