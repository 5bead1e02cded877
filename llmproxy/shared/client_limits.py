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

from collections import Counter, OrderedDict, deque
from collections.abc import Callable, Sequence
from itertools import islice
from typing import Any, Protocol

import msgspec
from twisted.internet.defer import Deferred

from llmproxy.config import Client
from llmproxy.errors import EngineAway, ProxyError
from llmproxy.policy.limits import (
    DAY_S,
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

_BUCKET_S, _LONG_AGO = 0.25, 0
"""The engine's buckets; and one that no minute has."""

_AT_ONCE = 512
"""How many ops of an introduction go with one call; the engine serves nobody else meanwhile."""

_MINUTE_S = 60.0
_MOST_NEWS = 4096

View = list[int]
"""What all processes use: streams, requests and tokens of a minute, tokens of the day; and how many
of the last are settled."""


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
        bucket: where it stands in the engine's minute; ``_NOW`` where that was never known, and
            None while it is not known whether the engine was asked for it.
        engine_day: the day for which the engine has its tokens.
        cost: how many tokens count, once it is settled.
    """

    client: str = ""
    bucket: int | None = _NOW
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
        self._untold: dict[str, list[int]] = {}  # the sums of all news of a client
        self._first: deque[list[Any]] = deque()  # of an introduction; the news build on it
        self._views: OrderedDict[str, tuple[View, float]] = OrderedDict()
        self._refusals: dict[str, _Refusal] = {}
        self._shares: dict[str, tuple[Client, int, Client]] = {}  # while the engine is away
        self._ahead: float | None = None  # the engine's clock, of this one
        self._most_news = _MOST_NEWS

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
                self._put(
                    client.name, bucket, day, streams=-1, requests=-1, tokens=back, spent=back
                )

        op = [_ASK, client.name, -1 if tokens is None else tokens]
        op += [-1 if (most := getattr(client, limit)) is None else most for limit in LIMITS]
        try:
            limit, milliseconds, bucket, day, view = await engine.ask(op, late)
        except EngineAway:
            lease = self._admit_alone(client, model, size)
            lease.bucket = None
            alone.append(lease)
            return lease
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
            for limit, used, one in zip(LIMITS, found[0], more, strict=False):
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
        today = self.today()
        known, day, share = self._shares.get(client.name, (None, 0, client))
        if known is not client or day != today:
            processes = 1 if self.engine is None else self.engine.processes
            view = self._view_of_today(client.name) or (0, 0, 0, 0, 0)
            now, wall = self.clock(), self._wall()
            used = self._used_by(client, now, wall)
            own = {limit: count for limit, _, count in used.by_limit(client, now, wall)}
            parts = {}
            for limit, whole in zip(LIMITS, view, strict=False):
                if (most := getattr(client, limit)) is None:
                    continue
                spent = own[limit] if limit == TOKENS_DAY else 0  # days do not slide
                left = max(0, most - whole) if limit == TOKENS_DAY else most
                part = min(left, left * own[limit] // whole) if whole else 0
                parts[limit] = max(1, spent + max(left // processes, part))
            share = msgspec.structs.replace(client, **parts)
            self._shares[client.name] = client, today, share
        return share

    def _view_of_today(self, name: str) -> View | None:
        """Return what the engine said last; None if it said nothing today."""
        view, at = self._views.get(name, (None, 0.0))
        since = self.clock() - at
        return view if (self._wall() - since) // DAY_S == self.today() else None

    def _hold(
        self,
        used: Used,
        model: str | None,
        costs: Costs | None,
        tokens: int | None,
        now: float,
    ) -> SharedLease:
        held = super()._hold(used, model, costs, tokens, now)
        return SharedLease(
            self,
            used,
            held.entry,
            held.day,
            held.model,
            costs,
            tokens,
            client=used.client,
            engine_day=held.day,
        )

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
        return bool(self._first or self._news)

    def take(self, most: int) -> list[list[Any]]:
        """Return what is to be told, and whom to look at again."""
        if first := self._first:
            return [first.popleft() for _ in range(min(most, _AT_ONCE, len(first)))]
        names = list(islice(self._news, most))
        ops = []
        for key in names:
            sums = self._news.pop(key)
            ops.append(self._op(key, sums))
            _add(self._untold[key[0]], sums, -1)
        if not self._news:
            self._untold.clear()
        since = self.clock() - _LOOK_EVERY_S
        while self._views and len(ops) < most:
            name, (_, at) = next(iter(self._views.items()))
            if at > since:
                break
            used = self._used.get(name)
            if used is not None:
                used.window.trim(self.clock())
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

    def hear_time(self, milliseconds: int) -> None:
        """The engine's clock said this a moment ago."""
        self._ahead = milliseconds / 1000 - self.clock()

    def introduce(self, told: list[list[Any]], *, is_lost: bool) -> list[list[Any]]:
        """Return all streams that run here, and what the engine does not know beside them."""
        news, self._news = self._news, {}
        self._untold.clear()
        told = [*told, *self._first]
        ops: list[list[Any]] = [op for op in told if op[0] == _SPENT and not is_lost]
        told = [op for op in told if op[0] == _PUT]
        told += [self._op(key, sums) for key, sums in news.items()]
        rest = [_without(op, is_lost=is_lost) for op in told]
        untold: Counter[str] = Counter()
        for _, name, _, _, _, _, day, _, settled in rest:
            if day == self.today():
                untold[name] += settled
        now, wall = self.clock(), self._wall()
        for name, used in self._used.items():
            window, day = used.window, used.day
            window.trim(now)
            day.turn(wall)
            here = (0, 0, 0)
            if is_lost:
                here = window.requests, window.tokens, day.used - day.settled
                view = self._view_of_today(name) or (0, 0, 0, 0, 0)
                settled = max(view[4], day.settled) - untold[name]
                if settled > 0:
                    ops.append([_SPENT, name, day.number, settled])
            if used.streams or any(here):
                requests, tokens, running = here
                put = [used.streams, requests, _NOW, tokens, day.number, running, 0]
                ops.append([_PUT, name, *put])
        ops += [op for op in rest if any(op[3:4] + op[5:6] + op[7:])]
        self._first = deque(ops[_AT_ONCE:])
        return ops[:_AT_ONCE]

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
        lease.bucket = bucket = self._bucket(lease.entry.at)
        lease.engine_day = day = lease.day
        tokens = lease.reserved or 0
        self._put(lease.client, bucket, day, streams=1, requests=1, tokens=tokens, spent=tokens)
        if lease.is_settled:
            self.ended(lease)
        return lease

    def _bucket(self, at: float) -> int:
        """Return the engine's bucket of a moment: that, or the one before."""
        return _NOW if self._ahead is None else int((at + self._ahead) / _BUCKET_S)

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
        if self.engine is None:
            return
        sums = self._news.get((client, bucket, day))
        if sums is None:
            sums = self._news[client, bucket, day] = [0, 0, 0, 0, 0]
        more = streams, requests, tokens, spent, settled
        _add(sums, more)
        _add(self._untold.setdefault(client, [0, 0, 0, 0, 0]), more)
        if (view := self._views.get(client)) is not None:
            _add(view[0], more)
        self.engine.wake(_GATHER_S)
        if len(self._news) > self._most_news:
            self._compact()

    def _compact(self) -> None:
        """Put together what is in no minute any more: the engine may be away for hours."""
        since = self._bucket(self.clock() - 2 * _MINUTE_S)
        news: dict[tuple[str, int, int], list[int]] = {}
        for (client, bucket, day), sums in self._news.items():
            at = _LONG_AGO if _LONG_AGO <= bucket < since else bucket
            known = news.setdefault((client, at, day), [0, 0, 0, 0, 0])
            _add(known, sums)
        self._news = news
        self._most_news = max(_MOST_NEWS, 2 * len(news))

    def _op(self, key: tuple[str, int, int], sums: list[int]) -> list[Any]:
        client, bucket, day = key
        streams, requests, tokens, spent, settled = sums
        return [_PUT, client, streams, requests, bucket, tokens, day, spent, settled]

    # -- what the engine says -------------------------------------------------------------------

    def _saw(self, name: str, view: View) -> None:
        """Note what all use, with what the engine has not heard of yet."""
        if (untold := self._untold.get(name)) is not None:
            _add(view, untold)
        self._views[name] = view, self.clock()
        self._views.move_to_end(name)
        if self._shares:
            self._shares.clear()

    def _by_limit(self, client: Client) -> list[tuple[str, int, int]]:
        own = self._own_by_limit(client)
        view, at = self._views.get(client.name, (None, 0.0))
        if self.engine is None or view is None or self.clock() - at > _FRESH_S:
            return own
        whole = dict(zip(LIMITS, view, strict=False))
        return [(limit, most, whole[limit]) for limit, most, _ in own]


def _add(sums: list[int], more: Sequence[int], times: int = 1) -> None:
    for place, one in enumerate(more):
        sums[place] += times * one


def _without(op: list[Any], *, is_lost: bool) -> list[Any]:
    """Return what a put says beside streams; and beside all that runs, if that is told anew."""
    _, name, _, requests, bucket, tokens, day, spent, settled = op
    if is_lost:
        requests, tokens, spent = 0, 0, settled
    return [_PUT, name, 0, requests, bucket, tokens, day, spent, settled]


def _nobody_counts() -> ProxyError:
    return ProxyError(
        503,
        "limits_away",
        "What all instances may use together cannot be counted now; try again.",
        fields=((b"retry-after", b"1"),),
    )
