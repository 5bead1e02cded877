"""What a client has of a response: what is sent, what is acknowledged, and when it is looked at."""

from __future__ import annotations

from itertools import pairwise

import pytest
from twisted.internet.task import Clock

from llmproxy.server.delivery import Delivery
from tests.support.fake_transport import FakeTransport


def test_looks_become_rare() -> None:
    """The first is soon, then each waits twice as long, and no longer than half a second."""
    clock = Clock()
    delivery = Delivery(FakeTransport(), clock)
    looks: list[float] = []
    delivery.watch(lambda: looks.append(round(clock.seconds(), 3)))
    clock.pump([0.001] * 2000)
    waits = [b - a for a, b in pairwise([0.0, *looks])]
    assert waits == pytest.approx([0.01, 0.02, 0.04, 0.08, 0.16, 0.32, 0.5, 0.5], abs=0.002)
    delivery.watch(lambda: looks.append(0.0))
    clock.advance(0.01)
    assert looks[-1] == 0.0
    delivery.stop_watching()
    delivery.stop_watching()
    assert not clock.getDelayedCalls()


def test_what_waits_in_our_queue_is_neither_sent_nor_acknowledged() -> None:
    """Nor had the client room for it."""
    transport = FakeTransport()
    delivery = Delivery(transport, Clock())
    assert (delivery.is_sent(), delivery.is_acknowledged, delivery.had_room) == (True,) * 3
    transport.hold(1)
    assert (delivery.is_sent(), delivery.is_acknowledged, delivery.had_room) == (False,) * 3


def test_a_client_that_takes_some_does_not_stall() -> None:
    """The time begins with the first look at which something waits, and anew with each byte."""
    transport = FakeTransport()
    delivery = Delivery(transport, Clock())
    assert not delivery.is_stalled(0, 10, 100)
    transport.hold(50)
    assert not delivery.is_stalled(100, 10, 100)
    assert not delivery.is_stalled(109, 10, 100)
    transport.hold(49)
    assert not delivery.is_stalled(111, 10, 100)
    assert not delivery.is_stalled(120, 10, 100)
    assert not delivery.is_stalled(121, None, 100)
    assert delivery.is_stalled(121, 10, 100)


def test_what_tls_adds_hides_no_progress() -> None:
    """The kernel took records that are larger than their content; then the client goes on."""
    transport = FakeTransport()
    delivery = Delivery(transport, Clock())
    transport.hold(100)
    assert not delivery.is_stalled(0, 10, 1000)
    transport.hold(100 + 1000 + 300)  # 300 are TLS's own
    assert not delivery.is_stalled(9, 10, 2000)
    for second in range(9, 59, 5):
        transport.hold(1400 - second)
        assert not delivery.is_stalled(second, 10, 2000)
    assert not delivery.is_stalled(63, 10, 2000)
    assert delivery.is_stalled(65, 10, 2000)
