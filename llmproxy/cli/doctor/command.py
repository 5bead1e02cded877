"""The command line of the doctor: its arguments, its progress on a terminal, its exit code."""

from __future__ import annotations

import argparse
import contextlib
import json
import ssl
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from llmproxy.cli.doctor.diagnosis import diagnose
from llmproxy.cli.doctor.examination import Checks
from llmproxy.cli.doctor.exchange import Trust
from llmproxy.cli.doctor.target import DIALECTS, Target, target
from llmproxy.config.credentials import credential_value
from llmproxy.config.values import Wrong, duration
from llmproxy.dialects.dialect import Dialect

_INTERRUPTED = 130  # as a shell has it: 128 and the number of the signal
_LONGEST_SILENCE_S = 600

_CODES = """exit codes: 0 healthy; 1 a stream is held back or cut; 2 a URL cannot be reached or
measured, or the command line is wrong"""
_ABOUT = """\
Find out which hop holds a stream back. Name the URLs of the same service from the client's side to
the provider's: what is seen at one URL and not at the next is made in between, and the report names
the program and the line to change. A URL without a path is that of llmproxy's paced stream
(/-/pace), which shows most. With --dialect a real request is sent to each base URL; it costs
tokens. Any other URL of a stream is fetched as it stands."""


def add_doctor(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the command to those of ``llmproxy``."""
    command = commands.add_parser(
        "doctor",
        help="find out which hop holds a stream back",
        description=_ABOUT,
        epilog=_CODES,
    )
    command.add_argument(
        "urls", metavar="URL", nargs="+", help="from the client's side to the provider's"
    )
    command.add_argument(
        "--direct",
        metavar="URL",
        help="the provider itself, which no key of --key-file is sent to",
    )
    command.add_argument(
        "--key-file", metavar="FILE", help="holds the key that shows who calls the URLs"
    )
    command.add_argument(
        "--direct-key-file", metavar="FILE", help="holds the key for the URL of --direct"
    )
    command.add_argument(
        "--dialect",
        choices=[dialect.value for dialect in DIALECTS],
        help="send a real streaming request of this API; needs --model",
    )
    command.add_argument("--model", metavar="NAME", help="the model that such a request names")
    command.add_argument(
        "--ca", metavar="FILE", help="trust these authorities, in place of the system's"
    )
    command.add_argument(
        "--idle",
        type=_up_to(_LONGEST_SILENCE_S),
        metavar="DURATION",
        help="also try whether a silence of that length is cut, such as 90s; it takes as long, for "
        "each URL (default: not tried)",
    )
    command.add_argument(
        "--timeout",
        type=_up_to(86400),
        default=60.0,
        metavar="DURATION",
        help="the longest that one stream is read (default: 60s)",
    )
    command.add_argument("--json", action="store_true", help="print one object to stdout")
    command.set_defaults(run=doctor, parser=command)


def doctor(args: argparse.Namespace) -> int:
    """Examine the URLs and print what is found."""
    targets = _targets(args)
    checks = Checks(timeout_s=args.timeout, idle_s=args.idle)
    trust = Trust(args.ca)
    try:
        trust.context()
    except (OSError, ssl.SSLError):
        args.parser.error(f"--ca: expected a file of certificates in PEM, got {args.ca!r}")
    try:
        with _progress(targets) as progress:
            found = diagnose(targets, checks=checks, trust=trust, progress=progress)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return _INTERRUPTED
    # Not at the top: the report brings rich, and no other command needs all of it.
    from llmproxy.cli.doctor.report import as_json, show

    if args.json:
        print(json.dumps(as_json(found)))
    else:
        show(found)
    return found.code


def _targets(args: argparse.Namespace) -> list[Target]:
    """Return what the command line asks for; the program ends where that makes no sense."""
    error: Callable[[str], None] = args.parser.error
    if (args.dialect is None) != (args.model is None):
        error("--dialect and --model are needed together")
    if args.direct is None and args.direct_key_file is not None:
        error("--direct-key-file is the key for the URL of --direct, which is not given")
    dialect = None if args.dialect is None else Dialect(args.dialect)
    named = [("URL", word, args.key_file, False) for word in args.urls]
    if args.direct is not None:
        named.append(("--direct", args.direct, args.direct_key_file, True))
    found = []
    for flag, word, key_file, direct in named:
        try:
            key = None if key_file is None else _key(key_file)
            found.append(target(word, dialect=dialect, model=args.model, key=key, direct=direct))
        except Wrong as wrong:
            shown = "" if wrong.hidden else f", got {word!r}"
            error(f"{flag}: expected {wrong.expected}{shown}")
        except OSError as failed:
            error(f"{key_file}: {failed.strerror or failed}")
    return found


def _key(path: str) -> str:
    return credential_value(Path(path).read_bytes(), f"{path} to be a file")


def _up_to(most_s: float) -> Callable[[str], float]:
    def read(word: str) -> float:
        try:
            seconds = duration(word)
        except Wrong as wrong:
            raise argparse.ArgumentTypeError(f"expected {wrong.expected}, got {word!r}") from None
        if seconds > most_s:
            raise argparse.ArgumentTypeError(f"expected at most {most_s:g}s, got {word!r}")
        return seconds

    return read


@contextlib.contextmanager
def _progress(targets: Sequence[Target]) -> Iterator[Callable[[int, str], None]]:
    """Show what is tried, where standard error is a terminal."""
    if not sys.stderr.isatty():
        yield lambda number, words: None
        return
    from rich.console import Console
    from rich.markup import escape

    with Console(stderr=True).status("...") as status:

        def show(number: int, words: str) -> None:
            at = f"{number + 1}/{len(targets)} " if len(targets) > 1 else ""
            status.update(escape(f"{at}{targets[number]}: {words}"))

        yield show
