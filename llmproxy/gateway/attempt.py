"""One attempt at one candidate: what the provider is sent, and what came of it.

The gateway chose the route; an attempt makes the outgoing request for one of its candidates (the
body with the candidate's own model, the header fields that may cross), sends it, waits for the head
of the response, and writes into trace and metrics how that went.
"""

from __future__ import annotations

from collections.abc import Callable

from twisted.web.iweb import IBodyProducer

from llmproxy.dialects.include_usage import ask_for_usage
from llmproxy.dialects.json_body import replace_model
from llmproxy.dialects.request import RequestFacts
from llmproxy.errors import EndReason, ProxyError
from llmproxy.gateway.exchange import Exchange
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
    """

    def __init__(
        self, upstream: Upstream, metrics: Metrics, clock: Callable[[], float], via: bytes
    ) -> None:
        self._upstream = upstream
        self._metrics = metrics
        self._clock = clock
        self._via_1_1, self._via_1_0 = b"1.1 " + via, b"1.0 " + via

    async def send(
        self, exchange: Exchange, match: RouteMatch, candidate: Candidate, facts: RequestFacts
    ) -> Response:
        """Send the request to ``candidate``, and return the head of its response.

        Raises:
            ProxyError: no connection, no head in time, or a head that is not HTTP.
            Exception: the request was cancelled; the exchange knows why.
        """
        request, trace, name = exchange.request, exchange.trace, candidate.provider.name
        body = _body(exchange, match, candidate, facts)
        fields = candidate.rewriter.for_provider(
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
                candidate.provider,
                request.method.decode("ascii"),
                match.target(candidate),
                fields,
                body,
                credential=pool_key(candidate.provider, candidate.credential, request.fields),
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
        return exchange.response


def _body(
    exchange: Exchange, match: RouteMatch, candidate: Candidate, facts: RequestFacts
) -> bytes | IBodyProducer:
    """Return the request body for ``candidate``, whole or as what produces it."""
    request = exchange.request
    if request.upload is not None:
        return request.upload
    body = request.body
    if candidate.model is not None and facts.model_span is not None:
        body = replace_model(body, facts.model_span, candidate.model)
    if match.route.include_usage == "inject" and exchange.trace.stream:
        body = ask_for_usage(body, candidate.provider.dialect, match.target(candidate))
    return body
