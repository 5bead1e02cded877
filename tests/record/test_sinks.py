"""All sinks together, on real files and sockets: a sink that fails costs the others nothing."""

from __future__ import annotations

import sqlite3
import threading
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import pytest

from llmproxy.config import Trace as TraceConfig
from llmproxy.record import sinks as module
from llmproxy.record.sinks import Sinks
from llmproxy.record.writer import QUEUE
from tests.record.conftest import write
from tests.support.collector import OtlpCollector
from tests.support.records import eventually, ids_in, ids_of, trace, writing_threads
from tests.support.sockets import WAIT

Fields = dict[str, Any]


@contextmanager
def opened(queue: int = QUEUE, **config: Any) -> Iterator[Sinks]:
    """Open the sinks of a configuration, and close them in the end."""
    sinks = Sinks(clock=time.monotonic, wall=lambda: 1_800_000_000.0, instance="7", queue=queue)
    sinks.use(sinks.prepare(TraceConfig(**config)))
    try:
        yield sinks
    finally:
        sinks.close()


def sent_to(collector: OtlpCollector) -> list[int]:
    """Return the ids of the spans that the collector got."""
    return [int(span["spanId"]) for span in collector.spans()]


def test_without_a_sink_nothing_is_lost() -> None:
    """Without a sink, no trace is counted as lost."""
    with opened() as sinks:
        sinks.write(trace())
        sinks.reopen()
    assert sinks.losses() == {}


def test_every_sink_gets_every_trace(files: tuple[Path, Path], collector: OtlpCollector) -> None:
    """When the sinks are closed, each has all traces in their order."""
    lines, ledger = files
    with opened(jsonl=str(lines), ledger=str(ledger), otlp=collector.url) as sinks:
        write(sinks, range(1500))
    assert ids_in(lines) == ids_of(ledger) == sent_to(collector) == list(range(1500))
    assert sinks.losses() == {"jsonl": 0, "ledger": 0, "otlp": 0}
    resource = collector.requests[0][2]["resourceSpans"][0]["resource"]["attributes"]
    assert {"key": "service.instance.id", "value": {"stringValue": "7"}} in resource


@pytest.mark.parametrize("broken", ["jsonl", "ledger"])
def test_a_folder_that_goes_and_comes(files: tuple[Path, Path], broken: str) -> None:
    """Its sink loses only the traces of that time; the other sink loses nothing."""
    lines, ledger = files
    whole = {"jsonl": ledger, "ledger": lines}[broken]
    read = {"jsonl": ids_of, "ledger": ids_in}[broken]
    folder = {"jsonl": lines, "ledger": ledger}[broken].parent
    with opened(jsonl=str(lines), ledger=str(ledger)) as sinks:
        sinks.write(trace(0))
        eventually(lambda: ids_in(lines) == [0] and ids_of(ledger) == [0])
        for file in folder.iterdir():
            file.unlink()
        folder.rmdir()
        write(sinks, range(1, 30))
        eventually(lambda: sinks.losses()[broken] == 29)
        eventually(lambda: read(whole) == list(range(30)))
        folder.mkdir()
        sinks.write(trace(30))
    assert read(whole) == list(range(31))
    assert (ids_in(lines), ids_of(ledger))[broken == "ledger"] == [30]
    assert sinks.losses() == {"jsonl": 0, "ledger": 0} | {broken: 29}


@pytest.mark.parametrize(("patience_s", "lost"), [(WAIT, 0), (0.1, 50)])
def test_a_locked_ledger_holds_up_no_trace_file(
    files: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch, patience_s: float, lost: int
) -> None:
    """After a short lock the ledger catches up; a long lock loses what was written meanwhile."""
    monkeypatch.setattr("llmproxy.record.ledger.Ledger.patience_s", patience_s)
    lines, ledger = files
    with opened(jsonl=str(lines), ledger=str(ledger)) as sinks:
        with closing(sqlite3.connect(ledger, isolation_level=None)) as other:
            other.execute("BEGIN EXCLUSIVE")
            write(sinks, range(50))
            eventually(lambda: ids_in(lines) == list(range(50)))
            eventually(lambda: sinks.losses()["ledger"] == lost)
            other.execute("ROLLBACK")
        eventually(lambda: len(ids_of(ledger)) == 50 - lost)
        sinks.write(trace(50))
    assert ids_in(lines) == list(range(51))
    assert ids_of(ledger) == list(range(lost, 51))
    assert sinks.losses() == {"jsonl": 0, "ledger": lost}


def test_logrotate_loses_nothing(files: tuple[Path, Path], tmp_path: Path) -> None:
    """The file is renamed and reopened again and again, while traces come."""
    lines, ledger = files
    with opened(jsonl=str(lines), ledger=str(ledger)) as sinks:
        for turn in range(5):
            write(sinks, range(turn * 100, turn * 100 + 50))
            lines.rename(tmp_path / f"t.{turn}")
            write(sinks, range(turn * 100 + 50, turn * 100 + 100))
            sinks.reopen()
            eventually(lines.exists)
    parts = [ids_in(tmp_path / f"t.{turn}") for turn in range(5)] + [ids_in(lines)]
    assert [number for part in parts for number in part] == list(range(500))
    assert ids_of(ledger) == list(range(500))
    assert sinks.losses() == {"jsonl": 0, "ledger": 0}


def test_a_collector_that_hangs_holds_up_no_other_sink(
    files: tuple[Path, Path], collector: OtlpCollector, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The losses of its own queue are counted; the rest is sent when the collector responds."""
    monkeypatch.setattr("llmproxy.record.otlp.GATHER_S", 0.0)
    lines, ledger = files
    collector.hang = threading.Event()
    with opened(100, jsonl=str(lines), ledger=str(ledger), otlp=collector.url) as sinks:
        sinks.write(trace(0))
        eventually(lambda: collector.requests)
        for count in range(50, 301, 50):
            write(sinks, range(count - 49, count + 1))
            eventually(lambda: ids_in(lines) == ids_of(ledger) == list(range(count + 1)))  # noqa: B023 - called in this round only
        assert sinks.losses() == {"jsonl": 0, "ledger": 0, "otlp": 200}
        collector.hang.set()
        eventually(lambda: sent_to(collector) == list(range(101)))
    assert sinks.losses() == {"jsonl": 0, "ledger": 0, "otlp": 200}


def test_all_sinks_have_five_seconds_to_close(
    files: tuple[Path, Path],
    collector: OtlpCollector,
    monkeypatch: pytest.MonkeyPatch,
    logged: list[str],
) -> None:
    """The records that a hanging collector has not taken by then are counted and logged."""
    assert module.CLOSING_S == 5
    monkeypatch.setattr(module, "CLOSING_S", 0.2)
    lines, ledger = files
    collector.hang = threading.Event()
    began = time.monotonic()
    with opened(jsonl=str(lines), ledger=str(ledger), otlp=collector.url) as sinks:
        write(sinks, range(20))
    assert time.monotonic() - began < WAIT
    assert ids_in(lines) == ids_of(ledger) == list(range(20))
    assert sinks.losses() == {"jsonl": 0, "ledger": 0, "otlp": 20}
    assert "otlp: 20 records could not be written before the end" in logged
    collector.hang.set()
    eventually(lambda: not writing_threads())
