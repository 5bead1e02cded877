"""What providers said last of their limits, and of how much of them is left.

Nothing is decided by it: it is what an operator wants to see beside a provider's state.  A response
is kept by its fields alone, the last one that says something, and is read when somebody looks.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping

import msgspec

_MARKS = frozenset(
    (
        *(b"x-ratelimit-remaining-requests", b"x-ratelimit-remaining-tokens"),
        *(b"x-ratelimit-remaining", b"ratelimit-remaining", b"ratelimit"),
        *(b"anthropic-ratelimit-requests-remaining", b"anthropic-ratelimit-tokens-remaining"),
        *(b"anthropic-ratelimit-unified-status", b"retry-after"),
    )
)
"""A response with one of these fields says something of limits."""

_SHOWN = (b"x-ratelimit-", b"anthropic-ratelimit-", b"ratelimit", b"retry-after")
"""How the names of the fields begin that are shown."""

_MOST_SHOWN, _LONGEST = 32, 128


class Told(msgspec.Struct, frozen=True):
    """What a provider said of its limits.

    Attributes:
        age_s: how many seconds ago that was.
        fields: the values of its header fields, by name.
    """

    age_s: float
    fields: dict[str, str]


class Headroom:
    """What each provider said last.

    Args:
        clock: monotonic seconds.
    """

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._told: dict[str, tuple[float, Mapping[bytes, bytes]]] = {}

    def note(self, provider: str, first: Mapping[bytes, bytes]) -> None:
        """Keep what a response says, if it says anything.

        Args:
            first: the first value of each of its fields, by the name in lower case; it is kept.
        """
        if not _MARKS.isdisjoint(first):
            self._told[provider] = (self._clock(), first)

    def follow(self, providers: Collection[str]) -> None:
        """Forget the providers that are not among these."""
        for name in [name for name in self._told if name not in providers]:
            del self._told[name]

    def told(self, provider: str) -> Told | None:
        """Return what a provider said last, or None where it said nothing."""
        found = self._told.get(provider)
        if found is None:
            return None
        at, first = found
        shown = [name for name in first if name.startswith(_SHOWN)][:_MOST_SHOWN]
        fields = {name.decode("ascii"): first[name].decode("latin-1")[:_LONGEST] for name in shown}
        return Told(round(self._clock() - at, 3), fields)
