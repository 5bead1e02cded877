"""How the daemon starts, or says why it does not (design 4 and 13)."""

from __future__ import annotations

import json
import os
import re
import resource
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from llmproxy.version import version
from tests.support.daemon import ROOT, Daemon, environment, provider_config, twistd
from tests.support.live_proxy import read_response, until, write_credential
from tests.support.scripts import OK, reply
from tests.support.sockets import WAIT, Provider, connect, request

HEAD = """\
[proxy]
listen = ["tcp:{proxy}:interface=127.0.0.1"]
anonymous = true
[admin]
listen = "tcp:{admin}:interface=127.0.0.1"
"""


MISTAKE = 78


def start(folder: Path, config: str | None, **environ: str) -> subprocess.CompletedProcess[str]:
    """Start a daemon that must end by itself; without a configuration its file is missing."""
    path = folder / "bad.toml"
    if config is not None:
        path.write_text(config)
    return subprocess.run(
        twistd(path),
        cwd=folder,
        env=environment(**environ),
        capture_output=True,
        text=True,
        timeout=20,
        check=False,
    )


def assert_refused(
    ended: subprocess.CompletedProcess[str], *words: str, code: int = MISTAKE
) -> None:
    """Check the exit code, and that these words are printed, and no traceback.

    Mistakes in the file are printed on standard error; what goes wrong later is a line of the log.
    """
    assert ended.returncode == code
    output = ended.stdout + ended.stderr
    for word in words:
        assert word in output
    assert "Traceback" not in output
    assert "listens on" not in ended.stdout


def test_every_mistake_in_the_configuration_is_reported(tmp_path: Path) -> None:
    """One line each on standard error, exit code 78, and nothing listens."""
    config = provider_config("ftp://x", route="speed = 3") + '[timeouts]\nidle = "soon"\n'
    ended = start(tmp_path, HEAD.format(proxy=0, admin=0) + config)
    assert_refused(ended)
    lines = sorted(ended.stderr.strip().splitlines())
    assert [line.split(":")[0] for line in lines] == [
        "providers.p.url",
        "routes[0].speed",
        "timeouts.idle",
    ]


@pytest.mark.parametrize(
    ("config", "word", "code"),
    [
        (None, "bad.toml", MISTAKE),
        ("this is no TOML", "TOML", MISTAKE),
        ("", "providers", MISTAKE),
        (HEAD.format(proxy="x", admin=0) + provider_config("http://x"), "proxy.listen", MISTAKE),
        (
            HEAD.format(proxy=0, admin=0)
            + provider_config("http://x")
            + '[trace]\njsonl = "/nowhere/trace.jsonl"\n',
            "/nowhere/trace.jsonl",
            1,
        ),
    ],
)
def test_a_file_that_is_no_configuration_is_rejected(
    tmp_path: Path, config: str | None, word: str, code: int
) -> None:
    """A word, and an exit code that tells a mistake from a failure; a missing file is named.

    The service manager is sent the word, too.
    """
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.bind(str(tmp_path / "notify"))
        manager.setblocking(False)
        ended = start(tmp_path, config, NOTIFY_SOCKET=str(tmp_path / "notify"))
        assert_refused(ended, word, code=code)
        status = manager.recv(4096).decode()
    assert status.startswith("STATUS=cannot start: ")
    assert word in status
    assert "\n" not in status


def test_mistakes_are_errors_for_the_journal(tmp_path: Path) -> None:
    """Where the journal reads standard error, each is a line as the log's, with its priority."""
    reading, writing = os.pipe()
    status = os.fstat(writing)
    environ = environment(JOURNAL_STREAM=f"{status.st_dev}:{status.st_ino}")
    (tmp_path / "bad.toml").write_text("speed = 3\nlight = 4\n")
    command = twistd(tmp_path / "bad.toml")
    with os.fdopen(reading) as journal:
        ended = subprocess.run(command, stderr=writing, env=environ, timeout=20, check=False)
        os.close(writing)
        lines = journal.read().splitlines()
    assert ended.returncode == MISTAKE
    assert {line[:3] for line in lines} == {"<3>"}
    decoded = [json.loads(line[3:]) for line in lines]
    assert {line["level"] for line in decoded} == {"error"}
    assert [line["message"].partition(" key")[0] for line in decoded[:2]] == [
        "llmproxy cannot start: speed: unknown",
        "llmproxy cannot start: light: unknown",
    ]


@pytest.mark.parametrize("taken_by", ["proxy", "admin"])
def test_a_port_that_is_taken_stops_the_start(tmp_path: Path, taken_by: str) -> None:
    """The exit code is 1, as another start may succeed, and a sentence has the address."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        ports = {"proxy": 0, "admin": 0} | {taken_by: port}
        ended = start(tmp_path, HEAD.format(**ports) + provider_config("http://127.0.0.1:1"))
    assert_refused(ended, "llmproxy cannot start", str(port), code=1)


INHERITED = HEAD.replace("tcp:{proxy}:interface=127.0.0.1", "systemd:domain=INET:name=proxy")


@pytest.mark.parametrize(
    ("environ", "words"),
    [
        ({}, "LISTEN_FDNAMES is not set"),
        # For another process: a daemon that was started by hand in a service's shell.
        ({"LISTEN_PID": "1", "LISTEN_FDS": "1", "LISTEN_FDNAMES": "proxy"}, "LISTEN_PID"),
    ],
)
def test_a_socket_that_systemd_did_not_pass_stops_the_start(
    tmp_path: Path, environ: dict[str, str], words: str
) -> None:
    """One line says what is missing."""
    config = INHERITED.format(admin=0) + provider_config("http://127.0.0.1:1")
    ended = start(tmp_path, config, **environ)
    words_before = (
        "llmproxy cannot start: systemd:domain=INET:name=proxy: systemd handed over no such"
    )
    assert_refused(ended, words_before, words, code=1)
    assert (ended.stdout + ended.stderr).count("cannot start") == 1


@pytest.mark.parametrize("endpoint", ["tcp:0", "systemd:domain=INET:name=proxy2"])
def test_a_socket_that_no_endpoint_names_stops_the_start(tmp_path: Path, endpoint: str) -> None:
    """systemd holds the port, and the file is that of a process that binds its own."""
    own = "tcp:0:interface=127.0.0.1"
    config = HEAD.format(proxy=0, admin=0).replace(own, endpoint, 1)
    config += provider_config("http://127.0.0.1:1")
    ended = start(tmp_path, config, LISTEN_FDNAMES="proxy")
    assert_refused(ended, "proxy.listen: expected an endpoint such as systemd:domain=INET:name=")
    assert "name=proxy, because" in ended.stderr


def test_a_socket_for_another_process_is_none_of_ours(tmp_path: Path) -> None:
    """A daemon that was started by hand in a service's shell binds its own port."""
    environ = {"LISTEN_PID": "1", "LISTEN_FDS": "1", "LISTEN_FDNAMES": "proxy"}
    with Daemon(tmp_path, provider_config("http://127.0.0.1:1"), environ=environ) as daemon:
        assert daemon.admin("/readyz") == "ready\n"


def test_the_limit_of_descriptors_is_raised(tmp_path: Path) -> None:
    """It goes from a shell's limit to what max_connections may need, without a log line."""
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    proxy = "anonymous = true\nmax_connections = 1000"
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (1024, hard))
    try:
        with Daemon(tmp_path, provider_config("http://127.0.0.1:1"), proxy=proxy) as daemon:
            assert daemon.admin("/readyz") == "ready\n"  # and it takes its signals
            pid = daemon.process.pid
            assert resource.prlimit(pid, resource.RLIMIT_NOFILE) == (2512, hard)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)
    assert not [line for line in daemon.log if "file descriptors" in line["message"]]


def test_a_limit_of_descriptors_that_is_too_low_is_logged(tmp_path: Path) -> None:
    """The start goes on as far as it may, with a warning."""
    proxy = "anonymous = true\nmax_connections = 10000000"
    with Daemon(tmp_path, provider_config("http://127.0.0.1:1"), proxy=proxy) as daemon:
        assert daemon.admin("/readyz") == "ready\n"  # and it takes its signals
        line = daemon.wait_log("raise LimitNOFILE", level="warn")
        assert line["needed"] == 20_000_512


@pytest.mark.parametrize(
    ("name", "value", "mode", "word"),
    [
        ("key", "sk-secret", 0o755, "credentials.directory"),
        ("key", "", 0o700, "providers.p.credential"),
        ("other", "sk-secret", 0o700, "providers.p.credential"),
    ],
    ids=["open to others", "empty", "missing"],
)
def test_a_bad_credential_stops_the_start(
    tmp_path: Path, name: str, value: str, mode: int, word: str
) -> None:
    """The mode of the directory counts, too; the error does not repeat the credential."""
    section = write_credential(tmp_path, "key", value)
    (tmp_path / "credentials").chmod(mode)
    provider = provider_config("http://x", provider=f'credential = "{name}"')
    ended = start(tmp_path, HEAD.format(proxy=0, admin=0) + provider + section)
    assert_refused(ended, word)
    assert "sk-secret" not in ended.stdout + ended.stderr


SIGNALS = [signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2]


def unit_command(config: Path) -> list[str]:
    """Return the command of the unit, with this environment's twistd and this file."""
    unit = (ROOT / "systemd" / "llmproxy.service").read_text()
    (line,) = re.findall(r"^ExecStart=(.*)$", unit, re.MULTILINE)
    program = str(Path(sys.executable).parent)
    command: str = line.replace("/opt/llmproxy/bin", program)
    return command.replace("/etc/llmproxy/llmproxy.toml", str(config)).split()


@contextmanager
def started(folder: Path, command: list[str]) -> Iterator[subprocess.Popen[str]]:
    """Start a daemon that may be asked for anything at any time; it is ended behind the test."""
    with subprocess.Popen(
        command, cwd=folder, env=environment(), stdout=subprocess.PIPE, text=True
    ) as process:
        try:
            yield process
        finally:
            process.kill()


def read_until(process: subprocess.Popen[str], text: str) -> list[str]:
    """Read the log up to a line with these words; fail where it ends before."""
    assert process.stdout is not None
    lines = []
    for line in process.stdout:
        lines.append(line)
        if text in line:
            return lines
    raise AssertionError(f"no {text!r}: exit code {process.wait()}: {lines}")


@pytest.mark.parametrize("number", SIGNALS, ids=lambda number: number.name)
def test_no_signal_ends_a_start(tmp_path: Path, number: signal.Signals) -> None:
    """From the unit's first instructions on; it can be asked again and again."""
    config = tmp_path / "llmproxy.toml"
    config.write_text(HEAD.format(proxy=0, admin=0) + provider_config("http://127.0.0.1:1"))

    def ignored() -> int:
        """Return what the process ignores, as the mask of proc(5)."""
        status = Path(f"/proc/{process.pid}/status").read_text()
        return int(status.partition("SigIgn:")[2].split()[0], 16)

    with started(tmp_path, unit_command(config)) as process:
        until(lambda: ignored() >> (number - 1) & 1, "env has set it up")
        ended = threading.Event()

        def ask() -> None:
            while not ended.wait(0.005):
                process.send_signal(number)

        asking = threading.Thread(target=ask)
        asking.start()
        try:
            read_until(process, "admin listens on")
        finally:
            ended.set()
            asking.join()
        process.send_signal(number)
        read_until(process, AFTER_START[number])


AFTER_START = {
    signal.SIGHUP: "reloaded;",
    signal.SIGUSR1: "are being served",
    signal.SIGUSR2: "opened anew",
}


def test_a_reload_is_not_lost_while_the_file_is_being_read(tmp_path: Path) -> None:
    """What was written behind the reader's back is in use after the start; twistd alone is enough.

    The file is a FIFO, so that the test knows how far the reader is.
    """
    config, new = tmp_path / "llmproxy.toml", tmp_path / "new.toml"
    os.mkfifo(config)
    text = HEAD.format(proxy=0, admin=0) + provider_config("http://127.0.0.1:1")
    with started(tmp_path, twistd(config)) as process:
        with config.open("w") as file:
            new.write_text(f"{text}\n[limits]\ndrains = 7\n")
            new.replace(config)
            process.send_signal(signal.SIGHUP)
            file.write(text)
        read_until(process, "reloaded; changed: limits")


def test_what_runs_is_told_and_not_what_is_installed(tmp_path: Path) -> None:
    """Another version is installed beneath the process: its status and metrics stay as they are."""
    before, after = (tmp_path / f"llmproxy-{n}.dist-info" for n in ("7.7.7", "8.8.8"))
    before.mkdir()
    (before / "METADATA").write_text("Metadata-Version: 2.1\nName: llmproxy\nVersion: 7.7.7\n")
    environ = {
        "PYTHONPATH": f"{tmp_path}:{ROOT}",
        "NOTIFY_SOCKET": str(tmp_path / "notify"),
    }
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.bind(environ["NOTIFY_SOCKET"])
        manager.settimeout(WAIT)
        with Daemon(tmp_path, provider_config("http://127.0.0.1:1"), environ=environ) as daemon:
            assert b"version 7.7.7" in manager.recv(4096)
            metadata = (before / "METADATA").read_text()
            before.rename(after)
            (after / "METADATA").write_text(metadata.replace("7.7.7", "8.8.8"))
            daemon.process.send_signal(signal.SIGHUP)
            assert b"RELOADING" in manager.recv(4096)
            assert b"version 7.7.7" in manager.recv(4096)
            assert daemon.metrics()['llmproxy_build_info{version="7.7.7"}'] == 1


def test_the_log_is_json_lines_and_the_daemon_is_ready(tmp_path: Path) -> None:
    """Each line of `twistd -n llmproxy` has time, level, logger and message."""
    with Provider(reply(OK)) as provider:
        with Daemon(tmp_path, provider_config(provider.url)) as daemon:
            assert daemon.admin("/readyz") == "ready\n"
            with connect(daemon.port) as client:
                client.send(request("GET", "/p/x?query", "User-Agent: test/1"))
                read_response(client)
            (access,) = daemon.wait_ended(1)
        assert daemon.process.returncode == 0
    begin, *_, end = daemon.log
    assert begin["message"] == f"llmproxy {version()} starts with {daemon.config_path}"
    assert (begin["version"], begin["config"]) == (version(), str(daemon.config_path))
    assert end["message"] == "drained: 0 finished, 0 cut"
    where = [line["address"] for line in daemon.log if "listens on" in line["message"]]
    assert where == [f"127.0.0.1:{daemon.port}", f"127.0.0.1:{daemon.admin_port}"]
    for line in daemon.log:
        assert line["logger"].startswith("llmproxy."), "Twisted says nothing of its own"
        assert {"time", "level", "logger", "message"} <= set(line)
        assert line["time"].endswith("Z")
    assert access["message"] == "GET /p/x complete"
    assert access["user_agent"] == "test/1"
    assert {"id", "client", "route", "provider", "status", "duration_s", "bytes_out"} <= set(access)
