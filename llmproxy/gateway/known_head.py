"""What a head says to the gateway by itself, found out once for all requests that repeat it.

Who calls, what of the record is the same, where each model leads, and the lines of the head that
the provider gets depend on the head and the configuration alone.  They are kept with the head
(``server/seen_heads.py``) when it comes for the second time; then only what depends on the body, on
limits, on the provider's health and on time is left to be done for each request (ADR-0038).

Kept is what a usual call needs.  A head is not kept if it is a web page's or a WebSocket's, if its
target names a model, if its client's keys expire, or if a secret of the caller's crosses in it.
"""

from __future__ import annotations

import msgspec

from llmproxy.config import Client
from llmproxy.dialects.json_body import plain_facts
from llmproxy.dialects.request import RequestFacts, Source, is_usual_type, names_model
from llmproxy.http1.grammar import field_lines
from llmproxy.http1.headers import REQUEST_ID, HeaderRewriter
from llmproxy.policy.routes import Candidate, PathMatch, RouteMatch
from llmproxy.record.trace import Trace
from llmproxy.server.request import Request

_MOST = 8
"""Models whose way is kept with one head, and heads of providers; there are seldom more."""

_SECRET = b"cookie"
"""A field beside those of keys that crosses, and may hold a secret of the caller's."""

Variant = tuple[HeaderRewriter, bool, bool]
"""What the head for a provider depends on beside the client's: who writes it, whether a stream is
asked for, and whether unencoded."""


class KnownHead(msgspec.Struct):
    """What a head says by itself.

    Attributes:
        client: who calls.
        trace: what of the record is the same for all.
        ways: the routes that its requests take, by model; None stands for no model.
        crossing: the field lines that providers get, but for our id and the credential; and whether
            the caller's id is one of them.
    """

    client: Client
    trace: Trace
    ways: dict[str | None, RouteMatch] = msgspec.field(default_factory=dict)
    crossing: dict[Variant, tuple[bytes, bool]] = msgspec.field(default_factory=dict)

    def facts(self, body: bytes) -> RequestFacts | None:
        """Return what a request asks for whose body is plain JSON; None if it must be read."""
        found = plain_facts(body)
        if found is None:
            return None
        models = () if found.model is None else (found.model,)
        source: Source | None = None if found.model is None else "body"
        return RequestFacts(models, source, found.model_span, json=True, facts=found)

    def keep_way(self, model: str | None, match: RouteMatch) -> None:
        """Keep where a model leads."""
        if len(self.ways) < _MOST:
            self.ways[model] = match

    def lines(
        self, request: Request, candidate: Candidate, via: bytes, *, streams: bool, identity: bool
    ) -> tuple[bytes, bool]:
        """Return the lines that a candidate gets, and whether they hold the caller's id.

        Args:
            via, streams, identity: as :meth:`HeaderRewriter.crossing` takes them.
        """
        variant = candidate.rewriter, streams, identity
        kept = self.crossing.get(variant)
        if kept is None:
            fields = candidate.rewriter.crossing(
                request.fields, request.first, via=via, streams=streams, identity=identity
            )
            kept = b"\r\n".join(field_lines(fields)), REQUEST_ID in dict(fields)
            if len(self.crossing) < _MOST and not candidate.keys.passes:
                self.crossing[variant] = kept
        return kept


def can_be_known(request: Request, place: PathMatch, facts: RequestFacts) -> bool:
    """Return whether what a head says can be kept; the request that has it was let pass.

    Args:
        place: where its path leads.
        facts: what the request asks for.
    """
    first = request.first
    return (
        request.sighting is not None
        and request.upload is None
        and facts.json
        and is_usual_type(first.get(b"content-type"))
        and b"content-encoding" not in first
        and not (place.origins or b"upgrade" in first or _SECRET in first)
        and not names_model(place.crossing(request.uri), request.method)
    )
