"""One attempt at one candidate: what the provider is sent, and what came of it.

The gateway chose the route; an attempt makes the outgoing request for one of its candidates (the
body with the candidate's own model, the header fields that may cross), sends it, waits for the head
of the response, and writes into trace and metrics how that went.
"""

from __future__ import annotations

from collections.abc import Callable

import msgspec
from twisted.web.iweb import IBodyProducer

from llmproxy.dialects.include_usage import usage_edit
from llmproxy.dialects.json_spans import Edit, edited
from llmproxy.dialects.request import RequestFacts
from llmproxy.errors import EndReason, ProxyError
from llmproxy.gateway.exchange import Exchange
from llmproxy.net.turns import Turns
from llmproxy.policy.origins import ORIGIN
from llmproxy.policy.routes import Candidate, RouteMatch
from llmproxy.record.metrics import Metrics
from llmproxy.record.trace import Attempt
from llmproxy.upstream.client import Upstream, pool_key
from llmproxy.upstream.response import Response


class Attempts:
    """Sends requests to candidates, as one configuration has them.

    Args:
        upstream: the connections to providers.
        metrics: counts attempts.
        clock: monotonic seconds.
        via: our pseudonym in ``Via``.
        turns: reads a body in steps.
    """

    def __init__(
        self,
        upstream: Upstream,
        metrics: Metrics,
        clock: Callable[[], float],
        via: bytes,
        turns: Turns,
    ) -> None:
        self._upstream = upstream
        self._turns = turns
        self._metrics = metrics
        self._clock = clock
        self._via_1_1, self._via_1_0 = b"1.1 " + via, b"1.0 " + via

    async def send(
        self, exchange: Exchange, match: RouteMatch, candidate: Candidate, facts: RequestFacts
    ) -> Response:
        """Send the request to ``candidate``, and return the head of its response.

        Raises:
            ProxyError: no connection, no head in time, or a head that is not HTTP; 503, where the
                provider's credential is not there yet; 400, where the request names its model in a
                way that cannot be overridden.
            Exception: the request was cancelled; the exchange knows why.
        """
        request, trace, name = exchange.request, exchange.trace, candidate.provider.name
        target = match.target(candidate)
        edits = [] if candidate.model is None else model_edits(exchange, match, candidate, facts)
        if match.route.include_usage == "inject" and trace.stream and exchange.decoded_body:
            steps = usage_edit(exchange.decoded_body, candidate.provider.dialect, target)
            usage = await self._turns.run(steps)
            edits += () if usage is None else (usage,)
        body: bytes | IBodyProducer = request.body if request.upload is None else request.upload
        fields = request.fields
        if edits:
            body = edited(exchange.decoded_body, edits)
            fields = [field for field in fields if field[0] != b"content-encoding"]
        if exchange.page:
            fields = [field for field in fields if field[0] != ORIGIN]
        source = candidate.credential
        credential = None if source is None else source.field
        fields = candidate.rewriter.for_provider(
            fields,
            request.first,
            via=self._via_1_1 if request.clientproto == b"HTTP/1.1" else self._via_1_0,
            request_id=trace.id.encode("ascii"),
            streams=bool(trace.stream),
            identity=match.route.accept_encoding == "identity",
            credential=credential,
        )
        sent_at = self._clock()
        self._metrics.overhead.observe(sent_at - exchange.started)
        outcome: str = "ok"
        cause = None
        try:
            exchange.response = await self._upstream.send(
                candidate.provider,
                request.method.decode("ascii"),
                target,
                fields,
                body,
                credential=pool_key(candidate.provider, credential, request.fields),
                timeouts=candidate.timeouts,
                began=exchange.asked,
            )
        except ProxyError as error:
            outcome, cause = error.end, error.cause
            raise
        except Exception:
            end = EndReason.UPSTREAM_TIMEOUT if exchange.is_late else EndReason.CLIENT_GONE
            outcome = end if exchange.left is None else exchange.left.end
            raise
        finally:
            seconds = self._clock() - sent_at
            trace.attempts.append(Attempt(name, outcome, round(seconds, 6), cause))
            self._metrics.attempted(name, outcome, cause)
        self._metrics.head.observe(seconds)
        trace.head_s = round(self._clock() - exchange.started, 6)
        if source and credential and exchange.response.code in (401, 403):
            source.renew_soon(credential)
        return exchange.response


def model_edits(
    exchange: Exchange, match: RouteMatch, candidate: Candidate, facts: RequestFacts
) -> list[Edit]:
    """Return what gives the body the candidate's own model.

    Raises:
        ProxyError: 400, where the query names one, too, which crosses byte for byte; and where a
            body is sent, but neither body nor path names one: the provider would take its own.
    """
    if facts.in_query:
        text = "The query names a model, which cannot be overridden there."
        raise ProxyError(400, "bad_query", text)
    if facts.model_span is None or candidate.model is None:
        if exchange.has_body and not match.names_model(candidate):
            text = 'The body must name a "model" here, which the route then replaces.'
            raise ProxyError(400, "bad_body", text)
        return []
    model = msgspec.json.encode(candidate.model) if facts.json else candidate.model.encode()
    return [Edit(facts.model_span, model)]
