"""Log events as one JSON object a line.

Every event of ``twisted.logger`` and of the old ``twisted.python.log`` becomes ``time``, ``level``,
``logger`` and ``message``, followed by the event's own fields.  A failure has its traceback in
``traceback``.  Twisted's own words on listeners, start and stop are left out.  What is not JSON
becomes text; nothing raises.  The access line of a request is made here, too, from its trace.
Where systemd's journal reads, a line that is no information has its priority before it.
``record/log_writer.py`` writes the lines.
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Callable, Mapping
from operator import attrgetter
from typing import Any

import msgspec
from msgspec import UNSET
from twisted.logger import ILogObserver, LogEvent, LogLevel, formatEvent
from twisted.python.failure import Failure
from twisted.python.reflect import safe_repr
from zope.interface import implementer

from llmproxy.record.journal import PRIORITIES
from llmproxy.record.log_writer import QUEUE, LogFile, LogWriter, open_log
from llmproxy.record.trace import NAMES, Trace, timestamp

_FIELDS = tuple(name for name in NAMES if name not in ("attempts", "degraded", "time"))
_fields_of = attrgetter(*_FIELDS)

_AccessLine = msgspec.defstruct(
    "_AccessLine",
    [
        *((name, str) for name in ("time", "level", "logger", "message")),
        *((name, Any, None) for name in (*_FIELDS, "cause", "detail")),
    ],
    omit_defaults=True,  # what is null is left out
)

ACCESS = "llmproxy.access"
"""The logger of access lines."""

GATHER_S = 0.1
"""Seconds for which access lines wait for others: each waking of the thread costs a stream time."""

_TOGETHER = 128
"""Most access lines that are made together."""

_OLD_LOG = "log_legacy"
_OF_PORTS = re.compile(r"\S+ starting on .*|\(\S+ Port .* Closed\)")
_OF_THE_PROCESS = frozenset(("twisted.internet.base", "twisted.scripts._twistd_unix.UnixAppLogger"))
"""What Twisted says of listeners, start and stop, where each has a line of the service's."""

_PLAIN = (str, int, float, bool, type(None), list, dict)
_NOISE = frozenset(("log_", "isError", "message", "time", "system", "format", "failure", "why"))


@implementer(ILogObserver)
class JsonLog:
    """Makes each event one line; never blocks and never raises.

    Access lines do not pass ``twisted.logger``, which would cost more than the rest of their way.
    Those that come within :data:`GATHER_S` are written together.  All lines stand in the order in
    which they came.

    Args:
        writer: takes the lines.
        wall: seconds since the epoch, for access lines; events bring their own time.
        later: calls a function in so many seconds.  Without it, access lines are written at once.
        journal: whether systemd's journal reads the lines.
    """

    def __init__(
        self,
        writer: LogWriter,
        *,
        wall: Callable[[], float],
        later: Callable[[float, Callable[[], None]], object] | None = None,
        journal: bool = False,
    ) -> None:
        self._writer = writer
        self._prefixes = PRIORITIES if journal else {}
        self._wall = wall
        self._later = later
        self._ended: list[tuple[float, Trace, str | None, str | None]] = []
        self._is_timed = False

    def __call__(self, event: LogEvent) -> None:
        """Write one event."""
        if event.get("log_level") is LogLevel.info and _is_said_already(event):
            return
        self._put_access()
        prefix = self._prefixes.get(_level(event), b"")
        self._writer.put(b"%b%b\n" % (prefix, _line(event)))

    def flush(self) -> None:
        """Write what waits, at the end of the process; see :meth:`LogWriter.flush`."""
        self._put_access()
        self._writer.flush()

    def access(self, trace: Trace, cause: str | None, detail: str | None) -> None:
        """Write the access line of a request that has ended.

        Args:
            trace: its record.
            cause: distinguishes failures that have the same reason.
            detail: what went wrong, for the operator alone.
        """
        ended = self._ended
        ended.append((self._wall(), trace, cause, detail))
        if self._later is None:
            self._write_access()
            return
        if len(ended) >= _TOGETHER or trace.text is not UNSET:
            self._put_access()
        if not self._is_timed:
            self._is_timed = True
            self._later(GATHER_S, self._write_access)

    def _write_access(self) -> None:
        self._is_timed = False
        self._put_access()
        self._writer.wake()

    def _put_access(self) -> None:
        if self._ended:
            ended, self._ended = self._ended, []
            lines = b"".join([_access_line(*one) for one in ended])
            self._writer.put_access(lines, len(ended))


def log_writer(
    file: LogFile, *, wall: Callable[[], float], queue: int = QUEUE, journal: bool = False
) -> LogWriter:
    """Return a writer of JSON lines.

    Args:
        file: where they go.
        wall: seconds since the epoch, for the line that says how many were lost.
        queue: how much may wait.
        journal: whether systemd's journal reads the lines.
    """

    def note(count: int, why: str) -> bytes:
        message = f"{count} lines of the log were lost: {why}"
        more = {"count": count}
        return plain_line(wall(), "warn", LogWriter.__module__, message, journal=journal, **more)

    return LogWriter(file, note, queue=queue)


def plain_line(
    at: float, level: str, logger: str, message: str, *, journal: bool, **fields: object
) -> bytes:
    """Return a line that was no event of ``twisted.logger``.

    Args:
        at: seconds since the epoch.
        level: the name of one of its levels.
        logger: what the line is about.
        message: a sentence.
        journal: whether systemd's journal reads the line.
        fields: more of it.
    """
    line = {"time": timestamp(at), "level": level, "logger": logger, "message": message, **fields}
    prefix = PRIORITIES.get(level, b"") if journal else b""
    return b"%b%b\n" % (prefix, msgspec.json.encode(line))


def _access_line(at: float, trace: Trace, cause: str | None, detail: str | None) -> bytes:
    message = access_message(trace)
    line = _AccessLine(timestamp(at), "info", ACCESS, message, *_fields_of(trace), cause, detail)
    try:
        return msgspec.json.encode(line) + b"\n"
    except Exception:  # half a surrogate pair
        plain = {name: _text(getattr(line, name)) for name in ("time", "message", "id")}
        return msgspec.json.encode(plain) + b"\n"


def access_message(trace: Trace) -> str:
    """Return an access line in words: what could not be read has neither method nor path."""
    return f"{trace.method or 'unreadable'} {trace.path or 'request'} {trace.end_reason}"


def access_event(trace: Trace, cause: str | None, detail: str | None) -> dict[str, Any]:
    """Return the access log's fields of a trace; those that are null are left out."""
    fields = dict(
        zip((*_FIELDS, "cause", "detail"), (*_fields_of(trace), cause, detail), strict=True)
    )
    return {name: value for name, value in fields.items() if value is not None}


def _level(event: LogEvent) -> str:
    name = getattr(event.get("log_level"), "name", None)
    return name if isinstance(name, str) else "info"


def _is_said_already(event: LogEvent) -> bool:
    """Return whether Twisted only says in its own words what the service says in better ones."""
    namespace = event.get("log_namespace")
    if namespace == _OLD_LOG:
        return _OF_PORTS.fullmatch(formatEvent(event)) is not None
    return namespace in _OF_THE_PROCESS


def _line(event: LogEvent) -> bytes:
    try:
        rendered = _render(event)
        try:
            return msgspec.json.encode(rendered, enc_hook=_shown)
        except Exception:  # half a surrogate pair, a number beyond 64 bits
            plain = {name: _text(value) for name, value in rendered.items()}
            return msgspec.json.encode(plain)
    except Exception as error:
        lost = {"level": "error", "logger": "-", "message": f"an event was lost: {_text(error)}"}
        return msgspec.json.encode(lost)


def _text(value: object) -> str:
    return _shown(value).encode("utf-8", "backslashreplace").decode()


def _shown(value: object) -> str:
    try:
        return str(value)
    except Exception:
        return str(safe_repr(value))


def _render(event: LogEvent) -> dict[str, Any]:
    rendered: dict[str, Any] = {
        "time": timestamp(event["log_time"]),
        "level": _level(event),
        "logger": event.get("log_namespace", "-"),
        "message": formatEvent(event),
    }
    failure = event.get("log_failure") or event.get("failure")
    if isinstance(failure, Failure):
        rendered["traceback"] = failure.getTraceback()
        rendered["message"] = rendered["message"] or failure.getErrorMessage()
    for name, value in event.items():
        if not name.startswith("log_") and name not in _NOISE and name not in rendered:
            rendered[name] = value if isinstance(value, _PLAIN) else _shown(value)
    return rendered


def log_opener(twistd: Mapping[str, Any] | None) -> Callable[[], LogFile] | None:
    """Return a function that opens the log file which twistd's options name.

    Returns:
        None if there are no options.  None also if the operator chose an observer of Twisted's own
        (``--logger``, ``--syslog``), which then decides the format, and may block.
    """
    if twistd is None or twistd.get("logger") or twistd.get("syslog"):
        return None
    name = twistd.get("logfile") or ("-" if twistd.get("nodaemon") else "twistd.log")
    if name == "-" and sys.stdout is None:  # it was closed, and its number is free for a socket
        name = os.devnull
    if name == "-":
        # twistd is about to put its log in the place of sys.stdout.  The descriptor is written to
        # without Python's buffer, whose lock would keep a process with a full pipe from ending.
        stdout = LogFile(sys.stdout.fileno(), owned=False)
        return lambda: stdout
    path = os.path.abspath(name)  # twistd goes to another folder before a reload comes
    return lambda: open_log(path)
