"""What the wire itself refuses, and how that is told where there is no request yet."""

from __future__ import annotations

from http import HTTPStatus

from llmproxy.errors import Dialect, ProxyError, error_body

_PHRASES = {status.value: status.phrase for status in HTTPStatus}


def bare_answer(error: ProxyError) -> bytes:
    """Return a whole answer, head and all, for where there is no request yet that could be told."""
    body = error_body(error, Dialect.OPENAI, "")
    head = (
        f"HTTP/1.1 {error.status} {phrase(error.status)}\r\n"
        f"content-type: application/json\r\nx-llmproxy-error: {error.reason}\r\n"
        f"connection: close\r\ncontent-length: {len(body)}\r\n\r\n"
    )
    return head.encode("ascii") + body


def phrase(status: int) -> str:
    """Return the reason phrase of a known status; clients ignore it (RFC 9112, section 4)."""
    return _PHRASES.get(status, "")


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
