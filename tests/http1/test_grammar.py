"""HTTP's grammar: what is in it is read at any split, what is not is refused, never repaired."""

from __future__ import annotations

import h11
import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmproxy.http1.framing import LAST_CHUNK, MAX_TRAILER, ChunkedReader, LengthReader, chunk
from llmproxy.http1.grammar import (
    MAX_FIELDS,
    MAX_LINE,
    BadMessage,
    RequestHead,
    field_values,
    list_tokens,
    parse_fields,
    parse_length,
    parse_request_head,
    parse_status_line,
)


def read(*reads: bytes) -> tuple[bytes, ChunkedReader]:
    """Feed a reader and return all content, with the reader."""
    reader = ChunkedReader()
    return b"".join([reader.feed(data) for data in reads]), reader


def refused(*reads: bytes) -> bool:
    """Tell whether a reader refuses these reads."""
    reader = read(*reads)[1]
    return reader.error is not None and not reader.done


# --- the chunked coding ---------------------------------------------------------------------------

WIRE = b'5\r\nhello\r\n00A; x="y;z"\r\n 123456789\r\n1;\tq\r\n!\r\n0\r\nT: v\r\nu:\r\n\r\n'
CONTENT = b"hello 123456789!"


def test_a_chunked_body_is_read_at_every_split() -> None:
    """Wherever two cuts are, content and end are the same."""
    for first in range(len(WIRE) + 1):
        for second in range(first, len(WIRE) + 1):
            content, reader = read(WIRE[:first], WIRE[first:second], WIRE[second:])
            assert (content, reader.done, reader.extra) == (CONTENT, True, b"")


def test_a_chunked_body_is_read_byte_by_byte() -> None:
    """The end is known with its last byte, and not before."""
    reader = ChunkedReader()
    content = b""
    for at in range(len(WIRE)):
        assert not reader.done
        content += reader.feed(WIRE[at : at + 1])

    assert (content, reader.done) == (CONTENT, True)


def test_what_follows_the_end_is_told() -> None:
    """Bytes behind the end are no content, and whoever reads can see them."""
    for at in range(len(WIRE)):
        content, reader = read(WIRE[:at], WIRE[at:] + b"HTTP/1.1")
        assert (content, reader.extra) == (CONTENT, b"HTTP/1.1")


def test_the_content_of_one_read_is_one_piece() -> None:
    """The chunks of one read are joined; a read without content has none."""
    reader = ChunkedReader()

    assert reader.feed(b"1\r\na\r\n2\r\nbc\r\n3\r\nd") == b"abcd"
    assert reader.feed(b"ef\r\n") == b"ef"
    assert reader.feed(b"0\r\n\r\n") == b""


@pytest.mark.parametrize("form", [b"%x\r\n", b"%X\r\n", b"0%x\r\n", b"%x;e\r\n"])
def test_a_read_of_one_chunk_is_that_chunk(form: bytes) -> None:
    """Whatever its length and form, a chunk that comes alone is read as it says it is."""
    edges = [16**digits + around for digits in range(1, 5) for around in range(-10, 11)]
    for size in {*range(1, 40), *(edge for edge in edges if edge > 0)}:
        whole = form % size + bytes(size) + b"\r\n"
        reader = ChunkedReader()
        assert (reader.feed(whole), reader.error) == (bytes(size), None), size
        assert refused(form % size + bytes(size + 1) + b"\r\n"), size
        content, reader = read(form % size + bytes(size - 1) + b"\r\n")
        assert (len(content), reader.error is None) == (size, False), size


@given(st.lists(st.binary(min_size=1, max_size=300)), st.data())
def test_what_is_written_in_chunks_is_read_again(pieces: list[bytes], data: st.DataObject) -> None:
    """Our reader reads what our writer writes, however it is cut on the way."""
    wire = b"".join(b"".join(chunk(piece)) for piece in pieces) + LAST_CHUNK
    cuts = sorted(data.draw(st.lists(st.integers(0, len(wire)), max_size=8)))
    reads = [wire[a:b] for a, b in zip([0, *cuts], [*cuts, len(wire)], strict=True)]
    content, reader = read(*reads)

    assert (content, reader.done, reader.extra) == (b"".join(pieces), True, b"")


HEAD = b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n"
TOKENS = st.text("abcXYZ0129!#$%&'*+-.^_`|~", min_size=1, max_size=8)
EXTENSIONS = st.lists(st.tuples(TOKENS, TOKENS), max_size=2).map(
    lambda pairs: "".join(f";{name}={value}" for name, value in pairs).encode()
)


@given(
    st.lists(st.tuples(st.binary(min_size=1, max_size=99), EXTENSIONS, st.booleans()), max_size=5),
    st.lists(st.tuples(TOKENS, TOKENS), max_size=3),
    st.data(),
)
def test_valid_bodies_are_read_as_h11_reads_them(
    pieces: list[tuple[bytes, bytes, bool]], trailers: list[tuple[str, str]], data: st.DataObject
) -> None:
    """Sizes in either case, extensions, trailers: an independent reader sees the same content."""
    wire = b""
    for piece, extension, upper in pieces:
        size = b"%X" % len(piece) if upper else b"%x" % len(piece)
        wire += size + extension + b"\r\n" + piece + b"\r\n"
    names = "".join(f"x{name}: {value}\r\n" for name, value in trailers)
    wire += b"0\r\n" + names.encode() + b"\r\n"
    at = data.draw(st.integers(0, len(wire)))
    content, reader = read(wire[:at], wire[at:])

    assert (content, reader.done) == (_as_h11_reads(wire), True)


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
    b"5 ;x\r\nhello\r\n",
    b"5\t;x\r\nhello\r\n",
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
def test_what_is_not_the_coding_is_refused_at_every_split(wire: bytes) -> None:
    """No cut makes broken coding acceptable."""
    assert refused(wire)
    for at in range(1, len(wire)):
        assert refused(wire[:at], wire[at:])
    assert refused(*[wire[at : at + 1] for at in range(len(wire))])


@pytest.mark.parametrize(
    ("before", "pad", "longest"),
    [(b"5;", b"x", 1024), (b"0\r\nt: ", b"v", MAX_LINE), (b"0" * 15 + b"5;", b"x", 1024)],
)
def test_lines_are_bounded_at_every_split(before: bytes, pad: bytes, longest: int) -> None:
    """A line of the most bytes is read and one more is refused, wherever the reads were cut."""
    used = len(before.rpartition(b"\n")[2])
    fits = before + pad * (longest - used)
    over = before + pad * (longest - used + 1)
    for reads in (
        [fits + b"\r\n"],
        [fits, b"\r\n"],
        [fits + b"\r", b"\n"],
        [fits[:-1], fits[-1:] + b"\r\n"],
    ):
        assert not refused(*reads)
    for reads in (
        [over + b"\r\n"],
        [over, b"\r\n"],
        [over + b"\r", b"\n"],
        [over[:-1], over[-1:] + b"\r\n"],
    ):
        assert refused(*reads)
    assert refused(over + pad * 2)  # before its end is in sight


def test_the_trailer_section_is_bounded() -> None:
    """However many lines it has, it is not read for ever."""
    line = b"t: " + b"v" * 95 + b"\r\n"
    reader = ChunkedReader()
    reader.feed(b"0\r\n")
    for _ in range(MAX_TRAILER // 98):
        reader.feed(line)
        assert reader.error is None
    reader.feed(line)
    assert reader.error is not None


def test_what_came_before_a_fault_is_content() -> None:
    """Bytes that were good are forwarded, and after the fault nothing is."""
    reader = ChunkedReader()

    assert reader.feed(b"5\r\nhello\r\n2\r\nhi\r\nzz\r\n") == b"hellohi"
    assert isinstance(reader.error, BadMessage)
    assert reader.feed(b"5\r\nhello\r\n0\r\n\r\n") == b""
    assert not reader.done


# --- bodies with a length -------------------------------------------------------------------------


@pytest.mark.parametrize("size", [0, 1, 5])
def test_a_body_with_a_length_is_read_at_every_split(size: int) -> None:
    """So many bytes are content, what follows is told, and the end is known with the last byte."""
    wire = b"hello"[:size] + b"next"
    for at in range(len(wire) + 1):
        reader = LengthReader(size)
        assert reader.done is (size == 0)
        content = reader.feed(wire[:at])
        assert reader.done is (at >= size)
        if not reader.done:
            content += reader.feed(wire[at:])
            assert reader.extra == b"next"
        else:
            assert reader.extra == wire[size:at]
        assert content == b"hello"[:size]


def test_a_body_without_a_length_does_not_end() -> None:
    """Everything is content until the connection is over."""
    reader = LengthReader(None)

    assert reader.feed(b"a") + reader.feed(b"b") == b"ab"
    assert not reader.done


def test_only_an_unfinished_line_is_kept() -> None:
    """Content is forwarded and not held, whatever the size of its chunk."""
    reader = ChunkedReader()
    reader.feed(b"fffffff\r\n")
    for _ in range(10):
        assert reader.feed(b"x" * 70_000) == b"x" * 70_000
        assert reader._line == b""


# --- status lines ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        (b"HTTP/1.1 200 OK", (1, 200)),
        (b"HTTP/1.0 404 Not Found", (0, 404)),
        (b"HTTP/1.1 204 ", (1, 204)),
        (b"HTTP/1.1 599", (1, 599)),
        (b"HTTP/1.1 100 \xe4\tx", (1, 100)),
    ],
)
def test_status_lines(line: bytes, expected: tuple[int, int]) -> None:
    """Version and status are read, with any phrase or none."""
    assert parse_status_line(line) == expected


@pytest.mark.parametrize(
    "line",
    [
        b"",
        b"HTTP/1.1",
        b"HTTP/1.1 20",
        b"HTTP/1.1 2000 OK",
        b"HTTP/1.1 2_0 OK",
        b"HTTP/1.1 -20 OK",
        b"HTTP/1.1 +20 OK",
        b"HTTP/1.1 099 OK",
        b"HTTP/1.1 600 OK",
        b"HTTP/1.1  200 OK",
        b"HTTP/1.1\t200 OK",
        b"HTTP/1.1 200OK",
        b"HTTP/1.2 200 OK",
        b"HTTP/2.0 200 OK",
        b"HTTP/11.1 200 OK",
        b"http/1.1 200 OK",
        b" HTTP/1.1 200 OK",
        b"HTTP/1.1 200 O\rK",
        b"HTTP/1.1 200 O\nK",
        b"HTTP/1.1 200 O\0K",
        b"HTTP/1.1 200 O\x7fK",
        "HTTP/1.1 ٢٠٠ OK".encode(),
    ],
)
def test_what_is_no_status_line_is_refused(line: bytes) -> None:
    """Signs, other digits, spaces, control characters and other versions are not repaired."""
    with pytest.raises(BadMessage):
        parse_status_line(line)


# --- request heads --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("head", "expected"),
    [
        (b"GET / HTTP/1.1\r\nHost: h", (b"GET", b"/", 1, [(b"host", b"h")])),
        (b"GET / HTTP/1.0", (b"GET", b"/", 0, [])),
        (b"GET / HTTP/1.0\r\nHost: [::1]:8080", (b"GET", b"/", 0, [(b"host", b"[::1]:8080")])),
        (b"x-Y!1 * HTTP/1.1\r\nhost:", (b"x-Y!1", b"*", 1, [(b"host", b"")])),
        (
            b'POST /a%2f{x}|"?b?%zz HTTP/1.1\r\nHost: a.b:1\r\nX: y',
            (b"POST", b'/a%2f{x}|"?b?%zz', 1, [(b"host", b"a.b:1"), (b"x", b"y")]),
        ),
    ],
)
def test_request_heads(
    head: bytes, expected: tuple[bytes, bytes, int, list[tuple[bytes, bytes]]]
) -> None:
    """Method, target and version stand in the first line; the target is raw."""
    assert parse_request_head(head) == RequestHead(*expected, dict(expected[3]))


@pytest.mark.parametrize(
    ("head", "status"),
    [
        (b"", 400),
        (b"GET /", 400),
        (b"GET  / HTTP/1.1\r\nHost: h", 400),
        (b"GET\t/ HTTP/1.1\r\nHost: h", 400),
        (b"GET / HTTP/1.1 \r\nHost: h", 400),
        (b" GET / HTTP/1.1\r\nHost: h", 400),
        (b"GET / /HTTP/1.1\r\nHost: h", 400),
        (b"G(T / HTTP/1.1\r\nHost: h", 400),
        (b"GET /#x HTTP/1.1\r\nHost: h", 400),
        (b"GET /\x7f HTTP/1.1\r\nHost: h", 400),
        (b"GET /\xe4 HTTP/1.1\r\nHost: h", 400),
        (b"GET /\0 HTTP/1.1\r\nHost: h", 400),
        (b"GET / http/1.1\r\nHost: h", 400),
        (b"GET / HTTP/1.\r\nHost: h", 400),
        (b"GET / HTTP/0.9\r\nHost: h", 505),
        (b"GET / HTTP/1.2\r\nHost: h", 505),
        (b"GET / HTTP/2.0\r\nHost: h", 505),
        (b"GET / HTTP/1.1", 400),
        (b"GET / HTTP/1.1\r\nHost: h\r\nHost: h", 400),
        (b"GET / HTTP/1.0\r\nHost: h\r\nHost: h", 400),
        (b"GET / HTTP/1.1\r\nHost: h/x", 400),
        (b"GET / HTTP/1.1\r\nHost: a b", 400),
        (b"GET / HTTP/1.1\r\nHost: user@h", 400),
        (b"GET / HTTP/1.1\r\nHost: h:80x", 400),
        (b"GET / HTTP/1.1\r\nHost: a, b:1:2", 400),
        (b"GET / HTTP/1.1\r\n folded: x\r\nHost: h", 400),
        (b"GET / HTTP/1.1\r\nHost: h\r\nA: b\r\n folded", 400),
        (b"GET / HTTP/1.1\r\nHost : h", 400),
        (b"GET / HTTP/1.1\nHost: h", 400),
        (b"GET / HTTP/1.1\r\nHost: h\nX: y", 400),
        (b"GET / HTTP/1.1\r\nHost: h\r\nX: a\0", 400),
        (b"GET / HTTP/1.1\r\nHost: h" + b"\r\na: b" * MAX_FIELDS, 431),
    ],
)
def test_what_is_no_request_head_is_refused(head: bytes, status: int) -> None:
    """The refusal has the status that a server answers with."""
    with pytest.raises(BadMessage) as caught:
        parse_request_head(head)

    assert caught.value.status == status


# --- fields ---------------------------------------------------------------------------------------


def test_fields_keep_order_and_bytes() -> None:
    """Names in lower case, values without the white space around, nothing else changed."""
    lines = [b"X-B: 1", b"a:", b"X-b:\t 2 3 \t", b"!#$%&'*+-.^_`|~09:\xff:\x80"]

    assert parse_fields(lines) == [
        (b"x-b", b"1"),
        (b"a", b""),
        (b"x-b", b"2 3"),
        (b"!#$%&'*+-.^_`|~09", b"\xff:\x80"),
    ]


@pytest.mark.parametrize(
    "line",
    [
        b"",
        b"no colon",
        b": no name",
        b"space : x",
        b"tab\t: x",
        b" folded: x",
        b"\tfolded",
        b"na me: x",
        b"na\0me: x",
        b"n\xe4me: x",
        b"(name): x",
        *[b"name: a" + bytes([ctl]) + b"b" for ctl in (*range(9), *range(10, 32), 127)],
        b"name: x\r",
    ],
)
def test_what_is_no_field_is_refused(line: bytes) -> None:
    """Folded lines, odd names and every control character but the tab."""
    with pytest.raises(BadMessage):
        parse_fields([b"a: b", line])


def test_fields_are_bounded() -> None:
    """So many lines and so many bytes of a line pass, and one more is refused."""
    longest = b"a: " + b"x" * (MAX_LINE - 3)
    assert len(parse_fields([longest] * MAX_FIELDS)) == MAX_FIELDS
    with pytest.raises(BadMessage):
        parse_fields([b"a: b"] * (MAX_FIELDS + 1))
    with pytest.raises(BadMessage):
        parse_fields([longest + b"x"])
    assert parse_fields([b"a: b"], most=1)
    with pytest.raises(BadMessage):
        parse_fields([b"a: b"], most=0)


def test_errors_quote_no_values() -> None:
    """What was wrong is told without what stood there, which may be a key."""
    with pytest.raises(BadMessage) as caught:
        parse_fields([b"authorization: secret\0"])

    assert "secret" not in str(caught.value)


def test_field_values_are_in_order() -> None:
    """Every line of a name counts, and no other."""
    fields = [(b"a", b"1"), (b"b", b"2"), (b"a", b"3")]

    assert field_values(fields, b"a") == [b"1", b"3"]
    assert field_values(fields, b"c") == []


# --- lists, tokens, lengths -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([], []),
        ([b""], []),
        ([b" , ,, "], []),
        ([b"Close"], [b"close"]),
        ([b"a, b\t,C", b"d"], [b"a", b"b", b"c", b"d"]),
        ([b"a b"], [b"a b"]),
    ],
)
def test_lists_are_read_over_all_lines(values: list[bytes], expected: list[bytes]) -> None:
    """Members in lower case, in order, without empty ones."""
    assert list_tokens(values) == expected


@pytest.mark.parametrize(
    ("values", "expected"),
    [([], None), ([b"0"], 0), ([b"007"], 7), ([b"9" * 18], 10**18 - 1)],
)
def test_lengths(values: list[bytes], expected: int | None) -> None:
    """Plain digits are a length, and no field is none."""
    assert parse_length(values) == expected


@pytest.mark.parametrize(
    "values",
    [
        [b""],
        [b"-1"],
        [b"+1"],
        [b"1_0"],
        [b"1 0"],
        [b"0x1"],
        [b"1.0"],
        [b"1,1"],
        [b"1, 1"],
        [b"1", b"1"],
        [b"1", b"2"],
        [b"9" * 19],
        [b"9" * 5000],
        ["٥".encode()],
    ],
)
def test_what_is_no_length_is_refused(values: list[bytes]) -> None:
    """Signs, other digits, lists, repetitions and absurd sizes frame nothing."""
    with pytest.raises(BadMessage):
        parse_length(values)
