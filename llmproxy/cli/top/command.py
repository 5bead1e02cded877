"""The command line of ``llmproxy top``."""

from __future__ import annotations

import argparse
import json
import os
import sys
from contextlib import closing
from pathlib import Path
from typing import Any

from llmproxy.cli.table import shown
from llmproxy.cli.top.filters import FILTERS, written
from llmproxy.cli.top.site import DEFAULT, Site, SiteError

_MOST_TOKEN = 4096
_CODES = (
    "exit codes: 0 done; 1 the admin site does not answer, or refuses; 2 the command line is wrong"
)


def add_top(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the command to those of ``llmproxy``."""
    command = commands.add_parser(
        "top",
        help="show what a running daemon does, in the terminal",
        description="Show what a running daemon does: its streams, providers and abnormal ends, as "
        "its admin site has them. Keys: q quits, ? lists the others.",
        epilog=_CODES,
    )
    add = command.add_argument
    add(
        "url",
        nargs="?",
        default=DEFAULT,
        metavar="URL",
        help="the admin site: http://HOST:PORT or unix:PATH (default: %(default)s)",
    )
    add(
        "--sort",
        default="-age",
        metavar="BY",
        help="age, bytes, events, last_chunk, paused, ahead, client, route, provider, model or "
        "phase, with - before it for the greatest first: --sort=-bytes (default: %(default)s)",
    )
    for name in FILTERS:
        add(f"--{name}", metavar="NAME", help=f"only streams of this {name}")
    add("--limit", default=100, type=int, metavar="N", help="most streams (default: %(default)s)")
    add(
        "--every",
        default=1,
        type=int,
        metavar="SECONDS",
        help="seconds between two states (default: %(default)s)",
    )
    add("--once", action="store_true", help="print one state and end")
    add("--json", action="store_true", help="print states as lines of JSON (docs/admin-api.json)")
    add(
        "--token-file",
        type=Path,
        metavar="FILE",
        help="holds the admin token, to end streams with x; arguments are seen by everybody",
    )
    command.set_defaults(run=top)


def top(args: argparse.Namespace) -> int:
    """Show what a daemon does."""
    query = {"sort": args.sort, "limit": str(args.limit), "every": str(args.every)}
    query |= {name: getattr(args, name) for name in FILTERS if getattr(args, name) is not None}
    try:
        site = Site(args.url, _token(args.token_file))
        if args.json:
            return _print_json(site, query, once=args.once)
        if args.once:
            return _print(site, query)
        if not (sys.stdin.isatty() and sys.stdout.isatty()):
            raise SiteError("there is no terminal to draw on: use --once or --json")
        return _live(site, query)
    except SiteError as error:
        print(shown(str(error)), file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 0


def _token(path: Path | None) -> str | None:
    if path is None:
        return None
    try:
        token = path.read_text("ascii")[:_MOST_TOKEN].strip()
    except (OSError, ValueError) as error:
        raise SiteError(f"{path}: {getattr(error, 'strerror', None) or 'it is no text'}") from None
    if not token or not token.isprintable() or " " in token:
        raise SiteError(f"{path}: expected the admin token, and nothing else")
    return token


def _print(site: Site, query: dict[str, str]) -> int:
    """Print one picture."""
    # Not at the top, here and below: no other command, and no JSON, needs any of it.
    from llmproxy.admin.overview import State
    from llmproxy.cli.table import console
    from llmproxy.cli.top.screen import View, picture

    with closing(site.follow(query)) as follower:
        state = next(follower.states(State))
    console().print(picture(state, View(sort=query["sort"], filter=written(query))))
    return 0


def _print_json(site: Site, query: dict[str, str], *, once: bool) -> int:
    """Print states as they are; one, or until the daemon ends."""
    with closing(site.follow(query)) as follower:
        for state in follower.states(dict[str, Any]):
            print(json.dumps(state), flush=True)
            if once:
                break
    return 0


def _live(site: Site, query: dict[str, str]) -> int:
    from rich.console import Console

    from llmproxy.cli.top.live import LiveView

    try:  # what is wrong with it is said before all else
        site.follow(query | {"limit": "0"}).close()
    except SiteError as error:
        if error.retry_s is None:
            raise

    for name in ("COLUMNS", "LINES"):  # they would hold when the window gets another size
        os.environ.pop(name, None)
    try:
        LiveView(site, query, Console()).run()
    except OSError:  # the window was closed, and nothing can be written any more
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 0
