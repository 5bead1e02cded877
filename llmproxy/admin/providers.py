"""The providers on the admin site: a list of them, and switches that take them out for a while.

``GET /providers`` shows them.  ``POST /providers/NAME/disable`` and ``/enable`` change something:
they ask for the admin token as a Bearer, which no web page knows.  A switch is this process's own.
"""

from __future__ import annotations

import hmac
from collections.abc import Callable
from urllib.parse import parse_qsl

from twisted.logger import Logger

from llmproxy.admin.page import FOREIGN, error, json, respond
from llmproxy.config import Config, Secret
from llmproxy.config.values import Wrong, duration, text
from llmproxy.policy.switches import Switches
from llmproxy.server.handler import Handler
from llmproxy.server.request import Request

PATH = b"/providers"

Counts = dict[tuple[str, str], int]
"""Connections by provider and state."""

_log = Logger()


class Providers:
    """The providers of the configuration that is in use.

    Args:
        config: returns it.
        counts: returns the connections to providers.
        switches: what is off.
    """

    def __init__(
        self, config: Callable[[], Config], counts: Callable[[], Counts], switches: Switches
    ) -> None:
        self._config = config
        self._counts = counts
        self.switches = switches

    @property
    def token(self) -> Secret | None:
        """What a change must show, or None where nothing can be changed."""
        return self._config().admin.token

    def rows(self) -> list[dict[str, object]]:
        """Return a row for each provider, in the order of the file."""
        counts, off = self._counts(), self.switches.rows()
        return [self._row(name, counts, off) for name in self._config().providers]

    def row(self, name: str) -> dict[str, object] | None:
        """Return the row of one provider, or None where there is none of this name."""
        return next((row for row in self.rows() if row["name"] == name), None)

    def _row(
        self, name: str, counts: Counts, off: list[dict[str, str | None]]
    ) -> dict[str, object]:
        provider = self._config().providers[name]
        switches = [one for one in off if one["provider"] == name]
        return {
            "name": name,
            "dialect": provider.dialect.value,
            "url": str(provider.url),
            "state": "off" if any(one["model"] is None for one in switches) else "on",
            "switched_off": switches,
            "connections": {
                state: counts.get((name, state), 0) for state in ("active", "connecting", "idle")
            },
        }


class Switching(Handler):
    """``/providers/NAME/disable`` and ``/providers/NAME/enable``; below them there is nothing else.

    Args:
        providers: what is switched.
        is_ours: whether a request is for this site; else it is a 421.
    """

    def __init__(self, providers: Providers, is_ours: Callable[[Request], bool]) -> None:
        super().__init__()
        self._providers = providers
        self._is_ours = is_ours

    def render(self, request: Request) -> int:
        """Respond at once; a body is neither needed nor kept."""
        if not self._is_ours(request):
            return respond(request, error(421, FOREIGN))
        name, _, verb = request.path[len(PATH) + 1 :].decode("latin-1").partition("/")
        if verb not in ("disable", "enable"):
            return respond(request, error(404, "There is nothing at this path."))
        if request.method != b"POST":
            return respond(request, error(405, "This endpoint takes POST."), (b"allow", b"POST"))
        if (token := self._providers.token) is None:
            text = "Nothing can be changed here: the configuration has no `token` in [admin]."
            return respond(request, error(403, text))
        if not _shows(request, token):
            text = "A change needs the admin token, as a Bearer."
            return respond(request, error(401, text), (b"www-authenticate", b"Bearer"))
        if self._providers.row(name) is None:
            return respond(request, error(404, "There is no provider of this name."))
        try:
            model, seconds = _asked(request, for_is_known=verb == "disable")
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


def _shows(request: Request, token: Secret) -> bool:
    """Return whether a request shows the token, in a time that does not tell how much is right."""
    scheme, _, value = request.first.get(b"authorization", b"").partition(b" ")
    shown = value.strip(b" ") if scheme.lower() == b"bearer" else b""
    return hmac.compare_digest(shown, token.reveal().encode("ascii"))


def _asked(request: Request, *, for_is_known: bool) -> tuple[str | None, float | None]:
    """Return the model that is meant, and for how many seconds, as the query says.

    Raises:
        Wrong: the query says something else.
    """
    query = request.uri.partition(b"?")[2].decode("latin-1")
    known = ("model", "for") if for_is_known else ("model",)
    pairs = parse_qsl(query, keep_blank_values=True)
    given = dict(pairs)
    if len(given) < len(pairs) or not given.keys() <= set(known):
        words = " and ".join(f"`{name}`" for name in known)
        raise Wrong(f"nothing in the query but {words}, each at most once")
    model = text(given["model"]) if "model" in given else None
    return model, duration(given["for"]) if "for" in given else None
