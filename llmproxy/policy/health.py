"""Which providers are to be left alone for now: circuits and cooldowns.

A *circuit* opens when a provider fails several times one after the other.  After a while one
request is let through as a probe, which closes the circuit or opens it again.  A failed connection
says something of the provider alone, and its circuit is everybody's.  What a provider does with a
request may be that request's fault, and so each client has a circuit of its own for that: no client
can make a provider look ill to others.

A *cooldown* is what the provider itself asked for: it refused a request, and said when to come
again.  It is kept by model, as providers limit by model.  A longer one replaces a shorter one, and
never the other way round.  A client that was refused itself does not ask before it is over; the
others ask somebody else first, and this provider if nobody else is left: a request that is too
large for the provider's limits must not close the provider to those who ask for less.

What is known lasts over a reload.  Nothing here knows a request or a connection (ADR-0026).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Collection
from typing import Literal

import msgspec

from llmproxy.config import Provider

LONGEST_COOLDOWN_S = 3600.0
"""A provider is asked again after this time, whatever it said."""

_MOST_COOLDOWNS = 4096
"""Models are words of callers': of more than so many, the cooldown that ends first is forgotten."""

_PROBED = 1.0
"""How long to wait, in seconds, while a probe is under way."""

_LOOK_EVERY_S = 1.0

Key = tuple[str, str]
"""A provider; and a client, or "" for all of them."""


class Wait(msgspec.Struct, frozen=True):
    """For how long a client is to leave a provider alone, in seconds.

    Attributes:
        seconds: others are to be asked first; 0 where it may be asked now.
        own: it is not to be asked at all.
        status: what the client gets in that case.
    """

    seconds: float
    own: float
    status: int


class OpenCircuit(msgspec.Struct, frozen=True):
    """A circuit that is open, for operators.

    Attributes:
        client: whose it is; None for everybody's.
        seconds: until the next probe; 0 where the next request is one.
    """

    client: str | None
    seconds: float


class Cooling(msgspec.Struct, frozen=True):
    """A cooldown that is not over, for operators.

    Attributes:
        model: for which the provider is left alone; None for requests that name none.
        seconds: what is left of it.
        status: with which the provider refused.
    """

    model: str | None
    seconds: float
    status: int


class Learned(msgspec.Struct, frozen=True, omit_defaults=True):
    """What a process has learned of a provider, for others.

    Attributes:
        what: ``cools`` (it refused, and said when to come again), ``fails`` (a circuit has opened)
            or ``works`` (it has closed).
        client: who was refused; of a circuit whose it is, "" for everybody's.
        model: for which it cools; "" for requests that name none.
        seconds: for how long.
        status: with which it refused.
    """

    what: Literal["cools", "fails", "works"]
    provider: str
    client: str = ""
    model: str = ""
    seconds: float = 0.0
    status: int = 503


NO_WAIT = Wait(0.0, 0.0, 503)


class Health:
    """What is known of all providers' health.

    Args:
        clock: monotonic seconds.

    Attributes:
        is_troubled: something is known, so that requests must ask.
        learned: called with what others may want to know.
    """

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._circuits: dict[Key, _Circuit] = {}
        self._cooldowns: dict[Key, _Cooldown] = {}
        self._look_at = 0.0
        self.is_troubled = False
        self.learned: Callable[[Learned], object] = _nobody_else

    def wait(self, provider: Provider, client: str, model: str) -> Wait:
        """Return for how long a client is to leave a provider alone.

        Args:
            model: as the provider would be asked for it; "" for none.
        """
        if not self.is_troubled:
            return NO_WAIT
        now, name = self._clock(), provider.name
        others, own, status = 0.0, 0.0, 503
        if (cooldown := self._cooldowns.get((name, model))) is not None:
            others = cooldown.until - now
            own, status = cooldown.clients.get(client, 0.0) - now, cooldown.status
        # A reload may have switched circuits off that are open.
        keys = ((name, ""), (name, client)) if provider.health.failures else ()
        for key in keys:
            circuit = self._circuits.get(key)
            if circuit is not None and (left := circuit.wait(now)) > own:
                own, status = left, 503
        return Wait(max(0.0, others, own), max(0.0, own), status)

    def asks(self, provider: Provider, client: str) -> None:
        """The provider is being asked: where its circuit was open, this is the probe."""
        if self.is_troubled:
            for key in ((provider.name, ""), (provider.name, client)):
                if (circuit := self._circuits.get(key)) is not None:
                    circuit.asks(provider, self._clock())

    def succeeded(self, provider: Provider, client: str) -> None:
        """The provider has responded as it should."""
        if self.is_troubled:
            for key in ((provider.name, ""), (provider.name, client)):
                circuit = self._circuits.pop(key, None)
                if circuit is not None and circuit.opened_until is not None:
                    self.learned(Learned("works", *key))
            if self._clock() >= self._look_at:
                self._look()
            self.is_troubled = bool(self._circuits or self._cooldowns)

    def failed(self, provider: Provider, client: str, *, was_asked: bool) -> None:
        """The provider has failed.

        Args:
            was_asked: it may have had the whole request, which may be the reason; else there was no
                connection.
        """
        reached, own = (provider.name, ""), (provider.name, client)
        if not provider.health.failures:
            self._circuits.pop(reached, None)
            self._circuits.pop(own, None)
        elif was_asked:
            self._circuits.pop(reached, None)  # it could be reached
            self._count(own, provider)
        else:
            if (circuit := self._circuits.get(own)) is not None:
                circuit.gave_up(self._clock())  # a probe has not found out what it was for
            self._count(reached, provider)
        self._look()

    def _count(self, key: Key, provider: Provider) -> None:
        """Count a failure, and let others know of a circuit that it opens."""
        circuit = self._circuits.setdefault(key, _Circuit())
        before = circuit.opened_until
        circuit.failed(provider, self._clock())
        if circuit.opened_until != before:
            self.learned(Learned("fails", *key, seconds=provider.health.open_for))

    def gave_up(self, provider: Provider, client: str) -> None:
        """The request ended before the provider had done anything: the next one is the probe."""
        if self.is_troubled:
            for key in ((provider.name, ""), (provider.name, client)):
                if (circuit := self._circuits.get(key)) is not None:
                    circuit.gave_up(self._clock())

    def cool_down(
        self, provider: Provider, client: str, model: str, seconds: float, status: int
    ) -> None:
        """Leave the provider alone for this model for so long; it refused with this status."""
        if seconds > 0:
            seconds = min(seconds, LONGEST_COOLDOWN_S)
            self._cool(provider.name, client, model, seconds, status)
            self.learned(Learned("cools", provider.name, client, model, seconds, status))

    def _cool(self, provider: str, client: str, model: str, seconds: float, status: int) -> None:
        key, until = (provider, model), self._clock() + seconds
        cooldown = self._cooldowns.get(key)
        if cooldown is None:
            self._make_room()
            cooldown = self._cooldowns[key] = _Cooldown()
        if until > cooldown.until:
            cooldown.until, cooldown.status = until, status
        cooldown.clients[client] = max(until, cooldown.clients.get(client, 0.0))
        self.is_troubled = True

    # -- what others have learned ---------------------------------------------------------------

    def learn(self, learned: Learned, age: float) -> None:
        """Learn what another process has learned, so many seconds ago."""
        key, seconds = (learned.provider, learned.client), learned.seconds - age
        if learned.what == "works":
            self._circuits.pop(key, None)
        elif seconds <= 0:
            return
        elif learned.what == "fails":
            self._circuits.setdefault(key, _Circuit()).open(self._clock(), seconds)
        else:
            seconds = min(seconds, LONGEST_COOLDOWN_S)
            self._cool(learned.provider, learned.client, learned.model, seconds, learned.status)
        self.is_troubled = bool(self._circuits or self._cooldowns)

    def known(self) -> list[Learned]:
        """Return what is known now, for those who know nothing."""
        now = self._clock()
        found = [
            Learned("fails", *key, seconds=left)
            for key, circuit in self._circuits.items()
            if (left := circuit.wait(now)) > 0
        ]
        for (provider, model), one in self._cooldowns.items():
            for client, until in one.clients.items():
                if (left := until - now) > 0:
                    found.append(Learned("cools", provider, client, model, left, one.status))
        return found

    def _make_room(self) -> None:
        if len(self._cooldowns) >= _MOST_COOLDOWNS:
            self._look()
        if len(self._cooldowns) >= _MOST_COOLDOWNS:
            del self._cooldowns[min(self._cooldowns, key=lambda key: self._cooldowns[key].until)]

    def follow(self, providers: Collection[str]) -> None:
        """Forget the providers that are not among these."""
        for known in (self._circuits, self._cooldowns):
            for key in [key for key in known if key[0] not in providers]:
                del known[key]
        self._look()

    # -- what operators see ---------------------------------------------------------------------

    def is_up(self, provider: str) -> bool:
        """Return whether nobody, of any client, has to leave the provider alone for its failures.

        A circuit whose time is over says nothing: the next request finds out, and none may come.
        """
        now = self._clock()
        return not any(
            name == provider and circuit.wait(now) > 0
            for (name, _), circuit in self._circuits.items()
        )

    def is_ready(self, provider: str) -> bool:
        """Return whether everybody may ask the provider, whatever the model."""
        now = self._clock()
        circuit = self._circuits.get((provider, ""))
        if circuit is not None and circuit.wait(now) > 0:
            return False
        return not any(
            name == provider and one.until > now for (name, _), one in self._cooldowns.items()
        )

    def cooldown_s(self, provider: str) -> float:
        """Return the longest time that the provider is left alone, for any client and model."""
        now = self._clock()
        waits = [one.wait(now) for (name, _), one in self._circuits.items() if name == provider]
        ends = [one.until for (name, _), one in self._cooldowns.items() if name == provider]
        return max([0.0, *waits, *(until - now for until in ends)])

    def circuits(self, provider: str) -> list[OpenCircuit]:
        """Return the circuits of a provider that are open."""
        now = self._clock()
        return [
            OpenCircuit(client or None, round(circuit.wait(now), 3))
            for (name, client), circuit in self._circuits.items()
            if name == provider and circuit.opened_until is not None
        ]

    def cooldowns(self, provider: str) -> list[Cooling]:
        """Return what a provider has asked for, where that is not over."""
        now = self._clock()
        return [
            Cooling(model or None, round(one.until - now, 3), one.status)
            for (name, model), one in self._cooldowns.items()
            if name == provider and one.until > now
        ]

    def _look(self) -> None:
        """Forget the cooldowns that are over, and the circuits that nobody needs any more."""
        now = self._clock()
        self._look_at = now + _LOOK_EVERY_S
        for key in [key for key, one in self._cooldowns.items() if one.until <= now]:
            del self._cooldowns[key]
        for key in [key for key, one in self._circuits.items() if one.is_over(now)]:
            del self._circuits[key]
        self.is_troubled = bool(self._circuits or self._cooldowns)


def _nobody_else(learned: Learned) -> None:
    """Tell nobody."""


class _Cooldown:
    """What one provider asked for, for one model.

    Attributes:
        until: when it is over, for all.
        status: with which it refused.
        clients: when it is over for those who were refused.
    """

    __slots__ = ("clients", "status", "until")

    def __init__(self) -> None:
        self.until = 0.0
        self.status = 503
        self.clients: dict[str, float] = {}


class _Circuit:
    """The failures of one provider, one after the other.

    Attributes:
        opened_until: when the next probe may be sent, or None while the circuit is closed.
    """

    __slots__ = ("_failures", "_is_probed", "_over_at", "opened_until")

    def __init__(self) -> None:
        self._failures: deque[float] = deque()
        self._over_at = 0.0
        self.opened_until: float | None = None
        self._is_probed = False

    def wait(self, now: float) -> float:
        if self.opened_until is None:
            return 0.0
        left = max(0.0, self.opened_until - now)
        return min(left, _PROBED) if self._is_probed else left

    def asks(self, provider: Provider, now: float) -> None:
        """Let this be the probe, if it is time; if it takes too long, there will be another."""
        if self.opened_until is not None and self.opened_until <= now:
            self.opened_until = now + provider.health.open_for
            self._over_at = self.opened_until + provider.health.window
            self._is_probed = True

    def gave_up(self, now: float) -> None:
        """The probe has found nothing out: the next request is one."""
        if self._is_probed:
            self._is_probed = False
            self.opened_until = now

    def open(self, now: float, seconds: float) -> None:
        """Open, as another process has: its failures are not counted here."""
        self.opened_until = max(now + seconds, self.opened_until or 0.0)
        self._over_at = max(self._over_at, self.opened_until + seconds)

    def is_over(self, now: float) -> bool:
        """Return whether its failures say nothing any more: nobody has come since."""
        return self._over_at <= now

    def failed(self, provider: Provider, now: float) -> None:
        health = provider.health
        failures = self._failures
        failures.append(now)
        while failures[0] < now - health.window or len(failures) > health.failures:
            failures.popleft()
        if len(failures) >= health.failures or self._is_probed:
            self.opened_until = now + health.open_for
        self._is_probed = False
        self._over_at = max(now, self.opened_until or 0.0) + health.window
