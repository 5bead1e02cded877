"""``llmproxy usage`` of a server: it prints what it prints of a file with the same records."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest

from llmproxy.cli.main import main
from llmproxy.record.ledger import Ledger
from tests.support.postgres import PASSWORD, PostgresServer, postgres_server
from tests.support.records import trace

Printed = pytest.CaptureFixture[str]


@pytest.fixture(scope="module")
def postgres() -> Iterator[PostgresServer]:
    """A PostgreSQL server."""
    with postgres_server() as server:
        yield server


@pytest.fixture
def database(postgres: PostgresServer) -> str:
    """The name of a database whose ledger has the records of :func:`ledger`."""
    from llmproxy.record.postgres import Postgres
    from llmproxy.record.postgres_ledger import conninfo_of

    database = postgres.database()
    conninfo = conninfo_of(postgres.url(database), None)
    with closing(Postgres(conninfo, keep_s=None, wall=lambda: 0.0)) as one:
        one.put(RECORDS)
    return database


@pytest.fixture
def ledger(tmp_path: Path) -> str:
    """A file with the same records."""
    with closing(Ledger(str(tmp_path / "ledger"), keep_s=None, wall=lambda: 0.0)) as one:
        one.put(RECORDS)
    return str(tmp_path / "ledger")


RECORDS = [
    trace(1, client="a", model="m", session="s", input_tokens=1000, usage="reported"),
    trace(2, client="a", model="m", session="s", time="2026-11-02T00:00:00.000Z"),
    trace(3, client="b", model="n", input_tokens=0, output_tokens=5, is_complete=True),
    trace(4, client="b", end_reason="rejected"),
    trace(5, path="a.example:443", tunnel="tunnelled", bytes_in=1, bytes_out=2),
]


def printed(capsys: Printed, *arguments: str) -> str:
    """Return what a command that goes well prints."""
    assert main(["usage", *arguments]) == 0
    captured = capsys.readouterr()
    assert captured.err == ""
    return captured.out


def failure(capsys: Printed, *arguments: str) -> str:
    """Return what a command says that fails."""
    assert main(["usage", *arguments]) == 1
    captured = capsys.readouterr()
    assert captured.out == ""
    return captured.err


@pytest.mark.parametrize("as_json", [[], ["--json"]])
@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["--by", "day,client"],
        ["--sessions"],
        ["--tunnels"],
        ["--since", "2026-11-02"],
        ["--sessions", "--since", "2026-11-03"],
    ],
)
def test_the_same_is_printed(
    postgres: PostgresServer,
    database: str,
    ledger: str,
    capsys: Printed,
    arguments: list[str],
    as_json: list[str],
) -> None:
    """With every option."""
    of_file = printed(capsys, ledger, *arguments, *as_json)
    url = postgres.url(database)
    assert printed(capsys, "--postgres", url, *arguments, *as_json) == of_file


def test_the_configuration_names_the_server(
    postgres: PostgresServer,
    database: str,
    ledger: str,
    tmp_path: Path,
    capsys: Printed,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The password is the credential; who may not read that brings another, or is told of both."""
    vault = tmp_path / "vault"
    vault.mkdir(mode=0o700)
    (vault / "db").write_text(PASSWORD)
    config = tmp_path / "c.toml"
    config.write_text(
        f'[credentials]\ndirectory = "{vault}"\n[trace]\nledger = "/nowhere/ledger"\n'
        f'postgres = "{postgres.tcp_url(database)}"\npostgres_credential = "db"\n'
        '[providers.p]\ncredential = "not-there"\n'
    )
    expected = printed(capsys, ledger)
    assert printed(capsys, "--config", str(config)) == expected
    os.unlink(vault / "db")
    said = failure(capsys, "--config", str(config))
    assert "PostgreSQL: " in said
    assert "no password was read: trace.postgres_credential: expected a file" in said
    monkeypatch.setenv("PGPASSWORD", PASSWORD)
    assert printed(capsys, "--config", str(config)) == expected


def test_a_server_that_cannot_be_read_is_reported(
    postgres: PostgresServer, tmp_path: Path, capsys: Printed
) -> None:
    """In a line of stderr, and the code is 1."""
    empty = postgres.url(postgres.database())
    assert "there is no ledger in this database" in failure(capsys, "--postgres", empty)
    nowhere = f"postgresql:///d?host={tmp_path}"
    assert "PostgreSQL: connection" in failure(capsys, "--postgres", nowhere)
    assert "sslmod" in failure(capsys, "--postgres", "postgresql:///d?sslmod=x")


def test_a_password_in_the_command_line_is_refused(capsys: Printed) -> None:
    """Everybody on the machine could read it; and the server is instead of files."""
    for arguments in (["postgresql://u:needle@h/d"], ["postgresql://u@h/d", "ledger"]):
        with pytest.raises(SystemExit) as caught:
            main(["usage", "--postgres", *arguments])
        assert caught.value.code == 2
        assert "needle" not in capsys.readouterr().err


def test_doctor_timeouts_reads_the_server(
    postgres: PostgresServer, database: str, ledger: str, capsys: Printed
) -> None:
    """It says what it says of the file."""
    assert main(["doctor", "timeouts", ledger]) == 0
    expected = capsys.readouterr().out
    assert main(["doctor", "timeouts", "--postgres", postgres.url(database)]) == 0
    assert capsys.readouterr().out == expected
