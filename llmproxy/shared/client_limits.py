"""What clients may use, as one figure for all processes that share an engine (ADR-0041).

Without an engine this is :class:`~llmproxy.policy.limits.ClientLimits`, and nothing more.  With
one, a request is admitted by what all processes use together, which the engine knows.  The process
keeps its own part, as ever, and so it goes on by itself at once where the engine is away: by its
share of each limit, which is the part that it had of what all used, and at least an equal part.
What it admits alone, the engine is told when it is back.

What a request did cost is told behind its end, together with others; nothing waits for that.  A
refusal is remembered for as long as it lasts, and at most for a second, so that a client that asks
again and again costs the engine one question in a second.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from itertools import islice
from typing import Any, Protocol

import msgspec
from twisted.internet.defer import Deferred

from llmproxy.config import Client
from llmproxy.errors import EngineAway, ProxyError
from llmproxy.policy.limits import (
    LIMITS,
    REQUESTS,
    STREAMS,
    TOKENS_DAY,
    ClientLimits,
    Costs,
    Lease,
    Used,
)

_ASK, _PUT, _LOOK, _SPENT = 1, 2, 3, 4
"""What an op does; ``batch.lua`` has them in this order."""

_NOW = -1
"""Stands for the moment at which the engine gets an op."""

_LOOK_EVERY_S = 2.0
"""How often the engine is asked what a client uses, where no request asks."""

_FRESH_S = 10.0
"""For how long what the engine said of a client is shown."""

_REFUSED_S = 1.0

_GATHER_S = 0.05
"""For how long what a request did cost may wait for the next question."""

View = list[int]
"""What all processes use: streams, requests and tokens of a minute, tokens of the day."""


class EngineLike(Protocol):
    """What is needed of an engine."""

    is_up: bool
    processes: int

    def ask(self, op: list[Any], late: Callable[[Any], object]) -> Deferred[Any]:
        """Ask."""

    def wake(self, seconds: float = 0.0) -> None:
        """There is something to tell, within so many seconds."""


class _Refusal(msgspec.Struct):
    """A refusal that lasts; ``tokens`` is what could not be had, where it was about tokens."""

    limit: str
    until: float
    tokens: int


class SharedLease(Lease, gc=False):
    """What one request holds, here and at the engine.

    Attributes:
        client: whose it is.
        bucket: where it stands in the engine's minute; None until it is known that it does.
        engine_day: the day for which the engine has its tokens.
        cost: how many tokens count, once it is settled.
    """

    client: str = ""
    bucket: int | None = None
    engine_day: int = 0
    cost: int = 0

    def settle(self, tokens: int, is_known: bool = True) -> int | None:
        """Do as :meth:`Lease.settle`, and let the engine know."""
        was_settled = self.is_settled
        counted = super().settle(tokens, is_known)
        if not was_settled:
            self.cost = counted or 0
            if self.bucket is not None:
                self.limits.ended(self)  # type: ignore[attr-defined]  # it is SharedLimits
        return counted


class SharedLimits(ClientLimits):
    """What all clients use, of all processes.

    Args:
        As :class:`ClientLimits`.

    Attributes:
        engine: what is shared; None where nothing is.
        is_strict: without the engine, refuse.
        alone: how many requests were admitted without the engine that was to be asked.
    """

    def __init__(self, clock: Callable[[], float], wall: Callable[[], float]) -> None:
        super().__init__(clock, wall)
        self.engine: EngineLike | None = None
        self.is_strict = False
        self.alone = 0
        self._news: dict[tuple[str, int, int], list[int]] = {}
        self._views: OrderedDict[str, tuple[View, float]] = OrderedDict()
        self._refusals: dict[str, _Refusal] = {}
        self._shares: dict[str, Client] = {}  # while the engine is away

    # -- requests -------------------------------------------------------------------------------

    async def ask(self, client: Client, model: str | None, size: int | None) -> Lease:
        """Do as :meth:`admit`, by what the engine says of all processes.

        Raises:
            ProxyError: as there; 503, if nothing is to be admitted without the engine.
        """
        engine = self.engine
        if engine is None:
            return super().admit(client, model, size)
        if not engine.is_up:
            return self._tell_of(self._admit_alone(client, model, size))
        now = self.clock()
        used = self._used_by(client, now, self._wall())
        tokens, costs = used.expected(client, model, size, now)
        self._refuse_again(client, tokens, now)
        alone: list[SharedLease] = []

        def late(result: list[Any] | None) -> None:
            """Hear what became of a question for whose answer nobody waited."""
            if result is None or result[0]:  # it was not asked, or refuses
                for lease in alone:
                    self._tell_of(lease)
                return
            _, _, bucket, day, _ = result
            for lease in alone:
                self._place(lease, bucket, day)
            if not alone:
                back = -(tokens or 0)
                self._put(client.name, bucket, day, streams=-1, tokens=back, spent=back)

        op = [_ASK, client.name, -1 if tokens is None else tokens]
        op += [-1 if (most := getattr(client, limit)) is None else most for limit in LIMITS]
        try:
            limit, milliseconds, bucket, day, view = await engine.ask(op, late)
        except EngineAway:
            alone.append(self._admit_alone(client, model, size))
            return alone[0]
        self._saw(client.name, view)
        if limit:
            raise self._refuse(client, LIMITS[limit - 1], milliseconds / 1000, tokens)
        return self._place(self._hold(used, model, costs, tokens, self.clock()), bucket, day)

    def admit(self, client: Client, model: str | None, size: int | None) -> Lease:
        """Admit a request that cannot wait: by what is known of all processes at this moment.

        Raises:
            ProxyError: as :meth:`ask` says.
        """
        engine = self.engine
        if engine is None:
            return super().admit(client, model, size)
        if not engine.is_up:
            return self._tell_of(self._admit_alone(client, model, size))
        found = self._views.get(client.name)
        if found is not None:
            now = self.clock()
            tokens, _ = self._used_by(client, now, self._wall()).expected(client, model, size, now)
            more = (1, 1, tokens or 0, tokens or 0)
            for limit, used, one in zip(LIMITS, found[0], more, strict=True):
                most = getattr(client, limit)
                if most is not None and one and used + min(one, most) > most:
                    raise self._refusal(client, limit, _REFUSED_S)
        return self._tell_of(self._admit_here(client, model, size))

    def _admit_here(self, client: Client, model: str | None, size: int | None) -> SharedLease:
        return super().admit(client, model, size)  # type: ignore[return-value]  # of _hold below

    def _admit_alone(self, client: Client, model: str | None, size: int | None) -> SharedLease:
        """Admit a request by this process's share of the limits.

        Raises:
            ProxyError: the share is used up, or nothing is to be admitted without the engine.
        """
        if self.is_strict:
            raise _nobody_counts()
        lease = self._admit_here(self._share_of(client), model, size)
        self.alone += 1
        return lease

    def _share_of(self, client: Client) -> Client:
        """Return the client with this process's share of its limits, while the engine is away.

        Where its requests stay where they were, all shares together are the limit; if all of them
        move to other processes, at most twice that.
        """
        share = self._shares.get(client.name)
        if share is None:
            processes = 1 if self.engine is None else self.engine.processes
            view, _ = self._views.get(client.name, ([0, 0, 0, 0], 0.0))
            parts = {}
            own = {limit: used for limit, _, used in self._own_by_limit(client)}
            for limit, whole in zip(LIMITS, view, strict=True):
                if (most := getattr(client, limit)) is None:
                    continue
                spent = own[limit] if limit == TOKENS_DAY else 0  # days do not slide
                left = max(0, most - whole) if limit == TOKENS_DAY else most
                part = left * own[limit] // whole if whole else 0
                parts[limit] = max(1, spent + max(left // processes, min(part, left)))
            share = self._shares[client.name] = msgspec.structs.replace(client, **parts)
        return share

    def _hold(
        self,
        used: Used,
        model: str | None,
        costs: Costs | None,
        tokens: int | None,
        now: float,
    ) -> SharedLease:
        held = super()._hold(used, model, costs, tokens, now)
        lease = SharedLease(
            self, used, held.entry, held.day, held.model, costs, tokens, client=used.client
        )
        if self.engine is None:  # one that comes while it runs is told of it
            lease.bucket, lease.engine_day = _NOW, lease.day
        return lease

    # -- what was refused -----------------------------------------------------------------------

    def _refuse_again(self, client: Client, tokens: int | None, now: float) -> None:
        """Refuse what was refused a moment ago, and cannot have become possible."""
        known = self._refusals.get(client.name)
        if known is None:
            return
        if now >= known.until:
            del self._refusals[client.name]
        elif (tokens or 0) >= known.tokens:
            raise self._refusal(client, known.limit, known.until - now)

    def _refuse(self, client: Client, limit: str, wait: float, tokens: int | None) -> ProxyError:
        """Return the refusal, and remember it; streams may end at any moment."""
        if limit != STREAMS:
            until = self.clock() + min(wait, _REFUSED_S)
            about = 0 if limit == REQUESTS else tokens or 0
            self._refusals[client.name] = _Refusal(limit, until, about)
        return self._refusal(client, limit, wait)

    # -- what the engine is told ----------------------------------------------------------------

    @property
    def has_news(self) -> bool:
        """Whether there is something to tell."""
        return bool(self._news)

    def take(self, most: int) -> list[list[Any]]:
        """Return what is to be told, and whom to look at again."""
        names = list(islice(self._news, most))
        ops = [self._op(name, self._news.pop(name)) for name in names]
        since = self.clock() - _LOOK_EVERY_S
        while self._views and len(ops) < most:
            name, (_, at) = next(iter(self._views.items()))
            if at > since:
                break
            used = self._used.get(name)
            if used is None or not (used.streams or used.window.requests):
                del self._views[name]
            else:
                self._views[name] = self._views[name][0], self.clock()
                self._views.move_to_end(name)
                ops.append([_LOOK, name])
        return ops

    def heard(self, op: list[Any], result: Any) -> None:
        """Hear what all processes use of the client of an op."""
        self._saw(op[1], result[0])

    def hear(self, age: float, text: str) -> None:
        """Hear nothing: what clients use is no news."""

    def away(self, processes: int) -> None:
        """Go on with what is known."""

    def introduce(self, *, is_lost: bool) -> list[list[Any]]:
        """Return all streams that run here, and if all else is lost, what is known of that."""
        news, self._news = self._news, {}
        now, wall = self.clock(), self._wall()
        ops: list[list[Any]] = []
        for name, used in self._used.items():
            used.window.trim(now)
            used.day.turn(wall)
            requests, tokens = (used.window.requests, used.window.tokens) if is_lost else (0, 0)
            if used.streams or requests:
                ops.append([_PUT, name, used.streams, requests, _NOW, tokens, 0, 0, 0])
            if is_lost and used.day.used:
                view, _ = self._views.get(name, ((0, 0, 0, 0), 0.0))
                ops.append([_SPENT, name, used.day.number, max(view[3], used.day.used)])
        if not is_lost:
            ops += [self._op(key, [0, *sums[1:]]) for key, sums in news.items()]
        return ops

    def ended(self, lease: SharedLease) -> None:
        """A request has ended that the engine knows of."""
        more = lease.cost - (lease.reserved or 0)
        self._put(
            lease.client,
            _NOW if lease.bucket is None else lease.bucket,
            lease.engine_day,
            streams=-1,
            tokens=more,
            spent=more,
            settled=lease.cost,
        )

    def _tell_of(self, lease: SharedLease) -> SharedLease:
        """Let the engine know of a request that it was not asked for."""
        lease.bucket, lease.engine_day = _NOW, lease.day
        tokens = lease.reserved or 0
        self._put(lease.client, _NOW, lease.day, streams=1, requests=1, tokens=tokens, spent=tokens)
        if lease.is_settled:
            self.ended(lease)
        return lease

    def _place(self, lease: SharedLease, bucket: int, day: int) -> SharedLease:
        """Note where the engine has a request."""
        lease.bucket, lease.engine_day = bucket, day
        if lease.is_settled:
            self.ended(lease)
        return lease

    def _put(
        self,
        client: str,
        bucket: int,
        day: int,
        *,
        streams: int = 0,
        requests: int = 0,
        tokens: int = 0,
        spent: int = 0,
        settled: int = 0,
    ) -> None:
        sums = self._news.get((client, bucket, day))
        if sums is None:
            sums = self._news[client, bucket, day] = [0, 0, 0, 0, 0]
        for place, more in enumerate((streams, requests, tokens, spent, settled)):
            sums[place] += more
        if self.engine is not None:
            self.engine.wake(_GATHER_S)

    def _op(self, key: tuple[str, int, int], sums: list[int]) -> list[Any]:
        """Return the op for sums; of what came long ago, no more than the minute has here."""
        client, bucket, day = key
        streams, requests, tokens, spent, settled = sums
        if bucket == _NOW and (used := self._used.get(client)) is not None:
            used.window.trim(self.clock())
            requests = min(requests, used.window.requests)
            tokens = min(tokens, used.window.tokens)
        return [_PUT, client, streams, requests, bucket, tokens, day, spent, settled]

    # -- what the engine says -------------------------------------------------------------------

    def _saw(self, name: str, view: View) -> None:
        self._views[name] = view, self.clock()
        self._views.move_to_end(name)
        if self._shares:
            self._shares.clear()

    def _by_limit(self, client: Client) -> list[tuple[str, int, int]]:
        own = self._own_by_limit(client)
        view, at = self._views.get(client.name, (None, 0.0))
        if self.engine is None or view is None or self.clock() - at > _FRESH_S:
            return own
        whole = dict(zip(LIMITS, view, strict=True))
        return [(limit, most, whole[limit]) for limit, most, _ in own]


def _nobody_counts() -> ProxyError:
    return ProxyError(
        503,
        "limits_away",
        "What all instances may use together cannot be counted now; try again.",
        fields=((b"retry-after", b"1"),),
    )
