"""Which header fields of a provider's response an operator may see, when it ended badly.

A field that names a request, a hop or a limit helps to find whose fault it was, and may be handed
on.  Any other value could be a secret: of such a field only the name and the length are shown.
"""

from __future__ import annotations

from collections.abc import Iterable

from llmproxy.http1.grammar import Fields

_SHOWN = frozenset(
    (
        *(b"content-type", b"content-length", b"content-encoding", b"transfer-encoding"),
        *(b"connection", b"keep-alive", b"date", b"age", b"cache-control", b"vary", b"allow"),
        *(b"server", b"via", b"x-cache", b"x-served-by", b"cf-ray", b"cf-cache-status"),
        *(b"request-id", b"x-request-id", b"apim-request-id", b"x-amzn-requestid"),
        *(b"x-amzn-errortype", b"x-amz-cf-id", b"x-amz-cf-pop", b"x-cloud-trace-context"),
        *(b"retry-after", b"retry-after-ms", b"x-should-retry", b"openai-processing-ms"),
        *(b"openai-version", b"openai-model", b"x-envoy-upstream-service-time"),
        *(b"x-ms-region", b"x-ms-error-code", b"x-ms-deployment-name"),
    )
)
_SHOWN_PREFIXES = (b"x-ratelimit-", b"ratelimit", b"anthropic-ratelimit-")
_KEPT = _SHOWN - {
    b"content-type",
    b"content-length",
    b"content-encoding",
    b"cache-control",
    b"vary",
}
_MOST, _LONGEST = 40, 256


def kept_of(fields: Fields) -> Fields:
    """Return the fields that a stream keeps while it lasts: there are thousands of them."""
    return [field for field in fields if field[0] in _KEPT]


def shown(fields: Iterable[tuple[bytes, bytes]]) -> list[tuple[str, str]]:
    """Return names and values as an operator may see them."""
    return [(name.decode("ascii", "replace"), _value(name, value)) for name, value in fields][
        :_MOST
    ]


def _value(name: bytes, value: bytes) -> str:
    if name in _SHOWN or name.startswith(_SHOWN_PREFIXES):
        return value.decode("latin-1")[:_LONGEST]
    return f"({len(value)} bytes)"
