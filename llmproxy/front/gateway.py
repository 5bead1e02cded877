"""The Resource that every proxied request meets: the story of one request, in order.

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
from twisted.web.resource import Resource
from twisted.web.server import NOT_DONE_YET

from llmproxy.config import Client, Config
from llmproxy.errors import (
    ClientGone,
    Dialect,
    EndReason,
    ProxyError,
    upstream_timeout,
)
from llmproxy.front.admission import Rules, admit, early_refusal
from llmproxy.front.books import Books
from llmproxy.front.drains import Drains
from llmproxy.front.exchange import Exchange
from llmproxy.front.findings import Findings
from llmproxy.front.request import Request
from llmproxy.front.task import Task
from llmproxy.headers import (
    Crossing,
    for_client,
)
from llmproxy.policy.ask import Ask, is_held, read_ask
from llmproxy.policy.auth import Auth
from llmproxy.policy.body import BodyError, replace_model
from llmproxy.policy.routes import Choice, Routes
from llmproxy.policy.usage import ask_for_usage
from llmproxy.record.metrics import Metrics
from llmproxy.record.trace import Attempt
from llmproxy.stream.backlog import Backlog
from llmproxy.stream.relay import Relay
from llmproxy.upstream.answer import Answer
from llmproxy.upstream.client import Upstream, credential_field, pool_key

_log = Logger()


class Gateway(Resource):
    """Serves every request that is for a provider, as one configuration has it.

    A reload makes another one; a request ends with the one that it began with (ADR-0014).

    Args:
        config: the checked configuration.
        upstream: sends requests.
        books: keeps a record of each.
        metrics: counts what is on the way.
        drains: answers that are read on; by default none but those of this gateway.
        reactor: keeps the deadlines of requests (``wire/timers.py``).
        clock: monotonic seconds.
    """

    isLeaf = True

    def __init__(
        self,
        config: Config,
        upstream: Upstream,
        books: Books,
        metrics: Metrics,
        *,
        drains: Drains | None = None,
        reactor: Any,
        clock: Callable[[], float],
    ) -> None:
        super().__init__()
        self._auth = Auth(config)
        self.routes = Routes(config)
        self._upstream = upstream
        self._books = books
        self._backlog = Backlog()
        self._findings = Findings(config, metrics, self._backlog.read)
        self.drains = Drains(config.limits.drains, reactor) if drains is None else drains
        self._metrics = metrics
        self._reactor = reactor
        self._clock = clock
        self._via = config.proxy.via.encode("ascii")
        self._credentials = {p.name: credential_field(p) for p in config.providers.values()}
        owned = frozenset(field[0] for field in self._credentials.values() if field is not None)
        self._rules = Rules(self._via.lower(), owned, self._auth, self.routes)
        self._crossings = {
            p.name: Crossing(
                pass_credential=p.pass_credential,
                credential=self._credentials[p.name],
                defaults=tuple((k.encode("ascii"), v.encode("latin-1")) for k, v in p.headers),
                accept_events=p.dialect in (Dialect.OPENAI, Dialect.ANTHROPIC),
            )
            for p in config.providers.values()
        }
        self._via_1_1, self._via_1_0 = b"1.1 " + self._via, b"1.0 " + self._via

    def holds_body(self, request: Request) -> bool:
        """Tell whether a request's body must be whole before it is served, or streams."""
        kind = request.first.get(b"content-type")
        return is_held(kind, lambda: self.routes.model_matters(request.path))

    def early_refusal(self, request: Request) -> ProxyError | None:
        """Return why ``request`` is refused before its body is read, or None."""
        return early_refusal(request, self._rules)

    def render(self, request: Request) -> int:
        """Begin to serve ``request``."""
        exchange = self._books.begin(request)

        def client_left(why: ClientGone) -> None:
            exchange.left, left_at = why, self._clock()
            if not self.drains.takes(exchange, why):
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
        ask = self._look_inside(exchange, client)
        choice = self._choose(exchange, client, ask)

        answer = await self._send(exchange, choice, ask)
        request.release()

        request.start(answer.code, for_client(answer.fields, trace.id.encode("ascii")))
        await self._pump(exchange, choice, answer)
        request.finish()
        return EndReason.COMPLETE if answer.code < 400 else EndReason.UPSTREAM_REFUSED

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
                error, self.routes.dialect(exchange.path, exchange.host), self._books.now()
            )
        self.drains.over(exchange)
        self._books.close(exchange, self._findings.conclude(exchange, end), error)

    # -- its steps ------------------------------------------------------------------------------

    def _identify(self, exchange: Exchange) -> Client:
        passes = exchange.passes = self.routes.pass_credential(exchange.path, exchange.host)
        client = self._auth.identify(exchange.request.fields, pass_credential=passes)
        exchange.trace.client = client.name
        return client

    def _look_inside(self, exchange: Exchange, client: Client) -> Ask:
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
            ask = read_ask(request.first.get(b"content-type"), body, exchange.path)
        except BodyError as error:
            raise ProxyError(400, "bad_body", str(error)) from error
        trace.model = ask.model
        return ask

    def _choose(self, exchange: Exchange, client: Client, ask: Ask) -> Choice:
        request, trace = exchange.request, exchange.trace
        choice = self.routes.choose(client, request.uri, exchange.host, ask.models)
        request.limit_body(self.routes.limit_of(choice.route))
        passes = choice.provider.pass_credential
        # The model may lead to a route on which other fields say who calls; it must be the same.
        if (
            passes != exchange.passes
            and self._auth.identify(request.fields, pass_credential=passes).name != client.name
        ):
            raise ProxyError(401, "keys_disagree", "The keys do not say who calls here.")
        exchange.choice = choice
        request.stall_after = choice.timeouts.client_stall
        trace.route, trace.provider = choice.route.name, choice.provider.name
        trace.dialect = choice.provider.dialect
        trace.stream = ask.wants_stream(choice.provider.dialect, exchange.path)
        exchange.endpoint = self._findings.endpoint_of(exchange, choice)
        if choice.timeouts.total is not None:
            exchange.timer = self._reactor.callLater(choice.timeouts.total, exchange.expire)
        return choice

    async def _send(self, exchange: Exchange, choice: Choice, ask: Ask) -> Answer:
        request, trace, provider = exchange.request, exchange.trace, choice.provider
        body: bytes | IBodyProducer = request.upload or request.body
        if choice.model is not None and ask.model_span is not None:
            body = replace_model(request.body, ask.model_span, choice.model)
        if choice.route.include_usage == "inject" and trace.stream and isinstance(body, bytes):
            body = ask_for_usage(body, provider.dialect, choice.target)
        fields = self._crossings[provider.name].for_provider(
            request.fields,
            via=self._via_1_1 if request.clientproto == b"HTTP/1.1" else self._via_1_0,
            request_id=trace.id.encode("ascii"),
            streams=bool(trace.stream),
            identity=choice.route.accept_encoding == "identity",
        )
        sent_at = self._clock()
        self._metrics.overhead.observe(sent_at - exchange.started)
        outcome: str = "ok"
        cause = None
        try:
            exchange.answer = await self._upstream.send(
                provider,
                request.method.decode("ascii"),
                choice.target,
                fields,
                body,
                credential=pool_key(provider, self._credentials[provider.name], request.fields),
                timeouts=choice.timeouts,
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
        return exchange.answer

    async def _pump(self, exchange: Exchange, choice: Choice, answer: Answer) -> None:
        began = self._clock()
        exchange.keep_of(answer)
        exchange.tap = self._findings.open(exchange, choice)
        if exchange.left is not None and not (exchange.tap and exchange.tap.is_reading):
            raise exchange.left  # nobody waits for it, and nothing could be read in it
        relay = exchange.relay = Relay(
            answer,
            exchange.request,
            self._reactor,
            self._clock,
            idle=choice.timeouts.idle,
            backlog=self._backlog,
            gaps=self._metrics.gap.observe,
            delays=self._metrics.relay_delay.observe,
            copy=None if exchange.tap is None else exchange.tap.feed,
            stays=lambda: self.drains.takes(exchange, ClientGone()),
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
