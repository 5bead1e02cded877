"""Which programs tell of themselves: by the head of a response, and by what they add to a request.

A program that adds nothing cannot be seen here: HAProxy, and Node's ``http-proxy``, which Vite's
development server is made of.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

import msgspec

LLMPROXY = "llmproxy"

NODE = "Node's http-proxy or Vite"
"""What development servers are made of; it does not name itself."""


_LONGEST_SHOWN = 160


class Hop(msgspec.Struct, frozen=True):
    """A program on the way, and the line that tells of it."""

    program: str
    evidence: str


_MARKS: tuple[tuple[str, str, str], ...] = (
    (LLMPROXY, "x-llmproxy-request-id", ""),
    ("nginx", "server", r"nginx|openresty"),
    ("Caddy", "server", r"caddy"),
    ("Caddy", "via", r"\bcaddy"),
    ("Envoy", "server", r"envoy"),
    ("Envoy", "x-envoy-upstream-service-time", ""),
    ("Apache", "server", r"apache\b"),
    ("Varnish", "x-varnish", ""),
    ("Varnish", "via", r"\bvarnish"),
    ("Next.js", "x-powered-by", r"next\.js"),
    ("Cloudflare", "server", r"cloudflare"),
    ("Cloudflare", "cf-ray", ""),
    ("AWS ALB", "server", r"awselb"),
    ("CloudFront", "x-amz-cf-id", ""),
    ("squid", "via", r"squid"),
    ("squid", "server", r"squid"),
)
"""Programs by a field of a response, and what its value holds."""

_REQUEST_MARKS: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("Envoy", ("x-envoy-expected-rq-timeout-ms",)),
    ("Traefik", ("x-forwarded-server", "x-real-ip")),
    ("Varnish", ("x-varnish",)),
    ("Cloudflare", ("cf-ray",)),
    ("AWS ALB", ("x-amzn-trace-id",)),
)
"""Programs by the fields that they add to a request; all of a line are there."""


def printable(words: str) -> str:
    """Return words of somebody else as a terminal may see them, and not too many."""
    words = "".join(char if char.isprintable() else " " for char in words)
    return words if len(words) <= _LONGEST_SHOWN else words[:_LONGEST_SHOWN] + "..."


def hops_of(
    fields: Sequence[tuple[str, str]], arrived: Mapping[str, str] | None = None
) -> list[Hop]:
    """Return the programs that are seen, each once.

    Args:
        fields: of a response, names in lower case.
        arrived: what the far end says of a request that reached it.
    """
    found: dict[str, Hop] = {}
    for program, name, pattern in _MARKS:
        for field, value in fields:
            if field == name and re.search(pattern, value, re.IGNORECASE):
                shown = printable(value) if pattern else "..."
                found.setdefault(program, Hop(program, f"{name}: {shown}"))
    for program, names in _REQUEST_MARKS:
        if all(name in (arrived or {}) for name in names):
            found.setdefault(program, Hop(program, f"it adds {names[0]} to requests"))
    return list(found.values())
