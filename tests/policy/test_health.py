"""Circuits and cooldowns, under a clock that the test turns."""

from __future__ import annotations

import pytest
from twisted.internet.task import Clock

from llmproxy.config import Provider, parse
from llmproxy.policy.health import LONGEST_COOLDOWN_S, NO_WAIT, Health, Wait


def provider(name: str = "p", health: str = "") -> Provider:
    config = parse(
        f'[proxy]\nanonymous = true\n[providers.{name}]\nurl = "http://h"\ndialect = "openai"\n'
        f'health = {{ {health} }}\n[[routes]]\npath = "/p"\nproviders = ["{name}"]\n',
        environ={},
    )
    return config.providers[name]


P = provider(health='failures = 3, window = "30s", open_for = "15s"')


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def health(clock: Clock) -> Health:
    return Health(clock.seconds)


def fail(health: Health, count: int, client: str = "c", *, was_asked: bool = False) -> None:
    for _ in range(count):
        health.asks(P, client)
        health.failed(P, client, was_asked=was_asked)


def test_nothing_is_known_at_first(health: Health) -> None:
    """Then nobody needs to ask."""
    assert not health.is_troubled
    assert health.wait(P, "c", "m") == NO_WAIT
    assert health.is_up("p")
    assert health.cooldown_s("p") == 0


def test_a_circuit_opens_with_the_last_failure(health: Health) -> None:
    """And not before it; it is everybody's, as no connection came about."""
    fail(health, 2)
    assert health.wait(P, "c", "m").seconds == 0
    fail(health, 1)
    assert health.wait(P, "other", "m") == Wait(15, 15, 503)
    assert not health.is_up("p")
    assert health.cooldown_s("p") == 15


def test_a_circuit_that_is_over_says_nothing(health: Health, clock: Clock) -> None:
    """Where nobody comes, nobody finds out: that must not look like a provider that fails."""
    fail(health, 3)
    clock.advance(15)
    assert health.is_up("p")
    health.asks(P, "c")
    health.failed(P, "c", was_asked=False)
    assert not health.is_up("p")


def test_a_provider_is_ready_where_everybody_may_ask(health: Health, clock: Clock) -> None:
    """One client's circuit does not count; everybody's does, and a cooldown of any model."""
    assert health.is_ready("p")
    fail(health, 3, "bad", was_asked=True)
    assert health.is_ready("p")
    fail(health, 3)
    assert not health.is_ready("p")
    assert health.is_ready("q")
    clock.advance(15)
    assert health.is_ready("p")
    health.cool_down(P, "c", "m", 5, 429)
    assert not health.is_ready("p")
    clock.advance(5)
    assert health.is_ready("p")


def test_what_a_request_may_have_caused_is_its_clients_alone(health: Health) -> None:
    """No client can make the provider look ill to others."""
    fail(health, 3, "bad", was_asked=True)
    assert health.wait(P, "bad", "m") == Wait(15, 15, 503)
    assert health.wait(P, "good", "m") == NO_WAIT


def test_a_success_between_them_closes_the_circuit(health: Health) -> None:
    """Only failures one after the other count."""
    fail(health, 2)
    health.succeeded(P, "c")
    assert not health.is_troubled
    fail(health, 2)
    assert health.wait(P, "c", "m").seconds == 0


def test_only_failures_of_the_window_count(health: Health, clock: Clock) -> None:
    """One that is older is forgotten."""
    fail(health, 2)
    clock.advance(30.5)
    fail(health, 1)
    assert health.wait(P, "c", "m").seconds == 0
    fail(health, 2)
    assert health.wait(P, "c", "m").seconds == 15


def test_one_request_is_the_probe(health: Health, clock: Clock) -> None:
    """The others are passed over until it has ended; success closes the circuit."""
    fail(health, 3)
    clock.advance(15)
    assert health.wait(P, "c", "m").seconds == 0
    health.asks(P, "c")
    assert health.wait(P, "c", "m").seconds == 1
    health.succeeded(P, "c")
    assert health.wait(P, "c", "m").seconds == 0
    assert not health.is_troubled


def test_a_probe_that_fails_opens_it_again(health: Health, clock: Clock) -> None:
    """At once, for the whole time, although the other failures are out of the window."""
    fail(health, 3)
    clock.advance(100)
    fail(health, 1)
    assert health.wait(P, "c", "m").seconds == 15


def test_a_probe_that_said_nothing_lets_the_next_one_probe(health: Health, clock: Clock) -> None:
    """Its client left."""
    fail(health, 3)
    clock.advance(15)
    health.asks(P, "c")
    health.gave_up(P, "c")
    assert health.wait(P, "c", "m").seconds == 0


def test_a_provider_that_responds_at_all_can_be_reached(health: Health, clock: Clock) -> None:
    """A failure of the request closes the circuit of connections."""
    fail(health, 3)
    clock.advance(15)
    fail(health, 1, was_asked=True)
    assert health.wait(P, "other", "m").seconds == 0


def test_no_circuit_opens_where_failures_is_0(health: Health) -> None:
    """The operator has switched it off."""
    never = provider(health="failures = 0")
    for _ in range(100):
        health.failed(never, "c", was_asked=False)
    assert health.wait(never, "c", "m").seconds == 0
    assert not health.is_troubled


def test_a_cooldown_is_for_one_model(health: Health, clock: Clock) -> None:
    """Providers limit by model."""
    health.cool_down(P, "c", "m", 7.0, 429)
    assert health.wait(P, "c", "m") == Wait(7, 7, 429)
    assert health.wait(P, "c", "other").seconds == 0
    clock.advance(7)
    assert health.wait(P, "c", "m").seconds == 0


def test_a_cooldown_binds_those_who_were_refused(health: Health) -> None:
    """The others ask somebody else first: the refused request may have been too large, say."""
    health.cool_down(P, "big", "m", 60, 429)
    health.cool_down(P, "c", "m", 5, 429)
    assert health.wait(P, "big", "m") == Wait(60, 60, 429)
    assert health.wait(P, "c", "m") == Wait(60, 5, 429)
    assert health.wait(P, "other", "m") == Wait(60, 0, 429)


def test_a_longer_cooldown_replaces_a_shorter_one_only(health: Health, clock: Clock) -> None:
    """Whatever came last."""
    health.cool_down(P, "c", "m", 5, 429)
    health.cool_down(P, "c", "m", 9, 503)
    assert health.wait(P, "c", "m") == Wait(9, 9, 503)
    clock.advance(1)
    health.cool_down(P, "c", "m", 2, 429)
    assert health.wait(P, "c", "m") == Wait(8, 8, 503)


def test_a_cooldown_ends_within_an_hour(health: Health) -> None:
    """A provider that says nonsense is asked again."""
    health.cool_down(P, "c", "m", 1e12, 429)
    assert health.wait(P, "c", "m").seconds == LONGEST_COOLDOWN_S


def test_cooldowns_are_bounded(health: Health) -> None:
    """Models are words of callers'; what ends first goes first."""
    for number in range(10_000):
        health.cool_down(P, "c", f"m{number}", 10 + number, 429)
    assert health.wait(P, "c", "m9999").seconds > 0
    assert health.wait(P, "c", "m0").seconds == 0
    assert len(health._cooldowns) <= 4096


def test_what_is_over_is_forgotten(health: Health, clock: Clock) -> None:
    """So that requests need not ask any more."""
    health.cool_down(P, "c", "m", 5, 429)
    clock.advance(6)
    health.succeeded(P, "c")
    assert not health.is_troubled


def test_a_reload_forgets_providers_that_are_gone(health: Health) -> None:
    """And keeps what is known of the others."""
    fail(health, 3)
    health.cool_down(provider("gone"), "c", "m", 5, 429)
    health.follow({"p"})
    assert health.wait(P, "c", "m").seconds == 15
    assert health.cooldown_s("gone") == 0
    health.follow(())
    assert not health.is_troubled


def test_a_probe_that_finds_no_connection_ends_for_its_client_too(
    health: Health, clock: Clock
) -> None:
    """The client's own circuit was open; one failed connection does not close the provider."""
    fail(health, 3, was_asked=True)
    clock.advance(15)
    fail(health, 1)
    assert health.wait(P, "c", "m").own == 0


def test_a_probe_ends_where_circuits_were_switched_off(health: Health, clock: Clock) -> None:
    """A reload did that, while the circuit was open."""
    never = provider(health="failures = 0")
    fail(health, 3)
    assert health.wait(never, "c", "m").own == 0
    clock.advance(15)
    health.asks(never, "c")
    health.failed(never, "c", was_asked=False)
    assert health.wait(never, "c", "m").own == 0
    assert health.is_up("p")


@pytest.mark.parametrize("count", [1, 3])
def test_a_client_that_comes_no_more_is_forgotten(health: Health, clock: Clock, count: int) -> None:
    """Its failures are over with their window, or with the time that its circuit was open."""
    fail(health, count, "gone", was_asked=True)
    clock.advance(46)
    health.succeeded(P, "another")
    assert not health.is_troubled
    assert health.is_up("p")


def test_a_probe_that_takes_long_is_followed_by_another(health: Health, clock: Clock) -> None:
    """Its response may take ten minutes; the provider is not closed for so long."""
    fail(health, 3)
    clock.advance(15)
    health.asks(P, "c")
    clock.advance(14.5)
    assert health.wait(P, "c", "m").own == 0.5
    clock.advance(0.5)
    assert health.wait(P, "c", "m").own == 0
    health.asks(P, "c")
    assert health.wait(P, "c", "m").own == 1


def test_who_asks_in_any_case_keeps_no_circuit_open(health: Health, clock: Clock) -> None:
    """A route with one candidate asks before the time is over; that is no probe."""
    fail(health, 3)
    for _ in range(14):
        clock.advance(1)
        health.asks(P, "c")
    clock.advance(1)
    assert health.wait(P, "c", "m").own == 0
