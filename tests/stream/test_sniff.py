"""The first bytes of a body say how it is framed; the content type, only if they do not."""

from __future__ import annotations

import gzip
import os
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmproxy.dialects.dialect import Dialect
from llmproxy.dialects.endpoints import endpoint
from llmproxy.errors import EndReason
from llmproxy.stream.document import Document
from llmproxy.stream.events import Framing, Lines, ServerSentEvents
from llmproxy.stream.sniff import Sniffer
from llmproxy.stream.tap import Result, StreamAccumulator
from tests.support.golden import BY_FILE, CONTENT_TYPES, RECORDED, GoldenStream

TYPES = (None, b"text/plain; charset=utf-8", b"application/octet-stream", *CONTENT_TYPES.values())


class Chosen:
    """Notes what a sniffer chose."""

    def __init__(self, content_type: bytes | None, *, has_lines: bool = False) -> None:
        self.framings: list[Framing | None] = []
        self.events: list[bytes] = []
        self.sniffer = Sniffer(
            content_type, 1000, lambda: None, self.framings.append, has_lines=has_lines
        )

    def feed(self, *chunks: bytes) -> type | None:
        """Return the class of what was chosen; None while nothing was."""
        for data in chunks:
            self.events += [event for _, event in self.sniffer.feed(data)]
        return self.kind

    @property
    def kind(self) -> type | None:
        """The class of what was chosen."""
        return type(self.framings[0]) if self.framings else None


@pytest.mark.parametrize("content_type", TYPES)
@pytest.mark.parametrize("one", RECORDED, ids=lambda one: one.file)
def test_a_recording_is_read_whatever_it_is_called(
    one: GoldenStream, content_type: bytes | None
) -> None:
    """Each recording gives the same result, in one piece and byte by byte."""
    assert one.read([one.data], content_type=content_type) == one.result
    bytes_ = [one.data[at : at + 1] for at in range(len(one.data))]
    assert one.read(bytes_, content_type=content_type) == one.result


@pytest.mark.parametrize(
    ("data", "kind"),
    [
        (b"data: x\n\n", ServerSentEvents),
        (b"event: x\n", ServerSentEvents),
        (b"id\n", ServerSentEvents),
        (b"retry: 3\n", ServerSentEvents),
        (b": PROCESSING\n\n", ServerSentEvents),
        (b"\n\n\xef\xbb\xbf", None),
        (b"\xef\xbb\xbfdata: x", ServerSentEvents),
        (b"\xef\xbb\xbf\r\n {", Document),
        (b"  \n\n{", Document),
        (b"[", Document),
        (b"dat", None),
        (b"database", type(None)),
        (b"<html><body>", type(None)),
        (b"ID3\x04\x00\x00\x00", type(None)),
    ],
)
def test_the_first_bytes_decide(data: bytes, kind: type | None) -> None:
    """Blanks and a byte order mark may stand before them."""
    assert Chosen(None).feed(data) is kind
    assert Chosen(None).feed(*(data[at : at + 1] for at in range(len(data)))) is kind


@pytest.mark.parametrize(
    ("content_type", "kind"),
    [
        (b"text/event-stream", ServerSentEvents),
        (b"application/x-ndjson", Lines),
        (b"application/json", Document),
        (b"text/plain", type(None)),
        (None, type(None)),
    ],
)
def test_else_the_content_type_decides(content_type: bytes | None, kind: type) -> None:
    """Bytes that begin in no known way, and no bytes at all."""
    assert Chosen(content_type).feed(b"error: what") is kind
    empty = Chosen(content_type)
    assert empty.sniffer.flush() == []
    assert empty.kind is kind


@pytest.mark.parametrize(
    ("content_type", "data", "kind"),
    [
        (None, b'{"done":false}\n', Lines),
        (b"application/json", b'{"done":false}\n{', Lines),
        (b"text/event-stream", b'{"done":false}\n', Lines),
        (None, b'{"done":', None),
        (None, b'{\n "done":', Document),
        (None, b'{"a":"' + b"x" * 1000, Document),
        (b"application/x-ndjson", b'{"done":', None),
        (b"application/x-ndjson", b'{\n "error": "x"', Document),
        (None, b'{"logprobs":NaN}\r\n', Lines),
    ],
)
def test_lines_of_json(content_type: bytes | None, data: bytes, kind: type | None) -> None:
    """Where an endpoint streams lines, the first line says whether it is one."""
    assert Chosen(content_type, has_lines=True).feed(data) is kind


def test_blank_lines_are_not_held() -> None:
    """A provider may send them for hours before it responds."""
    chosen = Chosen(None)
    chosen.feed(*[b"\r\n  \n" * 1000] * 10)
    assert (chosen.kind, chosen.sniffer.held_bytes) == (None, 0)


def test_a_body_that_is_not_read_costs_nothing() -> None:
    """The tap reads no more, and is not degraded."""
    tap = tap_of(b"text/html")
    assert tap.is_reading
    tap.feed(b"<html>")
    tap.feed(b"<body>")
    assert (tap.is_reading, tap.held_bytes) == (False, 0)
    result = tap.finish(EndReason.COMPLETE)
    assert (result.is_complete, result.degraded) == (True, ())


def test_nothing_is_decompressed_that_is_not_read() -> None:
    """Whatever follows in the same read."""
    tap = tap_of(b"text/html", content_encoding=b"gzip")
    tap.feed(gzip.compress(b"<html>" + os.urandom(200_000)) + b"garbage")
    assert (tap.is_reading, tap.degraded) == (False, ())


def tap_of(content_type: bytes | None, **options: Any) -> StreamAccumulator:
    """Return a tap for chat completions."""
    row = endpoint(Dialect.OPENAI, b"/v1/chat/completions")
    assert row is not None
    return StreamAccumulator(row, content_type=content_type, **options)


def read(data: bytes, content_type: bytes | None, **options: Any) -> Result:
    """Return the result of a whole body."""
    tap = tap_of(content_type, **options)
    tap.feed(data)
    return tap.finish(EndReason.COMPLETE)


def test_an_error_where_a_stream_was_announced() -> None:
    """A server may begin a stream and then send its error in one piece."""
    result = read(b'{"error":{"message":"m"}}', b"text/event-stream")
    assert result.end_reason is EndReason.UPSTREAM_FAILED


def test_a_stream_without_its_type_must_end() -> None:
    """It is unfinished without its marker, as any other stream is."""
    data = BY_FILE["openai-chat.sse"].data
    assert read(data, b"text/plain").is_complete
    assert read(data.replace(b"data: [DONE]", b""), None).end_reason is EndReason.UNFINISHED


@given(st.sampled_from(TYPES), st.booleans(), st.lists(st.binary(max_size=9), max_size=9))
def test_nothing_is_lost_on_the_way(
    content_type: bytes | None, has_lines: bool, chunks: list[bytes]
) -> None:
    """What a sniffer gives is what the framing that it chose would have given."""
    chosen = Chosen(content_type, has_lines=has_lines)
    chosen.feed(*chunks)
    events = chosen.events + [event for _, event in chosen.sniffer.flush()]
    (framing,) = chosen.framings
    if framing is None:
        assert events == []
        return
    plain = type(framing)(1000, lambda: None)  # type: ignore[call-arg]  # every one has these two
    data = b"".join(chunks)
    expected = [*plain.feed(data), *plain.flush()]
    assert [one.strip() for one in events] == [one.strip() for _, one in expected]
