"""How providers stand, all things taken together."""

from __future__ import annotations

from twisted.internet.task import Clock

from llmproxy.config import parse
from llmproxy.policy.standing import Standing
from tests.support.daemon import provider_table, route_table

NAMES = ("off", "fails", "cools", "model", "on")


def test_a_provider_is_ready_if_nothing_keeps_everybody_from_it() -> None:
    """One is off, one fails, one cools, and of one a single model is off."""
    tables = "".join(provider_table(name, url="http://h") for name in NAMES)
    text = f"[proxy]\nanonymous = true\n{tables}{route_table('/p', NAMES[0])}"
    providers = parse(text, environ={}).providers
    clock = Clock()
    standing = Standing(clock, clock.seconds, lambda: 0.0)
    assert standing.ready(NAMES) == 5
    standing.switches.disable("off", None, None, "an operator")
    standing.switches.disable("model", "m", None, "an operator")
    standing.health.cool_down(providers["cools"], "c", "m", 5, 429)
    for _ in range(providers["fails"].health.failures):
        standing.health.failed(providers["fails"], "c", was_asked=False)
    assert [standing.ready([name]) for name in NAMES] == [0, 0, 0, 1, 1]
    clock.advance(3600)
    assert [standing.ready([name]) for name in NAMES] == [0, 1, 1, 1, 1]
