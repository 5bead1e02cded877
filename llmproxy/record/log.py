"""Log events as one JSON object a line.

Every event of ``twisted.logger``, the old ``twisted.python.log`` included, becomes ``time``,
``level``, ``logger`` and ``message``, then whatever fields the event was given.  Failures carry
their traceback in ``traceback``.  What is not JSON becomes text; nothing raises.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from typing import IO, Any, cast

import msgspec
from twisted.logger import ILogObserver, LogEvent, formatEvent
from twisted.python.failure import Failure
from twisted.python.logfile import LogFile
from twisted.python.reflect import safe_repr
from zope.interface import implementer

from llmproxy.record.trace import timestamp

_PLAIN = (str, int, float, bool, type(None), list, dict)
_NOISE = frozenset(("log_", "isError", "message", "time", "system", "format", "failure", "why"))


@implementer(ILogObserver)
class JsonLog:
    """Writes events to a text file, one line each, flushed.

    Args:
        file: an open text file.
    """

    def __init__(self, file: IO[str]) -> None:
        self._file = file

    def __call__(self, event: LogEvent) -> None:
        """Write one event."""
        line = _line(event)
        try:
            self._file.write(line + "\n")
            self._file.flush()
        except (OSError, ValueError):
            return  # a log that cannot be written must not stop a stream


def _line(event: LogEvent) -> str:
    try:
        rendered = _render(event)
        try:
            return msgspec.json.encode(rendered, enc_hook=_shown).decode()
        except Exception:  # half a surrogate pair, a number beyond 64 bits
            plain = {name: _text(value) for name, value in rendered.items()}
            return msgspec.json.encode(plain).decode()
    except Exception as error:
        lost = {"level": "error", "logger": "-", "message": f"an event was lost: {_text(error)}"}
        return msgspec.json.encode(lost).decode()


def _text(value: object) -> str:
    return _shown(value).encode("utf-8", "backslashreplace").decode()


def _shown(value: object) -> str:
    try:
        return str(value)
    except Exception:
        return str(safe_repr(value))


def _render(event: LogEvent) -> dict[str, Any]:
    level = event.get("log_level")
    rendered: dict[str, Any] = {
        "time": timestamp(event["log_time"]),
        "level": getattr(level, "name", "info"),
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


def log_opener(twistd: Mapping[str, Any] | None) -> Callable[[], IO[str]] | None:
    """Return what opens the log file that twistd's options name.

    None where there are no options, or the operator chose an observer of Twisted's (``--logger``,
    ``--syslog``), which then decides the format.
    """
    if twistd is None or twistd.get("logger") or twistd.get("syslog"):
        return None
    name = twistd.get("logfile") or ("-" if twistd.get("nodaemon") else "twistd.log")
    if name == "-":
        return lambda: sys.stdout
    return lambda: cast("IO[str]", LogFile.fromFullPath(name, rotateLength=None))
