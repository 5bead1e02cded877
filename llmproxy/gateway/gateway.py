"""The handler that every proxied request meets: the story of one request, in order.

:meth:`Gateway._tell` is that story: identify, admit, choose, send, copy the head, pump.  Whatever
ends it ends in :meth:`Gateway._serve`, the one place that turns an end into an end reason, an
answer to the client and a record.  Sockets, clocks and shapes of errors are known elsewhere.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from twisted.logger import Logger
from twisted.python.failure import Failure
from twisted.web.iweb import IBodyProducer
from twisted.web.server import NOT_DONE_YET

from llmproxy.config import Client, Config
from llmproxy.dialects.include_usage import ask_for_usage
from llmproxy.dialects.json_body import BodyError, replace_model
from llmproxy.dialects.request import RequestFacts, is_held, read_request
from llmproxy.errors import (
    ClientGone,
    Dialect,
    EndReason,
    ProxyError,
    upstream_timeout,
)
from llmproxy.gateway.admission import Rules, admit, early_refusal
from llmproxy.gateway.detached import DetachedStreams
from llmproxy.gateway.exchange import Exchange
from llmproxy.gateway.inspection import Inspection
from llmproxy.gateway.recorder import Recorder
from llmproxy.http1.headers import (
    HeaderRewriter,
    for_client,
)
from llmproxy.net.task import Task
from llmproxy.policy.auth import Auth
from llmproxy.policy.routes import RouteMatch, Routes
from llmproxy.record.metrics import Metrics
from llmproxy.record.trace import Attempt
from llmproxy.server.handler import Handler
from llmproxy.server.request import Request
from llmproxy.stream.batch import Batch
from llmproxy.stream.relay import Relay
from llmproxy.upstream.client import Upstream, credential_field, pool_key
from llmproxy.upstream.response import Response

_log = Logger()


class Gateway(Handler):
    """Serves every request that is for a provider, as one configuration has it.

    A reload makes another one; a request ends with the one that it began with (ADR-0014).

    Args:
        config: the checked configuration.
        upstream: sends requests.
        recorder: keeps a record of each.
        metrics: counts what is on the way.
        detached: answers that are read on; by default none but those of this gateway.
        reactor: keeps the deadlines of requests (``net/timers.py``).
        clock: monotonic seconds.
    """

    def __init__(
        self,
        config: Config,
        upstream: Upstream,
        recorder: Recorder,
        metrics: Metrics,
        *,
        detached: DetachedStreams | None = None,
        reactor: Any,
        clock: Callable[[], float],
    ) -> None:
        super().__init__()
        self._auth = Auth(config)
        self.routes = Routes(config)
        self._upstream = upstream
        self._recorder = recorder
        self._batch = Batch()
        self._inspection = Inspection(config, metrics, self._batch.read)
        self.detached = (
            DetachedStreams(config.limits.drains, reactor) if detached is None else detached
        )
        self._metrics = metrics
        self._reactor = reactor
        self._clock = clock
        self._via = config.proxy.via.encode("ascii")
        self._credentials = {p.name: credential_field(p) for p in config.providers.values()}
        owned = frozenset(field[0] for field in self._credentials.values() if field is not None)
        self._rules = Rules(self._via.lower(), owned, self._auth, self.routes)
        self._rewriters = {
            p.name: HeaderRewriter(
                pass_credential=p.pass_credential,
                credential=self._credentials[p.name],
                defaults=tuple((k.encode("ascii"), v.encode("latin-1")) for k, v in p.headers),
                accept_events=p.dialect in (Dialect.OPENAI, Dialect.ANTHROPIC),
            )
            for p in config.providers.values()
        }
        self._via_1_1, self._via_1_0 = b"1.1 " + self._via, b"1.0 " + self._via

    def body_limit(self, request: Request) -> int:
        """Return the most bytes of a request's body, as far as its target can tell."""
        return self.routes.body_limit(request.uri)

    def holds_body(self, request: Request) -> bool:
        """Tell whether a request's body must be whole before it is served, or streams."""
        kind = request.first.get(b"content-type")
        return is_held(kind, lambda: self.routes.model_matters(request.path))

    def early_refusal(self, request: Request) -> ProxyError | None:
        """Return why ``request`` is refused before its body is read, or None."""
        return early_refusal(request, self._rules)

    def render(self, request: Request) -> int:
        """Begin to serve ``request``."""
        exchange = self._recorder.begin(request)

        def client_left(why: ClientGone) -> None:
            exchange.left, left_at = why, self._clock()
            if not self.detached.takes(exchange, why):
                exchange.drop()
                self._metrics.cancel.observe(self._clock() - left_at)

        request.gone = client_left
        exchange.task = Task(self._serve(exchange), _end_failed)
        return NOT_DONE_YET

    # -- the story ------------------------------------------------------------------------------

    async def _tell(self, exchange: Exchange) -> EndReason:
        request, trace = exchange.request, exchange.trace
        admit(request, self._rules)
        client = self._identify(exchange)
        facts = self._look_inside(exchange, client)
        match = self._choose(exchange, client, facts)

        response = await self._send(exchange, match, facts)
        request.release()

        request.start(response.code, for_client(response.fields, trace.id.encode("ascii")))
        await self._pump(exchange, match, response)
        request.finish()
        return EndReason.COMPLETE if response.code < 400 else EndReason.UPSTREAM_REFUSED

    async def _serve(self, exchange: Exchange) -> None:
        """Tell the story, and see to its end, whatever that is."""
        error: ProxyError | None = None
        try:
            end = await self._tell(exchange)
        except ProxyError as problem:
            error, end = problem, problem.end
        except Exception as problem:
            if exchange.late:
                error = upstream_timeout("total", may_have_run=True)
                end = error.end
            elif exchange.left is not None:
                end = exchange.left.end
            elif isinstance(problem, ClientGone):
                exchange.left, end = problem, problem.end
            else:
                _log.failure("request {id} failed", id=exchange.trace.id)
                end = EndReason.INTERNAL
                error = ProxyError(500, "internal", "The proxy failed.", end=end)
        if exchange.left is not None:
            end, error = exchange.left.end, None  # nobody is told what became of it afterwards
        elif error is not None:
            exchange.fail(
                error, self.routes.dialect(exchange.path, exchange.host), self._recorder.now()
            )
        self.detached.over(exchange)
        self._recorder.close(exchange, self._inspection.conclude(exchange, end), error)

    # -- its steps ------------------------------------------------------------------------------

    def _identify(self, exchange: Exchange) -> Client:
        passes = exchange.passes = self.routes.pass_credential(exchange.path, exchange.host)
        client = self._auth.identify(exchange.request.fields, pass_credential=passes)
        exchange.trace.client = client.name
        return client

    def _look_inside(self, exchange: Exchange, client: Client) -> RequestFacts:
        """Read what routing needs from the body and the path."""
        request, trace = exchange.request, exchange.trace
        encoding = request.first.get(b"content-encoding")
        body = request.body
        if encoding is not None and body:
            if self.routes.must_look_inside(exchange.path, exchange.host, client):
                raise ProxyError(
                    415, "encoded_body", "The body must be sent without a Content-Encoding here."
                )
            body = b""
        try:
            facts = read_request(request.first.get(b"content-type"), body, exchange.path)
        except BodyError as error:
            raise ProxyError(400, "bad_body", str(error)) from error
        trace.model = facts.model
        return facts

    def _choose(self, exchange: Exchange, client: Client, facts: RequestFacts) -> RouteMatch:
        request, trace = exchange.request, exchange.trace
        match = self.routes.choose(client, request.uri, exchange.host, facts.models)
        request.limit_body(self.routes.limit_of(match.route))
        passes = match.provider.pass_credential
        # The model may lead to a route on which other fields say who calls; it must be the same.
        if (
            passes != exchange.passes
            and self._auth.identify(request.fields, pass_credential=passes).name != client.name
        ):
            raise ProxyError(401, "keys_disagree", "The keys do not say who calls here.")
        exchange.match = match
        request.stall_after = match.timeouts.client_stall
        trace.route, trace.provider = match.route.name, match.provider.name
        trace.dialect = match.provider.dialect
        trace.stream = facts.wants_stream(match.provider.dialect, exchange.path)
        exchange.endpoint = self._inspection.endpoint_of(exchange, match)
        if match.timeouts.total is not None:
            exchange.timer = self._reactor.callLater(match.timeouts.total, exchange.expire)
        return match

    async def _send(self, exchange: Exchange, match: RouteMatch, facts: RequestFacts) -> Response:
        request, trace, provider = exchange.request, exchange.trace, match.provider
        body: bytes | IBodyProducer = request.upload or request.body
        if match.model is not None and facts.model_span is not None:
            body = replace_model(request.body, facts.model_span, match.model)
        if match.route.include_usage == "inject" and trace.stream and isinstance(body, bytes):
            body = ask_for_usage(body, provider.dialect, match.target)
        fields = self._rewriters[provider.name].for_provider(
            request.fields,
            via=self._via_1_1 if request.clientproto == b"HTTP/1.1" else self._via_1_0,
            request_id=trace.id.encode("ascii"),
            streams=bool(trace.stream),
            identity=match.route.accept_encoding == "identity",
        )
        sent_at = self._clock()
        self._metrics.overhead.observe(sent_at - exchange.started)
        outcome: str = "ok"
        cause = None
        try:
            exchange.response = await self._upstream.send(
                provider,
                request.method.decode("ascii"),
                match.target,
                fields,
                body,
                credential=pool_key(provider, self._credentials[provider.name], request.fields),
                timeouts=match.timeouts,
                began=exchange.asked,
            )
        except ProxyError as error:
            outcome, cause = error.end, error.cause
            raise
        except Exception:
            end = EndReason.UPSTREAM_TIMEOUT if exchange.late else EndReason.CLIENT_GONE
            outcome = end if exchange.left is None else exchange.left.end
            raise
        finally:
            seconds = self._clock() - sent_at
            trace.attempts.append(Attempt(provider.name, outcome, round(seconds, 6), cause))
            self._metrics.attempted(provider.name, outcome, cause)
        self._metrics.head.observe(seconds)
        trace.head_s = round(self._clock() - exchange.started, 6)
        return exchange.response

    async def _pump(self, exchange: Exchange, match: RouteMatch, response: Response) -> None:
        began = self._clock()
        exchange.keep_of(response)
        exchange.tap = self._inspection.open(exchange, match)
        if exchange.left is not None and not (exchange.tap and exchange.tap.is_reading):
            raise exchange.left  # nobody waits for it, and nothing could be read in it
        relay = exchange.relay = Relay(
            response,
            exchange.request,
            self._reactor,
            self._clock,
            idle=match.timeouts.idle,
            batch=self._batch,
            gaps=self._metrics.gap.observe,
            delays=self._metrics.relay_delay.observe,
            copy=None if exchange.tap is None else exchange.tap.feed,
            stays=lambda: self.detached.takes(exchange, ClientGone()),
        )
        self._metrics.began(relay)
        try:
            done = relay.start()
            exchange.request.flush()  # the head leaves before the body, unless some of it is there
            await done
        finally:
            self._metrics.finished(relay)
            self._metrics.stream.observe(self._clock() - began)


def _end_failed(failure: Failure) -> None:
    _log.failure("a request's end failed", failure)
