"""Requests that come again: the same client and body, while the first runs or behind its cut.

An idle limit on a hop that is nobody's shows itself in this way alone: the hop drops a stream that
is silent for long, the program sends the request again, and the provider is paid twice.  Such a
request is counted, and its record says how the first one stood.

A request is told by a hash of client, path and body with a key of the process's own, of the body's
length and its two ends where it is long; no body is kept.  Programs that ask the same thing several
times at once, as to choose among the responses, look the same.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable

from llmproxy.errors import EndReason

RUNNING = "running"
"""How the first request stood, where it had not ended; else it is its end reason."""

_SOON_S = 60.0
"""A request that comes later than so behind a cut has nothing to do with it."""

_MOST = 4096
"""How many cuts are remembered."""

_END = 64 * 1024
"""Of a body that is longer than twice this, the two ends are looked at."""

_CUTS = frozenset(
    (
        EndReason.CLIENT_GONE,
        EndReason.CLIENT_STALLED,
        EndReason.UPSTREAM_IDLE,
        EndReason.UPSTREAM_BROKEN,
        EndReason.UNFINISHED,
        EndReason.DRAINED,
    )
)
"""The ends after which a program has part of a response, or nothing, and may try again."""

Key = int


class Resends:
    """The requests of one process that run, and those that were cut a moment ago.

    Args:
        clock: monotonic seconds.
    """

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._running: dict[Key, int] = {}  # a Counter's way to 0 is a call of Python's
        self._cut: OrderedDict[Key, tuple[float, EndReason]] = OrderedDict()

    def begins(self, key: Key) -> str | None:
        """Note that a request runs; return how another one like it stands, or None for no other."""
        count = self._running.get(key, 0)
        self._running[key] = count + 1
        if count:
            return RUNNING
        if not self._cut or (cut := self._cut.pop(key, None)) is None:
            return None
        at, end = cut
        return end.value if self._clock() - at <= _SOON_S else None

    def ends(self, key: Key, end: EndReason) -> None:
        """The request has ended."""
        count = self._running.pop(key)
        if count > 1:
            self._running[key] = count - 1
        if end is not EndReason.COMPLETE and end in _CUTS:  # an Enum's hash is a call of Python's
            self._cut[key] = (self._clock(), end)
            self._cut.move_to_end(key)
            if len(self._cut) > _MOST:
                self._cut.popitem(last=False)


def key_of(client: str, path: str, body: bytes) -> Key:
    """Return what a request with this body is told by."""
    if len(body) <= 2 * _END:
        return hash((client, path, body))
    return hash((client, path, len(body), body[:_END], body[-_END:]))
