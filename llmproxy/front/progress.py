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
    """What one client has taken: slow is fine, nothing at all is not.

    Attributes:
        written: bytes that were written to it so far; counted by whoever writes.  What TLS adds is
            not among them, so that ``waiting`` may be more.
    """

    __slots__ = ("_since", "_taken", "written")

    def __init__(self) -> None:
        self.written = 0
        self._taken = -math.inf
        self._since = 0.0

    def has_stalled(self, now: float, waiting: int, limit: float | None) -> bool:
        """Tell whether the client took no byte for ``limit`` seconds although some waited.

        Args:
            now: monotonic seconds; asked again and again, at any pace.
            waiting: bytes that were written and not taken.
            limit: seconds, or None for no limit.
        """
        taken = self.written - waiting
        if not waiting or limit is None:
            self._taken = -math.inf  # the clock begins at the first look at which something waits
            return False
        if taken > self._taken:
            self._taken, self._since = taken, now
            return False
        return now - self._since >= limit
