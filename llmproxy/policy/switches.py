"""What an operator has switched off for a while: providers, and models of providers.

One object lasts as long as the process, so that a reload changes nothing of it.  The admin site
turns the switches; a request asks before it goes to a candidate, which costs next to nothing while
:attr:`Switches.off` is empty.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import msgspec

from llmproxy.config.values import show_instant
from llmproxy.errors import ProxyError

_RETRY_S = 60
"""Seconds after which to try again where nobody said for how long a provider is off."""


class Switch(msgspec.Struct, frozen=True):
    """One provider, or one model of it, that is off.

    Attributes:
        since: seconds since the epoch.
        until: by the monotonic clock, or None until it is switched on.
        by: the address of whoever did it.
    """

    since: float
    until: float | None
    by: str


class Switches:
    """All of them.

    Args:
        clock: monotonic seconds.
        wall: seconds since the epoch.

    Attributes:
        off: what is off, by provider and model; the model is None where all of the provider is.
            One whose time is over may still stand here.
    """

    def __init__(self, clock: Callable[[], float], wall: Callable[[], float]) -> None:
        self._clock = clock
        self._wall = wall
        self.off: dict[tuple[str, object], Switch] = {}

    def disable(self, provider: str, model: str | None, seconds: float | None, by: str) -> None:
        """Switch a provider off, or one model of it; ``seconds`` None is until it is enabled."""
        until = None if seconds is None else self._clock() + seconds
        self.off[provider, model] = Switch(self._wall(), until, by)

    def enable(self, provider: str, model: str | None) -> None:
        """Switch it on again; a model that is off stays off when its provider is switched on."""
        self.off.pop((provider, model), None)

    def is_off(self, provider: str, model: object, now: float) -> bool:
        """Return whether a request for this model may not go to the provider.

        Args:
            model: as the provider gets it, or whatever stands for none.
            now: monotonic seconds.
        """
        return self._is_off((provider, None), now) or self._is_off((provider, model), now)

    def refusal(self, provider: str, model: object, now: float) -> ProxyError:
        """Return the error for a request that no other provider can take."""
        found = [self.off.get((provider, None)), self.off.get((provider, model))]
        ends = [one.until for one in found if one is not None]
        left = [_RETRY_S if end is None else math.ceil(end - now) for end in ends]
        return ProxyError(
            503,
            "provider_disabled",
            "The provider of this request is switched off for a while.",
            fields=((b"retry-after", b"%d" % max([1, *left])),),
            detail=f"providers.{provider} was switched off on the admin site",
        )

    def rows(self) -> list[dict[str, str | None]]:
        """Return what is off, as it is shown; the times are RFC 3339, in UTC."""
        now, wall = self._clock(), self._wall()
        for key in list(self.off):
            self._is_off(key, now)
        return [
            {
                "provider": provider,
                "model": None if model is None else str(model),
                "since": show_instant(one.since),
                "until": None if one.until is None else show_instant(wall + one.until - now),
                "by": one.by,
            }
            for (provider, model), one in sorted(self.off.items(), key=repr)
        ]

    def _is_off(self, key: tuple[str, object], now: float) -> bool:
        one = self.off.get(key)
        if one is None:
            return False
        if one.until is not None and now >= one.until:
            del self.off[key]
            return False
        return True
