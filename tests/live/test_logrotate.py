"""The real logrotate, with the lines of the operators' guide, beside a running daemon."""

from __future__ import annotations

import re
import shutil
import signal
import subprocess
from pathlib import Path

import pytest

from tests.support.daemon import ROOT, Daemon, provider_config
from tests.support.live_proxy import read_response, until
from tests.support.scripts import OK, reply
from tests.support.sockets import Provider, connect, request

LOGROTATE = shutil.which("logrotate", path="/usr/sbin:/usr/bin:/sbin:/bin")


def documented() -> str:
    """Return the configuration of logrotate that stands in the guide."""
    guide = (ROOT / "docs" / "operations.rst").read_text(encoding="utf-8")
    found = re.search(r"^    (/var/log/llmproxy/\*\.jsonl \{\n(?:    .*\n)+)", guide, re.MULTILINE)
    assert found is not None
    return re.sub(r"^    ", "", found[1], flags=re.MULTILINE)


def rotate(daemon: Daemon) -> None:
    """Let logrotate do what the guide says, to the files of this daemon."""
    assert LOGROTATE is not None
    text = documented().replace("/var/log/llmproxy/", f"{daemon.folder}/")
    text, count = re.subn(
        r"systemctl kill --kill-who=main -s (USR\d) .*",
        rf"kill -\1 {daemon.process.pid}",
        text,
    )
    assert count == 1
    config = daemon.folder / "logrotate.conf"
    config.write_text(text)
    config.chmod(0o644)
    subprocess.run(
        [LOGROTATE, "--force", "--state", str(daemon.folder / "state"), str(config)],
        check=True,
        timeout=30,
    )


def ask(daemon: Daemon, path: str) -> None:
    """Send one request, and read its response."""
    with connect(daemon.port) as client:
        client.send(request("GET", path))
        assert read_response(client).status == 200


def recorded(path: Path) -> list[str]:
    """Return the paths of the requests whose records are in a file."""
    return re.findall(r'"path":"([^"]+)"', path.read_text()) if path.exists() else []


@pytest.mark.skipif(LOGROTATE is None, reason="logrotate is not here")
def test_logrotate_moves_traces_and_reads_no_configuration(tmp_path: Path) -> None:
    """Records before and after it are in two files, and a half-edited configuration waits."""
    with Provider(reply(OK)) as provider, Daemon(tmp_path, provider_config(provider.url)) as daemon:
        trace, rotated = daemon.trace_path, tmp_path / "trace.jsonl.1"
        ask(daemon, "/p/before")
        until(lambda: recorded(trace) == ["/p/before"], "it is recorded")
        daemon.config_path.write_text("[proxy\nlisten =")
        rotate(daemon)
        daemon.wait_log("opened anew")
        until(trace.exists, "the new file is there")
        ask(daemon, "/p/after")
        until(lambda: recorded(trace) == ["/p/after"], "it is recorded in the new file")
        assert recorded(rotated) == ["/p/before"]
        assert trace.stat().st_mode & 0o777 == 0o640
        assert not [line for line in daemon.log if "reload" in line["message"]]
        assert daemon.metrics()["llmproxy_config_last_reload_successful"] == 1


def test_a_drain_reopens_files_too(tmp_path: Path) -> None:
    """A drain may last for longer than a day; the last records are not in the file of yesterday."""
    with (
        Provider(reply(OK)) as provider,
        Daemon(tmp_path, provider_config(provider.url)) as daemon,
        connect(daemon.port) as client,
    ):
        client.send(request("POST", "/p/x", "Content-Length: 1"))
        until(lambda: daemon.metrics()["llmproxy_client_connections"], "it is connected")
        daemon.terminate()
        daemon.wait_log("draining")
        daemon.trace_path.rename(tmp_path / "yesterday")
        daemon.process.send_signal(signal.SIGUSR2)
        daemon.wait_log("opened anew")
        client.send(b"x")
        assert read_response(client).status == 200
        until(lambda: recorded(daemon.trace_path) == ["/p/x"], "it is recorded in the new file")
