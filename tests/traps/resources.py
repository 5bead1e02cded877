"""The Resources that our site and Twisted's own serve."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from twisted.web.resource import Resource
from twisted.web.server import NOT_DONE_YET

from llmproxy.server.handler import Handler


class Saying(Resource):
    """Responds with what ``say`` does to the request."""

    isLeaf = True

    def __init__(self, say: Callable[[Any], None]) -> None:
        super().__init__()
        self._say = say

    def render_GET(self, request: Any) -> int:
        """Respond."""
        self._say(request)
        return NOT_DONE_YET


class Counting(Resource):
    """Responds to whatever reaches it.

    Attributes:
        rendered: how many requests did.
    """

    isLeaf = True

    def __init__(self) -> None:
        super().__init__()
        self.rendered = 0

    def render(self, request: Any) -> bytes:
        """Respond."""
        self.rendered += 1
        return b"ok"


class Serving(Handler):
    """Lets a resource of Twisted's serve our site's requests, with a kilobyte of body at most."""

    def __init__(self, resource: Resource) -> None:
        super().__init__()
        self._resource = resource

    def body_limit(self, request: Any) -> int:
        """Return it."""
        return 1024

    def render(self, request: Any) -> Any:
        """Let the resource respond; what it returns is the body, as in Twisted's own request."""
        body = self._resource.render(request)
        if body is not NOT_DONE_YET:
            request.write(body)
            request.finish()
        return NOT_DONE_YET
