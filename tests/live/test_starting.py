"""How the daemon starts, or says why it does not (design 4 and 13)."""

from __future__ import annotations

import resource
import socket
import subprocess
from pathlib import Path

import pytest

from llmproxy.version import version
from tests.support.daemon import Daemon, environment, provider_config, twistd
from tests.support.live_proxy import read_response, write_credential
from tests.support.scripts import OK, reply
from tests.support.sockets import Provider, connect, request

HEAD = """\
[proxy]
listen = ["tcp:{proxy}:interface=127.0.0.1"]
anonymous = true
[admin]
listen = "tcp:{admin}:interface=127.0.0.1"
"""


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


def assert_refused(ended: subprocess.CompletedProcess[str], *words: str) -> None:
    """Check the exit code, and that these words are printed, and no traceback.

    Mistakes in the file are printed on standard error; what goes wrong later is a line of the log.
    """
    assert ended.returncode == 1
    output = ended.stdout + ended.stderr
    for word in words:
        assert word in output
    assert "Traceback" not in output
    assert "listens on" not in ended.stdout


def test_every_mistake_in_the_configuration_is_reported(tmp_path: Path) -> None:
    """One line each on standard error, exit code 1, and nothing listens."""
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
    ("config", "word"),
    [
        (None, "bad.toml"),
        ("this is no TOML", "TOML"),
        ("", "providers"),
        (HEAD.format(proxy="x", admin=0) + provider_config("http://x"), "proxy.listen"),
        (
            HEAD.format(proxy=0, admin=0)
            + provider_config("http://x")
            + '[trace]\njsonl = "/nowhere/trace.jsonl"\n',
            "/nowhere/trace.jsonl",
        ),
    ],
)
def test_a_file_that_is_no_configuration_is_rejected(
    tmp_path: Path, config: str | None, word: str
) -> None:
    """Exit code 1 and a word; a missing file is named."""
    assert_refused(start(tmp_path, config), word)


@pytest.mark.parametrize("taken_by", ["proxy", "admin"])
def test_a_port_that_is_taken_stops_the_start(tmp_path: Path, taken_by: str) -> None:
    """The exit code is 1, and a sentence has the address."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        ports = {"proxy": 0, "admin": 0} | {taken_by: port}
        ended = start(tmp_path, HEAD.format(**ports) + provider_config("http://127.0.0.1:1"))
    assert_refused(ended, "llmproxy cannot start", str(port))


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
    assert_refused(ended, words_before, words)
    assert (ended.stdout + ended.stderr).count("cannot start") == 1


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
