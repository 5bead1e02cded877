"""The places at a provider, and the turns of those who wait, under a clock that the test turns."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable
from contextlib import suppress

import pytest
from twisted.internet.defer import CancelledError
from twisted.internet.task import Clock

from llmproxy.config import Provider
from llmproxy.config.settings import Queue
from llmproxy.config.url import Url, url
from llmproxy.dialects.dialect import Dialect
from llmproxy.errors import ProxyError
from llmproxy.policy.fair_queue import AllPlaces, Place, Places, Waiting

SOMEWHERE: Url = url("http://h")


def provider(most: int | None = 1, size: int = 10, timeout: float = 10.0) -> Provider:
    queue = Queue(size=size, timeout=timeout) if size else None
    return Provider(name="p", url=SOMEWHERE, dialect=Dialect.OPENAI, max_streams=most, queue=queue)


class Desk:
    """Places, and a note of who got one when."""

    def __init__(self, **config: int | float | None) -> None:
        self.clock = Clock()
        self.waits: list[float] = []
        self.places = Places(self.clock, self.clock.seconds, self.waits.append)
        self.places.follow(provider(**config))  # type: ignore[arg-type]  # its own arguments
        self.served: list[str] = []
        self.holding: list[Place] = []
        self.refused: list[tuple[str, str]] = []

    def wait(self, client: str, weight: int = 1) -> Waiting:
        waiting = self.places.wait(client, weight)

        def placed(place: Place) -> None:
            self.served.append(client)
            self.holding.append(place)

        def failed(failure: object) -> None:
            error = failure.value  # type: ignore[attr-defined]  # a Failure's
            if isinstance(error, ProxyError):
                self.refused.append((client, error.reason))

        waiting.placed.addCallbacks(placed, failed)
        return waiting

    def serve(self, count: int = 1) -> None:
        """Let so many requests end, one after the other."""
        for _ in range(count):
            self.holding.pop(0).give_back()
            self.clock.advance(0)


@pytest.fixture
def desk() -> Desk:
    """One place, which is taken."""
    desk = Desk()
    place = desk.places.take()
    assert place is not None
    desk.holding.append(place)
    return desk


def test_without_a_limit_there_is_always_a_place() -> None:
    """They are counted all the same."""
    desk = Desk(most=None, size=0)
    assert all(desk.places.take() is not None for _ in range(100))
    assert desk.places.busy == 100


def test_a_place_is_given_back_once(desk: Desk) -> None:
    """However often its request ends."""
    place = desk.holding[0]
    place.give_back()
    place.give_back()
    assert desk.places.busy == 0


def test_who_waits_gets_the_next_place(desk: Desk) -> None:
    """Nobody else can take it from him."""
    desk.wait("a")
    desk.holding.pop().give_back()
    assert desk.places.take() is None, "it is on its way to the one who waits"
    desk.clock.advance(0)
    assert desk.served == ["a"]
    assert desk.places.busy == 1


def test_a_burst_starves_nobody(desk: Desk) -> None:
    """Nine calm clients get their turns among those of the one that floods."""
    for _ in range(9):
        desk.wait("flood")
    desk.places.follow(provider(size=100))
    for number in range(9):
        desk.wait(f"calm{number}")
    desk.serve(10)
    assert desk.served[0] == "flood"
    assert sorted(desk.served[1:]) == [f"calm{number}" for number in range(9)]


def test_who_comes_back_at_once_gets_no_more_than_a_share() -> None:
    """A client with one request at a time does not starve one with many either."""
    desk = Desk(size=1000)
    desk.holding.append(desk.places.take())  # type: ignore[arg-type]  # it is free
    for _ in range(100):
        desk.wait("many")
    desk.wait("one")
    for _ in range(50):
        desk.serve()
        if desk.served[-1] == "one":
            desk.wait("one")
    assert Counter(desk.served) == {"many": 25, "one": 25}


def test_weights_are_shares() -> None:
    """Three for the one, one for the other, while both wait."""
    desk = Desk(size=1000)
    desk.holding.append(desk.places.take())  # type: ignore[arg-type]  # it is free
    for _ in range(100):
        desk.wait("heavy", 3)
        desk.wait("light", 1)
    desk.serve(40)
    assert Counter(desk.served) == {"heavy": 30, "light": 10}


def test_the_wait_of_the_calm_stays_within_twice_their_share() -> None:
    """One client keeps the queue full; nine others come now and then, and wait at most 10 turns."""
    rng = random.Random(7)
    desk = Desk(most=4, size=200, timeout=1e6)
    desk.holding += [desk.places.take() for _ in range(4)]  # type: ignore[misc]  # four are free
    waits: list[float] = []

    def arrive(client: str) -> None:
        began = desk.clock.seconds()
        waiting = desk.wait(client)
        waiting.placed.addCallback(lambda _: waits.append(desk.clock.seconds() - began))

    calm = [f"calm{number}" for number in range(9)]
    for _ in range(2000):
        while len(desk.places) < 150:
            desk.wait("flood")
        for client in calm:
            if rng.random() < 0.03:
                arrive(client)
        desk.clock.advance(1)
        desk.serve()
    # One place a second: the fair share of ten clients is one place in ten seconds.
    assert len(waits) > 400
    assert max(waits) <= 20
    assert desk.served.count("flood") > 1000, "what is left is the flood's"


def test_the_queue_is_bounded(desk: Desk) -> None:
    """Who has the most waiting loses the newest; alone, it is refused itself."""
    waiting = [desk.wait("flood") for _ in range(10)]
    with pytest.raises(ProxyError) as refused:
        desk.places.wait("flood", 1)
    assert (refused.value.status, refused.value.reason) == (503, "queue_full")
    desk.wait("calm")
    desk.clock.advance(0)
    assert desk.refused == [("flood", "queue_full")]
    assert waiting[-1].placed.called
    assert len(desk.places) == 10


def test_a_heavy_client_may_have_more_waiting(desk: Desk) -> None:
    """Its line counts by its weight."""
    for _ in range(8):
        desk.wait("heavy", 10)
    for _ in range(2):
        desk.wait("light")
    with pytest.raises(ProxyError):
        desk.places.wait("light", 1)


def test_nobody_waits_longer_than_the_timeout(desk: Desk) -> None:
    """Then the request is refused, and its place in the queue is free."""
    desk.wait("a")
    desk.clock.advance(9.9)
    assert desk.refused == []
    desk.clock.advance(0.2)
    assert desk.refused == [("a", "queue_timeout")]
    assert len(desk.places) == 0
    assert desk.waits == [pytest.approx(10, abs=0.2)]


def test_who_leaves_the_queue_frees_the_place_at_once(desk: Desk) -> None:
    """The one behind moves up."""
    first, second = desk.wait("a"), desk.wait("a")
    assert (first.ahead, second.ahead) == (0, 1)
    first.placed.addErrback(lambda failure: failure.trap(CancelledError))
    first.placed.cancel()
    assert (len(desk.places), second.ahead) == (1, 0)


def test_who_leaves_in_the_turn_of_the_place_gives_it_on(desk: Desk) -> None:
    """Neither is the place lost, nor is it used twice."""
    first = desk.wait("a")
    desk.wait("b")
    desk.holding.pop().give_back()
    first.placed.cancel()
    desk.clock.advance(0)
    desk.clock.advance(0)
    assert desk.served == ["b"]
    assert desk.places.busy == 1


def test_a_place_that_nobody_takes_any_more_comes_back_at_once(desk: Desk) -> None:
    """Not a turn later: the process may shut down, and has no more turns."""
    waiting = [desk.wait("a"), desk.wait("b")]
    desk.holding.pop().give_back()
    for one in waiting:
        one.placed.cancel()
    assert (desk.places.busy, len(desk.places)) == (0, 0)


def test_ahead_counts_those_who_are_served_before() -> None:
    """As things stand; the test lets all be served, and compares."""
    rng = random.Random(3)
    for _ in range(30):
        desk = Desk(size=1000)
        desk.holding.append(desk.places.take())  # type: ignore[arg-type]  # it is free
        order: list[Waiting] = []
        told: dict[Waiting, int] = {}
        waiting = []
        for _ in range(rng.randrange(1, 30)):
            one = desk.wait(rng.choice("abc"), 1)
            one.placed.addCallback(_noting(order, one))
            waiting.append(one)
        told = {one: one.ahead for one in waiting}
        desk.serve(len(waiting))
        for place, one in enumerate(order):
            assert abs(told[one] - place) <= 2, "equal turns may go either way"


def _noting(order: list[Waiting], one: Waiting) -> Callable[[object], None]:
    return lambda _: order.append(one)


def test_a_reload_changes_places_and_queue(desk: Desk) -> None:
    """Who waits gets the new places; who holds one keeps it."""
    desk.wait("a")
    desk.wait("b")
    desk.places.follow(provider(most=3))
    desk.clock.advance(0)
    assert desk.served == ["a", "b"]
    desk.places.follow(provider(most=1))
    assert desk.places.busy == 3
    assert desk.places.take() is None


def test_random_lives_end_with_nothing_left() -> None:
    """Whoever comes, is served, leaves or waits too long: all places come back."""
    rng = random.Random(11)
    desk = Desk(most=3, size=8, timeout=5)
    waiting: list[Waiting] = []
    for _ in range(5000):
        action = rng.random()
        if action < 0.5:
            client = rng.choice("abcd")
            if (place := desk.places.take()) is not None:
                desk.holding.append(place)
            else:
                with suppress(ProxyError):
                    waiting.append(desk.wait(client, rng.randrange(1, 4)))
        elif action < 0.7 and desk.holding:
            desk.holding.pop(rng.randrange(len(desk.holding))).give_back()
        elif action < 0.85 and waiting:
            waiting.pop(rng.randrange(len(waiting))).placed.cancel()
        else:
            desk.clock.advance(rng.choice((0, 0, 0.1, 2)))
        assert 0 <= desk.places.busy <= 3
        assert len(desk.places) <= 8
    desk.clock.advance(0)
    while desk.holding:
        desk.serve()
    assert (desk.places.busy, len(desk.places)) == (0, 0)
    assert not desk.clock.getDelayedCalls()


def test_places_of_providers_that_are_gone_are_forgotten() -> None:
    """Once nothing is left there."""
    clock = Clock()
    places = AllPlaces(clock, clock.seconds, lambda _: None)
    places.follow({"p": provider(size=5)})
    held = places.at("p").take()
    assert held is not None
    places.follow({})
    assert places.at("p").busy == 1
    held.give_back()
    places.follow({})
    assert places.queued() == {}
