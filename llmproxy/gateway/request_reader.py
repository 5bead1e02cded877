"""Reads requests: what body and target ask for, before a route is chosen.

Where the model decides something for this caller and path, a body that is not surely understood is
refused; elsewhere it crosses unread (ADR-0016).  A body with a Content-Encoding is decoded as a
bounded copy, and is sent as it came.  A usual body is read in one pass, whose time is bounded by
its length.  Any other is read in steps, over several turns of the reactor if it takes long
(``net/turns.py``): a length says little of how long that is.
"""

from __future__ import annotations

from llmproxy.config import Client
from llmproxy.dialects.json_spans import BodyError, Steps
from llmproxy.dialects.request import RequestFacts, UnknownBody, read_request, usual_request
from llmproxy.errors import ProxyError
from llmproxy.gateway.admission import refuse_unread, unread_body
from llmproxy.gateway.exchange import Exchange
from llmproxy.http1.grammar import field_values, list_tokens
from llmproxy.net.turns import Turns
from llmproxy.policy.routes import PathMatch
from llmproxy.server.error_response import too_large
from llmproxy.server.request import Request
from llmproxy.stream.decompress import KNOWN_CODINGS, BadCoding, Bomb, TooLong, decompressed


class RequestReader:
    """Reads what each request asks for.

    Args:
        turns: does what takes longer.
    """

    def __init__(self, turns: Turns) -> None:
        self._turns = turns

    def read_at_once(self, exchange: Exchange, place: PathMatch) -> RequestFacts | None:
        """Return what a usual request asks for; None if :meth:`read` must read it."""
        request, known = exchange.request, exchange.known
        if known is not None:
            exchange.decoded_body = request.body
            facts = known.facts(request.body)
            if facts is not None:
                exchange.trace.model, exchange.trace.model_from = facts.model, facts.source
            return facts
        if request.upload is not None or b"content-encoding" in request.first:
            return None
        exchange.decoded_body = body = request.body
        try:
            kind = request.first.get(b"content-type")
            facts = usual_request(kind, body, place.crossing(request.uri), request.method)
        except BodyError:
            return None  # that says why
        if facts is not None:
            exchange.trace.model, exchange.trace.model_from = facts.model, facts.source
        return facts

    async def read(self, exchange: Exchange, place: PathMatch, client: Client) -> RequestFacts:
        """Read what routing needs from the body and the target.

        Raises:
            ProxyError: 400, 413 or 415.
        """
        request, trace = exchange.request, exchange.trace
        strict = place.needs_model(client)
        if strict and (request.body or request.upload is not None):
            refuse_unread(request)
        is_coded = b"content-encoding" in request.first
        body = b"" if is_coded and not (strict or place.may_add) else request.body
        exchange.decoded_body = body
        try:
            facts = await self._turns.run(_steps(exchange, place, strict=strict))
        except UnknownBody as error:
            raise unread_body(str(error)) from error
        except BodyError as error:
            raise ProxyError(400, "bad_body", str(error)) from error
        trace.model, trace.model_from = facts.model, facts.source
        return facts


def _steps(exchange: Exchange, place: PathMatch, *, strict: bool) -> Steps[RequestFacts]:
    """Return what a request asks for; its body may be coded."""
    request, most = exchange.request, place.body_limit
    codings = list_tokens(field_values(request.fields, b"content-encoding"))
    codings = [coding for coding in codings if coding != b"identity"]
    if codings:
        exchange.decoded_body = yield from _decoded(request, codings, most, strict=strict)
    kind, body = request.first.get(b"content-type"), exchange.decoded_body
    target = place.crossing(request.uri)
    return (yield from read_request(kind, body, target, request.method, strict=strict))


def _decoded(request: Request, codings: list[bytes], most: int, *, strict: bool) -> Steps[bytes]:
    """Return the body without its coding; nothing, if it cannot be decoded and need not be."""
    try:
        if len(codings) > 1:
            raise BadCoding("more than one")
        return (yield from decompressed(request.body, codings[0], most, request.hold))
    except (TooLong, ProxyError) as error:  # or there is no room for the copy
        if not strict:
            return b""
        raise (too_large(most) if isinstance(error, TooLong) else error) from None
    except (BadCoding, Bomb):
        if not strict:
            return b""
        known = b", ".join(KNOWN_CODINGS)
        text = "The body must be sent in one of the codings of Accept-Encoding here, or in none."
        fields = ((b"accept-encoding", known),)
        raise ProxyError(415, "encoded_body", text, fields=fields) from None
