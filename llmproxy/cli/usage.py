"""``llmproxy usage``: what was asked for, by whom, and how many tokens it took.

It reads ledgers, of every instance or host together, while the daemons write.  Times are UTC.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from operator import attrgetter

import msgspec

from llmproxy.cli.ledgers import add_ledgers, source_of
from llmproxy.cli.table import print_table, shown
from llmproxy.config import ConfigError
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
from llmproxy.record.ledger_steps import TOKENS, LedgerError
from llmproxy.record.trace import timestamp

_FIGURES = ("requests", "complete", "unreported", *TOKENS)

_CODES = "exit codes: 0 done; 1 a ledger cannot be read; 2 the command line is wrong"
_ABOUT = """\
Show totals of requests and tokens from the ledger ([trace] ledger or postgres), of every instance
together, while daemons write. An empty cell is a number that nobody reported, which is not zero;
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
    add_ledgers(command, begins="count what began later")
    command.add_argument(
        "--by",
        default=("client", "model"),
        type=_groups,
        metavar="GROUPS",
        help=f"what to group by, with commas: {', '.join(GROUPS)} (default: client,model)",
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
        source = source_of(args)
        if args.sessions:
            _print_sessions(checkpoints_of(source, since), as_json=args.json)
        elif args.tunnels:
            _print_tunnels(tunnels_of(source, since), as_json=args.json)
        else:
            found, refused = usage_of(source, args.by, since), refused_in(source, since)
            _print_totals(args.by, found, refused, as_json=args.json)
    except (LedgerError, ConfigError) as error:
        print(error, file=sys.stderr)
        return 1
    return 0


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
    cells = [(*map(shown, group), *_figures(one)) for group, one in found.items()]
    footer = ("total", *[""] * (len(by) - 1), *_figures(total))
    print_table(by, cells, footer=footer, figures=_FIGURES)
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
        (*map(shown, (one.session, one.client, *ends_of(one))), *_figures(one.totals))
        for one in found
    ]
    print_table(("session", "client", *ends), cells, figures=_FIGURES)


def _print_tunnels(found: list[Ways], *, as_json: bool) -> None:
    if as_json:
        print(json.dumps({"tunnels": [msgspec.structs.asdict(one) for one in found]}))
        return
    cells = [
        (
            *map(shown, (one.host or None, one.outcome, one.error, one.client)),
            *(f"{figure:,}" for figure in (one.count, one.bytes_in, one.bytes_out)),
            one.last_time,
        )
        for one in found
    ]
    names = ("host", "outcome", "error", "client", "count", "bytes in", "bytes out", "last time")
    print_table(names, cells)


def _session(one: Checkpoint) -> dict[str, object]:
    shown: dict[str, object] = msgspec.structs.asdict(one)
    del shown["totals"]
    incomplete = one.totals.requests - one.totals.complete
    return shown | msgspec.structs.asdict(one.totals) | {"incomplete": incomplete}


def _figures(totals: Totals) -> tuple[str, ...]:
    values = (getattr(totals, name) for name in _FIGURES)
    return tuple("" if value is None else f"{value:,}" for value in values)


def _groups(words: str) -> tuple[str, ...]:
    by = tuple(word.strip() for word in words.split(","))
    for word in by:
        if word not in GROUPS or by.count(word) > 1:
            raise argparse.ArgumentTypeError(
                f"expected some of {', '.join(GROUPS)}, each once, got {words!r}"
            )
    return by
