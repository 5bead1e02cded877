"""What the daemon's start imports: what it runs on, and what only some configurations need not.

The rule is in ``docs/performance.rst``.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

from tests.support.daemon import Daemon, twistd

USUAL = """\
[providers.up]
url = "https://provider.example"
dialect = "openai"
[[routes]]
path = "/openai"
providers = ["up"]
"""

LATE = {
    "sqlite3": "a ledger",
    "wsproto": "a route with WebSockets",
    "psycopg": "a ledger in PostgreSQL",
    "h11": "wsproto",
    "brotli": "a body in that coding",
    "backports.zstd": "a body in that coding",
    "compression.zstd": "a body in that coding",
    "llmproxy.record.otlp": "a collector",
    "llmproxy.record.ledger_report": "a ledger",
    "importlib.metadata": "nothing",
    "twisted.web.server": "nothing",
    "twisted.spread": "nothing",
    "rich": "a command",
    "llmproxy.cli": "a command",
}
"""Modules, and what brings them."""


def imported(folder: Path, config: str) -> set[str]:
    """Start a daemon, and return what it has imported when it is ready."""
    folder.mkdir()
    said = folder / "imports"

    def command(path: Path) -> list[str]:
        python = ["-X", "importtime", *twistd(path)]
        return ["/bin/sh", "-c", f'exec "$@" 2>{said}', "sh", sys.executable, *python]

    with Daemon(folder, config, command=command) as daemon:
        assert daemon.admin("/readyz") == "ready\n"
    found = re.findall(r"^import time:.*\| +(\S+)$", said.read_text(), re.MULTILINE)
    assert "llmproxy.service" in found
    return set(found)


def test_the_start_imports_what_every_configuration_needs(tmp_path: Path) -> None:
    """Nothing that one key, one kind of message or one command needs is there when it is ready."""
    found = imported(tmp_path / "usual", USUAL)
    assert {name: why for name, why in LATE.items() if name in found} == {}


def test_the_start_imports_what_the_configuration_asks_for(tmp_path: Path) -> None:
    """No first request waits for the modules of a key: they are there when the daemon is ready."""
    ledger = f'ledger = "{tmp_path}/ledger.sqlite3"\n'
    found = imported(tmp_path / "more", f"{ledger}{USUAL}websocket = true\n")
    assert {"sqlite3", "wsproto"} <= found
