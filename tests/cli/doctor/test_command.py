"""``llmproxy doctor``: what it prints where, its exit codes, and what it refuses to begin."""

from __future__ import annotations

import json
import os
import pty
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from llmproxy.cli.doctor.report import plot
from llmproxy.cli.main import main
from tests.support.paced import OPEN_FIELDS, PacedServer
from tests.support.scripts import LAST, SSE, Turn, event
from tests.support.sockets import WAIT, Provider, Received, Wire, chunked
from tests.support.tls import Authority

KEY = "sk-" + "k" * 30
Printed = pytest.CaptureFixture[str]


def held(wire: Wire) -> None:
    """Send twelve events together, a second after the request."""
    wire.read_request()
    time.sleep(1.1)
    wire.send(SSE + chunked(b"".join(map(event, range(12)))) + LAST)


def streaming(wire: Wire) -> None:
    """Send twelve events, each on its own."""
    wire.read_request()
    wire.send(SSE)
    for number in range(12):
        wire.send(chunked(event(number)))
        time.sleep(0.05)
    wire.send(LAST)


def run(printed: Printed, *arguments: str) -> tuple[int, str, str]:
    """The exit code, and what was printed."""
    code = main(["doctor", *arguments])
    captured = printed.readouterr()
    return code, captured.out, captured.err


def refused(printed: Printed, *arguments: str) -> str:
    """What is said about a command line that makes no sense."""
    with pytest.raises(SystemExit) as ended:
        main(["doctor", *arguments])
    assert ended.value.code == 2
    captured = printed.readouterr()
    assert captured.out == ""
    return captured.err


def test_a_healthy_stream_is_0(capsys: Printed) -> None:
    """One URL, and no word on standard error where that is no terminal."""
    with Provider(streaming) as provider:
        code, out, err = run(capsys, f"{provider.url}/sse")
    assert (code, err) == (0, "")
    assert f"1 {provider.url}/sse: healthy: streams: 12 events, one by one" in out
    assert "Not known: a broken body" in out


def test_a_stream_that_is_held_is_1_and_the_hop_is_named(capsys: Printed) -> None:
    """With what to change, and a plot of both."""
    with Provider(held) as outer, Provider(streaming) as inner:
        outside, inside = f"{outer.url}/sse", f"{inner.url}/sse"
        code, out, _ = run(capsys, outside, inside)
    assert code == 1
    assert f"1 {outside}: buffered: held until the end: 12 events at once, after 1.1 s" in out
    joined = " ".join(out.split())
    assert f"held: a hop that does not name itself, between {outside} and {inside}" in joined
    assert "option http-no-delay" in out
    lines = {line.partition("|")[0].strip(): line for line in out.splitlines() if "|" in line}
    assert len(lines["1 came"].partition("|")[2].strip("| ")) == 1
    assert len(lines["2 came"].partition("|")[2].split()) > 5


def test_a_url_that_cannot_be_reached_is_2(capsys: Printed) -> None:
    """The other one is measured all the same."""
    with Provider(streaming) as provider:
        code, out, _ = run(capsys, "http://127.0.0.1:1/sse", f"{provider.url}/sse")
    assert code == 2
    assert "unreachable: the connection was refused: nothing listens there" in out
    assert "healthy" in out


def test_a_program_may_read_it(capsys: Printed, tmp_path: Path) -> None:
    """One object, with arrival times; no key, no cookie and no query stands in it."""

    def script(wire: Wire) -> None:
        request = wire.read_request()
        assert request.values(b"authorization") == [f"Bearer {KEY}".encode()]
        head = SSE.replace(b"\r\n\r\n", b"\r\nSet-Cookie: secret-cookie\r\n\r\n")
        wire.send(head, chunked(event(0)), LAST)

    with Provider(script) as provider:
        file = tmp_path / "key"
        file.write_text(KEY + "\n")
        code, out, err = run(
            capsys, f"{provider.url}/sse?secret-query", "--key-file", str(file), "--json"
        )
    said = json.loads(out)
    assert (code, said["code"], err) == (0, 0, "")
    (url,) = said["urls"]
    assert (url["state"], url["target"]) == ("healthy", f"{provider.url}/sse")
    assert url["shape"]["pattern"] == "unknown"
    assert len(url["seen"]["stream"]["events"]) == 1
    assert said["guilty"] == []
    assert not any(secret in out for secret in (KEY, "secret-cookie", "secret-query"))


def test_a_real_request_with_a_key(capsys: Printed, tmp_path: Path) -> None:
    """The provider itself gets its own key, and never the client's."""
    asked: list[Received] = []

    def script(wire: Wire) -> None:
        asked.append(wire.read_request())
        wire.send(SSE, chunked(event(0)), LAST)

    (tmp_path / "key").write_text(KEY + "\n")
    (tmp_path / "own").write_text("sk-own\n")
    call = ("--dialect", "openai", "--model", "m", "--key-file", str(tmp_path / "key"))
    with Provider(script) as provider:
        direct = ("--direct", f"{provider.url}/real/v1")
        run(capsys, f"{provider.url}/v1", *direct, *call)
        run(
            capsys, f"{provider.url}/v1", *direct, *call, "--direct-key-file", str(tmp_path / "own")
        )
    keys = [(one.target, one.values(b"authorization")) for one in asked]
    mine, real = b"/v1/chat/completions", b"/real/v1/chat/completions"
    assert keys == [
        *((mine, [f"Bearer {KEY}".encode()]), (real, [])),
        *((mine, [f"Bearer {KEY}".encode()]), (real, [b"Bearer sk-own"])),
    ]
    assert json.loads(asked[0].body)["model"] == "m"


def test_an_authority_of_ones_own(capsys: Printed, tmp_path: Path) -> None:
    """--ca is believed in place of the system's."""
    authority = Authority(tmp_path)
    with Provider(streaming, tls=authority.server()) as provider:
        code, out, _ = run(capsys, f"{provider.url}/sse", "--ca", str(authority.ca_path))
    assert code == 0
    assert "1.3" in out


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((), "the following arguments are required: URL"),
        (("nowhere",), "URL: expected an http:// or https:// URL, got 'nowhere'"),
        (("http://u:secret@a/",), "URL: expected a URL without a user or password"),
        (("http://a", "--direct", "http://b"), "--direct: expected the URL of a stream, with its"),
        (("http://a", "--dialect", "openai"), "--dialect and --model are needed together"),
        (("http://a", "--model", "m"), "--dialect and --model are needed together"),
        (("http://a", "--dialect", "raw", "--model", "m"), "invalid choice: 'raw'"),
        (("http://a", "--key-file", "/nowhere"), "/nowhere: No such file or directory"),
        (("http://a", "--direct-key-file", "/x"), "which is not given"),
        (("http://a", "--ca", "/nowhere"), "--ca: expected a file of certificates in PEM"),
        (("http://a", "--idle", "90"), 'write "90s"'),
        (("http://a", "--idle", "1h"), "expected at most 600s, got '1h'"),
        (("http://a", "--timeout", "0s"), "expected a duration above zero"),
    ],
)
def test_a_command_line_that_makes_no_sense(
    capsys: Printed, arguments: tuple[str, ...], words: str
) -> None:
    """It is refused before anything is sent, and no secret is repeated."""
    err = " ".join(refused(capsys, *arguments).split())
    assert words in err
    assert "secret" not in err


def test_a_key_file_that_holds_none(capsys: Printed, tmp_path: Path) -> None:
    """Its content is not repeated."""
    (tmp_path / "key").write_text("secret-\u00e9\n", encoding="utf-8")
    err = refused(capsys, "http://a", "--key-file", str(tmp_path / "key"))
    assert "of one line of visible ASCII" in " ".join(err.split())
    assert "secret-" not in err


def command(*arguments: str) -> list[str]:
    """The command as a shell starts it."""
    return [sys.executable, "-m", "llmproxy.cli.main", "doctor", *arguments]


@pytest.fixture
def heard() -> Iterator[None]:
    """SIGINT is not ignored by what is started here, as it is where tests run in the background."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("heard")
def test_ctrl_c_ends_it_cleanly() -> None:
    """One word on standard error, no traceback, and the code of a shell."""
    begun = Turn()

    def script(wire: Wire) -> None:
        wire.read_request()
        wire.send(SSE, chunked(event(0)))
        begun.give()
        wire.wait_closed()

    with Provider(script) as provider:
        process = subprocess.Popen(
            command(f"{provider.url}/sse"), stdout=subprocess.PIPE, stderr=subprocess.PIPE
        )
        begun.take()
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=WAIT)
    assert (process.returncode, out, err) == (130, b"", b"interrupted\n")


def test_progress_is_shown_on_a_terminal() -> None:
    """On standard error; standard output stays what a program may read."""
    ours, theirs = pty.openpty()
    with Provider(PacedServer(*OPEN_FIELDS)) as provider:
        url = f"{provider.url}/-/pace?n=6&interval_ms=100"
        process = subprocess.Popen(
            [*command(url), "--json"],
            stdout=subprocess.PIPE,
            stderr=theirs,
            env={**os.environ, "TERM": "xterm", "COLUMNS": "200"},
        )
        os.close(theirs)
        shown = b""
        try:
            while data := os.read(ours, 65536):
                shown += data
        except OSError:  # the other end was closed
            pass
        out, _ = process.communicate(timeout=WAIT)
    os.close(ours)
    assert f"{provider.url}/-/pace: the stream".encode() in shown
    assert b"a slow reader" in shown
    said: dict[str, Any] = json.loads(out)
    assert said["code"] == process.returncode == 0


def test_the_plot() -> None:
    """Where nothing came nothing stands; the more came, the higher."""
    assert plot([0.0, 0.5, 0.99], 1.0, 4) == "▂ ▂▂"
    assert plot([0.3] * 8 + [0.8] * 2 + [0.9], 1.0, 4, ".:+#") == " # :"
    assert plot([1.0, 2.0], 1.0, 4) == "   ▄"
    assert plot([], 0.0, 4) == "    "
