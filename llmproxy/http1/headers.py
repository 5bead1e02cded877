"""What may cross the proxy, in both directions (design 5, ADR-0018).

Strip first, inject after.  Fields are lists of pairs, names in lower case, in the order in which
they came; what crosses keeps its place and its value.  This module knows no provider and no client,
only names: the hop-by-hop fields, those that can carry a client's key, and those that the proxy
owns.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Container, Mapping

from llmproxy.errors import ProxyError
from llmproxy.http1.grammar import Fields
from llmproxy.http1.known import known

KEY_FIELDS = (b"authorization", b"x-api-key", b"api-key", b"x-goog-api-key")
"""Fields in which an SDK sends its key, and which cross with ``pass_credential``."""

OWN_KEY_FIELD = b"x-llmproxy-key"
"""The field in which a client says who it is where the others belong to its provider."""

ROUTING_FIELDS = (
    *("true-client-ip", "x-real-ip", "x-client-ip", "x-cluster-client-ip", "cf-connecting-ip"),
    *("fastly-client-ip", "x-original-url", "x-original-uri", "x-original-host", "x-rewrite-url"),
    *("x-http-method-override", "x-http-method", "x-method-override"),
)
"""Fields by which a caller would say to servers behind us who it is, or what it asks for.

Balancers and frameworks take them for their own: a route is found by the request line and ``Host``.
"""

ACCOUNT_FIELDS = (
    *("openai-organization", "openai-project", "chatgpt-account-id", "x-goog-user-project"),
)
"""Fields that choose whose account a credential acts for: ours is for the operator to choose."""

BODY_FIELDS = frozenset((b"content-type", b"content-encoding"))
"""Fields that decide how a provider reads the body."""

REQUEST_ID = b"x-request-id"
"""The field in which a request's id crosses, ours where the client sent none."""

HOP_BY_HOP = frozenset(
    (b"connection", b"keep-alive", b"te", b"trailer", b"transfer-encoding", b"upgrade")
)
"""RFC 9110, section 7.6.1; ``Proxy-*`` fields go with them."""

_REQUEST_DROPPED = HOP_BY_HOP | {b"expect", b"host", b"content-length", b"forwarded", OWN_KEY_FIELD}
_RESPONSE_DROPPED = HOP_BY_HOP | {b"alt-svc", b"strict-transport-security"}
_REQUEST_PREFIXES = (b"proxy-", b"x-forwarded-", b"x-llmproxy-")
_RESPONSE_PREFIXES = (b"proxy-", b"x-llmproxy-")
_STREAM_TYPES = (b"text/event-stream", b"application/x-ndjson", b"application/jsonl")
ANTI_BUFFERING = (
    (b"cache-control", b"no-cache, no-transform"),
    (b"x-accel-buffering", b"no"),
)
_MOST_KNOWN, _LONGEST_KNOWN = 512, 64
"""How many names of fields are remembered, and of how many bytes."""

(_UNDERSCORE,) = b"_"  # bytes find a number ten times as fast as a bytes object of length one
_CHARSET = re.compile(rb'charset="?utf-?8"?(?![^;])')
_STREAM_DROPPED = _RESPONSE_DROPPED | {name for name, _ in ANTI_BUFFERING}


@known(256)
def host_of(host: bytes | None) -> str:
    """Return the name in the value of ``Host``, in lower case, without its port."""
    value = (host or b"").decode("ascii", "replace").lower()
    name, colon, port = value.rpartition(":")
    return name if colon and (port.isdigit() or not port) else value


def is_owned(name: bytes) -> bool:
    """Tell whether the proxy or HTTP's framing writes the request field ``name`` (lower case).

    A client's field of that name does not cross as it came, and no configuration may set one.
    """
    return name in _REQUEST_DROPPED or name == b"via" or name.startswith(_REQUEST_PREFIXES)


def nominated(fields: Fields) -> set[bytes]:
    """Return every field name that a ``Connection`` line nominates, in lower case."""
    lines = [value for name, value in fields if name == b"connection"]
    if not lines:
        return set()
    return {token.strip(b" \t").lower() for line in lines for token in line.split(b",")}


def refuse_disguised(names: Collection[bytes], guarded: Container[bytes] = ()) -> None:
    """Refuse a name with ``_`` that spells a field which the proxy owns, drops or reads.

    Servers behind CGI-like gateways read ``x_api_key`` and ``x-api-key`` as one.

    Args:
        names: of the request's fields, in lower case.
        guarded: further fields that do not cross as a client sends them.

    Raises:
        ProxyError: 400, naming the field.
    """
    if _UNDERSCORE not in b"".join(names):
        return
    for name in names:
        if _UNDERSCORE in name:
            spelt = name.replace(b"_", b"-")
            hides = spelt in guarded and name not in guarded
            if hides or is_owned(spelt) or spelt in KEY_FIELDS or spelt in BODY_FIELDS:
                raise ProxyError(
                    400, "bad_header", f"The header {name.decode('ascii')} is not accepted."
                )


class _Crossing(dict[bytes, bool]):
    """Whether a field of some name crosses; names come again and again.

    Args:
        dropped: the names that do not cross.
        prefixes: how others begin that do not.
    """

    def __init__(self, dropped: Collection[bytes], prefixes: tuple[bytes, ...]) -> None:
        super().__init__()
        self._dropped = frozenset(dropped)
        self._prefixes = prefixes

    def __missing__(self, name: bytes) -> bool:
        crosses = name not in self._dropped and not name.startswith(self._prefixes)
        if len(self) < _MOST_KNOWN and len(name) <= _LONGEST_KNOWN:
            self[name] = crosses
        return crosses

    def of(self, fields: Fields, first: Container[bytes]) -> Fields:
        """Return the fields that cross, also by what ``Connection`` says of them.

        Args:
            first: has the name of each field.
        """
        kept = [field for field in fields if self[field[0]]]
        if b"connection" in first:
            listed = nominated(fields)
            kept = [field for field in kept if field[0] not in listed]
        return kept


_STREAM_CROSSES = _Crossing(_STREAM_DROPPED, _RESPONSE_PREFIXES)
_RESPONSE_CROSSES = _Crossing(_RESPONSE_DROPPED, _RESPONSE_PREFIXES)


class HeaderRewriter:
    """What crosses towards one provider, prepared once for all requests.

    Args:
        pass_credential: the caller's own key fields cross.
        credential: the name of the field that carries the provider's credential, or None.
        dropped: further fields of callers' that do not cross.
        defaults: fields of the provider's that are added where the client sent none.
        accept_events: ``Accept: text/event-stream`` is added where a stream is asked for and the
            client sent no ``Accept``.
    """

    def __init__(
        self,
        *,
        pass_credential: bool,
        credential: bytes | None,
        dropped: tuple[bytes, ...],
        defaults: tuple[tuple[bytes, bytes], ...],
        accept_events: bool,
    ) -> None:
        names = _REQUEST_DROPPED | set(dropped)
        if not pass_credential:
            names |= set(KEY_FIELDS)
        if credential is not None:
            names |= {credential}
        self._crosses = _Crossing(names, _REQUEST_PREFIXES)
        self._defaults = defaults
        self._accept_events = accept_events

    def for_provider(
        self,
        fields: Fields,
        first: Container[bytes],
        *,
        via: bytes,
        request_id: bytes,
        streams: bool,
        identity: bool,
        credential: tuple[bytes, bytes] | None,
    ) -> Fields:
        """Return the fields to send upstream, without ``Host`` and framing.

        Args:
            fields, first, via, streams, identity: as :meth:`crossing` takes them.
            request_id: added as ``x-request-id`` where the client sent none.
            credential: the field that carries the provider's credential, or None.
        """
        kept = self.crossing(fields, first, via=via, streams=streams, identity=identity)
        if REQUEST_ID not in dict(kept):
            kept.append((REQUEST_ID, request_id))
        if credential is not None:
            kept.append(credential)
        return kept

    def crossing(
        self,
        fields: Fields,
        first: Container[bytes],
        *,
        via: bytes,
        streams: bool,
        identity: bool,
    ) -> Fields:
        """Return what of the fields to send depends on the client's head and on nothing else.

        Args:
            fields: as the client sent them.
            first: has the name of each of them.
            via: this hop, as ``1.1 pseudonym``.
            streams: the request asks for a stream.
            identity: a stream is asked for unencoded, whatever the client accepts.
        """
        kept = self._crosses.of(fields, first)
        names = dict(kept)
        if b"via" in names:
            hops = [value for name, value in kept if name == b"via"]
            kept = [field for field in kept if field[0] != b"via"]
            via = b", ".join([*hops, via])
        kept.append((b"via", via))
        kept += [field for field in self._defaults if field[0] not in names]
        if streams:
            if self._accept_events and b"accept" not in names:
                kept.append((b"accept", b"text/event-stream"))
            if identity:
                kept = [field for field in kept if field[0] != b"accept-encoding"]
                kept.append((b"accept-encoding", b"identity"))
        return kept


def for_client(fields: Fields, first: Mapping[bytes, bytes], request_id: bytes) -> Fields:
    """Return the fields of a provider's response that the client gets, with our id.

    Args:
        fields: as the provider sent them.
        first: the first value of each name.
        request_id: ours.
    """
    streams = is_stream(first.get(b"content-type"))
    kept = (_STREAM_CROSSES if streams else _RESPONSE_CROSSES).of(fields, first)
    if streams:
        kept += ANTI_BUFFERING
    kept.append((b"x-llmproxy-request-id", request_id))
    return kept


def is_stream(content_type: bytes | None) -> bool:
    """Tell whether the type is one that arrives event by event: SSE or NDJSON."""
    return media_type(content_type) in _STREAM_TYPES


def is_ndjson(content_type: bytes | None) -> bool:
    """Tell whether the type is NDJSON: an event is a line."""
    return media_type(content_type) in _STREAM_TYPES[1:]


@known(256)
def media_type(content_type: bytes | None) -> bytes:
    """Return the type without its parameters, in lower case (RFC 9110, section 8.3.1)."""
    return without_parameters(content_type or b"")


@known(256)
def is_utf8(content_type: bytes | None) -> bool:
    """Return whether a type names no character set, or only UTF-8.

    Starlette decodes the fields of a form by it, Express JSON; both know UTF-7, in which ASCII says
    something else.
    """
    if b"charset" not in (plain := (content_type or b"").lower()):
        return True
    return plain.count(b"charset") == 1 and _CHARSET.search(plain.replace(b" ", b"")) is not None


def without_parameters(value: bytes) -> bytes:
    """Return what stands before the parameters of a value, in lower case."""
    return value.partition(b";")[0].strip(b" \t").lower()
