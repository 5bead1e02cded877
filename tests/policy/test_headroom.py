"""What providers say of their limits: the last response that says something, and nothing else."""

from __future__ import annotations

from twisted.internet.task import Clock

from llmproxy.policy.headroom import Headroom, Told

OPENAI = {
    b"date": b"now",
    b"x-ratelimit-limit-requests": b"500",
    b"x-ratelimit-remaining-requests": b"499",
    b"x-request-id": b"r",
}
ANTHROPIC = {
    b"anthropic-ratelimit-tokens-remaining": b"7",
    b"anthropic-organization-id": b"o",
    b"retry-after": b"3",
}


def test_what_was_told_last_is_shown() -> None:
    """Fields of limits alone, with the time since; each provider has its own."""
    clock = Clock()
    headroom = Headroom(clock.seconds)
    assert headroom.told("p") is None
    headroom.note("p", OPENAI)
    headroom.note("q", ANTHROPIC)
    clock.advance(2.5)
    assert headroom.told("p") == Told(
        2.5, {"x-ratelimit-limit-requests": "500", "x-ratelimit-remaining-requests": "499"}
    )
    assert headroom.told("q") == Told(
        2.5, {"anthropic-ratelimit-tokens-remaining": "7", "retry-after": "3"}
    )
    headroom.note("p", ANTHROPIC)
    assert headroom.told("p") == Told(
        0.0, {"anthropic-ratelimit-tokens-remaining": "7", "retry-after": "3"}
    )


def test_a_response_that_says_nothing_changes_nothing() -> None:
    """As a list of models, between responses that do."""
    headroom = Headroom(Clock().seconds)
    headroom.note("p", OPENAI)
    headroom.note("p", {b"date": b"later", b"x-ratelimit": b"odd"})
    assert headroom.told("p") is not None


def test_what_is_shown_is_bounded() -> None:
    """A provider may send as many fields as it likes, as long as it likes."""
    headroom = Headroom(Clock().seconds)
    many = {b"ratelimit-%d" % number: b"x" * 1000 for number in range(100)}
    headroom.note("p", {b"ratelimit": b"y", **many})
    told = headroom.told("p")
    assert told is not None
    assert (len(told.fields), max(map(len, told.fields.values()))) == (32, 128)


def test_a_provider_that_is_gone_is_forgotten() -> None:
    """By a reload."""
    headroom = Headroom(Clock().seconds)
    for name in ("p", "q"):
        headroom.note(name, OPENAI)
    headroom.follow(["q"])
    assert headroom.told("p") is None
    assert headroom.told("q") is not None
