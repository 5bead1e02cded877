"""Bodies on the wire: how a head frames one, where it ends, what it holds (RFC 9112, 6 and 7).

A head is turned into a reader here, for requests and for responses by the same rule.  A reader is
fed bytes, split at any point, and says where its body ends.  The chunked coding is written here,
too.  Both sides of the wire use this module; no socket, provider or client is known here.
"""

from __future__ import annotations

import re

from llmproxy.http1.grammar import (
    MAX_LINE,
    BadMessage,
    Fields,
    RequestHead,
    field_values,
    is_chunked,
    parse_field,
    parse_length,
)

MAX_TRAILER = 16384
"""Most bytes of a trailer section, which is read, checked and dropped."""

_MAX_CHUNK_LINE = 1024

_SIZES = {b"%x" % size: size for size in range(1, 0x1000)}
"""The sizes of short chunks, by the digits that most senders write."""

_LINES = {len(digits) + size + 4: digits + b"\r\n" for digits, size in _SIZES.items()}
"""The first line of such a chunk, by the length of the whole chunk."""

_FOUR_DIGITS = range(0x1000 + 8, 0x10000 + 8)
"""The lengths of whole chunks with four digits."""

_CHUNK_LINE = re.compile(
    rb"(0*[0-9A-Fa-f]{1,16})(?:[\t ]*;[\t\x20-\x7e\x80-\xff]*)?",
)
"""White space stands only before an extension (RFC 9112, 7.1.1); zeros may pad a size."""

_FRAMING = (b"content-length", b"transfer-encoding", b"host")

LAST_CHUNK = b"0\r\n\r\n"
"""The end of a body in the chunked coding, without a trailer section."""


def chunk(data: bytes) -> bytes:
    """Return ``data`` as one chunk; empty, it would be the last one."""
    return b"".join((b"%x\r\n" % len(data), data, b"\r\n"))


def request_body(head: RequestHead) -> BodyReader:
    """Return what reads the body of a request; without framing there is none.

    Raises:
        BadMessage: 400 where the body is framed twice or in a way that its version lacks, 501 for a
            transfer coding that is not known.
    """
    chunked, length = _framing(head.fields, head.first, head.minor)
    return ChunkedReader() if chunked else LengthReader(length or 0)


def response_body(
    method: bytes, status: int, minor: int, fields: Fields, first: dict[bytes, bytes]
) -> tuple[BodyReader, int | None]:
    """Return what reads the body of a response, and the length that its head announces.

    Without framing the body ends with the connection.  A response to HEAD and those with status
    1xx, 204 and 304 have no body, whatever they announce.

    Args:
        method: of the request.
        status: of the response.
        minor: its version: 0 or 1.
        fields: its header fields.
        first: the first value of each name.

    Raises:
        BadMessage: the body is framed twice, or in a way that is not known.
    """
    chunked, length = _framing(fields, first, minor)
    if chunked and status < 200:
        raise BadMessage("a Transfer-Encoding in a 1xx response")
    if method == b"HEAD" or status < 200 or status in (204, 304):
        return LengthReader(0), length
    return ChunkedReader() if chunked else LengthReader(length), length


def _framing(fields: Fields, first: dict[bytes, bytes], minor: int) -> tuple[bool, int | None]:
    """Return whether a body is in the chunked coding, and its length where the head says one."""
    length = None
    if b"content-length" in first:
        repeats = len(first) < len(fields)
        values = field_values(fields, b"content-length") if repeats else [first[b"content-length"]]
        length = parse_length(values)
    if b"transfer-encoding" not in first:
        return False, length
    if length is not None or minor == 0:
        raise BadMessage("Transfer-Encoding beside a Content-Length, or in HTTP/1.0")
    if not is_chunked(field_values(fields, b"transfer-encoding")):
        raise BadMessage("a transfer coding other than chunked", 501)
    return True, None


class ChunkedReader:
    """Reads the chunked coding, split at any point (RFC 9112, section 7.1).

    Chunk extensions are checked and dropped, and so is the trailer section.  Memory is bounded:
    only an unfinished line is kept from one call to the next.

    Attributes:
        done: the body has ended.
        extra: what followed its end in the read that ended it.
        error: what is wrong with the coding, or None; behind an error nothing is read.
    """

    __slots__ = ("_between", "_left", "_line", "_step", "_trailer_bytes", "done", "error", "extra")

    def __init__(self) -> None:
        self._left = 0
        self._line = b""
        # A function and no bound method: that would hold its own reader.
        self._step = ChunkedReader._size
        self._between = True
        self._trailer_bytes = 0
        self.done = False
        self.extra = b""
        self.error: BadMessage | None = None

    def feed(self, data: bytes) -> bytes:
        """Take the next bytes, split at any point, and return the content in them, joined.

        What came before an error is returned, too; the error is in :attr:`error`.
        """
        if start := self.framed(data):
            return data[start:-2]
        if self.error is not None:
            return b""
        if self._line:
            data = self._line + data
            self._line = b""
        content: list[bytes] = []
        position = 0
        self._between = False
        try:
            while position >= 0 and not self.done:
                position = self._step(self, data, position, content)
        except BadMessage as error:
            self.error = error
        if self.done:
            self.extra = data[position:] if position >= 0 else b""
        return content[0] if len(content) == 1 else b"".join(content)

    def may_end_with(self, data: bytes) -> bool:
        """Return whether the body may end with ``data``, which was not fed yet."""
        return data.endswith(LAST_CHUNK)

    def framed(self, data: bytes) -> int:
        """Return where the content of ``data`` starts, if that is exactly the next chunk; else 0.

        Most reads are that.  The content ends two bytes before the end of ``data``, and there is no
        extension, so that the chunk can be forwarded as it is.  :meth:`feed` is not called for it.
        """
        if self._between:
            line = _LINES.get(size := len(data))
            if line is None and size in _FOUR_DIGITS:
                line = b"%x\r\n" % (size - 8)
            if line is not None and data.startswith(line) and data.endswith(b"\r\n"):
                return len(line)
        return 0

    def _size(self, data: bytes, position: int, content: list[bytes]) -> int:
        position = _take_short(data, position, content)
        if position == len(data):
            self._between = True
            return -1
        end = self._line_end(data, position, _MAX_CHUNK_LINE)
        if end < 0:
            return -1
        match = _CHUNK_LINE.fullmatch(data, position, end)
        if match is None:
            raise BadMessage("a chunk's size line is malformed")
        self._left = int(match[1], 16)
        self._step = ChunkedReader._content if self._left else ChunkedReader._trailer
        return end + 2

    def _content(self, data: bytes, position: int, content: list[bytes]) -> int:
        available = len(data) - position
        if available < self._left:
            if available:
                content.append(data[position:])
                self._left -= available
            return -1
        end = position + self._left
        content.append(data[position:end])
        self._left = 0
        self._step = ChunkedReader._content_end
        return end

    def _content_end(self, data: bytes, position: int, content: list[bytes]) -> int:
        mark = data[position : position + 2]
        if mark == b"\r\n":
            self._step = ChunkedReader._size
            return position + 2
        if mark and mark != b"\r":
            raise BadMessage("a chunk is longer than its size")
        self._line = mark
        return -1

    def _trailer(self, data: bytes, position: int, content: list[bytes]) -> int:
        end = self._line_end(data, position, MAX_LINE)
        if end < 0:
            return -1
        if end == position:
            self.done = True
        else:
            self._trailer_bytes += end - position
            if self._trailer_bytes > MAX_TRAILER:
                raise BadMessage(f"a trailer section longer than {MAX_TRAILER} bytes")
            if parse_field(data[position:end])[0] in _FRAMING:
                raise BadMessage("a framing field in a trailer section")  # RFC 9110, 6.5.1
        return end + 2

    def _line_end(self, data: bytes, position: int, longest: int) -> int:
        end = data.find(b"\r\n", position, position + longest + 2)
        if end < 0:
            if len(data) - position > longest + data.endswith(b"\r"):
                raise BadMessage("a line of the chunked coding is too long")
            self._line = data[position:]
        return end


def _take_short(data: bytes, position: int, content: list[bytes]) -> int:
    """Take whole chunks in the usual form; return where the first chunk begins that is not."""
    while (end := data.find(b"\r\n", position, position + 5)) > 0:
        size = _SIZES.get(data[position:end])
        if size is None:
            break
        after = end + 2 + size
        if data[after : after + 2] != b"\r\n":
            break
        content.append(data[end + 2 : after])
        position = after + 2
    return position


class LengthReader:
    """Reads a body of ``left`` bytes, or one that ends with the connection (None).

    Its other attributes are those of :class:`ChunkedReader`.
    """

    __slots__ = ("done", "error", "extra", "left")

    def __init__(self, left: int | None) -> None:
        self.left = left
        self.done = left == 0
        self.extra = b""
        self.error: BadMessage | None = None

    def may_end_with(self, data: bytes) -> bool:
        """Return whether the body ends with ``data``, which was not fed yet, or within it."""
        return self.left is not None and self.left <= len(data)

    def framed(self, data: bytes) -> int:
        """Return 0: nothing is framed here."""
        return 0

    def feed(self, data: bytes) -> bytes:
        """Take the next bytes, split at any point, and return the content in them."""
        if self.left is None:
            return data
        if len(data) >= self.left:
            data, self.extra = data[: self.left], data[self.left :]
            self.done = True
        self.left -= len(data)
        return data


BodyReader = ChunkedReader | LengthReader
"""What reads one body; its attributes say how far it is."""
