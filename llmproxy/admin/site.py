"""The admin site: alive, ready, metrics, configuration, clients.

Any caller that reaches its listener may read; nothing here changes anything.  A browser may reach
it, too, and run the page of somebody whose name points here for a moment (DNS rebinding): whatever
is not for probes and Prometheus asks for which host it is read.  The responses are made from what
is passed in, so that this module knows neither gateway nor upstream.
"""

from __future__ import annotations

import ipaddress
import re
import socket
from collections.abc import Callable, Container
from typing import Any

import msgspec
from prometheus_client import CollectorRegistry
from prometheus_client.exposition import choose_encoder
from twisted.web.server import NOT_DONE_YET

from llmproxy.http1.headers import host_of
from llmproxy.server.handler import Handler, Router
from llmproxy.server.request import Request
from llmproxy.server.site import Site

_JSON = b"application/json"
_TEXT = b"text/plain; charset=utf-8"

_is_refused = re.compile(r";\s*q\s*=\s*0(?:\.0*)?\s*(?:;|\Z)", re.IGNORECASE).search
"""Finds the weight of a format that is not acceptable, which the client library overlooks."""

Response = tuple[int, bytes, bytes]
"""Status, content type, body."""


class Page(Handler):
    """One path that is read with GET or HEAD; any other method is a 405.

    Args:
        read: makes the response to one request.
        is_ours: whether a request is for this site; else it is a 421.
    """

    def __init__(
        self,
        read: Callable[[Request], Response],
        is_ours: Callable[[Request], bool] = lambda request: True,
    ) -> None:
        super().__init__()
        self._read = read
        self._is_ours = is_ours

    def render(self, request: Request) -> int:
        """Respond at once; a body is neither needed nor kept."""
        if not self._is_ours(request):
            foreign = "The Host field names another site than this one; see `hosts` in [admin]."
            return _respond(request, (421, _JSON, _error(foreign)))
        if request.method in (b"GET", b"HEAD"):
            return _respond(request, self._read(request))
        refusal = 405, _JSON, _error("This endpoint is only read.")
        return _respond(request, refusal, (b"allow", b"GET, HEAD"))


class NotFound(Handler):
    """Every other path, with any method."""

    def render(self, request: Request) -> int:
        """Respond at once."""
        return _respond(request, (404, _JSON, _error("There is nothing at this path.")))


def admin_site(
    reactor: Any,
    clock: Callable[[], float],
    *,
    wall: Callable[[], float],
    ready: Callable[[], bool],
    registry: CollectorRegistry,
    config: Callable[[], object] | None,
    clients: Callable[[], object] | None = None,
    hosts: Callable[[], Container[str]] = tuple,
) -> Site:
    """Return the site of an admin listener.

    Args:
        reactor: keeps time.
        clock: monotonic seconds.
        wall: seconds since the epoch.
        ready, registry, config, clients, hosts: as for :func:`admin_router`.
    """
    router = admin_router(
        ready=ready, registry=registry, config=config, clients=clients, hosts=hosts
    )
    return Site(router, reactor, clock, wall=wall)


def admin_router(
    *,
    ready: Callable[[], bool],
    registry: CollectorRegistry,
    config: Callable[[], object] | None,
    clients: Callable[[], object] | None = None,
    hosts: Callable[[], Container[str]] = tuple,
) -> Router:
    """Return the pages of the admin site; below a page there is nothing.

    Args:
        ready: whether requests are taken, for ``/readyz``.
        registry: what ``/metrics`` shows, as OpenMetrics where it is asked for.
        config: makes the redacted configuration for ``/config``; None leaves that out.
        clients: makes what clients use of their limits for ``/clients``; None leaves that out.
        hosts: returns the names, in lower case, by which operators may reach the site, besides
            those that only this machine or its network knows.
    """

    def readyz(request: Request) -> Response:
        return (200, _TEXT, b"ready\n") if ready() else (503, _TEXT, b"not ready\n")

    def metrics(request: Request) -> Response:
        asked = (request.first.get(b"accept", b"")).decode("latin-1").split(",")
        accept = ",".join(one for one in asked if not _is_refused(one))
        encode, kind = choose_encoder(accept)
        return 200, kind.encode("ascii"), encode(registry)

    pages: dict[bytes, Handler] = {
        b"/livez": Page(lambda request: (200, _TEXT, b"alive\n")),
        b"/readyz": Page(readyz),
        b"/metrics": Page(metrics),
    }
    for path, shown in ((b"/config", config), (b"/clients", clients)):
        if shown is not None:
            pages[path] = Page(_json_of(shown), lambda request: _is_ours(request, hosts()))
    return Router(NotFound(), pages)


def _json_of(shown: Callable[[], object]) -> Callable[[Request], Response]:
    return lambda request: (200, _JSON, msgspec.json.encode(shown()) + b"\n")


def _is_ours(request: Request, hosts: Container[str]) -> bool:
    """Return whether the host that a request names cannot be somebody else's.

    Nobody else can have an address here, or a name without a dot.  Through a Unix socket comes no
    browser, and none leaves ``Host`` out.
    """
    name = host_of(request.first.get(b"host")).removesuffix(".")
    if getattr(request.client, "host", None) is None or "." not in name:
        return True
    if name.endswith(".localhost") or name in hosts or name == socket.gethostname().lower():
        return True
    try:
        ipaddress.ip_address(name.strip("[]"))
    except ValueError:
        return False
    return True


def _respond(request: Request, response: Response, *more: tuple[bytes, bytes]) -> int:
    status, kind, body = response
    request.start(
        status,
        [
            (b"content-type", kind),
            (b"content-length", b"%d" % len(body)),
            (b"cache-control", b"no-store"),
            *more,
        ],
    )
    request.write(body)
    request.finish()
    return NOT_DONE_YET  # it is finished: Twisted must not finish it again


def _error(message: str) -> bytes:
    return msgspec.json.encode({"error": {"message": message}})
