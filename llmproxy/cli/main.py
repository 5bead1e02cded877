"""The ``llmproxy`` command and its parts: ``run``, ``check``, ``explain``, ``keys`` and so on.

What a program may read goes to stdout, what a person must know goes to stderr.  Nothing here knows
how the daemon works; ``check`` reads a configuration by the very code of the start.

Exit codes: 0 done, 1 the answer is no (or it failed), 2 the command line is wrong.
"""

from __future__ import annotations

import argparse
import getpass
import hashlib
import os
import re
import secrets
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from llmproxy.cli.ca import add_ca
from llmproxy.cli.check import check
from llmproxy.cli.doctor.command import add_doctor
from llmproxy.cli.doctor.timeouts import add_timeouts
from llmproxy.cli.doctor.trust import add_trust
from llmproxy.cli.ledgers import DEFAULT_CONFIG
from llmproxy.cli.top.command import add_top
from llmproxy.cli.usage import add_usage
from llmproxy.config.readers import client_name, instance_name
from llmproxy.config.values import Wrong, duration, instant, show_instant
from llmproxy.policy.auth import KEY_PREFIX
from llmproxy.version import version

_KEY_LINE = re.compile(rb"([!-~]+)(?:\r?\n)?")
_KEY_BYTES = 32  # 43 characters of URL-safe base64
_AUTHORITY = re.compile(r"[^/?#@]+:[0-9]+")
"""How the target of a CONNECT looks."""

_PIPE_CLOSED = 128 + 13
"""What a shell says of a program that SIGPIPE has ended."""

_OF_THE_DOCTOR = ("doctor timeouts", "doctor trust")
"""Commands of two words: behind the first one alone there are URLs."""

_CODES = "exit codes: 0 {ok}; 1 {no}; 2 the command line is wrong"


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code.

    Args:
        argv: the arguments without the program's name; ``None`` takes those of the process.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    if " ".join(words[:2]) in _OF_THE_DOCTOR:
        words[:2] = [" ".join(words[:2])]
    args = _parser().parse_args(words)
    run: Callable[[argparse.Namespace], int] = args.run
    try:
        code = run(args)
        sys.stdout.flush()
    except BrokenPipeError:  # such as `| head`: whoever reads has enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return _PIPE_CLOSED
    return code


def keys_new(args: argparse.Namespace) -> int:
    """Print a new key, and the line of the configuration that lets it in."""
    key = KEY_PREFIX + secrets.token_urlsafe(_KEY_BYTES)
    print(key)
    _print_keys_line(key, args.expires)
    if sys.stderr.isatty():
        print(
            f"The first line is the key: hand it over and keep no copy.\n"
            f"The second line belongs under [clients.{args.name}].",
            file=sys.stderr,
        )
    return 0


def keys_hash(args: argparse.Namespace) -> int:
    """Print the line of the configuration that lets a key in which the caller has already."""
    if args.argument:
        args.parser.error("the key is read from standard input: arguments are seen by everybody")
    asks = sys.stdin.isatty()
    read = getpass.getpass("Key: ").encode() if asks else sys.stdin.buffer.read()
    key = _KEY_LINE.fullmatch(read)
    if key is None:
        print(
            "expected one key on standard input: a line of visible ASCII, no spaces",
            file=sys.stderr,
        )
        return 1
    _print_keys_line(key[1].decode("ascii"), args.expires)
    return 0


def _print_keys_line(key: str, expires: float | None) -> None:
    digest = f'"sha256:{hashlib.sha256(key.encode()).hexdigest()}"'
    if expires is None:
        print(f"keys = [{digest}]")
    else:
        print(f'keys = [{{ hash = {digest}, expires = "{show_instant(expires)}" }}]')


def run_daemon(args: argparse.Namespace) -> int:
    """Run the daemon in the foreground, just as twistd does."""
    # Not at the top: twistd brings much that no other command needs.
    from twisted.scripts.twistd import run

    # twistd reads the command line of the process.
    sys.argv = ["twistd", "-n", "--pidfile=", "llmproxy", *("--config", args.config)]
    sys.argv += ["--instance", args.instance]
    run()
    return 0


def run_explain(args: argparse.Namespace) -> int:
    """Say what would happen to a request."""
    # Not at the top: it brings the gateway, and no other command needs that.
    from llmproxy.cli.explain import explain

    return explain(args)


def run_demo(args: argparse.Namespace) -> int:
    """Run the proxy with an embedded provider until it is interrupted."""
    # Not at the top: the demo brings the reactor, and no other command needs one.
    from llmproxy.cli.demo.replay import BadCapsule, read_capsule
    from llmproxy.cli.demo.run import run

    capsule = None
    if args.replay is not None:
        try:
            capsule = read_capsule(Path(args.replay).read_bytes())
        except (BadCapsule, OSError) as wrong:
            why = wrong.strerror if isinstance(wrong, OSError) else wrong
            sys.stderr.write(f"llmproxy: {args.replay}: {why}\n")
            return 1
    run(
        proxy_port=args.port,
        admin_port=args.admin_port,
        cache=args.cache,
        sandboxed=args.sandbox,
        capsule=capsule,
    )
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="llmproxy",
        description="The daemon, and tools beside it.",
        epilog=_CODES.format(ok="done", no="the answer is no, or it failed"),
    )
    parser.add_argument("--version", action="version", version=f"llmproxy {version()}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    _add_run(commands)
    _add_check(commands)
    _add_explain(commands)
    add_doctor(commands)
    add_timeouts(commands)
    add_trust(commands)
    _add_keys(commands)
    add_ca(commands)
    add_usage(commands)
    add_top(commands)
    _add_demo(commands)
    return parser


def _add_run(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    command = commands.add_parser(
        "run",
        help="run the daemon in the foreground",
        description="Run the daemon in the foreground: the same as "
        "`twistd -n --pidfile= llmproxy --config FILE`. It logs JSON to stdout. SIGTERM and Ctrl-C "
        "let running responses end, SIGHUP reads the configuration again.",
        epilog=_CODES.format(ok="it was stopped", no="it could not start"),
    )
    command.add_argument(
        "--config",
        default=DEFAULT_CONFIG,
        metavar="FILE",
        help="the configuration file (default: %(default)s)",
    )
    _add_instance(command)
    command.set_defaults(run=run_daemon)


def _add_instance(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--instance",
        default="0",
        type=_value_of(instance_name),
        metavar="NAME",
        help="what {instance} in the file stands for (default: %(default)s)",
    )


def _add_check(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    command = commands.add_parser(
        "check",
        help="check a configuration file",
        description="Check a configuration file as the daemon does at its start and at a reload. "
        "Every problem is one line of stderr, and so is every warning: what can never work, what "
        "is likely not meant, and what only the start can tell. A warning does not change the exit "
        "code. Commands that print credentials are only run with --run-commands.",
        epilog=_CODES.format(ok="the file can be used, whatever is warned of", no="it cannot"),
    )
    _add_file(command)
    command.add_argument(
        "--run-commands",
        action="store_true",
        help="run each command that prints a credential, as this user, and warn if it fails; what "
        "it prints is shown nowhere",
    )
    command.add_argument(
        "--json",
        action="store_true",
        help='print an object with "ok", "problems" and "warnings" to stdout',
    )
    command.set_defaults(run=check)


def _add_file(command: argparse.ArgumentParser) -> None:
    command.add_argument("file", metavar="FILE", help="the configuration file")
    _add_instance(command)
    command.add_argument(
        "--credentials",
        metavar="DIR",
        help="what $CREDENTIALS_DIRECTORY stands for, which systemd sets for its units alone: "
        "the folder of the files that LoadCredential= names",
    )


def _add_explain(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    command = commands.add_parser(
        "explain",
        help="say what would happen to a request",
        description="Say what the proxy would do with a request: its route, the candidates in "
        "order, the URL of each, the headers that are added and dropped, timeouts and limits; or "
        "why it would be refused. Of a CONNECT it says what becomes of it. Nothing is started or "
        "sent, and no command is run. What only a running daemon knows is not said: which provider "
        "is busy, cools down or is switched off.",
        epilog=_CODES.format(
            ok="the request would be served",
            no="it would be refused, or the file cannot be used",
        ),
    )
    _add_file(command)
    command.add_argument(
        "--path",
        required=True,
        type=_target,
        metavar="PATH",
        help="path and query of the request, or HOST:PORT of a CONNECT",
    )
    command.add_argument(
        "--client", metavar="NAME", help="who calls (default: nobody known, if anonymous is true)"
    )
    command.add_argument("--model", metavar="NAME", help="the model that the body names")
    command.add_argument(
        "--method", metavar="METHOD", help="of the request (default: POST, or CONNECT by the path)"
    )
    command.add_argument(
        "--host",
        default="localhost",
        metavar="HOST",
        help="what the Host header says (default: %(default)s)",
    )
    command.add_argument(
        "--header",
        action="append",
        default=[],
        metavar="LINE",
        help="a further header of the request, as NAME: VALUE; any number of times",
    )
    command.add_argument("--stream", action="store_true", help="the body asks for a stream")
    command.add_argument(
        "--json", action="store_true", help="print one object to stdout, with problems, too"
    )
    command.set_defaults(run=run_explain)


def _add_keys(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    keys = commands.add_parser(
        "keys",
        help="make keys for clients, or let existing ones in",
        description="Make keys for clients, or let existing ones in.",
        epilog=_CODES.format(ok="done", no="it failed"),
    )
    parsers = keys.add_subparsers(required=True, metavar="COMMAND")
    command = parsers.add_parser(
        "new",
        help="print a new key and its line for the configuration",
        description="Print a new key on the first line and, on the second, the line for "
        "[clients.NAME] that lets it in. The key is kept nowhere.",
        epilog=_CODES.format(ok="done", no="it failed"),
    )
    command.add_argument(
        "name", metavar="NAME", type=_value_of(client_name), help="the client that gets the key"
    )
    _add_expires(command)
    command.set_defaults(run=keys_new)
    command = parsers.add_parser(
        "hash",
        help="read a key from stdin and print its line for the configuration",
        description="Read an existing key from standard input (on a terminal it is asked for, and "
        "not shown) and print the line for [clients.NAME] that lets it in. The key is never an "
        "argument, which everybody on the machine can see.",
        epilog=_CODES.format(ok="done", no="what was read is no key"),
    )
    _add_expires(command)
    command.add_argument("argument", nargs="*", help=argparse.SUPPRESS)
    command.set_defaults(run=keys_hash, parser=command)


def _add_expires(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--expires",
        type=_end,
        metavar="WHEN",
        help="let the key expire after a duration such as 90d, or at a time such as "
        "2027-01-31T00:00:00Z (default: never)",
    )


def _end(word: str) -> float:
    """Return when something ends that lasts for a duration from now on, or until a time."""
    try:
        return time.time() + duration(word)
    except Wrong:
        pass
    try:
        return instant(word)
    except Wrong as wrong:
        raise argparse.ArgumentTypeError(
            f"expected a duration such as 90d, or {wrong.expected}; got {word!r}"
        ) from None


def _add_demo(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    command = commands.add_parser(
        "demo",
        help="run the proxy with an embedded provider",
        description="Run the proxy on this machine alone, with an embedded provider that "
        "streams made-up responses, until it is interrupted. Its models are demo-fast, demo-slow, "
        "demo-Ntps (N tokens a second), and some that fail: demo-429, demo-500, demo-503, "
        "demo-break, demo-stall, demo-malformed, demo-unfinished, demo-fail and demo-redirect. The "
        "provider has a prompt cache: of a prompt that begins like an earlier one, whole blocks of "
        "16 words count as cached for five minutes (with Anthropic's API, where the request has "
        "cache_control).",
        epilog=_CODES.format(ok="it was interrupted", no="it could not start"),
    )
    for flag, port, whose in (("--port", 8080, "proxy"), ("--admin-port", 9080, "admin site")):
        command.add_argument(
            flag, default=port, type=_port, metavar="PORT", help=f"of the {whose} (default: {port})"
        )
    command.add_argument(
        "--no-cache",
        action="store_false",
        dest="cache",
        help="no prompt cache: the same request always gets the same counts",
    )
    command.add_argument(
        "--sandbox",
        action="store_true",
        help="stand in for api.openai.com and others, too, as a proxy that ends their TLS: prints "
        "the variables with which a sandboxed program finds it",
    )
    command.add_argument(
        "--replay",
        metavar="FILE",
        help="a capsule, saved from /streams/ended/ID of an admin site, which the further model "
        "demo-replay plays again: its sizes, its times, and how it broke",
    )
    command.set_defaults(run=run_demo)


def _value_of(reader: Callable[[object], str]) -> Callable[[str], str]:
    """Return ``reader`` as argparse wants it."""

    def read(word: str) -> str:
        try:
            return reader(word)
        except Wrong as wrong:
            raise argparse.ArgumentTypeError(f"expected {wrong.expected}, got {word!r}") from None

    return read


def _target(word: str) -> str:
    is_target = word.startswith("/") or _AUTHORITY.fullmatch(word)
    if not is_target or not word.isascii() or not word.isprintable() or " " in word:
        raise argparse.ArgumentTypeError(
            f"expected a path that begins with '/', or HOST:PORT of a CONNECT, got {word!r}"
        )
    return word


def _port(word: str) -> int:
    if not (word.isascii() and word.isdigit() and len(word) < 6 and int(word) <= 65535):
        raise argparse.ArgumentTypeError(f"expected a port from 0 to 65535, got {word!r}")
    return int(word)


if __name__ == "__main__":
    sys.exit(main())
