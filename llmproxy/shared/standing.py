"""What processes tell each other of providers: cooldowns and circuits, and who is where.

A provider that has refused one process is to be left alone by all, and so is one that fails.  Each
process decides by what it knows itself, at once and as before; what it learns it tells to all, and
what others tell is learned within a second, mostly sooner: it comes with the next answer of the
engine (ADR-0041).

Where a client or a session is (``sticky``) is kept by the engine.  A process that does not know it
asks; then it knows.  Without an engine nothing here does anything.
"""

from __future__ import annotations

from hashlib import sha256
from typing import Any

import msgspec

from llmproxy.errors import EngineAway
from llmproxy.policy.health import Learned
from llmproxy.policy.standing import Standing
from llmproxy.policy.stickiness import Key
from llmproxy.shared.client_limits import EngineLike

_TELL, _STICK, _STUCK = 5, 6, 7
"""What an op does; ``batch.lua`` has them in this order."""

_MOST_NEWS = 1000
"""What is kept to be told while the engine is away; the oldest goes first."""


class SharedStanding:
    """What is told and heard of providers.

    Args:
        standing: what this process knows.

    Attributes:
        engine: what is shared; None where nothing is.
    """

    def __init__(self, standing: Standing) -> None:
        self._standing = standing
        self._news: list[list[Any]] = []
        self.engine: EngineLike | None = None
        standing.health.learned = self._learned

    def use(self, engine: EngineLike | None) -> None:
        """Tell this engine from now on, or nobody."""
        self.engine = engine
        self._news.clear()
        self._standing.stickiness.remembered = None if engine is None else self._remembered

    async def recall(self, key: Key, seconds: float) -> None:
        """Learn where a client or a session is, if this process does not know it."""
        engine, stickiness = self.engine, self._standing.stickiness
        if engine is None or not engine.is_up or stickiness.provider_of(key, seconds) is not None:
            return
        try:
            provider = await engine.ask([_STUCK, _name_of(key)], _nothing)
        except EngineAway:
            return
        if provider:
            stickiness.remember(key, provider, seconds, is_told=True)

    # -- what is told ---------------------------------------------------------------------------

    def _learned(self, learned: Learned) -> None:
        self._tell([_TELL, msgspec.json.encode(learned).decode()])

    def _remembered(self, key: Key, provider: str, seconds: float) -> None:
        self._tell([_STICK, _name_of(key), provider, max(1, int(seconds * 1000))])

    def _tell(self, op: list[Any]) -> None:
        if self.engine is None:
            return
        self._news.append(op)
        if len(self._news) > _MOST_NEWS:
            del self._news[0]
        self.engine.wake()

    @property
    def has_news(self) -> bool:
        """Whether there is something to tell."""
        return bool(self._news)

    def take(self, most: int) -> list[list[Any]]:
        """Return what is to be told."""
        found, self._news = self._news[:most], self._news[most:]
        return found

    def heard(self, op: list[Any], result: Any) -> None:
        """Nothing comes of it."""

    def away(self, processes: int) -> None:
        """Go on with what is known."""

    def hear_time(self, milliseconds: int) -> None:
        """Times are told as seconds."""

    def introduce(self, told: list[list[Any]], *, is_lost: bool) -> list[list[Any]]:
        """Return what waits, and if all is lost what is known of providers."""
        found = told + self.take(_MOST_NEWS)
        if is_lost:
            known = self._standing.health.known()
            found += [[_TELL, msgspec.json.encode(one).decode()] for one in known]
        return found

    def hear(self, age: float, text: str) -> None:
        """Learn what another process has learned, so many seconds ago."""
        try:
            learned = msgspec.json.decode(text, type=Learned)
        except msgspec.DecodeError:
            return  # of another version
        if learned.provider in self._standing.providers:
            self._standing.health.learn(learned, age)


def _name_of(key: Key) -> str:
    """Return the name of a key: sessions are words of callers'."""
    return sha256("\0".join(key).encode()).hexdigest()[:32]


def _nothing(result: Any) -> None:
    """Nobody waits for it."""
