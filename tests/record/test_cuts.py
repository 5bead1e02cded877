"""Cuts in ledgers: who broke a request off, and how long after what."""

from __future__ import annotations

from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from llmproxy.record.cuts import Cut, cuts_of
from llmproxy.record.ledger import Ledger
from llmproxy.record.ledger_source import Files
from llmproxy.record.ledger_steps import LedgerError
from llmproxy.record.trace import Attempt, Trace
from tests.support.records import trace

NOW = 1_793_577_600.0  # 2026-11-02T00:00:00Z


def cuts(folder: Path, *traces: Trace, since: str = "") -> list[Cut]:
    """Return the cuts of a ledger with these traces."""
    path = str(folder / "ledger")
    with closing(Ledger(path, keep_s=None, wall=lambda: NOW)) as ledger:
        ledger.put(list(traces))
    return cuts_of(Files([path]), since)


def broken(number: int = 1, **fields: Any) -> Trace:
    """Return a record of a request whose client left, unless it says something else."""
    given: dict[str, Any] = {
        "route": "r",
        "provider": "p",
        "end_reason": "client_gone",
        "duration_s": 70.0,
        "queued_s": 1.0,
    }
    return trace(number, **given | fields)


def test_behind_the_last_chunk(tmp_path: Path) -> None:
    """The silence is that behind it; the age is without the time in a queue."""
    found = cuts(tmp_path, broken(head_s=2.0, first_chunk_s=3.0, last_chunk_s=10.0))
    assert found == [Cut("r", "p", "client", waited=False, silence_s=60.0, age_s=69.0)]


def test_behind_the_head(tmp_path: Path) -> None:
    """The head is a byte of the response, too."""
    found = cuts(tmp_path, broken(head_s=2.0, end_reason="upstream_broken"))
    assert found == [Cut("r", "p", "provider", waited=False, silence_s=68.0, age_s=69.0)]


def test_before_any_byte(tmp_path: Path) -> None:
    """A client has waited since its request; a try of a provider's, since that was sent."""
    tries = [Attempt("p", "upstream_broken", 30.0), Attempt("q", "upstream_broken", 38.5)]
    found = cuts(
        tmp_path,
        broken(1),
        broken(2, end_reason="upstream_broken", provider="q", attempts=tries),
        broken(3, end_reason="complete", attempts=[tries[0], Attempt("q", "ok", 1.0)]),
    )
    assert found == [
        Cut("r", "p", "client", waited=True, silence_s=69.0, age_s=69.0),
        Cut("r", "p", "provider", waited=True, silence_s=30.0, age_s=30.0),
        Cut("r", "q", "provider", waited=True, silence_s=38.5, age_s=38.5),
        Cut("r", "p", "provider", waited=True, silence_s=30.0, age_s=30.0),
    ]


@pytest.mark.parametrize(
    "fields",
    [
        {"end_reason": "complete"},
        {"end_reason": "upstream_timeout"},
        {"end_reason": "upstream_idle"},
        {"end_reason": "drained"},
        {"end_reason": "client_stalled"},
        {"tunnel": "tunnelled", "route": None},
        {"route": None},
        {"status": 101},
    ],
)
def test_what_is_no_cut(tmp_path: Path, fields: dict[str, Any]) -> None:
    """Whole responses, limits of the proxy's own, tunnels, and WebSockets, which people close."""
    assert cuts(tmp_path, broken(**fields)) == []


def test_since(tmp_path: Path) -> None:
    """What began earlier does not count."""
    traces = [broken(day, time=f"2026-11-0{day}T12:00:00.000Z") for day in (1, 2, 3)]
    assert len(cuts(tmp_path, *traces, since="2026-11-02T00:00:00.000Z")) == 2


def test_a_file_that_is_no_ledger(tmp_path: Path) -> None:
    """The error names it."""
    with pytest.raises(LedgerError, match="nowhere"):
        cuts_of(Files([str(tmp_path / "nowhere")]))
