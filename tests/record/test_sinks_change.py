"""The sinks from one configuration to the next: nothing is lost, kept twice, or waited for."""

from __future__ import annotations

import os
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from llmproxy.config import Trace as TraceConfig
from llmproxy.record.sinks import Sinks
from llmproxy.record.writer import Writer
from tests.record.conftest import write
from tests.record.test_sinks import Fields, opened, sent_to
from tests.support.collector import OtlpCollector
from tests.support.records import eventually, ids_in, ids_of, trace, writing_threads


def follow(sinks: Sinks, **config: Any) -> list[Writer]:
    """Let the sinks follow another configuration; return the writers that are now in use."""
    writers = sinks.prepare(TraceConfig(**config))
    sinks.use(writers)
    return list(writers.values())


def test_a_change_keeps_every_trace_once(files: tuple[Path, Path], tmp_path: Path) -> None:
    """Each trace is in the file and the ledger that were configured when it came."""
    lines, ledger = files
    with opened(jsonl=str(lines)) as sinks:
        for turn in range(20):
            write(sinks, range(turn * 50, turn * 50 + 50))
            where = str(ledger) if turn % 2 else None
            follow(sinks, jsonl=str(tmp_path / f"t.{turn}"), ledger=where, keep=None)
        sinks.write(trace(1000))
    parts = [ids_in(lines)] + [ids_in(tmp_path / f"t.{turn}") for turn in range(20)]
    assert parts == [list(range(turn * 50, turn * 50 + 50)) for turn in range(20)] + [[1000]]
    with_ledger = [range(turn * 50, turn * 50 + 50) for turn in range(2, 20, 2)]
    assert sorted(ids_of(ledger)) == sorted([n for one in with_ledger for n in one] + [1000])
    assert sinks.losses() == {"jsonl": 0, "ledger": 0}


def test_a_sink_that_stays_is_not_reopened(
    files: tuple[Path, Path], collector: OtlpCollector
) -> None:
    """Files and collector are compared separately."""
    lines, ledger = files
    with opened(jsonl=str(lines), ledger=str(ledger), otlp=collector.url) as sinks:
        both = follow(sinks, jsonl=str(lines), ledger=str(ledger), otlp=collector.url)
        assert follow(sinks, jsonl=str(lines), ledger=str(ledger), otlp=collector.url) == both
        eventually(lambda: writing_threads() == 2)
        assert follow(sinks, jsonl=str(lines), ledger=str(ledger)) == both[:1]
        assert follow(sinks, jsonl=str(lines), ledger=str(ledger), keep=1.0) != both[:1]
        assert follow(sinks) == []
        sinks.write(trace(1))
    assert ids_in(lines) == []


@pytest.mark.parametrize("wrong", ["jsonl", "ledger"])
def test_a_sink_that_cannot_be_opened_changes_nothing(
    files: tuple[Path, Path], tmp_path: Path, wrong: str
) -> None:
    """The sinks that were opened beside it are closed again."""
    lines, _ = files
    (tmp_path / "folder").mkdir()
    where: Fields = {"jsonl": str(tmp_path / "t"), "ledger": str(tmp_path / "l")}
    with opened(jsonl=str(lines)) as sinks:
        before = open_files(tmp_path)
        with pytest.raises(OSError, match="folder"):
            sinks.prepare(TraceConfig(**{**where, wrong: str(tmp_path / "folder")}))
        assert open_files(tmp_path) == before
        sinks.write(trace(0))
    assert ids_in(lines) == [0]


def test_abandoned_sinks_are_closed(files: tuple[Path, Path], tmp_path: Path) -> None:
    """The sinks in use stay open."""
    lines, _ = files
    with opened(jsonl=str(lines)) as sinks:
        before = open_files(tmp_path)
        sinks.abandon(sinks.prepare(TraceConfig(jsonl=str(tmp_path / "t"))))
        sinks.abandon(sinks.prepare(TraceConfig(jsonl=str(lines))))
        eventually(lambda: open_files(tmp_path) == before)
        sinks.write(trace(0))
    assert ids_in(lines) == [0]


def test_a_removed_sink_holds_up_nothing(
    files: tuple[Path, Path], collector: OtlpCollector, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A hanging collector still gets its traces; its losses are still counted."""
    monkeypatch.setattr("llmproxy.record.otlp.GATHER_S", 0.0)
    lines, _ = files
    collector.hang = threading.Event()
    with opened(5, jsonl=str(lines), otlp=collector.url) as sinks:
        sinks.write(trace(0))
        eventually(lambda: collector.requests)
        for number in range(1, 11):
            sinks.write(trace(number))
            eventually(lambda: ids_in(lines)[-1:] == [number])  # noqa: B023 - called in this round only
        began = time.monotonic()
        follow(sinks, jsonl=str(lines))
        assert time.monotonic() - began < 1
        assert sinks.losses() == {"jsonl": 0, "otlp": 5}
        collector.hang.set()
        eventually(lambda: sent_to(collector) == list(range(6)))
        eventually(lambda: writing_threads() == 1)
        for _ in range(2):
            assert sinks.losses() == {"jsonl": 0, "otlp": 5}
        follow(sinks, jsonl=str(lines), otlp=collector.url)
        assert sinks.losses() == {"jsonl": 0, "otlp": 5}
    assert ids_in(lines) == list(range(11))


def test_closing_waits_for_removed_sinks_too(
    files: tuple[Path, Path], collector: OtlpCollector
) -> None:
    """A sink that was removed before still writes its traces."""
    lines, _ = files
    with opened(jsonl=str(lines), otlp=collector.url) as sinks:
        write(sinks, range(20))
        follow(sinks)
    assert ids_in(lines) == sent_to(collector) == list(range(20))


def open_files(folder: Path) -> list[str]:
    """Return the files below a folder that this process has open."""
    links = [Path("/proc/self/fd") / name for name in os.listdir("/proc/self/fd")]
    targets = [str(link.readlink()) for link in links if link.is_symlink()]
    return sorted(target for target in targets if target.startswith(str(folder)))
