"""``llmproxy usage``: what was asked for, by whom, and how many tokens it took.

It reads ledgers, of every instance together, while the daemons write.  Times are UTC.
"""

from __future__ import annotations

import argparse
import glob
import json
import re
import sys
import time
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from operator import attrgetter

import msgspec

from llmproxy.config import ConfigError, ledger_path
from llmproxy.config.values import Wrong, duration
from llmproxy.record.ledger_report import (
    GROUPS,
    Checkpoint,
    Group,
    Totals,
    Ways,
    checkpoints_of,
    refused_in,
    tunnels_of,
    usage_of,
)
from llmproxy.record.ledger_schema import TOKENS, LedgerError
from llmproxy.record.trace import timestamp

DEFAULT_CONFIG = "/etc/llmproxy/llmproxy.toml"

_INSTANCE = r"([A-Za-z0-9._-]{1,64})"
_BESIDE = ("-wal", "-shm", "-journal")  # what SQLite puts beside a database
_FIGURES = ("requests", "complete", "unreported", *TOKENS)
_WIDE = 100_000  # columns where the output is no terminal: nothing is cut or wrapped

_CODES = "exit codes: 0 done; 1 a ledger cannot be read; 2 the command line is wrong"
_ABOUT = """\
Show totals of requests and tokens from the ledger ([trace] ledger), of every instance together,
while the daemon writes. An empty cell is a number that nobody reported, which is not zero;
"unreported" counts the requests whose tokens were not reported, or not all of them. Requests that
the proxy refused are in no row: their number stands below. Preflights of browsers do not count."""


def add_usage(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the command to those of ``llmproxy``."""
    command = commands.add_parser(
        "usage",
        help="show requests and tokens by client, model, day",
        description=_ABOUT,
        epilog=_CODES,
    )
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
        "--by",
        default=("client", "model"),
        type=_groups,
        metavar="GROUPS",
        help=f"what to group by, with commas: {', '.join(GROUPS)} (default: client,model)",
    )
    command.add_argument(
        "--since",
        type=_since,
        metavar="WHEN",
        help="count what began later: 7d, 12h, 2026-11-01 or 2026-11-01T12:00 (UTC; default: all)",
    )
    command.add_argument(
        "--sessions",
        action="store_true",
        help="show the checkpoint of each session in place of totals, the last one first; "
        "--since then is about its last request",
    )
    command.add_argument(
        "--tunnels",
        action="store_true",
        help="show the hosts that clients asked for by CONNECT or by an http:// URL, and what "
        "became of it, in place of totals",
    )
    command.add_argument("--json", action="store_true", help="print JSON to stdout")
    command.set_defaults(run=usage)


def usage(args: argparse.Namespace) -> int:
    """Print totals, checkpoints of sessions, or tunnels."""
    since = "" if args.since is None else timestamp(args.since(time.time()))
    try:
        paths = args.files or _ledgers(args.config)
        if args.sessions:
            _print_sessions(checkpoints_of(paths, since), as_json=args.json)
        elif args.tunnels:
            _print_tunnels(tunnels_of(paths, since), as_json=args.json)
        else:
            found, refused = usage_of(paths, args.by, since), refused_in(paths, since)
            _print_totals(args.by, found, refused, as_json=args.json)
    except (LedgerError, ConfigError) as error:
        print(error, file=sys.stderr)
        return 1
    return 0


def _ledgers(config: str) -> list[str]:
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


def _print_totals(
    by: Sequence[str], found: dict[Group, Totals], refused: int, *, as_json: bool
) -> None:
    total = Totals()
    for one in found.values():
        total.add(one)
    if as_json:
        rows = [
            dict(zip(by, group, strict=True)) | msgspec.structs.asdict(one)
            for group, one in found.items()
        ]
        whole = msgspec.structs.asdict(total)
        print(json.dumps({"by": list(by), "groups": rows, "total": whole, "refused": refused}))
        return
    cells = [(*map(_word, group), *_figures(one)) for group, one in found.items()]
    _print_table(by, cells, footer=("total", *[""] * (len(by) - 1), *_figures(total)))
    if refused:
        noun = "request" if refused == 1 else "requests"
        print(f"refused by the proxy, and not counted above: {refused:,} {noun}")


def _print_sessions(found: list[Checkpoint], *, as_json: bool) -> None:
    if as_json:
        print(json.dumps({"sessions": [_session(one) for one in found]}))
        return
    ends = ("first_time", "last_time", "last_trace")
    ends_of = attrgetter(*ends)
    cells = [
        (*map(_word, (one.session, one.client, *ends_of(one))), *_figures(one.totals))
        for one in found
    ]
    _print_table(("session", "client", *ends), cells)


def _print_tunnels(found: list[Ways], *, as_json: bool) -> None:
    if as_json:
        print(json.dumps({"tunnels": [msgspec.structs.asdict(one) for one in found]}))
        return
    cells = [
        (
            *map(_word, (one.host or None, one.outcome, one.error, one.client)),
            *(f"{figure:,}" for figure in (one.count, one.bytes_in, one.bytes_out)),
            one.last_time,
        )
        for one in found
    ]
    names = ("host", "outcome", "error", "client", "count", "bytes in", "bytes out", "last time")
    _print_table(names, cells, figures=())


def _session(one: Checkpoint) -> dict[str, object]:
    shown: dict[str, object] = msgspec.structs.asdict(one)
    del shown["totals"]
    incomplete = one.totals.requests - one.totals.complete
    return shown | msgspec.structs.asdict(one.totals) | {"incomplete": incomplete}


def _figures(totals: Totals) -> tuple[str, ...]:
    values = (getattr(totals, name) for name in _FIGURES)
    return tuple("" if value is None else f"{value:,}" for value in values)


def _print_table(
    names: Sequence[str],
    rows: Sequence[Sequence[str]],
    footer: Sequence[str] = (),
    figures: Sequence[str] = _FIGURES,
) -> None:
    # Not at the top: no other command, and none that prints JSON, has to load it.
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console() if sys.stdout.isatty() else Console(width=_WIDE)
    table = Table(
        box=box.SIMPLE_HEAD, show_edge=False, show_footer=bool(footer), footer_style="bold"
    )
    for at, name in enumerate((*names, *figures)):
        table.add_column(
            name.removesuffix("_tokens").replace("_", " "),
            Text(footer[at] if footer else ""),
            justify="left" if at < len(names) else "right",
            overflow="fold",
        )
    for row in rows:
        table.add_row(*map(Text, row))
    console.print(table)


def _word(value: str | None) -> str:
    """Return a caller's word as a terminal may see it; a dash where there was none."""
    if value is None:
        return "-"
    return "".join(char if char.isprintable() else ascii(char)[1:-1] for char in value)


def _groups(words: str) -> tuple[str, ...]:
    by = tuple(word.strip() for word in words.split(","))
    for word in by:
        if word not in GROUPS or by.count(word) > 1:
            raise argparse.ArgumentTypeError(
                f"expected some of {', '.join(GROUPS)}, each once, got {words!r}"
            )
    return by


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
