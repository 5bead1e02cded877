"""A request as its client sent it: the head, and a body that is held in bounded memory or streams.

This is the half that is read; ``server/request.py`` adds the response.  Nothing is ever put into a
file, and a body that is too large is refused before or while it comes.
"""

from __future__ import annotations

from typing import Any

from twisted.python.failure import Failure

from llmproxy.errors import ProxyError
from llmproxy.http1.grammar import RequestHead
from llmproxy.server.error_response import memory_full, too_large
from llmproxy.server.lazy import LazyRequest
from llmproxy.server.upload import Upload

_BODY_GRACE = 1 / 65536
"""Seconds that each received byte of a request body adds to ``request_body``."""


class Incoming(LazyRequest):
    """What came in.

    Attributes:
        first: the first value of each name.
        body: the whole request body, where it is held.
        body_bytes: how much of it came so far.
        upload: the request body, where it streams.
        refusal: why the request cannot be served, where the wire knows already.
        ended: nothing will be written any more.
    """

    __slots__ = (
        *("_held", "_limit", "_parts", "_resource", "_served", "body", "body_bytes", "ended"),
        *("first", "refusal", "upload"),
    )

    def __init__(self, channel: Any) -> None:
        super().__init__(channel)
        self.first: dict[bytes, bytes] = {}
        self.body = b""
        self.body_bytes = 0
        self.upload: Upload | None = None
        self.refusal: ProxyError | None = None
        self.ended = False
        self._parts: list[bytes] = []
        self._limit = 0
        self._held = 0
        self._served = False
        self._resource = channel.site.resource  # who is to serve it is settled by its head

    def gotLength(self, length: int | None) -> None:
        """The head is in: bound the body before the first byte of it."""
        self._limit = self.site.body_limit(self)
        if length is not None and length > self._limit:
            self.refusal = too_large(self._limit)

    def handleContentChunk(self, data: bytes) -> None:  # noqa: N802 - Twisted's name
        """Take one piece of the body: pass it on, or hold it within the bounds."""
        if self.refusal is not None or self.ended:
            return
        site = self.site
        self.body_bytes += len(data)
        self.channel.deadline += len(data) * _BODY_GRACE
        if self.body_bytes > self._limit:
            self.refuse(too_large(self._limit))
        elif self.upload is not None:
            self.upload.feed(data)
        elif site.held_bytes + len(data) > site.limits.request_memory:
            self.refuse(memory_full())
        else:
            self._parts.append(data)
            self._held += len(data)
            site.held_bytes += len(data)

    def refuse(self, error: ProxyError) -> None:
        """Refuse the request in the middle of its body; what still comes is dropped."""
        self.refusal = error
        self.release()
        if self.upload is None:
            self.channel.refuse_early(self)
        else:
            self.upload.fail(error)

    def limit_body(self, limit: int) -> None:
        """Bound the body by its route's own limit, now that the route is known.

        Raises:
            ProxyError: 413, where what came or what was announced is more.
        """
        announced = 0 if self.upload is None else self.upload.announced
        if max(announced, self.body_bytes) > limit:
            raise too_large(limit)
        self._limit = min(self._limit, limit)

    def release(self) -> None:
        """Let go of the body; what it held counts no more."""
        self.site.held_bytes -= self._held
        self._held = 0
        self._parts = []
        self.body = b""

    def take_head(self, head: RequestHead) -> None:
        """Take over what the head says."""
        self.method, self.uri, minor, self.fields, self.first = head
        self.clientproto = b"HTTP/1.1" if minor else b"HTTP/1.0"
        self.path = head.target.partition(b"?")[0]
        self.args = {}

    def body_done(self) -> None:
        """The body is in: serve the request, unless it is being served already."""
        if self.upload is not None:
            self.upload.end()
            return
        self.body = self._parts[0] if len(self._parts) == 1 else b"".join(self._parts)
        self._parts = []
        self.process()

    def process(self) -> None:
        """Find the resource and render it; the body is held, refused or streams."""
        self._served = True
        resource, self._resource = self._resource, None
        try:
            if not resource.isLeaf:
                self.prepath: list[bytes] = []
                self.postpath = self.path[1:].split(b"/")
                resource = self.site.getResourceFor(self)
            self.render(resource)
        except Exception:
            self.processingFailed(Failure())
