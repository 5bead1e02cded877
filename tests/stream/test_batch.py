"""The batch: chunks keep their order, few wait, and all are read before a report."""

from __future__ import annotations

from typing import Any

import pytest

from llmproxy.dialects.accumulated import ProviderError
from llmproxy.dialects.dialect import Dialect
from llmproxy.dialects.endpoints import endpoint
from llmproxy.errors import EndReason
from llmproxy.stream.relay import Batch, StreamStatistics
from llmproxy.stream.tap import StreamAccumulator

SSE = b"text/event-stream"
EVENT = b'data: {"choices":[{"delta":{"content":"a"}}]}\n\n'


Notes = list[tuple[str, float, bytes]]


class Noted:
    """A reader that notes what it reads.

    Args:
        name: its own.
        notes: what all readers have read, in order.
    """

    def __init__(self, name: str, notes: Notes) -> None:
        self.name = name
        self.notes = notes

    def read(self, at: float, data: bytes, start: int) -> None:
        """Note the chunk."""
        self.notes.append((self.name, at, data[start:-2] if start else data))


def test_chunks_wait_for_others_and_are_read_in_order() -> None:
    """After the thirty-second chunk all are read, of every reader."""
    batch, notes = Batch(), Notes()
    readers = [Noted("a", notes), Noted("b", notes)]
    fed = [(readers[i % 2], float(i), b"%d" % i) for i in range(64)]
    for count, (reader, at, data) in enumerate(fed, 1):
        batch.add(reader, at, data)
        assert len(notes) == count // 32 * 32
    assert notes == [(reader.name, at, data) for reader, at, data in fed]


def test_a_long_chunk_does_not_wait() -> None:
    """A long chunk is read at once, after the chunks that waited."""
    batch, notes = Batch(), Notes()
    reader = Noted("a", notes)
    batch.add(reader, 1.0, b"x" * 4096)
    assert notes == []
    batch.add(reader, 2.0, b"y" * 4097)
    assert [len(data) for _, _, data in notes] == [4096, 4097]


def test_a_chunk_that_a_reader_adds_is_read_later() -> None:
    """The new chunk waits like any other, and none is read twice."""
    batch, notes = Batch(), Notes()

    class Adds(Noted):
        def read(self, at: float, data: bytes, start: int) -> None:
            super().read(at, data, start)
            if data == b"first":
                batch.add(self, 2.0, b"second")

    batch.add(Adds("a", notes), 1.0, b"first")
    batch.read()
    assert notes == [("a", 1.0, b"first")]
    batch.read()
    batch.read()
    assert notes == [("a", 1.0, b"first"), ("a", 2.0, b"second")]


def test_an_error_in_one_reader_does_not_stop_the_others(logged_failures: Any) -> None:
    """The error is logged, and the chunks after it are read."""
    batch, notes = Batch(), Notes()

    class Fails(Noted):
        def read(self, at: float, data: bytes, start: int) -> None:
            raise ValueError(data)

    for reader in (Noted("a", notes), Fails("b", notes), Noted("c", notes)):
        batch.add(reader, 1.0, b"x")
    batch.read()
    assert [name for name, _, _ in notes] == ["a", "c"]
    assert len(logged_failures.flush(ValueError)) == 1


# --- statistics and taps with one batch -----------------------------------------------------------


class Stream:
    """A tap behind statistics, as in a relay.

    Args:
        batch: which it shares with others.
    """

    def __init__(self, batch: Batch) -> None:
        row = endpoint(Dialect.OPENAI, b"/v1/chat/completions")
        assert row is not None
        self.tap = StreamAccumulator(row, content_type=SSE, capture="content", catch_up=batch.read)
        self.gaps: list[float] = []
        self.statistics = StreamStatistics(batch, 0.0, self.gaps.append, self.tap.feed)
        self.batch = batch

    def feed(self, data: bytes, at: float = 1.0) -> None:
        """Let a chunk come."""
        self.batch.add(self.statistics, at, data)


def test_a_tap_first_reads_the_chunks_that_wait() -> None:
    """This holds for each attribute of a tap."""
    marked = EVENT + b'data: {"error":{"message":"m"}}\n\ndata: [DONE]\n\ndata: [\n\n'
    for name, expected in (
        ("events", 4),
        ("has_ended", True),
        ("is_reading", True),
        ("degraded", ("unreadable",)),
        ("held_bytes", 1),
        ("error", ProviderError(None, "m")),
    ):
        stream = Stream(Batch())
        stream.feed(marked)
        assert getattr(stream.tap, name) == expected, name


def test_statistics_first_read_the_chunks_that_wait() -> None:
    """Times, the longest gap and the last bytes are those of all chunks that have come."""
    for name, expected in (
        ("first_at", 3.0),
        ("last_at", 9.0),
        ("longest_gap", 4.0),
        ("tail", b"efgh"),
    ):
        stream = Stream(Batch())
        for data, at in ((b"ab", 3.0), (b"c", 5.0), (b"defg", 9.0), (b"h", 9.0)):
            stream.feed(data, at)
        assert getattr(stream.statistics, name) == expected, name
        assert stream.gaps == [2.0, 4.0, 0.0]


def test_a_pause_is_no_gap_while_chunks_wait() -> None:
    """The chunks before the pause are noted before the pause."""
    stream = Stream(Batch())
    stream.feed(b"a", 1.0)
    stream.feed(b"b", 2.0)
    stream.statistics.excuse(3.0, 103.0)
    stream.feed(b"c", 104.0)
    assert (stream.statistics.longest_gap, stream.gaps) == (2.0, [1.0, 2.0])


@pytest.mark.parametrize("count", [1, 31, 32, 33, 100])
def test_streams_with_one_batch_stay_apart(count: int) -> None:
    """Each tap has its whole stream, and nothing of another stream."""
    batch = Batch()
    one, other = Stream(batch), Stream(batch)
    for _ in range(count):
        one.feed(EVENT)
        other.feed(EVENT.replace(b'"a"', b'"b"'))
    assert one.tap.finish(EndReason.CLIENT_GONE).text == "a" * count
    other.feed(EVENT)
    assert other.tap.finish(EndReason.CLIENT_GONE).text == "b" * count + "a"
