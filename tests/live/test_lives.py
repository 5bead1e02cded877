"""Thousands of random lives through a whole proxy: connects, requests, leavings, faults.

Each life is drawn from a seed (``tests/support/lives``) and lived over real sockets.  What a client
saw and what was recorded must fit what was drawn; in the end nothing may be left.  A failure prints
what to set to live the same lives again::

    LLMPROXY_TEST_SEED=7 LLMPROXY_LIVES_ONLY=41,97 pytest tests/live/test_lives.py
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import pytest_twisted
from twisted.internet.defer import Deferred

from tests.support.lives.draw import draw_life
from tests.support.lives.left import NOTHING, delayed_calls, everything
from tests.support.lives.messages import steps
from tests.support.lives.plan import CURT, IMPATIENT, Life
from tests.support.lives.verdict import LifeVerdict, Record, Records
from tests.support.lives.world import World, open_world
from tests.traps.waits import until

pytestmark = pytest.mark.filterwarnings(
    # Twisted's ssl: endpoint hands pyOpenSSL objects that pyOpenSSL would have otherwise by now.
    "ignore:Passing pyOpenSSL:DeprecationWarning"
)

LIVES = int(os.environ.get("LLMPROXY_LIVES", "5000"))
SEED = int(os.environ["LLMPROXY_TEST_SEED"])  # tests/conftest.py

ENDS = {
    "complete",
    "client_gone",
    "client_stalled",
    "upstream_refused",
    "upstream_unreachable",
    "upstream_tls",
    "upstream_timeout",
    "upstream_idle",
    "upstream_broken",
    "upstream_protocol",
    "unfinished",
    "rejected",
}
"""Every way in which a request of these lives may end."""

STOPPED = 400
"""Lives of the run that is stopped in the middle."""

SETTLED = 20.0
"""Seconds within which everything is over behind the last life."""


ENOUGH = 2000
"""Lives among which each of these ends happens many times."""

FOUND = {
    # Behind a response without framing that broke, and was reset, came another request.
    3: [3906, 4629],
    # A client with a closed window has shut both ways.
    4: [137, 4223],
    5: [4627],
}
"""Lives by their seed."""

_SHOWN = 5
"""Lives that a failure prints."""


def drawn(count: int) -> list[Life]:
    """Return the lives of a run: so many, or those that are asked for."""
    only = os.environ.get("LLMPROXY_LIVES_ONLY", "")
    numbers = [int(number) for number in only.split(",")] if only else range(count)
    return [draw_life(SEED, number) for number in numbers]


def judge(world: World, *, cut: bool = False) -> None:
    """Fail where a life or its records are not what they had to be."""
    records = world.records()
    found = Records(records)
    failed: dict[int, list[str]] = {}
    for caller in world.callers:
        complaints = list(LifeVerdict(caller, found, world.provider.heard, cut=cut).complaints())
        complaints += [
            text for name, text in world.provider.complaints if name[0] == caller.life.number
        ]
        if complaints:
            failed[caller.life.number] = complaints
    report = [f"{len(failed)} of {len(world.lives)} lives went wrong; to live them again:"]
    only = ",".join(map(str, list(failed)[:50]))
    report.append(f"LLMPROXY_TEST_SEED={SEED} LLMPROXY_LIVES_ONLY={only}")
    for number, complaints in list(failed.items())[:_SHOWN]:
        report += [repr(world.lives[number]), *(f"    {text}" for text in complaints)]
        report += [f"    {record}" for record in records if f"/{number}/" in record["path"]]
    assert not failed, "\n".join(report)
    assert not world.endless, f"seed {SEED}: lives without an end: {world.endless[:_SHOWN]}"
    unknown = [record for record in records if not _is_known(record, world)]
    assert not unknown, f"seed {SEED}: records of nothing that was asked: {unknown[:_SHOWN]}"


def _is_known(record: Record, world: World) -> bool:
    """Tell whether a record is of a life's request, or of a head that is not one."""
    if not record["path"]:
        return record["end_reason"] == "rejected" and not record["attempts"]
    _, _, life, number, *_ = record["path"].split("/")
    return int(life) in world.lives and int(number) < len(world.lives[int(life)].asks)


def assert_counted(world: World) -> None:
    """The counters agree with each other and with the trace."""
    records = world.records()
    assert world.total("llmproxy_records_lost_total") == 0
    assert world.total("llmproxy_requests_total") == len(records)
    assert world.total("llmproxy_ended_total") == len(records)
    assert len({record["id"] for record in records}) == len(records)


@pytest.mark.timeout(300)
@pytest_twisted.ensureDeferred
async def test_no_life_leaves_anything_behind(tmp_path: Path) -> None:
    """Every client sees what it must, each request has its record, and nothing is left."""
    at_first = await everything()
    async with open_world(tmp_path, drawn(LIVES)) as world:
        before = await everything()
        await world.live()
        await until(lambda: not (world.busy() or delayed_calls() - before.calls), SETTLED)
        left, after = world.busy(), await everything()
        await world.stop()

        judge(world)
        assert_counted(world)
        assert left == {}
        assert after.more_than(before) == NOTHING
        ends = {record["end_reason"] for record in world.records()}
        assert ends <= ENDS
        assert ends == ENDS or len(world.lives) < ENOUGH
        waited = sum(record["queued_s"] > 0 for record in world.records())
        assert waited > ENOUGH // 200 or len(world.lives) < ENOUGH
        leavings = {record["on_disconnect"] for record in world.records()}
        assert leavings == {None, "cancel", "drain"} or len(world.lives) < ENOUGH
    assert (await everything()).more_than(at_first)[1:] == NOTHING[1:]


def test_no_deadline_falls_between_two_pieces() -> None:
    """Where a deadline is short, the provider sends all that it will send at once.

    A machine that stands still makes a gap between two pieces as long as it likes.
    """
    curt = {
        (ask, life.number, number)
        for life in (draw_life(SEED, number) for number in range(ENOUGH))
        for number, ask in enumerate(life.asks)
        if ask.route in (*IMPATIENT, *CURT)
    }
    counts = {len(steps(*asked)) for asked in curt}
    assert counts == {0, 1}, "silence from the beginning, and after one piece"


@pytest.mark.timeout(120)
@pytest_twisted.ensureDeferred
async def test_lives_that_went_wrong_once(tmp_path: Path) -> None:
    """What other seeds have found stays found, whatever the seed is."""
    lives = [draw_life(seed, number) for seed, numbers in FOUND.items() for number in numbers]
    async with open_world(tmp_path, lives) as world:
        await world.live()
        await until(lambda: not world.busy(), SETTLED)
        await world.stop()
        judge(world)


@pytest.mark.timeout(120)
@pytest_twisted.ensureDeferred
async def test_a_stop_in_the_middle_of_lives_leaves_nothing_behind(tmp_path: Path) -> None:
    """A proxy that is stopped amid lives cuts them, records each, and leaves nothing either."""
    at_first = await everything()
    async with open_world(tmp_path, drawn(STOPPED)) as world:
        living = Deferred.fromCoroutine(world.live())
        await until(lambda: len(world.callers) > STOPPED // 2, SETTLED)
        await world.stop()
        left = world.gauges()
        await living
        await until(lambda: not world.busy(), SETTLED)
        after = await everything()

        judge(world, cut=True)
        assert_counted(world)
        assert left == {}
        assert world.busy() == {}
        # What was there at the start is hidden from the collector while the service runs.
        assert [name for name in after.more_than(at_first).objects if name != "Deferred"] == []
        assert {record["end_reason"] for record in world.records()} <= ENDS | {"drained"}
    assert (await everything()).more_than(at_first)[1:] == NOTHING[1:]
