"""``llmproxy top`` against a running daemon: one picture, lines of JSON, and a real terminal."""

from __future__ import annotations

import io
import json
import os
import pty
import re
import select
import signal
import socket
import subprocess
import sys
import termios
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path
from typing import Self

import msgspec
import pytest
from msgspec import structs
from rich.cells import cell_len
from rich.console import Console

from llmproxy.admin.clients import ClientRow
from llmproxy.admin.events import MOST_VIEWERS
from llmproxy.admin.overview import EndedRow, State
from llmproxy.admin.streams import PARAMETERS
from llmproxy.cli.main import main
from llmproxy.cli.top.filters import FILTERS, parsed, written
from llmproxy.cli.top.keyboard import Keyboard
from llmproxy.cli.top.live import HELP
from llmproxy.cli.top.screen import SORTS, View, duration, picture, size, visible
from llmproxy.cli.top.site import Site, SiteError
from llmproxy.policy.limits import Use
from tests.support.daemon import (
    ROOT,
    Daemon,
    environment,
    provider_table,
    route_table,
    twistd,
)
from tests.support.live_proxy import LiveProxy, client_config, until, write_credential
from tests.support.scripts import SSE, event
from tests.support.sockets import WAIT, Provider, Wire, chunked

TOKEN = "admin-TOKEN"
HOSTILE = "m\x1b]0;owned\x07[red]m\u202e"
STREAMS = 6
_EVENTS = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\nconnection: close\r\n\r\n"


def script(wire: Wire) -> None:
    """Send some events, and nothing more."""
    count = json.loads(wire.read_request().body)["n"]
    wire.send(SSE, chunked(event(0)) * count)
    wire.wait_closed()


@pytest.fixture
def live(tmp_path: Path) -> Iterator[LiveProxy]:
    """A daemon with some streams, on two listeners for operators."""
    live = LiveProxy()
    live.script = script
    config = provider_table("p", url=live.provider.url) + route_table("/p", "p")
    config += client_config("a", "key-a") + client_config("b", "key-b")
    config += write_credential(tmp_path, "admin-token", TOKEN)
    proxy = 'drain_timeout = "500ms"'
    with (
        live.provider,
        Daemon(tmp_path, config, proxy=proxy, admin='token = "admin-token"') as live.daemon,
        ExitStack() as clients,
    ):
        for number in range(STREAMS):
            model = HOSTILE if number == 2 else f"model-{number}"
            body = json.dumps({"model": model, "stream": True, "n": number + 1}).encode()
            key = f"x-api-key: key-{'ab'[number % 2]}"
            clients.enter_context(live.begin("/p/v1/chat/completions", body, key))
        yield live


def url(live: LiveProxy) -> str:
    """Return where the admin site is."""
    return f"http://127.0.0.1:{live.daemon.admin_port}"


def printed(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, str, str]:
    """Run the command; return its code and what it printed."""
    code = main(["top", *words])
    return code, *capsys.readouterr()


def test_one_state_is_json(live: LiveProxy, capsys: pytest.CaptureFixture[str]) -> None:
    """It is the daemon's own, of the streams that are asked for."""
    words = ("--once", "--json", "--sort=-events", "--client", "a", "--limit", "2")
    code, out, err = printed(capsys, url(live), *words)
    assert (code, err, out.count("\n")) == (0, "", 1)
    state = json.loads(out)
    assert (state["total"], state["matching"]) == (STREAMS, STREAMS // 2)
    assert [row["events"] for row in state["streams"]] == [5, 3]


def test_one_picture_is_for_people(live: LiveProxy, capsys: pytest.CaptureFixture[str]) -> None:
    """Nothing is cut where there is no terminal, and no word of a caller's does anything."""
    code, out, _ = printed(capsys, url(live), "--once")
    assert code == 0
    assert f"{STREAMS} streams" in out
    assert out.count("streaming") == STREAMS
    assert "m\\x1b]0;owned\\x07[red]m\\u202e" in out
    assert "\x1b" not in out
    assert re.search(r"^ *p +on ", out, re.MULTILINE)


def test_states_come_until_the_daemon_ends(live: LiveProxy) -> None:
    """A line each; then the command says that it is over."""
    command = [sys.executable, "-m", "llmproxy.cli.main", "top", url(live), "--json"]
    with subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as top:
        assert top.stdout is not None
        assert top.stderr is not None
        for _ in range(2):
            assert json.loads(top.stdout.readline())["total"] == STREAMS
        live.daemon.terminate()
        top.stdout.read()
        assert "closed the connection" in top.stderr.read()
        assert top.wait(WAIT) == 1


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (("--sort=colour", "--once"), "400: Expected `sort` to be one of age"),
        (("--limit", "5000", "--once"), "400: Expected `limit` to be a whole number"),
        (("--every", "0", "--json"), "400: Expected `every`"),
        (("--token-file", "/nowhere", "--once"), "/nowhere: No such file"),
        ((), "there is no terminal to draw on"),
    ],
)
def test_what_cannot_be_shown_is_said(
    live: LiveProxy, capsys: pytest.CaptureFixture[str], words: tuple[str, ...], says: str
) -> None:
    """In the daemon's own words, where it is the daemon that refuses."""
    code, out, err = printed(capsys, url(live), *words)
    assert (code, out) == (1, "")
    assert says in err


@pytest.mark.parametrize(
    ("where", "says"),
    [
        ("http://127.0.0.1:1", "Connection refused"),
        ("unix:/nowhere/admin.sock", "No such file"),
        ("ftp://127.0.0.1", "expected http://HOST:PORT or unix:PATH"),
        ("127.0.0.1:9080", "expected http://HOST:PORT or unix:PATH"),
        ("http://127.0.0.1:port", "expected http://HOST:PORT or unix:PATH"),
        ("http://[::1", "expected http://HOST:PORT or unix:PATH"),
    ],
)
def test_a_site_that_is_not_there_is_said(
    capsys: pytest.CaptureFixture[str], where: str, says: str
) -> None:
    """With what was asked."""
    code, _, err = printed(capsys, where, "--once")
    assert code == 1
    assert err.startswith(where)
    assert says in err


def test_a_listener_for_metrics_is_none(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The command says which one is meant."""
    config = provider_table("p", url="http://127.0.0.1:1") + route_table("/p", "p")
    admin = 'metrics_listen = "tcp:0:interface=127.0.0.1"'
    with Daemon(tmp_path, config, admin=admin) as daemon:
        until(lambda: len(_ports(daemon)) == 2, "both listen")
        (other,) = _ports(daemon) - {daemon.admin_port}
        code, _, err = printed(capsys, f"http://127.0.0.1:{other}", "--once")
        assert code == 1
        assert "404" in err
        assert "`listen` in [admin]" in err


@pytest.mark.parametrize(
    ("data", "says"),
    [
        ("[]", "another form"),
        ("{}", "missing required field"),
        ('{"total": "many"}', "another form"),
        ("no JSON", "another form"),
    ],
)
@pytest.mark.parametrize("is_live", [False, True])
def test_a_state_of_another_form_is_said(
    capsys: pytest.CaptureFixture[str], data: str, says: str, *, is_live: bool
) -> None:
    """It is that of another version, and no traceback."""
    with answering(_EVENTS + f"data: {data}\n\n".encode()) as (where, _):
        if is_live:
            with Terminal(where) as terminal:
                terminal.wait("speaks another form", "trying again in 2 s")
                terminal.press("q")
                assert terminal.ended() == 0
            return
        code, out, err = printed(capsys, where, "--once")
        assert (code, out) == (1, "")
        assert says in err


@pytest.mark.parametrize(("data", "code"), [('{"new": 1}', 0), ("[]", 1)])
def test_json_is_handed_on(capsys: pytest.CaptureFixture[str], data: str, code: int) -> None:
    """Of whatever version the site is; but a state is an object."""
    with answering(_EVENTS + f"data: {data}\n\n".encode()) as (where, _):
        found, out, err = printed(capsys, where, "--once", "--json")
    assert found == code
    assert out == ("" if code else f"{data}\n")
    assert bool(err) is bool(code)


def test_a_follower_ends_whatever_the_server_says_of_the_connection() -> None:
    """``connection: close`` takes nothing from :meth:`Follower.stop`."""
    with answering(_EVENTS + b'data: {"n": 1}\n\n', is_held=True) as (where, _):
        follower = Site(where).follow({})
        states = follower.states(dict[str, int])
        assert next(states) == {"n": 1}
        threading.Timer(0.1, follower.stop).start()
        began = time.monotonic()
        with pytest.raises(SiteError):
            next(states)
        assert time.monotonic() - began < 5
        follower.close()


def test_a_unix_socket_is_named_as_in_the_configuration(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """With the options of ``listen``, which are for the daemon."""
    where = f"unix:{tmp_path}/admin.sock:mode=660"
    config = provider_table("p", url="http://127.0.0.1:1") + route_table("/p", "p")
    daemon = Daemon(tmp_path, config)
    text = daemon.config_path.read_text()
    before, admin, after = text.partition('[admin]\nlisten = "tcp:0:interface=127.0.0.1"')
    assert admin
    daemon.config_path.write_text(
        f'{before}[admin]\nlisten = "{where}"\nmetrics_listen = "tcp:0:interface=127.0.0.1"{after}'
    )
    with daemon:
        until(lambda: (tmp_path / "admin.sock").exists(), "it listens")
        for url in (where, where.removesuffix(":mode=660")):
            code, out, err = printed(capsys, url, "--once", "--json")
            assert (code, err) == (0, "")
            assert json.loads(out)["total"] == 0


def test_a_name_that_the_site_refuses_is_said(
    live: LiveProxy, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """With what can be done."""
    connect = socket.create_connection
    monkeypatch.setattr(
        "socket.create_connection", lambda to, *more: connect(("127.0.0.1", to[1]), *more)
    )
    code, _, err = printed(capsys, f"http://admin.example:{live.daemon.admin_port}", "--once")
    assert code == 1
    assert "421: the site refuses admin.example" in err
    assert "`hosts` in [admin]" in err


def test_one_viewer_too_many_tries_again(
    live: LiveProxy, capsys: pytest.CaptureFixture[str]
) -> None:
    """After the time that the daemon names, and the note says so."""
    with ExitStack() as viewers:
        for _ in range(MOST_VIEWERS):
            viewers.enter_context(closing(Site(url(live)).follow({"limit": "0"})))
        code, _, err = printed(capsys, url(live), "--once")
        assert code == 1
        assert "503: As many pages and programs follow the events as may: 10." in err
        with Terminal(url(live)) as terminal:
            terminal.wait("503: As many pages", "trying again in 5 s")
            began = time.monotonic()
            viewers.close()
            terminal.wait("model-0")
            assert time.monotonic() - began > 3  # what is seen of 5 s, and more than the usual 2
            terminal.press("q")
            assert terminal.ended() == 0


@contextmanager
def answering(raw: bytes, *, is_held: bool = False) -> Iterator[tuple[str, list[bytes]]]:
    """Something at a URL that sends these bytes to everybody, and what it was sent.

    Args:
        raw: the response.
        is_held: a connection stays open until its client leaves.
    """
    got = list[bytes]()

    def answer(wire: Wire) -> None:
        got.append(wire.receive())
        wire.send(raw)
        if is_held:
            wire.wait_closed()

    with Provider(answer) as server:
        yield server.url, got


@pytest.fixture
def stranger() -> Iterator[tuple[str, list[bytes]]]:
    """Something at a URL that answers with escape sequences; and what it was sent."""
    got = list[bytes]()

    def answer() -> None:
        accepted, _ = listener.accept()
        with accepted:
            got.append(accepted.recv(65536))
            accepted.sendall(b"HTTP/1.1 500 \x1b[31mred\x07\r\ncontent-length: 0\r\n\r\n")

    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=answer, daemon=True)
        thread.start()
        yield f"http://127.0.0.1:{listener.getsockname()[1]}", got
        thread.join(WAIT)


def test_an_error_does_nothing_to_a_terminal(
    stranger: tuple[str, list[bytes]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Whoever answers; and who only reads shows no token."""
    (tmp_path / "token").write_text(TOKEN)
    code, _, err = printed(capsys, stranger[0], "--once", "--token-file", str(tmp_path / "token"))
    assert (code, err) == (1, f"{stranger[0]}: 500: \\x1b[31mred\\x07\n")
    assert TOKEN.encode() not in stranger[1][0]


@pytest.mark.parametrize("text", ["one-SECRET\ntwo-SECRET", "one-SECRET two", "\n"])
def test_a_file_that_holds_more_than_a_token_is_not_shown(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], text: str
) -> None:
    """It is named, and nothing of it is printed."""
    (tmp_path / "token").write_text(text)
    words = ("http://127.0.0.1:1", "--once", "--token-file", str(tmp_path / "token"))
    code, _, err = printed(capsys, *words)
    assert code == 1
    assert "expected the admin token" in err
    assert "SECRET" not in err


def test_a_state_may_be_as_late_as_it_was_asked_for(
    live: LiveProxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A daemon that sends one every few seconds is not gone in between."""
    monkeypatch.setattr("llmproxy.cli.top.site._SLOW_S", 0.5)
    with closing(Site(url(live)).follow({"every": "2"})) as follower:
        states = follower.states(State)
        assert [next(states).total, next(states).total] == [STREAMS, STREAMS]


def _ports(daemon: Daemon) -> set[int]:
    return {line["port"] for line in list(daemon.log) if line.get("site") == "admin"}


# --- a terminal -----------------------------------------------------------------------------------


_CONTROLLED = """\
import fcntl, os, sys, termios
fcntl.ioctl(0, termios.TIOCSCTTY, 0)
os.execv(sys.argv[1], sys.argv[1:])
"""
"""Runs a program with its standard input as the controlling terminal, as a window does."""

_SHELL = 'set -m; "$@"; echo "at the prompt"; read -r; fg; echo "ended with $?"'
"""What somebody does in a shell: Ctrl-Z, Enter, and then ``fg``."""


class Terminal:
    """The command in a terminal of its own.

    Args:
        words: its arguments.
        environ: further environment variables.
        shell: a script of ``bash`` that runs the command, which is ``"$@"``.

    Attributes:
        seen: what was drawn since a key was pressed last.
    """

    def __init__(
        self, *words: str, environ: dict[str, str] | None = None, shell: str | None = None
    ) -> None:
        self._command = [sys.executable, "-m", "llmproxy.cli.main", "top", *words]
        if shell is not None:
            self._command = ["/bin/bash", "-c", shell, "bash", *self._command]
        self._environ = environ or {}
        self.seen = ""

    def __enter__(self) -> Self:
        self._ours, theirs = pty.openpty()
        termios.tcsetwinsize(theirs, (40, 200))
        self._theirs = theirs
        self.before = termios.tcgetattr(theirs)
        self.process = subprocess.Popen(
            [sys.executable, "-c", _CONTROLLED, *self._command],
            cwd=ROOT,
            stdin=theirs,
            stdout=theirs,
            stderr=theirs,
            env={**os.environ, "TERM": "xterm-256color", **self._environ},
            start_new_session=True,
        )
        return self

    def __exit__(self, *_: object) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()
        self.close()
        os.close(self._theirs)

    def close(self) -> None:
        """Close the window."""
        if self._ours >= 0:
            os.close(self._ours)
        self._ours = -1

    def resize(self, height: int, width: int) -> None:
        """Make the window larger or smaller; what was seen before is forgotten."""
        self.seen = ""
        termios.tcsetwinsize(self._ours, (height, width))

    def is_as_before(self) -> bool:
        """Return whether the terminal is in the mode in which the command found it."""
        return termios.tcgetattr(self._theirs)[:4] == self.before[:4]

    def press(self, keys: str) -> None:
        """Press keys; what was seen before is forgotten."""
        self.seen = ""
        os.write(self._ours, keys.encode())

    def wait(self, what: str, *more: str) -> None:
        """Wait until all of these texts were drawn."""
        self._until(lambda: all(one in self.seen for one in (what, *more)), (what, *more))

    def wait_picture(self, pattern: str) -> None:
        """Wait until one picture has this pattern."""
        found = re.compile(pattern, re.DOTALL)
        self._until(lambda: any(map(found.search, self.seen.split("\x1b[H"))), pattern)

    def _until(self, condition: Callable[[], bool], what: object) -> None:
        deadline = time.monotonic() + WAIT
        while not condition():
            if time.monotonic() > deadline:
                raise TimeoutError(f"never seen: {what} in {self.seen[-6000:]!r}")
            self._read()

    def ended(self) -> int:
        """Wait for the end; return the exit code, the terminal as it was before."""
        deadline = time.monotonic() + WAIT
        while self.process.poll() is None and time.monotonic() < deadline:
            self._read()
        code = self.process.wait(1)
        assert self.is_as_before()
        self._read()
        return code

    def _read(self) -> None:
        while select.select([self._ours], [], [], 0.1)[0]:
            self.seen += os.read(self._ours, 65536).decode("utf-8", "replace")


def test_a_terminal_is_drawn_and_given_back(live: LiveProxy) -> None:
    """On a screen of its own, which is left at the end; ``?`` shows the keys."""
    with Terminal(url(live)) as terminal:
        terminal.wait("\x1b[?1049h", f"{STREAMS} streams", "model-0")
        terminal.press("?")
        terminal.wait("q quit")
        terminal.press("q")
        assert terminal.ended() == 0
        assert "\x1b[?1049l" in terminal.seen


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_gives_the_terminal_back(live: LiveProxy, number: signal.Signals) -> None:
    """As ``q`` does."""
    with Terminal(url(live)) as terminal:
        terminal.wait("model-0")
        terminal.process.send_signal(number)
        assert terminal.ended() == 0
        assert "\x1b[?1049l" in terminal.seen


def test_a_window_that_is_closed_ends_it(live: LiveProxy) -> None:
    """Without an error, though nothing can be written any more."""
    with Terminal(url(live)) as terminal:
        terminal.wait("model-0")
        terminal.close()
        assert terminal.process.wait(WAIT) == 0


def test_a_shell_gets_the_terminal_meanwhile(live: LiveProxy) -> None:
    """Ctrl-Z gives it back as it was, and ``fg`` draws the picture again."""
    with Terminal(url(live), shell=_SHELL) as terminal:
        terminal.wait("\x1b[?1049h", "model-0")
        terminal.press("\x1a")
        terminal.wait("at the prompt")
        assert terminal.seen.index("\x1b[?1049l") < terminal.seen.index("at the prompt")
        assert terminal.is_as_before()
        terminal.press("\r")
        terminal.wait("\x1b[?1049h", "model-0")
        assert not terminal.is_as_before()
        terminal.press("q")
        terminal.wait("ended with 0")
        assert terminal.ended() == 0


def test_another_stop_takes_the_terminal_again(live: LiveProxy) -> None:
    """SIGSTOP cannot be noticed; what follows it can."""
    with Terminal(url(live)) as terminal:
        terminal.wait("model-0")
        terminal.process.send_signal(signal.SIGSTOP)
        os.waitid(os.P_PID, terminal.process.pid, os.WSTOPPED)
        terminal.press("")
        terminal.process.send_signal(signal.SIGCONT)
        terminal.wait("\x1b[?1049h", "model-0")
        terminal.press("q")
        assert terminal.ended() == 0


def test_a_window_of_another_size_is_drawn_anew(live: LiveProxy) -> None:
    """At once, and not with the next state; a size in the environment is that of the start."""
    environ = {"COLUMNS": "90", "LINES": "20"}
    with Terminal(url(live), "--every", "60", environ=environ) as terminal:
        terminal.wait("model-0")
        for width in (120, 150):
            terminal.resize(30, width)
            terminal.wait("model-0")
        terminal.press("q")
        assert terminal.ended() == 0


@pytest.mark.parametrize(("environ", "is_coloured"), [({}, True), ({"NO_COLOR": "1"}, False)])
def test_colours_can_be_left_out(
    live: LiveProxy, environ: dict[str, str], is_coloured: bool
) -> None:
    """By ``NO_COLOR``, as in other programs."""
    with Terminal(url(live), environ=environ) as terminal:
        terminal.wait("streaming")
        assert bool(re.search(r"\x1b\[(?:\d+;)*3\d", terminal.seen)) is is_coloured
        terminal.press("q")
        assert terminal.ended() == 0


@pytest.fixture
def keys(monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[int, Keyboard]]:
    """The end of a terminal where keys are pressed, and the keyboard that reads them."""
    ours, theirs = pty.openpty()
    with os.fdopen(ours, "wb", 0), os.fdopen(theirs, "rb", 0) as stdin:
        monkeypatch.setattr("sys.stdin", stdin)
        with Keyboard() as keyboard:
            yield ours, keyboard


@pytest.mark.parametrize("split", [1, 2])
def test_an_arrow_may_come_in_pieces(
    keys: tuple[int, Keyboard], monkeypatch: pytest.MonkeyPatch, split: int
) -> None:
    """It is no Escape with letters behind it."""
    monkeypatch.setattr("llmproxy.cli.top.keyboard._ESCAPE_S", WAIT)
    ours, keyboard = keys
    arrow = b"\x1b[B"
    os.write(ours, arrow[:split])
    rest = threading.Timer(0.1, os.write, (ours, arrow[split:] + "é".encode()[:1]))
    rest.start()
    assert keyboard.read(WAIT) == "down"
    rest.join()
    os.write(ours, "é".encode()[1:])
    assert keyboard.read(WAIT) == "é"


def test_escape_alone_is_a_key(keys: tuple[int, Keyboard]) -> None:
    """Nothing has to follow it; and what follows much later is another key."""
    ours, keyboard = keys
    os.write(ours, b"\x1b")
    assert keyboard.read(WAIT) == "escape"
    os.write(ours, b"[\x1b[A\t")
    assert [keyboard.read(WAIT) for _ in range(3)] == ["[", "up", "tab"]
    assert keyboard.read(0) is None


def test_keys_sort_and_filter(live: LiveProxy) -> None:
    """The daemon does both."""
    with Terminal(url(live)) as terminal:
        terminal.wait("by -age", "model-0")
        terminal.press("e")
        terminal.wait("by -events")
        terminal.press("r")
        terminal.wait("by events")
        terminal.press("/")
        terminal.wait("filter: _")
        terminal.press("zz\x7f\x7fa\r")
        terminal.wait(f"1-3 of {STREAMS // 2}", "by events, client=a")
        terminal.press("q")
        assert terminal.ended() == 0


def test_a_stream_is_ended_by_key(live: LiveProxy, tmp_path: Path) -> None:
    """Behind a question, and with the token alone."""
    (tmp_path / "token").write_text(f"{TOKEN}\n")
    for options, says in (((), "401"), (("--token-file", str(tmp_path / "token")), "is ended")):
        with Terminal(url(live), *options) as terminal:
            terminal.wait("model-0")
            terminal.press("x")
            terminal.wait("Select a stream first")
            terminal.press("j")
            terminal.press("x")
            terminal.wait("? y/n")
            terminal.press("n")
            terminal.wait("q quit")
            terminal.press("x")
            terminal.wait("? y/n")
            terminal.press("y")
            terminal.wait(says)
            terminal.press("q")
            assert terminal.ended() == 0
    until(lambda: [one["end_reason"] for one in live.daemon.traces()] == ["killed"], "one is ended")


@pytest.mark.parametrize(
    ("typed", "says"),
    [
        ("client=a model=model-0", "1-1 of 1 by -age, client=a model=model-0"),
        ("b phase=streaming", "1-3 of 3 by -age, client=b phase=streaming"),
        ("provider=p route=p", "of 6 by -age, route=p provider=p"),
        ("session=s", "of 0, session=s"),
        ("'client=a b'", "of 0, 'client=a b'"),
    ],
)
def test_a_filter_has_names(live: LiveProxy, typed: str, says: str) -> None:
    """Those of the site; the title says what is in force, and none is in force when it is empty."""
    with Terminal(url(live)) as terminal:
        terminal.wait("model-0")
        terminal.press(f"/{typed}\r")
        terminal.wait(says)
        terminal.press("/")
        terminal.wait(f"filter: {says.partition(', ')[2]}_")
        terminal.press("\x7f" * 50 + "\r")
        terminal.wait(f"1-{STREAMS} of {STREAMS} by -age\x1b[0m")
        terminal.press("q")
        assert terminal.ended() == 0


def test_a_filter_that_is_none_can_be_corrected(live: LiveProxy) -> None:
    """The note says what is wrong, and keeps what was typed."""
    with Terminal(url(live)) as terminal:
        terminal.wait("model-0")
        terminal.press("/colour=a\r")
        terminal.wait("filter: colour=a_", "there is no 'colour', but client, route")
        terminal.press("\x7f" * 8 + "'a\r")
        terminal.wait("a quote is not closed")
        terminal.press("\x7f\x7fmodel=x model=y\r")
        terminal.wait("expected one model")
        terminal.press("\x1b")
        terminal.wait("q quit", f"of {STREAMS} by -age")
        terminal.press("q")
        assert terminal.ended() == 0


def test_the_filters_are_those_of_the_site() -> None:
    """Any that is written is read back; and the site has no other."""
    assert set(FILTERS) == set(PARAMETERS) - {"sort", "limit", "offset"}
    query = {name: f"a' \"{name}=\\" for name in FILTERS}
    assert parsed(written(query | {"sort": "age"})) == query


def test_the_keys_are_documented() -> None:
    """Those that sort by their names, and all others that the help has."""
    text = (ROOT / "docs/admin.rst").read_text()
    section = text[text.index("In a terminal\n") : text.index("Paths\n")]
    for key, name in SORTS.items():
        assert f"``{key}``" in section
        assert f"``{name}``" in section
        assert f"{key} {name}" in HELP
    for key in ("q", "x", "/", "r", "k", "j"):
        assert f"``{key}``" in section
    assert "Tab" in section
    assert all(len(line) < 80 for line in HELP.splitlines())


def test_a_selection_ends_with_its_stream(live: LiveProxy, tmp_path: Path) -> None:
    """And so does the question about it."""
    (tmp_path / "token").write_text(TOKEN)
    site = Site(url(live), TOKEN)
    with Terminal(url(live), "--sort=age") as terminal:
        for left, is_asked in ((5, True), (4, False)):
            with closing(site.follow({"sort": "age"})) as follower:
                name = next(follower.states(State)).streams[0].id
            terminal.wait(name)
            terminal.press("j")
            if is_asked:
                terminal.press("x")
                terminal.wait(f"End the stream {name}? y/n")
            terminal.press("")
            site.end_stream(name)
            terminal.wait(f"1-{left} of {left} by age", f"{name} has ended." if is_asked else "")
            terminal.press("x")
            terminal.wait("Select a stream first")
        terminal.press("q")
        assert terminal.ended() == 0


def test_tab_changes_which_table_has_room_first(live: LiveProxy) -> None:
    """Clients, or abnormal ends."""
    with closing(Site(url(live), TOKEN).follow({})) as follower:
        Site(url(live), TOKEN).end_stream(next(follower.states(State)).streams[0].id)
    with Terminal(url(live)) as terminal:
        terminal.wait_picture("abnormal ends.*clients")
        terminal.press("\t")
        terminal.wait_picture("clients.*abnormal ends")
        terminal.press("\t")
        terminal.wait_picture("abnormal ends.*clients")
        terminal.press("q")
        assert terminal.ended() == 0


def test_a_slow_kill_holds_no_key_up(
    live: LiveProxy, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """Its result comes when it comes."""
    _, out, _ = printed(capsys, url(live), "--once", "--json")
    may_respond = threading.Event()

    def answer(wire: Wire) -> None:
        if wire.receive().startswith(b"DELETE"):
            may_respond.wait(WAIT)
            wire.send(b"HTTP/1.1 404 \r\ncontent-length: 0\r\n\r\n")
            return
        wire.send(_EVENTS, f"data: {out}\n".encode())
        wire.wait_closed()

    (tmp_path / "token").write_text(TOKEN)
    with (
        Provider(answer) as server,
        Terminal(server.url, "--token-file", str(tmp_path / "token")) as terminal,
    ):
        terminal.wait("model-0")
        terminal.press("jxy")
        terminal.wait("Ending the stream")
        terminal.press("?")
        terminal.wait("/ filter, as")
        terminal.press("/abc")
        terminal.wait("filter: abc_")
        may_respond.set()
        terminal.press("\x7f")
        terminal.wait("filter: ab_")
        terminal.press("\x1b")
        terminal.wait(f"{server.url}: 404")
        terminal.press("q")
        assert terminal.ended() == 0


def test_a_daemon_that_was_away_is_found_again(tmp_path: Path) -> None:
    """The picture goes on by itself."""
    config = provider_table("p", url="http://127.0.0.1:1") + route_table("/p", "p")
    (tmp_path / "first").mkdir()
    (tmp_path / "second").mkdir()
    with ExitStack() as stack:
        with Daemon(tmp_path / "first", config, instance="one") as daemon:
            where = f"http://127.0.0.1:{daemon.admin_port}"
            terminal = stack.enter_context(Terminal(where))
            terminal.wait("instance one")
        terminal.press("")
        terminal.wait("Connection refused; trying again in 2 s")
        again = Daemon(tmp_path / "second", config, instance="two")
        text = again.config_path.read_text()
        head, _, tail = text.partition("[admin]\n")
        tail = tail.replace("tcp:0:", f"tcp:{daemon.admin_port}:", 1)
        again.config_path.write_text(f"{head}[admin]\n{tail}")
        with again:
            terminal.press("")
            terminal.wait("instance two", "q quit")
            terminal.press("q")
            assert terminal.ended() == 0


def test_a_daemon_that_is_gone_is_said(live: LiveProxy) -> None:
    """The last picture stays, and the command tries again."""
    with Terminal(url(live)) as terminal:
        terminal.wait("model-0")
        live.daemon.terminate()
        terminal.wait("trying again")
        terminal.press("q")
        assert terminal.ended() == 0


@pytest.mark.parametrize(("width", "height"), [(80, 24), (200, 40)])
def test_many_providers_leave_room(
    live: LiveProxy, capsys: pytest.CaptureFixture[str], width: int, height: int
) -> None:
    """Streams and the note stay on the screen, and a provider that is off is among the first."""
    _, out, _ = printed(capsys, url(live), "--once", "--json")
    state = json.loads(out)
    (row,) = state["providers"]
    state["providers"] = [row | {"name": f"p{number}"} for number in range(40)]
    state["providers"][-1]["state"] = "off"
    view = View(note="A note.", height=height, width=width)
    read = msgspec.convert(state, State)
    console = Console(width=width, height=height, file=io.StringIO())
    lines = [
        "".join(one.text for one in line) for line in console.render_lines(picture(read, view))
    ]
    assert len([line for line in lines if line.strip()]) <= height
    assert lines[1].startswith("A note.")
    assert "of 40" in lines[2]
    assert " p39 " in lines[5]
    assert (
        sum(row["id"][:8] in line for line in lines for row in state["streams"])
        >= visible(read, view)
        >= 3
    )


END = EndedRow(
    id="e" * 24,
    time="2026-01-01T00:00:00.000Z",
    client="a",
    route="p",
    provider="p",
    model="m",
    status=200,
    end_reason="upstream_broken",
    error=None,
    cause="closed",
    duration_s=2.0,
    bytes_out=1,
)


@pytest.fixture
def state(live: LiveProxy) -> State:
    """The state of a daemon, with more of everything."""
    with closing(Site(url(live)).follow({})) as follower:
        found = next(follower.states(State))
    allowed = {
        "max_streams": Use(30, 30, 0, 30),
        "requests_per_minute": Use(60, 7, 53, 7),
        "tokens_per_day": Use(1_000_000, 999, 999_001, 999),
    }
    clients = [ClientRow("team-0", 30, allowed)]
    clients += [ClientRow(f"team-{number}", 30 - number, {}) for number in range(1, 30)]
    (*_, row) = found.streams
    row = structs.replace(row, provider="a-provider", client="a-long-team-name", model="gpt-5")
    streams = [structs.replace(row, id=f"{number:024}", tokens=12345) for number in range(40)]
    return structs.replace(found, streams=streams, ended=[END] * 20, clients=clients)


def drawn(state: State, view: View) -> list[str]:
    """Return the lines of a picture, as wide and high as the view says."""
    console = Console(width=view.width, height=view.height or 100, file=io.StringIO())
    lines = console.render_lines(picture(state, view), pad=False)
    found = ["".join(one.text for one in line) for line in lines]
    assert all(cell_len(line) <= view.width for line in found)
    return found


@pytest.mark.parametrize("width", [80, 100, 120, 150, 200])
def test_what_is_most_useful_stays_readable(state: State, width: int) -> None:
    """Other columns are left out of a narrow terminal, and no row takes two lines."""
    lines = drawn(state, View(height=24, width=width, note="n"))
    assert len(lines) == 24
    (heading,) = (line.split() for line in lines if "tokens" in line and "phase" in line)
    assert set(heading) >= {"id", "client", "model", "phase", "age", "tokens"}
    assert ("route" in heading) is (width >= 150)
    rows = [line for line in lines if line.startswith(" 0000000")]
    assert len(rows) == visible(state, View(height=24, width=width, note="n")) > 6
    assert all("a-long-team-n" in row and " 12345 " in row for row in rows)
    assert all("streaming" in row and "gpt-5" in row for row in rows)


@pytest.mark.parametrize(("height", "clients", "ended"), [(24, 0, 2), (44, 5, 9), (0, 30, 5)])
def test_clients_and_ends_share_what_is_left(
    state: State, height: int, clients: int, ended: int
) -> None:
    """Tab says which of them has room first."""
    for is_clients_first in (False, True):
        view = View(height=height, width=120, is_clients_first=is_clients_first)
        text = "\n".join(drawn(state, view))
        found = [len(re.findall(word, text, re.MULTILINE)) for word in ("^ team-", "^ eeee")]
        assert found == ([ended, clients] if is_clients_first and height else [clients, ended])
        assert ("clients" in text) is bool(found[0])
        if found[0] and found[1]:
            assert (text.index("\nclients") < text.index("\nabnormal")) is is_clients_first


def test_the_limits_of_clients_are_shown(state: State) -> None:
    """How much is used, of how much."""
    lines = drawn(state, View(width=120))
    first = next(line for line in lines if line.startswith(" team-0"))
    assert first.split() == ["team-0", "30/30", "7/60", "999/1000000"]
    second = next(line for line in lines if line.startswith(" team-1"))
    assert second.split() == ["team-1", "29"]


@pytest.mark.parametrize("width", [80, 200])
@pytest.mark.parametrize("name", ["m" * 5000, "模型" * 2000, HOSTILE * 100, "e\u0301" * 300])
def test_any_name_keeps_its_place(state: State, name: str, width: int) -> None:
    """Long ones are cut, wide ones counted by their columns, and control characters written out."""
    row = structs.replace(
        state.streams[0], id=name, client=name, route=name, provider=name, model=name, phase=name
    )
    end = structs.replace(END, id=name, client=name, end_reason=name, cause=name, model=name)
    hostile = structs.replace(
        state,
        streams=[row, *state.streams],
        ended=[end],
        clients=[ClientRow(name, 1, {})],
        providers=[structs.replace(state.providers[0], name=name)],
        process=structs.replace(state.process, instance=name),
    )
    view = View(width=width, height=40, filter=name, note="A note.")
    lines = drawn(hostile, view)
    assert len(lines) <= 40
    assert all(line.isprintable() for line in lines)


@pytest.mark.parametrize(
    ("seconds", "words"),
    [
        (None, ""),
        (0.04, "0.0s"),
        (9.9, "9.9s"),
        (60, "60s"),
        (600, "10m"),
        (7200, "2h"),
        (1e6, "11d"),
    ],
)
def test_durations_are_short(seconds: float | None, words: str) -> None:
    """In the unit that is read at a glance."""
    assert duration(seconds) == words


def test_sizes_are_short() -> None:
    """In thousands and millions."""
    assert [size(count) for count in (0, 9999, 10_000, 12_345_678)] == ["0", "9999", "10k", "12M"]


def test_a_unix_socket_can_be_the_site(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """As ``listen`` in ``[admin]`` has it; nobody else's page can reach it."""
    path = tmp_path / "admin.sock"
    config = tmp_path / "llmproxy.toml"
    text = '[proxy]\nlisten = ["tcp:0:interface=127.0.0.1"]\nanonymous = true\n'
    text += f'[admin]\nlisten = "unix:{path}"\n'
    text += provider_table("p", url="http://127.0.0.1:1") + route_table("/p", "p")
    config.write_text(text)
    with subprocess.Popen(
        twistd(config), cwd=tmp_path, env=environment(), stdout=subprocess.DEVNULL
    ) as daemon:
        try:
            until(path.exists, "the admin site listens")
            code, out, err = printed(capsys, f"unix:{path}", "--once", "--json")
        finally:
            daemon.terminate()
    assert (code, err) == (0, "")
    assert [row["name"] for row in json.loads(out)["providers"]] == ["p"]
