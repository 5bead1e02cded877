"""What an operator does to a running daemon's file, and how the daemon reports the result."""

from __future__ import annotations

import signal
from typing import Any

from tests.support.daemon import Daemon
from tests.support.live_proxy import until

RELOADED = "llmproxy_config_last_reload_successful"
RELOADED_AT = "llmproxy_config_last_reload_success_timestamp_seconds"


def hang_up(daemon: Daemon) -> None:
    """Send SIGHUP."""
    daemon.process.send_signal(signal.SIGHUP)


def edit(daemon: Daemon, old: str, new: str) -> None:
    """Put ``new`` in the place of ``old``, which stands there once, in the daemon's file."""
    text = daemon.config_path.read_text()
    assert text.count(old) == 1, (old, text)
    write(daemon, text.replace(old, new))


def write(daemon: Daemon, text: str) -> None:
    """Put another file in the place of the daemon's, which may be reading it."""
    new = daemon.config_path.with_suffix(".new")
    new.write_text(text)
    new.replace(daemon.config_path)


def reload(daemon: Daemon, *edits: tuple[str, str]) -> dict[str, Any]:
    """Edit the file, send SIGHUP, and wait until it was obeyed; return its log line."""
    for old, new in edits:
        edit(daemon, old, new)
    before = len(_lines(daemon, "reloaded; "))
    hang_up(daemon)
    until(lambda: len(_lines(daemon, "reloaded; ")) > before, "the file is read again")
    return _lines(daemon, "reloaded; ")[-1]


def fail_to_reload(daemon: Daemon, *edits: tuple[str, str]) -> dict[str, Any]:
    """Do the same where it must be refused; return the log line with the reason."""
    for old, new in edits:
        edit(daemon, old, new)
    before = len(failures(daemon))
    hang_up(daemon)
    until(lambda: len(failures(daemon)) > before, "the failure is logged")
    return failures(daemon)[-1]


def failures(daemon: Daemon) -> list[dict[str, Any]]:
    """Return the lines of reloads that failed."""
    return _lines(daemon, "reload failed")


def expect_failures(daemon: Daemon, count: int) -> None:
    """Take them out of the log, where every other line at ``error`` fails the test."""
    assert len(failures(daemon)) == count
    for line in failures(daemon):
        assert line["level"] == "error"
        daemon.log.remove(line)


def _lines(daemon: Daemon, words: str) -> list[dict[str, Any]]:
    return [line for line in list(daemon.log) if words in line["message"]]
