"""The places at a provider, and the queue of those who wait for one.

A provider with ``max_streams`` has so many places.  A request holds one from the moment it is sent
until its response has ended.  While all are taken, requests wait, and the clients that wait take
turns, each as often as its ``weight`` says (start-time fair queueing, Goyal et al. 1996): a client
that floods the queue waits longer itself, and nobody else does.

In a full queue the client with the most waiting requests, by its weight, loses its newest one to
one who has fewer.  A place is given back once, however its request ends.  Nothing here knows a
request or a provider (ADR-0026).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import msgspec
from twisted.internet.defer import Deferred

from llmproxy.config import Provider
from llmproxy.errors import ProxyError

_MOST_PATIENT = 1000
"""Requests that wait where there is no queue, for a place that another process may spare."""


class Place:
    """A place at a provider, which is given back once."""

    __slots__ = ("_places",)

    def __init__(self, places: Places) -> None:
        self._places: Places | None = places

    def give_back(self) -> None:
        """Let the next request have it; harmless when it was given back."""
        places, self._places = self._places, None
        if places is not None:
            places.freed()


class Waiting:
    """A request that waits for a place.

    Attributes:
        placed: fires with the :class:`Place`.  It fails with ``ProxyError`` where none came in
            time.  Cancelling it leaves the queue.
    """

    __slots__ = ("_places", "client", "place", "placed", "since", "timer")

    def __init__(self, places: Places, client: str, since: float) -> None:
        self._places = places
        self.client = client
        self.since = since
        self.place: Place | None = None  # which it will get in the next turn
        self.placed: Deferred[Place] = Deferred(lambda _: places.left(self))
        self.timer: Any = None

    @property
    def ahead(self) -> int:
        """How many requests get a place before this one, as things stand."""
        return self._places.ahead_of(self)


class _Line:
    """The requests of one client that wait, the oldest first.

    Attributes:
        turn: the virtual time at which its first request is due.
    """

    __slots__ = ("step", "turn", "waiting")

    def __init__(self, turn: float, weight: int) -> None:
        self.turn = turn
        self.step = 1 / weight
        self.waiting: dict[Waiting, None] = {}

    @property
    def length(self) -> float:
        """How much waits here, by the client's weight."""
        return len(self.waiting) * self.step


class Places:
    """The places at one provider.

    Args:
        timers: keep time.
        clock: monotonic seconds.
        waited: called with the seconds that a request has waited, when it leaves the queue.

    Attributes:
        busy: how many places are taken.
        most: how many there are, or None where there is no end of them.
        part: how many of these are this process's; None where all are.
        changed: called when more or fewer are taken or waited for; None where nobody asks.
    """

    def __init__(
        self, timers: Any, clock: Callable[[], float], waited: Callable[[float], object]
    ) -> None:
        self._timers = timers
        self._clock = clock
        self._waited = waited
        self.most: int | None = None
        self.part: int | None = None
        self.changed: Callable[[], object] | None = None
        self._patience: float | None = None
        self._size = 0
        self._timeout = 0.0
        self._lines: dict[str, _Line] = {}
        self._due: dict[str, float] = {}  # when a client whose line was empty is due again
        self._now = 0.0  # virtual: the turn of the one that got a place last
        self._queued = 0
        self.busy = 0

    def __len__(self) -> int:
        return self._queued

    def follow(self, provider: Provider) -> None:
        """Have as many places from now on as ``provider`` says; who holds one keeps it."""
        self.most = provider.max_streams
        self._size = 0 if provider.queue is None else provider.queue.size
        self._timeout = 0.0 if provider.queue is None else provider.queue.timeout
        self._fill()

    def have(self, part: int | None, patience: float | None = None) -> None:
        """Have so many of the places from now on, or all; who holds one keeps it.

        Args:
            patience: for so many seconds a request may wait where there is no queue: somebody else
                may have a place to spare.
        """
        self.part, self._patience = part, patience
        self._fill()

    @property
    def _own(self) -> int | None:
        """How many places this process may take, or None where there is no end of them."""
        return self.most if self.part is None else self.part

    @property
    def weight(self) -> int:
        """What the clients that wait weigh together; 1 at least."""
        return max(1, sum(round(1 / line.step) for line in self._lines.values()))

    def take(self) -> Place | None:
        """Return a place, or None where none is free, or others wait for it."""
        if (own := self._own) is not None and (self._queued or self.busy >= own):
            return None
        self.busy += 1
        self._tell()
        return Place(self)

    def _tell(self) -> None:
        if self.changed is not None:
            self.changed()

    @property
    def has_queue(self) -> bool:
        """Whether a request may wait here."""
        return self._size > 0 or self._patience is not None

    @property
    def has_room(self) -> bool:
        """Whether a request gets a place at once, or may wait for one."""
        return self.has_queue or (own := self._own) is None or self.busy < own

    def wait(self, client: str, weight: int) -> Waiting:
        """Join the queue.

        Raises:
            ProxyError: 503, where it is full.
        """
        if self._queued >= (self._size or _MOST_PATIENT):
            self._make_room(client, weight)
        waiting = Waiting(self, client, self._clock())
        line = self._lines.get(client)
        if line is None:
            turn = max(self._now, self._due.get(client, 0.0))
            line = self._lines[client] = _Line(turn, weight)
        line.waiting[waiting] = None
        self._queued += 1
        seconds = self._timeout if self._size else self._patience or 0.0
        waiting.timer = self._timers.callLater(seconds, partial(self._late, waiting))
        self._tell()
        return waiting

    def _make_room(self, client: str, weight: int) -> None:
        """Let the longest line lose its newest request, unless it is the one that would grow."""
        own = self._lines.get(client)
        length = 1 / weight + (0.0 if own is None else own.length)
        longest = max(self._lines.values(), key=lambda line: line.length)
        if longest is own or longest.length <= length:
            raise no_place("queue_full", "Too many requests wait for this provider; try again.")
        newest = next(reversed(longest.waiting))
        self._remove(newest)
        text = "Too many requests of this client wait for this provider; try again."
        self._timers.callLater(0, partial(_fail, newest, no_place("queue_full", text)))

    def left(self, waiting: Waiting) -> None:
        """A request leaves the queue, and waits no more."""
        self._remove(waiting)
        if waiting.place is not None:
            waiting.place.give_back()

    def _late(self, waiting: Waiting) -> None:
        self._remove(waiting)
        reason = "queue_timeout" if self._size else "provider_busy"
        text = "The provider had no free place in time; try again."
        waiting.placed.errback(no_place(reason, text))

    def freed(self) -> None:
        """A place was given back."""
        self.busy -= 1
        self._fill()
        self._tell()

    def _fill(self) -> None:
        """Give free places to those who wait, in their turn."""
        while self._queued and ((own := self._own) is None or self.busy < own):
            line = min(self._lines.values(), key=lambda one: one.turn)
            waiting = next(iter(line.waiting))
            self._now = line.turn
            line.turn += line.step
            self._remove(waiting)
            self.busy += 1
            waiting.place = Place(self)
            # A turn later: whoever gives a place back is not to run somebody else's request.
            self._timers.callLater(0, partial(_hand_over, waiting))

    def _remove(self, waiting: Waiting) -> None:
        line = self._lines.get(waiting.client)
        if line is None or waiting not in line.waiting:
            return
        del line.waiting[waiting]
        self._queued -= 1
        if not line.waiting:
            del self._lines[waiting.client]
            self._due[waiting.client] = line.turn
        if not self._lines:
            self._due.clear()
            self._now = 0.0
        if waiting.timer.active():
            waiting.timer.cancel()
        self._waited(self._clock() - waiting.since)

    def ahead_of(self, waiting: Waiting) -> int:
        """Return how many get a place before ``waiting``, if nobody else comes."""
        own = self._lines.get(waiting.client)
        if own is None or waiting not in own.waiting:
            return 0
        place = list(own.waiting).index(waiting)
        due = own.turn + place * own.step
        others = (line for line in self._lines.values() if line is not own)
        return place + sum(
            min(len(line.waiting), max(0, -int(-(due - line.turn) // line.step))) for line in others
        )


def _hand_over(waiting: Waiting) -> None:
    if not waiting.placed.called and waiting.place is not None:
        waiting.placed.callback(waiting.place)


def _fail(waiting: Waiting, error: ProxyError) -> None:
    if not waiting.placed.called:
        waiting.placed.errback(error)


def no_place(reason: str, text: str) -> ProxyError:
    """Return the refusal of a request for which a provider has no place."""
    return ProxyError(503, reason, text, fields=((b"retry-after", b"1"),))


class Occupancy(msgspec.Struct, frozen=True):
    """How the places at a provider are taken.

    Attributes:
        busy: how many are taken.
        most: how many there are; None where there is no end of them.
        waiting: how many requests wait for one.
    """

    busy: int
    most: int | None
    waiting: int


class AllPlaces:
    """The places at all providers; they last over a reload.

    Args:
        As :class:`Places`.
    """

    def __init__(
        self, timers: Any, clock: Callable[[], float], waited: Callable[[float], object]
    ) -> None:
        self._make = lambda: Places(timers, clock, waited)
        self._places: dict[str, Places] = {}
        self._changed: Callable[[str], object] | None = None

    def at(self, provider: str) -> Places:
        """Return the places at a provider."""
        found = self._places.get(provider)
        if found is None:
            found = self._places[provider] = self._make()
            self._watch(provider, found)
        return found

    def watch(self, changed: Callable[[str], object] | None) -> None:
        """Call ``changed`` with a provider's name when more or fewer places there are wanted.

        With None all places are this process's again.
        """
        self._changed = changed
        for name, places in self._places.items():
            self._watch(name, places)
            if changed is None:
                places.have(None)

    def _watch(self, provider: str, places: Places) -> None:
        changed = self._changed
        places.changed = None if changed is None else partial(changed, provider)

    def limited(self) -> dict[str, Places]:
        """Return the places at providers that have so many, and no more."""
        return {name: one for name, one in self._places.items() if one.most is not None}

    def follow(self, providers: Mapping[str, Provider]) -> None:
        """Go by these providers from now on; forget the others, once nothing is left there."""
        for name, places in list(self._places.items()):
            if name not in providers and not places.busy and not len(places):
                del self._places[name]
        for name, provider in providers.items():
            self.at(name).follow(provider)

    def occupancy(self, provider: str) -> Occupancy:
        """Return how the places at a provider are taken."""
        places = self.at(provider)
        return Occupancy(places.busy, places.most, len(places))

    def queued(self) -> dict[str, int]:
        """Return how many requests wait, by provider."""
        return {name: len(places) for name, places in self._places.items() if places.has_queue}
