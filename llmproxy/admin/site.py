"""The admin site: alive, ready, metrics, configuration.

Reading is open to whoever reaches its listener; nothing here changes anything.  The responses are
made from what is passed in, so that this module knows neither gateway nor upstream.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import msgspec
from prometheus_client import CollectorRegistry
from prometheus_client.exposition import choose_encoder
from twisted.web.resource import Resource

from llmproxy.server.request import Request
from llmproxy.server.site import Site

_JSON = b"application/json"
_TEXT = b"text/plain; charset=utf-8"

Response = tuple[int, bytes, bytes]
"""Status, content type, body."""


class Endpoint(Resource):
    """One path that is read with GET or HEAD.

    Args:
        answer: makes the response to one request.
    """

    isLeaf = True

    def __init__(self, response: Callable[[Request], Response]) -> None:
        super().__init__()
        self._response = response

    def render(self, request: Request) -> int:
        """Answer; anything but GET and HEAD is a 405, anything below the path a 404."""
        extra: list[tuple[bytes, bytes]] = []
        if request.postpath or self._response is not_found:
            status, kind, body = not_found(request)
        elif request.method in (b"GET", b"HEAD"):
            status, kind, body = self._response(request)
        else:
            status, kind, body = 405, _JSON, _error("This endpoint is only read.")
            extra = [(b"allow", b"GET, HEAD")]
        request.start(
            status,
            [
                (b"content-type", kind),
                (b"content-length", b"%d" % len(body)),
                (b"cache-control", b"no-store"),
                *extra,
            ],
        )
        request.write(body)
        request.finish()
        return 1  # NOT_DONE_YET: it was finished here


class _Root(Resource):
    def getChild(self, path: bytes, request: Request) -> Resource:
        return Endpoint(not_found)


def not_found(request: Request) -> Response:
    """Answer 404."""
    return 404, _JSON, _error("There is nothing at this path.")


def admin_site(
    reactor: Any,
    clock: Callable[[], float],
    *,
    ready: Callable[[], bool],
    registry: CollectorRegistry,
    config: Callable[[], object] | None,
) -> Site:
    """Return the site of an admin listener.

    Args:
        reactor: keeps time.
        clock: monotonic seconds.
        ready, registry, config: as for :func:`admin_resource`.
    """
    root = admin_resource(ready=ready, registry=registry, config=config)
    return Site(root, reactor, clock)


def admin_resource(
    *,
    ready: Callable[[], bool],
    registry: CollectorRegistry,
    config: Callable[[], object] | None,
) -> Resource:
    """Return the admin site's root.

    Args:
        ready: whether requests are taken, for ``/readyz``.
        registry: what ``/metrics`` shows, as OpenMetrics where it is asked for.
        config: makes the redacted configuration for ``/config``; None leaves that out.
    """

    def readyz(request: Request) -> Response:
        return (200, _TEXT, b"ready\n") if ready() else (503, _TEXT, b"not ready\n")

    def metrics(request: Request) -> Response:
        accept = (request.first.get(b"accept", b"")).decode("latin-1")
        encode, kind = choose_encoder(accept)
        return 200, kind.encode("ascii"), encode(registry)

    root = _Root()
    root.putChild(b"livez", Endpoint(lambda request: (200, _TEXT, b"alive\n")))
    root.putChild(b"readyz", Endpoint(readyz))
    root.putChild(b"metrics", Endpoint(metrics))
    if config is not None:
        shown = config
        root.putChild(
            b"config",
            Endpoint(lambda request: (200, _JSON, msgspec.json.encode(shown()) + b"\n")),
        )
    return root


def _error(message: str) -> bytes:
    return msgspec.json.encode({"error": {"message": message}})
