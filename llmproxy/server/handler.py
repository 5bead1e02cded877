"""What serves a request: handlers, and the router that finds the one for a method and a path.

A site has one router.  When the head of a request is in, the request asks it for its handler and
keeps that to its end, whatever router the site has by then (ADR-0014).  The handler is asked about
the body first, then whether the request is refused, and renders it last.  Nothing is known here of
what handlers are for.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

from twisted.web.resource import Resource

from llmproxy.errors import ProxyError
from llmproxy.server.request import Request
from llmproxy.server.seen_heads import SeenHeads

NOT_DONE_YET: Final = 1
"""What Twisted's resources return when the request is ended later.

It is the constant of ``twisted.web.server``, whose import takes 2 MB and 20 ms.
"""


class Handler(Resource):
    """Serves requests; a subclass has its own ``render``, and changes what else it needs."""

    isLeaf = True

    def body_limit(self, request: Request) -> int:
        """Return the most bytes of the request's body; without a method of its own, none.

        It is the first call for a request, once its head is in.  What a handler finds out about the
        request here, it may keep in ``request.kept``.
        """
        return 0

    def holds_body(self, request: Request) -> bool:
        """Return whether the body is held before the request is served; else it streams."""
        return True

    def early_refusal(self, request: Request) -> ProxyError | None:
        """Return why a request is refused whose body is still to come, or None."""
        return None

    def render(self, request: Request) -> int:
        """Serve the request, which is ended then or later.

        It is called once for each request: when the whole body is held, when the body begins to
        stream, or when the request is refused, which its ``refusal`` says.

        Returns:
            ``NOT_DONE_YET``: it is the request that is ended, by its own methods.
        """
        raise NotImplementedError("a handler renders")


class Router:
    """Finds the handler of a request.

    Args:
        default: serves whatever has no handler of its own.
        paths: handlers of exact paths, raw and without a query.
        methods: handlers of whole methods, which come first: the target of CONNECT is no path.
        urls: serves requests whose target is a whole URL; by default that is nothing special.

    Attributes:
        heads: the heads that came before, since there is this router.
    """

    def __init__(
        self,
        default: Handler,
        paths: Mapping[bytes, Handler] | None = None,
        methods: Mapping[bytes, Handler] | None = None,
        urls: Handler | None = None,
    ) -> None:
        self._default = default
        self._urls = default if urls is None else urls
        self._paths = dict(paths or {})
        self._methods = dict(methods or {})
        self.heads = SeenHeads()

    def find(self, method: bytes, path: bytes) -> Handler:
        """Return the handler of a request."""
        handler = self._methods.get(method) or self._paths.get(path)
        if handler is not None:
            return handler
        return self._urls if path[:1] != b"/" and b"://" in path else self._default
