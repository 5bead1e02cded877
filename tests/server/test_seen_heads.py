"""Heads that came before: told apart by every byte but the length, bounded, and not kept."""

from __future__ import annotations

import gc
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmproxy.server import seen_heads
from llmproxy.server.seen_heads import LONGEST, MOST, SeenHead, SeenHeads

KEY = b"sk-a-key-of-somebody"
HEAD = b"POST /v1 HTTP/1.1\r\nHost: h\r\nContent-Length: 12\r\nAuthorization: Bearer " + KEY


def seen(found: object = None) -> SeenHead:
    """Return what is known of a head."""
    return SeenHead(b"POST", b"/v1", b"/v1", 1, True, None, None, 1000, found)


def keep(heads: SeenHeads, head: bytes = HEAD) -> SeenHead:
    """Let a head come twice, and keep something with it."""
    heads.look(head)
    sighting, known = heads.look(head), seen()
    assert sighting is not None
    assert sighting.seen is None
    sighting.keep(known)
    return known


@pytest.mark.parametrize("name", [b"Content-Length", b"content-length"])
@pytest.mark.parametrize("length", [b"0", b"7", b"123456789012345678"])
def test_a_head_is_known_whatever_length_it_announces(name: bytes, length: bytes) -> None:
    """The first look says nothing, the second that it came before, the third what was kept."""
    heads, head = SeenHeads(), HEAD.replace(b"Content-Length", name)

    assert heads.look(head) is None
    known = keep(heads, head)

    sighting = heads.look(head.replace(b"12", length))
    assert sighting is not None
    assert sighting.seen is known
    assert sighting.length == int(length)


@given(st.integers(0, len(HEAD) - 1), st.integers(1, 255))
def test_a_changed_byte_is_another_head(at: int, change: int) -> None:
    """Nothing of another head is known, but where a digit of the length became another digit."""
    heads = SeenHeads()
    keep(heads)
    changed = bytearray(HEAD)
    changed[at] ^= change

    sighting = heads.look(bytes(changed))

    start = HEAD.index(b"12")
    if at in (start, start + 1) and bytes(changed)[start : start + 2].isdigit():
        assert sighting is not None
        assert sighting.length == int(changed[start : start + 2])
    else:
        assert sighting is None or sighting.seen is None


@pytest.mark.parametrize(
    "head",
    [
        HEAD.replace(b"Content-Length: 12\r\n", b""),
        HEAD.replace(b"12", b""),
        HEAD.replace(b"12", b"1 2"),
        HEAD.replace(b"12", b"12 "),
        HEAD.replace(b"12", b"+12"),
        HEAD.replace(b"12", b"1" * 19),
        HEAD.replace(b"Content-Length:", b"Content-Length: "),
        HEAD.replace(b"Content-Length", b"X-Content-Length"),
        HEAD.replace(b"Host: h", b"X: " + b"y" * LONGEST),
        b"Content-Length: 12",
    ],
)
def test_a_head_without_a_usual_length_is_never_known(head: bytes) -> None:
    """Whoever parses it decides."""
    heads = SeenHeads()

    assert [heads.look(head) for _ in range(3)] == [None] * 3


def test_a_second_length_is_part_of_the_head() -> None:
    """Only one number is left out: what follows it tells heads apart."""
    heads, more = SeenHeads(), HEAD + b"\r\nContent-Length: 12"
    keep(heads)

    assert heads.look(more) is None
    assert heads.look(more[:-1] + b"3") is None


def test_what_is_kept_is_bounded() -> None:
    """When there are too many heads, all are forgotten; a look that is older keeps nothing."""
    heads = SeenHeads()
    heads.look(HEAD)
    early = heads.look(HEAD)
    assert early is not None
    for number in range(MOST):
        heads.look(HEAD + b"%d" % number)

    early.keep(seen())

    assert len(heads._heads) <= MOST
    assert heads.look(HEAD) is None


def test_no_key_can_be_read_back() -> None:
    """Nothing that the memory leads to holds a head or a part of it."""
    heads = SeenHeads()
    keep(heads)

    assert not any(KEY in one for one in reachable(heads) if isinstance(one, bytes))


def test_two_processes_tell_heads_apart_by_other_digests() -> None:
    """The digest of a guessed key is of no use to somebody who reads one."""
    first, second = SeenHeads(), SeenHeads()
    keep(first)
    keep(second)

    assert first._heads.keys().isdisjoint(second._heads)


def reachable(start: Any) -> list[Any]:
    """Return all objects that one leads to, within this module's reach."""
    found: dict[int, Any] = {}
    todo = [start]
    while todo:
        one = todo.pop()
        if id(one) in found or one is seen_heads or isinstance(one, type):
            continue
        found[id(one)] = one
        todo += gc.get_referents(one)
    return list(found.values())
