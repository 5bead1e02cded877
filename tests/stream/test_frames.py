"""Frames followed at any split, and frames of our own."""

from __future__ import annotations

import itertools

from hypothesis import given
from hypothesis import strategies as st

from llmproxy.stream.frames import Frames, close_frame, read_header, unmasked
from llmproxy.stream.frames import frame as ours
from tests.support.websocket import CLOSE, PING, close, frame

MASK = b"\x11\x22\x33\x44"

_frames = st.lists(
    st.builds(
        lambda size, opcode, fin, masked: (
            frame(b"x" * size, opcode, fin=fin, mask=MASK if masked else b""),
            opcode,
            fin,
        ),
        st.sampled_from([0, 1, 2, 125, 126, 127, 70_000]),
        st.sampled_from([0, 1, 2, PING]),
        st.booleans(),
        st.booleans(),
    ),
    min_size=1,
    max_size=6,
)


def _boundaries(frames: list[tuple[bytes, int, bool]], *, message: bool) -> set[int]:
    """Return where a frame of ours may stand."""
    at, inside, found = 0, False, {0}
    for raw, opcode, fin in frames:
        at += len(raw)
        if opcode < CLOSE:
            inside = not fin
        if not (message and inside):
            found.add(at)
    return found


@given(_frames, st.lists(st.integers(1, 200_000), max_size=8), st.booleans())
def test_boundaries_are_found_at_any_split(
    frames: list[tuple[bytes, int, bool]], cuts: list[int], message: bool
) -> None:
    """Between two frames, and for a message of ours not within another message."""
    wire = b"".join(raw for raw, _, _ in frames)
    wanted = _boundaries(frames, message=message)
    points = sorted({0, len(wire), *(cut for cut in cuts if cut < len(wire))})
    tracker = Frames()
    for begin, end in itertools.pairwise(points):
        tracker.feed(wire[begin:end])
        found = tracker.is_between_messages if message else tracker.is_between_frames
        assert found is (end in wanted)
    assert tracker.count == len(frames)


@given(_frames, st.integers(0, 300_000), st.booleans())
def test_the_next_boundary_is_found_within_a_read(
    frames: list[tuple[bytes, int, bool]], cut: int, message: bool
) -> None:
    """The place is the first one; what is behind it can be followed from there."""
    wire = b"".join(raw for raw, _, _ in frames)
    cut = min(cut, len(wire))
    wanted = [at for at in sorted(_boundaries(frames, message=message)) if at >= cut]
    tracker = Frames()
    tracker.feed(wire[:cut])
    at = tracker.find(wire[cut:], message=message)
    assert at == (wanted[0] - cut if wanted else -1)
    if at >= 0:
        tracker.feed(wire[cut:], at)
    assert tracker.count == len(frames)
    assert tracker.is_between_frames


def test_the_code_of_a_close_frame_is_found_at_any_split() -> None:
    """Masked or not, with words or without a code."""
    for mask in (b"", MASK):
        for raw, code in (
            (close(1000, mask=mask), 1000),
            (close(4321, b"words", mask=mask), 4321),
            (close(None, mask=mask), 1005),
        ):
            for cut in range(len(raw)):
                tracker = Frames()
                tracker.feed(raw[:cut])
                assert tracker.close_code is None
                tracker.feed(raw[cut:])
                assert tracker.close_code == code


@given(st.sampled_from([0, 5, 125, 126, 65535, 65536]), st.booleans())
def test_our_frames_can_be_read(size: int, masked: bool) -> None:
    """Whole, never compressed, and masked for a server."""
    raw = ours(1, b"y" * size, masked=masked)
    header = read_header(raw)
    assert header is not None
    assert (header.opcode, header.is_last, header.size) == (1, True, size)
    assert bool(header.mask) is masked
    assert raw[0] == 0x81
    assert unmasked(raw[header.length :], header.mask) == b"y" * size
    assert close_frame(1001, masked=False) == close(1001)
