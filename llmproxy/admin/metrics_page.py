"""``/metrics``: all metrics, made in slices, so that a scrape holds no stream up for long.

Thousands of samples take the encoder of ``prometheus_client`` some ten milliseconds or more.  It
gets them in pieces; between two pieces the reactor may have its turn.  A page that is short is made
at once.  What is counted while a page is made may be in one family of it and not in another.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from itertools import chain, islice
from typing import Any

from prometheus_client import CollectorRegistry
from prometheus_client.core import Metric
from prometheus_client.exposition import choose_encoder

from llmproxy.admin.page import ReadOnly, respond
from llmproxy.record.metrics import Metrics
from llmproxy.server.handler import NOT_DONE_YET
from llmproxy.server.request import Request

_SLICE_S = 0.002
"""Seconds after which a slice is over; a piece that is begun is made to its end."""

_PIECE = 64
"""Samples that the encoder gets at once."""

_OPENMETRICS_END = b"# EOF\n"

_is_refused = re.compile(r";\s*q\s*=\s*0(?:\.0*)?\s*(?:;|\Z)", re.IGNORECASE).search
"""Finds the weight of a format that is not acceptable, which the client library overlooks."""


class MetricsPage(ReadOnly):
    """Shows all metrics, as OpenMetrics where that is asked for.

    Args:
        metrics: what is shown.
        reactor: gets its turn between two slices.
        clock: monotonic seconds.
    """

    def __init__(self, metrics: Metrics, reactor: Any, clock: Callable[[], float]) -> None:
        super().__init__(lambda request: True)
        self._metrics = metrics
        self._reactor = reactor
        self._clock = clock

    def read(self, request: Request) -> int:
        """Begin to make the page."""
        asked = (request.first.get(b"accept", b"")).decode("latin-1").split(",")
        accept = ",".join(one for one in asked if not _is_refused(one))
        encode, kind = choose_encoder(accept)
        summing = (b"" for _ in self._metrics.sum_bodies())
        rest = chain(summing, pieces(self._metrics.registry, encode))
        making = Making(request, kind.encode("ascii"), rest)
        making.go_on(self._reactor, self._clock)
        return NOT_DONE_YET


class Making:
    """One page that is being made."""

    def __init__(self, request: Request, kind: bytes, rest: Iterator[bytes]) -> None:
        self._request = request
        self._kind = kind
        self._rest = rest
        self._made: list[bytes] = []
        self._call: Any = None
        request.gone = lambda why: self._stop()

    def go_on(self, reactor: Any, clock: Callable[[], float]) -> None:
        """Make a slice; behind the last one, respond."""
        self._call = None
        over = clock() + _SLICE_S
        for piece in self._rest:
            self._made.append(piece)
            if clock() >= over:
                self._call = reactor.callLater(0, self.go_on, reactor, clock)
                return
        respond(self._request, (200, self._kind, b"".join(self._made)))

    def _stop(self) -> None:
        if self._call is not None:
            self._call.cancel()
            self._call = None


class _Few:
    """What stands for a registry with few samples."""

    def __init__(self, *families: Metric) -> None:
        self._families = families

    def collect(self) -> Iterator[Metric]:
        """Yield the families."""
        yield from self._families


def pieces(registry: CollectorRegistry, encode: Callable[[Any], bytes]) -> Iterator[bytes]:
    """Yield what is shown of a registry; joined, that is what ``encode`` makes of it.

    Args:
        encode: of ``choose_encoder``.
    """
    for family in registry.collect():
        samples, is_first = iter(family.samples), True
        while True:
            piece = Metric(family.name, family.documentation, family.type)
            piece.samples = list(islice(samples, _PIECE))
            if not (piece.samples or is_first):
                break
            text = encode(_Few(piece)).removesuffix(_OPENMETRICS_END)
            yield text if is_first else _without_head(text)
            is_first = False
    yield encode(_Few())


def _without_head(text: bytes) -> bytes:
    """Return the lines of a piece behind its help and type."""
    while text.startswith(b"# "):
        text = text[text.index(b"\n") + 1 :]
    return text
