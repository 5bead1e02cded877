"""Which ledgers a command reads, and from which time on."""

from __future__ import annotations

import argparse
import glob
import re
from collections.abc import Callable
from datetime import UTC, datetime

from llmproxy.config import ledger_path
from llmproxy.config.values import Wrong, duration
from llmproxy.record.ledger_schema import LedgerError

DEFAULT_CONFIG = "/etc/llmproxy/llmproxy.toml"

_INSTANCE = r"([A-Za-z0-9._-]{1,64})"
_BESIDE = ("-wal", "-shm", "-journal")  # what SQLite puts beside a database


def add_ledgers(command: argparse.ArgumentParser, *, begins: str) -> None:
    """Add the arguments that say which ledgers are read, and from when on.

    Args:
        begins: what ``--since`` is about.
    """
    command.add_argument(
        "files", metavar="LEDGER", nargs="*", help="ledger files, in place of the configuration's"
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


def ledgers_of(config: str) -> list[str]:
    """Return the ledger of every instance that a configuration file stands for.

    Raises:
        ConfigError: it cannot be read, or names no ledger.
        LedgerError: no such file is there.
    """
    named = ledger_path(config)
    if named is None:
        raise LedgerError(f"{config}: no ledger is configured ([trace] ledger)")
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
