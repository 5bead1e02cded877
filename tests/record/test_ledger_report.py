"""Reports: their sums are those of the traces of all instances, at any time."""

from __future__ import annotations

import subprocess
import sys
import tempfile
from collections import defaultdict
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmproxy.record.ledger import Ledger
from llmproxy.record.ledger_report import (
    GROUPS,
    Checkpoint,
    Totals,
    checkpoints_of,
    refused_in,
    tokens_by_client,
    usage_of,
)
from llmproxy.record.ledger_source import Files
from llmproxy.record.ledger_steps import TOKENS, LedgerError
from llmproxy.record.trace import Trace
from tests.support.made_records import TRACES, numbered
from tests.support.records import trace
from tests.support.sockets import WAIT

ROOT = Path(__file__).parents[2]


@contextmanager
def ledgers(*batches: list[list[Trace]]) -> Iterator[list[str]]:
    """Write these traces to ledgers, batch by batch; yield their paths."""
    with tempfile.TemporaryDirectory() as folder:
        paths = [f"{folder}/{number}" for number in range(len(batches))]
        for path, of_one in zip(paths, batches, strict=True):
            with closing(Ledger(path, keep_s=None, wall=lambda: 0.0)) as ledger:
                for batch in of_one:
                    ledger.put(batch)
        yield paths


def totals_of(traces: list[Trace]) -> Totals:
    """Return the totals of these traces."""
    totals = Totals(
        len(traces),
        sum(one.is_complete for one in traces),
        sum(one.usage != "reported" for one in traces),
    )
    for name in TOKENS:
        known = [count for one in traces if (count := getattr(one, name)) is not None]
        setattr(totals, name, sum(known) if known else None)
    return totals


def grouped(traces: list[Trace], by: tuple[str, ...]) -> dict[Any, Totals]:
    """Return the totals by group."""
    groups: dict[Any, list[Trace]] = defaultdict(list)
    for one in traces:
        groups[tuple(one.time[:10] if name == "day" else getattr(one, name) for name in by)].append(
            one
        )
    return {group: totals_of(some) for group, some in groups.items()}


@settings(max_examples=settings().max_examples * 2 // 5)
@given(
    st.lists(TRACES, max_size=3),
    st.lists(TRACES, max_size=2),
    st.lists(st.sampled_from(sorted(GROUPS)), min_size=1, max_size=4, unique=True),
    st.sampled_from(["", "2026-11-02", "2026-11-03T12:00:00.003Z", "2027"]),
)
def test_sums_are_those_of_the_traces(
    one: list[list[Trace]], two: list[list[Trace]], by: list[str], since: str
) -> None:
    """Batches, groups and instances change no sum; an empty ledger has none.

    What the proxy refused is no usage: it is counted by itself, whatever model it named.  Nor is
    the preflight of a browser.
    """
    every = numbered(one, two)
    with ledgers(one, two) as paths:
        found, refused = usage_of(Files(paths), by, since), refused_in(Files(paths), since)
    later = [one for one in every if one.time >= since]
    served = [one for one in later if one.end_reason != "rejected"]
    assert refused == len(later) - len(served)
    asked = [
        one
        for one in served
        if (one.method, one.provider, one.end_reason) != ("OPTIONS", None, "complete")
    ]
    assert found == grouped(asked, tuple(by))


@settings(max_examples=settings().max_examples * 2 // 5)
@given(st.lists(TRACES, max_size=3), st.lists(TRACES, max_size=2))
def test_checkpoints_are_those_of_the_traces(
    one: list[list[Trace]], two: list[list[Trace]]
) -> None:
    """Each session of a known client has its totals; its last trace was written last."""
    every = numbered(one, two)
    named = [trace for trace in every if None not in (trace.session, trace.client)]
    with ledgers(one, two) as paths:
        found = checkpoints_of(Files(paths))
        first = checkpoints_of(Files(paths[:1]))
    assert {(some.session, some.client): some.totals for some in found} == grouped(
        named, ("session", "client")
    )
    assert [some.last_time for some in found] == sorted(
        (some.last_time for some in found), reverse=True
    )
    for some in first:
        its = [
            trace
            for batch in one
            for trace in batch
            if (trace.session, trace.client) == (some.session, some.client)
        ]
        assert some.last_trace == its[-1].id
        assert some.first_time == min(trace.time for trace in its)
        assert some.last_time == max(trace.time for trace in its)


def test_the_later_instance_has_the_last_trace() -> None:
    """A session on two instances has one checkpoint."""
    early = trace(1, session="s", client="c", time="2026-11-01T00:00:00.000Z", input_tokens=1)
    late = trace(2, session="s", client="c", time="2026-11-02T00:00:00.000Z", input_tokens=2)
    with ledgers([[late]], [[early]]) as paths:
        (found,) = checkpoints_of(Files(paths))
        assert checkpoints_of(Files(paths), "2026-11-03") == []
    assert found == Checkpoint(
        "s", "c", Totals(2, 0, 2, 3), "2", "2026-11-01T00:00:00.000Z", "2026-11-02T00:00:00.000Z"
    )


def test_groups_are_in_order() -> None:
    """Groups are sorted by name; the group without a name comes first."""
    traces = [trace(1, client=client) for client in ("b", None, "a")]
    with ledgers([traces]) as paths:
        assert list(usage_of(Files(paths), ["client"])) == [(None,), ("a",), ("b",)]


def test_a_ledger_that_breaks_while_it_is_read_is_reported(tmp_path: Path) -> None:
    """The error has the name of the file."""
    path = tmp_path / "ledger"
    with closing(Ledger(str(path), keep_s=None, wall=lambda: 0.0)) as ledger:
        ledger.put([trace(number) for number in range(2000)])
    whole = path.read_bytes()
    path.write_bytes(whole[:8192] + b"\xff" * (len(whole) - 8192))
    with pytest.raises(LedgerError, match=r"ledger: .*malformed"):
        usage_of(Files([str(path)]), ["client"])


def test_tokens_of_a_day_are_those_that_count() -> None:
    """What counted for limits, else what was reported; nothing of before, or of nobody."""
    traces = [
        trace(1, time="2026-11-01T23:59:59.999Z", client="a", counted_tokens=1),
        trace(2, time="2026-11-02T00:00:00.000Z", client="a", counted_tokens=10, input_tokens=5),
        trace(3, time="2026-11-02T00:00:00.000Z", client="a", input_tokens=100),
        trace(4, time="2026-11-02T12:00:00.000Z", client="a", input_tokens=1, output_tokens=200),
        trace(5, time="2026-11-02T12:00:00.000Z", client="a", counted_tokens=0, output_tokens=9),
        trace(6, time="2026-11-02T12:00:00.000Z", client="b"),
        trace(7, time="2026-11-02T12:00:00.000Z", counted_tokens=7),
    ]
    with ledgers([traces]) as (path,):
        assert tokens_by_client(Files([path]), "2026-11-02T00:00:00.000Z") == {"a": 311, "b": 0}


READER = """
import sys
from llmproxy.record.ledger_report import checkpoints_of, usage_of
from llmproxy.record.ledger_source import Files
path = sys.argv[1]
seen = 0
while seen < 2000:
    (totals,) = usage_of(Files([path]), ["client"]).values()
    (checkpoint,) = checkpoints_of(Files([path]))
    assert totals.requests >= seen and totals.requests % 20 == 0, totals
    assert totals.input_tokens == 3 * totals.requests
    assert checkpoint.totals.requests >= totals.requests
    assert checkpoint.totals.input_tokens == 3 * checkpoint.totals.requests
    seen = totals.requests
    print(seen, flush=True)
"""


def test_two_read_while_one_writes(tmp_path: Path) -> None:
    """A reader sees whole batches only, and holds up neither writer nor reader."""
    path = tmp_path / "ledger"
    with closing(Ledger(str(path), keep_s=None, wall=lambda: 0.0)) as ledger:
        batch = [trace(one, client="c", session="s", input_tokens=3) for one in range(20)]
        ledger.put(batch)
        readers = [
            subprocess.Popen(
                [sys.executable, "-c", READER, str(path)],
                cwd=ROOT,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
            for _ in range(2)
        ]
        for reader in readers:
            assert reader.stdout is not None
            assert reader.stdout.readline() == "20\n"
        for _ in range(99):
            ledger.put(batch)  # no Retry: readers take no lock that a writer wants
        for reader in readers:
            output, errors = reader.communicate(timeout=WAIT)
            assert reader.returncode == 0, errors
            assert output.splitlines()[-1] == "2000"


def test_a_websocket_is_counted_by_its_responses(tmp_path: Path) -> None:
    """Its own record has their sums; one without responses is a request like any other."""
    path = str(tmp_path / "ledger")
    ledger = Ledger(path, keep_s=None, wall=lambda: 0.0)
    fields = {"client": "a", "session": "s", "time": "2026-11-02T12:00:00.000Z"}
    ledger.put(
        [
            trace(1, responses=2, output_tokens=30, counted_tokens=30, **fields),
            trace(2, output_tokens=10, counted_tokens=10, **fields),
            trace(3, output_tokens=20, counted_tokens=20, **fields),
            trace(4, responses=0, **fields),
        ]
    )
    ledger.close()
    totals = usage_of(Files([path]), ["client"])[("a",)]
    assert (totals.requests, totals.output_tokens) == (3, 30)
    assert tokens_by_client(Files([path]), "") == {"a": 30}
    (checkpoint,) = checkpoints_of(Files([path]))
    assert (checkpoint.totals.requests, checkpoint.totals.output_tokens) == (3, 30)
