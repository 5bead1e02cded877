"""The places at providers, which processes share by what each of them wants (ADR-0041).

A provider's ``max_streams`` is one figure for all processes.  Each has a part of it, which it gives
to its own requests as ever: at once, and in turns of its clients.  When it wants more or fewer it
says so with the next call, and hears how large its part is now.  Nobody has a place to spare, as it
would be missed elsewhere; parts go by the weights of the clients that wait.  A part that shrinks
takes no place from a request that has one.

Together the parts are never more than the whole, but for the moment behind an engine that lost
what it knew, and behind a reload with fewer places.
"""

from __future__ import annotations

from typing import Any

from llmproxy.policy.fair_queue import AllPlaces
from llmproxy.shared.client_limits import EngineLike

_CLAIM = 8
"""What the op does; ``batch.lua`` has it at this place."""

_AGAIN_S = 0.02
"""Seconds until a process whose requests wait asks again."""

_RENEW_S = 1.0

_CAUTION_S = 5.0
"""For so long behind an engine that was away no part grows: others may not have told theirs yet."""


class SharedPlaces:
    """What this process has of the places at each provider.

    Args:
        reactor: keeps time.
        places: gives them to requests.

    Attributes:
        engine: what is shared; None where nothing is.
    """

    def __init__(self, reactor: Any, places: AllPlaces) -> None:
        self._reactor = reactor
        self._places = places
        self._wanted: dict[str, None] = {}
        self._renew_at = 0.0
        self._alone: int | None = None  # among how many parts were shared while it was away
        self._cautious_until = 0.0
        self._again: Any = None
        self._patience = 0.0
        self.engine: EngineLike | None = None

    def use(self, engine: EngineLike | None, patience: float = 0.0) -> None:
        """Share with this engine from now on, or not at all.

        Args:
            patience: seconds that a request may wait for a place where a provider has no queue.
        """
        self.engine, self._patience, self._alone = engine, patience, None
        self._wanted.clear()
        self._stop()
        self._places.watch(None if engine is None else self._changed)

    def _changed(self, provider: str) -> None:
        if self._places.at(provider).most is not None and self.engine is not None:
            self._wanted[provider] = None
            self.engine.wake()

    @property
    def has_news(self) -> bool:
        """Whether there is something to tell."""
        return bool(self._wanted)

    def take(self, most: int) -> list[list[Any]]:
        """Return what is wanted, and once a second of each provider."""
        if (now := self._reactor.seconds()) >= self._renew_at:
            self._renew_at = now + _RENEW_S
            self._wanted |= dict.fromkeys(self._places.limited())
        names = list(self._wanted)[:most]
        for name in names:
            del self._wanted[name]
        return [op for name in names if (op := self._claim(name)) is not None]

    def _claim(self, name: str) -> list[Any] | None:
        places = self._places.at(name)
        if places.most is None:
            return None
        return [_CLAIM, name, places.most, places.busy, len(places), places.weight]

    def heard(self, op: list[Any], result: Any) -> None:
        """Have the part that the engine says."""
        places = self._places.at(op[1])
        if self.engine is None or places.most is None:
            return
        part, now = result, self._reactor.seconds()
        if self._alone is not None:
            if not self._cautious_until:
                self._cautious_until = now + _CAUTION_S
            if now < self._cautious_until:
                part = min(part, max(1, places.most // self._alone))
            else:
                self._alone, self._cautious_until = None, 0.0
        places.have(part, self._patience)
        if len(places) and self._again is None:
            self._again = self._reactor.callLater(_AGAIN_S, self._ask_again)

    def _ask_again(self) -> None:
        self._again = None
        for name, places in self._places.limited().items():
            if len(places):
                self._changed(name)

    def hear(self, age: float, text: str) -> None:
        """Hear nothing: parts are told to each alone."""

    def hear_time(self, milliseconds: int) -> None:
        """Parts have no time."""

    def introduce(self, told: list[list[Any]], *, is_lost: bool) -> list[list[Any]]:
        """Return what is wanted of each provider."""
        self._wanted.clear()
        return [op for name in self._places.limited() if (op := self._claim(name)) is not None]

    def away(self, processes: int) -> None:
        """Have an equal part while the engine is away."""
        self._alone, self._cautious_until = processes, 0.0
        for places in self._places.limited().values():
            if places.most is not None:
                places.have(max(1, places.most // processes))

    def _stop(self) -> None:
        if self._again is not None and self._again.active():
            self._again.cancel()
        self._again = None
