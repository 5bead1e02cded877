"""The sinks together, on real files and sockets: one that fails costs the others nothing."""

from __future__ import annotations

import socket
import sqlite3
import threading
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import pytest

from llmproxy.config import Trace as TraceConfig
from llmproxy.config import Url
from llmproxy.record import sinks as module
from llmproxy.record.ledger_schema import LedgerError
from llmproxy.record.sinks import Sinks
from llmproxy.record.writer import QUEUE
from tests.support.collector import OtlpCollector
from tests.support.records import eventually, ids_in, ids_of, trace, writing_threads
from tests.support.sockets import WAIT

Fields = dict[str, Any]


@contextmanager
def opened(queue: int = QUEUE, **config: Any) -> Iterator[Sinks]:
    """The sinks of a configuration."""
    sinks = Sinks(clock=time.monotonic, wall=lambda: 1_800_000_000.0, instance="7", queue=queue)
    sinks.use(sinks.prepare(TraceConfig(**config)))
    yield sinks
    sinks.close()


@pytest.fixture
def files(tmp_path: Path) -> tuple[Path, Path]:
    """Where trace file and ledger are, each in a folder of its own."""
    for name in ("log", "lib"):
        (tmp_path / name).mkdir()
    return tmp_path / "log" / "t", tmp_path / "lib" / "ledger"


@pytest.fixture
def collector() -> Iterator[OtlpCollector]:
    """A collector without TLS."""
    collector = OtlpCollector()
    yield collector
    collector.close()


def sent_to(collector: OtlpCollector) -> list[int]:
    """The ids of the spans that a collector was sent."""
    return [int(span["spanId"]) for span in collector.spans()]


def test_without_a_sink_traces_are_forgotten() -> None:
    """And none is counted as lost."""
    with opened() as sinks:
        sinks.write(trace())
        sinks.reopen()
    assert sinks.losses() == {}


def test_every_sink_gets_every_trace(files: tuple[Path, Path], collector: OtlpCollector) -> None:
    """By the time of close, in the order in which they were written."""
    lines, ledger = files
    with opened(jsonl=str(lines), ledger=str(ledger), otlp=collector.url) as sinks:
        for number in range(1500):
            sinks.write(trace(number))
    assert ids_in(lines) == ids_of(ledger) == sent_to(collector) == list(range(1500))
    assert sinks.losses() == {"jsonl": 0, "ledger": 0, "otlp": 0}
    resource = collector.requests[0][2]["resourceSpans"][0]["resource"]["attributes"]
    assert {"key": "service.instance.id", "value": {"stringValue": "7"}} in resource


def test_what_cannot_be_opened_stops_the_start(files: tuple[Path, Path]) -> None:
    """A folder that is not there, and a file that is no ledger."""
    lines, ledger = files
    with pytest.raises(FileNotFoundError), opened(jsonl="/missing/t"):
        pass
    with closing(sqlite3.connect(ledger)) as connection:
        connection.execute("CREATE TABLE theirs (a)")
    with pytest.raises(LedgerError), opened(jsonl=str(lines), ledger=str(ledger)):
        pass


@pytest.mark.parametrize("broken", ["jsonl", "ledger"])
def test_a_folder_that_goes_and_comes(files: tuple[Path, Path], broken: str) -> None:
    """Its sink loses just what was written meanwhile; the other one loses nothing."""
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
        for number in range(1, 30):
            sinks.write(trace(number))
        eventually(lambda: sinks.losses()[broken] == 29)
        eventually(lambda: read(whole) == list(range(30)))
        folder.mkdir()
        sinks.write(trace(30))
    assert read(whole) == list(range(31))
    assert (ids_in(lines), ids_of(ledger))[broken == "ledger"] == [30]
    assert sinks.losses() == {"jsonl": 0, "ledger": 0} | {broken: 29}


def test_a_short_lock_loses_nothing(files: tuple[Path, Path]) -> None:
    """The trace file does not wait for it, and nobody has to write for the ledger to catch up."""
    lines, ledger = files
    with opened(jsonl=str(lines), ledger=str(ledger)) as sinks:
        with closing(sqlite3.connect(ledger, isolation_level=None)) as other:
            other.execute("BEGIN EXCLUSIVE")
            for number in range(50):
                sinks.write(trace(number))
            eventually(lambda: ids_in(lines) == list(range(50)))
            other.execute("ROLLBACK")
        eventually(lambda: ids_of(ledger) == list(range(50)))
    assert sinks.losses() == {"jsonl": 0, "ledger": 0}


def test_a_long_lock_loses_what_was_written_under_it(
    files: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is counted, and the ledger goes on once the lock is gone."""
    monkeypatch.setattr("llmproxy.record.ledger.Ledger.patience_s", 0.1)
    lines, ledger = files
    with opened(jsonl=str(lines), ledger=str(ledger)) as sinks:
        with closing(sqlite3.connect(ledger, isolation_level=None)) as other:
            other.execute("BEGIN EXCLUSIVE")
            for number in range(50):
                sinks.write(trace(number))
            eventually(lambda: sinks.losses()["ledger"] == 50)
            other.execute("ROLLBACK")
        sinks.write(trace(50))
    assert ids_in(lines) == list(range(51))
    assert ids_of(ledger) == [50]
    assert sinks.losses() == {"jsonl": 0, "ledger": 50}


def test_logrotate_loses_nothing(files: tuple[Path, Path], tmp_path: Path) -> None:
    """Renamed and opened anew again and again, while traces come."""
    lines, ledger = files
    with opened(jsonl=str(lines), ledger=str(ledger)) as sinks:
        for turn in range(5):
            for number in range(turn * 100, turn * 100 + 50):
                sinks.write(trace(number))
            lines.rename(tmp_path / f"t.{turn}")
            for number in range(turn * 100 + 50, turn * 100 + 100):
                sinks.write(trace(number))
            sinks.reopen()
            eventually(lines.exists)
    parts = [ids_in(tmp_path / f"t.{turn}") for turn in range(5)] + [ids_in(lines)]
    assert [number for part in parts for number in part] == list(range(500))
    assert ids_of(ledger) == list(range(500))
    assert sinks.losses() == {"jsonl": 0, "ledger": 0}


def test_a_collector_that_hangs_holds_up_nobody_else(
    files: tuple[Path, Path], collector: OtlpCollector, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its own queue overflows, is counted, and is emptied when it answers again."""
    monkeypatch.setattr("llmproxy.record.otlp.GATHER_S", 0.0)
    lines, ledger = files
    collector.hang = threading.Event()
    with opened(100, jsonl=str(lines), ledger=str(ledger), otlp=collector.url) as sinks:
        sinks.write(trace(0))
        eventually(lambda: collector.requests)
        for count in range(50, 301, 50):
            for number in range(count - 49, count + 1):
                sinks.write(trace(number))
            eventually(lambda: ids_in(lines) == ids_of(ledger) == list(range(count + 1)))  # noqa: B023
        assert sinks.losses() == {"jsonl": 0, "ledger": 0, "otlp": 200}
        collector.hang.set()
        eventually(lambda: sent_to(collector) == list(range(101)))
    assert sinks.losses() == {"jsonl": 0, "ledger": 0, "otlp": 200}


def test_a_collector_that_refuses_loses_what_it_refused(
    files: tuple[Path, Path], collector: OtlpCollector
) -> None:
    """A 500 is final; what comes after it is sent."""
    lines, ledger = files
    collector.status = 500
    with opened(jsonl=str(lines), ledger=str(ledger), otlp=collector.url) as sinks:
        for number in range(20):
            sinks.write(trace(number))
        eventually(lambda: sinks.losses()["otlp"] == 20)
        collector.status = 200
        collector.requests.clear()
        sinks.write(trace(20))
    assert sent_to(collector) == [20]
    assert ids_in(lines) == ids_of(ledger) == list(range(21))
    assert sinks.losses() == {"jsonl": 0, "ledger": 0, "otlp": 20}


def test_a_collector_that_is_not_there_loses_after_a_while(
    files: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Everything that waits for it, counted once."""
    monkeypatch.setattr("llmproxy.record.otlp.Otlp.patience_s", 0.0)
    lines, ledger = files
    with socket.create_server(("127.0.0.1", 0)) as closed:
        url = Url(scheme="http", host="127.0.0.1", port=closed.getsockname()[1])
    with opened(jsonl=str(lines), ledger=str(ledger), otlp=url) as sinks:
        for number in range(20):
            sinks.write(trace(number))
        eventually(lambda: sinks.losses()["otlp"] == 20)
    assert ids_in(lines) == ids_of(ledger) == list(range(20))
    assert sinks.losses() == {"jsonl": 0, "ledger": 0, "otlp": 20}


def test_the_end_has_five_seconds_for_all(
    files: tuple[Path, Path],
    collector: OtlpCollector,
    monkeypatch: pytest.MonkeyPatch,
    logged: list[str],
) -> None:
    """Together; what a collector that hangs has not taken by then is counted, and told."""
    assert module.CLOSING_S == 5
    monkeypatch.setattr(module, "CLOSING_S", 0.2)
    lines, ledger = files
    collector.hang = threading.Event()
    began = time.monotonic()
    with opened(jsonl=str(lines), ledger=str(ledger), otlp=collector.url) as sinks:
        for number in range(20):
            sinks.write(trace(number))
    assert time.monotonic() - began < WAIT
    assert ids_in(lines) == ids_of(ledger) == list(range(20))
    assert sinks.losses() == {"jsonl": 0, "ledger": 0, "otlp": 20}
    assert "otlp: 20 records could not be written before the end" in logged
    collector.hang.set()
    eventually(lambda: not writing_threads())
