"""The log: whatever happens is one JSON object a line, and nothing raises."""

from __future__ import annotations

import io
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from twisted.internet.task import Clock
from twisted.logger import Logger, LogLevel, LogPublisher, globalLogPublisher
from twisted.python import log as old_log
from twisted.python.failure import Failure

from llmproxy.record.log import GATHER_S, JsonLog, log_opener
from llmproxy.record.trace import Trace, timestamp


class Log:
    """A log in memory, and Twisted's new API before it."""

    def __init__(self) -> None:
        self.file = io.StringIO()
        self.observer = JsonLog(self.file, wall=float)
        publisher = LogPublisher(self.observer)
        self.logger = Logger(namespace="llmproxy.test", observer=publisher)

    def lines(self) -> list[dict[str, Any]]:
        """Return what was written; every line must be one JSON object."""
        text = self.file.getvalue()
        assert text.endswith("\n")
        decoded = [json.loads(line) for line in text.split("\n")[:-1]]
        assert all(isinstance(line, dict) for line in decoded)
        return decoded

    def line(self) -> dict[str, Any]:
        """Return the one line that was written."""
        (line,) = self.lines()
        return line


def test_an_event_is_one_line() -> None:
    """Time, level, logger and message, and the fields that it was given."""
    log = Log()
    log.logger.warn("{who} is here", who="somebody", count=3, ratio=0.5, ok=True, none=None)
    line = log.line()

    assert line.pop("time").endswith("Z")
    assert line == {
        "level": "warn",
        "logger": "llmproxy.test",
        "message": "somebody is here",
        "who": "somebody",
        "count": 3,
        "ratio": 0.5,
        "ok": True,
        "none": None,
    }
    assert list(log.line())[:4] == ["time", "level", "logger", "message"]


@pytest.mark.parametrize("level", list(LogLevel.iterconstants()))
def test_levels(level: Any) -> None:
    """Each level has its own word."""
    log = Log()
    log.logger.emit(level, "x")

    assert log.line()["level"] == level.name


def test_a_failure_has_its_traceback() -> None:
    """The message says what was tried, the traceback what came of it."""
    log = Log()
    try:
        raise ZeroDivisionError("deep down")
    except ZeroDivisionError:
        log.logger.failure("could not {verb}", verb="divide")
    line = log.line()

    assert (line["level"], line["message"], line["verb"]) == (
        "critical",
        "could not divide",
        "divide",
    )
    assert "Traceback" in line["traceback"]
    assert "deep down" in line["traceback"]
    assert "log_failure" not in line


def test_a_failure_without_words_has_its_own() -> None:
    """A failure that was only handed over still says what it is."""
    log = Log()
    log.observer(
        {"log_time": 0.0, "log_failure": Failure(ValueError("why")), "log_level": LogLevel.critical}
    )

    assert log.line()["message"] == "why"


OLD: list[tuple[Callable[[], object], str, str]] = [
    (lambda: old_log.msg("old words", more=1), "info", "old words"),
    (lambda: old_log.msg(format="%(a)s and %(b)d", a="x", b=2), "info", "x and 2"),
    (lambda: old_log.err(ValueError("why"), "it broke"), "critical", "it broke"),
    (lambda: old_log.err("only words"), "critical", "only words"),
]


@pytest.mark.parametrize(("speak", "level", "text"), OLD)
def test_the_old_log_is_heard_too(
    speak: Callable[[], object], level: str, text: str, logged_failures: Any
) -> None:
    """``twisted.python.log`` events are lines like all others."""
    log = Log()
    globalLogPublisher.addObserver(log.observer)
    try:
        speak()
    finally:
        globalLogPublisher.removeObserver(log.observer)
    logged_failures.flush()
    line = log.line()

    assert line["level"] == level
    assert text in line["message"]
    assert ("traceback" in line) is (text == "it broke")


class Strange:
    """Something that is not JSON."""

    def __str__(self) -> str:
        return "a strange thing"


class Worse:
    """Something that cannot even be shown."""

    def __str__(self) -> str:
        raise ZeroDivisionError

    __repr__ = __str__


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        (Strange(), "a strange thing"),
        (b"bytes", "b'bytes'"),
        ((1, 2), "(1, 2)"),
        ([1, Strange()], [1, "a strange thing"]),
        ({"a": Strange()}, {"a": "a strange thing"}),
        (float("nan"), None),
        ("two\nlines\r\u2028", "two\nlines\r\u2028"),
        ("\x00\x1b", "\x00\x1b"),
        (LogLevel.info, "<LogLevel=info>"),
    ],
)
def test_what_is_not_json_becomes_text(value: object, shown: object) -> None:
    """The line is whole, whatever an event holds."""
    log = Log()
    log.logger.info("x", value=value)

    assert log.line()["value"] == shown


@pytest.mark.parametrize(
    "value", ["half a pair: \ud800", 2**80, -(2**80), Worse(), {1: 2}, {Worse(): 1}]
)
def test_a_strange_value_does_not_take_the_message_along(value: object) -> None:
    """The event is still told, with whatever can be shown of it."""
    log = Log()
    log.logger.info("important", value=value)

    assert log.line()["message"] == "important"


def test_a_message_that_cannot_be_formatted_is_told() -> None:
    """A mistake in the words is a line, and not an exception."""
    log = Log()
    log.logger.info("{missing.attribute[0]!z}")
    log.logger.info("{value}", value=Worse())
    log.logger.info("half a pair: {value}", value="\ud800")

    assert all(line["message"] for line in log.lines())


def test_a_line_is_there_at_once(tmp_path: Path) -> None:
    """Nobody has to wait for a buffer to fill."""
    with open(tmp_path / "log", "w", encoding="utf-8") as file:
        JsonLog(file, wall=float)({"log_time": 0.0, "log_format": "words"})
        assert json.loads((tmp_path / "log").read_text())["message"] == "words"


def trace(name: str, **values: Any) -> Trace:
    """Return the record of a request that has ended."""
    return Trace(time="t", id=name, instance="0", peer="p", method="GET", path="/x", **values)


class Busy(Log):
    """A log whose access lines wait for others."""

    def __init__(self) -> None:
        super().__init__()
        self.clock = Clock()
        self.observer = JsonLog(self.file, wall=self.clock.seconds, later=self.clock.callLater)
        self.logger = Logger(namespace="llmproxy.test", observer=LogPublisher(self.observer))

    def names(self) -> list[str]:
        """Return the ids and messages that were written."""
        if not self.file.getvalue():
            return []
        return [line.get("id", line["message"]) for line in self.lines()]


def test_access_lines_wait_a_moment_for_others() -> None:
    """They are written together, each with the time at which its request ended."""
    log = Busy()
    for name in ("a", "b"):
        log.observer.access(trace(name), None, None)
        log.clock.advance(GATHER_S / 2.5)
    assert log.names() == []
    log.clock.advance(GATHER_S / 2.5)
    assert log.names() == ["a", "b"]
    assert [line["time"] for line in log.lines()] == [
        timestamp(0.0),
        timestamp(GATHER_S / 2.5),
    ]
    log.observer.access(trace("c"), None, None)
    log.clock.advance(GATHER_S)
    assert log.names() == ["a", "b", "c"]
    log.clock.advance(1)
    assert (log.names(), log.clock.getDelayedCalls()) == (["a", "b", "c"], [])


def test_all_lines_stand_in_the_order_in_which_they_came() -> None:
    """An event does not overtake a request that ended before it."""
    log = Busy()
    log.observer.access(trace("a"), None, None)
    log.logger.info("b")
    assert log.names() == ["a", "b"]
    log.observer.access(trace("c"), None, None)
    log.clock.advance(GATHER_S)
    log.logger.info("d")
    assert log.names() == ["a", "b", "c", "d"]


def test_not_many_access_lines_wait() -> None:
    """The sixty-fourth is written with all before it, and one with a response's text at once."""
    log = Busy()
    for number in range(63):
        log.observer.access(trace(str(number)), None, None)
    assert log.names() == []
    log.observer.access(trace("63"), None, None)
    assert log.names() == [str(number) for number in range(64)]
    log.observer.access(trace("text", text="words"), None, None)
    assert log.names()[64:] == ["text"]
    assert "words" not in log.file.getvalue()


def test_what_waits_goes_to_the_file_before(tmp_path: Path) -> None:
    """A log that is opened anew has written what had ended by then."""
    log = Busy()
    log.observer.access(trace("a"), None, None)
    after = (tmp_path / "after").open("w")
    log.observer.reopen(lambda: after)
    log.observer.access(trace("b"), None, None)
    log.clock.advance(GATHER_S)
    after.close()
    assert [json.loads(line)["id"] for line in (tmp_path / "after").read_text().splitlines()] == [
        "b"
    ]


def test_an_event_without_anything_is_told() -> None:
    """Not even the time must be there."""
    log = Log()
    log.observer({})

    assert log.line()["level"]


def test_our_own_words_are_not_overwritten() -> None:
    """A field cannot pretend to be the level or the logger."""
    log = Log()
    event = {
        "log_time": 0.0,
        "log_level": LogLevel.info,
        "log_namespace": "us",
        "log_format": "true",
    }
    log.observer(
        {**event, "level": "false", "logger": "false", "time": "false", "message": "false"}
    )
    line = log.line()

    assert (line["level"], line["logger"], line["message"]) == ("info", "us", "true")
    assert line["time"] == "1970-01-01T00:00:00.000Z"


def test_a_log_that_cannot_be_written_stops_nobody() -> None:
    """A full disk or a closed file loses lines, and raises nothing."""
    with open("/dev/full", "w", encoding="utf-8") as full:
        JsonLog(full, wall=float)({"log_time": 0.0, "log_format": "x"})
        full.detach = lambda: None  # type: ignore[assignment,method-assign,return-value]  # a stand-in
        closed = io.StringIO()
        closed.close()
        JsonLog(closed, wall=float)({"log_time": 0.0, "log_format": "x"})
        with pytest.raises(OSError, match="No space"):
            full.close()


@pytest.mark.parametrize(
    ("options", "path"),
    [
        (None, None),
        ({"logger": "module.observer"}, None),
        ({"syslog": True}, None),
        ({"nodaemon": True}, "<stdout>"),
        ({"logfile": "-"}, "<stdout>"),
    ],
)
def test_twistds_options_say_where_the_log_goes(
    options: dict[str, Any] | None, path: str | None
) -> None:
    """An observer of Twisted's is left alone; in the foreground lines go to standard output."""
    opener = log_opener(options)

    assert (opener is None) is (path is None)
    if opener is not None:
        assert opener() is sys.stdout


def test_a_daemon_logs_to_its_file(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The file that ``--logfile`` names, else ``twistd.log``; it is appended to."""
    monkeypatch.chdir(tmp_path)
    for options, name in (({"logfile": str(tmp_path / "x.log")}, "x.log"), ({}, "twistd.log")):
        (tmp_path / name).write_text("before\n")
        opener = log_opener(options)
        assert opener is not None
        file = opener()
        JsonLog(file, wall=float)({"log_time": 0.0, "log_format": "words"})
        file.close()
        before, line = (tmp_path / name).read_text().splitlines()
        assert before == "before"
        assert json.loads(line)["message"] == "words"


def test_a_log_file_is_opened_anew(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Under its name, as logrotate asks, also when the daemon has gone to another folder."""
    monkeypatch.chdir(tmp_path)
    opener = log_opener({"logfile": "x.log"})
    assert opener is not None
    log = JsonLog(opener(), wall=float)
    log({"log_time": 0.0, "log_format": "one"})
    (tmp_path / "x.log").rename(tmp_path / "x.log.1")
    log({"log_time": 0.0, "log_format": "two"})
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    log.reopen(opener)
    log({"log_time": 0.0, "log_format": "three"})
    log.reopen(opener)
    log({"log_time": 0.0, "log_format": "four"})
    log.reopen(io.StringIO)
    told = [
        [json.loads(line)["message"] for line in (tmp_path / name).read_text().splitlines()]
        for name in ("x.log.1", "x.log")
    ]
    assert told == [["one", "two"], ["three", "four"]]


def test_a_log_that_cannot_be_opened_anew_goes_on() -> None:
    """In the file that there is, and says so there."""
    file = io.StringIO()
    log = JsonLog(file, wall=float)

    def fail() -> Any:
        raise OSError("no such folder")

    globalLogPublisher.addObserver(log)
    try:
        log.reopen(fail)
    finally:
        globalLogPublisher.removeObserver(log)
    log({"log_time": 0.0, "log_format": "on"})
    first, second = map(json.loads, file.getvalue().splitlines())
    assert first["level"] == "error"
    assert first["message"] == "the log cannot be opened anew: no such folder"
    assert second["message"] == "on"


def test_standard_output_is_left_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also when something else stands in its place by then, as twistd's log does."""
    stdout = io.StringIO()
    monkeypatch.setattr(sys, "stdout", stdout)
    opener = log_opener({"nodaemon": True})
    assert opener is not None
    log = JsonLog(opener(), wall=float)
    monkeypatch.setattr(sys, "stdout", None)
    log.reopen(opener)
    log({"log_time": 0.0, "log_format": "on"})
    assert json.loads(stdout.getvalue())["message"] == "on"
