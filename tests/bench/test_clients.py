"""The script that tries real clients, tried itself with a client of the standard library."""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

import pytest

from bench import clients
from bench.clients import Client, Failed, bounded, try_client

STREAMS = """\
from urllib.request import Request, urlopen

def call():
    body = json.dumps({"model": MODEL, "messages": MESSAGES, "stream": True}).encode()
    fields = {"content-type": "application/json", "authorization": f"Bearer {KEY}"}
    with urlopen(Request(f"{BASE}/openai/v1/chat/completions", body, fields)) as response:
        PIECES
"""
AT_ONCE = "yield from [response.read()] * 9"
PIECE_BY_PIECE = "yield from iter(response.readline, b'')"


@pytest.fixture
def _nothing_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    def install(client: Client, folder: Path) -> list[str]:
        program = folder / "program.py"
        program.write_text(clients.BEFORE + client.program + clients.AFTER)
        return [sys.executable, str(program)]

    monkeypatch.setattr(clients, "install", install)


@pytest.mark.usefixtures("_nothing_installed")
@pytest.mark.parametrize(("pieces", "streamed"), [(AT_ONCE, "no"), (PIECE_BY_PIECE, "yes")])
def test_row_says_whether_text_came_piece_by_piece(
    pieces: str, streamed: str, tmp_path: Path
) -> None:
    """Pieces that come together are no stream; end, usage and connections are in the row, too."""
    client = Client(("urllib==3.11",), STREAMS.replace("PIECES", pieces))
    row = try_client("urllib", client, tmp_path)
    assert row.streamed.startswith(streamed)
    assert (row.release, row.ended, row.usage, row.connections) == ("3.11", "complete", "none", "1")


@pytest.mark.usefixtures("_nothing_installed")
def test_client_that_fails_has_a_row(tmp_path: Path) -> None:
    """The row has the last error in place of what was seen."""
    row = try_client("odd", Client(("odd==1",), "raise ValueError('no such thing')\n"), tmp_path)
    assert row.streamed == "failed: exit 1: ValueError: no such thing"


def test_what_takes_too_long_is_ended_with_all_that_it_started(tmp_path: Path) -> None:
    """A child that holds the output open does not hold up the script, and does not live on."""
    child = f"sh -c 'echo $$ >{tmp_path}/pid; sleep 600'"
    began = time.monotonic()
    with pytest.raises(Failed, match="not done within 1 s"):
        bounded(["sh", "-c", f"{child} & wait"], 1, cwd=tmp_path, environ=os.environ)
    assert time.monotonic() - began < 60
    stat = Path("/proc", (tmp_path / "pid").read_text().strip(), "stat")
    assert not stat.exists() or stat.read_text().rpartition(")")[2].split()[0] == "Z"
