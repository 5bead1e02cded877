"""PostgreSQL beside the other sinks: what it has, and that its troubles are its own."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from llmproxy.config import Trace as TraceConfig
from llmproxy.config.credentials import Secret
from llmproxy.record.ledger_steps import LedgerError
from llmproxy.record.sinks import Sinks
from llmproxy.record.writer import QUEUE
from tests.record.conftest import write
from tests.support.postgres import PASSWORD, PostgresServer
from tests.support.records import eventually, ids_in, ids_of, trace, writing_threads
from tests.support.sockets import WAIT


@contextmanager
def opened(queue: int = QUEUE, **config: Any) -> Iterator[Sinks]:
    """Open the sinks of a configuration, and close them in the end."""
    sinks = Sinks(clock=time.monotonic, wall=lambda: 1_793_577_600.0, instance="7", queue=queue)
    sinks.use(sinks.prepare(TraceConfig(**config)))
    try:
        yield sinks
    finally:
        sinks.close()


def has(ids: Callable[[Path], list[int]], path: Path, count: int) -> None:
    """Wait until another sink has so many records."""
    eventually(lambda: len(ids(path)) == count)


@pytest.fixture(autouse=True)
def _short(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pauses and deadlines are short."""
    pytest.importorskip("psycopg")
    monkeypatch.setattr("llmproxy.record.postgres._LONGEST_PAUSE_S", 0.25)
    monkeypatch.setattr("llmproxy.record.sink_queue._LEAVING_S", 0.2)


def test_every_sink_gets_every_trace(
    postgres: PostgresServer, database: str, files: tuple[Path, Path]
) -> None:
    """Also where a file and a server both are ledgers."""
    lines, ledger = files
    url = postgres.url(database)
    with opened(jsonl=str(lines), ledger=str(ledger), postgres=url) as sinks:
        write(sinks, range(3000))
    assert ids_in(lines) == ids_of(ledger) == postgres.ids(database) == list(range(3000))
    assert sinks.losses() == {"jsonl": 0, "ledger": 0, "postgres": 0}


def test_it_keeps_up_with_three_thousand_in_a_second(
    postgres: PostgresServer, database: str
) -> None:
    """What comes in a second is written in less than that; slow machines are given three."""
    url = postgres.url(database)
    with opened(postgres=url) as sinks:
        sinks.write(trace(0))
        eventually(lambda: postgres.ids(database) == [0])
        began = time.monotonic()
        write(sinks, range(1, 3001))
        eventually(lambda: len(postgres.ids(database)) == 3001)
        assert time.monotonic() - began < 3


def test_a_server_that_goes_and_comes_loses_nothing(
    postgres: PostgresServer, database: str, files: tuple[Path, Path]
) -> None:
    """Whatever was under way is there once, and so is what came meanwhile."""
    lines, _ = files
    with opened(jsonl=str(lines), postgres=postgres.url(database)) as sinks:
        for turn in range(3):
            first = 2000 * turn
            write(sinks, range(first, first + 1000))
            postgres.stop()
            try:
                write(sinks, range(first + 1000, first + 2000))
                has(ids_in, lines, first + 2000)
            finally:
                postgres.start()
        eventually(lambda: len(postgres.ids(database)) == 6000)
    assert postgres.ids(database) == list(range(6000))
    assert sinks.losses() == {"jsonl": 0, "postgres": 0}


def test_a_server_that_hangs_holds_up_no_other_sink(
    postgres: PostgresServer, database: str, files: tuple[Path, Path]
) -> None:
    """Only what its own queue has no room for is lost, and counted."""
    lines, ledger = files
    url = postgres.url(database)
    with opened(100, jsonl=str(lines), ledger=str(ledger), postgres=url) as sinks:
        sinks.write(trace(0))
        eventually(lambda: postgres.ids(database) == [0])
        with postgres.halted():
            for number in range(1, 1001):
                sinks.write(trace(number))
                if number % 50 == 0:
                    has(ids_of, ledger, number + 1)
            assert sinks.losses()["postgres"] >= 800
        eventually(lambda: len(postgres.ids(database)) == 1001 - sinks.losses()["postgres"])
    assert ids_in(lines) == ids_of(ledger) == list(range(1001))
    assert sinks.losses() | {"postgres": 0} == {"jsonl": 0, "ledger": 0, "postgres": 0}
    assert postgres.ids(database) == sorted(postgres.ids(database))


def test_a_wrong_password_costs_what_the_queue_cannot_hold(
    postgres: PostgresServer, database: str, files: tuple[Path, Path], logged: list[str]
) -> None:
    """The other sinks have all; the log says why, once, and never the password."""
    lines, _ = files
    url = postgres.tcp_url(database)
    secret = Secret("wrong-needle")
    with opened(100, jsonl=str(lines), postgres=url, postgres_credential=secret) as sinks:
        for number in range(1000):
            sinks.write(trace(number))
            if number % 50 == 49:
                has(ids_in, lines, number + 1)
        eventually(lambda: any("password authentication failed" in one for one in logged))
        eventually(lambda: sinks.losses()["postgres"] >= 700)
    assert sinks.losses()["jsonl"] == 0
    assert sum("records wait" in one for one in logged) == 1
    assert sum("records are being lost" in one for one in logged) == 1
    assert "needle" not in "".join(logged)


def test_a_reload_with_the_right_password(postgres: PostgresServer, database: str) -> None:
    """The old thread ends after a while, although nothing is written; the new one writes."""
    threads = writing_threads()
    url = postgres.tcp_url(database)
    with opened(postgres=url, postgres_credential=Secret("wrong")) as sinks:
        sinks.write(trace(0))
        eventually(lambda: writing_threads() == threads + 1)
        right = TraceConfig(postgres=url, postgres_credential=Secret(PASSWORD))
        sinks.use(sinks.prepare(right))
        sinks.use(sinks.prepare(right))
        sinks.write(trace(1))
        eventually(lambda: writing_threads() == threads + 1)
        eventually(lambda: postgres.ids(database) == [1])
        assert sinks.losses() == {"postgres": 1}


def test_a_lock_of_another_session_loses_nothing(
    postgres: PostgresServer, database: str, files: tuple[Path, Path], monkeypatch: Any
) -> None:
    """Records wait for it, however long it is held, and the other sinks do not."""
    monkeypatch.setattr(
        "llmproxy.record.postgres_ledger._LIMITS",
        b"SELECT set_config('lock_timeout', '50ms', true)",
    )
    lines, _ = files
    with opened(jsonl=str(lines), postgres=postgres.url(database)) as sinks:
        sinks.write(trace(0))
        eventually(lambda: postgres.ids(database) == [0])
        with postgres.connected(database) as other:
            other.execute("BEGIN; LOCK TABLE traces IN EXCLUSIVE MODE")
            write(sinks, range(1, 500))
            eventually(lambda: len(ids_in(lines)) == 500)
            assert postgres.ids(database) == [0]
            other.execute("ROLLBACK")
        eventually(lambda: postgres.ids(database) == list(range(500)))
    assert sinks.losses() == {"jsonl": 0, "postgres": 0}


# --- what clients used today ----------------------------------------------------------------------

TODAY = "2026-11-01T00:00:00.000Z"


def test_tokens_are_those_of_this_process(
    postgres: PostgresServer, database: str, files: tuple[Path, Path]
) -> None:
    """Other hosts count for themselves; a ledger in a file is this process's own, and is asked."""
    _, ledger = files
    server = TraceConfig(postgres=postgres.url(database))
    with opened(postgres=server.postgres) as sinks:
        sinks.write(trace(1, instance="7", client="a", counted_tokens=5))
        sinks.write(trace(2, instance="8", client="a", counted_tokens=50))
        eventually(lambda: postgres.ids(database) == [1, 2])
        assert sinks.tokens_since(server, TODAY) == {"a": 5}
        with opened(ledger=str(ledger)) as other:
            other.write(trace(3, instance="0", client="a", counted_tokens=500))
        both = TraceConfig(postgres=server.postgres, ledger=str(ledger))
        assert sinks.tokens_since(both, TODAY) == {"a": 500}


def test_a_start_does_not_wait_for_a_server_that_hangs(
    postgres: PostgresServer, database: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After a moment it goes on without."""
    monkeypatch.setattr("llmproxy.record.sinks.TOKENS_S", 0.1)
    with opened() as sinks, postgres.halted():
        began = time.monotonic()
        with pytest.raises(LedgerError, match="nothing came within"):
            sinks.tokens_since(TraceConfig(postgres=postgres.url(database)), TODAY)
        assert time.monotonic() - began < WAIT / 2
