"""Responses that report an error, also where there is no request yet, and errors of the server's.

Whatever reports an error to a client takes its head from here.  Nothing is known here of sockets or
requests.
"""

from __future__ import annotations

from functools import lru_cache
from http import HTTPStatus

from twisted.web.http import datetimeToString

from llmproxy.dialects.dialect import Dialect
from llmproxy.dialects.errors import error_body
from llmproxy.errors import ProxyError
from llmproxy.http1.grammar import Fields, field_lines

METHODS = (b"GET", b"HEAD", b"POST", b"PUT", b"PATCH", b"DELETE", b"OPTIONS")
"""The methods that are served."""

_ID_FIELDS = (b"x-llmproxy-request-id", b"x-request-id", b"request-id")

_FINAL = frozenset((400, 401, 403, 404, 405, 413, 414, 415, 417, 421, 426, 431, 501, 505, 508))
"""Statuses of refusals that a retry does not cure; without a word of that, SDKs retry some."""

_PHRASES = {status.value: status.phrase for status in HTTPStatus}


def bare_response(error: ProxyError, *, now: float, request_id: str | None = None) -> bytes:
    """Return a whole response, head and all, for where there is no request yet to respond to.

    Args:
        error: what is reported.
        now: seconds since the epoch.
        request_id: of its record; None where there is none.
    """
    body = error_body(error, Dialect.OPENAI, request_id or "")
    lines = field_lines(error_fields(error, request_id, len(body), now))
    start = status_line(error.status)
    return b"\r\n".join([start, *lines, b"connection: close", b"", body])


def error_fields(error: ProxyError, request_id: str | None, length: int, now: float) -> Fields:
    """Return the header fields of the response for ``error``, of ``length`` bytes (design 8)."""
    fields = own_fields(request_id, length, now)
    fields.append((b"x-llmproxy-error", error.reason.encode("ascii")))
    fields += error.fields
    if error.may_have_run or error.status in _FINAL:
        fields.append((b"x-should-retry", b"false"))
    return fields


def own_fields(request_id: str | None, length: int, now: float) -> Fields:
    """Return the header fields of a response of our own: JSON, of ``length`` bytes."""
    fields = [
        (b"date", datetimeToString(now)),
        (b"content-type", b"application/json"),
        (b"content-length", b"%d" % length),
    ]
    if request_id is not None:
        name = request_id.encode("ascii")
        fields += [(field, name) for field in _ID_FIELDS]
    return fields


@lru_cache(maxsize=600)
def status_line(status: int) -> bytes:
    """Return the first line, with the phrase of a known status (RFC 9112, section 4)."""
    return b"HTTP/1.1 %d %b" % (status, _PHRASES.get(status, "").encode("ascii"))


def too_large(limit: int) -> ProxyError:
    """The body is larger than ``limit`` bytes."""
    return ProxyError(413, "body_too_large", f"The request body is larger than {limit} bytes.")


def memory_full() -> ProxyError:
    """The process holds as many bytes of bodies as it may."""
    return ProxyError(
        503,
        "memory_full",
        "The proxy holds as many request bodies as it may; try again.",
        fields=((b"retry-after", b"1"),),
    )
