"""``make bench-sticky``, in small: what it counts, and that it would notice wrong counts."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from bench import sticky
from bench.sticky import Count, Outcome

FEW = ["--providers", "2", "--conversations", "2", "--turns", "4", "--at-once", "1"]


def test_sessions_find_more_of_their_prompts(capsys: pytest.CaptureFixture[str]) -> None:
    """Both runs count the same tokens; with stickiness only what is new is not found."""
    assert sticky.main([*FEW, "--opening", "160", "--question", "16"]) == 0
    lines = capsys.readouterr().out.splitlines()
    off, session = (line.replace(",", "").split() for line in lines if line.startswith("sticky ="))
    # Prompts of 160, 192, 224 and 256 words: each finds the one before it, or the one before that.
    assert (off[2], session[2]) == ('"off"', '"session"')
    assert [int(word) for word in off[3:6]] == [2 * 832, 2 * 352, 2 * 480]
    assert [int(word) for word in session[3:6]] == [2 * 832, 2 * 576, 2 * 256]
    assert lines[-1] == "the daemon's records, the SDKs and the providers count the same"


def test_counts_that_differ_are_doubted() -> None:
    """So are requests that are missing."""
    asked = sticky.options(FEW)
    count = Count(100, 50)
    assert sticky.doubts(Outcome(count, count, count, 8), asked) == []
    assert sticky.doubts(Outcome(count, count, count, 7), asked) == [
        "7 whole responses by the records"
    ]
    for others in ((count, Count(100, 49)), (Count(99, 50), count)):
        (doubt,) = sticky.doubts(Outcome(count, *others, 8), asked)
        assert doubt.startswith("counts differ")


def test_records_are_added_up_by_their_dialect(tmp_path: Path) -> None:
    """Anthropic's input does not include what was cached."""
    counts = {"input_tokens": 10, "cache_read_tokens": 4, "cache_write_tokens": 3}
    records = [
        {"route": "openai", "end_reason": "complete", **counts},
        {"route": "anthropic", "end_reason": "client_gone", **counts},
    ]
    trace = tmp_path / "trace.jsonl"
    trace.write_text("".join(json.dumps(record) + "\n" for record in records))
    assert sticky.recorded(trace) == (Count(10 + 17, 8), 1)


def test_a_number_below_one_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    """Nothing could be counted."""
    with pytest.raises(SystemExit) as ended:
        sticky.options(["--turns", "0"])
    assert ended.value.code == 2
    assert "above zero" in capsys.readouterr().err
