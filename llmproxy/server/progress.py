"""Where a client's connection stands, and whether it takes what is written to it."""

from __future__ import annotations

import math
from enum import Enum


class Phase(Enum):
    """Where a connection stands."""

    HANDSHAKE = "handshake"
    IDLE = "idle"
    HEAD = "head"
    BODY = "body"
    SERVING = "serving"
    CLOSING = "closing"


class Progress:
    """What one client has taken: slow is fine, nothing at all is not."""

    __slots__ = ("_since", "_taken")

    def __init__(self) -> None:
        self._taken = -math.inf
        self._since = 0.0

    def has_stalled(self, now: float, written: int, waiting: int, limit: float | None) -> bool:
        """Tell whether the client took no byte for ``limit`` seconds although some waited.

        Args:
            now: monotonic seconds; asked again and again, at any pace.
            written: bytes that were written to it so far.
            waiting: how many of these it has not taken; what TLS adds may make it more.
            limit: seconds, or None for no limit.
        """
        taken = written - waiting
        if not waiting or limit is None:
            self._taken = -math.inf  # the clock begins at the first look at which something waits
            return False
        if taken > self._taken:
            self._taken, self._since = taken, now
            return False
        return now - self._since >= limit
