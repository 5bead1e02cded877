"""The admin site: which handler serves which path.

Any caller that reaches its listener may read; a change needs the admin token.  What is for probes
and Prometheus can have a listener of its own, on which nothing else is.
"""

from __future__ import annotations

from collections.abc import Callable, Container
from functools import partial
from typing import Any

import msgspec

from llmproxy.admin import ended, events, stream_pages
from llmproxy.admin.clients import Clients
from llmproxy.admin.metrics_page import MetricsPage
from llmproxy.admin.overview import Overview
from llmproxy.admin.pace import pace_pages
from llmproxy.admin.page import TEXT, NotFound, Page, Response, is_ours, json
from llmproxy.admin.providers import PATH, Providers, Switching
from llmproxy.admin.status_page import status_pages
from llmproxy.admin.stream_pages import OneStream, window_page
from llmproxy.admin.streams import Streams
from llmproxy.config import Secret
from llmproxy.record.flight import FlightRecorder
from llmproxy.record.metrics import Metrics
from llmproxy.server.handler import Handler, Router
from llmproxy.server.request import Request
from llmproxy.server.site import Site


class AdminRouter(Router):
    """Finds the handler of a page, and of whatever is below one.

    Args:
        paths: handlers of exact paths.
        below: handlers of whatever is below a path; of several, the first.
    """

    def __init__(self, paths: dict[bytes, Handler], below: dict[bytes, Handler]) -> None:
        super().__init__(NotFound(), paths)
        self._exact = paths
        self._below = below

    def find(self, method: bytes, path: bytes) -> Handler:
        """Return the handler of a request."""
        if path in self._exact:
            return self._exact[path]
        for above, handler in self._below.items():
            if path.startswith(above + b"/"):
                return handler
        return super().find(method, path)


class Shown(msgspec.Struct, frozen=True):
    """What the whole site shows, besides what is for probes and Prometheus.

    Attributes:
        config: makes the redacted configuration, for ``/config``.
        streams: what runs, for ``/streams``.
        providers: what is shown and switched below ``/providers``.
        clients: for ``/clients``.
        flights: what ended otherwise than it should, for ``/streams/ended``.
        overview: all of it at one glance, for ``/events`` and the page.
        turns: makes what is known of the reactor's turns, for ``/turns``; None leaves that out.
        hosts: returns the names, in lower case, by which operators may reach the site, besides
            those that only this machine or its network knows.
    """

    config: Callable[[], object]
    streams: Streams
    providers: Providers
    clients: Clients
    flights: FlightRecorder
    overview: Overview
    turns: Callable[[], object] | None = None
    hosts: Callable[[], Container[str]] = tuple


def admin_site(
    reactor: Any,
    clock: Callable[[], float],
    *,
    wall: Callable[[], float],
    ready: Callable[[], tuple[bool, str]],
    metrics: Metrics,
    shown: Shown | None,
) -> Site:
    """Return the site of an admin listener.

    Args:
        reactor: keeps time.
        clock: monotonic seconds.
        wall: seconds since the epoch.
        ready: whether requests are taken, and the same in words, for ``/readyz``.
        metrics: what ``/metrics`` shows, as OpenMetrics where it is asked for.
        shown: what the whole site shows; None leaves all of that out.
    """

    def readyz(request: Request) -> Response:
        is_ready, words = ready()
        return (200 if is_ready else 503, TEXT, words.encode("ascii") + b"\n")

    pages: dict[bytes, Handler] = {
        b"/livez": Page(lambda request: (200, TEXT, b"alive\n")),
        b"/readyz": Page(readyz),
        b"/metrics": MetricsPage(metrics, reactor, clock),
    }
    below = dict[bytes, Handler]()
    if shown is not None:
        _add_whole_site(pages, below, shown, reactor, clock, wall)
    return Site(AdminRouter(pages, below), reactor, clock, wall=wall)


def _add_whole_site(
    pages: dict[bytes, Handler],
    below: dict[bytes, Handler],
    shown: Shown,
    reactor: Any,
    clock: Callable[[], float],
    wall: Callable[[], float],
) -> None:
    """Add what operators see; what is not below a page of these is a 404."""

    def is_for_us(request: Request) -> bool:
        return is_ours(request, shown.hosts())

    def rows(make: Callable[[], object]) -> Page:
        return Page(lambda request: json(make()), is_for_us)

    def token() -> Secret | None:
        return shown.providers.token

    pages.update(pace_pages(reactor, clock, wall, is_for_us))
    pages.update(status_pages(is_for_us))
    pages[events.PATH] = events.Events(shown.overview, reactor, is_for_us)
    pages[b"/config"] = rows(shown.config)
    pages[b"/clients"] = rows(shown.clients.rows)
    if shown.turns is not None:
        pages[b"/turns"] = rows(shown.turns)
    pages[stream_pages.PATH] = Page(partial(window_page, shown.streams), is_for_us)
    pages[ended.PATH] = below[ended.PATH] = ended.Ended(shown.flights, is_for_us)
    below[stream_pages.PATH] = OneStream(shown.streams, token, is_for_us)
    pages[PATH] = rows(shown.providers.rows)
    below[PATH] = Switching(shown.providers, is_for_us)
