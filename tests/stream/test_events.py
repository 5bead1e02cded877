"""Events: the formats, split at any point, and events that are too long."""

from __future__ import annotations

import tracemalloc
from collections.abc import Callable, Iterable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmproxy.stream.events import Blocks, Event, Framing, Lines, ServerSentEvents
from tests.stream.splits import drawn_split, every_split

Make = Callable[[int, Callable[[], None]], Framing]
MAKERS: list[Make] = [ServerSentEvents, Lines]


def sse(chunks: Iterable[bytes], limit: int = 1000) -> list[Event]:
    """Return every event in these chunks, with the one that the end completes."""
    return read(ServerSentEvents, chunks, limit)[0]


def read(make: Make, chunks: Iterable[bytes], limit: int) -> tuple[list[Event], int]:
    """Return every event in these chunks, and how many were too long."""
    overlong: list[None] = []
    framing = make(limit, lambda: overlong.append(None))
    events = [event for chunk in chunks for event in framing.feed(chunk)]
    events += framing.flush()
    assert framing.held_bytes == 0
    return events, len(overlong)


def slowly(body: bytes) -> list[Event]:
    """Return the events of a body by the letter of the standard, slowly."""
    lines = body.removeprefix(b"\xef\xbb\xbf").replace(b"\r\n", b"\n").replace(b"\r", b"\n")
    events: list[Event] = []
    data: list[bytes] = []
    name: bytes | None = None
    for line in [*lines.split(b"\n"), b""]:
        field, _, value = line.partition(b":")
        value = value.removeprefix(b" ")
        if not line:
            if data:
                events.append((name, b"\n".join(data)))
            data, name = [], None
        elif field == b"data":
            data.append(value)
        elif field == b"event":
            name = value or None
    return events


# --- server-sent events ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("body", "events"),
    [
        (b"data: x\n\n", [(None, b"x")]),
        (b"data:x\n\n", [(None, b"x")]),
        (b"data:  x \n\n", [(None, b" x ")]),
        (b"data\n\n", [(None, b"")]),
        (b"data: x\r\rdata: y\r\n\r\n", [(None, b"x"), (None, b"y")]),
        (b"data: x\r\n\ndata: y\n\r\n", [(None, b"x"), (None, b"y")]),
        (b"\xef\xbb\xbfdata: x\n\n", [(None, b"x")]),
        (b"\xef\xbb\xbf\n\ndata: x\n\n", [(None, b"x")]),
        (b"\n\xef\xbb\xbfdata: x\n\n", []),
        (b": comment\n\ndata: x\n\n", [(None, b"x")]),
        (b": a\ndata: x\n: b\n\n", [(None, b"x")]),
        (b"event: e\ndata: x\n\n", [(b"e", b"x")]),
        (b"data: x\nevent: e\n\n", [(b"e", b"x")]),
        (b"event:\ndata: x\n\n", [(None, b"x")]),
        (b"event: e\n\ndata: x\n\n", [(None, b"x")]),
        (b"id: 7\nretry: 5\nevent: e\ndata: x\n\n", [(b"e", b"x")]),
        (b"data: x\ndata:\ndata: z\n\n", [(None, b"x\n\nz")]),
        (b"database: x\n data: y\nDATA: z\n\n", []),
        (b"data: x", [(None, b"x")]),
        (b"data: x\n", [(None, b"x")]),
        (b"data: x\r", [(None, b"x")]),
        (b"\n\n\ndata: x\n\n\n\n\n", [(None, b"x")]),
        (b"", []),
        (b"\xef\xbb", []),
    ],
)
def test_server_sent_events_follow_the_standard(body: bytes, events: list[Event]) -> None:
    """Line ends, marks, comments, fields and blank lines are read, split at any point."""
    for chunks in every_split(body):
        assert sse(chunks) == events


PIECES = st.sampled_from(
    [b"\n", b"\r", b"\r\n", b"data: ", b"data:", b"event: ", b"id: 1", b": ", b"x", b"\xef\xbb\xbf"]
)


@given(st.lists(PIECES, max_size=30), st.data())
def test_any_lines_follow_the_standard(pieces: list[bytes], data: st.DataObject) -> None:
    """A plain reader of the whole finds the same events."""
    body = b"".join(pieces)
    assert sse(drawn_split(data, body)) == slowly(body)


def test_whole_events_are_read_like_one_piece() -> None:
    """The short way for a whole event finds the same, carriage returns included."""
    events = [b"data: a\n\n", b"event: e\ndata: b\n\n", b"data: c\rdata: d\n\n", b"data: e\n\n"]
    assert sse(events) == sse([b"".join(events)]) == slowly(b"".join(events))


# --- lines ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("body", "lines"),
    [
        (b'{"a":1}\n{"b":2}\n', [b'{"a":1}', b'{"b":2}']),
        (b'{"a":1}\r\n\r\n \n{"b":2}', [b'{"a":1}', b'{"b":2}']),
        (b"\n\n", []),
        (b"", []),
    ],
)
def test_each_line_is_an_event(body: bytes, lines: list[bytes]) -> None:
    """The last line needs no end, and a blank line is no event."""
    for chunks in every_split(body):
        events, _ = read(Lines, chunks, 1000)
        assert [data.strip() for _, data in events] == lines


# --- what is too long -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "body", "kept"),
    [
        (ServerSentEvents, b"data: %s\n\ndata: next\n\n", b"next"),
        (ServerSentEvents, b"data: %s\r\n\r\ndata: next\n\n", b"next"),
        (ServerSentEvents, b"\n\ndata: %s\n\ndata: next", b"next"),
        (Lines, b"data: %s\nnext\n", b"next"),
    ],
)
def test_an_overlong_event_is_left_out(make: Make, body: bytes, kept: bytes) -> None:
    """One byte over the limit, the event is dropped and reported; the next one is read."""
    for size, overlong in ((94, 0), (95, 1), (300, 1)):
        whole = body % (b"x" * size)
        for chunks in every_split(whole):
            events, reported = read(make, chunks, 100)
            assert reported == overlong
            assert [data.strip() for _, data in events][-1] == kept
            assert len(events) == 2 - overlong


class Counted(bytearray):
    """Pending bytes that count the searched bytes."""

    searched = 0

    def rfind(self, sub: bytes, start: int = 0) -> int:  # type: ignore[override]  # as it is used
        """Search from ``start``."""
        self.searched += len(self) - start
        return super().rfind(sub, start)


@pytest.mark.parametrize("delimiter", [b"\n", b"\n\n"])
def test_an_endless_event_costs_linear_time_and_no_memory(delimiter: bytes) -> None:
    """In 100 MB without a boundary, no byte is searched twice or held beyond the limit."""
    overlong: list[None] = []
    blocks = Blocks(delimiter, 1024**2, lambda: overlong.append(None))
    pending = blocks._pending = Counted()
    chunk = b"x" * 65536
    tracemalloc.start()
    try:
        for _ in range(100 * 1024**2 // len(chunk)):
            assert blocks.feed(chunk) == []
            assert blocks.held_bytes <= 1024**2
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert len(overlong) == 1
    assert peak < 4 * 1024**2
    assert pending.searched <= 1024**2 + 20 * len(chunk)
    assert blocks.feed(delimiter + b"y" + delimiter) == [b"y"]


def test_an_event_byte_by_byte_is_searched_once() -> None:
    """Small pieces do not repeat the search."""
    blocks = Blocks(b"\n\n", 10**6, lambda: None)
    pending = blocks._pending = Counted()
    for _ in range(20_000):
        blocks.feed(b"x")
    assert pending.searched <= 2 * 20_000


@pytest.mark.parametrize("make", MAKERS)
@pytest.mark.parametrize("body", [b"\r", b"\n", b"\r\n", b"x\n", b"data:\n\n", b":\n", b"\n\nx"])
def test_endless_small_pieces_leave_nothing_behind(make: Make, body: bytes) -> None:
    """Millions of them hold no more than the limit."""
    framing = make(1000, lambda: None)
    chunk = body * (65536 // len(body))
    tracemalloc.start()
    try:
        for _ in range(16):
            framing.feed(chunk)
            assert framing.held_bytes <= 1001
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 16 * 1024**2


_MARKS = st.sampled_from([b"data:", b"event: ", b"x", b"{}", b"\n", b"\n\n", b"\r", b"x" * 35])


@given(st.lists(st.binary(max_size=50) | _MARKS, max_size=20), st.sampled_from(MAKERS))
def test_garbage_raises_nothing(chunks: list[bytes], make: Make) -> None:
    """Any bytes are events or none, and nothing exceeds the limit."""
    framing = make(40, lambda: None)
    for chunk in chunks:
        for _, data in framing.feed(chunk):
            assert len(data) <= 40
        assert framing.held_bytes <= 41
    framing.flush()
