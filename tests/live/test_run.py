"""``llmproxy run`` is ``twistd -n --pidfile= llmproxy``, for those who do not know twistd."""

from __future__ import annotations

import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.support.daemon import Daemon, environment, provider_config, twistd
from tests.support.live_proxy import read_response
from tests.support.scripts import OK, reply
from tests.support.sockets import Provider, connect, request

Command = Callable[[Path], list[str]]


def llmproxy_run(config: Path) -> list[str]:
    """Return the command that starts a daemon without naming twistd."""
    return [str(Path(sys.executable).parent / "llmproxy"), "run", "--config", str(config)]


BOTH = pytest.mark.parametrize("command", [twistd, llmproxy_run], ids=["twistd", "run"])


@BOTH
def test_both_commands_start_the_same_daemon(command: Command, tmp_path: Path) -> None:
    """It serves, logs JSON to standard output, drains at SIGTERM and leaves nothing behind."""
    with (
        Provider(reply(OK)) as provider,
        Daemon(tmp_path, provider_config(provider.url), command=command, instance="7") as daemon,
    ):
        with connect(daemon.port) as wire:
            wire.send(request("GET", "/p/x"))
            assert read_response(wire).status == 200
        daemon.wait_log("", logger="llmproxy.access", instance="7", status=200)
        daemon.process.send_signal(signal.SIGTERM)
        daemon.wait_log("drained")
        assert daemon.process.wait(20) == 0
    assert {path.name for path in tmp_path.iterdir()} == {"llmproxy.toml", "trace.jsonl"}


@BOTH
def test_both_commands_refuse_the_same(command: Command, tmp_path: Path) -> None:
    """A problem is a line of standard error, and the code is 78, which no restart cures."""
    path = tmp_path / "bad.toml"
    path.write_text("[proxy]\nlisen = 1\n")
    ended = subprocess.run(
        command(path),
        cwd=tmp_path,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=20,
        check=False,
    )
    assert ended.returncode == 78
    assert ended.stderr.startswith('proxy.lisen: unknown key; did you mean "listen"?\n')
    assert ended.stdout == ""
