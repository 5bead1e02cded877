"""What PostgreSQL keeps of traces and sessions, exactly once, and what happens when it fails."""

from __future__ import annotations

import os
import shutil
import subprocess
import threading
from collections.abc import Iterator
from contextlib import closing, contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from llmproxy.record.sink_queue import Dropped, Retry
from llmproxy.record.trace import CONTENT, NAMES, Attempt, Trace, timestamp
from tests.support.postgres import PASSWORD, PostgresServer
from tests.support.records import eventually, trace
from tests.support.sockets import WAIT
from tests.support.tls import Authority

if TYPE_CHECKING:
    from llmproxy.record.postgres import Postgres

NOW = 1_800_000_000.0
DAY = 86400.0


def opened(url: str, *, password: str | None = None, keep_s: float | None = DAY) -> Postgres:
    """Return an output for a database."""
    from llmproxy.record.postgres import Postgres
    from llmproxy.record.postgres_ledger import conninfo_of

    return Postgres(conninfo_of(url, password), keep_s=keep_s, wall=lambda: NOW, deadline_s=0.5)


@pytest.fixture
def output(postgres: PostgresServer, database: str) -> Iterator[Postgres]:
    """What writes to the database, and keeps a day."""
    with closing(opened(postgres.url(database))) as one:
        yield one


@contextmanager
def locked(postgres: PostgresServer, database: str, table: str) -> Iterator[None]:
    """Lock a table, as another session does."""
    with postgres.connected(database) as other:
        other.execute("BEGIN")
        other.execute(f"LOCK TABLE {table} IN ACCESS EXCLUSIVE MODE")
        yield
        other.execute("ROLLBACK")


# --- what is kept ---------------------------------------------------------------------------------


def test_every_field_is_kept(postgres: PostgresServer, database: str, output: Postgres) -> None:
    """Each field has its type: a moment, a truth, a list; unknown is NULL."""
    full = trace(
        1,
        client="c",
        model="gpt-\N{SNOWMAN}",
        stream=True,
        status=200,
        is_complete=True,
        attempts=[Attempt("p", "ok", 0.5)],
        bytes_out=2**40,
        head_s=0.25,
        input_tokens=0,
        output_tokens=7,
        usage="reported",
        degraded=["event"],
        buffered_upstream=False,
    )
    output.put([full, trace(2)])
    names = ", ".join(NAMES)
    rows = postgres.query(database, f"SELECT {names} FROM traces ORDER BY number")  # noqa: S608 - names of ours
    for record, values in zip((full, trace(2)), rows, strict=True):
        expected = {name: getattr(record, name) for name in NAMES}
        expected["time"] = datetime(2026, 11, 1, tzinfo=UTC)
        expected["attempts"] = [
            {"provider": "p", "outcome": "ok", "seconds": 0.5, "cause": None}
            for _ in record.attempts
        ]
        assert dict(zip(NAMES, values, strict=True)) == expected


def test_no_content_is_kept(postgres: PostgresServer, database: str, output: Postgres) -> None:
    """No column has the text that a route captures."""
    output.put([trace(1, **dict.fromkeys(CONTENT, "needle"))])
    (row,) = postgres.query(database, "SELECT * FROM traces")
    assert "needle" not in repr(row)


def test_an_impossible_word_or_number_loses_no_trace(
    postgres: PostgresServer, database: str, output: Postgres
) -> None:
    """A NUL or half a surrogate pair becomes a mark; an impossible count is unknown."""
    output.put([trace(0, model="a"), trace(1, model="x\ud800"), trace(2, input_tokens=2**70)])
    output.put([trace(3, model="\0b", attempts=[Attempt("p\0", "ok", 0.5)])])
    output.put([trace(4, model="\\u0000")])
    output.put([trace(5, input_tokens=10**12 + 1), trace(6, input_tokens=-1)])
    assert postgres.query(
        database, "SELECT id, model, input_tokens FROM traces ORDER BY number"
    ) == [
        ("0", "a", None),
        ("1", "x?", None),
        ("2", None, None),
        ("3", "?b", None),
        ("4", "\\u0000", None),
        ("5", None, None),
        ("6", None, None),
    ]


def test_what_the_server_refuses_costs_no_other_record(
    postgres: PostgresServer, database: str, output: Postgres
) -> None:
    """A constraint of the operator's, or a moment that is none, drops that record alone."""
    output.put([trace(0)])
    postgres.query(database, "ALTER TABLE traces ADD CHECK (model <> 'bad')")
    with pytest.raises(Dropped, match="the server refused records: ") as caught:
        output.put([trace(1), trace(3, time="noon"), trace(2, model="bad", path="/x"), trace(4)])
    assert caught.value.count == 2
    assert "/x" not in str(caught.value)  # which the server quotes with the whole row
    assert postgres.ids(database) == [0, 1, 4]


def test_a_session_is_checkpointed(
    postgres: PostgresServer, database: str, output: Postgres
) -> None:
    """Each session and client has its totals and its last trace, whichever host writes."""

    def at(number: int, minute: int, **fields: Any) -> Any:
        return trace(number, time=f"2026-11-01T00:0{minute}:00.000Z", **fields)

    first = [
        at(9, 1, session="s", client="c", is_complete=True, usage="reported", input_tokens=5),
        at(2, 3, session="s", client="c", usage="partial", input_tokens=1),
        at(3, 2, session="s"),
        at(4, 2, client="c"),
        at(5, 2, session="s", client="c", responses=2, input_tokens=100),
    ]
    output.put(first)
    with closing(opened(postgres.url(database))) as other:
        other.put([at(1, 2, session="s", client="c", is_complete=True)])
    words = (
        "SELECT client, requests, complete, unreported, input_tokens, output_tokens, last_trace, "
        "extract(minute FROM first_time)::int, extract(minute FROM last_time)::int FROM sessions"
    )
    assert postgres.query(database, words) == [("c", 3, 2, 2, 6, None, "1", 1, 3)]


# --- exactly once ---------------------------------------------------------------------------------


def test_a_batch_that_is_written_again_changes_nothing(
    postgres: PostgresServer, database: str, output: Postgres
) -> None:
    """Neither its rows nor the sums of its sessions; what is new in it is added."""
    batch = [trace(number, session="s", client="c", input_tokens=1) for number in range(10)]
    for _ in range(3):
        output.put(batch)
    output.put([*batch, trace(10, session="s", client="c", input_tokens=1), *batch])
    assert postgres.ids(database) == list(range(11))
    words = "SELECT requests, input_tokens, last_trace FROM sessions"
    assert postgres.query(database, words) == [(11, 11, "10")]


def test_a_connection_that_breaks_behind_the_commit(
    postgres: PostgresServer, database: str, output: Postgres, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nobody knows what became of the batch; it is written again, and counts once."""
    import psycopg

    execute = psycopg.Connection.execute

    def broken(self: Any, query: Any, *arguments: Any, **more: Any) -> Any:
        found = execute(self, query, *arguments, **more)
        if query == b"COMMIT":
            raise psycopg.OperationalError("the connection is lost")
        return found

    batch = [trace(number, session="s", client="c") for number in range(10)]
    with monkeypatch.context() as patch:
        patch.setattr(psycopg.Connection, "execute", broken)
        with pytest.raises(Retry, match="the connection is lost"):
            output.put(batch)
    output.put(batch)
    assert postgres.ids(database) == list(range(10))
    assert postgres.query(database, "SELECT requests FROM sessions") == [(10,)]


def test_hosts_that_write_the_same_sessions_at_once(
    postgres: PostgresServer, database: str
) -> None:
    """No sum is lost, and none waits for another in a circle."""
    failed = list[BaseException]()

    def host(number: int) -> None:
        order = range(50) if number % 2 else range(49, -1, -1)
        with closing(opened(postgres.url(database))) as one:
            try:
                for turn in range(10):
                    one.put(
                        [
                            trace(name + 50 * (turn + 10 * number), session=f"s{name}", client="c")
                            for name in order
                        ]
                    )
            except Exception as error:
                failed.append(error)

    with closing(opened(postgres.url(database))) as one:
        one.put([trace(10**6)])
    hosts = [threading.Thread(target=host, args=(number,)) for number in range(4)]
    for thread in hosts:
        thread.start()
    for thread in hosts:
        thread.join(WAIT)
    assert failed == []
    words = "SELECT count(*), min(requests), max(requests) FROM sessions"
    assert postgres.query(database, words) == [(50, 40, 40)]


# --- what is not kept for ever --------------------------------------------------------------------


def test_old_rows_are_deleted_in_small_steps(
    postgres: PostgresServer, database: str, output: Postgres, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A step deletes a few rows; the next one comes soon, while there are more."""
    monkeypatch.setattr("llmproxy.record.postgres._STEP", 10)
    ages = [1.5 * DAY] * 25 + [0.5 * DAY] * 5
    output.put(
        [
            trace(number, time=timestamp(NOW - age), session=f"s-{number}", client="c")
            for number, age in enumerate(ages)
        ]
    )
    left, rests = [], []
    for _ in range(3):
        rests.append(output.maintenance())
        left.append(len(postgres.ids(database)))
    assert left == [20, 10, 5]
    assert rests[0] == rests[1] < 1 < rests[2]
    assert postgres.ids(database) == [25, 26, 27, 28, 29]
    assert postgres.query(database, "SELECT count(*) FROM sessions") == [(5,)]


def test_one_host_deletes_at_a_time(
    postgres: PostgresServer, database: str, output: Postgres
) -> None:
    """The others come back later, and do not wait."""
    from llmproxy.record.postgres_ledger import LOCK

    output.put([trace(1, time=timestamp(NOW - 2 * DAY))])
    with postgres.connected(database) as other:
        other.execute(f"SELECT pg_advisory_lock({LOCK + 1})")
        assert output.maintenance() > 1
        assert postgres.ids(database) == [1]
        other.execute("SELECT pg_advisory_unlock_all()")
    output.maintenance()
    assert postgres.ids(database) == []


# --- bad times ------------------------------------------------------------------------------------


@pytest.mark.parametrize("table", ["traces", "sessions"])
def test_a_locked_table_asks_for_a_retry(
    postgres: PostgresServer,
    database: str,
    output: Postgres,
    table: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The batch can be written whole once the lock is gone."""
    monkeypatch.setattr(
        "llmproxy.record.postgres_ledger._LIMITS",
        b"SELECT set_config('lock_timeout', '50ms', true)",
    )
    output.put([trace(0)])
    batch = [trace(number, session="s", client="c") for number in (1, 2)]
    with locked(postgres, database, table):
        for _ in range(2):
            with pytest.raises(Retry, match="lock timeout"):
                output.put(batch)
    output.put(batch)
    assert postgres.ids(database) == [0, 1, 2]
    assert postgres.query(database, "SELECT requests FROM sessions") == [(2,)]


def test_a_server_that_hangs_is_given_up_after_a_while(
    postgres: PostgresServer, database: str, output: Postgres
) -> None:
    """It may have written the batch all the same; that counts once."""
    output.put([trace(0)])
    batch = [trace(number, session="s", client="c") for number in (1, 2)]
    with postgres.halted(), pytest.raises(Retry):
        output.put(batch)
    output.put(batch)
    assert postgres.ids(database) == [0, 1, 2]
    assert postgres.query(database, "SELECT requests FROM sessions") == [(2,)]


def test_the_pauses_grow(postgres: PostgresServer, database: str, output: Postgres) -> None:
    """Until something is written; then they are short again."""
    output.put([trace(0)])

    def pauses(count: int) -> list[float]:
        found = []
        for _ in range(count):
            with pytest.raises(Retry) as caught:
                output.put([trace(1)])
            found.append(caught.value.again_s)
        return found

    postgres.stop()
    try:
        assert pauses(8) == [0.25, 0.5, 1, 2, 4, 8, 10, 10]
    finally:
        postgres.start()
    output.put([trace(1)])
    postgres.stop()
    try:
        assert pauses(1) == [0.25]
    finally:
        postgres.start()


def test_what_goes_wrong_is_logged_once(
    postgres: PostgresServer, database: str, logged: list[str]
) -> None:
    """And that it is well again; the password never."""
    url = postgres.tcp_url(database)
    with closing(opened(url, password="wrong-needle")) as one:
        for _ in range(3):
            with pytest.raises(Retry, match="password authentication failed"):
                one.put([trace(1)])
    (line,) = logged
    assert line.startswith("postgres: records wait, as they cannot be written: ")
    assert "needle" not in line
    with closing(opened(url, password=PASSWORD)) as one:
        one.put([trace(1)])
    assert len(logged) == 1
    with closing(opened(postgres.url(database))) as one:
        postgres.stop()
        try:
            with pytest.raises(Retry):
                one.put([trace(2)])
        finally:
            postgres.start()
        one.put([trace(2)])
    assert logged[-1] == "postgres: records can be written again"
    assert len(logged) == 3


def test_a_table_that_was_removed_is_made_again(
    postgres: PostgresServer, database: str, output: Postgres
) -> None:
    """The schema is looked at with each new connection."""
    output.put([trace(0)])
    postgres.query(database, "DROP TABLE traces, sessions, llmproxy_ledger")
    with pytest.raises(Retry, match="does not exist"):
        output.put([trace(1)])
    output.put([trace(1)])
    assert postgres.ids(database) == [1]


def test_rights_to_write_are_enough_for_tables_that_are_there(
    postgres: PostgresServer, database: str, output: Postgres
) -> None:
    """A user that may make no table writes to those that somebody made."""
    output.put([trace(0)])
    postgres.query(
        database,
        "DROP ROLE IF EXISTS writer; CREATE ROLE writer LOGIN; "
        "REVOKE CREATE ON SCHEMA public FROM PUBLIC; REVOKE TEMP ON DATABASE "
        f"{database} FROM PUBLIC; GRANT SELECT ON llmproxy_ledger TO writer; "
        "GRANT SELECT, INSERT, UPDATE, DELETE ON traces, sessions TO writer",
    )
    url = postgres.url(database).replace("postgres@", "writer@")
    with closing(opened(url)) as one:
        one.put([trace(1, time=timestamp(NOW), session="s", client="c")])
        one.maintenance()
    assert postgres.ids(database) == [1]
    postgres.query(database, "DROP OWNED BY writer; DROP ROLE writer")


@pytest.fixture
def secure(postgres: PostgresServer, tmp_path: Path) -> Iterator[Path]:
    """Let the server have a certificate for ``localhost``; return what to trust."""
    authority = Authority(tmp_path)
    for path, setting in zip(
        authority.key_and_certificate(), ("ssl_key_file", "ssl_cert_file"), strict=True
    ):
        copy = Path(shutil.copy(path, postgres.folder))
        copy.chmod(0o600)
        if os.geteuid() == 0:
            shutil.chown(copy, "nobody")
        postgres.query("postgres", f"ALTER SYSTEM SET {setting} = '{copy}'")
    postgres.query("postgres", "ALTER SYSTEM SET ssl = on")
    postgres.query("postgres", "SELECT pg_reload_conf()")
    eventually(lambda: postgres.query("postgres", "SHOW ssl") == [("on",)])
    yield authority.ca_path
    postgres.query("postgres", "ALTER SYSTEM RESET ALL")
    postgres.query("postgres", "SELECT pg_reload_conf()")
    eventually(lambda: postgres.query("postgres", "SHOW ssl") == [("off",)])


def test_the_certificate_of_the_server_is_checked(
    postgres: PostgresServer, database: str, secure: Path, tmp_path: Path
) -> None:
    """With ``verify-full`` nothing is written to who is not the one that the URL names."""
    (tmp_path / "other").mkdir()
    other = Authority(tmp_path / "other").ca_path
    at = f"{postgres.port}/{database}?hostaddr=127.0.0.1&sslmode=verify-full&sslrootcert="
    with closing(opened(f"postgresql://postgres@localhost:{at}{secure}", password=PASSWORD)) as one:
        one.put([trace(0)])
    for name, roots, words in (
        ("localhost", other, "certificate verify failed"),
        ("db.example", secure, "does not match host name"),
    ):
        url = f"postgresql://postgres@{name}:{at}{roots}"
        with closing(opened(url, password=PASSWORD)) as one, pytest.raises(Retry, match=words):
            one.put([trace(1)])
    assert postgres.ids(database) == [0]


def test_a_server_without_tls_is_not_written_to_where_tls_is_wanted(
    postgres: PostgresServer, database: str
) -> None:
    """libpq gets ``sslmode`` from the URL."""
    url = f"{postgres.tcp_url(database)}?sslmode=require"
    with (
        closing(opened(url, password=PASSWORD)) as one,
        pytest.raises(Retry, match="server does not support SSL"),
    ):
        one.put([trace(1)])


@pytest.fixture
def small_disk(postgres: PostgresServer, database: str) -> Iterator[Path]:
    """A separate file system with room for 400 KiB, where the database's tables will be."""
    folder = postgres.folder / "small"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=400k", "tmpfs", str(folder)]
    if os.geteuid() != 0 or subprocess.run(mount, capture_output=True, check=False).returncode:
        folder.rmdir()
        pytest.skip("a small file system cannot be mounted here")
    shutil.chown(folder, "nobody")
    postgres.query("postgres", f"CREATE TABLESPACE small LOCATION '{folder}'")
    postgres.query("postgres", f"ALTER DATABASE {database} SET default_tablespace = small")
    yield folder
    postgres.query("postgres", f"DROP DATABASE {database} WITH (FORCE)")
    postgres.query("postgres", "DROP TABLESPACE small")
    subprocess.run(["umount", str(folder)], check=True)
    folder.rmdir()


def test_a_full_disk_asks_for_a_retry(
    postgres: PostgresServer, database: str, small_disk: Path
) -> None:
    """When there is room again, all is written."""

    def batch(first: int) -> list[Trace]:
        return [trace(one, path="x" * 400) for one in range(first, first + 100)]

    with closing(opened(postgres.url(database), keep_s=None)) as output:
        kept = 0
        with pytest.raises(Retry, match=r"could not (extend|write)|No space left"):  # noqa: PT012 - until it is full
            for kept in range(0, 10_000, 100):
                output.put(batch(kept))
        assert postgres.ids(database) == list(range(kept))
        subprocess.run(["mount", "-o", "remount,size=8m", str(small_disk)], check=True)
        output.put(batch(kept))
    assert postgres.ids(database) == list(range(kept + 100))
