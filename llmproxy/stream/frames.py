"""Where the frames of a WebSocket begin and end (RFC 6455, section 5.2), and frames of our own.

A pump that forwards bytes as they are must know where a frame of ours may stand between them:
a close frame between two frames, a message between two messages.  A :class:`Frames` follows one
direction, at any split of the bytes, and holds at most one frame's header.  What frames mean, and
whether they are allowed, is for the two ends to say.
"""

from __future__ import annotations

import os
from typing import Final

TEXT: Final = 1
CLOSE: Final = 8
CONTROL: Final = 8
"""The first opcode of control frames, which may stand between the frames of a message."""

NO_CODE = 1005
"""The code of a close frame without one (RFC 6455, section 7.4.1)."""

_FIN, _OPCODE, _MASKED, _LENGTH = 0x80, 0x0F, 0x80, 0x7F
_TWO_BYTES, _EIGHT_BYTES = 126, 127
_LONGEST_HEADER = 14


class Header:
    """One frame's header.

    Attributes:
        is_last: the frame ends its message.
        size: bytes of the payload.
        mask: four bytes, or nothing.
        length: bytes of the header itself.
    """

    __slots__ = ("is_last", "length", "mask", "opcode", "size")

    def __init__(self, first: int, size: int, mask: bytes, length: int) -> None:
        self.is_last = first >= _FIN
        self.opcode = first & _OPCODE
        self.size = size
        self.mask = mask
        self.length = length


def read_header(data: bytes, at: int = 0) -> Header | None:
    """Return the header that begins at ``at``, or None where it is not whole."""
    if len(data) - at < 2:
        return None
    second = data[at + 1]
    size, length = second & _LENGTH, 2
    if size >= _TWO_BYTES:
        length = 4 if size == _TWO_BYTES else 10
        size = int.from_bytes(data[at + 2 : at + length], "big")
    payload = at + length
    if second >= _MASKED:
        length += 4
    if len(data) - at < length:
        return None
    return Header(data[at], size, data[payload : at + length], length)


class Frames:
    """The frames of one direction, followed byte by byte.

    Attributes:
        count: frames that have begun.
        close_code: of the close frame; None before that is whole.
    """

    __slots__ = ("_close", "_header", "_in_message", "_left", "_mask", "close_code", "count")

    def __init__(self) -> None:
        self._header = b""  # the part of it that has come
        self._left = 0  # bytes of the frame that are still to come
        self._in_message = False  # a fragmented message goes on behind this frame
        self._close: bytearray | None = None
        self._mask = b""
        self.count = 0
        self.close_code: int | None = None

    @property
    def is_between_frames(self) -> bool:
        """Whether a control frame may come here."""
        return not (self._left or self._header)

    @property
    def is_between_messages(self) -> bool:
        """Whether a message may come here."""
        return not (self._left or self._header or self._in_message)

    def feed(self, data: bytes, at: int = 0) -> None:
        """Follow bytes, split at any point.

        Args:
            at: where in ``data`` they begin.
        """
        end = len(data)
        left = self._left
        if left > end - at and self._close is None:  # in the middle of a long frame
            self._left = left - (end - at)
            return
        while at < end:
            at = self._step(data, at)

    def find(self, data: bytes, *, message: bool) -> int:
        """Follow bytes up to the first place where a frame of ours may stand.

        Args:
            message: it is a message; else it is a control frame.

        Returns:
            the place in ``data``; -1 where there is none, and all was followed.
        """
        at, end = 0, len(data)
        while not (self.is_between_messages if message else self.is_between_frames):
            if at == end:
                return -1
            at = self._step(data, at)
        return at

    def _step(self, data: bytes, at: int) -> int:
        """Follow a header, or a payload; return where that ends."""
        if self._left:
            return self._follow_payload(data, at)
        begun = len(self._header)
        whole = self._header + data[at : at + _LONGEST_HEADER] if begun else data
        header = read_header(whole, 0 if begun else at)
        if header is None:
            self._header += data[at:]
            return len(data)
        self._header = b""
        self.count += 1
        self._left = header.size
        if header.opcode < CONTROL:
            self._in_message = not header.is_last
        elif header.opcode == CLOSE and self.close_code is None:
            self._close, self._mask = bytearray(), header.mask
            if not header.size:
                self.close_code, self._close = NO_CODE, None
        return at + header.length - begun

    def _follow_payload(self, data: bytes, at: int) -> int:
        end = min(len(data), at + self._left)
        self._left -= end - at
        if self._close is not None:
            if len(self._close) < 2:
                self._close += data[at:end]
            if not self._left:
                code = unmasked(bytes(self._close[:2]), self._mask)
                self.close_code, self._close = int.from_bytes(code, "big"), None
        return end


def unmasked(payload: bytes, mask: bytes) -> bytes:
    """Return a payload without its mask, or with it; a frame of a server's has none."""
    if not mask or not payload:
        return payload
    size = len(payload)
    key = (mask * (size // 4 + 1))[:size]
    return (int.from_bytes(payload, "big") ^ int.from_bytes(key, "big")).to_bytes(size, "big")


def frame(opcode: int, payload: bytes, *, masked: bool) -> bytes:
    """Return one whole message or control frame; it is never compressed.

    Args:
        masked: it goes to a server.
    """
    size = len(payload)
    if size < _TWO_BYTES:
        lengths = bytes((size,))
    elif size < 1 << 16:
        lengths = bytes((_TWO_BYTES,)) + size.to_bytes(2, "big")
    else:
        lengths = bytes((_EIGHT_BYTES,)) + size.to_bytes(8, "big")
    if not masked:
        return bytes((_FIN | opcode,)) + lengths + payload
    mask = os.urandom(4)
    first = bytes((_FIN | opcode, _MASKED | lengths[0])) + lengths[1:]
    return first + mask + unmasked(payload, mask)


def close_frame(code: int, *, masked: bool) -> bytes:
    """Return a close frame that gives this code, and no words."""
    return frame(CLOSE, code.to_bytes(2, "big"), masked=masked)
