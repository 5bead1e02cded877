"""Which ledgers a command reads, and from which time on."""

from __future__ import annotations

import argparse
import glob
import os
import re
from collections.abc import Callable
from datetime import UTC, datetime

from llmproxy.config import ledger_path, ledger_server
from llmproxy.config.postgres import postgres_url
from llmproxy.config.values import Wrong, duration
from llmproxy.record.ledger_source import Files, Source
from llmproxy.record.ledger_steps import LedgerError

DEFAULT_CONFIG = "/etc/llmproxy/llmproxy.toml"

_INSTANCE = r"([A-Za-z0-9._-]{1,64})"
_BESIDE = ("-wal", "-shm", "-journal")  # what SQLite puts beside a database


def add_ledgers(command: argparse.ArgumentParser, *, begins: str) -> None:
    """Add the arguments that say which ledgers are read, and from when on.

    Args:
        begins: what ``--since`` is about.
    """
    places = command.add_mutually_exclusive_group()
    places.add_argument(
        "files",
        metavar="LEDGER",
        nargs="*",
        default=[],
        help="ledger files, in place of the configuration's ledger; a record that is in several "
        "counts once",
    )
    places.add_argument(
        "--postgres",
        type=_server,
        metavar="URL",
        help="a PostgreSQL server, in place of the configuration's ledger; the password comes from "
        "$PGPASSWORD or ~/.pgpass",
    )
    command.add_argument(
        "--config",
        default=DEFAULT_CONFIG,
        metavar="FILE",
        help="the configuration file, whose {instance} stands for every one (default: %(default)s)",
    )
    command.add_argument(
        "--since",
        type=_since,
        metavar="WHEN",
        help=f"{begins}: 7d, 12h, 2026-11-01 or 2026-11-01T12:00 (UTC; default: all)",
    )


def source_of(args: argparse.Namespace) -> Source:
    """Return the ledgers that the arguments name, or else those of the configuration.

    Where the configuration has both, that is the server, which knows all hosts.

    Raises:
        ConfigError: the configuration cannot be read.
        LedgerError: it names no ledger, or no such file is there.
    """
    if args.files:
        return Files(args.files)
    if args.postgres is not None:
        return _source_at(args.postgres, None, "")
    configured = ledger_server(args.config, os.environ)
    if configured is None:
        return Files(_ledgers_of(args.config))
    url, secret, problems = configured
    hint = f" (no password was read: {'; '.join(problems)})" if problems else ""
    return _source_at(url, None if secret is None else secret.reveal(), hint)


def _source_at(url: str, password: str | None, hint: str) -> Source:
    from llmproxy.record import postgres_ledger  # psycopg, for PostgreSQL alone

    return postgres_ledger.PostgresLedger(postgres_ledger.conninfo_of(url, password), hint)


def _ledgers_of(config: str) -> list[str]:
    """Return the ledger of every instance that a configuration file stands for."""
    named = ledger_path(config)
    if named is None:
        raise LedgerError(f"{config}: no ledger is configured ([trace] ledger), nor postgres")
    if "{instance}" not in named:
        return [named]
    parts = named.split("{instance}")
    same = r"\1".join(map(re.escape, parts[1:]))
    shape = re.compile(re.escape(parts[0]) + _INSTANCE + same)
    found = [
        path
        for path in sorted(glob.glob("*".join(map(glob.escape, parts)), include_hidden=True))
        if shape.fullmatch(path) and not path.endswith(_BESIDE)
    ]
    if not found:
        raise LedgerError(f"{named}: there is no such file, of any instance")
    return found


def _server(word: str) -> str:
    try:
        return postgres_url(word)
    except Wrong:
        raise argparse.ArgumentTypeError(
            "expected a URL such as postgresql://USER@HOST/DATABASE, without a password "
            "(others can see it here): $PGPASSWORD or ~/.pgpass may have it"
        ) from None


def _since(word: str) -> Callable[[float], float]:
    """Return a function from the present time to the beginning, both in epoch seconds."""
    try:
        back = duration(word)
    except Wrong:
        moment = max(0.0, _moment(word))
        return lambda _: moment
    return lambda now: now - back


def _moment(word: str) -> float:
    try:
        moment = datetime.fromisoformat(word)
        return (moment if moment.tzinfo else moment.replace(tzinfo=UTC)).timestamp()
    except (ValueError, OverflowError):
        raise argparse.ArgumentTypeError(
            f"expected a duration such as 7d, or a date such as 2026-11-01, got {word!r}"
        ) from None
