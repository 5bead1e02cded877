"""Which provider served a client or a session last, so that its prompt cache is hit again.

A provider keeps the beginning of a prompt for some minutes, and bills it at a fraction where it
comes again.  Another provider knows nothing of it.  So requests that belong together stay together:
at the provider of before, while it is healthy.  What is remembered is bounded, and lasts over a
reload; the one that was used longest ago is forgotten first (ADR-0026).
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable

from llmproxy.config import Route

MOST_REMEMBERED = 65_536

_FRESH_S = 1.0
"""What was renewed within this time is not renewed again; most requests come so soon."""

Key = tuple[str, ...]
"""A route and a client, and for ``sticky = "session"`` a session of that client's."""


class Stickiness:
    """The provider that each client or session is at.

    Args:
        clock: monotonic seconds.
        most: how many are remembered.
    """

    def __init__(self, clock: Callable[[], float], most: int = MOST_REMEMBERED) -> None:
        self._clock = clock
        self._most = most
        self._at: OrderedDict[Key, tuple[str, float]] = OrderedDict()

    def __len__(self) -> int:
        return len(self._at)

    def provider_of(self, key: Key, seconds: float) -> str | None:
        """Return the provider that was remembered, or None where there is none any more.

        It is remembered for so many seconds from now on, or up to one second less.
        """
        found = self._at.get(key)
        if found is None:
            return None
        provider, until = found
        left = until - self._clock()
        if left <= 0:
            del self._at[key]
            return None
        if left <= seconds - _FRESH_S:
            self.remember(key, provider, seconds)
        return provider

    def remember(self, key: Key, provider: str, seconds: float) -> None:
        """Remember a provider for so long from now on."""
        self._at[key] = provider, self._clock() + seconds
        self._at.move_to_end(key)
        if len(self._at) > self._most:
            self._at.popitem(last=False)


def key_of(route: Route, client: str, session: str | None) -> Key | None:
    """Return what requests that belong together share on a route, or None where nothing does."""
    if route.sticky == "client":
        return route.name, client
    if route.sticky == "session" and session is not None:
        return route.name, client, session
    return None
