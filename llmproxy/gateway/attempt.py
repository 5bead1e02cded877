"""One attempt at one candidate: what the provider is sent, and what came of it.

The gateway chose the route; an attempt makes the outgoing request for one of its candidates (the
body with the candidate's own model, the header fields that may cross), sends it, waits for the head
of the response, and writes into trace, metrics and the provider's health how that went.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import msgspec
from twisted.logger import Logger
from twisted.web.iweb import IBodyProducer

from llmproxy.dialects.include_usage import usage_edit
from llmproxy.dialects.json_spans import Edit, edited
from llmproxy.dialects.request import RequestFacts
from llmproxy.dialects.retry_after import retry_after
from llmproxy.errors import EndReason, ProxyError
from llmproxy.gateway.exchange import Exchange
from llmproxy.http1.grammar import field_lines
from llmproxy.http1.websocket import UPGRADE, Handshake
from llmproxy.net.turns import Turns
from llmproxy.policy.origins import ORIGIN
from llmproxy.policy.routes import Candidate, RouteMatch
from llmproxy.policy.standing import Standing
from llmproxy.record.metrics import Metrics
from llmproxy.record.trace import Attempt
from llmproxy.upstream.client import Upstream, pool_key
from llmproxy.upstream.credential import Field
from llmproxy.upstream.response import Response

SWITCHING, UNAUTHORIZED, FORBIDDEN = 101, 401, 403

_TELL_EVERY_S = 60.0

_log = Logger()

_BUSY = (429, 503, 529)
"""The statuses with which a provider may say when to come again."""

_REQUESTS_FAULT = frozenset((EndReason.UPSTREAM_BROKEN, EndReason.UPSTREAM_PROTOCOL))
"""Perhaps: the provider had some of it, such as the beginning of a body that is too large."""

_PROVIDERS_FAULT = _REQUESTS_FAULT | {
    EndReason.UPSTREAM_UNREACHABLE,
    EndReason.UPSTREAM_TLS,
    EndReason.UPSTREAM_TIMEOUT,
}


class Attempts:
    """Sends requests to candidates, as one configuration has them.

    Args:
        upstream: the connections to providers.
        metrics: counts attempts.
        clock: monotonic seconds.
        via: our pseudonym in ``Via``.
        turns: reads a body in steps.
        standing: is told how it went.
        wall: seconds since the epoch.
    """

    def __init__(
        self,
        upstream: Upstream,
        metrics: Metrics,
        clock: Callable[[], float],
        via: bytes,
        turns: Turns,
        *,
        standing: Standing,
        wall: Callable[[], float],
    ) -> None:
        self._upstream = upstream
        self._health, self._headroom = standing.health, standing.headroom
        self._wall = wall
        self._turns = turns
        self._told_at: dict[str, float] = {}
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
        target = exchange.target
        edits = [] if candidate.model is None else model_edits(exchange, match, candidate, facts)
        if match.route.include_usage == "inject" and trace.stream and exchange.decoded_body:
            steps = usage_edit(exchange.decoded_body, candidate.provider.dialect, target)
            usage = await self._turns.run(steps)
            edits += () if usage is None else (usage,)
        body: bytes | IBodyProducer = request.body if request.upload is None else request.upload
        if edits:
            body = edited(exchange.decoded_body, edits)
        source = candidate.credential
        credential = None if source is None else source.field
        lines = self._lines(exchange, match, candidate, credential, is_edited=bool(edits))
        handshake = exchange.handshake
        client = trace.client or ""
        if self._health.is_troubled:
            self._health.asks(candidate.provider, client)
        at_work = exchange.at_work
        sent_at = self._clock()
        self._metrics.overhead.note(sent_at - exchange.started)
        outcome: str = "ok"
        cause = None
        try:
            response = await self._upstream.send(
                candidate.provider,
                request.method.decode("ascii"),
                target,
                lines,
                body,
                credential=pool_key(candidate.provider, credential, request),
                timeouts=candidate.timeouts,
                began=exchange.asked,
                upgrades=handshake is not None,
            )
            exchange.response = response
            if not candidate.provider.pass_credential:  # else it speaks of the caller's own account
                self._headroom.note(name, response.first)
            if handshake is not None and response.code == SWITCHING:
                _prove(handshake, response)
            if (code := response.code) >= 400:
                outcome, cause = EndReason.UPSTREAM_REFUSED, str(code)
                self._refused(exchange, candidate, response, credential)
            elif self._health.is_troubled:
                self._health.succeeded(candidate.provider, client)
            if code >= 300:
                exchange.at_work = at_work  # it says that it did not do the work
        except ProxyError as error:
            outcome, cause = error.end, error.cause
            if not error.may_have_run:
                exchange.at_work = at_work
            if outcome in _PROVIDERS_FAULT:
                asked = error.may_have_run or outcome in _REQUESTS_FAULT
                self._health.failed(candidate.provider, client, was_asked=asked)
            else:
                self._health.gave_up(candidate.provider, client)
            raise
        except Exception:
            end = EndReason.UPSTREAM_TIMEOUT if exchange.is_late else EndReason.CLIENT_GONE
            if exchange.is_killed:
                end = EndReason.KILLED
            outcome = end if exchange.left is None else exchange.left.end
            self._health.gave_up(candidate.provider, client)
            raise
        finally:
            seconds = self._clock() - sent_at
            trace.attempts.append(Attempt(name, outcome, round(seconds, 6), cause))
            self._metrics.attempted(name, outcome, cause)
        self._metrics.head.note(seconds)
        trace.head_s = round(sent_at + seconds - exchange.started, 6)
        return response

    def _lines(
        self,
        exchange: Exchange,
        match: RouteMatch,
        candidate: Candidate,
        credential: Field | None,
        *,
        is_edited: bool,
    ) -> list[bytes]:
        """Return the field lines that a candidate gets, without ``Host`` and framing."""
        request, known = exchange.request, exchange.known
        via = self._via_1_1 if request.clientproto == b"HTTP/1.1" else self._via_1_0
        name = exchange.trace.id.encode("ascii")
        streams = bool(exchange.trace.stream)
        identity = match.route.accept_encoding == "identity"
        if known is not None:
            crossing, has_id = known.lines(
                request, candidate, via, streams=streams, identity=identity
            )
            lines = [crossing] if has_id else [crossing, b"x-request-id: " + name]
            if credential is not None:
                lines.append(b": ".join(credential))
            return lines
        fields = request.fields
        if is_edited:
            fields = [field for field in fields if field[0] != b"content-encoding"]
        if exchange.page:
            fields = [field for field in fields if field[0] != ORIGIN]
        fields = candidate.rewriter.for_provider(
            fields,
            request.first,
            via=via,
            request_id=name,
            streams=streams,
            identity=identity,
            credential=credential,
        )
        if exchange.handshake is not None:
            fields = [*fields, *UPGRADE]
        return field_lines(fields)

    def _refused(
        self, exchange: Exchange, candidate: Candidate, response: Response, credential: Field | None
    ) -> None:
        """Note what a status of 400 or more says of the provider."""
        provider, code, client = candidate.provider, response.code, exchange.trace.client or ""
        if refuses_proxy(candidate, code):
            self._tell_credential_refused(provider.name, code)
            if candidate.credential is not None and credential is not None:
                candidate.credential.renew_soon(credential)
        if code >= 500 or (code == UNAUTHORIZED and refuses_proxy(candidate, code)):
            self._health.failed(provider, client, was_asked=True)
        else:
            self._health.succeeded(provider, client)
        if code in _BUSY and not provider.pass_credential:  # else the caller's own account is
            seconds = retry_after(response.first, self._wall())
            if seconds is not None:
                model = asked_model(exchange, candidate)
                self._health.cool_down(provider, client, model, seconds, code)

    def _tell_credential_refused(self, provider: str, code: int) -> None:
        """Log it, once a minute for each provider: nobody but the operator can mend it."""
        now = self._clock()
        if now - self._told_at.get(provider, -math.inf) >= _TELL_EVERY_S:
            self._told_at[provider] = now
            text = "providers.{name}: the provider refuses the proxy's credential ({status})"
            _log.warn(text, name=provider, status=code)


def asked_model(exchange: Exchange, candidate: Candidate) -> str:
    """Return the model that a candidate is asked for, or ""."""
    return candidate.model or exchange.trace.model or ""


def refuses_proxy(candidate: Candidate, code: int) -> bool:
    """Return whether a status refuses the credential that the proxy sent, not the caller's."""
    return code in (UNAUTHORIZED, FORBIDDEN) and candidate.credential is not None


def _prove(handshake: Handshake, response: Response) -> None:
    """Check that a 101 is the response to a handshake; if it is not, close the connection.

    Raises:
        ProxyError: 502.
    """
    try:
        handshake.prove(response.fields)
    except ProxyError:
        response.abort()
        raise


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
