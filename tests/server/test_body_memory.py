"""The memory of request bodies: bounded, and shared fairly; what does not go on makes room."""

from __future__ import annotations

from typing import Any

import pytest
from twisted.internet.task import Clock

from llmproxy.errors import ProxyError
from llmproxy.server.body_memory import BodyMemory

MIB = 2**20


class Body:
    """A request, as the memory sees it."""

    def __init__(self, memory: BodyMemory, owner: str | None = None) -> None:
        self.memory, self.owner, self.held = memory, owner, 0
        self.refusal: ProxyError | None = None

    def take(self, size: int) -> bool:
        """Ask for room."""
        return self.memory.hold(self, size)

    def fill(self, size: int) -> int:
        """Ask for a MiB at a time until there is no room; return how many MiB that gave."""
        while self.held < size * MIB and self.take(MIB):
            pass
        return self.held // MIB

    def refuse(self, error: ProxyError) -> None:
        """Be refused, as a request is: what it held is free."""
        self.refusal = error
        self.memory.release(self)


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def memory(clock: Clock) -> BodyMemory:
    return BodyMemory(100 * MIB, clock.seconds)


def test_a_client_alone_leaves_a_fifth(memory: BodyMemory) -> None:
    """However many bodies it sends, others find room."""
    greedy = [Body(memory, "a") for _ in range(8)]
    assert sum(body.fill(20) for body in greedy) == 80
    assert Body(memory, "b").fill(10) == 10


@pytest.mark.parametrize("owners", [1, 2, 3, 10])
def test_clients_that_want_all_get_equal_shares(memory: BodyMemory, owners: int) -> None:
    """Each gets four parts of what all and the free rest are."""
    bodies = [Body(memory, str(number)) for number in range(owners)]
    for _ in range(200):
        for body in bodies:
            body.take(MIB // 2)
    shares = [body.held / MIB for body in bodies]
    assert max(shares) - min(shares) <= 1
    assert shares[0] == pytest.approx(400 / (1 + 4 * owners), abs=1)


def test_below_four_fifths_nobody_is_asked(memory: BodyMemory) -> None:
    """One large body is fine."""
    assert Body(memory, "a").take(80 * MIB)


def test_whoever_is_not_known_has_the_bound_on_all(memory: BodyMemory) -> None:
    """A body in the first read comes before its client is known."""
    body = Body(memory)
    assert body.take(100 * MIB)
    assert not Body(memory).take(1)
    assert not memory.assign(body, "a"), "too much for one"
    memory.release(body)
    assert (memory.held, body.held) == (0, 0)
    small = Body(memory)
    assert small.take(MIB)
    assert memory.assign(small, "a")
    assert memory.assign(Body(memory), "b"), "nothing is held yet"


def test_bodies_that_do_not_go_on_make_room(memory: BodyMemory, clock: Clock) -> None:
    """Of the client that holds most, and those first that have been silent for longest."""
    first, second, whole = (Body(memory, "a") for _ in range(3))
    other, late = Body(memory, "b"), Body(memory, "c")
    for body, size in ((whole, 25), (first, 20), (second, 15), (other, 5)):
        assert body.fill(size) == size
        clock.advance(0.1)
    memory.complete(whole)
    clock.advance(0.55)
    assert not late.take(30 * MIB), "a second has passed for none of them"
    clock.advance(0.3)
    assert first.take(1), "it goes on"
    assert late.take(30 * MIB)
    assert (first.refusal, whole.refusal, other.refusal) == (None, None, None)
    assert second.refusal is not None
    assert second.refusal.status == 503


def test_room_is_made_in_short_steps(memory: BodyMemory, clock: Clock) -> None:
    """Each body that is dropped gets a response: thousands in one turn would hold up the others.

    Those go first that hold most.
    """
    small = [Body(memory, "a") for _ in range(1000)]
    large = [Body(memory, "a") for _ in range(3)]
    for body, size in [(body, 1000) for body in small] + [(body, 24 * MIB) for body in large]:
        assert body.take(size)
        clock.advance(0.001)
    clock.advance(2)
    late = Body(memory, "b")
    assert late.take(30 * MIB)
    assert [body.refusal is None for body in large] == [False, True, True]
    for body in large[1:]:
        memory.complete(body)
    assert not late.take(30 * MIB)
    assert sum(body.refusal is not None for body in small) <= 16


def test_whole_bodies_stay(memory: BodyMemory, clock: Clock) -> None:
    """They are being served."""
    bodies = [Body(memory, "a") for _ in range(4)]
    for body in bodies:
        assert body.fill(20) == 20
        memory.complete(body)
    clock.advance(100)
    assert not Body(memory, "b").take(40 * MIB)
    assert [body.refusal for body in bodies] == [None] * 4


def test_everything_is_given_back(memory: BodyMemory, clock: Clock) -> None:
    """Nothing is known of a client that holds nothing."""
    bodies = [Body(memory, name) for name in "aab"]
    for body in bodies:
        body.fill(5)
    for body in bodies:
        memory.release(body)
        memory.release(body)
    state: dict[str, Any] = vars(memory)
    assert (memory.held, state["_by_owner"], state["_unfinished"]) == (0, {}, {})
