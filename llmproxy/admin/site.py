"""The admin site: alive, ready, metrics, configuration, clients, providers, ends, paced stream.

Any caller that reaches its listener may read; a change needs the admin token.  The responses are
made from what is passed in, so that this module knows neither gateway nor upstream.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Container, Mapping
from functools import partial
from typing import Any

from prometheus_client import CollectorRegistry
from prometheus_client.exposition import choose_encoder

from llmproxy.admin import ended
from llmproxy.admin.pace import pace_pages
from llmproxy.admin.page import TEXT, NotFound, Page, Response, is_ours, json
from llmproxy.admin.providers import PATH, Providers, Switching
from llmproxy.record.flight import FlightRecorder
from llmproxy.server.handler import Handler, Router
from llmproxy.server.request import Request
from llmproxy.server.site import Site

_is_refused = re.compile(r";\s*q\s*=\s*0(?:\.0*)?\s*(?:;|\Z)", re.IGNORECASE).search
"""Finds the weight of a format that is not acceptable, which the client library overlooks."""


class AdminRouter(Router):
    """Finds the handler of a page, and of whatever is below one.

    Args:
        paths: handlers of exact paths.
        below: handlers of whatever is below a path.
    """

    def __init__(self, paths: dict[bytes, Handler], below: dict[bytes, Handler]) -> None:
        super().__init__(NotFound(), paths)
        self._below = below

    def find(self, method: bytes, path: bytes) -> Handler:
        """Return the handler of a request."""
        for above, handler in self._below.items():
            if path.startswith(above + b"/"):
                return handler
        return super().find(method, path)


def admin_site(
    reactor: Any,
    clock: Callable[[], float],
    *,
    wall: Callable[[], float],
    ready: Callable[[], bool],
    registry: CollectorRegistry,
    config: Callable[[], object] | None,
    clients: Callable[[], object] | None = None,
    providers: Providers | None = None,
    flights: FlightRecorder | None = None,
    turns: Callable[[], object] | None = None,
    hosts: Callable[[], Container[str]] = tuple,
) -> Site:
    """Return the site of an admin listener.

    Args:
        reactor: keeps time.
        clock: monotonic seconds.
        wall: seconds since the epoch.
        ready, registry, config, clients, providers, flights, turns, hosts: as for
            :func:`admin_router`.
    """
    router = admin_router(
        ready=ready,
        registry=registry,
        config=config,
        clients=clients,
        providers=providers,
        flights=flights,
        turns=turns,
        hosts=hosts,
        paced=None if config is None else partial(pace_pages, reactor, clock, wall),
    )
    return Site(router, reactor, clock, wall=wall)


def admin_router(
    *,
    ready: Callable[[], bool],
    registry: CollectorRegistry,
    config: Callable[[], object] | None,
    clients: Callable[[], object] | None = None,
    providers: Providers | None = None,
    flights: FlightRecorder | None = None,
    turns: Callable[[], object] | None = None,
    hosts: Callable[[], Container[str]] = tuple,
    paced: Callable[[Callable[[Request], bool]], Mapping[bytes, Handler]] | None = None,
) -> Router:
    """Return the pages of the admin site; below a page there is nothing.

    Args:
        ready: whether requests are taken, for ``/readyz``.
        registry: what ``/metrics`` shows, as OpenMetrics where it is asked for.
        config: makes the redacted configuration for ``/config``; None leaves that out.
        clients: makes what clients use of their limits for ``/clients``; None leaves that out.
        providers: what is shown and switched below ``/providers``; None leaves that out.
        flights: what ``/streams/ended`` shows; None leaves that out.
        turns: makes what is known of the reactor's turns for ``/turns``; None leaves that out.
        hosts: returns the names, in lower case, by which operators may reach the site, besides
            those that only this machine or its network knows.
        paced: from what tells whether a request is for this site to the handlers of ``/pace``, by
            their paths; None leaves them out.
    """

    def readyz(request: Request) -> Response:
        return (200, TEXT, b"ready\n") if ready() else (503, TEXT, b"not ready\n")

    def metrics(request: Request) -> Response:
        asked = (request.first.get(b"accept", b"")).decode("latin-1").split(",")
        accept = ",".join(one for one in asked if not _is_refused(one))
        encode, kind = choose_encoder(accept)
        return 200, kind.encode("ascii"), encode(registry)

    pages: dict[bytes, Handler] = {
        b"/livez": Page(lambda request: (200, TEXT, b"alive\n")),
        b"/readyz": Page(readyz),
        b"/metrics": Page(metrics),
    }

    def is_for_us(request: Request) -> bool:
        return is_ours(request, hosts())

    def shows(rows: Callable[[], object]) -> Page:
        return Page(lambda request: json(rows()), is_for_us)

    if paced is not None:
        pages.update(paced(is_for_us))
    if config is not None:
        pages[b"/config"] = shows(config)
    if clients is not None:
        pages[b"/clients"] = shows(clients)
    if turns is not None:
        pages[b"/turns"] = shows(turns)
    below = dict[bytes, Handler]()
    if flights is not None:
        pages[ended.PATH] = below[ended.PATH] = ended.Ended(flights, is_for_us)
    if providers is not None:
        pages[PATH] = shows(providers.rows)
        below[PATH] = Switching(providers, is_for_us)
    return AdminRouter(pages, below)
