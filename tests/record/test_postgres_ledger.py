"""A ledger in PostgreSQL: how it is made and read, and that reports are those of SQLite."""

from __future__ import annotations

import subprocess
import sys
import tempfile
import threading
import time
from contextlib import closing
from math import inf
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from llmproxy.config import Trace as TraceConfig
from llmproxy.record import ledger_steps
from llmproxy.record.cuts import cuts_of
from llmproxy.record.ledger import Ledger
from llmproxy.record.ledger_report import (
    GROUPS,
    checkpoints_of,
    refused_in,
    tokens_by_client,
    tunnels_of,
    usage_of,
)
from llmproxy.record.ledger_source import Files, Source
from llmproxy.record.ledger_steps import POSTGRES, SQLITE, LedgerError, steps_for, trace_columns
from llmproxy.record.sinks import Sinks
from llmproxy.record.trace import NAMES, Trace
from tests.support.made_records import OTHERS, TRACES, numbered
from tests.support.postgres import PASSWORD, PostgresServer
from tests.support.records import trace
from tests.support.sockets import WAIT

if TYPE_CHECKING:
    from llmproxy.record.postgres import Postgres

ROOT = Path(__file__).parents[2]
STEPS = steps_for(POSTGRES)


def output(server: PostgresServer, database: str) -> Postgres:
    """Return what writes to a database, and keeps all."""
    from llmproxy.record.postgres import Postgres
    from llmproxy.record.postgres_ledger import conninfo_of

    return Postgres(conninfo_of(server.url(database), None), keep_s=None, wall=lambda: 0.0)


def source(server: PostgresServer, database: str) -> Source:
    """Return what reads a database."""
    from llmproxy.record.postgres_ledger import PostgresLedger, conninfo_of

    return PostgresLedger(conninfo_of(server.url(database), None))


def at_step(server: PostgresServer, database: str, steps: int) -> None:
    """Make a ledger of the version that had so many steps."""
    with server.connected(database) as connection:
        for statements in STEPS[:steps]:
            for statement in statements:
                connection.execute(statement)
        connection.execute("CREATE TABLE llmproxy_ledger (steps integer NOT NULL)")
        connection.execute("INSERT INTO llmproxy_ledger VALUES (%s)", (steps,))


def columns(server: PostgresServer, database: str) -> list[tuple[Any, ...]]:
    """Return the columns of a database, each with its table."""
    return server.query(
        database,
        "SELECT table_name, column_name, data_type, is_nullable, column_default "
        "FROM information_schema.columns WHERE table_schema = 'public' ORDER BY 1, 2",
    )


def shape(server: PostgresServer, database: str) -> list[tuple[Any, ...]]:
    """Return the columns and indexes of a database."""
    indexes = "SELECT indexdef FROM pg_indexes WHERE schemaname = 'public' ORDER BY 1"
    return columns(server, database) + server.query(database, indexes)


# --- the schema -----------------------------------------------------------------------------------


@pytest.mark.parametrize("engine", [SQLITE, POSTGRES])
def test_every_engine_has_the_fields_of_a_trace(engine: ledger_steps.Engine) -> None:
    """In their order; and no word of the declaration is left that a database does not know."""
    assert list(trace_columns(engine)) == list(NAMES)
    text = " ".join(one for statements in steps_for(engine) for one in statements)
    for word in ("MOMENT", "JSON", "FIRST", *({"ROWID", "REAL"} if engine is POSTGRES else ())):
        assert word not in text.split()


def test_the_tables_are_those_of_sqlite(postgres: PostgresServer, database: str) -> None:
    """The same names in both, whoever reads them with tools of their own."""
    with closing(output(postgres, database)) as one:
        assert one.maintenance() == inf
    found = {(table, column) for table, column, *_ in columns(postgres, database)}
    with tempfile.TemporaryDirectory() as folder:
        path = f"{folder}/ledger"
        Ledger(path, keep_s=None, wall=lambda: 0.0).close()
        rows = Files([path]).rows(
            "SELECT m.name, c.name FROM sqlite_master AS m, pragma_table_info(m.name) AS c "
            "WHERE m.type = 'table'"
        )
        expected = {*rows}
    assert found - {("llmproxy_ledger", "steps"), ("traces", "number")} == expected
    assert postgres.query(database, "SELECT steps FROM llmproxy_ledger") == [(len(STEPS),)]


@pytest.mark.parametrize("steps", range(1, len(STEPS)))
def test_an_older_ledger_is_brought_up_to_date(
    postgres: PostgresServer, database: str, steps: int
) -> None:
    """After each step, its shape is that of a new ledger, and what it holds stays."""
    at_step(postgres, database, steps)
    postgres.query(
        database,
        "INSERT INTO traces (time, id, instance, peer, method, path, end_reason, is_complete, "
        "attempts, bytes_in, bytes_out, chunks, duration_s, paused_s, degraded) "
        "VALUES ('2026-11-01', '7', '0', '', '', '', '', true, '[]', 0, 0, 0, 0, 0, '[]')",
    )
    new = postgres.database()
    for name in (new, database):
        with closing(output(postgres, name)) as one:
            one.put([trace(8)])
    assert shape(postgres, database) == shape(postgres, new)
    assert postgres.query(database, "SELECT steps FROM llmproxy_ledger") == [(len(STEPS),)]
    assert postgres.ids(database) == [7, 8]


@pytest.mark.parametrize("steps", [0, 5])
def test_a_start_reads_a_ledger_that_is_not_up_to_date(
    postgres: PostgresServer, database: str, steps: int
) -> None:
    """What clients used today is not forgotten by an upgrade, and nothing is in a new database."""
    if steps:
        at_step(postgres, database, steps)
        postgres.query(
            database,
            "INSERT INTO traces (time, id, instance, client, peer, method, path, end_reason, "
            "is_complete, attempts, bytes_in, bytes_out, chunks, duration_s, paused_s, degraded, "
            "input_tokens) VALUES "
            "('2026-11-01', '7', '0', 'a', '', '', '', '', true, '[]', 0, 0, 0, 0, 0, '[]', 5)",
        )
    sinks = Sinks(clock=time.monotonic, wall=lambda: 0.0, instance="0")
    found = sinks.tokens_since(TraceConfig(postgres=postgres.url(database)), POSTGRES.ever)
    assert found == ({"a": 5} if steps else {})


def test_many_hosts_start_at_once(postgres: PostgresServer, database: str) -> None:
    """One of them makes the tables, the others wait for it, and each record is there."""
    at_once, failed = threading.Barrier(10), list[BaseException]()

    def host(number: int) -> None:
        with closing(output(postgres, database)) as one:
            at_once.wait(WAIT)
            try:
                one.put([trace(number, client="c", session="s", input_tokens=1)])
            except Exception as error:
                failed.append(error)

    hosts = [threading.Thread(target=host, args=(number,)) for number in range(10)]
    for one in hosts:
        one.start()
    for one in hosts:
        one.join(WAIT)
    assert failed == []
    assert sorted(postgres.ids(database)) == list(range(10))
    words = "SELECT requests, input_tokens FROM sessions"
    assert postgres.query(database, words) == [(10, 10)]


def test_a_step_that_fails_leaves_the_ledger_as_it_was(
    postgres: PostgresServer, database: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All steps are done, or none."""
    from llmproxy.record import postgres_ledger
    from llmproxy.record.sink_queue import Retry

    at_step(postgres, database, 1)
    before = shape(postgres, database)
    broken = (STEPS[0], ("CREATE TABLE one (a integer)", "CREATE TABLE one (a integer)"))
    monkeypatch.setattr(postgres_ledger, "STEPS", broken)
    with closing(output(postgres, database)) as one, pytest.raises(Retry, match="already exists"):
        one.put([trace(1)])
    assert shape(postgres, database) == before


@pytest.mark.parametrize(
    ("statements", "reading", "writing"),
    [
        (
            ["CREATE TABLE llmproxy_ledger AS SELECT 99 AS steps"],
            rf"newer version \(99, this one knows {len(STEPS)}\)",
            "newer version",
        ),
        (["CREATE TABLE traces (theirs text)"], "another program's", "another program's"),
        (["CREATE TABLE llmproxy_ledger AS SELECT 1 AS steps"], "start a daemon", ""),
        ([], "no ledger in this database", ""),
    ],
)
def test_a_database_without_our_ledger(
    postgres: PostgresServer, database: str, statements: list[str], reading: str, writing: str
) -> None:
    """Another program's tables and those of a newer version are neither read nor written."""
    from llmproxy.record.sink_queue import Retry

    for statement in statements:
        postgres.query(database, statement)
    before = shape(postgres, database)
    with pytest.raises(LedgerError, match=reading):
        refused_in(source(postgres, database))
    if writing:
        with closing(output(postgres, database)) as one, pytest.raises(Retry, match=writing):
            one.put([trace(1)])
    assert shape(postgres, database) == before


def test_a_schema_of_its_own(postgres: PostgresServer, database: str) -> None:
    """``search_path`` puts the tables beside those of another program."""
    postgres.query(database, "CREATE TABLE traces (theirs text)")
    postgres.query(database, "CREATE SCHEMA llmproxy")
    url = postgres.url(database, options="-csearch_path%3Dllmproxy")
    from llmproxy.record.postgres import Postgres
    from llmproxy.record.postgres_ledger import PostgresLedger, conninfo_of

    with closing(Postgres(conninfo_of(url, None), keep_s=None, wall=lambda: 0.0)) as one:
        one.put([trace(1, client="c")])
    found = usage_of(PostgresLedger(conninfo_of(url, None)), ["client"])
    assert found[("c",)].requests == 1


# --- how it is reached ----------------------------------------------------------------------------


def test_a_server_that_is_gone_is_noticed_whatever_the_url_says() -> None:
    """Deadlines stand beside what the URL says, and give way to it."""
    pytest.importorskip("psycopg")
    from psycopg.conninfo import conninfo_to_dict

    from llmproxy.record.postgres_ledger import conninfo_of

    url = "postgresql://u@h/d?connect_timeout=9&sslmode=verify-full&sslrootcert=/ca.pem"
    parts = conninfo_to_dict(conninfo_of(url, "pass'word\\ "))
    assert (parts["connect_timeout"], parts["tcp_user_timeout"]) == ("9", "15000")
    assert (parts["sslmode"], parts["sslrootcert"]) == ("verify-full", "/ca.pem")
    assert parts["password"] == "pass'word\\ "
    assert "password" not in conninfo_to_dict(conninfo_of(url, None))


@pytest.mark.parametrize(
    ("url", "words"),
    [
        ("postgresql://u@h/d?sslmod=x", 'invalid URI query parameter: "sslmod"'),
        ("host=h needle=x", "libpq cannot read it"),
        ("postgresql://u@h/%zz", "libpq cannot read it"),
        ("postgresql://u:needle@h/d", "no password may stand in it"),
    ],
)
def test_what_libpq_does_not_take_is_reported(url: str, words: str) -> None:
    """And nothing of it is shown that may be a secret."""
    pytest.importorskip("psycopg")
    from llmproxy.record.postgres_ledger import conninfo_of

    with pytest.raises(LedgerError) as caught:
        conninfo_of(url, None)
    assert words in str(caught.value)
    assert "needle" not in str(caught.value)


MISSING = """
import sys
sys.modules["psycopg"] = None
from llmproxy.config import Trace
from llmproxy.record.sinks import Sinks
sinks = Sinks(clock=float, wall=float, instance="0")
try:
    sinks.prepare(Trace(postgres="postgresql://u@h/d"))
except OSError as error:
    print(error)
"""


def test_without_psycopg_the_error_says_what_to_install() -> None:
    """The start fails with these words."""
    command = [sys.executable, "-c", MISSING]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert "pip install 'llmproxy[postgres]'" in ended.stdout


def test_a_wrong_password_is_not_shown(postgres: PostgresServer, database: str) -> None:
    """The server's own words are; with the right one the ledger is read."""
    from llmproxy.record.postgres_ledger import PostgresLedger, conninfo_of

    with closing(output(postgres, database)) as one:
        one.put([trace(1)])
    url = postgres.tcp_url(database)
    with pytest.raises(LedgerError, match="password authentication failed") as caught:
        refused_in(PostgresLedger(conninfo_of(url, "wrong-needle"), " (hint)"))
    assert "needle" not in str(caught.value)
    assert str(caught.value).endswith(" (hint)")
    assert refused_in(PostgresLedger(conninfo_of(url, PASSWORD))) == 0


def test_a_call_is_waited_for_so_long() -> None:
    """What comes too late is an error; what fails is the same error."""
    pytest.importorskip("psycopg")
    from llmproxy.record.postgres_ledger import within

    def fail() -> int:
        raise LedgerError("why")

    assert within(WAIT, lambda: 7) == 7
    with pytest.raises(LedgerError, match="why"):
        within(WAIT, fail)
    end = threading.Event()
    began = time.monotonic()
    with pytest.raises(LedgerError, match=r"nothing came within 0\.05 s"):
        within(0.05, lambda: end.wait(WAIT))
    assert time.monotonic() - began < WAIT / 2
    end.set()


# --- reports --------------------------------------------------------------------------------------

SINCE = ["", "2026-11-02T00:00:00.000Z", "2026-11-03T12:00:00.003Z", "2027-01-01T00:00:00.000Z"]


@pytest.fixture(scope="module")
def made(postgres: PostgresServer) -> str:
    """A database with a ledger, which examples empty."""
    database = postgres.database()
    with closing(output(postgres, database)) as one:
        one.maintenance()
    return database


def reports(source: Source, by: list[str], since: str) -> list[object]:
    """Return all that is reported of a ledger."""
    return [
        list(usage_of(source, by, since).items()),
        refused_in(source, since),
        tunnels_of(source, since),
        tokens_by_client(source, since or source.engine.ever),
        tokens_by_client(source, since or source.engine.ever, "west"),
        sorted(checkpoints_of(source, since), key=lambda one: (one.session, one.client or "")),
        sorted(cuts_of(source, since), key=repr),
    ]


@settings(
    max_examples=settings().max_examples * 2 // 5,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(
    st.lists(TRACES | OTHERS, max_size=3),
    st.lists(st.sampled_from(sorted(GROUPS)), min_size=1, max_size=4, unique=True),
    st.sampled_from(SINCE),
)
def test_every_report_is_that_of_sqlite(
    postgres: PostgresServer, made: str, batches: list[list[Trace]], by: list[str], since: str
) -> None:
    """The same records, the same report, whatever is asked."""
    for number, one in enumerate(numbered(batches)):
        one.instance = ("0", "west")[number % 2]
    postgres.query(made, "TRUNCATE traces, sessions")
    with tempfile.TemporaryDirectory() as folder:
        outputs: list[Any] = [
            Ledger(f"{folder}/ledger", keep_s=None, wall=lambda: 0.0),
            output(postgres, made),
        ]
        for to in outputs:
            with closing(to):
                for batch in filter(None, batches):
                    to.put(batch)
        expected = reports(Files([f"{folder}/ledger"]), by, since)
    assert reports(source(postgres, made), by, since) == expected


def test_a_report_is_of_one_moment(postgres: PostgresServer, database: str) -> None:
    """What is written while it is read is not in it."""
    with closing(output(postgres, database)) as one:
        one.put([trace(1, client="c")])
        rows = source(postgres, database).rows("SELECT id FROM traces WHERE time >= ?", SINCE[1])
        assert list(rows) == []
        rows = source(postgres, database).rows("SELECT id FROM traces")
        assert next(rows) == ("1",)
        one.put([trace(2, client="c")])
        assert list(rows) == []
