"""The log: each event is one line with a JSON object, and logging never raises."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from twisted.internet.task import Clock
from twisted.logger import Logger, LogLevel, LogPublisher, globalLogPublisher
from twisted.python import log as old_log
from twisted.python.failure import Failure

from llmproxy.record.log import _TOGETHER, JsonLog, access_message, log_opener, log_writer
from llmproxy.record.log_writer import QUEUE, LogFile
from llmproxy.record.trace import Trace, timestamp
from tests.support.sockets import WAIT


class Log:
    """A log in memory, behind Twisted's new API.

    Args:
        journal: the lines are written as for systemd's journal.
    """

    def __init__(self, *, journal: bool = False) -> None:
        self.file = os.memfd_create("log")
        self.writer = log_writer(LogFile(self.file), wall=float, journal=journal)
        self.clock = Clock()
        self.observer = JsonLog(self.writer, wall=self.clock.seconds, journal=journal)
        self.logger = Logger(namespace="llmproxy.test", observer=LogPublisher(self.observer))

    def text(self) -> str:
        """Return what was written."""
        self.writer.flush(WAIT)
        return os.pread(self.file, 1 << 20, 0).decode()

    def lines(self) -> list[dict[str, Any]]:
        """Return what was written; every line must be one JSON object."""
        text = self.text()
        assert text.endswith("\n")
        decoded = [json.loads(line) for line in text.split("\n")[:-1]]
        assert all(isinstance(line, dict) for line in decoded)
        return decoded

    def names(self) -> list[str]:
        """Return the ids and messages that were written."""
        return [line.get("id", line["message"]) for line in self.lines()]

    def line(self) -> dict[str, Any]:
        """Return the one line that was written."""
        (line,) = self.lines()
        return line


def event(words: str) -> dict[str, Any]:
    """Return an event as Twisted hands it to an observer."""
    return {"log_time": 0.0, "log_format": words}


def messages(path: Path) -> list[str]:
    """Return the messages in a log file."""
    return [json.loads(line)["message"] for line in path.read_text().splitlines()]


def test_an_event_is_one_line() -> None:
    """The line has time, level, logger, message and the fields of the event."""
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
def test_each_level_has_its_own_word(level: Any) -> None:
    """The word is Twisted's name of the level."""
    log = Log()
    log.logger.emit(level, "x")

    assert log.line()["level"] == level.name


def test_a_failure_has_its_traceback() -> None:
    """The message says what failed, and the traceback says why."""
    log = Log()
    try:
        raise ZeroDivisionError("deep down")
    except ZeroDivisionError:
        log.logger.failure("could not {verb}", verb="divide")
    line = log.line()

    assert (line["level"], line["message"]) == ("critical", "could not divide")
    assert line["verb"] == "divide"
    assert "Traceback" in line["traceback"]
    assert "deep down" in line["traceback"]
    assert "log_failure" not in line


def test_a_failure_without_words_has_its_own() -> None:
    """The error's own text is the message."""
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
def test_events_of_the_old_log_are_lines_too(
    speak: Callable[[], object], level: str, text: str, logged_failures: Any
) -> None:
    """Events of ``twisted.python.log`` have level, message and traceback, too."""
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


@pytest.mark.parametrize(
    "words",
    [
        "Site starting on 8080",
        "Site starting on '/run/llmproxy.sock'",
        "(TCP Port 8080 Closed)",
        "(UNIX Port /run/llmproxy.sock Closed)",
    ],
)
def test_twisted_does_not_say_what_the_service_says(words: str) -> None:
    """Listeners, start and stop have lines of our own; whatever else Twisted says is kept."""
    log = Log()
    globalLogPublisher.addObserver(log.observer)
    try:
        old_log.msg(words)
        Logger(namespace="twisted.internet.base").info("Main loop terminated.")
        Logger(namespace="twisted.scripts._twistd_unix.UnixAppLogger").info("Server Shut Down.")
        old_log.msg(f"another {words}")
        Logger(namespace="twisted.internet.base").warn("Main loop terminated.")
    finally:
        globalLogPublisher.removeObserver(log.observer)
    assert log.names() == [f"another {words}", "Main loop terminated."]


class Strange:
    """An object that JSON does not know."""

    def __str__(self) -> str:
        return "a strange thing"


class Worse:
    """An object without any text."""

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
def test_a_value_that_is_not_json_becomes_text(value: object, shown: object) -> None:
    """The line is whole, whatever the event holds."""
    log = Log()
    log.logger.info("x", value=value)

    assert log.line()["value"] == shown


@pytest.mark.parametrize(
    "value", ["half a pair: \ud800", 2**80, -(2**80), Worse(), {1: 2}, {Worse(): 1}]
)
def test_a_strange_value_does_not_take_the_message_along(value: object) -> None:
    """The message is logged, even if the value cannot be."""
    log = Log()
    log.logger.info("important", value=value)

    assert log.line()["message"] == "important"


def test_a_message_that_cannot_be_formatted_is_logged() -> None:
    """A mistake in an event is a line, not an exception; so is an empty event."""
    log = Log()
    log.logger.info("{missing.attribute[0]!z}")
    log.logger.info("{value}", value=Worse())
    log.logger.info("half a pair: {value}", value="\ud800")

    assert all(line["message"] for line in log.lines())
    log.observer({})
    assert log.lines()[-1]["level"]


def trace(name: str, **values: Any) -> Trace:
    """Return the record of a request that has ended."""
    given = {"method": "GET", "path": "/x", **values}
    return Trace(time="t", id=name, instance="0", peer="p", **given)


@pytest.mark.parametrize(
    ("method", "path", "message"),
    [
        ("GET", "/p", "GET /p rejected"),
        ("GET", "", "GET request rejected"),
        ("", "", "unreadable request rejected"),
    ],
)
def test_an_access_line_in_words(method: str, path: str, message: str) -> None:
    """What could not be read, or may not be shown, leaves no hole."""
    assert access_message(trace("a", method=method, path=path, end_reason="rejected")) == message


def test_access_lines_have_their_own_time() -> None:
    """A line has the time at which its request ended, not that at which it was written."""
    log = Log()
    for name in ("a", "b"):
        log.observer.access(trace(name), None, None)
        log.clock.advance(0.5)
    assert log.names() == ["a", "b"]
    assert [line["time"] for line in log.lines()] == [timestamp(0.0), timestamp(0.5)]


def test_access_lines_are_made_together() -> None:
    """They wait a moment for others, up to a number; an event does not overtake them."""
    log = Log()
    observer = JsonLog(log.writer, wall=log.clock.seconds, later=log.clock.callLater)
    for name in ("a", "b"):
        observer.access(trace(name), None, None)
    assert log.text() == ""
    log.clock.advance(1)
    assert log.names() == ["a", "b"]
    for number in range(2 * _TOGETHER):
        observer.access(trace(f"c{number}"), None, None)
    assert len(log.clock.getDelayedCalls()) == 1
    assert len(log.names()) == 2 + 2 * _TOGETHER
    observer.access(trace("d"), None, None)
    observer(event("e"))
    assert log.names()[-2:] == ["d", "e"]


def test_the_lines_keep_their_order() -> None:
    """An event does not overtake a request that ended before it."""
    log = Log()
    for name in ("a", "c", "e"):
        log.observer.access(trace(name), None, None)
        log.logger.info(chr(ord(name) + 1))
    assert log.names() == ["a", "b", "c", "d", "e", "f"]


def test_an_access_line_holds_no_text() -> None:
    """Nor is a response kept in memory until its line is made."""
    log = Log()
    log.observer = JsonLog(log.writer, wall=log.clock.seconds, later=log.clock.callLater)
    ended = trace("a", text="words" * 1000)
    before = sys.getrefcount(ended)
    log.observer.access(ended, None, None)
    assert sys.getrefcount(ended) == before
    assert log.names() == ["a"]
    assert "words" not in log.text()


def test_an_event_cannot_overwrite_the_fields_of_the_log() -> None:
    """Level, logger, message and time are the log's own."""
    log = Log()
    own = {**event("true"), "log_level": LogLevel.info, "log_namespace": "us"}
    log.observer({**own, **dict.fromkeys(("level", "logger", "time", "message"), "false")})
    line = log.line()

    assert (line["level"], line["logger"], line["message"]) == ("info", "us", "true")
    assert line["time"] == "1970-01-01T00:00:00.000Z"


@pytest.mark.parametrize("options", [None, {"logger": "module.observer"}, {"syslog": True}])
def test_another_observer_is_left_alone(options: dict[str, Any] | None) -> None:
    """Without twistd, or with an observer of Twisted's own, the log is not ours."""
    assert log_opener(options) is None


@pytest.mark.parametrize("options", [{"nodaemon": True}, {"logfile": "-"}])
def test_in_the_foreground_lines_go_to_standard_output(
    options: dict[str, Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """It is the descriptor; twistd's log replaces ``sys.stdout``, and no SIGHUP closes it."""
    with (tmp_path / "out").open("w") as stdout:
        monkeypatch.setattr(sys, "stdout", stdout)
        opener = log_opener(options)
        assert opener is not None
        writer = log_writer(opener(), wall=float)
        monkeypatch.setattr(sys, "stdout", None)
        log = JsonLog(writer, wall=float)
        for words in ("one", "two"):
            log(event(words))
            writer.reopen(opener)
            writer.flush(WAIT)
        assert messages(tmp_path / "out") == ["one", "two"]


def test_standard_output_that_is_closed_is_nowhere(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its number may be that of a socket by now: no line goes there."""
    monkeypatch.setattr(sys, "stdout", None)
    opener = log_opener({"nodaemon": True})
    assert opener is not None
    file = opener()
    file.write(b"line\n")
    file.close()


def test_a_daemon_logs_to_its_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A line is appended to the file that ``--logfile`` names, or to ``twistd.log``."""
    monkeypatch.chdir(tmp_path)
    for options, name in (({"logfile": str(tmp_path / "x.log")}, "x.log"), ({}, "twistd.log")):
        (tmp_path / name).write_text("before\n")
        opener = log_opener(options)
        assert opener is not None
        writer = log_writer(opener(), wall=float)
        JsonLog(writer, wall=float)(event("words"))
        writer.flush(WAIT)
        before, line = (tmp_path / name).read_text().splitlines()
        assert (before, json.loads(line)["message"]) == ("before", "words")


def test_a_log_file_is_reopened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its name is that of the start, even when the daemon has changed its folder."""
    monkeypatch.chdir(tmp_path)
    opener = log_opener({"logfile": "x.log"})
    assert opener is not None
    writer = log_writer(opener(), wall=float)
    log = JsonLog(writer, wall=float)
    log(event("one"))
    writer.flush(WAIT)
    (tmp_path / "x.log").rename(tmp_path / "x.log.1")
    log(event("two"))
    writer.flush(WAIT)
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    for words in ("three", "four"):
        writer.reopen(opener)
        log(event(words))
        writer.flush(WAIT)
    assert messages(tmp_path / "x.log.1") == ["one", "two"]
    assert messages(tmp_path / "x.log") == ["three", "four"]


def test_a_log_that_cannot_be_reopened_goes_on() -> None:
    """The open file gets the error and the lines after it."""
    log = Log()

    def fail() -> Any:
        raise OSError("no such folder")

    globalLogPublisher.addObserver(log.observer)
    try:
        log.writer.reopen(fail)
        log.writer.flush(WAIT)
    finally:
        globalLogPublisher.removeObserver(log.observer)
    log.observer(event("on"))
    first, second = log.lines()
    assert first["level"] == "error"
    assert first["message"] == "the log cannot be opened anew: no such folder"
    assert second["message"] == "on"


@pytest.mark.parametrize("journal", [False, True])
def test_the_journal_gets_priorities(journal: bool) -> None:
    """They stand before the lines that are no information, and for nobody else before any."""
    log = Log(journal=journal)
    for level in LogLevel.iterconstants():
        log.logger.emit(level, "words")
    log.observer.access(trace("id"), None, None)
    log.writer.put_access(b"x\n" * QUEUE * 2, QUEUE * 2)
    log.logger.info("behind what was lost")
    found = {}
    for line in log.text().splitlines():
        prefix, brace, rest = line.partition("{")
        found[json.loads(brace + rest)["level"], "lost" in rest] = prefix
    expected = {
        ("debug", False): "<7>",
        ("info", False): "",
        ("warn", False): "<4>",
        ("error", False): "<3>",
        ("critical", False): "<2>",
        ("warn", True): "<4>",
        ("info", True): "",
    }
    assert found == (expected if journal else dict.fromkeys(expected, ""))
