"""Copies that wait: in their order, few of them, and read before anybody is told anything."""

from __future__ import annotations

import pytest

from llmproxy.errors import Dialect, EndReason
from llmproxy.stream.backlog import Backlog
from llmproxy.stream.dialects import endpoint
from llmproxy.stream.tap import StreamAccumulator

SSE = b"text/event-stream"
EVENT = b'data: {"choices":[{"delta":{"content":"a"}}]}\n\n'


class Noted:
    """A reader that writes down what it reads.

    Args:
        name: its own.
        notes: what all readers have read, in order.
    """

    def __init__(self, name: str, notes: list[tuple[str, bytes]]) -> None:
        self.name = name
        self.notes = notes

    def read(self, data: bytes) -> None:
        """Write it down."""
        self.notes.append((self.name, data))


def test_all_wait_until_there_are_many_and_are_read_in_order() -> None:
    """The thirty-second copy has all of them read, whoever's they are."""
    backlog, notes = Backlog(), list[tuple[str, bytes]]()
    readers = [Noted("a", notes), Noted("b", notes)]
    fed = [(readers[i % 2], b"%d" % i) for i in range(64)]
    for count, (reader, data) in enumerate(fed, 1):
        backlog.add(reader, data)
        assert len(notes) == count // 32 * 32
    assert notes == [(reader.name, data) for reader, data in fed]


def test_a_long_one_does_not_wait() -> None:
    """What is held is short: a longer copy is read at once, behind those that waited."""
    backlog, notes = Backlog(), list[tuple[str, bytes]]()
    reader = Noted("a", notes)
    backlog.add(reader, b"x" * 4096)
    assert notes == []
    backlog.add(reader, b"y" * 4097)
    assert [len(data) for _, data in notes] == [4096, 4097]


def test_what_a_reader_adds_while_it_reads_is_read_later() -> None:
    """A copy that comes out of a reading waits as others do, and none is read twice."""
    backlog, notes = Backlog(), list[tuple[str, bytes]]()

    class Adds(Noted):
        def read(self, data: bytes) -> None:
            super().read(data)
            if data == b"first":
                backlog.add(self, b"second")

    backlog.add(Adds("a", notes), b"first")
    backlog.read()
    assert notes == [("a", b"first")]
    backlog.read()
    backlog.read()
    assert notes == [("a", b"first"), ("a", b"second")]


def two() -> tuple[StreamAccumulator, StreamAccumulator]:
    """Return two taps with one backlog."""
    row = endpoint(Dialect.OPENAI, b"/v1/chat/completions")
    assert row is not None
    backlog = Backlog()
    one = StreamAccumulator(row, content_type=SSE, capture="content", backlog=backlog)
    return one, StreamAccumulator(row, content_type=SSE, capture="content", backlog=backlog)


def test_whoever_asks_a_tap_is_told_of_what_still_waited() -> None:
    """Each thing that a tap can be asked has the copies read first."""
    marked = EVENT + b'data: {"error":{"message":"m"}}\n\ndata: [DONE]\n\ndata: [\n\n'
    for name, expected in (
        ("events", 4),
        ("has_ended", True),
        ("is_reading", True),
        ("degraded", ("unreadable",)),
        ("held_bytes", 1),
    ):
        tap, _ = two()
        tap.feed(marked)
        assert getattr(tap, name) == expected, name
    tap, _ = two()
    tap.feed(marked)
    assert tap.error is not None


@pytest.mark.parametrize("count", [1, 31, 32, 33, 100])
def test_taps_with_one_backlog_get_each_their_own(count: int) -> None:
    """However many copies come in turn, each tap has its stream whole and nothing of another's."""
    one, other = two()
    for _ in range(count):
        one.feed(EVENT)
        other.feed(EVENT.replace(b'"a"', b'"b"'))
    assert one.finish(EndReason.CLIENT_GONE).text == "a" * count
    other.feed(EVENT)
    assert other.finish(EndReason.CLIENT_GONE).text == "b" * count + "a"
