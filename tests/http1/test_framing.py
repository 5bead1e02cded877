"""Bodies: how heads frame them, and the chunked coding split at any point."""

from __future__ import annotations

import gc
import tracemalloc

import h11
import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmproxy.http1.framing import (
    LAST_CHUNK,
    MAX_TRAILER,
    BodyReader,
    ChunkedReader,
    LengthReader,
    chunk,
    request_body,
    response_body,
)
from llmproxy.http1.grammar import (
    MAX_LINE,
    BadMessage,
    first_values,
    parse_fields,
    parse_request_head,
)

# --- how a head frames a body ---------------------------------------------------------------------


def body_of(*fields: bytes, version: bytes = b"1.1") -> BodyReader:
    """Return the reader of the body behind a head with these fields."""
    lines = [b"POST / HTTP/" + version, b"Host: h", *fields]
    return request_body(parse_request_head(b"\r\n".join(lines)))


def test_request_bodies_are_framed_by_their_heads() -> None:
    """Chunks, a length, or no body; the end of the connection never frames a request's body."""
    assert isinstance(body_of(b"Transfer-Encoding: Chunked"), ChunkedReader)
    for fields, left in (([], 0), ([b"Content-Length: 0"], 0), ([b"Content-Length: 7"], 7)):
        reader = body_of(*fields)
        assert isinstance(reader, LengthReader)
        assert (reader.left, reader.done) == (left, left == 0)


@pytest.mark.parametrize(
    ("fields", "version", "status"),
    [
        ([b"Content-Length: 5", b"Transfer-Encoding: chunked"], b"1.1", 400),
        ([b"Content-Length: 5", b"Transfer-Encoding: identity"], b"1.1", 400),
        ([b"Content-Length: 5", b"Content-Length: 5"], b"1.1", 400),
        ([b"Content-Length: " + b"9" * 5000], b"1.1", 400),
        ([b"Content-Length: +5"], b"1.1", 400),
        ([b"Transfer-Encoding: chunked"], b"1.0", 400),
        ([b"Transfer-Encoding: identity"], b"1.1", 501),
        ([b"Transfer-Encoding: gzip, chunked"], b"1.1", 501),
        ([b"Transfer-Encoding: chunked, chunked"], b"1.1", 501),
        ([b"Transfer-Encoding: chunked", b"Transfer-Encoding: chunked"], b"1.1", 501),
        ([b"Transfer-Encoding: xchunked"], b"1.1", 501),
        ([b"Transfer-Encoding:"], b"1.1", 501),
    ],
)
def test_strange_framing_is_refused(fields: list[bytes], version: bytes, status: int) -> None:
    """Two framings, or an unknown one, have no common reading."""
    with pytest.raises(BadMessage) as caught:
        body_of(*fields, version=version)

    assert caught.value.status == status


def response_of(
    *fields: bytes, status: int = 200, method: bytes = b"GET", minor: int = 1
) -> tuple[BodyReader, int | None]:
    """Return the reader of the body behind a response's head, and its length."""
    read = parse_fields(list(fields))
    return response_body(method, status, minor, read, first_values(read))


def test_response_bodies_are_framed_by_their_heads() -> None:
    """Chunks, a length, or the end of the connection."""
    reader, length = response_of(b"Transfer-Encoding: Chunked")
    assert isinstance(reader, ChunkedReader)
    assert length is None
    for fields, left in (([], None), ([b"Content-Length: 0"], 0), ([b"Content-Length: 7"], 7)):
        reader, length = response_of(*fields)
        assert isinstance(reader, LengthReader)
        assert (reader.left, reader.done, length) == (left, left == 0, left)


@pytest.mark.parametrize("fields", [[], [b"Content-Length: 7"], [b"Transfer-Encoding: chunked"]])
@pytest.mark.parametrize(("method", "status"), [(b"HEAD", 200), (b"GET", 204), (b"POST", 304)])
def test_some_responses_have_no_body(fields: list[bytes], method: bytes, status: int) -> None:
    """Whatever the head announces, there is no body; an announced length is known."""
    reader, length = response_of(*fields, status=status, method=method)
    assert reader.done
    assert length == (7 if fields == [b"Content-Length: 7"] else None)


@pytest.mark.parametrize(
    ("fields", "minor", "status"),
    [
        ([b"Content-Length: 5", b"Transfer-Encoding: chunked"], 1, 200),
        ([b"Content-Length: 5", b"Transfer-Encoding: chunked"], 1, 204),
        ([b"Content-Length: 5", b"Content-Length: 5"], 1, 200),
        ([b"Transfer-Encoding: chunked"], 0, 200),
        ([b"Transfer-Encoding: identity"], 1, 200),
        ([b"Transfer-Encoding: gzip, chunked"], 1, 304),
        ([b"Transfer-Encoding: chunked"], 1, 103),
    ],
)
def test_strange_framing_of_a_response_is_refused(
    fields: list[bytes], minor: int, status: int
) -> None:
    """It is refused also if the response would have no body."""
    with pytest.raises(BadMessage):
        response_of(*fields, minor=minor, status=status)


# --- the chunked coding ---------------------------------------------------------------------------


def read(*reads: bytes) -> tuple[bytes, ChunkedReader]:
    """Feed a reader and return all content, with the reader."""
    reader = ChunkedReader()
    return b"".join([reader.feed(data) for data in reads]), reader


def refused(*reads: bytes) -> bool:
    """Tell whether a reader refuses these reads."""
    reader = read(*reads)[1]
    return reader.error is not None and not reader.done


WIRE = b'5\r\nhello\r\n00A; x="y;z"\r\n 123456789\r\n1;\tq\r\n!\r\n0\r\nT: v\r\nu:\r\n\r\n'
CONTENT = b"hello 123456789!"


def test_a_chunked_body_may_be_split_at_any_two_points() -> None:
    """Content and end are the same, and bytes behind the end are no content."""
    for first in range(len(WIRE) + 1):
        for second in range(first, len(WIRE) + 1):
            reads = WIRE[:first], WIRE[first:second], WIRE[second:] + b"HTTP/1.1"
            content, reader = read(*reads)
            assert (content, reader.done, reader.extra) == (CONTENT, True, b"HTTP/1.1")


def test_a_chunked_body_is_read_byte_by_byte() -> None:
    """The end is known with its last byte, and not before."""
    reader = ChunkedReader()
    content = b""
    for at in range(len(WIRE)):
        assert not reader.done
        content += reader.feed(WIRE[at : at + 1])

    assert (content, reader.done) == (CONTENT, True)


def test_the_content_of_one_read_is_one_piece() -> None:
    """The chunks of one read are joined; a read without content returns none."""
    reader = ChunkedReader()

    assert reader.feed(b"1\r\na\r\n2\r\nbc\r\n3\r\nd") == b"abcd"
    assert reader.feed(b"ef\r\n") == b"ef"
    assert reader.feed(b"0\r\n\r\n") == b""


@pytest.mark.parametrize(
    "form",
    [b"%x\r\n", b"%X\r\n", b"0%x\r\n", b"%x;e\r\n", b"%x \t;e\r\n", b"0" * 40 + b"%x\r\n"],
)
def test_a_read_of_one_chunk_is_that_chunk(form: bytes) -> None:
    """A chunk that comes alone has the length that it announces, in any form."""
    edges = [16**digits + around for digits in range(1, 5) for around in range(-10, 11)]
    for size in {*range(1, 40), *(edge for edge in edges if edge > 0)}:
        whole = form % size + bytes(size) + b"\r\n"
        reader = ChunkedReader()
        assert (reader.feed(whole), reader.error) == (bytes(size), None), size
        assert refused(form % size + bytes(size + 1) + b"\r\n"), size
        content, reader = read(form % size + bytes(size - 1) + b"\r\n")
        assert (len(content), reader.error is None) == (size, False), size


HEAD = b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n"
TOKENS = st.text("abcXYZ0129!#$%&'*+-.^_`|~", min_size=1, max_size=8)
EXTENSIONS = st.lists(st.tuples(TOKENS, TOKENS), max_size=2).map(
    lambda pairs: "".join(f";{name}={value}" for name, value in pairs).encode()
)


@given(
    st.lists(st.tuples(st.binary(min_size=1, max_size=300), EXTENSIONS, st.booleans()), max_size=5),
    st.lists(st.tuples(TOKENS, TOKENS), max_size=3),
    st.data(),
)
def test_valid_bodies_are_read_as_h11_reads_them(
    pieces: list[tuple[bytes, bytes, bool]], trailers: list[tuple[str, str]], data: st.DataObject
) -> None:
    """Sizes in either case, extensions, trailers, and chunks of our own writer are all read."""
    wire = b""
    for piece, extension, upper in pieces:
        if extension or upper:
            size = b"%X" % len(piece) if upper else b"%x" % len(piece)
            wire += size + extension + b"\r\n" + piece + b"\r\n"
        else:
            wire += chunk(piece)
    names = "".join(f"x{name}: {value}\r\n" for name, value in trailers)
    wire += b"0\r\n" + names.encode() + b"\r\n" if names else LAST_CHUNK
    cuts = sorted(data.draw(st.lists(st.integers(0, len(wire)), max_size=8)))
    reads = [wire[a:b] for a, b in zip([0, *cuts], [*cuts, len(wire)], strict=True)]
    content, reader = read(*reads)

    assert (content, reader.done, reader.extra) == (_as_h11_reads(wire), True, b"")
    assert content == b"".join(piece for piece, _, _ in pieces)


def _as_h11_reads(wire: bytes) -> bytes:
    peer = h11.Connection(h11.CLIENT)
    peer.send(h11.Request(method="GET", target="/", headers=[("host", "h")]))
    peer.send(h11.EndOfMessage())
    peer.receive_data(HEAD + wire)
    content = b""
    while not isinstance(event := peer.next_event(), h11.EndOfMessage):
        assert event is not h11.NEED_DATA
        if isinstance(event, h11.Data):
            content += event.data
    return content


BROKEN = [
    b"5\nhello\r\n0\r\n\r\n",  # a bare LF
    b"5\r\nhello\n0\r\n\r\n",
    b"5\r\nhello\r\n0\n\r\n",
    b"5\r\nhello\r\n0\r\n\nx\r\n\r\n",
    b"5\rhello\r\n0\r\n\r\n",
    b"+5\r\nhello\r\n",  # no plain number
    b"-5\r\nhello\r\n",
    b"0x5\r\nhello\r\n",
    b"5_0\r\nhello\r\n",
    b"5.0\r\nhello\r\n",
    b"\r\n",
    b";x\r\n",
    b"g\r\n",
    b"11111111111111111\r\n",
    b" 5\r\nhello\r\n",  # white space
    b"5 \r\nhello\r\n",
    b"5\t\r\nhello\r\n",
    b"5 x\r\nhello\r\n",
    b"\r\n5\r\nhello\r\n",
    b"5;\0\r\nhello\r\n",  # a control character in an extension
    b"5;x=\x7f\r\nhello\r\n",
    b"5;x\ry\r\nhello\r\n",
    b"5;x\ny\r\nhello\r\n",
    b"5\r\nhello!\r\n",  # longer or shorter than its size
    b"5\r\nhello\r5",
    b"5\r\nhell\r\n\r\n",
    b"0\r\n\r\r\n",  # trailers that are no fields
    b"0\r\nno colon\r\n\r\n",
    b"0\r\n folded: x\r\n\r\n",
    b"0\r\nt: v\r\n folded\r\n\r\n",
    b"0\r\nspaced : x\r\n\r\n",
    b"0\r\nt: \0\r\n\r\n",
    b"0\r\n: x\r\n\r\n",
]


@pytest.mark.parametrize("wire", BROKEN)
def test_broken_coding_is_refused_at_every_split(wire: bytes) -> None:
    """No split makes broken coding acceptable."""
    assert refused(wire)
    for at in range(1, len(wire)):
        assert refused(wire[:at], wire[at:])
    assert refused(*[wire[at : at + 1] for at in range(len(wire))])


@pytest.mark.parametrize(
    ("before", "pad", "longest"),
    [(b"5;", b"x", 1024), (b"0\r\nt: ", b"v", MAX_LINE), (b"0" * 15 + b"5;", b"x", 1024)],
)
def test_lines_are_bounded_at_every_split(before: bytes, pad: bytes, longest: int) -> None:
    """A line of the most bytes is read, and one more is refused, wherever the line is split."""
    used = len(before.rpartition(b"\n")[2])
    for more in (0, 1):
        line = before + pad * (longest - used + more)
        for reads in (
            [line + b"\r\n"],
            [line, b"\r\n"],
            [line + b"\r", b"\n"],
            [line[:-1], line[-1:] + b"\r\n"],
        ):
            assert refused(*reads) is bool(more)
    assert refused(before + pad * (longest + 2))  # before its end is in sight


def test_the_trailer_section_is_bounded() -> None:
    """It may have many lines, and only so many bytes."""
    line = b"t: " + b"v" * 95 + b"\r\n"
    reader = ChunkedReader()
    reader.feed(b"0\r\n")
    for _ in range(MAX_TRAILER // 98):
        reader.feed(line)
        assert reader.error is None
    reader.feed(line)
    assert reader.error is not None


def test_what_came_before_a_fault_is_content() -> None:
    """Good bytes before the fault are forwarded, and none after it."""
    reader = ChunkedReader()

    assert reader.feed(b"5\r\nhello\r\n2\r\nhi\r\nzz\r\n") == b"hellohi"
    assert isinstance(reader.error, BadMessage)
    assert reader.feed(b"5\r\nhello\r\n0\r\n\r\n") == b""
    assert not reader.done


# --- bodies with a length -------------------------------------------------------------------------


@pytest.mark.parametrize("size", [0, 1, 5])
def test_a_body_with_a_length_is_read_at_every_split(size: int) -> None:
    """So many bytes are content, the rest is extra, and the last byte is the end."""
    wire = b"hello"[:size] + b"next"
    for at in range(len(wire) + 1):
        reader = LengthReader(size)
        assert reader.done is (size == 0)
        content = reader.feed(wire[:at])
        assert reader.done is (at >= size)
        extra = reader.extra
        if not reader.done:
            content += reader.feed(wire[at:])
            extra = reader.extra
        assert (content, extra) == (b"hello"[:size], wire[size : at if at >= size else None])


def test_a_body_without_a_length_does_not_end() -> None:
    """All bytes are content until the connection ends."""
    reader = LengthReader(None)

    assert reader.feed(b"a") + reader.feed(b"b") == b"ab"
    assert not reader.done


def test_only_an_unfinished_line_is_kept() -> None:
    """Content is forwarded and not held, whatever the size of its chunk."""
    reader = ChunkedReader()
    reader.feed(b"fffffff\r\n")
    tracemalloc.start()
    try:
        for _ in range(10):
            assert reader.feed(b"x" * 70_000) == b"x" * 70_000
        kept, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert kept < 70_000


@pytest.mark.parametrize("body", [b"3\r\nabc", b"3\r\nabc\r\n", b"3\r\nabc\r\n0\r\n\r\n"])
def test_a_reader_is_gone_without_the_collector(body: bytes) -> None:
    """It holds no reference to itself, wherever it stands."""
    reader = ChunkedReader()
    reader.feed(body)
    assert [one for one in gc.get_referents(reader) if reader in gc.get_referents(one)] == []
