"""The record of a request and its file: written in order, and lost rather than waited for."""

from __future__ import annotations

import json
import resource
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, cast

import pytest
from twisted.logger import ILogObserver, LogEvent, formatEvent, globalLogPublisher

from llmproxy.record.log import access_event
from llmproxy.record.trace import Attempt, JsonLines, NoSink, Trace, timestamp
from tests.support.sockets import WAIT

DESIGN_10 = (
    "time id client_request_id instance peer user_agent client session route provider dialect "
    "method path model served_model stream status end_reason error is_complete attempts bytes_in "
    "bytes_out chunks head_s first_chunk_s duration_s longest_gap_s paused_s input_tokens "
    "output_tokens cache_read_tokens cache_write_tokens reasoning_tokens usage degraded"
)


def trace(number: int = 0, **fields: Any) -> Trace:
    """Return a record."""
    return Trace(
        time="t", id=str(number), instance="0", peer="::1", method="GET", path="/", **fields
    )


def eventually(condition: Callable[[], bool]) -> None:
    """Wait for the writer's thread."""
    deadline = time.monotonic() + WAIT
    while not condition():
        assert time.monotonic() < deadline
        threading.Event().wait(0.001)


def ids(path: Path) -> list[int]:
    """Return the ids in the file; every line must be whole."""
    text = path.read_bytes()
    assert not text or text.endswith(b"\n")
    return [int(json.loads(line)["id"]) for line in text.splitlines()]


# --- the record -----------------------------------------------------------------------------------


def test_a_record_has_the_names_of_the_design_in_order(tmp_path: Path) -> None:
    """One JSON object a line, every field always, what is not known as null."""
    sink = JsonLines(str(tmp_path / "t"))
    sink.write(trace(attempts=[Attempt("p", "ok", 0.5)], model="gpt-\N{SNOWMAN}"))
    sink.close()
    (line,) = (tmp_path / "t").read_text(encoding="utf-8").splitlines()
    record = json.loads(line)

    assert list(record) == DESIGN_10.split()
    assert record["model"] == "gpt-\N{SNOWMAN}"
    assert record["status"] is None
    assert record["is_complete"] is False
    assert {"provider": "p", "outcome": "ok", "seconds": 0.5}.items() <= record["attempts"][
        0
    ].items()


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.0, "1970-01-01T00:00:00.000Z"),
        (1_700_000_000.123456, "2023-11-14T22:13:20.123Z"),
        (1_709_251_199.9994, "2024-02-29T23:59:59.999Z"),
    ],
)
def test_times_are_rfc_3339_in_utc(seconds: float, text: str) -> None:
    """To the millisecond, whatever the machine's time zone."""
    assert timestamp(seconds) == text


def test_the_access_line_leaves_out_what_is_not_known() -> None:
    """Nulls, lists and the time that the log has itself are left out."""
    event = access_event(trace(status=200, attempts=[Attempt("p", "ok", 0.5)]), None, None)

    assert event["status"] == 200
    assert event["bytes_out"] == 0
    assert not {"model", "attempts", "degraded", "time"} & set(event)
    assert None not in event.values()


def test_without_a_file_records_are_forgotten() -> None:
    """The sink that is no sink takes everything and loses nothing."""
    sink = NoSink()
    sink.write(trace())
    sink.close()

    assert (sink.name, sink.lost) == ("none", 0)


# --- the file -------------------------------------------------------------------------------------


def test_records_are_written_in_order(tmp_path: Path) -> None:
    """Behind what was there, each once, and all of them by the time of close."""
    path = tmp_path / "t"
    path.write_text('{"id":"-1"}\n')
    sink = JsonLines(str(path))
    for number in range(2000):
        sink.write(trace(number))
    sink.close()

    assert ids(path) == list(range(-1, 2000))
    assert sink.lost == 0


def test_a_record_is_there_soon(tmp_path: Path) -> None:
    """Nobody has to close the file for a record to be written."""
    sink = JsonLines(str(tmp_path / "t"))
    sink.write(trace(7))
    eventually(lambda: ids(tmp_path / "t") == [7])
    sink.close()


def test_the_file_is_for_its_owner_and_group(tmp_path: Path) -> None:
    """Others cannot read who called."""
    JsonLines(str(tmp_path / "t")).close()

    assert (tmp_path / "t").stat().st_mode & 0o137 == 0


def test_a_file_that_cannot_be_opened_stops_the_start(tmp_path: Path) -> None:
    """The mistake is told at once, not when the first record comes."""
    with pytest.raises(OSError, match="No such file"):
        JsonLines(str(tmp_path / "missing" / "t"))


@pytest.fixture
def disk() -> Iterator[Callable[[int | None], None]]:
    """Let no file of ours grow over so many bytes; None is no limit."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)

    def limit(size: int | None) -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft if size is None else size, hard))

    yield limit
    limit(None)
    signal.signal(signal.SIGXFSZ, handler)


def test_a_full_disk_loses_records_and_counts_them(
    tmp_path: Path, disk: Callable[[int | None], None]
) -> None:
    """What does not fit is lost as whole lines, until there is room again."""
    path = tmp_path / "t"
    sink = JsonLines(str(path))
    sink.write(trace(0))
    eventually(lambda: ids(path) == [0])
    disk(path.stat().st_size + 20)  # the next line begins to fit
    for number in (1, 2):
        sink.write(trace(number))
        eventually(lambda number=number: sink.lost == number)  # type: ignore[misc]  # the lambda's default
    assert ids(path) == [0]
    disk(None)
    sink.write(trace(3))
    eventually(lambda: ids(path) == [0, 3])
    sink.close()

    assert sink.lost == 2


def test_a_disk_that_takes_nothing_is_told_once(logged: list[str]) -> None:
    """However many records are lost, the log has one line until a record is kept again."""
    sink = JsonLines("/dev/full")
    for number in range(3):
        sink.write(trace(number))
        eventually(lambda number=number: sink.lost == number + 1)  # type: ignore[misc]  # the lambda's default
    sink.close()

    assert len([line for line in logged if "lost" in line]) == 1


@pytest.fixture
def logged() -> Iterator[list[str]]:
    """What is logged meanwhile."""
    lines: list[str] = []

    def observe(event: LogEvent) -> None:
        lines.append(formatEvent(event))

    observer = cast(ILogObserver, observe)
    globalLogPublisher.addObserver(observer)
    yield lines
    globalLogPublisher.removeObserver(observer)


def test_a_slow_disk_loses_records_and_holds_nobody_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """When the queue is full, records are lost at once and counted; what was queued is written."""
    monkeypatch.setattr("llmproxy.record.trace._QUEUE", 10)
    stuck, go_on = threading.Event(), threading.Event()
    append = JsonLines._append

    def slow(sink: JsonLines, lines: bytes) -> None:
        stuck.set()
        assert go_on.wait(WAIT)
        append(sink, lines)

    monkeypatch.setattr(JsonLines, "_append", slow)
    sink = JsonLines(str(tmp_path / "t"))
    sink.write(trace(0))
    assert stuck.wait(WAIT)
    began = time.monotonic()
    for number in range(1, 100):
        sink.write(trace(number))
    assert time.monotonic() - began < 1
    assert sink.lost == 89
    go_on.set()
    sink.close()

    assert ids(tmp_path / "t") == list(range(11))
    assert sink.lost == 89


def test_a_record_that_cannot_be_encoded_is_lost_alone(tmp_path: Path) -> None:
    """It is counted, and those after it are kept."""
    path = tmp_path / "t"
    sink = JsonLines(str(path))
    sink.write(trace(1, model="half a pair: \ud800"))
    eventually(lambda: sink.lost == 1)
    sink.write(trace(2))
    eventually(lambda: ids(path) == [2])
    sink.close()


def test_close_does_not_wait_for_ever(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A disk that hangs does not keep the process from ending."""
    stuck, go_on = threading.Event(), threading.Event()
    monkeypatch.setattr("llmproxy.record.trace._QUEUE", 1)

    def hang(sink: JsonLines, lines: bytes) -> None:
        stuck.set()
        go_on.wait(WAIT)

    monkeypatch.setattr(JsonLines, "_append", hang)
    sink = JsonLines(str(tmp_path / "t"))
    waits: list[float | None] = []
    join = sink._thread.join
    monkeypatch.setattr(sink._thread, "join", lambda timeout=None: waits.append(timeout))
    sink.write(trace(1))
    assert stuck.wait(WAIT)
    sink.close()  # the end itself finds room
    sink.write(trace(2))
    began = time.monotonic()
    sink.close()  # and here it does not
    assert time.monotonic() - began < 5
    go_on.set()
    join(WAIT)

    assert waits
    assert all(seconds is not None and seconds <= 5 for seconds in waits)
