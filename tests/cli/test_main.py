"""The ``llmproxy`` command: what it prints where, and with which code it ends."""

from __future__ import annotations

import hashlib
import io
import json
import os
import re
import subprocess
import sys
import tomllib
import types
from pathlib import Path

import pytest

from llmproxy.cli.main import main
from llmproxy.config import ClientKey, parse

GOOD = """
[proxy]
listen = ["tcp:808{instance}"]
anonymous = true
[providers.p]
url = "https://p.example"
dialect = "openai"
[[routes]]
path = "/a"
providers = ["p"]
[[routes]]
path = "/b"
providers = ["p"]
"""


@pytest.fixture
def config_file(tmp_path: Path) -> Path:
    """A configuration file that can be used."""
    path = tmp_path / "a.toml"
    path.write_text(GOOD)
    return path


def test_check_of_a_good_file(config_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A file that can be used is one line of stdout and the code 0."""
    assert main(["check", str(config_file)]) == 0
    captured = capsys.readouterr()
    assert captured.out == f"{config_file}: ok: 2 routes, 1 provider, 0 clients\n"
    assert captured.err == ""


def test_check_of_a_bad_file(config_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Every problem is a line of stderr, and the code is 1."""
    config_file.write_text(GOOD.replace("https", "ftp").replace('"/b"', '"/b/"'))
    assert main(["check", str(config_file)]) == 1
    captured = capsys.readouterr()
    assert captured.out == ""
    first, second = captured.err.splitlines()
    assert first.startswith("providers.p.url: expected")
    assert second.startswith("routes[1].path: expected")


def test_check_as_json(config_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A program reads whether the file can be used, and every problem, from stdout."""
    assert main(["check", str(config_file), "--json"]) == 0
    counts = {"routes": 2, "providers": 1, "clients": 0}
    report = json.loads(capsys.readouterr().out)
    assert report == {"ok": True, "problems": [], "warnings": [], **counts}
    config_file.write_text(GOOD + "nothing = 1")
    assert main(["check", str(config_file), "--json"]) == 1
    captured = capsys.readouterr()
    report = json.loads(captured.out)
    assert (report["ok"], len(report["problems"]), captured.err) == (False, 1, "")


def test_check_of_no_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A missing file is a problem like any other."""
    assert main(["check", str(tmp_path / "none")]) == 1
    assert "expected a file to read" in capsys.readouterr().err


def test_check_for_an_instance(config_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A file is checked for the instance that is named."""
    assert main(["check", str(config_file), "--instance", "7"]) == 0
    assert main(["check", str(config_file), "--instance", "x"]) == 1
    assert "a port from 0 to 65535" in capsys.readouterr().err
    config_file.write_text(GOOD.replace("tcp:808{instance}", "tcp:{instnace}"))
    assert main(["check", str(config_file), "--instance", "7"]) == 1
    assert "proxy.listen[0]" in capsys.readouterr().err


def test_check_reads_credentials_from_the_environment(
    config_file: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """$CREDENTIALS_DIRECTORY is that of the command's own environment."""
    config_file.write_text(GOOD.replace('"openai"', '"openai"\ncredential = "key"'))
    monkeypatch.delenv("CREDENTIALS_DIRECTORY", raising=False)
    assert main(["check", str(config_file)]) == 1
    vault = tmp_path / "vault"
    vault.mkdir(mode=0o700)
    (vault / "key").write_text("secret")
    monkeypatch.setenv("CREDENTIALS_DIRECTORY", str(vault))
    assert main(["check", str(config_file)]) == 0
    assert "secret" not in "".join(capsys.readouterr())


def test_a_new_key(capsys: pytest.CaptureFixture[str]) -> None:
    """The first line is the key and nothing else, the second lets it in."""
    assert main(["keys", "new", "team-a"]) == 0
    captured = capsys.readouterr()
    key, line = captured.out.splitlines()
    assert re.fullmatch(r"llmp_[A-Za-z0-9_-]{43}", key)
    digest = hashlib.sha256(key.encode())
    assert line == f'keys = ["sha256:{digest.hexdigest()}"]'
    assert tomllib.loads(line)
    config = parse(f"{GOOD}[clients.team-a]\n{line}", environ={}, instance="1")
    assert config.clients["team-a"].keys == (ClientKey(hash=digest.digest()),)
    assert captured.err == ""


@pytest.mark.parametrize(
    ("word", "expires"),
    [
        ("90d", 1_800_000_000 + 90 * 86400),
        ("1h", 1_800_000_000 + 3600),
        ("2027-01-31T00:00:00Z", 1_801_353_600),
        ("2027-01-31T02:00:00+02:00", 1_801_353_600),
    ],
)
def test_a_key_that_expires(
    word: str,
    expires: int,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The line for the file has the time, whether a key is new or was there."""
    monkeypatch.setattr("time.time", lambda: 1_800_000_000.75)
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"their-key")))
    for command in (["new", "team-a"], ["hash"]):
        assert main(["keys", *command, "--expires", word]) == 0
        *made, line = capsys.readouterr().out.splitlines()
        config = parse(f"{GOOD}[clients.team-a]\n{line}", environ={}, instance="1")
        digest = hashlib.sha256((made or ["their-key"])[0].encode()).digest()
        assert config.clients["team-a"].keys == (ClientKey(hash=digest, expires=float(expires)),)


def test_no_key_twice(capsys: pytest.CaptureFixture[str]) -> None:
    """Each key is new."""
    keys = set()
    for _ in range(20):
        main(["keys", "new", "a"])
        keys.add(capsys.readouterr().out)
    assert len(keys) == 20


def test_a_person_reads_what_to_do_with_a_key(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a terminal, and only there, a hint goes to stderr."""
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    assert main(["keys", "new", "team-a"]) == 0
    captured = capsys.readouterr()
    assert len(captured.out.splitlines()) == 2
    assert "[clients.team-a]" in captured.err
    assert "llmp_" not in captured.err


@pytest.mark.parametrize("end", ["", "\n", "\r\n"])
def test_the_digest_of_an_existing_key(
    end: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The key is read from standard input; what is printed lets it in, and does not show it."""
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"their-Key=1" + end.encode())))
    assert main(["keys", "hash"]) == 0
    captured = capsys.readouterr()
    digest = hashlib.sha256(b"their-Key=1").hexdigest()
    assert (captured.out, captured.err) == (f'keys = ["sha256:{digest}"]\n', "")


@pytest.mark.parametrize(
    "read", [b"", b"\n", b"a\nb\n", b" a\n", b"a ", b"a b", b"\xff", b"\xc3\xa4", b"a\0", b"a\n\n"]
)
def test_what_is_no_key_has_no_digest(
    read: bytes, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """No client could send it in a header, so its digest would let nobody in."""
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(read)))
    assert main(["keys", "hash"]) == 1
    captured = capsys.readouterr()
    assert captured.out == ""
    assert (
        captured.err == "expected one key on standard input: a line of visible ASCII, no spaces\n"
    )


def test_a_person_types_a_key_unseen(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a terminal the key is asked for, and not shown."""
    monkeypatch.setattr("sys.stdin.isatty", lambda: True)
    monkeypatch.setattr("getpass.getpass", lambda prompt: "k" if prompt == "Key: " else "")
    assert main(["keys", "hash"]) == 0
    assert hashlib.sha256(b"k").hexdigest() in capsys.readouterr().out


def test_a_key_is_no_argument(capsys: pytest.CaptureFixture[str]) -> None:
    """Whoever gives it as one has shown it to the machine; the command does not show it again."""
    with pytest.raises(SystemExit) as caught:
        main(["keys", "hash", "their-key"])
    captured = capsys.readouterr()
    assert caught.value.code == 2
    assert "standard input" in captured.err
    assert "their-key" not in captured.out + captured.err


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "COMMAND"),
        (["nothing"], "invalid choice"),
        (["check"], "FILE"),
        (["check", "a", "--instance", "a/b"], "expected up to 64 letters"),
        (["run", "--instance", "a/b"], "expected up to 64 letters"),
        (["run", "FILE"], "unrecognized arguments"),
        (["keys"], "COMMAND"),
        (["keys", "new"], "NAME"),
        (["keys", "new", "a b"], "expected a name"),
        (["keys", "new", "a", "--expires", "soon"], "expected a duration such as 90d, or a date"),
        (["keys", "new", "a", "--expires", "2027-01-31"], "a time with its offset"),
        (["keys", "new", "anonymous"], "expected another name"),
        (["demo", "--port", "65536"], "expected a port from 0 to 65535"),
        (["demo", "--admin-port", "-1"], "expected"),
        (["demo", "--port", "http"], "expected a port"),
        (["usage", "--by", "client,nothing"], "expected some of client, model"),
        (["usage", "--by", ""], "expected some of"),
        (["usage", "--by", "client,client"], "each once"),
        (["usage", "--since", "yesterday"], "expected a duration such as 7d, or a date"),
        (["usage", "--since", "7"], "expected a duration"),
        (["usage", "--since", "2026-13-01"], "expected a duration"),
    ],
)
def test_a_wrong_command_line(
    arguments: list[str], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """The command says what is wrong on stderr, and ends with the code 2."""
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    captured = capsys.readouterr()
    assert caught.value.code == 2
    assert words in captured.err
    assert captured.out == ""


@pytest.mark.parametrize(
    "command",
    [
        [],
        ["run"],
        ["check"],
        ["explain"],
        ["keys"],
        ["keys", "new"],
        ["keys", "hash"],
        ["usage"],
        ["demo"],
    ],
    ids=" ".join,
)
def test_help(command: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    """The help of each command names the exit codes, in plain ASCII."""
    with pytest.raises(SystemExit) as caught:
        main([*command, "--help"])
    printed = capsys.readouterr().out
    assert caught.value.code == 0
    assert "exit codes: 0 " in printed
    assert printed.isascii()


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    """The version is one line."""
    with pytest.raises(SystemExit) as caught:
        main(["--version"])
    assert caught.value.code == 0
    assert re.fullmatch(r"llmproxy \S.*\n", capsys.readouterr().out)


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ([], (8080, 9080, True, False)),
        (["--port", "0", "--admin-port", "1"], (0, 1, True, False)),
        (["--no-cache"], (8080, 9080, False, False)),
        (["--sandbox"], (8080, 9080, True, True)),
    ],
)
def test_demo(
    arguments: list[str], expected: tuple[int, int, bool, bool], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The demo runs on the ports that are asked for, and has a prompt cache unless told not to."""
    calls: list[tuple[int, int, bool, bool]] = []

    def run(
        *, proxy_port: int, admin_port: int, cache: bool, sandboxed: bool, capsule: None
    ) -> None:
        calls.append((proxy_port, admin_port, cache, sandboxed))

    stand_in = types.ModuleType("llmproxy.cli.demo.run")
    monkeypatch.setattr(stand_in, "run", run, raising=False)
    monkeypatch.setitem(sys.modules, "llmproxy.cli.demo.run", stand_in)
    assert main(["demo", *arguments]) == 0
    assert calls == [expected]


def test_a_reader_that_has_enough_is_no_error() -> None:
    """As behind ``| head``; no traceback, and the code of a closed pipe."""
    program = "import sys; from llmproxy.cli import main; sys.exit(main.main(['keys', 'new', 'a']))"
    reads, writes = os.pipe()
    os.close(reads)
    try:
        done = subprocess.run(
            [sys.executable, "-c", program],
            stdout=writes,
            stderr=subprocess.PIPE,
            check=False,
            timeout=60,
        )
    finally:
        os.close(writes)
    assert (done.returncode, done.stderr) == (141, b"")
