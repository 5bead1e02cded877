"""How providers stand: what is learned of them while the process runs, and lasts over a reload.

Every configuration has its own routes; what a provider did a minute ago, and what an operator has
switched off, is true for the next configuration, too.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from llmproxy.config import Config
from llmproxy.policy.fair_queue import AllPlaces
from llmproxy.policy.headroom import Headroom
from llmproxy.policy.health import Health
from llmproxy.policy.stickiness import Stickiness
from llmproxy.policy.switches import Switches


class Standing:
    """How all providers stand.

    Args:
        timers: keeps the time of those who wait for a place.
        clock: monotonic seconds.
        wall: seconds since the epoch.
        waited: called with the seconds that a request has waited for a place.

    Attributes:
        health: whom to leave alone.
        places: who has a free place.
        stickiness: who served whom last.
        switches: what an operator has switched off.
        headroom: what providers said of their limits.
        providers: the names of those that the configuration has.
    """

    def __init__(
        self,
        timers: Any,
        clock: Callable[[], float],
        wall: Callable[[], float],
        waited: Callable[[float], object] = lambda _: None,
    ) -> None:
        self._clock = clock
        self.health = Health(clock)
        self.places = AllPlaces(timers, clock, waited)
        self.stickiness = Stickiness(clock)
        self.switches = Switches(clock, wall)
        self.headroom = Headroom(clock)
        self.providers: frozenset[str] = frozenset()

    def follow(self, config: Config) -> None:
        """Go by the providers of this configuration from now on."""
        self.providers = frozenset(config.providers)
        self.health.follow(config.providers)
        self.places.follow(config.providers)
        self.headroom.follow(config.providers)

    def ready(self, providers: Iterable[str]) -> int:
        """Return how many of these providers everybody may ask: on, not failing, not cooling."""
        now = self._clock()
        return sum(
            self.health.is_ready(name) and not self.switches.is_off(name, None, now)
            for name in providers
        )
