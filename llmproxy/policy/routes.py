"""From (client, host, path, model) to the provider that a request goes to.

Among the routes whose path, hosts and models match, the longest path wins, then the one that says
more, then the order of the file.  Paths are compared by whole segments, raw, and cross byte for
byte. Nothing here knows headers, bodies or connections.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from typing import NamedTuple
from urllib.parse import unquote_to_bytes

from llmproxy.config import Client, Config, Provider, Route, Timeouts
from llmproxy.dialects.dialect import Dialect
from llmproxy.dialects.errors import dialect_of_path
from llmproxy.errors import ProxyError


class RouteMatch(NamedTuple):
    """Where a request goes.

    Attributes:
        model: what the body's model is overridden with, or None.
        target: path and query for the provider, byte for byte.
    """

    route: Route
    provider: Provider
    model: str | None
    target: bytes
    timeouts: Timeouts


class _Entry(NamedTuple):
    route: Route
    provider: Provider
    path: bytes
    prefix: bytes
    hosts: frozenset[str] | None
    allows: Callable[[str | None], bool]
    timeouts: Timeouts
    base: bytes


_MOST_KNOWN = 1024
_LONGEST_KNOWN = 256
"""How many paths are remembered, and of how many characters: callers use a few short ones."""


class Routes:
    """Every route, prepared, in the order in which they are tried."""

    def __init__(self, config: Config) -> None:
        self._default_limit = config.limits.request_body
        self._known: dict[tuple[bytes, str], list[_Entry]] = {}
        self._limits: dict[bytes, int] = {}
        self._entries = [self._prepare(config, route) for route in config.routes]
        self._entries.sort(key=_rank)
        self._clients_restricted = any(c.models != ("*",) for c in config.clients.values())
        self._client_models = {
            client.name: _matcher(client.models) for client in config.clients.values()
        }

    @staticmethod
    def _prepare(config: Config, route: Route) -> _Entry:
        provider = config.providers[route.providers[0]]
        path = route.path.encode("ascii")
        return _Entry(
            route=route,
            provider=provider,
            path=path,
            prefix=path if path.endswith(b"/") else path + b"/",
            hosts=None if route.hosts is None else frozenset(route.hosts),
            allows=_matcher(("*",) if route.models is None else route.models),
            timeouts=config.timeouts_for(route, provider),
            base=provider.url.path.encode("ascii"),
        )

    # -- before anyone is identified ------------------------------------------------------------

    def known_path(self, path: bytes, host: str) -> None:
        """Refuse a path and host to which no route leads, whatever the model.

        Raises:
            ProxyError: 404.
        """
        if not self._at(path, host):
            raise _no_route(path_known=False)

    def pass_credential(self, path: bytes, host: str) -> bool:
        """Tell whether the callers' own credentials cross on the first matching route."""
        entries = self._at(path, host)
        return bool(entries) and entries[0].provider.pass_credential

    def dialect(self, path: bytes, host: str) -> Dialect:
        """Return the dialect in which a request is told its errors."""
        for entry in self._at(path, host):
            return entry.provider.dialect
        return dialect_of_path(path)

    def body_limit(self, target: bytes) -> int:
        """Return the most bytes that any route at this target takes as a body."""
        path = target.partition(b"?")[0]
        limit = self._limits.get(path)
        if limit is None:
            found = [
                self.limit_of(entry.route) for entry in self._entries if _is_below(path, entry)
            ]
            limit = max(found, default=self._default_limit)
            if len(self._limits) < _MOST_KNOWN and len(path) < _LONGEST_KNOWN:
                self._limits[path] = limit
        return limit

    def limit_of(self, route: Route) -> int:
        """Return the most bytes that a request body may have on ``route``."""
        return self._default_limit if route.request_body is None else route.request_body

    def model_matters(self, path: bytes) -> bool:
        """Tell whether a body's model could decide anything at this path, whoever calls."""
        return self._clients_restricted or any(
            entry.route.models is not None or entry.route.override
            for entry in self._entries
            if _is_below(path, entry)
        )

    def must_look_inside(self, path: bytes, host: str, client: Client) -> bool:
        """Tell whether the body's model decides anything for this request."""
        return client.models != ("*",) or any(
            entry.route.models is not None or entry.route.override for entry in self._at(path, host)
        )

    # -- afterwards -----------------------------------------------------------------------------

    def choose(
        self, client: Client, target: bytes, host: str, models: tuple[str, ...]
    ) -> RouteMatch:
        """Return where a request goes.

        Args:
            models: every model that the request names; the first decides, all must be allowed.

        Raises:
            ProxyError: 404 where no route matches, 403 where the client may not use the route or
                model.
        """
        path, mark, query = target.partition(b"?")
        candidates = self._at(path, host)
        named: tuple[str | None, ...] = models or (None,)
        for entry in candidates:
            if entry.allows(named[0]):
                break
        else:
            raise _no_route(path_known=bool(candidates))
        self._permit(client, entry.route, named)
        override = entry.route.override.get(entry.provider.name)
        rest = path
        if entry.route.strip:
            rest = path[len(entry.path) :] if entry.path != b"/" else path
        joined = entry.base + rest or b"/"
        model = None if override is None else override.model
        return RouteMatch(entry.route, entry.provider, model, joined + mark + query, entry.timeouts)

    def _permit(self, client: Client, route: Route, models: tuple[str | None, ...]) -> None:
        if "*" not in client.routes and route.name not in client.routes:
            raise ProxyError(403, "route_forbidden", "This client may not use this route.")
        allows = self._client_models.get(client.name)
        if allows is not None and not all(map(allows, models)):
            raise ProxyError(403, "model_forbidden", "This client may not use this model.")

    def _at(self, path: bytes, host: str) -> list[_Entry]:
        """Return the routes at a path and host; what was asked for often is remembered."""
        found = self._known.get((path, host))
        if found is None:
            found = [
                entry
                for entry in self._entries
                if _is_below(path, entry) and (entry.hosts is None or host in entry.hosts)
            ]
            if len(self._known) < _MOST_KNOWN and len(path) + len(host) < _LONGEST_KNOWN:
                self._known[path, host] = found
        return found


def refuse_dots(path: bytes) -> None:
    """Refuse a path with a ``.`` or ``..`` segment, encoded or not: it would leave its route.

    Raises:
        ProxyError: 400.
    """
    plain = unquote_to_bytes(path) if b"%" in path else path
    if b"." in plain:
        segments = plain.replace(b"\\", b"/").split(b"/")
        if b"." in segments or b".." in segments:
            raise ProxyError(400, "bad_path", "The path holds a '.' or '..' segment.")


def _is_below(path: bytes, entry: _Entry) -> bool:
    return path.startswith(entry.prefix) or path == entry.path


def _rank(entry: _Entry) -> tuple[int, int]:
    said = (entry.hosts is not None) + (entry.route.models is not None)
    return -len(entry.prefix), -said


def _matcher(patterns: Iterable[str]) -> Callable[[str | None], bool]:
    """Return what tells whether a model, or None for a request that names none, is meant."""
    patterns = tuple(patterns)
    unnamed = "*" in patterns or "-" in patterns
    if "*" in patterns:
        return lambda model: True
    expression = "|".join(
        ".*".join(re.escape(part) for part in pattern.split("*"))
        for pattern in patterns
        if pattern != "-"
    )
    named = re.compile(expression or r"(?!)", re.DOTALL)
    return lambda model: unnamed if model is None else named.fullmatch(model) is not None


def _no_route(*, path_known: bool) -> ProxyError:
    if path_known:
        return ProxyError(404, "no_route", "No route at this path takes this model.")
    return ProxyError(404, "no_route", "No route leads to this path.")
