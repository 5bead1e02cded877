"""``llmproxy usage``: what it prints where, of which ledgers, and with which code it ends."""

from __future__ import annotations

import json
import re
import sqlite3
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from llmproxy.cli import usage
from llmproxy.cli.main import main
from llmproxy.record.ledger import Ledger
from llmproxy.record.trace import Trace
from tests.support.records import trace

NOW = 1_793_577_600.0  # 2026-11-02T00:00:00Z


def fill(path: Path, *traces: Trace) -> str:
    """Make a ledger with these traces; return its name."""
    with closing(Ledger(str(path), keep_s=None, wall=lambda: NOW)) as ledger:
        ledger.put(list(traces))
    return str(path)


@pytest.fixture
def ledger(tmp_path: Path) -> str:
    """A ledger with three requests."""
    reported: dict[str, Any] = {"usage": "reported", "is_complete": True}
    return fill(
        tmp_path / "ledger",
        trace(1, client="a", model="m", session="s", input_tokens=1000, **reported),
        trace(2, client="a", model="m", session="s", time="2026-11-02T00:00:00.000Z"),
        trace(3, client="b", model="n", input_tokens=0, output_tokens=5, **reported),
    )


@pytest.fixture
def config_file(tmp_path: Path) -> Path:
    """A configuration file whose ledger has the instance in its name; nothing else is whole."""
    path = tmp_path / "llmproxy.toml"
    path.write_text(
        f'[trace]\nledger = "{tmp_path}/led[ge]r-{{instance}}.db"\n'
        '[providers.p]\ncredential = "not-there"\n'
    )
    return path


def printed(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """Return what a command that goes well prints."""
    assert main(["usage", *arguments]) == 0
    captured = capsys.readouterr()
    assert captured.err == ""
    return captured.out


def json_report(capsys: pytest.CaptureFixture[str], *arguments: str) -> Any:
    """Return the JSON that it prints."""
    return json.loads(printed(capsys, *arguments, "--json"))


def rows(text: str) -> list[list[str]]:
    """Return the words of a table, line by line, without its rules."""
    lines = [line.split() for line in text.splitlines()]
    return [words for words in lines if words and words[0].isascii()]


def test_a_table(ledger: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Rows are by client and model, with a total; an unknown count is empty, and zero is zero."""
    text = printed(capsys, ledger)
    head, *body = rows(text)
    assert " ".join(head) == (
        "client model requests complete unreported input output cache read cache write reasoning"
    )
    assert body == [
        ["a", "m", "2", "1", "1", "1,000"],
        ["b", "n", "1", "1", "0", "0", "5"],
        ["total", "3", "2", "1", "1,000", "5"],
    ]
    assert "\x1b" not in text


def test_refused_requests_are_no_usage(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """What callers without a key, or with a wrong model, asked for makes no row; it is counted."""
    path = fill(
        tmp_path / "ledger",
        trace(1, client="a", model="m", end_reason="complete"),
        trace(2, model="gpt-nonsense", end_reason="rejected", error="no_key"),
        trace(3, client="a", model="other", end_reason="rejected", error="model_forbidden"),
        trace(4, client="a", model="m", end_reason="upstream_refused"),
    )
    text = printed(capsys, path)
    assert text.endswith("\nrefused by the proxy, and not counted above: 2 requests\n")
    _, *body, total, _ = rows(text)
    assert body == [["a", "m", "2", "0", "2"]]
    assert total[:2] == ["total", "2"]
    report = json_report(capsys, path)
    assert ([one["model"] for one in report["groups"]], report["refused"]) == (["m"], 2)
    assert json_report(capsys, path, "--since", "2026-11-03")["refused"] == 0


def test_json_report(ledger: str, capsys: pytest.CaptureFixture[str]) -> None:
    """A program reads groups and total; unknown is null."""
    report = json_report(capsys, ledger, "--by", "day,client")
    assert report["by"] == ["day", "client"]
    assert report["groups"][0] == {
        "day": "2026-11-01",
        "client": "a",
        "requests": 1,
        "complete": 1,
        "unreported": 0,
        "input_tokens": 1000,
        "output_tokens": None,
        "cache_read_tokens": None,
        "cache_write_tokens": None,
        "reasoning_tokens": None,
    }
    days = [group["day"][-1] + group["client"] for group in report["groups"]]
    assert days == ["1a", "1b", "2a"]
    assert report["total"]["requests"] == 3


@pytest.mark.parametrize(
    ("since", "count"),
    [
        ("24h", 3),
        ("1d", 3),
        ("23h", 1),
        ("2026-11-01", 3),
        ("2026-11-02", 1),
        ("2026-11-01T00:00:00.001Z", 1),
        ("2026-11-01T01:00+01:00", 3),
        ("2026-11-03", 0),
        ("0001-01-01T00:00+23:00", 3),
    ],
)
def test_a_report_since_a_time(
    since: str,
    count: int,
    ledger: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A duration, a day or a moment limits the report; days begin in UTC."""
    monkeypatch.setattr(usage.time, "time", lambda: NOW)  # type: ignore[attr-defined]  # its import
    assert json_report(capsys, ledger, "--since", since)["total"]["requests"] == count


def test_a_report_of_sessions(ledger: str, capsys: pytest.CaptureFixture[str]) -> None:
    """The checkpoint of each session, as a table and for programs."""
    _, row = rows(printed(capsys, ledger, "--sessions"))
    assert row[:2] == ["s", "a"]
    assert row[2:4] == ["2026-11-01T00:00:00.000Z", "2026-11-02T00:00:00.000Z"]
    assert row[4:] == ["2", "2", "1", "1", "1,000"]
    (session,) = json_report(capsys, ledger, "--sessions")["sessions"]
    assert (session["session"], session["client"], session["last_trace"]) == ("s", "a", "2")
    assert (session["requests"], session["complete"], session["incomplete"]) == (2, 1, 1)
    assert json_report(capsys, ledger, "--sessions", "--since", "2026-11-03") == {"sessions": []}


def test_every_instance_is_counted(
    config_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The ledger's name stands for the files of all instances; nothing else in the file is read."""
    for number, name in enumerate(("0", "west.1", "-")):
        fill(tmp_path / f"led[ge]r-{name}.db", trace(number, instance=name))
    for name in ("ledger-0.db", "led[ge]r-a b.db", "led[ge]r-0.db-wal", "led[ge]r-.db"):
        (tmp_path / name).write_text("no ledger")
    report = json_report(capsys, "--config", str(config_file), "--by", "instance")
    assert [group["instance"] for group in report["groups"]] == ["-", "0", "west.1"]


def test_the_files_of_the_write_ahead_log_are_no_ledgers(
    config_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A name that ends with the instance fits the files of the write-ahead log, too."""
    config_file.write_text(f'[trace]\nledger = "{tmp_path}/{{instance}}/ledger-{{instance}}"\n')
    for name in ("0", "1", "x"):
        (tmp_path / name).mkdir()
    for name in ("0", "1"):
        fill(tmp_path / name / f"ledger-{name}", trace(int(name)))
        (tmp_path / name / f"ledger-{name}-wal").touch()
    (tmp_path / "x" / "ledger-y").write_text("of no instance: its two names differ")
    assert json_report(capsys, "--config", str(config_file))["total"]["requests"] == 2


def test_one_name_for_all(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A ledger without an instance in its name is that one file."""
    config = tmp_path / "c.toml"
    config.write_text(f'[trace]\nledger = "{fill(tmp_path / "ledger", trace(1))}"\n')
    assert json_report(capsys, "--config", str(config))["total"]["requests"] == 1


def test_files_as_arguments(
    ledger: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Several ledgers are added up, and no configuration is needed."""
    other = fill(tmp_path / "other", trace(9, client="a", model="m"))
    report = json_report(capsys, ledger, other, "--config", "/none", "--by", "client")
    assert [group["requests"] for group in report["groups"]] == [3, 1]


def test_a_ledger_that_cannot_be_read_is_reported(
    ledger: str, config_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The command prints one line to stderr and no half of a table, and ends with the code 1."""
    (tmp_path / "text").write_text("text" * 1000)
    newer = fill(tmp_path / "newer")
    with closing(sqlite3.connect(newer)) as connection:
        connection.execute("PRAGMA user_version = 99")
    bare, wrong = tmp_path / "bare.toml", tmp_path / "wrong.toml"
    bare.write_text('[trace]\njsonl = "/t"\n')
    wrong.write_text('[trace]\nledger = "relative"\n')
    for arguments, words in (
        ([ledger, str(tmp_path / "none")], "none: there is no such file"),
        ([ledger, str(tmp_path / "text")], "text: file is not a database"),
        ([newer, ledger], "newer: a ledger of a newer version"),
        (["--config", str(bare)], "no ledger is configured ([trace] ledger)"),
        (["--config", str(config_file)], "there is no such file, of any instance"),
        (["--config", str(wrong)], "trace.ledger: expected an absolute path"),
        (["--config", "/none.toml"], "/none.toml: expected a file to read"),
    ):
        assert main(["usage", *arguments]) == 1
        captured = capsys.readouterr()
        assert captured.out == ""
        assert words in captured.err
        assert captured.err.count("\n") == 1


def test_callers_words_do_nothing_to_a_terminal(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Control characters and rich's markup are shown as plain text."""
    path = fill(tmp_path / "ledger", trace(1, model="\x1b[2J[bold]m\n\N{SNOWMAN}"))
    (row,) = [words for words in rows(printed(capsys, path)) if words[0] == "-"]
    assert row[1] == "\\x1b[2J[bold]m\\n\N{SNOWMAN}"
    assert json_report(capsys, path)["groups"][0]["model"] == "\x1b[2J[bold]m\n\N{SNOWMAN}"


def test_a_pipe_gets_whole_words(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A long word is not cut, wrapped or padded to a terminal's width."""
    word = "m" * 500
    path = fill(tmp_path / "ledger", trace(1, model=word))
    assert word in printed(capsys, path)


def test_a_terminal_gets_its_own_width(
    ledger: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a terminal a table fits the window."""
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    monkeypatch.setenv("COLUMNS", "100")
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr(Console, "is_terminal", property(lambda _: True))
    lines = re.sub(r"\x1b\[[0-9]*m", "", printed(capsys, ledger)).splitlines()
    assert {len(line) for line in lines} == {100}


def test_tunnels_are_hosts_and_no_requests(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A team writes its list from what it sees; none is in a total, nor among the refused."""
    at = {"time": "2026-11-01T10:00:00.000Z"}
    first = fill(
        tmp_path / "one",
        trace(1, client="a", model="m"),
        trace(2, path="h:443", method="CONNECT", client="a", tunnel="would_refuse", bytes_in=5),
        trace(3, path="h:443", method="CONNECT", client="a", tunnel="would_refuse", bytes_out=7),
        trace(4, path="x:443", tunnel="refused", end_reason="rejected"),
        trace(5, path="i:443", tunnel="intercepted", is_complete=True, **at),
        trace(7, path="http://f.example/a", client="a", tunnel="forwarded", bytes_in=1),
        trace(8, path="http://F.example:80/b", client="a", tunnel="forwarded", bytes_in=2),
        trace(9, path="http://[fd12::1]:81", client="a", tunnel="forwarded"),
        trace(10, path="x:443", tunnel="refused", end_reason="rejected", error="no_key"),
    )
    other = fill(
        tmp_path / "two", trace(6, path="h:443", client="a", tunnel="would_refuse", bytes_in=1000)
    )
    found = json_report(capsys, first, other, "--tunnels")["tunnels"]
    assert [tuple(one.values())[:7] for one in found] == [
        ("h:443", "would_refuse", None, "a", 3, 1005, 7),
        ("f.example:80", "forwarded", None, "a", 2, 3, 0),
        ("[fd12::1]:81", "forwarded", None, "a", 1, 0, 0),
        ("i:443", "intercepted", None, None, 1, 0, 0),
        ("x:443", "refused", None, None, 1, 0, 0),
        ("x:443", "refused", "no_key", None, 1, 0, 0),
    ]
    assert found[3]["last_time"] == at["time"]
    later = json_report(capsys, first, "--tunnels", "--since", "2026-11-01T12:00")["tunnels"]
    assert "i:443" not in [one["host"] for one in later]
    head, *body = rows(printed(capsys, first, other, "--tunnels"))
    assert " ".join(head) == "host outcome error client count bytes in bytes out last time"
    assert body[0][:7] == ["h:443", "would_refuse", "-", "a", "3", "1,005", "7"]
    totals = json_report(capsys, first)
    assert (totals["total"]["requests"], totals["refused"]) == (1, 0)
