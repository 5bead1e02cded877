"""One request and several candidates: which one is asked, and what happens if it fails.

The candidates of a route are asked one after the other, until one responds as it should.  Some are
passed over: those that are to be left alone, and those without a free place.  A refusal is held,
because it may turn out to be the last response that there is.  Nothing is sent a second time once
the client has a byte (design 6, ADR-0026).

Most routes have one candidate, which is asked whatever is known of it: its own response says more
than we could.  :meth:`Failover.send` then adds nothing to :class:`Attempts`.
"""

from __future__ import annotations

import math
from collections.abc import Awaitable, Callable, Sequence

from llmproxy.config import Client, Route
from llmproxy.dialects.request import RequestFacts
from llmproxy.errors import EndReason, ProxyError
from llmproxy.gateway.attempt import Attempts, asked_model, refuses_proxy
from llmproxy.gateway.exchange import Exchange
from llmproxy.policy.fair_queue import Places, no_place
from llmproxy.policy.health import NO_WAIT, Wait
from llmproxy.policy.routes import Candidate, RouteMatch
from llmproxy.policy.standing import Standing
from llmproxy.policy.stickiness import key_of
from llmproxy.record.trace import SKIPPED, Attempt
from llmproxy.upstream.credential import NO_CREDENTIAL
from llmproxy.upstream.held_response import HeldResponse
from llmproxy.upstream.response import Response

Meet = Callable[[Exchange, RouteMatch, Candidate], None]

BUSY = "busy"
"""The cause of an attempt that was skipped because its provider had no free place."""

_NO_CONNECTION = frozenset((EndReason.UPSTREAM_UNREACHABLE, EndReason.UPSTREAM_TLS))
_BROKEN = frozenset((EndReason.UPSTREAM_BROKEN, EndReason.UPSTREAM_PROTOCOL))
_NO_RESPONSE = _BROKEN | {EndReason.UPSTREAM_TIMEOUT}


class Failover:
    """Chooses among candidates, as one configuration has them.

    Args:
        attempts: ask one of them.
        standing: knows whom to leave alone, who has a free place, and who was asked before.
        meet: called with an exchange, its route and the candidate that is to be asked next.
        clock: monotonic seconds.
    """

    def __init__(
        self,
        attempts: Attempts,
        standing: Standing,
        meet: Meet,
        clock: Callable[[], float],
    ) -> None:
        self.attempts = attempts
        self.health = standing.health
        self.places = standing.places
        self.stickiness = standing.stickiness
        self.switches = standing.switches
        self.meet = meet
        self.clock = clock

    def send(
        self, exchange: Exchange, match: RouteMatch, client: Client, facts: RequestFacts
    ) -> Awaitable[Response | HeldResponse]:
        """Send the request to a candidate that responds, and return the head of its response.

        Raises:
            ProxyError: none of them did.  The error is the last one's, or says why none was asked.
        """
        if match.balance is None and not self.switches.off:
            return self.attempts.send(exchange, match, match.candidates[0], facts)
        if self.health.is_troubled or self.switches.off:
            return _Round(self, exchange, match, client, facts).send()
        return self._send_as_usual(exchange, match, client, facts)

    async def _send_as_usual(
        self, exchange: Exchange, match: RouteMatch, client: Client, facts: RequestFacts
    ) -> Response | HeldResponse:
        """Ask the candidate that is first without any question, and begin a round if it fails."""
        route = match.route
        key = key_of(route, client.name, exchange.trace.session)
        known = None if key is None else self.stickiness.provider_of(key, route.sticky_for)
        candidate = _first(match, known)
        if candidate is None:
            return await _Round(self, exchange, match, client, facts).send()
        if candidate is not exchange.candidate:
            self.meet(exchange, match, candidate)
        came: Response | ProxyError
        try:
            came = await self.attempts.send(exchange, match, candidate, facts)
        except ProxyError as error:
            came = error
        else:
            if came.code < 400:
                if key is not None and known is None:
                    self.stickiness.remember(key, candidate.provider.name, route.sticky_for)
                return came
        return await _Round(self, exchange, match, client, facts, candidate).send(came)


class _Round:
    """The way of one request through the candidates of its route.

    Attributes:
        left: the candidates that were not asked yet, in the order in which to ask them.
        held: the last refusal, and whose it is.
        error: how the last attempt failed.
        full: the providers that had no free place.
        disabled: what is said where an operator has switched all of them off.
        wait: for how long the one is to be left alone that is ready first.
        cooling: those that are to be asked if nobody else is left, and how long it would be better
            to wait for them.
    """

    __slots__ = (
        *("_candidate", "_client", "_exchange", "_facts", "_failover", "_key", "_known", "_match"),
        *("cooling", "disabled", "error", "full", "held", "left", "wait"),
    )

    def __init__(
        self,
        failover: Failover,
        exchange: Exchange,
        match: RouteMatch,
        client: Client,
        facts: RequestFacts,
        asked: Candidate | None = None,
    ) -> None:
        self._failover = failover
        self._exchange = exchange
        self._match = match
        self._client = client
        self._facts = facts
        self.held: tuple[HeldResponse, Candidate] | None = None
        self.error: ProxyError | None = None
        self.wait = NO_WAIT
        self.cooling: list[tuple[float, Candidate]] = []
        self.disabled: ProxyError | None = None
        self.full: set[str] = set()
        self._key = key_of(match.route, client.name, exchange.trace.session)
        known = None
        if self._key is not None:
            sticky_for = match.route.sticky_for
            known = failover.stickiness.provider_of(self._key, sticky_for)
        here = [one.provider.name for one in match.candidates]
        self._known = known if known in here else None
        self._candidate = asked
        self.left = [one for one in self._order() if one is not asked]

    def _order(self) -> list[Candidate]:
        order: Sequence[Candidate] = self._match.candidates
        if self._match.balance is not None:
            is_calm = not (self._failover.health.is_troubled or self._failover.switches.off)
            order = self._match.balance.order(
                order,
                self._busy_at,
                takes_turn=not self._stays(),
                able=None if is_calm else self._may_be_asked,
            )
        if self._known is None or order[0].provider.name == self._known:
            return list(order)
        return sorted(order, key=lambda one: one.provider.name != self._known)

    def _stays(self) -> bool:
        """Return whether the request will be sent to the provider that is known already."""
        if self._known is None or self._candidate is not None:
            return False
        known = (one for one in self._match.candidates if one.provider.name == self._known)
        return any(map(self._may_be_asked, known))

    async def send(self, came: Response | ProxyError | None = None) -> Response | HeldResponse:
        """Do as :meth:`Failover.send`.

        Args:
            came: what came of asking the first candidate, where it was asked already.
        """
        exchange, match = self._exchange, self._match
        try:
            while True:
                candidate = self._candidate
                if came is None or candidate is None:
                    candidate = self._take() or await self._queue() or self._last_resort()
                    if candidate is None:
                        return self._last_response()
                    came = await self._ask(candidate)
                if isinstance(came, ProxyError):
                    self._give_back()
                    self.error = came
                    if not _goes_on(exchange, match.route, came):
                        return self._last_response()
                elif not self._passes_over(candidate, came):
                    self._remember(candidate, came)
                    return came
                else:
                    self._give_back()
                    self._drop_held()
                    self.error = None
                    self.held = HeldResponse(came), candidate
                came = None
        finally:
            if self.held is not None and exchange.response is not self.held[0]:
                self._drop_held()

    async def _ask(self, candidate: Candidate) -> Response | ProxyError:
        """Return what came of asking a candidate."""
        exchange, match, failover = self._exchange, self._match, self._failover
        if candidate is not exchange.candidate:
            failover.meet(exchange, match, candidate)
        try:
            return await failover.attempts.send(exchange, match, candidate, self._facts)
        except ProxyError as error:
            return error

    # -- whom to ask ----------------------------------------------------------------------------

    def _take(self) -> Candidate | None:
        """Take the next candidate that may be asked, and a place there; None where none may be."""
        is_troubled, are_off = self._failover.health.is_troubled, self._failover.switches.off
        for candidate in list(self.left):
            if (is_troubled or are_off) and self._is_left_alone(candidate):
                self.left.remove(candidate)
            elif self._takes_place(candidate):
                if candidate is not self.left[0]:
                    self._note_full(self.left[: self.left.index(candidate)])
                self.left.remove(candidate)
                return candidate
        return None

    def _takes_place(self, candidate: Candidate) -> bool:
        """Take a place at a candidate, and return whether it may be asked now."""
        if not candidate.is_counted:
            return True
        self._exchange.place = self._places_at(candidate).take()
        return self._exchange.place is not None

    def _note_full(self, candidates: Sequence[Candidate]) -> None:
        """Note that these had no free place; they may have one later."""
        for candidate in candidates:
            if candidate.provider.name not in self.full:
                self.full.add(candidate.provider.name)
                self._note_skipped(candidate, BUSY)

    async def _queue(self) -> Candidate | None:
        """Wait for a place at the first candidate whose queue has room; None where none has."""
        exchange = self._exchange
        while (candidate := self._next_queue()) is not None:
            self.left.remove(candidate)
            places = self._places_at(candidate)
            self._failover.meet(exchange, self._match, candidate)
            began = self._failover.clock()
            try:
                exchange.waiting = places.wait(self._client.name, self._client.weight)
                exchange.place = await exchange.waiting.placed
            except ProxyError as error:
                self.error = error
                if exchange.waiting is None:
                    continue  # the queue is full
                return None
            finally:
                exchange.waiting = None
                exchange.trace.queued_s += round(self._failover.clock() - began, 6)
            if not self._is_left_alone(candidate):  # it was not when the wait began
                return candidate
            self._give_back()
            if (other := self._take()) is not None:
                return other
        return None

    def _next_queue(self) -> Candidate | None:
        return next((one for one in self.left if self._places_at(one).has_queue), None)

    def _is_left_alone(self, candidate: Candidate) -> bool:
        """Return whether a candidate is not to be asked now, and note why."""
        if self._failover.switches.off and self._is_off(candidate):
            self._note_skipped(candidate, "disabled")
            return True
        wait = self._wait_for(candidate)
        if wait.seconds <= 0:
            return False
        self._note_skipped(candidate, "cooling")
        if wait.own <= 0:
            self.cooling.append((wait.seconds, candidate))
        elif self.wait is NO_WAIT or wait.own < self.wait.own:
            self.wait = wait
        return True

    def _last_resort(self) -> Candidate | None:
        """Take the candidate that is ready first of those that only others were refused by."""
        for _, candidate in sorted(self.cooling, key=lambda one: one[0]):
            if self._takes_place(candidate):
                self.cooling = [one for one in self.cooling if one[1] is not candidate]
                return candidate
        return None

    def _is_off(self, candidate: Candidate) -> bool:
        """Return whether an operator has switched it off, or a model that is asked for."""
        switches = self._failover.switches
        name, now = candidate.provider.name, self._failover.clock()
        models = (candidate.model,) if candidate.model else self._facts.models or ("",)
        off = [model for model in models if switches.is_off(name, model, now)]
        if off:
            self.disabled = switches.refusal(name, off[0], now)
        return bool(off)

    def _wait_for(self, candidate: Candidate) -> Wait:
        if len(self._match.candidates) == 1:
            return NO_WAIT  # it is asked in any case, so that the client gets what it says
        model = asked_model(self._exchange, candidate)
        return self._failover.health.wait(candidate.provider, self._client.name, model)

    def _busy_at(self, candidate: Candidate) -> int:
        return self._places_at(candidate).busy

    def _places_at(self, candidate: Candidate) -> Places:
        return self._failover.places.at(candidate.provider.name)

    def _note_skipped(self, candidate: Candidate, why: str) -> None:
        self._exchange.trace.attempts.append(Attempt(candidate.provider.name, SKIPPED, 0.0, why))

    # -- what came of it ------------------------------------------------------------------------

    def _passes_over(self, candidate: Candidate, response: Response) -> bool:
        """Return whether to ask somebody else, because that was a refusal and somebody is left."""
        code, retry_on = response.code, self._match.route.retry_on
        if code < 400 or not (code in retry_on or refuses_proxy(candidate, code)):
            return False
        return _can_be_sent_again(self._exchange) and any(map(self._may_be_asked, self.left))

    def _may_be_asked(self, candidate: Candidate) -> bool:
        return (
            not (self._failover.switches.off and self._is_off(candidate))
            and self._wait_for(candidate).own <= 0
            and self._places_at(candidate).has_room
        )

    def _remember(self, candidate: Candidate, response: Response) -> None:
        """Remember whom the next request is to ask first."""
        if self._key is None or response.code >= 500:
            return
        name, known = candidate.provider.name, self._known
        if known is None or known == name or self._has_failed(known):
            sticky_for = self._match.route.sticky_for
            self._failover.stickiness.remember(self._key, name, sticky_for)

    def _has_failed(self, provider: str) -> bool:
        """Return whether it was asked, or is to be left alone; and was not just full."""
        attempts = self._exchange.trace.attempts
        return any(one.provider == provider and one.cause != BUSY for one in attempts)

    def _last_response(self) -> HeldResponse:
        """Return the last refusal, or raise why it is not what the client gets."""
        if self.held is None:
            raise self.error or self._none_asked()
        if self.error is not None and self.error.may_have_run:
            raise self.error
        held, candidate = self.held
        self._failover.meet(self._exchange, self._match, candidate)
        self._exchange.response = held
        return held

    def _none_asked(self) -> ProxyError:
        if self.left or self.cooling:
            self._note_full([*self.left, *(candidate for _, candidate in self.cooling)])
            text = "The provider serves as many requests as it may; try again."
            return no_place("provider_busy", text)
        if self.wait is NO_WAIT and self.disabled is not None:
            return self.disabled
        return _all_cooling(self.wait.own, self.wait.status)

    def _drop_held(self) -> None:
        if self.held is not None:
            self.held[0].abort()
            self.held = None

    def _give_back(self) -> None:
        place, self._exchange.place = self._exchange.place, None
        if place is not None:
            place.give_back()


def _first(match: RouteMatch, known: str | None) -> Candidate | None:
    """Return the candidate that needs no place, and is first whoever else is there.

    Args:
        known: the provider of before, if there is one.
    """
    if known is None and match.route.balance != "ordered":
        return None
    for candidate in match.candidates:
        if known is None or candidate.provider.name == known:
            return None if candidate.is_counted else candidate
    return None


def _goes_on(exchange: Exchange, route: Route, error: ProxyError) -> bool:
    """Return whether the next candidate is asked after this error."""
    if error.reason == NO_CREDENTIAL:
        return True  # nobody was asked
    if error.end in _NO_CONNECTION or (error.end in _NO_RESPONSE and not error.may_have_run):
        word = "connect"
    elif error.end in _BROKEN:
        word = "reset"
    elif error.end is EndReason.UPSTREAM_TIMEOUT:
        word = "timeout"
    else:
        return False
    return word in route.retry_on and _can_be_sent_again(exchange)


def _can_be_sent_again(exchange: Exchange) -> bool:
    """Return whether the body is still whole here, and the client as well."""
    upload = exchange.request.upload
    return exchange.left is None and (upload is None or not upload.begun)


def _all_cooling(seconds: float, status: int) -> ProxyError:
    thousandths = math.ceil(seconds * 1000)
    return ProxyError(
        429 if status == 429 else 503,
        "all_cooling",
        "Every provider for this request is to be left alone for now; try again later.",
        fields=(
            (b"retry-after", b"%d" % -(-thousandths // 1000)),
            (b"retry-after-ms", b"%d" % thousandths),
        ),
    )
