"""What an operator has switched off: for how long, and what a request is told."""

from __future__ import annotations

import pytest
from twisted.internet.task import Clock

from llmproxy.policy.routes import NoModel
from llmproxy.policy.switches import Switches


class Switched:
    """Switches on a clock that the test turns; it was 1000 when the clock began."""

    def __init__(self) -> None:
        self.clock = Clock()
        self.switches = Switches(self.clock.seconds, lambda: 1000.0 + self.clock.seconds())

    def off(self, provider: str, model: object = NoModel.WITHOUT_BODY) -> bool:
        """Tell whether a request may not go there now."""
        return self.switches.is_off(provider, model, self.clock.seconds())


@pytest.fixture
def switched() -> Switched:
    """Nothing is off."""
    return Switched()


def test_a_provider_is_off_until_it_is_enabled(switched: Switched) -> None:
    """For every model, and for requests that name none; other providers stay on."""
    assert not switched.off("p")
    switched.switches.disable("p", None, None, "10.0.0.1")
    switched.clock.advance(10**6)
    assert switched.off("p")
    assert switched.off("p", "m")
    assert not switched.off("q")
    switched.switches.enable("p", None)
    assert not switched.off("p")
    assert not switched.switches.off
    switched.switches.enable("p", None)  # which it is


def test_a_model_of_a_provider_is_off(switched: Switched) -> None:
    """By its exact name, at that provider alone."""
    switched.switches.disable("p", "m", None, "10.0.0.1")
    assert switched.off("p", "m")
    for provider, model in (("p", "m2"), ("p", NoModel.WITH_BODY), ("q", "m"), ("p", "None")):
        assert not switched.off(provider, model)
    switched.switches.enable("p", None)
    assert switched.off("p", "m")
    switched.switches.enable("p", "m")
    assert not switched.off("p", "m")


def test_what_is_off_for_a_while_comes_back_by_itself(switched: Switched) -> None:
    """Nothing of it stays in memory; switching it off again is a new while."""
    switched.switches.disable("p", None, 30.0, "a")
    switched.clock.advance(20)
    switched.switches.disable("p", None, 30.0, "b")
    switched.clock.advance(29.9)
    assert switched.off("p")
    switched.clock.advance(0.1)
    assert not switched.off("p")
    assert not switched.switches.off


def test_the_refusal_says_when_to_come_back(switched: Switched) -> None:
    """It is the later of the two ends, in whole seconds; a minute where there is none."""

    def retry_after(model: object = "m") -> bytes:
        error = switched.switches.refusal("p", model, switched.clock.seconds())
        assert (error.status, error.reason) == (503, "provider_disabled")
        return dict(error.fields)[b"retry-after"]

    switched.switches.disable("p", None, 30.0, "a")
    switched.clock.advance(0.5)
    assert retry_after() == b"30"
    switched.switches.disable("p", "m", 90.0, "a")
    assert (retry_after(), retry_after("n")) == (b"90", b"30")
    switched.switches.disable("p", "m", None, "a")
    assert retry_after() == b"60"


def test_what_is_off_is_shown(switched: Switched) -> None:
    """With who did it, and both times; what has come back is not."""
    switched.switches.disable("q", None, None, "10.0.0.1")
    switched.switches.disable("p", "m", 90.0, "10.0.0.2")
    switched.switches.disable("p", "over", 5.0, "10.0.0.2")
    switched.clock.advance(10)
    assert switched.switches.rows() == [
        {
            "provider": "p",
            "model": "m",
            "since": "1970-01-01T00:16:40Z",
            "until": "1970-01-01T00:18:10Z",
            "by": "10.0.0.2",
        },
        {
            "provider": "q",
            "model": None,
            "since": "1970-01-01T00:16:40Z",
            "until": None,
            "by": "10.0.0.1",
        },
    ]
