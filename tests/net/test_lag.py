"""How late the reactor is."""

from __future__ import annotations

from twisted.internet.task import Clock

from llmproxy.net.lag import Lag


def test_a_late_reactor_is_measured() -> None:
    """By how much it misses its appointments, and never by less than nothing."""
    clock, late = Clock(), 0.0
    lags: list[float] = []
    lag = Lag(clock, lambda: clock.seconds() + late, lags.append)
    lag.stop()
    lag.start()
    clock.advance(1)
    late = 0.25
    clock.advance(1)
    late = 0.125
    clock.advance(1)
    lag.stop()
    assert lags == [0.0, 0.25, 0.0]
    assert not clock.getDelayedCalls()
