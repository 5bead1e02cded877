"""The items of a JSON array: split at any point, too long, and not closed."""

from __future__ import annotations

import gzip
import json
import tracemalloc
from collections.abc import Iterable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmproxy.dialects.dialect import Dialect
from llmproxy.dialects.endpoints import endpoint
from llmproxy.errors import EndReason
from llmproxy.stream.items import Items
from llmproxy.stream.tap import Degraded, StreamAccumulator
from tests.stream.splits import drawn_split, every_split


def read(chunks: Iterable[bytes], limit: int = 1000) -> tuple[list[bytes], int, bool]:
    """Return every item in these chunks, how many were too long, and whether the array closed."""
    overlong: list[None] = []
    framing = Items(limit, lambda: overlong.append(None))
    events = [event for chunk in chunks for event in framing.feed(chunk)]
    assert framing.held_bytes <= limit + 1
    events += framing.flush()
    assert framing.held_bytes == 0
    return [data for name, data in events if name is None], len(overlong), framing.is_closed


@pytest.mark.parametrize(
    ("body", "items", "is_closed"),
    [
        (b"[]", [], True),
        (b'[{"a":1}]', [b'{"a":1}'], True),
        (b'\xef\xbb\xbf \n[{"a":1}\n,\r\n{"b":[{}]}\n]\n', [b'{"a":1}', b'{"b":[{}]}'], True),
        (b'[{"a":"}]\\"{,"}]', [b'{"a":"}]\\"{,"}'], True),
        (b'[{"a":"\\\\"},{"b":""}]', [b'{"a":"\\\\"}', b'{"b":""}'], True),
        (b'[1,"{",null,[{}],{}]', [b"[{}]", b"{}"], True),
        (b"[{}", [b"{}"], False),
        (b'[{"a":1},{"b', [b'{"a":1}', b'{"b'], False),
        (b"[{}]]}{}[{}]", [b"{}"], True),
        (b"}", [], True),
        (b"", [], False),
    ],
)
def test_the_items_of_an_array(body: bytes, items: list[bytes], is_closed: bool) -> None:
    """Brackets inside strings are text, and nothing behind the end counts."""
    for chunks in ([body], *every_split(body)):
        assert read(chunks) == (items, 0, is_closed)


JSON = st.recursive(
    st.none() | st.integers() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner),
    max_leaves=8,
)


@given(
    st.lists(st.dictionaries(st.text(max_size=4), JSON, max_size=3), max_size=4),
    st.sampled_from([None, 2]),
    st.booleans(),
    st.data(),
)
def test_items_are_what_a_reader_of_json_finds(
    array: list[Any], indent: int | None, ascii_: bool, data: st.DataObject
) -> None:
    """This holds for every array of objects, however it is written and split."""
    body = json.dumps(array, indent=indent, ensure_ascii=ascii_).encode()
    items, overlong, is_closed = read(drawn_split(data, body), limit=100_000)
    assert ([json.loads(item) for item in items], overlong, is_closed) == (array, 0, True)


def test_an_item_that_is_too_long_is_dropped() -> None:
    """Those around it are read, split at any point."""
    body = b'[{"a":1},{"long":"%b"},{"b":2},{"%b":[{}]}]' % (b"x" * 30, b"y" * 30)
    for chunks in ([body], *every_split(body)):
        assert read(chunks, limit=20) == ([b'{"a":1}', b'{"b":2}'], 2, True)


def test_an_endless_item_takes_no_memory() -> None:
    """Ten megabytes of strings and brackets are passed over."""
    overlong: list[None] = []
    framing = Items(10_000, lambda: overlong.append(None))
    framing.feed(b'[{"a":[')
    piece = b'{"b":"' + b"x" * 60_000 + b'"},'
    tracemalloc.start()
    try:
        for _ in range(170):
            assert framing.feed(piece) == []
            assert framing.held_bytes <= 10_001
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 500_000
    assert len(overlong) == 1
    assert framing.feed(b'{}]},{"c":1}') == [(None, b'{"c":1}')]


def test_an_item_in_many_pieces_is_searched_once() -> None:
    """A string of a hundred kilobytes comes byte by byte, and no part is looked at again."""
    framing = Items(1024**2, lambda: None)
    framing.feed(b'[{"a":"')
    for _ in range(100_000):
        framing.feed(b"x")
    # What is looked at next begins behind all of them.
    assert framing._at == framing.held_bytes > 100_000
    assert [data for _, data in framing.feed(b'"}')] == [b'{"a":"' + b"x" * 100_000 + b'"}']


def test_brackets_count_as_work() -> None:
    """A compressed array of brackets asks for more of the reactor than its bytes say."""
    row = endpoint(Dialect.GEMINI, b"/v1beta/models/m:streamGenerateContent")
    assert row is not None
    body = b"[{" + b'"a":[],' * 100_000 + b'"b":[]}]'
    tap = StreamAccumulator(
        row, content_type=b"application/json", content_encoding=b"gzip", event=1024**2
    )
    tap.feed(gzip.compress(body))
    assert tap.finish(EndReason.COMPLETE).degraded == (Degraded.BOMB,)
