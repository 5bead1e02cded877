"""The error family, and the closed set of reasons why a request ends.

Every refusal that a client may read is a :class:`ProxyError`: a status, one reason word and a
sentence.  What goes wrong upstream is a :class:`ProxyError`, too, with its own :class:`EndReason`.
A client that leaves is a :class:`ClientGone`.  Every folder raises these; ``gateway/`` turns them
into a response and a record, ``dialects/errors.py`` into the JSON that an SDK understands.

This module may import nothing else of the program.
"""

from __future__ import annotations

from enum import StrEnum


class EndReason(StrEnum):
    """Why a request ended: the label of the metric, the word in the log and in the trace."""

    COMPLETE = "complete"
    CLIENT_GONE = "client_gone"
    CLIENT_STALLED = "client_stalled"
    UPSTREAM_REFUSED = "upstream_refused"
    UPSTREAM_UNREACHABLE = "upstream_unreachable"
    UPSTREAM_TLS = "upstream_tls"
    UPSTREAM_TIMEOUT = "upstream_timeout"
    UPSTREAM_IDLE = "upstream_idle"
    UPSTREAM_BROKEN = "upstream_broken"
    UPSTREAM_PROTOCOL = "upstream_protocol"
    UPSTREAM_FAILED = "upstream_failed"
    UNFINISHED = "unfinished"
    REJECTED = "rejected"
    DRAINED = "drained"
    KILLED = "killed"
    INTERNAL = "internal"


class ProxyError(Exception):
    """Something that ends a request, and what its caller may know about it.

    Args:
        status: the HTTP status of the response, if no byte of another response has left.
        reason: one word for ``x-llmproxy-error`` and the trace, from a closed vocabulary.
        message: a sentence for the caller; it names no key, no address and no file.
        end: the end reason that the trace and the metrics record.
        fields: further response header fields, with names in lower case.
        may_have_run: whether the provider may have done (and billed) the work.  If so, an SDK must
            not send the request again by itself.
        detail: for the operator, in the log and nowhere else; it may name addresses.
        cause: one word for the trace that distinguishes failures with the same end reason.
    """

    def __init__(
        self,
        status: int,
        reason: str,
        message: str,
        *,
        end: EndReason = EndReason.REJECTED,
        fields: tuple[tuple[bytes, bytes], ...] = (),
        may_have_run: bool = False,
        detail: str = "",
        cause: str | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.reason = reason
        self.message = message
        self.end = end
        self.fields = fields
        self.may_have_run = may_have_run
        self.detail = detail
        self.cause = cause


def upstream_unreachable(detail: str, *, cause: str | None = None) -> ProxyError:
    """No connection to the provider could be made: its name, its address, or a refusal.

    Args:
        cause: one word for the trace and the metric, where a parent proxy is on the way.
    """
    return ProxyError(
        502,
        "upstream_unreachable",
        "The provider cannot be reached.",
        end=EndReason.UPSTREAM_UNREACHABLE,
        detail=detail,
        cause=cause,
    )


def upstream_tls(cause: str, detail: str) -> ProxyError:
    """The TLS handshake with the provider failed, or its certificate was not accepted.

    Args:
        cause: one word for the trace and the metric: ``expired``, ``wrong_name`` …
    """
    return ProxyError(
        502,
        "upstream_tls",
        "No trusted TLS connection to the provider came about.",
        end=EndReason.UPSTREAM_TLS,
        detail=detail,
        cause=cause,
    )


def address_forbidden(kind: str, sentence: str, detail: str) -> ProxyError:
    """The host of a tunnel has no address that may be reached for a caller.

    Args:
        kind: which sort of address it is, in one word; the trace has it as the cause.
        sentence: says that to the caller, without the address.
    """
    return ProxyError(403, "address_forbidden", sentence, detail=detail, cause=kind)


def no_descriptors() -> ProxyError:
    """The process may not open another file or socket."""
    return ProxyError(
        503,
        "no_descriptors",
        "The proxy has as many connections as it may have; try again.",
        fields=((b"retry-after", b"1"),),
        detail="out of file descriptors: raise LimitNOFILE",
    )


def upstream_timeout(phase: str, *, may_have_run: bool) -> ProxyError:
    """The connection, or the beginning of the response, did not come in time.

    Args:
        phase: what took too long, in one word; the trace has it as the cause.
    """
    return ProxyError(
        504,
        "upstream_timeout",
        "The provider did not answer in time.",
        end=EndReason.UPSTREAM_TIMEOUT,
        may_have_run=may_have_run,
        detail=f"{phase} took too long",
        cause=phase,
    )


def upstream_idle() -> ProxyError:
    """The provider began its response and then fell silent."""
    return ProxyError(
        504,
        "upstream_idle",
        "The provider stopped in the middle of its response.",
        end=EndReason.UPSTREAM_IDLE,
        may_have_run=True,
    )


def upstream_broken(
    detail: str, *, may_have_run: bool = True, cause: str | None = None
) -> ProxyError:
    """The connection to the provider ended before its response did.

    Args:
        cause: one word for how it ended.
    """
    return ProxyError(
        502,
        "upstream_broken",
        "The provider broke off its response.",
        end=EndReason.UPSTREAM_BROKEN,
        may_have_run=may_have_run,
        detail=detail,
        cause=cause,
    )


def upstream_protocol(detail: str) -> ProxyError:
    """The provider sent a response that is not HTTP as the proxy accepts it."""
    return ProxyError(
        502,
        "upstream_protocol",
        "The provider's response is not valid HTTP.",
        end=EndReason.UPSTREAM_PROTOCOL,
        may_have_run=True,
        detail=detail,
    )


def killed() -> ProxyError:
    """An operator has ended the request; an SDK is not to send it again, whatever was done."""
    return ProxyError(
        503,
        "killed",
        "An operator of the proxy has ended this request.",
        end=EndReason.KILLED,
        may_have_run=True,
    )


class EngineAway(Exception):
    """What several processes share does not answer, or not in time: decide here."""


class ClientGone(Exception):
    """The client closed, half-closed or reset its connection before it had the whole response.

    Attributes:
        had_room: the client could take all that was written for it until then.
    """

    end = EndReason.CLIENT_GONE
    had_room = True


class ClientStalled(ClientGone):
    """The client read no byte for ``client_stall`` although bytes were waiting."""

    end = EndReason.CLIENT_STALLED


class Cut(ClientGone):
    """The proxy itself ended the request: the drain's deadline, or a second signal."""

    end = EndReason.DRAINED
