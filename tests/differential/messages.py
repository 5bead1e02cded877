"""Messages for readers to judge: valid ones, written from the grammar, and mangled ones.

The rules are those of RFC 9112 and RFC 9110, section 5; each valid message comes with its content,
so that no reader has to be believed.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from hypothesis import strategies as st


class Message(NamedTuple):
    """A message and what was written into it.

    Attributes:
        method: of the request, or of the one that a response is to.
        wire: the bytes, without what follows.
        body: its content.
        extra: bytes that follow it.
    """

    method: bytes
    wire: bytes
    body: bytes
    extra: bytes


_TOKEN = "!#$%&'*+-.^_`|~0123456789ABCXYZabcxyz"
TOKENS = st.text(_TOKEN, min_size=1, max_size=8).map(str.encode)
_TEXT = st.lists(st.sampled_from(b"aZ0~!:;,=\"' \t\xe4\xff"), max_size=12).map(bytes)
_SPACE = st.sampled_from([b"", b" ", b"\t", b" \t "])
_QUOTED = st.text("ab ;,\t=", max_size=5).map(lambda text: b'"' + text.encode() + b'"')
_EXTRA = st.sampled_from([b"", b"", b"", b"HTTP/1.1 200 OK\r\n\r\n", b"GET / HTTP/1.1\r\n", b"\n"])


@st.composite
def _fields(draw: st.DrawFn, most: int = 4) -> list[bytes]:
    lines = []
    for _ in range(draw(st.integers(0, most))):
        name = b"X-" + draw(TOKENS)
        value = draw(_TEXT).strip(b" \t")
        lines.append(name + b":" + draw(_SPACE) + value + draw(_SPACE))
    return lines


@st.composite
def _chunked(draw: st.DrawFn) -> tuple[bytes, bytes]:
    """Write a chunked body with all that the coding allows; return wire and content."""
    wire, body = b"", b""
    pieces = draw(st.lists(st.binary(min_size=1, max_size=20), max_size=3))
    for piece in [*pieces, b""]:
        size = b"%X" % len(piece) if draw(st.booleans()) else b"%x" % len(piece)
        wire += b"0" * draw(st.integers(0, 3)) + size
        for _ in range(draw(st.integers(0, 2))):
            value = draw(st.one_of(st.just(b""), TOKENS, _QUOTED))
            wire += draw(_SPACE) + b";" + draw(TOKENS) + (b"=" + value if value else b"")
        wire += b"\r\n" + (piece + b"\r\n" if piece else b"")
        body += piece
    trailer = draw(_fields(2))
    return wire + b"".join(line + b"\r\n" for line in trailer) + b"\r\n", body


def _lines(first: bytes, fields: list[bytes]) -> bytes:
    return b"\r\n".join([first, *fields, b"", b""])


@st.composite
def _body(draw: st.DrawFn, framing: str) -> tuple[list[bytes], bytes, bytes]:
    """Return the fields that frame a body, its wire and its content."""
    if framing == "chunked":
        wire, body = draw(_chunked())
        coding = draw(st.sampled_from([b"chunked", b"Chunked", b" CHUNKED "]))
        return [draw(st.sampled_from([b"Transfer-Encoding:", b"transfer-encoding:"])) + coding], *(
            wire,
            body,
        )
    body = draw(st.binary(max_size=30))
    if framing == "length":
        zeros = b"0" * draw(st.integers(0, 2))
        return [b"Content-Length: " + zeros + b"%d" % len(body)], body, body
    return [], body, body


@st.composite
def responses(draw: st.DrawFn) -> Message:
    """Valid responses: every framing, with and without 1xx before them, to GET, HEAD and POST."""
    method = draw(st.sampled_from([b"GET", b"GET", b"POST", b"HEAD"]))
    wire = b""
    for _ in range(draw(st.integers(0, 2))):
        status = draw(st.sampled_from([b"100 Continue", b"102 ", b"103 Early Hints", b"199"]))
        wire += _lines(b"HTTP/1.1 " + (status + b" " if len(status) == 3 else status), [])
    minor = draw(st.sampled_from([1, 1, 0]))
    status_ = draw(st.sampled_from([200, 200, 201, 204, 304, 400, 429, 503, 599]))
    phrase = draw(st.text("aZ 0!\t", max_size=8)).encode()
    framing = draw(
        st.sampled_from(["length", "chunked", "close"] if minor else ["length", "close"])
    )
    framed, coded, body = draw(_body(framing))
    if status_ == 204:
        framed = []
    if method == b"HEAD" or status_ in (204, 304):
        coded = body = b""
        framing = "none"
    fields = draw(_fields())
    fields[:] = [*fields, *framed] if draw(st.booleans()) else [*framed, *fields]
    if draw(st.integers(0, 3)) == 0:
        fields.append(b"Connection: " + draw(st.sampled_from([b"close", b"Close", b"keep-alive"])))
    wire += _lines(b"HTTP/1.%d %d %b" % (minor, status_, phrase), fields) + coded
    extra = b"" if framing == "close" else draw(_EXTRA)
    return Message(method, wire, body, extra)


@st.composite
def requests(draw: st.DrawFn) -> Message:
    """Valid requests: every form of target, every framing."""
    method = draw(st.sampled_from([b"GET", b"POST", b"PUT", b"DELETE", b"OPTIONS", b"PATCH"]))
    minor = draw(st.sampled_from([1, 1, 1, 0]))
    target = draw(
        st.sampled_from([b"/", b"/v1/x?a=b&c", b"/a%2f/../{x}|'?", b"http://h:80/a", b"*"])
    )
    if target == b"*":
        method = b"OPTIONS"
    framing = draw(st.sampled_from(["length", "chunked", "none"] if minor else ["length", "none"]))
    framed, coded, body = draw(_body(framing))
    if framing == "none":
        coded = body = b""
    host = [b"Host: " + draw(st.sampled_from([b"h", b"a.b:8080", b"[::1]:80", b"127.0.0.1"]))]
    fields = [*draw(_fields()), *framed]
    fields = [*host, *fields] if draw(st.booleans()) else [*fields, *host]
    if draw(st.integers(0, 3)) == 0:
        fields.append(b"Connection: " + draw(st.sampled_from([b"close", b"x, Close", b"te"])))
    wire = _lines(b"%b %b HTTP/1.%d" % (method, target, minor), fields) + coded
    return Message(method, wire, body, draw(_EXTRA))


NASTY = [
    b"Content-Length: 0",
    b"Content-Length: 5",
    b"Content-Length: +5",
    b"Content-Length: -1",
    b"Content-Length: 5, 5",
    b"Content-Length: 0x5",
    b"Content-Length: 5 ",
    b"Content-Length:",
    b"Content-Length: 18446744073709551616",
    b"Content-Length: " + b"9" * 40,
    b"Content-Length : 5",
    b"Content_Length: 5",
    b"content-length: 1_0",
    b"Transfer-Encoding: chunked",
    b"Transfer-Encoding: identity",
    b"Transfer-Encoding: gzip, chunked",
    b"Transfer-Encoding: chunked, chunked",
    b"Transfer-Encoding: chunked, identity",
    b"Transfer-Encoding: xchunked",
    b"Transfer-Encoding: chunked;q=1",
    b'Transfer-Encoding: "chunked"',
    b"Transfer-Encoding: \x0bchunked",
    b"Transfer-Encoding: ,chunked",
    b"Transfer-Encoding:",
    b"Transfer-Encoding : chunked",
    b"Transfer-Encoding\t: chunked",
    b"X: y\r\n Transfer-Encoding: chunked",
    b"X: y\r\n\tfolded",
    b"X: a\0b",
    b"X: a\rContent-Length: 5",
    b"X: a\nContent-Length: 5",
    b": no name",
    b"no colon",
    b"Connection: close",
    b"Connection: Content-Length",
    b"Host: other",
    b"Host: a b",
    b"",
]
"""Field lines that frame strangely, or are none."""

_BYTES = [b"\r", b"\n", b"\r\n", b" ", b"\t", b"\0", b":", b"+", b"-", b"0", b"f", b";", b",", b"_"]
_BYTES += [b"\x0b", b"\x7f", b"\x80", b'"', b"x", b"9" * 20]


def mistakes(wire: bytes) -> Iterator[bytes]:
    """Yield a message with each single mistake that bytes or lines can make in it."""
    for at in range(len(wire) + 1):
        for strange in _BYTES:
            yield wire[:at] + strange + wire[at:]
        yield wire[:at] + wire[at + 1 :]
        yield wire[:at] + wire[at : at + 1].swapcase() + wire[at + 1 :]
    lines = wire.split(b"\r\n")
    for number in range(1, len(lines)):
        for line in NASTY:
            yield b"\r\n".join([*lines[:number], line, *lines[number:]])
            yield b"\r\n".join([*lines[:number], line, *lines[number + 1 :]])


@st.composite
def mangled(draw: st.DrawFn, valid: st.SearchStrategy[Message]) -> Message:
    """A valid message with one to three mistakes in it."""
    message = draw(valid)
    wire = message.wire + message.extra
    for _ in range(draw(st.integers(1, 3))):
        wire = _mangle(draw, wire)
    return Message(message.method, wire, b"", b"")


def _mangle(draw: st.DrawFn, wire: bytes) -> bytes:
    how = draw(st.sampled_from(["delete", "double", "insert", "case", "lf", "line", "end", "line"]))
    at = draw(st.integers(0, max(0, len(wire) - 1)))
    before, byte, after = wire[:at], wire[at : at + 1], wire[at + 1 :]
    if how == "delete":
        return before + after
    if how == "double":
        return before + byte * 2 + after
    if how == "insert":
        return before + draw(st.sampled_from(_BYTES)) + byte + after
    if how == "case":
        return before + byte.swapcase() + after
    if how == "end":
        return before
    ends = [i for i in range(len(wire)) if wire[i : i + 2] == b"\r\n"]
    if not ends:
        return before + b"\n" + after
    end = ends[at % len(ends)]
    if how == "lf":
        return wire[:end] + wire[end + 1 :]
    return wire[: end + 2] + draw(st.sampled_from(NASTY)) + b"\r\n" + wire[end + 2 :]
