"""The handler that serves every request for a provider: the story of one request, in order.

:meth:`Gateway._tell` is that story: admit, identify, look inside, choose, reserve, send, copy the
head, pump.  Whatever ends the story ends in :meth:`Gateway._serve`, the one place that turns an end
into an end reason, an error for the client and a record.  Sockets, clocks and the shapes of errors
are known elsewhere.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import msgspec

from llmproxy.config import Client, Config, Route
from llmproxy.config.host_pattern import HostPatterns
from llmproxy.dialects.dialect import Dialect
from llmproxy.dialects.filler import heartbeat, padding
from llmproxy.dialects.model_list import document
from llmproxy.dialects.request import RequestFacts, is_call, is_held, reads_list
from llmproxy.dialects.websocket import socket_api
from llmproxy.errors import ClientGone, EndReason, ProxyError
from llmproxy.gateway.admission import (
    Rules,
    admit,
    early_refusal,
    handshake_of,
    identify,
    needs_model,
    who_calls,
)
from llmproxy.gateway.attempt import SWITCHING, Attempts
from llmproxy.gateway.detached import DetachedStreams
from llmproxy.gateway.exchange import Exchange, end_failed
from llmproxy.gateway.failover import Failover
from llmproxy.gateway.hints import NOT_FOUND, hint_fields
from llmproxy.gateway.inspection import Inspection, endpoint_of
from llmproxy.gateway.known_head import KnownHead, can_be_known
from llmproxy.gateway.recorder import Recorder
from llmproxy.gateway.request_reader import RequestReader
from llmproxy.gateway.shown_fields import kept_of
from llmproxy.gateway.websocket import WebSockets, opens_websocket
from llmproxy.http1.grammar import Fields
from llmproxy.http1.headers import for_client, host_of
from llmproxy.net.task import Task
from llmproxy.net.turns import Turns
from llmproxy.policy.auth import ANONYMOUS, Auth
from llmproxy.policy.limits import limited
from llmproxy.policy.origins import for_page, page_fields, preflight_fields, refuse_page
from llmproxy.policy.routes import Candidate, Named, NoModel, PathMatch, RouteMatch, Routes
from llmproxy.policy.standing import Standing
from llmproxy.policy.stickiness import key_of
from llmproxy.record.metrics import Metrics
from llmproxy.server.error_response import own_fields, too_large
from llmproxy.server.handler import NOT_DONE_YET, Handler
from llmproxy.server.request import Request
from llmproxy.shared.client_limits import SharedLimits
from llmproxy.shared.standing import SharedStanding
from llmproxy.stream.heartbeat import Heartbeat
from llmproxy.stream.last_bytes import LastBytes
from llmproxy.stream.relay import Batch, Relay, Whole
from llmproxy.upstream.client import Upstream
from llmproxy.upstream.credential import CommandCredential
from llmproxy.upstream.held_response import HeldResponse
from llmproxy.upstream.response import Response


class Gateway(Handler):
    """Serves every request that is for a provider, as one configuration has it.

    A reload makes another gateway; a request ends with the one that it began with (ADR-0014).

    Args:
        config: the checked configuration.
        upstream: the connections to providers.
        recorder: keeps a record of each request.
        metrics: counts what is on the way.
        credentials: those that commands print, by provider; needed where there are some.
        detached: the responses that are read on after their client left; by default those of this
            gateway alone.
        standing: what is known of providers; by default what this gateway learns.
        shared_standing: what other processes know of them; None where none are.
        limits: what clients use, of this gateway alone by default.
        reactor: keeps the deadlines of requests (``net/timers.py``).
        clock: monotonic seconds.

    Attributes:
        rules: what requests are admitted by.
    """

    def __init__(
        self,
        config: Config,
        upstream: Upstream,
        recorder: Recorder,
        metrics: Metrics,
        *,
        credentials: Mapping[str, CommandCredential] | None = None,
        detached: DetachedStreams | None = None,
        standing: Standing | None = None,
        shared_standing: SharedStanding | None = None,
        limits: SharedLimits | None = None,
        reactor: Any,
        clock: Callable[[], float],
    ) -> None:
        super().__init__()
        self._routes = Routes(config, credentials or {})
        self._recorder = recorder
        self._metrics = metrics
        self._observe_gap, self._observe_delay = metrics.gap.observe, metrics.relay_delay.observe
        self._reactor = reactor
        self._clock = clock
        self._batch = Batch()
        self._inspection = Inspection(config, metrics, clock, self._batch.read)
        self.detached = (
            DetachedStreams(config.limits.drains, reactor) if detached is None else detached
        )
        self.limits = SharedLimits(clock, recorder.now) if limits is None else limits
        self._limited = frozenset(limited(config.clients))
        via = config.proxy.via.encode("ascii")
        intercept = config.intercept
        serves_plain = intercept is not None and intercept.plain_http
        intercepts = HostPatterns(() if intercept is None else intercept.hosts)
        auth = Auth(config, recorder.now)
        self.rules = Rules(via.lower(), guarded_fields(config), auth, serves_plain, intercepts)
        turns = Turns(reactor, clock)
        self._reader = RequestReader(turns)
        if standing is None:
            standing = Standing(reactor, clock, recorder.now)
            standing.follow(config)
        self.standing = standing
        self._shared_standing = shared_standing
        attempts = Attempts(
            upstream, metrics, clock, via, turns, standing=standing, wall=recorder.now
        )
        self._failover = Failover(attempts, standing, self._meet_next, clock)
        self._websockets = WebSockets(
            config.limits, self.limits, self._inspection, recorder, metrics, reactor, clock
        )

    # -- what the server asks before a request is served ----------------------------------------

    def body_limit(self, request: Request) -> int:
        """Return the most bytes that the body of ``request`` may have on any route of its path."""
        place = request.kept = self._routes.at(request.path, host_of(request.first.get(b"host")))
        return place.body_limit

    def holds_body(self, request: Request) -> bool:
        """Return whether the body must be whole before the request is served, or else streams."""
        kind = request.first.get(b"content-type")
        return is_held(kind, lambda: needs_model(request, request.kept, self.rules))

    def early_refusal(self, request: Request) -> ProxyError | None:
        """Return why ``request`` is refused before its body is read, or None."""
        if request.seen is not None:
            try:
                request.belongs_to(request.seen.found.client.name)
            except ProxyError as error:
                return error
            return None
        return early_refusal(request, request.kept, self.rules)

    def render(self, request: Request) -> int:
        """Begin to serve ``request``."""
        place: PathMatch = request.kept
        exchange = self._recorder.begin(request)
        request.gone = _Leaving(self, exchange)
        exchange.task = Task(self._serve(exchange, place), end_failed)
        return NOT_DONE_YET

    def client_left(self, exchange: Exchange, why: ClientGone) -> None:
        """The client of an exchange has left: read on for its usage, or drop the provider."""
        exchange.left, left_at = why, self._clock()
        if not self.detached.takes(exchange, why):
            exchange.drop()
            self._metrics.cancel.observe(self._clock() - left_at)

    # -- the story ------------------------------------------------------------------------------

    async def _tell(self, exchange: Exchange, place: PathMatch) -> EndReason:
        request, trace = exchange.request, exchange.trace
        if exchange.known is None:
            if b"upgrade" in request.first:
                exchange.handshake = handshake_of(request, place)
            if place.origins:
                exchange.page = page_fields(request.first, place.origins)
                if (fields := self._preflight(request, place)) is not None:
                    request.start(204, fields)
                    request.finish()
                    return EndReason.COMPLETE
        client = self._identify(exchange, place)
        if place.lists and self._list_models(exchange, place, client):
            return EndReason.COMPLETE
        facts = self._reader.read_at_once(exchange, place)
        if facts is None:
            facts = await self._reader.read(exchange, place, client)
        match = self._choose(exchange, place, client, facts)
        if request.body:
            self._recorder.note_sent(exchange, client.name, request.body)
        is_limited, caller = client.name in self._limited, None
        if exchange.handshake is not None:
            caller = opens_websocket(exchange, match, place, client, is_limited=is_limited)
        if is_limited and (caller is None or caller.api is None):
            size = None  # it costs tokens if those of its response can be read
            if exchange.endpoint is not None:
                size = request.body_bytes if facts.json else 0
            limits, asked = self.limits, facts.model
            if limits.engine is None:
                exchange.lease = limits.admit(client, asked, size)
            else:
                exchange.lease = await limits.ask(client, asked, size)

        shared = self._shared_standing
        if shared is not None and shared.engine is not None:
            key = key_of(match.route, client.name, trace.session)
            if key is not None:
                await shared.recall(key, match.route.sticky_for)
        response = await self._failover.send(exchange, match, client, facts)
        request.release()
        exchange.decoded_body = b""

        name = trace.id.encode("ascii")
        fields = for_client(response.fields, response.first, name)
        fields += exchange.told_fields()
        if response.code == NOT_FOUND:
            fields += hint_fields(exchange)
        if exchange.page:
            fields = for_page(fields, exchange.page)
        if response.code == SWITCHING and caller is not None:
            return await self._websockets.serve(exchange, match, caller, response, fields)
        request.start(response.code, fields)
        del facts, fields, name  # a stream may last for long
        await self._pump(exchange, match, response)
        request.finish()
        if (delivered := request.when_delivered()) is not None:
            exchange.stop_timer()
            await delivered
        return EndReason.COMPLETE if response.code < 400 else EndReason.UPSTREAM_REFUSED

    async def _serve(self, exchange: Exchange, place: PathMatch) -> None:
        """Tell the story, and see to its end, whatever that is."""
        error: ProxyError | None = None
        try:
            end = await self._tell(exchange, place)
            if exchange.left is not None:
                exchange.is_read_out = end is EndReason.COMPLETE
                end = exchange.left.end
        except Exception as problem:
            end, error = exchange.judge(problem)
            # From CPython 3.12 on its frames lead back to it, by the Failure that threw it in here.
            problem.__traceback__ = None
        if error is not None:
            exchange.fail(error, place.dialect, self._recorder.now())
        self.detached.over(exchange)
        self._recorder.close(exchange, self._inspection.conclude(exchange, end), error)

    # -- its steps ------------------------------------------------------------------------------

    def _preflight(self, request: Request, place: PathMatch) -> Fields | None:
        """Return the response to a preflight of a browser's, which shows no key; or None."""
        fields = preflight_fields(request.method, request.first, place.origins)
        if fields is not None:
            admit(request, place, self.rules)
        return fields

    def _identify(self, exchange: Exchange, place: PathMatch) -> Client:
        request, known = exchange.request, exchange.known
        client: Client | None = request.caller if known is None else known.client
        if client is None:
            client = identify(request, place, self.rules)
        elif request.refusal is not None:  # of its body: it was admitted before that came
            raise request.refusal
        exchange.trace.client = client.name
        if request.owner is None and request.held and request.site.memory.is_filling():
            request.belongs_to(client.name)
        return client

    def _list_models(self, exchange: Exchange, place: PathMatch, client: Client) -> bool:
        """Respond with a list of models of ours, and return whether the request asks for one."""
        request, trace = exchange.request, exchange.trace
        if is_call(request.method) or exchange.has_body:
            return False
        listed = place.list_of(client, request.path)
        if listed is None:
            return False
        trace.route, trace.dialect = listed.route.name, place.dialect
        if client.name in self._limited:
            exchange.lease = self.limits.admit(client, None, None)
        query = request.uri.partition(b"?")[2]
        found = document(listed.asked, listed.names, place.dialect, query)
        body = msgspec.json.encode(found)
        fields = own_fields(trace.id, len(body), self._recorder.now())
        request.start(200, [*fields, *exchange.page])
        request.write(body)
        request.finish()
        return True

    def _choose(
        self, exchange: Exchange, place: PathMatch, client: Client, facts: RequestFacts
    ) -> RouteMatch:
        """Return the route, found now or when the head came before; the exchange goes by it."""
        request, trace, known = exchange.request, exchange.trace, exchange.known
        match = known.ways.get(facts.model) if known is not None and facts.json else None
        if is_new := match is None:
            match = self._find_route(exchange, place, client, facts)
        elif max(request.body_bytes, len(exchange.decoded_body)) > match.body_limit:
            raise too_large(match.body_limit)
        candidate = match.candidates[0]
        exchange.match = match
        self._meet(exchange, match, candidate)
        trace.stream = facts.wants_stream(exchange.endpoint)
        if is_new and (exchange.page or client is ANONYMOUS):
            self._meet_page(exchange, client, match)
        if candidate.timeouts.total is not None:
            exchange.timer = self._reactor.callLater(candidate.timeouts.total, exchange.expire)
        if is_new:
            self._keep_way(exchange, place, client, facts, match)
        return match

    def _find_route(
        self, exchange: Exchange, place: PathMatch, client: Client, facts: RequestFacts
    ) -> RouteMatch:
        request = exchange.request
        named: tuple[Named, ...] = facts.models
        if not named:
            named = (NoModel.WITH_BODY,) if exchange.has_body else (NoModel.WITHOUT_BODY,)
        is_read = named[0] is NoModel.WITHOUT_BODY and reads_list(request.method, request.path)
        calls = is_call(request.method)
        if exchange.handshake is not None and place.websockets is not None:
            calls, place = True, place.websockets
            if socket_api(place.dialect, request.path) is not None:
                named = facts.models  # its messages will name one
        match = place.choose(client, request.uri, named, reads_list=is_read, is_call=calls)
        request.limit_body(match.body_limit)
        if len(exchange.decoded_body) > match.body_limit:
            raise too_large(match.body_limit)
        candidate = match.candidates[0]
        # The model may lead to a route on which keys stand elsewhere; who calls must be the same.
        if candidate.keys != place.keys:
            found = who_calls(request, candidate.keys, self.rules.auth)
            if found.name != client.name:
                raise ProxyError(401, "keys_disagree", "The keys do not say who calls here.")
        return match

    def _keep_way(
        self,
        exchange: Exchange,
        place: PathMatch,
        client: Client,
        facts: RequestFacts,
        match: RouteMatch,
    ) -> None:
        """Keep what the head says by itself, and where the model leads, for its next request."""
        request, known = exchange.request, exchange.known
        if known is not None and facts.json:
            known.keep_way(facts.model, match)
        elif can_be_known(request, place, facts) and not self.rules.auth.may_expire(client):
            trace = self._recorder.new_trace(request, 0.0)
            trace.client = client.name
            request.keep_head(self, KnownHead(client, trace, {facts.model: match}))

    def _meet_next(self, exchange: Exchange, match: RouteMatch, candidate: Candidate) -> None:
        """Let the exchange go by another candidate; its ``total`` began with the request, too."""
        before, total = exchange.candidate, candidate.timeouts.total
        self._meet(exchange, match, candidate)
        if before is not None and before.timeouts.total != total:
            exchange.stop_timer()
            if total is not None:
                left = max(0.0, exchange.started + total - self._clock())
                exchange.timer = self._reactor.callLater(left, exchange.expire)

    def _meet(self, exchange: Exchange, match: RouteMatch, candidate: Candidate) -> None:
        """Let the exchange go by the candidate that is asked next."""
        exchange.candidate, exchange.target = candidate, match.target(candidate)
        request, trace, provider = exchange.request, exchange.trace, candidate.provider
        request.stall_after = candidate.timeouts.client_stall
        trace.route, trace.provider = match.route.name, provider.name
        trace.dialect = provider.dialect
        exchange.endpoint = endpoint_of(request.method, provider.dialect, exchange.target)

    def _meet_page(self, exchange: Exchange, client: Client, match: RouteMatch) -> None:
        """Go by the origins of the route alone: several may share the path."""
        first, allowed = exchange.request.first, match.route.allowed_origins
        exchange.page = page_fields(first, allowed)
        if client is ANONYMOUS and not match.candidates[0].keys.passes:
            refuse_page(first, allowed)

    async def _pump(
        self, exchange: Exchange, match: RouteMatch, response: Response | HeldResponse
    ) -> None:
        """Relay the body to the client, and a copy of it to the tap."""
        began = self._clock()
        candidate = exchange.candidate or match.candidates[0]
        exchange.keep_of(response)
        adds = match.route.padding or match.route.heartbeat is not None
        # A client that has left gets nothing of it: the relay counts that.
        if not adds and exchange.left is None and (body := response.take_whole()) is not None:
            self._pass(exchange, match, body, began)
            return
        if exchange.status < 400:
            exchange.fields = kept_of(exchange.fields)
        tap = exchange.tap = self._inspection.open(exchange, match)
        copy = None if tap is None else tap.feed
        if match.route.capture == "content":
            exchange.last = LastBytes(copy)
            copy = exchange.last.feed
        if exchange.left is not None and not (tap and tap.is_promising):
            raise exchange.left  # nobody waits for it, and nothing could be read in it
        relay = exchange.relay = Relay(
            response,
            exchange.request,
            self._reactor,
            self._clock,
            idle=candidate.timeouts.idle,
            batch=self._batch,
            gaps=self._observe_gap,
            delays=self._observe_delay,
            copy=copy,
            stays=_Leaving(self, exchange).stays,
        )
        self._metrics.began(relay)
        beats = None
        if adds and exchange.takes_comments:
            exchange.request.write(padding(match.route.padding))  # with the head
            beats = self._begin_heartbeat(exchange, match.route, candidate.provider.dialect, relay)
        try:
            done = relay.start()
            exchange.request.flush()  # the head leaves before the body, unless some of it is there
            await done
        finally:
            if beats is not None:
                beats.stop()
            self._metrics.finished(relay)
            self._metrics.stream.note(self._clock() - began)

    def _pass(self, exchange: Exchange, match: RouteMatch, body: bytes, began: float) -> None:
        """Send a body that came whole, together with the head."""
        whole = exchange.relay = Whole(body, began)
        exchange.request.write_last(body)
        exchange.tap = self._inspection.read(exchange, match, body)
        if match.route.capture == "content":
            exchange.last = LastBytes()
            exchange.last.feed(body)
        self._metrics.passed(whole)
        self._metrics.stream.note(self._clock() - began)

    def _begin_heartbeat(
        self, exchange: Exchange, route: Route, dialect: Dialect, relay: Relay
    ) -> Heartbeat | None:
        if route.heartbeat is None:
            return None
        return Heartbeat(
            relay,
            exchange.request.write,
            self._reactor,
            self._clock,
            every=route.heartbeat,
            beat=heartbeat(dialect, route.heartbeat_bytes),
        )


class _Leaving(msgspec.Struct):
    """What becomes of one exchange when its client leaves.

    It is called with the reason.  A stream keeps it for as long as it lasts, and a closure would
    take six times as much.
    """

    gateway: Gateway
    exchange: Exchange

    def __call__(self, why: ClientGone) -> None:
        self.gateway.client_left(self.exchange, why)

    def stays(self) -> float:
        """Return how many bytes of the response to read on; 0 to cancel it."""
        return self.gateway.detached.takes(self.exchange, ClientGone())


def guarded_fields(config: Config) -> frozenset[bytes]:
    """Return the fields that carry providers' credentials, and those that some provider lacks."""
    dropped = [name for route in config.routes for name in route.drop_headers]
    fields = {name.encode("ascii") for name in dropped}
    for provider in config.providers.values():
        fields |= {name.encode("ascii") for name in provider.drop_headers}
        if provider.credential is not None:
            fields.add(provider.header.encode("ascii"))
    return frozenset(fields)
