"""A process that is ended by SIGABRT, as systemd's watchdog does, says where it stood."""

from __future__ import annotations

import signal
import subprocess
from pathlib import Path

import pytest

from tests.live.test_starting import HEAD, read_until, started
from tests.support.daemon import provider_config, twistd
from tests.support.live_proxy import until

CRASH = "Fatal Python error: Aborted"


@pytest.fixture
def config(tmp_path: Path) -> Path:
    """A file that a daemon can start with."""
    path = tmp_path / "llmproxy.toml"
    path.write_text(HEAD.format(proxy=0, admin=0) + provider_config("http://127.0.0.1:1"))
    return path


def abort(process: subprocess.Popen[str]) -> None:
    """Do what the watchdog does, and wait for the end by that signal."""
    process.send_signal(signal.SIGABRT)
    assert process.wait(10) == -signal.SIGABRT


def assert_tells(text: str) -> None:
    """Check that the stack of the reactor's thread is there, and of no thread that may run."""
    stack = text.partition(CRASH)[2]
    assert "most recent call first" in stack
    assert "in runReactorWithLogging" in stack
    assert "llmproxy/record/log_writer.py" not in stack


def test_the_stack_is_in_the_log(tmp_path: Path, config: Path) -> None:
    """Standard output has it, as it has the log."""
    with started(tmp_path, twistd(config)) as process:
        read_until(process, "admin listens on")
        process.send_signal(signal.SIGUSR1)
        read_until(process, "are being served")  # the reactor runs
        abort(process)
        assert process.stdout is not None
        assert_tells(process.stdout.read())


def test_the_stack_is_in_the_log_file_of_today(tmp_path: Path, config: Path) -> None:
    """Behind a rotation it is in the new file, and in no descriptor that is something else now."""
    log, yesterday = tmp_path / "x.log", tmp_path / "x.log.1"
    with started(tmp_path, twistd(config, "--logfile", str(log))) as process:
        until(lambda: log.exists() and "admin listens on" in log.read_text(), "it listens")
        log.rename(yesterday)
        process.send_signal(signal.SIGUSR2)
        until(lambda: log.exists() and "opened anew" in log.read_text(), "it has a new file")
        abort(process)
    assert_tells(log.read_text())
    assert CRASH not in yesterday.read_text()
