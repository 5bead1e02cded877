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

_At = tuple[str, float, float]
"""A provider, until when it is remembered, and when others are told again."""

Key = tuple[str, ...]
"""A route and a client, and for ``sticky = "session"`` a session of that client's."""


class Stickiness:
    """The provider that each client or session is at.

    Args:
        clock: monotonic seconds.
        most: how many are remembered.

    Attributes:
        remembered: called with a key, a provider and for how many seconds others are to know that;
            None where there are no others.
    """

    def __init__(self, clock: Callable[[], float], most: int = MOST_REMEMBERED) -> None:
        self._clock = clock
        self._most = most
        self._at: OrderedDict[Key, _At] = OrderedDict()
        self.remembered: Callable[[Key, str, float], object] | None = None

    def __len__(self) -> int:
        return len(self._at)

    def provider_of(self, key: Key, seconds: float) -> str | None:
        """Return the provider that was remembered, or None where there is none any more.

        It is remembered for so many seconds from now on, or up to one second less.
        """
        found = self._at.get(key)
        if found is None:
            return None
        provider, until, _ = found
        left = until - self._clock()
        if left <= 0:
            del self._at[key]
            return None
        if left <= seconds - _FRESH_S:
            self.remember(key, provider, seconds)
        return provider

    def remember(self, key: Key, provider: str, seconds: float, *, is_told: bool = False) -> None:
        """Remember a provider for so long from now on.

        Others are told what is new, and again when half of its time is over.

        Args:
            is_told: they know it already.
        """
        now, known = self._clock(), self._at.get(key)
        tell_at = 0.0 if known is None or known[0] != provider else known[2]
        if is_told:
            tell_at = now + seconds / 2
        elif self.remembered is not None and now >= tell_at:
            tell_at = now + seconds / 2
            self.remembered(key, provider, 2 * seconds)
        self._at[key] = provider, now + seconds, tell_at
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
