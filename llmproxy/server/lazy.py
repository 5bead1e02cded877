"""Twisted's request, made without what hardly anybody asks of it.

Twisted's own asks the kernel for both addresses and makes four tables whenever a request comes in,
which costs as much as reading its head (ADR-0011).  Here each is made when somebody wants it.  What
is leaned on is which attributes ``twisted.web.http.Request.__init__`` sets;
``tests/server/test_lazy.py`` fails when they change.
"""

from __future__ import annotations

from functools import cached_property
from typing import Any

from twisted.internet.defer import Deferred
from twisted.web import server
from twisted.web.http_headers import Headers

from llmproxy.http1.grammar import Fields


class LazyRequest(server.Request):
    """A request that has no more than its channel to begin with.

    Attributes:
        fields: the header fields in their order, names in lower case.
    """

    __slots__ = ("fields",)
    channel: Any
    site: Any

    def __init__(self, channel: Any) -> None:
        self.channel = channel
        self.site = channel.site
        self.transport = channel.transport
        self.client = channel.peer
        self.notifications: list[Deferred[None]] = []
        self.queued = False
        self._parsePOSTFormSubmission = False
        self.fields: Fields = []

    @cached_property
    def host(self) -> Any:
        """Our address, as the client reached it."""
        return self.channel.getHost()

    @cached_property
    def requestHeaders(self) -> Headers:  # type: ignore[override]  # can be written all the same
        """Twisted's table of the request's fields."""
        headers = Headers()
        for name, value in self.fields:
            headers.addRawHeader(name, value)
        return headers

    @cached_property
    def responseHeaders(self) -> Headers:  # type: ignore[override]  # can be written all the same
        """The fields of a response that no head was given for."""
        return Headers()

    @cached_property
    def cookies(self) -> list[bytes]:  # type: ignore[override]  # can be written all the same
        """Cookies that a resource sets; none of ours does."""
        return []

    @cached_property
    def received_cookies(self) -> dict[bytes, bytes]:  # type: ignore[override]  # can be written all the same
        """The client's cookies; nobody reads them."""
        return {}

    @cached_property
    def _adapterCache(self) -> dict[str, Any]:  # type: ignore[override]  # noqa: N802 - Componentized's name
        return {}
