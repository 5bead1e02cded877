"""A gate: messages wait until they were looked at, and control frames pass at once."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmproxy.stream.gate import Gate
from tests.support.websocket import BINARY, CLOSE, PING, frame

MASK = b"\x01\x02\x03\x04"


class Watched:
    """A gate that drops messages that begin with an x."""

    def __init__(self, most: int = 1000) -> None:
        self.seen: list[bytes] = []
        self.most = most
        self.held = self.too_long = 0
        self.gate = Gate(self._passes, self._hold, self._let_go)

    def _passes(self, message: bytes) -> bool:
        self.seen.append(message)
        return not message.startswith(b"x")

    def _hold(self, count: int, size: int) -> bool:
        if size > self.most:
            self.too_long += 1
            return False
        self.held += count
        assert self.held == size
        return True

    def _let_go(self) -> None:
        self.held = 0


@given(st.lists(st.integers(0, 400), max_size=8))
def test_messages_pass_or_are_dropped_whole(cuts: list[int]) -> None:
    """At any split, in fragments, and with control frames between those."""
    kept = [
        frame(b"one", mask=MASK),
        frame(b"b" * 200, BINARY, mask=MASK),
        frame(b"", mask=MASK),
        frame(b"p", PING, mask=MASK),
        frame(b"two ", fin=False, mask=MASK) + frame(b"halves", 0, mask=MASK),
        frame(b"", CLOSE, mask=MASK),
    ]
    dropped = [
        frame(b"x", mask=MASK),
        frame(b"xy", fin=False, mask=MASK) + frame(b"", 0, mask=MASK),
    ]
    wire = b"".join((*kept[:2], dropped[0], *kept[2:4], dropped[1], *kept[4:]))
    watched, out = Watched(), b""
    points = sorted({0, len(wire), *(cut for cut in cuts if cut < len(wire))})
    for begin, end in itertools.pairwise(points):
        out += watched.gate.feed(wire[begin:end])
    assert out == b"".join(kept)
    assert watched.seen == [b"one", b"b" * 200, b"x", b"", b"xy", b"two halves"]
    assert watched.gate.held_bytes == watched.held == 0


def test_a_ping_does_not_wait_for_a_message() -> None:
    """It passes between the frames of one that is held."""
    watched, ping = Watched(), frame(b"p", PING, mask=MASK)
    begun = frame(b"be", fin=False, mask=MASK)
    rest = frame(b"gun", 0, mask=MASK)
    assert watched.gate.feed(begun + ping) == ping
    assert watched.gate.feed(rest) == begun + rest


@pytest.mark.parametrize("size", [995, 996])
def test_a_message_that_is_too_long_is_dropped(size: int) -> None:
    """Once, with what it held; the next one passes."""
    watched = Watched(1000 + (size == 995) * 3)
    long, short = frame(b"y" * size, mask=MASK), frame(b"z", mask=MASK)
    out = watched.gate.feed(long[:500]) + watched.gate.feed(long[500:])
    if size == 995:
        assert (out, watched.too_long) == (long, 0)
    else:
        assert (out, watched.too_long) == (b"", 1)
    assert watched.gate.feed(short) == short
