"""When the garbage collector looks at what lives: seldom, and never at running streams if it can.

What a request makes dies by reference counting, and leaves next to no cycles.  CPython looks for
cycles whenever so many more objects were made than have died, as they are when streams begin: then
it stops everything for 100 ms to look at all of them, and finds next to nothing.

So the collector is switched off, and what lives is put out of its sight once a second, which costs
nothing.  It looks at everything when few requests run and memory has grown, and in any case when
memory has grown by so much that cycles could be the reason (ADR-0039).
"""

from __future__ import annotations

import gc
import sys
from collections.abc import Callable
from typing import Any

from twisted.internet.task import LoopingCall

_LOOK_S = 1.0
"""Seconds between two looks at how much memory is in use; a look takes some 20 µs."""

_QUIET = 8
"""Requests that may run while everything is looked at, which takes 40 ms and more."""

_SOME = 100_000
"""Blocks of memory, some 10 MB, that are worth a look when it is quiet."""

_MANY = 2_000_000
"""Blocks, some 200 MB, that are worth a look at any time, if they also double what there was."""


class Garbage:
    """Decides when the collector of this process runs; it is the whole process's.

    Args:
        reactor: keeps time.
        running: returns how many requests are being served.
        blocks: returns how many blocks of memory are in use.
    """

    def __init__(
        self,
        reactor: Any,
        running: Callable[[], int],
        blocks: Callable[[], int] = sys.getallocatedblocks,
    ) -> None:
        self._running = running
        self._blocks = blocks
        self._before = 0
        self._call = LoopingCall(self._look)
        self._call.clock = reactor

    def start(self) -> None:
        """Switch the collector off; look at everything now, and when that is due."""
        gc.disable()
        self._collect()
        self._call.start(_LOOK_S, now=False)

    def stop(self) -> None:
        """Leave the collector to itself again; harmless where it was not switched off."""
        if self._call.running:
            self._call.stop()
            gc.enable()

    def _look(self) -> None:
        grown = self._blocks() - self._before
        if grown > max(_MANY, self._before) or (grown > _SOME and self._running() <= _QUIET):
            self._collect()
        else:
            gc.freeze()

    def _collect(self) -> None:
        gc.unfreeze()
        gc.collect()
        gc.freeze()
        self._before = self._blocks()
