"""A response in one piece, and the two ends of one that is too long to be held."""

from __future__ import annotations

import json
import tracemalloc
from collections.abc import Iterable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmproxy.stream.document import Document
from tests.stream.splits import drawn_split

USAGE = {"prompt_tokens": 1, "details": {"z": [1, 2, '"],}']}}
BEFORE: dict[str, Any] = {"id": "i", 'mo"de:l': "m", "fingerprint": {"a": ',"b":'}}
MIDDLE = [{"i": i, "e": [0.1] * 10, "s": 'a\\"]},"usage":{', "n": [[{}]]} for i in range(300)]
AFTER: dict[str, Any] = {"usage": USAGE, "n": 5}
LONG: dict[str, Any] = {**BEFORE, "data": MIDDLE, **AFTER}


def read(chunks: Iterable[bytes], limit: int) -> tuple[bytes | None, int]:
    """Return the document at the end, and how often it was reported as overlong."""
    overlong: list[None] = []
    document = Document(limit, lambda: overlong.append(None))
    for chunk in chunks:
        assert document.feed(chunk) == ()
        assert document.held_bytes <= limit
    events = [data for _, data in document.flush()]
    assert document.held_bytes == 0
    return (events[0] if events else None), len(overlong)


def test_a_short_document_is_held_unchanged() -> None:
    """Only a byte order mark is removed."""
    assert read([b"\xef\xbb\xbf{ ", b'"a" : 1}\n'], 20) == (b'{ "a" : 1}\n', 0)
    assert read([b""], 20) == (None, 0)


@pytest.mark.parametrize("size", [1, 2, 7, 1000, 10**6])
@pytest.mark.parametrize("indent", [None, 1])
def test_the_ends_of_a_long_document_are_found(size: int, indent: int | None) -> None:
    """The members before and after a long middle are there, whatever the chunks."""
    body = json.dumps(LONG, indent=indent).encode()
    found, overlong = read((body[at : at + size] for at in range(0, len(body), size)), 17_000)
    assert found is not None
    assert (json.loads(found), overlong) == ({**BEFORE, **AFTER}, 1)


@pytest.mark.parametrize("long", [{"data": MIDDLE, **AFTER}, {**BEFORE, "data": MIDDLE}])
def test_a_long_document_may_have_one_end_only(long: dict[str, Any]) -> None:
    """The long value may be the first or the last member."""
    found, _ = read([json.dumps(long).encode()], 17_000)
    assert found is not None
    assert json.loads(found) == {name: value for name, value in long.items() if name != "data"}


def test_a_piece_longer_than_the_held_end_leaves_no_gap() -> None:
    """The bytes held before are not joined to the end of the piece."""
    last = b'"some' + b"." * 15 + b'name":"' + b"." * 15 + b'"}'
    body = b'{"x":"' + b"." * 400 + b'",' + last
    for cut in range(261, len(body)):
        assert read([body[:cut], body[cut:]], 260) == (b"{" + last, 1)


def test_text_is_not_taken_for_a_member() -> None:
    """A long text may quote the end of a document."""
    text = 'x","usage":{"prompt_tokens":7}}' * 2000
    found, _ = read([json.dumps({"a": 1, "text": text, "b": 2}).encode()], 17_000)
    assert found is not None
    assert json.loads(found) == {"a": 1, "b": 2}


def test_the_usage_after_ten_megabytes_is_found() -> None:
    """No more than the limit is held meanwhile."""
    vector = b'{"object":"embedding","embedding":[' + b",".join([b"0.0123456"] * 1536) + b"]}"

    def chunks() -> Iterable[bytes]:
        yield b'{"data":['
        for _ in range(640):
            yield vector + b","
        yield vector + b'],"usage":{"prompt_tokens":9}}'

    tracemalloc.start()
    try:
        found = read(chunks(), 100_000)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert found == (b'{"usage":{"prompt_tokens":9}}', 1)
    assert peak < 1024**2


def test_what_is_no_object() -> None:
    """Of a long array, or of an object that never ends, no JSON is left."""
    assert read([b"[" + b'"a",' * 1000 + b"1]"], 1000) == (b"{", 1)
    assert read([b'{"a":[' + b"1," * 1000], 1000) == (b"{", 1)


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=30),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner),
    max_leaves=20,
)


@given(st.dictionaries(st.text(max_size=5), VALUES, min_size=1), st.data())
def test_no_member_is_made_up(members: dict[str, Any], data: st.DataObject) -> None:
    """The members that are found were there, in their order, whatever the chunks."""
    body = json.dumps(members, ensure_ascii=data.draw(st.booleans())).encode()
    limit = data.draw(st.integers(1, len(body)))
    found, _ = read(drawn_split(data, body), limit)
    if found != b"{":
        assert found is not None
        kept = json.loads(found)
        assert list(kept) == [name for name in members if name in kept]
        assert all(kept[name] == members[name] for name in kept)


@given(st.lists(st.text('{}[]",:\\ a', max_size=20), max_size=20))
def test_garbage_raises_nothing(pieces: list[str]) -> None:
    """Bytes that are not JSON are not held beyond the limit."""
    read((piece.encode() for piece in pieces), 10)
