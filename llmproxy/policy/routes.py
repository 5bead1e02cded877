"""From (host, path, model, client) to the candidates that a request may be sent to.

A route is found in two steps.  :meth:`Routes.at` takes path and host, before anyone is identified:
its :class:`PathMatch` answers every question about the path, and the request keeps it.
:meth:`PathMatch.choose` takes the client and the models: its :class:`RouteMatch` names the route
and its candidates, in the order in which they are to be tried.

Among the routes whose path, hosts and models match, the longest path wins, then the one that says
more, then the order of the file.  Paths are compared by whole segments, raw, and cross byte for
byte.  Nothing here knows bodies, sockets or connections.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from enum import Enum

import msgspec

from llmproxy.config import Client, Config, Provider, Route, Timeouts
from llmproxy.dialects.dialect import Dialect
from llmproxy.dialects.errors import dialect_of_path
from llmproxy.dialects.json_spans import BodyError
from llmproxy.dialects.model_list import Asked, asked
from llmproxy.dialects.path_model import path_models, replaced
from llmproxy.errors import ProxyError
from llmproxy.http1.grammar import Fields
from llmproxy.http1.headers import HeaderRewriter
from llmproxy.http1.path import has_dot_segment
from llmproxy.http1.query import QueryRewriter, names_of, without
from llmproxy.policy.auth import KeyPlaces, cut_keys
from llmproxy.policy.balance import Balance
from llmproxy.upstream.credential import CommandCredential, Credential, credential_of

_ANY_MODEL = ("*",)

PROVIDER, ATTEMPTS = b"x-llmproxy-provider", b"x-llmproxy-attempts"
"""The fields that tell callers which provider a response is from, and how many were asked."""


class NoModel(Enum):
    """What stands for the model of a request that names none."""

    WITHOUT_BODY = "the request has no body: '-' covers it"
    WITH_BODY = "a provider takes a model of its own for the body: only '*' covers it"


Named = str | NoModel
"""A model, or what stands for none."""

_MOST_KNOWN = 1024
_LONGEST_KNOWN = 256
"""How many places are remembered, and of how many characters: callers use a few short paths."""


class Candidate(msgspec.Struct, frozen=True):
    """One provider that a route may use, prepared once for all requests.

    Attributes:
        provider: as the configuration has it.
        model: what the body's model is overridden with, or None.
        timeouts: the deadlines of a request on this route to this provider.
        credential: has the field that carries the provider's credential, or None.
        keys: where callers' keys stand.
        rewriter: writes the header fields that the provider gets.
        query: writes the query that the provider gets, or None where that is the client's.
        base: the path of the provider's URL, which stands before every target.
        is_counted: something goes by how many requests are under way at the provider.
        told: how callers are told that the response is from this provider, and that no other one
            was asked; or nothing.
    """

    provider: Provider
    model: str | None
    timeouts: Timeouts
    credential: Credential | None
    keys: KeyPlaces
    rewriter: HeaderRewriter
    query: QueryRewriter | None
    base: bytes
    is_counted: bool
    told: Fields


class RouteMatch(msgspec.Struct, frozen=True):
    """Where a request goes.

    Attributes:
        route: as the configuration has it.
        candidates: at least one, in the order of the file.
        balance: in which order they are to be asked, or None where there is but one, and nobody
            counts who is there.
        body_limit: the most bytes that a request body may have on this route.
        path: what of the request's path the provider gets, byte for byte.
        query: the request's query with its question mark, or nothing; a key of the caller's is cut
            out of it.
        is_call: the request may call a model that its path names.
    """

    route: Route
    candidates: tuple[Candidate, ...]
    balance: Balance | None
    body_limit: int
    path: bytes
    query: bytes
    is_call: bool

    def names_model(self, candidate: Candidate) -> bool:
        """Return whether the path that this candidate gets names a model."""
        return bool(path_models(candidate.base + self.path, is_call=self.is_call).names)

    def doubled(self, candidate: Candidate) -> bytes:
        """Return the segment that ends this candidate's own path and begins ours, or nothing."""
        last = candidate.base.rpartition(b"/")[2]
        return last if last and self.path.split(b"/", 2)[1:2] == [last] else b""

    def target(self, candidate: Candidate) -> bytes:
        """Return path and query for this candidate.

        They are the client's, byte for byte, but for an overridden model and what the operator
        adds to the query or drops from it.

        Raises:
            ProxyError: 400, where the path names a model in a way that cannot be overridden.
        """
        path = candidate.base + self.path or b"/"
        if candidate.model is not None:
            try:
                path = replaced(path, candidate.model, is_call=self.is_call)
            except BodyError as error:
                raise ProxyError(400, "bad_path", str(error)) from error
        if candidate.query is not None:
            return path + candidate.query.for_provider(self.query)
        return path + self.query


class ModelList(msgspec.Struct, frozen=True):
    """A list of models that the proxy makes.

    Attributes:
        route: whose list it is.
        asked: what the request asks of it.
        names: the models that the client may use, in order.
    """

    route: Route
    asked: Asked
    names: list[str]


class _Prepared(msgspec.Struct, frozen=True):
    """A route of the configuration, prepared for requests."""

    route: Route
    candidates: tuple[Candidate, ...]
    balance: Balance | None
    body_limit: int
    path: bytes
    prefix: bytes
    hosts: frozenset[str] | None
    allows: Callable[[Named], bool]
    joins_model: bool  # the provider's own path may make a model of what a request's begins with

    @property
    def needs_model(self) -> bool:
        """Whether the model decides something on this route."""
        return self.route.models is not None or bool(self.route.override)

    def is_at(self, path: bytes) -> bool:
        """Return whether the path is the route's own, or stands below it."""
        return path.startswith(self.prefix) or path == self.path


class _Clients:
    """What the clients of a configuration may use."""

    def __init__(self, config: Config) -> None:
        self.are_restricted = any(one.models != _ANY_MODEL for one in config.clients.values())
        self._models = {one.name: _matcher(one.models) for one in config.clients.values()}

    def permit(self, client: Client, route: Route, models: tuple[Named, ...]) -> None:
        """Refuse a client that may not use the route, or one of the models, with a 403."""
        if "*" not in client.routes and route.name not in client.routes:
            raise ProxyError(403, "route_forbidden", "This client may not use this route.")
        allows = self._models.get(client.name)
        if allows is not None and not all(map(allows, models)):
            text = "This client may not use this model."
            if models == (NoModel.WITH_BODY,):
                text = "The request must name a model that this client may use."
            raise ProxyError(403, "model_forbidden", text)


class PathMatch:
    """Every answer about one path and host that needs no body.

    Args:
        path: a raw path, without its query.
        found: the routes at this path that take the host, the most particular one first.
        clients: who may do what.
        default_limit: the most bytes of a body where no route leads.
        lost: the host, where routes are at this path and all of them are for others.

    Attributes:
        dialect: the shape of errors for the client: that of the first candidate, or without a route
            that of the API which the path looks like (design 8).
        body_limit: the most bytes that any route here takes as a request body.
        keys: where callers' keys stand on the first route here.
        drops: the parameters of the query that cross on no route here.
        may_add: whether something may be added to a request body on some route here.
        origins: of web pages that may call some route here.
        lists: lists of models are made by the proxy itself here.
        websockets: the same, of the routes alone that take WebSockets; None where none does.
    """

    def __init__(
        self,
        path: bytes,
        found: list[_Prepared],
        clients: _Clients,
        default_limit: int,
        lost: str | None = None,
    ) -> None:
        self._found = found
        self._lost = lost
        self._clients = clients
        self._needs_model = any(one.needs_model for one in found)
        self.may_add = any(one.route.include_usage == "inject" for one in found)
        self.origins = frozenset(origin for one in found for origin in one.route.allowed_origins)
        self.lists = bool(found) and self._list_route().route.models_list == "configured"
        first = found[0].candidates[0].provider if found else None
        self.dialect = dialect_of_path(path) if first is None else first.dialect
        self.body_limit = max((one.body_limit for one in found), default=default_limit)
        self.keys = found[0].candidates[0].keys if found else KeyPlaces()
        dropped = [to.keys.dropped for one in found for to in one.candidates]
        self.drops: frozenset[bytes] = frozenset.intersection(*dropped) if dropped else frozenset()
        taking = [one for one in found if one.route.websocket]
        self.websockets: PathMatch | None = None
        if taking:
            whole = len(taking) == len(found)
            self.websockets = self if whole else PathMatch(path, taking, clients, default_limit)

    def needs_model(self, client: Client | None = None) -> bool:
        """Return whether the model of a request decides anything here.

        Args:
            client: who calls; None for any client that may call.
        """
        restricted = self._clients.are_restricted if client is None else client.models != _ANY_MODEL
        return restricted or self._needs_model

    def crossing(self, target: bytes) -> bytes:
        """Return ``target``, path and query, without what of the query crosses on no route here."""
        return without(target, self.drops) if self.drops else target

    def require(self) -> None:
        """Refuse a path and host to which no route leads, whatever the model.

        Raises:
            ProxyError: 404.
        """
        if not self._found:
            raise self._no_route()

    def choose(
        self,
        client: Client,
        target: bytes,
        models: tuple[Named, ...],
        *,
        reads_list: bool = False,
        is_call: bool = True,
    ) -> RouteMatch:
        """Return where a request goes.

        Args:
            client: who calls.
            target: path and query, as the request has them; the path is this one.
            models: every model that the request names, or the one that stands for none; the route
                must take all of them, and the client may use them.
            reads_list: the request reads a list of models, which needs no model.
            is_call: it may call a model that its path names.

        Raises:
            ProxyError: 404 where no route matches, 403 where the client may not use the route or
                model.
        """
        found = self._found
        if reads_list and found:
            one = self._list_route()
        else:
            for one in found:
                if all(map(one.allows, models)):
                    break
            else:
                raise self._no_route()
        if (key := one.candidates[0].keys.query) is not None:
            target = cut_keys(target, key)[1]
        path, mark, query = target.partition(b"?")
        if one.route.strip and one.path != b"/":
            path = path[len(one.path) :]
        if one.joins_model and not reads_list and self.needs_model(client):
            models = _joined(one, path, models, is_call=is_call)
            if not all(map(one.allows, models)):
                raise self._no_route()
        self._clients.permit(client, one.route, () if reads_list else models)
        return RouteMatch(
            one.route, one.candidates, one.balance, one.body_limit, path, mark + query, is_call
        )

    def _no_route(self) -> ProxyError:
        if self._found:
            return ProxyError(404, "no_route", "No route at this path takes this model.")
        if self._lost is None:
            return ProxyError(404, "no_route", "No route leads to this path.")
        words = "No route for this host leads to this path."
        return ProxyError(404, "no_route", words, detail=f"host {self._lost}")

    def list_of(self, client: Client, path: bytes) -> ModelList | None:
        """Return the list of models that a read of this path asks for, if it asks for one.

        It has the names that stand in the file for this path and without a star: in ``models`` of
        the routes with the path of the list's own, in their overrides, and in ``models`` of the
        client.  Of these the client may use each here.

        Args:
            client: who calls.
            path: of the request; it is this one.

        Raises:
            ProxyError: 403, where the client may not use the route.
        """
        one = self._list_route()
        what = asked(path[len(one.path) :] if one.path != b"/" else path)
        if what is None:
            return None
        self._clients.permit(client, one.route, ())
        said = list[str]()
        for other in self._found:
            if other.path == one.path:
                said += other.route.models or ()
                said += [to.model for to in other.candidates if to.model is not None]
        said += client.models
        names = [name for name in dict.fromkeys(said) if "*" not in name and name != "-"]
        return ModelList(one.route, what, [name for name in names if self._takes(client, name)])

    def _takes(self, client: Client, name: str) -> bool:
        """Return whether a call of the client's for this model would find its route."""
        one = next((one for one in self._found if one.allows(name)), None)
        if one is None:
            return False
        try:
            self._clients.permit(client, one.route, (name,))
        except ProxyError:
            return False
        return True

    def _list_route(self) -> _Prepared:
        """Return the route of lists: of those with the longest path one that needs no model."""
        first = self._found[0]
        same = [one for one in self._found if one.path == first.path]
        return next((one for one in same if one.allows(NoModel.WITHOUT_BODY)), first)


class Routes:
    """Every route of a configuration, prepared, in the order in which they are tried.

    Args:
        config: the checked configuration.
        credentials: those that commands print, by provider; None where no request will be sent.
    """

    def __init__(
        self, config: Config, credentials: Mapping[str, CommandCredential] | None = None
    ) -> None:
        self._default_limit = config.limits.request_body
        self._clients = _Clients(config)
        self._routes = sorted(
            (_prepare(config, route, credentials) for route in config.routes),
            key=lambda one: _rank_of(one.route),
        )
        self._known: dict[tuple[bytes, str], PathMatch] = {}

    def at(self, path: bytes, host: str) -> PathMatch:
        """Return what there is at a raw path (without its query) and a lower-case host."""
        match = self._known.get((path, host))
        if match is None:
            here = [one for one in self._routes if one.is_at(path)]
            found = [one for one in here if one.hosts is None or host in one.hosts]
            lost = host if here and not found else None
            match = PathMatch(path, found, self._clients, self._default_limit, lost)
            if len(self._known) < _MOST_KNOWN and len(path) + len(host) < _LONGEST_KNOWN:
                self._known[path, host] = match
        return match


def shadowed(config: Config) -> list[tuple[int, int]]:
    """Return the routes to which no request can come, by their places in the file.

    Each comes with the route that takes all that it would take: it has the same path, is tried
    earlier, and takes the same hosts and models, or more.
    """
    ranked = sorted(enumerate(config.routes), key=lambda one: _rank_of(one[1]))
    found = []
    for place, (at, route) in enumerate(ranked):
        for before, other in ranked[:place]:
            if other.path == route.path and _takes_all_of(other, route):
                found.append((at, before))
                break
    return sorted(found)


def _takes_all_of(one: Route, other: Route) -> bool:
    """Return whether a route takes every host and model that another one takes."""
    hosts = one.hosts is None or (other.hosts is not None and set(other.hosts) <= set(one.hosts))
    models = _ANY_MODEL if other.models is None else other.models
    takes = _matcher(_ANY_MODEL if one.models is None else one.models)
    # A star of a pattern is matched, as if it were a letter, only by another pattern's star.
    return hosts and all(takes(NoModel.WITHOUT_BODY if m == "-" else m) for m in models)


def refuse_dots(path: bytes) -> None:
    """Refuse a path with a ``.`` or ``..`` segment, in any disguise: it would leave its route.

    Raises:
        ProxyError: 400.
    """
    if has_dot_segment(path):
        raise ProxyError(400, "bad_path", "The path holds a '.' or '..' segment.")


def _prepare(
    config: Config, route: Route, credentials: Mapping[str, CommandCredential] | None
) -> _Prepared:
    path = route.path.encode("ascii")
    limit = config.limits.request_body if route.request_body is None else route.request_body
    providers = [config.providers[name] for name in route.providers]
    # A parameter that one of them gets must hold no key, whatever the others get.
    dropped = frozenset.intersection(
        *(names_of((*one.drop_query, *route.drop_query)) for one in providers)
    )
    candidates = tuple(
        _candidate(config, route, provider, dropped, credential_of(provider, credentials))
        for provider in providers
    )
    return _Prepared(
        route=route,
        candidates=candidates,
        balance=_balance(route, candidates),
        body_limit=limit,
        path=path,
        prefix=path if path.endswith(b"/") else path + b"/",
        hosts=None if route.hosts is None else frozenset(route.hosts),
        allows=_matcher(_ANY_MODEL if route.models is None else route.models),
        joins_model=any(len(one.base) > 1 for one in candidates),
    )


def _balance(route: Route, candidates: Sequence[Candidate]) -> Balance | None:
    if len(candidates) == 1 and not candidates[0].is_counted:
        return None
    overrides = (route.override.get(name) for name in route.providers)
    return Balance(route.balance, [1 if one is None else one.weight for one in overrides])


def _is_counted(config: Config, provider: Provider) -> bool:
    return provider.max_streams is not None or any(
        one.balance == "least_busy" and provider.name in one.providers for one in config.routes
    )


def _candidate(
    config: Config,
    route: Route,
    provider: Provider,
    dropped: frozenset[bytes],
    credential: Credential | None,
) -> Candidate:
    override = route.override.get(provider.name)
    headers = {**dict(provider.headers), **dict(route.headers)}
    drop_headers = (*provider.drop_headers, *route.drop_headers)
    drop_query = (*provider.drop_query, *route.drop_query)
    query = {name.lower(): (name, value) for name, value in (*provider.query, *route.query)}
    return Candidate(
        provider=provider,
        model=None if override is None else override.model,
        timeouts=config.timeouts_for(route, provider),
        credential=credential,
        keys=KeyPlaces(
            passes=provider.pass_credential,
            query=None if provider.key_query is None else provider.key_query.encode("ascii"),
            dropped=dropped,
        ),
        rewriter=HeaderRewriter(
            pass_credential=provider.pass_credential,
            dropped=tuple(name.encode("ascii") for name in drop_headers),
            credential=None if provider.credential is None else provider.header.encode("ascii"),
            defaults=tuple((k.encode("ascii"), v.encode("latin-1")) for k, v in headers.items()),
            accept_events=provider.dialect in (Dialect.OPENAI, Dialect.ANTHROPIC),
        ),
        query=QueryRewriter(drop_query, query.values()) if drop_query or query else None,
        base=provider.url.path.encode("ascii"),
        is_counted=_is_counted(config, provider),
        told=[(PROVIDER, provider.name.encode("ascii")), (ATTEMPTS, b"1")]
        if config.proxy.tell_provider
        else [],
    )


def _rank_of(route: Route) -> tuple[int, int]:
    """Return what routes are sorted by: the longest path first, then the one that says more."""
    said = (route.hosts is not None) + (route.models is not None)
    return -len(route.path.rstrip("/")), -said


def _joined(
    one: _Prepared, path: bytes, models: tuple[Named, ...], *, is_call: bool
) -> tuple[Named, ...]:
    """Return the models with those that a provider reads in its own path and the request's."""
    try:
        found = [path_models(to.base + path, is_call=is_call) for to in one.candidates]
    except BodyError as error:
        raise ProxyError(400, "bad_path", str(error)) from error
    names = [name for place in found for name in place.names]
    if not names:
        return models
    return tuple(dict.fromkeys((*(name for name in models if isinstance(name, str)), *names)))


def _matcher(patterns: Iterable[str]) -> Callable[[Named], bool]:
    """Return a test for a model, or for what stands for none."""
    patterns = tuple(patterns)
    unnamed = "-" in patterns
    if "*" in patterns:
        return lambda model: True
    expression = "|".join(
        ".*".join(re.escape(part) for part in pattern.split("*"))
        for pattern in patterns
        if pattern != "-"
    )
    named = re.compile(expression or r"(?!)", re.DOTALL)

    def allows(model: Named) -> bool:
        if isinstance(model, NoModel):
            return unnamed and model is NoModel.WITHOUT_BODY
        return named.fullmatch(model) is not None

    return allows
