"""What the tests of records share: a record, bounded waits, and lines read back."""

from __future__ import annotations

import json
import sqlite3
import threading
import time
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

from llmproxy.record.trace import Trace
from tests.support.sockets import WAIT


def trace(number: int = 0, **fields: Any) -> Trace:
    """Return a record whose id is ``number``."""
    given: dict[str, Any] = {
        "time": "2026-11-01T00:00:00.000Z",
        "id": str(number),
        "instance": "0",
        "peer": "::1",
        "method": "GET",
        "path": "/",
    }
    return Trace(**given | fields)


def eventually(condition: Callable[[], Any]) -> None:
    """Wait for a writer's thread; in the middle of a write a condition may fail."""
    deadline = time.monotonic() + WAIT
    while True:
        is_late = time.monotonic() >= deadline
        try:
            if condition():
                return
        except AssertionError:
            if is_late:
                raise
        assert not is_late, "it did not come about"
        threading.Event().wait(0.001)


def writing_threads() -> int:
    """Return how many threads of writers run."""
    return sum(thread.name == "trace" for thread in threading.enumerate())


def ids_in(path: Path) -> list[int]:
    """Return the ids in a trace file; every line must be whole."""
    text = path.read_bytes()
    assert not text or text.endswith(b"\n")
    return [int(json.loads(line)["id"]) for line in text.splitlines()]


def query(path: Path, words: str) -> list[tuple[Any, ...]]:
    """Return the rows of a query to a ledger."""
    with closing(sqlite3.connect(path)) as connection:
        return connection.execute(words).fetchall()


def ids_of(path: Path) -> list[int]:
    """Return the ids in a ledger, in the order in which they were written."""
    return [int(number) for (number,) in query(path, "SELECT id FROM traces ORDER BY rowid")]
