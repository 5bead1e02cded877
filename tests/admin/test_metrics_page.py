"""``/metrics`` in slices: the page is the library's own, however it is cut."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from prometheus_client import CollectorRegistry, Counter, Enum, Gauge, Histogram, Info, Summary
from prometheus_client.core import Metric
from prometheus_client.exposition import choose_encoder
from prometheus_client.registry import Collector

from llmproxy.admin.metrics_page import pieces
from llmproxy.record.metrics import Metrics
from tests.admin.one_site import Admin
from tests.support.fake_transport import FIN

OPENMETRICS = "application/openmetrics-text; version=1.0.0"


def mixed() -> CollectorRegistry:
    """Return a registry with families of every kind, small and large, and one without samples."""
    registry = CollectorRegistry()
    counter = Counter("many", 'Help with "quotes", \\ and\nlines.', ["a", "b"], registry=registry)
    for number in range(300):
        counter.labels(f'a"{number}\n', "\\").inc(number)
    Gauge("one", "One.", registry=registry).set(1.5)
    Gauge("none", "None.", ["a"], registry=registry)
    histogram = Histogram("h", "H.", ["a"], registry=registry)
    for number in range(20):
        histogram.labels(str(number)).observe(0.2, {"trace_id": "abc"})
    Summary("s", "S.", registry=registry).observe(1)
    Info("i", "I.", registry=registry).info({"x": "y"})
    Enum("e", "E.", states=["on", "off"], registry=registry).state("on")
    registry.register(Metrics("1.2.3"))
    return registry


@pytest.mark.parametrize("accept", ["", "text/plain;version=1.0.0", OPENMETRICS])
def test_the_pieces_are_the_whole_page(accept: str) -> None:
    """Byte for byte, but that a family's own ``_created`` samples may stand in its pieces."""
    registry = mixed()
    encode, _ = choose_encoder(accept)

    def lines(text: bytes) -> list[bytes]:
        found = text.split(b"\n")
        return [line for line in found if b"_created" not in line]

    joined = b"".join(pieces(registry, encode))
    assert lines(joined) == lines(encode(registry))


class Slow(Collector):
    """Each of its families takes so many seconds of a clock."""

    def __init__(self, clock: Any, seconds: float, count: int) -> None:
        self._clock = clock
        self._seconds = seconds
        self._count = count

    def collect(self) -> Iterator[Metric]:
        """Yield the families."""
        for number in range(self._count):
            self._clock.rightNow += self._seconds
            yield Metric(f"slow_{number}", "Slow.", "gauge")


def test_a_long_page_leaves_turns_to_others() -> None:
    """A slice is over when its time is; the response comes whole."""
    admin = Admin()
    admin.metrics.registry.register(Slow(admin.reactor, 0.001, 10))
    slices = 1
    call_later = admin.reactor.callLater

    def counted(seconds: float, *call: Any) -> Any:
        nonlocal slices
        slices += seconds == 0
        return call_later(seconds, *call)

    admin.reactor.callLater = counted  # type: ignore[method-assign, assignment]  # of this one alone
    admin.channel.dataReceived(b"GET /metrics HTTP/1.1\r\nHost: a\r\n\r\n")
    assert admin.transport.take() == b""
    admin.reactor.advance(0)
    page = admin.transport.take()
    assert page.startswith(b"HTTP/1.1 200 ")
    assert b"slow_9" in page
    assert slices >= 5


def test_a_scraper_that_leaves_stops_the_making() -> None:
    """No call is left."""
    admin = Admin()
    admin.metrics.registry.register(Slow(admin.reactor, 0.001, 100))
    wire, channel = admin.connect()
    channel.dataReceived(b"GET /metrics HTTP/1.1\r\nHost: a\r\n\r\n")
    wire.end(FIN)
    before = admin.reactor.seconds()
    admin.reactor.advance(0)
    admin.reactor.advance(0)
    assert admin.reactor.seconds() == before
