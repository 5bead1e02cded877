"""The providers on the admin site: a list of them, and switches that take them out for a while.

``GET /providers`` shows them.  ``POST /providers/NAME/disable`` and ``/enable`` change something:
they ask for the admin token as a Bearer, which no web page knows.  A switch is this process's own.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import msgspec
from twisted.logger import Logger

from llmproxy.admin.page import Changing, error, json, parameters, respond
from llmproxy.config import Config, Secret
from llmproxy.config.values import Wrong, duration, text
from llmproxy.policy.fair_queue import Occupancy
from llmproxy.policy.headroom import Told
from llmproxy.policy.health import Cooling, OpenCircuit
from llmproxy.policy.standing import Standing
from llmproxy.server.handler import NOT_DONE_YET
from llmproxy.server.request import Request

PATH = b"/providers"


class SwitchedOff(msgspec.Struct, frozen=True):
    """What an operator has switched off.

    Attributes:
        provider: its name.
        model: the one that is off; None where all of the provider is.
        since: when it was switched off, in RFC 3339.
        until: when it is on again by itself; None until it is switched on.
        by: the address of whoever did it.
    """

    provider: str
    model: str | None
    since: str
    until: str | None
    by: str


class Connections(msgspec.Struct, frozen=True):
    """How many connections there are to a provider."""

    active: int
    connecting: int
    idle: int


class ProviderRow(msgspec.Struct, frozen=True):
    """One provider of the configuration.

    Attributes:
        name, dialect, url: as the configuration has them.
        state: ``on``, or ``off`` where an operator has switched it off.
        switched_off: what is off of it.
        connections: those to it.
        up: no circuit of it is open, for any client.
        circuits: those that are open.
        cooldowns: what it has asked for, where that is not over.
        places: how its places are taken.
        headroom: what it said last of its limits; None for nothing.
    """

    name: str
    dialect: str
    url: str
    state: Literal["on", "off"]
    switched_off: list[SwitchedOff]
    connections: Connections
    up: bool
    circuits: list[OpenCircuit]
    cooldowns: list[Cooling]
    places: Occupancy
    headroom: Told | None


Counts = dict[tuple[str, str], int]
"""Connections by provider and state."""

_log = Logger()


class Providers:
    """The providers of the configuration that is in use.

    Args:
        config: returns it.
        counts: returns the connections to providers.
        standing: how providers stand.
    """

    def __init__(
        self, config: Callable[[], Config], counts: Callable[[], Counts], standing: Standing
    ) -> None:
        self._config = config
        self._counts = counts
        self._standing = standing
        self.switches = standing.switches

    @property
    def token(self) -> Secret | None:
        """What a change must show, or None where nothing can be changed."""
        return self._config().admin.token

    def rows(self) -> list[ProviderRow]:
        """Return a row for each provider, in the order of the file."""
        counts, off = self._counts(), self.switches.rows()
        return [self._row(name, counts, off) for name in self._config().providers]

    def row(self, name: str) -> ProviderRow | None:
        """Return the row of one provider, or None where there is none of this name."""
        return next((row for row in self.rows() if row.name == name), None)

    def _row(self, name: str, counts: Counts, off: list[dict[str, str | None]]) -> ProviderRow:
        provider, standing = self._config().providers[name], self._standing
        switches = [one for one in off if one["provider"] == name]
        return ProviderRow(
            name=name,
            dialect=provider.dialect.value,
            url=str(provider.url),
            state="off" if any(one["model"] is None for one in switches) else "on",
            switched_off=msgspec.convert(switches, list[SwitchedOff]),
            connections=Connections(
                *(counts.get((name, state), 0) for state in Connections.__struct_fields__)
            ),
            up=standing.health.is_up(name),
            circuits=standing.health.circuits(name),
            cooldowns=standing.health.cooldowns(name),
            places=standing.places.occupancy(name),
            headroom=standing.headroom.told(name),
        )


class Switching(Changing):
    """``/providers/NAME/disable`` and ``/providers/NAME/enable``; below them there is nothing else.

    Args:
        providers: what is switched.
        is_ours: whether a request is for this site; else it is a 421.
    """

    def __init__(self, providers: Providers, is_ours: Callable[[Request], bool]) -> None:
        super().__init__(lambda: providers.token, is_ours)
        self._providers = providers

    def take(self, request: Request) -> int:
        """Switch a provider, and respond with its row."""
        name, _, verb = request.path[len(PATH) + 1 :].decode("latin-1").partition("/")
        if verb not in ("disable", "enable"):
            return respond(request, error(404, "There is nothing at this path."))
        if request.method != b"POST":
            return respond(request, error(405, "This endpoint takes POST."), (b"allow", b"POST"))
        if self.refuse_stranger(request):
            return NOT_DONE_YET
        if self._providers.row(name) is None:
            return respond(request, error(404, "There is no provider of this name."))
        try:
            given = parameters(request, ("model", "for") if verb == "disable" else ("model",))
            model = text(given["model"]) if "model" in given else None
            seconds = duration(given["for"]) if "for" in given else None
        except Wrong as wrong:
            return respond(request, error(400, f"Expected {wrong.expected}."))
        self._switch(name, verb, model, seconds, request.channel.peer_name)
        return respond(request, json(self._providers.row(name)))

    def _switch(
        self, name: str, verb: str, model: str | None, seconds: float | None, peer: str
    ) -> None:
        switches = self._providers.switches
        if verb == "disable":
            switches.disable(name, model, seconds, peer)
        else:
            switches.enable(name, model)
        _log.info(
            "provider {provider}{what} is switched {state}{how_long}, by {peer}",
            provider=name,
            what="" if model is None else f", model {model}",
            state="off" if verb == "disable" else "on",
            how_long="" if seconds is None else f" for {seconds:.0f} s",
            model=model,
            peer=peer,
        )
