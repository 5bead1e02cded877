"""Limits of clients, under a clock that the tests turn through minutes, days and restarts."""

from __future__ import annotations

import random
from collections import Counter, deque
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmproxy.config import Client
from llmproxy.errors import ProxyError
from llmproxy.policy.limits import DAY_S, LIMITS, ClientLimits, Lease, Spent, Use, Window, limited

NOON = 20_000 * DAY_S + DAY_S // 2
"""Noon of some day in UTC, in seconds since the epoch."""


class Turned:
    """The limits of one client, ``c``, and the two clocks that they go by."""

    def __init__(self, spent: int = 0, wall: float = NOON, **limits: Any) -> None:
        self.now, self.wall = 1000.0, float(wall)
        self.limits = ClientLimits(lambda: self.now, lambda: self.wall)
        self.set(spent, **limits)

    def set(self, spent: int = 0, **limits: Any) -> None:
        """Give the client these limits, as a reload does."""
        self.client = Client(name="c", keys=(), **limits)
        known = Spent(int(self.wall // DAY_S), {"c": spent, "other": 10**9})
        self.limits.follow({"c": self.client}, known)

    def turn(self, seconds: float) -> None:
        """Let time pass."""
        self.now += seconds
        self.wall += seconds

    def ask(self, model: str | None = "m", size: int | None = 0) -> Lease:
        """Ask for one request, which passes."""
        return self.limits.admit(self.client, model, size)

    def refused(self, model: str | None = "m", size: int | None = 0) -> dict[str, str]:
        """Ask for one request, which is refused; return the fields of the refusal."""
        before = self.left()
        with pytest.raises(ProxyError) as caught:
            self.ask(model, size)
        assert (caught.value.status, caught.value.reason) == (429, "limited")
        assert self.left() == before  # a refusal costs nothing
        return {name.decode(): value.decode() for name, value in caught.value.fields}

    def known(self, tokens: int, model: str = "m") -> None:
        """Let the usual cost of a request be known, and its price be forgotten."""
        settle(self.ask(model), tokens)
        self.turn(60)

    def left(self) -> dict[str, int]:
        """Return what is left of each limit."""
        return {limit: left for (_, limit), left in self.limits.remaining().items()}


def settle(
    lease: Lease,
    reported: int,
    *,
    is_whole: bool = True,
    may_have_run: bool = True,
    seen: int = 0,
) -> int | None:
    """End a request, whose usage was reported unless something else is said."""
    if is_whole:
        return lease.settle(reported)
    return lease.settle_unknown(reported, seen, may_have_run)


# --- windows --------------------------------------------------------------------------------------


def test_a_minute_slides() -> None:
    """Each request leaves the window 60 seconds after it came, and not in steps of a minute."""
    turned = Turned(requests_per_minute=3)
    for _ in range(3):
        turned.ask()
        turned.turn(20)
    # at 60 s: the first, of 0 s, has just left
    turned.ask()
    assert turned.refused()["retry-after"] == "20"
    turned.turn(19.999)
    assert turned.refused()["retry-after-ms"] == "1"
    turned.turn(0.001)
    turned.ask()
    assert turned.refused()["retry-after"] == "20"


def test_an_idle_client_saves_nothing_up() -> None:
    """A bucket that refills would let twice as many pass at the edge of a minute."""
    turned = Turned(requests_per_minute=10)
    turned.turn(DAY_S)
    for _ in range(10):
        turned.ask()
    turned.turn(59.99)
    assert turned.refused()["retry-after-ms"] == "10"


def test_what_comes_close_together_leaves_together() -> None:
    """Within one grain the last counts: too much never passes, and little is held for longer."""
    turned = Turned(requests_per_minute=2)
    turned.ask()
    turned.turn(0.01)
    turned.ask()
    turned.turn(59.995)
    assert turned.refused()["retry-after-ms"] == "5"
    turned.turn(0.005)
    turned.ask()
    turned.ask()


@given(
    limit=st.integers(1, 5),
    steps=st.lists(st.one_of(st.floats(0, 70), st.floats(0, 0.05)), max_size=120),
)
def test_no_minute_has_more_than_its_limit(limit: int, steps: list[float]) -> None:
    """In whatever rhythm requests come; and one grain behind the minute there is room again."""
    turned = Turned(requests_per_minute=limit)
    passed: deque[float] = deque()
    for step in steps:
        turned.turn(step)
        within = sum(turned.now < at + 60 for at in passed)
        soon = sum(turned.now < at + 60 + 1 / 64 for at in passed)
        try:
            turned.ask()
        except ProxyError:
            assert soon >= limit
        else:
            assert within < limit
            passed.append(turned.now)


@given(steps=st.lists(st.floats(0, 20), min_size=2, max_size=60))
def test_who_comes_again_when_told_is_admitted(steps: list[float]) -> None:
    """``retry-after`` is when such a request passes, and the millisecond before it does not."""
    turned = Turned(requests_per_minute=2)
    for step in steps:
        turned.turn(step)
        try:
            turned.ask()
        except ProxyError:
            fields = turned.refused()
            wait = int(fields["retry-after-ms"]) / 1000
            assert 0 < wait <= 60
            assert wait <= int(fields["retry-after"]) < wait + 1
            if wait > 0.002:
                turned.turn(wait - 0.002)
                turned.refused()
            turned.turn(0.002 + 1e-9)  # floats do not add up
            turned.ask()


def test_a_window_is_bounded() -> None:
    """A million entries within a minute take no more room than one for each grain of it."""
    window = Window()
    for number in range(100_000):
        window.add(1, 10, number * 60 / 100_000)
    assert len(window) <= 3841
    window.trim(59.9)
    assert (window.requests, window.tokens) == (100_000, 1_000_000)
    window.trim(130)
    assert (window.requests, window.tokens, len(window)) == (0, 0, 0)


# --- streams --------------------------------------------------------------------------------------


def test_a_slot_is_free_again_once() -> None:
    """However often the end of a request is told."""
    turned = Turned(max_streams=2)
    first, second = turned.ask(), turned.ask()
    fields = turned.refused()
    assert (fields["x-llmproxy-limit"], fields["retry-after"]) == ("max_streams", "1")
    assert fields["x-llmproxy-remaining"] == "max_streams=0"
    assert "x-should-retry" not in fields
    for _ in range(3):
        settle(first, 0)
    assert turned.left() == {"max_streams": 1}
    turned.ask()
    turned.refused()
    settle(second, 0)
    turned.ask()


# --- tokens ---------------------------------------------------------------------------------------


def test_what_is_reserved_is_the_usual_cost() -> None:
    """Nine in ten of the last requests of this client for this model cost no more."""
    turned = Turned(tokens_per_day=10**9)
    for tokens in (*range(100, 0, -1), *[7] * 20, *range(1, 13)):
        settle(turned.ask(), tokens)
    assert turned.ask().reserved == 9  # of 20 sevens and 1 to 12, 29 are 9 or less
    settle(turned.ask("other"), 5000)
    assert turned.ask("other").reserved == 5000
    assert turned.ask().reserved == 9


@pytest.mark.parametrize(
    ("size", "tokens"), [(0, 1000), (4000, 2000), (10**8, 33_768)], ids=["none", "text", "large"]
)
def test_the_first_cost_is_guessed_from_the_size(size: int, tokens: int) -> None:
    """Text, and a response; a large body is an image as likely."""
    turned = Turned(tokens_per_day=10**9)
    assert turned.ask(size=size).reserved == tokens


def test_a_budget_is_not_full_at_nothing_spent() -> None:
    """Once the first cost is known, the whole budget can be used; no request reserves more."""
    turned = Turned(tokens_per_day=1000)
    settle(turned.ask(size=400_000), 50)  # its guess is beyond the budget
    for _ in range(19):
        settle(turned.ask(size=400_000), 50)
    assert turned.left() == {"tokens_per_day": 0}
    turned.refused()


def test_a_full_budget_is_full_for_what_costs_nothing() -> None:
    """Its cost is not certain; and who is over a budget does not come near it again."""
    turned = Turned(tokens_per_day=100)
    settle(turned.ask("free"), 0)
    settle(turned.ask("dear"), 100)
    turned.refused("free")


def test_a_budget_below_the_usual_cost_lets_one_pass() -> None:
    """A request that costs more than the limit passes where nothing else counts."""
    turned = Turned(tokens_per_minute=100)
    turned.known(500)
    lease = turned.ask()
    assert turned.refused()["retry-after"] == "60"
    settle(lease, 500)
    turned.turn(60)
    turned.ask()


@pytest.mark.parametrize("limit", ["tokens_per_minute", "tokens_per_day"])
def test_parallel_requests_do_not_go_past_a_budget(limit: str) -> None:
    """What is under way counts at what it usually costs."""
    turned = Turned(**{limit: 1100})
    turned.known(100)
    if limit == "tokens_per_minute":
        turned.turn(60)
    leases = []
    while turned.left()[limit] >= 100:
        leases.append(turned.ask())
    assert len(leases) == (11 if limit == "tokens_per_minute" else 10)
    assert turned.refused()["x-llmproxy-limit"] == limit
    for lease in leases:
        settle(lease, 100)
    assert turned.left() == {limit: 0}
    turned.refused()


def test_what_runs_may_cost_less_so_come_again_soon() -> None:
    """Where only reservations stand in the way of a day, nobody is sent away until midnight."""
    turned = Turned(tokens_per_day=1000)
    turned.known(500)
    lease = turned.ask()
    fields = turned.refused()
    assert (fields["retry-after"], "x-should-retry" in fields) == ("1", False)
    settle(lease, 0)
    lease = turned.ask()
    settle(lease, 500)
    assert turned.refused()["retry-after"] == str(DAY_S // 2 - 60)


@pytest.mark.parametrize(
    ("end", "counts"),
    [
        ({"reported": 70, "is_whole": True}, 70),
        ({"reported": 0, "is_whole": True}, 0),
        ({"reported": 900, "is_whole": True}, 900),
        ({"reported": 70}, 200),
        ({"reported": 270}, 270),
        ({"reported": 70, "seen": 5000}, 5000),
        ({"may_have_run": False}, 0),
    ],
    ids=["whole", "whole-zero", "whole-more", "part", "part-more", "many-events", "never-asked"],
)
def test_every_end_settles(end: dict[str, Any], counts: int) -> None:
    """What counts then is what was used, and at least the usual cost where nobody knows that."""
    turned = Turned(tokens_per_minute=10_000, tokens_per_day=10_000, max_streams=1)
    turned.known(200)
    lease = turned.ask()
    end = {"reported": 0, "is_whole": False, **end}
    assert settle(lease, **end) == counts
    assert settle(lease, **end) is None
    assert turned.left() == {
        "max_streams": 1,
        "tokens_per_minute": 10_000 - counts,
        "tokens_per_day": 10_000 - 200 - counts,
    }


def test_always_to_cancel_is_not_free() -> None:
    """Nothing is ever reported of what is cancelled; each counts at its guess."""
    turned = Turned(tokens_per_day=10_000)
    for _ in range(10):
        settle(turned.ask(), 0, is_whole=False)
    assert turned.left() == {"tokens_per_day": 0}
    assert turned.refused()["x-should-retry"] == "false"


def test_a_long_request_counts_in_the_minute_of_its_beginning() -> None:
    """What it cost beyond its reservation counts when that is known; nothing is lost."""
    turned = Turned(tokens_per_minute=1000)
    turned.known(100)
    cheap, dear = turned.ask(), turned.ask()
    turned.turn(61)
    assert turned.left() == {"tokens_per_minute": 1000}
    settle(cheap, 40)
    assert turned.left() == {"tokens_per_minute": 1000}
    settle(dear, 700)
    assert turned.left() == {"tokens_per_minute": 400}
    turned.turn(60)
    assert turned.left() == {"tokens_per_minute": 1000}


def test_what_costs_no_tokens_reserves_none() -> None:
    """A list of models counts as a request, and a full budget of tokens does not refuse it."""
    turned = Turned(tokens_per_day=10, requests_per_minute=2, max_streams=2)
    settle(turned.ask(), 10)
    turned.refused()
    lease = turned.ask(size=None)
    assert lease.reserved is None
    assert turned.left() == {"tokens_per_day": 0, "requests_per_minute": 0, "max_streams": 1}
    assert settle(lease, 5) is None
    assert turned.refused(size=None)["x-llmproxy-limit"] == "requests_per_minute"


def test_without_a_limit_of_tokens_none_count() -> None:
    """The record says nothing of tokens that count for no limit."""
    turned = Turned(max_streams=1)
    assert settle(turned.ask(), 10) is None


def test_models_that_are_remembered_are_bounded() -> None:
    """Callers write what they like; the costs of the last 64 models are known."""
    turned = Turned(tokens_per_day=10**12)
    for number in range(100):
        settle(turned.ask(f"m{number}"), 5)
    turned.turn(1)
    assert turned.ask("m36").reserved == 5
    assert turned.ask("m35").reserved == 1000
    settle(turned.ask("one more"), 5)
    assert turned.ask("m36").reserved == 5  # it was asked for just now
    assert turned.ask("m37").reserved == 1000
    settle(turned.ask("x" * 257), 7)
    assert turned.ask("y" * 100_000).reserved == turned.ask(None).reserved == 7


# --- days -----------------------------------------------------------------------------------------


def test_a_day_ends_at_midnight_in_utc() -> None:
    """The budget is whole again in that second, on each of several days."""
    turned = Turned(tokens_per_day=100, wall=NOON)
    for _ in range(5):
        settle(turned.ask(), 100)
        midnight = (turned.wall // DAY_S + 1) * DAY_S
        turned.turn(midnight - turned.wall - 90.5)
        fields = turned.refused()
        assert (fields["retry-after"], fields["retry-after-ms"]) == ("91", "90500")
        assert fields["x-should-retry"] == "false"
        turned.turn(90.25)
        fields = turned.refused()
        assert (fields["retry-after"], "x-should-retry" in fields) == ("1", False)
        turned.turn(0.25)
        assert turned.left() == {"tokens_per_day": 100}


def test_a_request_over_midnight_counts_on_the_day_it_began() -> None:
    """As in the reports of the ledger; what it reserved is gone from the new day."""
    turned = Turned(tokens_per_day=1000, wall=NOON + DAY_S // 2 - 1)
    turned.known(10)  # which is over midnight
    turned.set(tokens_per_day=1000)
    lease = turned.ask()
    turned.turn(DAY_S)
    assert turned.left() == {"tokens_per_day": 1000}
    settle(lease, 800)
    assert turned.left() == {"tokens_per_day": 1000}


def test_a_clock_that_is_set_back_over_midnight_gives_no_second_budget() -> None:
    """The day that has begun goes on, and ends at its own end."""
    turned = Turned(tokens_per_day=100, wall=NOON + DAY_S // 2)
    settle(turned.ask(), 100)
    turned.wall -= 5
    assert turned.refused()["retry-after"] == str(DAY_S + 5)


def test_what_was_used_before_the_start_counts() -> None:
    """Only that of this client, and of this day."""
    turned = Turned(spent=90, tokens_per_day=100)
    assert turned.left() == {"tokens_per_day": 10}
    old = ClientLimits(lambda: turned.now, lambda: turned.wall)
    old.follow({"c": turned.client}, Spent(19_999, {"c": 90}))
    assert old.remaining() == {("c", "tokens_per_day"): 100}


# --- reloads --------------------------------------------------------------------------------------


def test_a_reload_forgets_nothing() -> None:
    """A changed limit counts at once, for what was used before it, too."""
    turned = Turned(tokens_per_day=2000, requests_per_minute=5)
    lease = turned.ask()
    settle(turned.ask(), 60)
    turned.set(spent=90, tokens_per_day=50, requests_per_minute=10, max_streams=2)
    settle(lease, 20)
    assert turned.left() == {"tokens_per_day": 0, "requests_per_minute": 8, "max_streams": 2}
    turned.set(spent=90, tokens_per_day=200)
    assert turned.left() == {"tokens_per_day": 120}


def test_a_limit_that_comes_with_a_reload_knows_the_ledger() -> None:
    """The counts of the day are asked for if such a limit is new, and only then."""
    turned = Turned(max_streams=1)
    wanted = Client(name="c", keys=(), tokens_per_day=100)
    assert turned.limits.unknown({"c": wanted})
    assert not turned.limits.unknown({"c": turned.client})
    turned.set(spent=30, tokens_per_day=100)
    assert turned.left() == {"tokens_per_day": 70}
    assert not turned.limits.unknown({"c": wanted})
    assert turned.limits.unknown({"d": wanted})


def test_without_a_ledger_a_new_limit_knows_what_another_one_counted() -> None:
    """The tokens of a minute are those of a day, too."""
    turned = Turned(tokens_per_minute=5000)
    settle(turned.ask(), 40)
    turned.set(tokens_per_day=100)
    assert turned.left() == {"tokens_per_day": 60}


def test_a_client_that_loses_its_limits_is_forgotten_when_it_rests() -> None:
    """What runs of it meanwhile still holds its slots, if the limits come back."""
    turned = Turned(max_streams=5, requests_per_minute=5)
    lease = turned.ask()
    turned.limits.follow({})
    assert turned.limits.remaining() == {}
    turned.set(max_streams=5, requests_per_minute=5)
    assert turned.left() == {"max_streams": 4, "requests_per_minute": 4}
    settle(lease, 0)
    turned.limits.follow({})
    turned.set(max_streams=5, requests_per_minute=5)
    assert turned.left() == {"max_streams": 5, "requests_per_minute": 5}


def test_only_clients_with_limits_are_asked_for() -> None:
    """The others cost nothing."""
    free = Client(name="free", keys=())
    assert limited({"free": free}) == {}
    for limit in LIMITS:
        one: dict[str, Any] = {limit: 1}
        client = Client(name="c", keys=(), **one)
        assert limited({"free": free, "c": client}) == {"c": client}


# --- refusals -------------------------------------------------------------------------------------


def test_the_longest_wait_is_told() -> None:
    """When all limits let such a request pass; and what is left of each stands beside it."""
    turned = Turned(max_streams=1, requests_per_minute=1, tokens_per_minute=10, tokens_per_day=5)
    lease = turned.ask()
    fields = turned.refused()
    assert (fields["x-llmproxy-limit"], fields["retry-after"]) == ("tokens_per_minute", "60")
    settle(lease, 5)
    fields = turned.refused()
    assert fields["x-llmproxy-limit"] == "tokens_per_day"
    left = "max_streams=1, requests_per_minute=0, tokens_per_minute=5, tokens_per_day=0"
    assert fields["x-llmproxy-remaining"] == left
    assert turned.limits.refused == {("c", "tokens_per_minute"): 1, ("c", "tokens_per_day"): 1}


def test_the_text_says_what_is_allowed() -> None:
    """In words for the caller; the operator sees the client's name, too."""
    turned = Turned(requests_per_minute=1)
    turned.ask()
    turned.turn(10.5)
    with pytest.raises(ProxyError) as caught:
        turned.ask()
    text = "This client may make 1 request in a minute; try again in 50 s."
    assert str(caught.value) == text
    assert caught.value.cause == "requests_per_minute"
    assert caught.value.detail == "requests_per_minute = 1 of client c"


def test_an_operator_sees_what_each_client_uses() -> None:
    """More than all of a limit may be used; less than nothing is never left."""
    turned = Turned(max_streams=2, tokens_per_day=100)
    lease = turned.ask()
    assert turned.limits.use("c") == {
        "max_streams": Use(limit=2, used=1, remaining=1, here=1),
        "tokens_per_day": Use(limit=100, used=1000, remaining=0, here=1000),
    }
    assert turned.limits.use("other") == {}
    settle(lease, 30)
    assert turned.limits.use("c")["tokens_per_day"] == Use(
        limit=100, used=30, remaining=70, here=30
    )


# --- many lives -----------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(5))
def test_after_many_lives_nothing_is_held(seed: int) -> None:
    """Whatever comes between, every slot and reservation is back, and the day's sum is exact."""
    rng = random.Random(seed)
    limits = {"requests_per_minute": 30, "tokens_per_minute": 30_000, "tokens_per_day": 10**6}
    turned = Turned(max_streams=9, **limits)
    running: list[tuple[Lease, int]] = []
    counted: Counter[int] = Counter()
    refused = 0
    for _ in range(5000):
        turned.turn(rng.choice((0, 0.001, 0.3, 5, 120)))
        if rng.random() < 0.6:
            try:
                lease = turned.ask(rng.choice("abc"), rng.choice((0, 500, 90_000, None)))
                running.append((lease, turned.limits.today()))
            except ProxyError:
                refused += 1
        elif running:
            lease, day = running.pop(rng.randrange(len(running)))
            counted[day] += end_of(rng, lease)
        if rng.random() < 0.01:
            turned.set(**{**limits, "max_streams": rng.choice((3, 9))})
    for lease, day in running:
        counted[day] += end_of(rng, lease)
    assert len(counted) > 1
    assert refused > 100
    left = turned.left()
    assert left["max_streams"] == turned.client.max_streams
    assert left["tokens_per_day"] == max(0, 10**6 - counted[turned.limits.today()])
    turned.turn(60.1)
    left = turned.left()
    assert (left["tokens_per_minute"], left["requests_per_minute"]) == (30_000, 30)


def end_of(rng: random.Random, lease: Lease) -> int:
    """End a request in one of the ways in which requests end, maybe twice."""
    end: dict[str, Any] = {
        "reported": rng.choice((0, 50, 3000)),
        "is_whole": rng.random() < 0.5,
        "may_have_run": rng.random() < 0.8,
        "seen": rng.choice((0, 400)),
    }
    tokens = settle(lease, **end)
    assert settle(lease, **end) is None
    return tokens or 0
