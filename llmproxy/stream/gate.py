"""Holds a client's messages back until somebody has looked at them (ADR-0032).

Control frames pass at once, also those that come between the frames of a message.  A message that
passes goes on frame by frame, as it came.  One that does not is dropped whole, so that what is
forwarded stays a sequence of whole frames.  Nothing here knows what messages mean.
"""

from __future__ import annotations

from collections.abc import Callable

from llmproxy.stream.frames import CONTROL, read_header, unmasked


class Gate:
    """The messages of a client, one by one.

    Args:
        passes: returns whether a message is forwarded.
        hold: called with how many bytes more of a message are to be held, and how many there are
            then; returns whether they may be.  If not, the message is dropped.
        let_go: called when nothing is held any more.
    """

    __slots__ = (
        *("_drops", "_held", "_hold", "_is_last", "_left", "_let_go", "_mask", "_parts"),
        *("_passes", "_payload", "_raw", "_rest", "_size"),
    )

    def __init__(
        self,
        passes: Callable[[bytes], bool],
        hold: Callable[[int, int], bool],
        let_go: Callable[[], object],
    ) -> None:
        self._passes = passes
        self._hold = hold
        self._let_go = let_go
        self._rest = b""  # the beginning of a header
        self._left = 0  # bytes of the frame's payload that are still to come
        self._held = False  # the frame is one of a message
        self._drops = False
        self._is_last = False
        self._mask = b""
        self._raw: list[bytes] = []  # the message's frames as they came
        self._payload: list[bytes] = []  # of the frame
        self._parts: list[bytes] = []  # the message's payloads, without masks
        self._size = 0

    @property
    def held_bytes(self) -> int:
        """How many bytes of a message are held."""
        return self._size

    def feed(self, data: bytes) -> bytes:
        """Take bytes, split at any point; return what is to be forwarded now."""
        if self._rest:
            data, self._rest = self._rest + data, b""
        out: list[bytes] = []
        at, end = 0, len(data)
        while at < end:
            if self._left:
                stop = min(end, at + self._left)
                self._left -= stop - at
                self._take(data[at:stop], out)
                at = stop
            elif not self._held:
                header = read_header(data, at)
                if header is None:
                    self._rest = data[at:]
                    break
                if header.opcode < CONTROL:
                    self._held = True
                    self._is_last, self._mask = header.is_last, header.mask
                self._left = header.size
                stop = at + header.length
                if not self._held:
                    out.append(data[at:stop])
                elif not self._drops:
                    self._raw.append(data[at:stop])
                    self._grow(header.length)
                at = stop
            if self._held and not self._left:
                self._end_frame(out)
        return b"".join(out)

    def _take(self, piece: bytes, out: list[bytes]) -> None:
        if not self._held:
            out.append(piece)
        elif not self._drops:
            self._raw.append(piece)
            self._payload.append(piece)
            self._grow(len(piece))

    def _grow(self, count: int) -> None:
        self._size += count
        if not self._hold(count, self._size):
            self._drops = True
            self._forget()

    def _end_frame(self, out: list[bytes]) -> None:
        self._held = False
        if not self._drops:
            self._parts.append(unmasked(b"".join(self._payload), self._mask))
        self._payload = []
        if not self._is_last:
            return
        if not self._drops and self._passes(b"".join(self._parts)):
            out += self._raw
        self._forget()
        self._drops = False

    def _forget(self) -> None:
        self._raw, self._payload, self._parts = [], [], []
        self._size = 0
        self._let_go()
