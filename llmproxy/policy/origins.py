"""Which web pages may call, and what their browsers are told (CORS: Fetch standard, section 3.3).

A browser sends a page's request to any site, and shows the page the response only if that names the
page's origin.  Before a request that no form could send, it asks: a preflight, which carries no
key.  A request that a form could send is not asked about, so that a page of anybody's could have
work done for a caller who needs no key: such a request is refused here.

Nothing here knows requests or routes; origins are compared as browsers write them.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping

from llmproxy.errors import ProxyError
from llmproxy.http1.grammar import Fields

ANY = "*"
ORIGIN = b"origin"

_ASKED = b"access-control-request-"
_METHOD, _HEADERS, _NETWORK = _ASKED + b"method", _ASKED + b"headers", _ASKED + b"private-network"
_GRANTED = b"access-control-"
_MAX_AGE = b"600"
"""Seconds for which a browser remembers a preflight, and does not learn of a reload."""


def preflight_fields(
    method: bytes, first: Mapping[bytes, bytes], allowed: Collection[str]
) -> Fields | None:
    """Return the fields of the response to a preflight; None where this is none for us.

    Args:
        method: the request's.
        first: the first value of each of its fields.
        allowed: the origins whose pages may call here; without any, a preflight is the provider's.

    Raises:
        ProxyError: 403, for a page of another origin.
    """
    origin = first.get(ORIGIN)
    if not allowed or method != b"OPTIONS" or origin is None or _METHOD not in first:
        return None
    if not _is_allowed(origin, allowed):
        raise _refused()
    fields = [
        (b"access-control-allow-origin", origin),
        (b"access-control-allow-methods", first[_METHOD]),
        (b"access-control-max-age", _MAX_AGE),
        (b"vary", b"Origin, Access-Control-Request-Method, Access-Control-Request-Headers"),
    ]
    if _HEADERS in first:
        fields.append((b"access-control-allow-headers", first[_HEADERS]))
    if first.get(_NETWORK) == b"true":
        fields.append((b"access-control-allow-private-network", b"true"))
    return fields


def page_fields(first: Mapping[bytes, bytes], allowed: Collection[str]) -> Fields:
    """Return what every response to a request says to browsers, and to caches between.

    Args:
        first: the first value of each of the request's fields.
        allowed: the origins whose pages may call here.
    """
    if not allowed:
        return []
    fields = [(b"vary", b"Origin")]
    origin = first.get(ORIGIN)
    if origin is not None and _is_allowed(origin, allowed):
        fields.append((b"access-control-allow-origin", origin))
        fields.append((b"access-control-expose-headers", b"*"))
    return fields


def for_page(fields: Fields, ours: Iterable[tuple[bytes, bytes]]) -> Fields:
    """Return a provider's fields with ``ours`` in the place of what it says of origins."""
    return [*(field for field in fields if not field[0].startswith(_GRANTED)), *ours]


def refuse_page(first: Mapping[bytes, bytes], allowed: Collection[str]) -> None:
    """Refuse a request of another site's page, where nobody has to show a key.

    Args:
        first: the first value of each of the request's fields.
        allowed: the origins whose pages may call here.

    Raises:
        ProxyError: 403.
    """
    origin = first.get(ORIGIN)
    if origin is not None and not _is_allowed(origin, allowed) and not _is_ours(origin, first):
        raise _refused()


def _is_allowed(origin: bytes, allowed: Collection[str]) -> bool:
    return ANY in allowed or origin.decode("latin-1").lower() in allowed


def _is_ours(origin: bytes, first: Mapping[bytes, bytes]) -> bool:
    """Return whether a page came from where its request goes, as far as ``Host`` says."""
    scheme, _, host = origin.lower().partition(b"://")
    default = {b"http": b":80", b"https": b":443"}.get(scheme, b"")
    asked = first.get(b"host", b"").lower()
    return bool(host) and host.removesuffix(default) == asked.removesuffix(default)


def _refused() -> ProxyError:
    text = "Pages of this origin may not call here; allowed_origins of the route says which may."
    return ProxyError(403, "origin", text)
