"""How late the reactor is: by how much it misses an appointment that it was given."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from twisted.internet.task import LoopingCall

_INTERVAL = 1.0
"""Seconds between two appointments."""


class Lag:
    """Measures the lag of one reactor.

    Args:
        reactor: keeps, or misses, the appointments.
        clock: monotonic seconds.
        observe: called with each lag, in seconds.
    """

    def __init__(
        self, reactor: Any, clock: Callable[[], float], observe: Callable[[float], None]
    ) -> None:
        self._clock = clock
        self._observe = observe
        self._expected = 0.0
        self._call = LoopingCall(self._measure)
        self._call.clock = reactor

    def start(self) -> None:
        """Begin to measure."""
        self._expected = self._clock() + _INTERVAL
        self._call.start(_INTERVAL, now=False)

    def stop(self) -> None:
        """Measure no more; harmless where it was not begun."""
        if self._call.running:
            self._call.stop()

    def _measure(self) -> None:
        now = self._clock()
        self._observe(max(0.0, now - self._expected))
        self._expected = now + _INTERVAL
