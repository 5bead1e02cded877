"""Daemons that share a ledger in PostgreSQL: what it has of them, and what its troubles cost."""

from __future__ import annotations

import json
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.support.daemon import Daemon, environment, provider_config, twistd
from tests.support.live_proxy import (
    ONE_ROUTE,
    STREAM_BODY,
    LiveProxy,
    client_config,
    open_live_proxy,
    post,
    read_stepwise,
    response,
    until,
    write_credential,
)
from tests.support.postgres import PASSWORD, PostgresServer, postgres_server
from tests.support.programs import free_port
from tests.support.reloads import reload
from tests.support.scripts import OK, event, reply
from tests.support.sockets import Provider

LOST = 'llmproxy_records_lost_total{sink="postgres"}'
LEFT = 'llmproxy_limit_remaining{client="team",limit="tokens_per_day"}'
KEY = "x-api-key: k"
USAGE = b'{"usage":{"prompt_tokens":300,"completion_tokens":100}}'
ANSWER = response(200, "Content-Type: application/json", body=USAGE)


@pytest.fixture(scope="module")
def postgres() -> Iterator[PostgresServer]:
    """A PostgreSQL server."""
    with postgres_server() as server:
        yield server


@pytest.fixture
def database(postgres: PostgresServer) -> str:
    """The name of an empty database."""
    return postgres.database()


@pytest.fixture
def provider() -> Iterator[Provider]:
    """A provider that outlives daemons; each response costs 400 tokens."""
    with Provider(reply(ANSWER)) as provider:
        yield provider


@contextmanager
def host(
    folder: Path,
    provider: Provider,
    url: str,
    *,
    instance: str = "0",
    password: str = PASSWORD,
    trace: str = "",
    limits: str = "",
) -> Iterator[LiveProxy]:
    """Run the daemon of one host, in a folder of its own, with a client."""
    folder.mkdir(exist_ok=True)
    config = f'postgres = "{url}"\npostgres_credential = "db"\n{trace}'
    config += write_credential(folder, "db", password) + provider_config(provider.url)
    live = LiveProxy.__new__(LiveProxy)
    config += client_config("team", "k", limits)
    with Daemon(folder, config, proxy="", instance=instance) as live.daemon:
        yield live


def ask(live: LiveProxy, count: int, *fields: str) -> None:
    """Send requests, each of which must be served."""
    for _ in range(count):
        assert (
            live.get(post("/p/v1/chat/completions", b'{"model":"m"}', KEY, *fields)).status == 200
        )


def count(postgres: PostgresServer, database: str) -> int:
    """Return how many records are there by now; none where the tables are not made yet."""
    if not postgres.query(database, "SELECT 1 FROM pg_tables WHERE tablename = 'traces'"):
        return 0
    found: int = postgres.query(database, "SELECT count(*) FROM traces")[0][0]
    return found


def test_hosts_that_start_at_once_share_a_ledger(
    tmp_path: Path, provider: Provider, postgres: PostgresServer, database: str
) -> None:
    """One report has both, a session that both served is one; and nothing shows the password."""
    url = postgres.tcp_url(database)
    with (
        host(tmp_path / "west", provider, url, instance="west") as west,
        host(tmp_path / "east", provider, url, instance="east") as east,
    ):
        for _ in range(5):
            ask(west, 2, "x-session-id: s")
            ask(east, 1, "x-session-id: s")
        until(lambda: count(postgres, database) == 15, "all are written")
        for live in (west, east):
            usage = live.daemon.usage("--by", "instance,client", "--since", "1h")
            groups = [
                (one["instance"], one["client"], one["requests"], one["output_tokens"])
                for one in usage["groups"]
            ]
            assert groups == [("east", "team", 5, 500), ("west", "team", 10, 1000)]
            (session,) = live.daemon.usage("--sessions")["sessions"]
            assert (session["requests"], session["input_tokens"]) == (15, 4500)
            assert live.daemon.metrics()[LOST] == 0
            shown = live.daemon.admin("/config")
            assert json.loads(shown)["trace"]["postgres"] == url
            assert PASSWORD not in shown + json.dumps(live.daemon.log)


def test_a_server_that_hangs_costs_no_stream(tmp_path: Path, postgres: PostgresServer) -> None:
    """Streams go on, the trace file and the ledger have all; so has the server in the end."""
    database = postgres.database()
    trace = f'postgres = "{postgres.url(database)}"\nledger = "{tmp_path}/ledger"\n'
    with open_live_proxy(tmp_path, trace + ONE_ROUTE) as live:
        live.script = reply(OK)
        assert live.get(post("/p/v1/chat")).body == b"ok"
        until(lambda: count(postgres, database) == 1, "the first is written")
        events = [*map(event, range(6))]
        turn = live.stream(*events)
        with live.begin("/p/stream") as client:
            read_stepwise(client, turn, *events[:2])
            with postgres.halted():
                live.script = reply(OK)
                for _ in range(20):
                    assert live.get(post("/p/v1/chat", STREAM_BODY)).body == b"ok"
                read_stepwise(client, turn, *events[2:4])
                until(lambda: len(live.daemon.traces()) == 21, "the trace file has all")
            read_stepwise(client, turn, *events[4:], b"")
        until(lambda: count(postgres, database) == 22, "the server has all")
        assert live.daemon.metrics()[LOST] == 0


def test_a_server_that_comes_late(
    tmp_path: Path, provider: Provider, postgres: PostgresServer, database: str
) -> None:
    """The daemon starts without it, and says so once; nothing is lost."""
    postgres.stop()
    try:
        with host(tmp_path, provider, postgres.tcp_url(database)) as live:
            line = live.daemon.wait_log("records wait, as they cannot be written")
            assert line["level"] == "warn"
            ask(live, 10)
            postgres.start()
            until(lambda: count(postgres, database) == 10, "all are written")
            live.daemon.wait_log("records can be written again")
            assert live.daemon.metrics()[LOST] == 0
            ids = postgres.query(database, "SELECT id FROM traces ORDER BY number")
            assert ids == [(record["id"],) for record in live.daemon.traces()]
    finally:
        postgres.stop()
        postgres.start()


def test_a_reload_takes_the_server_up_and_leaves_it(
    tmp_path: Path, provider: Provider, postgres: PostgresServer, database: str
) -> None:
    """Nothing is lost on the way, and ``keep`` may change."""
    key = f'postgres = "{postgres.tcp_url(database)}"\npostgres_credential = "db"\n'
    with host(tmp_path, provider, postgres.tcp_url(database)) as live:
        ask(live, 3)
        reload(live.daemon, (key, f'{key}keep = "1d"\n'))
        ask(live, 3)
        reload(live.daemon, (f'{key}keep = "1d"\n', ""))
        ask(live, 3)
        until(lambda: count(postgres, database) == 6, "what came with the key is written")
        assert live.daemon.metrics()[LOST] == 0


def test_what_was_used_today_is_known_after_a_restart(
    tmp_path: Path, provider: Provider, postgres: PostgresServer, database: str
) -> None:
    """Without a ledger in a file, the server is asked; what other instances served counts there."""
    url, limits = postgres.tcp_url(database), "tokens_per_day = 3000\n"
    with host(tmp_path / "west", provider, url, instance="west", limits=limits) as live:
        ask(live, 2)
    with host(tmp_path / "east", provider, url, instance="east", limits=limits) as live:
        ask(live, 1)
        assert live.daemon.metrics()[LEFT] == 2600
    assert count(postgres, database) == 3
    with host(tmp_path / "west", provider, url, instance="west", limits=limits) as live:
        assert live.daemon.metrics()[LEFT] == 2200


def test_a_start_that_cannot_know_what_was_used_goes_on(
    tmp_path: Path, provider: Provider, postgres: PostgresServer, database: str
) -> None:
    """The server hangs: after two seconds the log says so, and the day begins at zero."""
    url, limits = postgres.tcp_url(database), "tokens_per_day = 3000\n"
    with host(tmp_path, provider, url, limits=limits) as live:
        ask(live, 1)
    with postgres.halted():
        began = time.monotonic()
        running = host(tmp_path, provider, url, limits=limits)
        live = running.__enter__()
        line = live.daemon.wait_log("the tokens of today begin at zero")
        assert "nothing came within 2 s" in line["message"]
        assert time.monotonic() - began > 2
        assert live.daemon.metrics()[LEFT] == 3000
    running.__exit__(None, None, None)


def test_a_start_without_psycopg_says_what_to_install(tmp_path: Path) -> None:
    """The daemon does not start."""
    (tmp_path / "stub").mkdir()
    (tmp_path / "stub" / "psycopg.py").write_text("raise ImportError('no pq wrapper available')")
    config = tmp_path / "c.toml"
    config.write_text(
        f'[proxy]\nlisten = ["tcp:{free_port()}:interface=127.0.0.1"]\nanonymous = true\n'
        f'[admin]\nlisten = "tcp:{free_port()}:interface=127.0.0.1"\n'
        '[trace]\npostgres = "postgresql://u@h/d"\n' + provider_config("http://127.0.0.1:1")
    )
    paths = environment()["PYTHONPATH"]
    ended = subprocess.run(
        twistd(config),
        cwd=tmp_path,
        env=environment(PYTHONPATH=f"{tmp_path}/stub:{paths}"),
        capture_output=True,
        text=True,
        timeout=20,
        check=False,
    )
    assert ended.returncode != 0
    assert "pip install 'llmproxy[postgres]'" in ended.stdout + ended.stderr
    assert "Traceback" not in ended.stdout + ended.stderr
