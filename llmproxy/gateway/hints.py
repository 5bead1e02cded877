"""What a 404 of a provider's most likely means, if the path says so.

SDKs begin a path with ``/v1``, and many providers name ``https://…/v1`` as their base URL.  If such
a URL stands in the configuration, the provider is asked for ``/v1/v1/…``, and its 404 names no
cause.  The hint goes where both sides look first: into a header for the caller, and into the log
for the operator, who can mend it.  The record has no field for it, as its fields are a fixed set;
the provider's status, headers and body stay as they came.
"""

from __future__ import annotations

from llmproxy.gateway.exchange import Exchange
from llmproxy.http1.grammar import Fields

HINT = b"x-llmproxy-hint"
NOT_FOUND = 404


def hint_fields(exchange: Exchange) -> Fields:
    """Return what the caller gets beside a provider's 404; nothing of where the provider is."""
    twice = _doubled(exchange)
    if not twice:
        return []
    text = (
        b"/%b stands twice in the path that the provider was asked for, as this proxy adds it: "
        b"leave it out of the path here, or ask the proxy's operator to leave it out of the url"
    )
    return [(HINT, text % twice)]


def hint_for_operator(exchange: Exchange) -> str | None:
    """Return what the access line says of a provider's 404, or None.

    Args:
        exchange: of a request whose provider responded with 404.
    """
    twice = _doubled(exchange).decode("ascii")
    if not twice:
        return None
    return (
        f"the url of provider {exchange.trace.provider} ends with /{twice}, and the path of the "
        f"request has it, too: the provider was asked for /{twice}/{twice}"
    )


def _doubled(exchange: Exchange) -> bytes:
    match, candidate = exchange.match, exchange.candidate
    return b"" if match is None or candidate is None else match.doubled(candidate)
