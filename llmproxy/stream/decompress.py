"""Decompresses a copy of a body, piece by piece: gzip, deflate, brotli and zstd.

The tap reads a response from such a copy, and the gateway a request that it must look inside.

From Python 3.14 on, zstd is the standard library's.  The output comes in bounded pieces.  A body
has a credit of work, which time brings; one that asks for more (:class:`Bomb`) is given up, so that
none holds up the reactor (ADR-0017).  In addition, a decoder holds its window: 32 KiB for gzip and
deflate, at most 4 MiB for brotli and 8 MiB for zstd (RFC 9659).

Nothing here knows what the bytes mean.
"""

from __future__ import annotations

import sys
import zlib
from collections.abc import Callable, Generator, Iterator
from typing import Any, NamedTuple, Protocol

_IN = 16 * 1024
"""Most bytes that are decompressed at once: each member's end copies the bytes behind it."""

_OUT = 64 * 1024
"""Most bytes of output at once; brotli exceeds this by a block."""

_CREDIT = 3 * 1024**2
_CREDIT_S = 32 * 1024**2
"""Most credit that there is, and what a second brings.

A byte of output costs one, and so does what is made of it (:meth:`Decompressor.spend`): about 5 ns
of the reactor.  So a body has 15 ms at once, and a sixth of the reactor in the long run, however
well it is compressed.
"""

_RATIO = 100
_ALLOWANCE = 1024**2
"""A request's body may grow to this and a hundred times its size."""

_ZSTD_WINDOW_LOG = 23
_BROTLI_WINDOW_LOG = 22
"""Brotli fills its window before it returns anything: 4 MiB take 7 ms, and 16 MiB take 30 ms."""


class BadCoding(Exception):
    """The coding is not known here, or the bytes are not in it."""


class Bomb(Exception):
    """The body makes too much work for the time in which it came, or for its size."""


class TooLong(Exception):
    """The body is longer than is allowed."""


class _Decoder(Protocol):
    """Decodes one member, as gzip calls it, or one frame of zstd.

    Attributes:
        error: what :meth:`decompress` raises for bytes that are not in the coding.
    """

    error: type[Exception]

    def decompress(self, data: bytes, limit: int) -> bytes:
        """Take ``data``, and return about ``limit`` bytes at most."""

    @property
    def rest(self) -> bytes:
        """The bytes that were not taken yet."""

    @property
    def has_more(self) -> bool:
        """Whether more output may come without further input."""

    @property
    def is_over(self) -> bool:
        """Whether the member has ended."""


class Credit:
    """The work that may be done for one body: time brings it, and output costs it.

    Args:
        clock: monotonic seconds.
    """

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._left: float = _CREDIT
        self._since = clock()

    def earn(self) -> None:
        """Add what the time since the last call brings."""
        since, self._since = self._since, self._clock()
        self._left = min(_CREDIT, self._left + _CREDIT_S * (self._since - since))

    def spend(self, cost: int) -> None:
        """Count work, in bytes of output.

        Raises:
            Bomb: there is no credit any more.
        """
        self._left -= cost
        if self._left < 0:
            raise Bomb


class Decompressor:
    """Decompresses one body.

    ``_alone``: a second member is refused, and so are bytes behind the end.

    Args:
        coding: the value of Content-Encoding, one coding.
        clock: monotonic seconds.

    Raises:
        BadCoding: the coding is not known here.
    """

    _alone = False

    def __init__(self, coding: bytes, clock: Callable[[], float]) -> None:
        known = _CODINGS.get(coding.strip(b" \t").lower())
        if known is None:
            raise BadCoding(coding[:64])
        self._coding = known
        self._decoder: _Decoder | None = None
        self._is_over = False
        self._credit = Credit(clock)

    @property
    def is_whole(self) -> bool:
        """Whether the body may end here: no member is open."""
        return self._decoder is None

    def spend(self, cost: int) -> None:
        """Count work that the output made; see :meth:`Credit.spend`."""
        self._credit.spend(cost)

    def feed(self, data: bytes) -> Iterator[bytes]:
        """Decompress ``data``, split at any point; yield the output in bounded pieces.

        Raises:
            BadCoding: ``data`` is not in the coding.
            Bomb: there is no credit any more.
        """
        self._credit.earn()
        for at in range(0, len(data), _IN):
            yield from self._decompress(data[at : at + _IN])

    def _decompress(self, data: bytes) -> Iterator[bytes]:
        while data and not self._is_over:
            if self._decoder is None:
                data = data.lstrip(self._coding.padding)
                if not data:
                    return
                self._decoder = self._coding.decoder(data)
            yield from self._member(self._decoder, data)
            data = b""
            if self._decoder.is_over:
                data = self._decoder.rest
                self._decoder = None
                self._is_over = self._alone or not self._coding.has_members
        if data and self._alone:
            raise BadCoding("more than one member")

    def _member(self, decoder: _Decoder, data: bytes) -> Iterator[bytes]:
        while True:
            try:
                piece = decoder.decompress(data, _OUT)
            except decoder.error as error:
                raise BadCoding(str(error)[:200]) from None
            rest = decoder.rest
            self.spend(len(piece))
            if piece:
                yield piece
            if decoder.is_over or not (rest or (piece and decoder.has_more)):
                return
            data = rest


class _Zlib:
    """Gzip, zlib and raw deflate."""

    error: type[Exception] = zlib.error

    def __init__(self, bits: int) -> None:
        self._decoder = zlib.decompressobj(bits)
        self.has_more = False

    def decompress(self, data: bytes, limit: int) -> bytes:
        """Take ``data``."""
        piece = self._decoder.decompress(data, limit)
        self.has_more = len(piece) == limit
        return piece

    @property
    def rest(self) -> bytes:
        """The bytes behind the end of the member, or those that wait for the next call."""
        return self._decoder.unused_data or self._decoder.unconsumed_tail

    @property
    def is_over(self) -> bool:
        """Whether the checksum was read."""
        return self._decoder.eof


def _deflate(data: bytes) -> _Decoder:
    """Return a decoder for zlib (RFC 9110, section 8.4.1.2) or raw deflate: servers send both.

    The first byte says which.
    """
    is_zlib = data[0] & 0x0F == 8 and data[0] >> 4 <= 7
    return _Zlib(15 if is_zlib else -15)


class _Brotli:
    """Brotli (RFC 7932); it has one member, and nothing may follow.

    Args:
        start: the first bytes.

    Raises:
        BadCoding: the window is larger than is allowed here.
    """

    rest = b""

    def __init__(self, start: bytes) -> None:
        if start[0] & 1 and start[0] >> 1 & 7 > _BROTLI_WINDOW_LOG - 17:  # RFC 7932, section 9.1
            raise BadCoding("the window is too large")
        import brotli

        self.error: type[Exception] = brotli.error
        self._decoder = brotli.Decompressor()
        self.has_more = False

    def decompress(self, data: bytes, limit: int) -> bytes:
        """Take ``data``, all of it."""
        piece: bytes = self._decoder.process(data, output_buffer_limit=limit)
        # What the decoder says speaks of input that waits there, and not of output.
        self.has_more = len(piece) >= limit or not self._decoder.can_accept_more_data()
        return piece

    @property
    def is_over(self) -> bool:
        """Whether the last byte came out."""
        return bool(self._decoder.is_finished())


class _Zstd:
    """One frame of zstd (RFC 8878)."""

    def __init__(self) -> None:
        if sys.version_info >= (3, 14):
            from compression import zstd
        else:
            from backports import zstd

        self.error: type[Exception] = zstd.ZstdError
        options: dict[int, int] = {zstd.DecompressionParameter.window_log_max: _ZSTD_WINDOW_LOG}
        self._decoder: Any = zstd.ZstdDecompressor(options=options)

    def decompress(self, data: bytes, limit: int) -> bytes:
        """Take ``data``, all of it."""
        piece: bytes = self._decoder.decompress(data, limit)
        return piece

    @property
    def rest(self) -> bytes:
        """The bytes behind the frame."""
        return bytes(self._decoder.unused_data)

    @property
    def has_more(self) -> bool:
        """Whether output waits in the decoder."""
        return not (self._decoder.needs_input or self._decoder.eof)

    @property
    def is_over(self) -> bool:
        """Whether the frame has ended."""
        return bool(self._decoder.eof)


class _Coding(NamedTuple):
    """One coding.

    ``decoder`` makes the decoder of a member from the member's first bytes.  If ``has_members``,
    another member may follow, with ``padding`` between them.
    """

    decoder: Callable[[bytes], _Decoder]
    has_members: bool = False
    padding: bytes = b""


_GZIP = _Coding(lambda _: _Zlib(31), has_members=True, padding=b"\0")

_CODINGS: dict[bytes, _Coding] = {
    b"gzip": _GZIP,
    b"x-gzip": _GZIP,
    b"deflate": _Coding(_deflate),
    b"br": _Coding(_Brotli),
    b"zstd": _Coding(lambda _: _Zstd(), has_members=True),
}

KNOWN_CODINGS = tuple(coding for coding in _CODINGS if not coding.startswith(b"x-"))
"""The codings that are known here, as ``Accept-Encoding`` lists them."""


class _WholeBody(Decompressor):
    """Decompresses a body that is there as a whole; its work is bounded by its size.

    Readers differ in what they do with a second member, and with bytes behind the end: in a request
    there must be none.

    Attributes:
        taken: how many bytes of the body were fed.
    """

    _alone = True

    def __init__(self, coding: bytes) -> None:
        super().__init__(coding, lambda: 0.0)
        self.taken = 0
        self._given = 0

    @property
    def is_whole(self) -> bool:
        """Whether the one member has ended."""
        return self._is_over

    def spend(self, cost: int) -> None:
        """Count output."""
        self._given += cost
        if self._given > _ALLOWANCE + _RATIO * self.taken:
            raise Bomb


def decompressed(
    body: bytes, coding: bytes, most: int, hold: Callable[[int], None]
) -> Generator[None, None, bytes]:
    """Decompress a whole body in short steps.

    Args:
        body: one member in the coding, and nothing behind it.
        coding: one coding.
        most: bytes that the result may have.
        hold: called with the length of each piece of the result before it is kept.

    Raises:
        BadCoding: the coding is not known here, or ``body`` is not whole in it.
        Bomb: there is too much output.
        TooLong: there is more of it than ``most``.
    """
    decompressor = _WholeBody(coding)
    pieces: list[bytes] = []
    length = 0
    for at in range(0, len(body), _IN):
        decompressor.taken = min(at + _IN, len(body))
        for piece in decompressor.feed(body[at : at + _IN]):
            length += len(piece)
            if length > most:
                raise TooLong
            hold(len(piece))
            pieces.append(piece)
            yield
        yield
    if not decompressor.is_whole:
        raise BadCoding("the body is cut")
    return b"".join(pieces)
