"""``llmproxy doctor timeouts``: whose limit cuts requests, from the cuts in the ledger.

It says only what the figures carry (``fingerprint.py``), and names the limits that are known to be
of that length; which of them it is, only the operator can know.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence

from llmproxy.cli.doctor.fingerprint import Clock, Fingerprint, fingerprints
from llmproxy.cli.ledgers import add_ledgers, source_of
from llmproxy.cli.table import shown
from llmproxy.config import ConfigError
from llmproxy.record.cuts import Side, cuts_of
from llmproxy.record.ledger_steps import LedgerError
from llmproxy.record.trace import timestamp

_CODES = "exit codes: 0 done; 1 a ledger cannot be read; 2 the command line is wrong"
_ABOUT = """\
Look for limits that cut requests: where many of them ended after the same time, the ledger ([trace]
ledger) tells from which side, and whether the time counts from the last byte or from the request.
What the proxy cut by limits of its own is not looked at: its log and its records name them."""

_WHEN: dict[Clock, str] = {
    "silence": "after the last byte",
    "age": "after the request, whether bytes came or not",
    "wait": "after the request, before any byte of a response",
}

_LOOK: dict[tuple[Side, Clock], str] = {
    ("client", "silence"): (
        "look for a limit of {limit} on silence between client and proxy, or in the client; "
        "`heartbeat` on the route fills the silence of a stream"
    ),
    ("client", "age"): (
        "look for a limit of {limit} on a whole response between client and proxy, or in the client"
    ),
    ("client", "wait"): (
        "look for a limit of {limit} on the wait for a response between client and proxy, or in "
        "the client; the head leaves when the provider's comes, and no heartbeat before that"
    ),
    ("provider", "silence"): (
        "look for a limit of {limit} on silence between proxy and provider, or at the provider"
    ),
    ("provider", "age"): (
        "look for a limit of {limit} on a whole response between proxy and provider, or at the "
        "provider"
    ),
    ("provider", "wait"): (
        "look for a limit of {limit} on the wait for a response between proxy and provider, or at "
        "the provider"
    ),
}

_KNOWN: tuple[tuple[float, Sequence[Clock], str], ...] = (
    (15.0, ("age", "wait"), "Envoy's `timeout` of a route is 15 s"),
    (60.0, ("silence", "wait"), "nginx's `proxy_read_timeout` is 60 s"),
    (60.0, ("silence", "wait"), "an AWS load balancer's idle timeout is 60 s"),
    (60.0, ("silence", "wait"), "Varnish's `between_bytes_timeout` is 60 s"),
    (100.0, ("silence", "wait"), "Cloudflare waits 100 s"),
    (240.0, ("silence", "wait"), "an Azure load balancer's idle timeout is 4 min"),
    (300.0, ("silence",), "Envoy's `stream_idle_timeout` is 5 min"),
    (350.0, ("silence", "wait"), "an AWS network load balancer's idle timeout is 350 s"),
    (600.0, ("silence", "wait"), "the timeout of OpenAI's and Anthropic's SDKs is 10 min"),
)
"""Limits by default, as their manuals have them."""

_NEAR = 0.03


def add_timeouts(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the command to those of ``llmproxy``."""
    command = commands.add_parser(
        "doctor timeouts",
        help="find limits that cut requests, from the ledger",
        description=_ABOUT,
        epilog=_CODES,
    )
    add_ledgers(command, begins="look at what began later")
    command.add_argument("--json", action="store_true", help="print JSON to stdout")
    command.set_defaults(run=timeouts)


def timeouts(args: argparse.Namespace) -> int:
    """Print what the cuts carry."""
    since = "" if args.since is None else timestamp(args.since(time.time()))
    try:
        cuts = cuts_of(source_of(args), since)
    except (LedgerError, ConfigError) as error:
        print(error, file=sys.stderr)
        return 1
    found = fingerprints(cuts)
    if args.json:
        rows = [{**one._asdict(), "advice": advice(one)} for one in found]
        print(json.dumps({"cuts": len(cuts), "fingerprints": rows}))
        return 0
    for one in found:
        print(sentence(one))
    if not found:
        noun = "cut" if len(cuts) == 1 else "cuts"
        print(f"{len(cuts)} {noun}, and no limit shows in them.")
    return 0


def sentence(one: Fingerprint) -> str:
    """Return a fingerprint in words, with what to look for."""
    where = f"route {shown(one.route)}, provider {shown(one.provider)}"
    noun = "cut" if one.of == 1 else "cuts"
    came = f"{one.agreeing} of {one.of} {noun} came {one.seconds} s {_WHEN[one.clock]}"
    return f"{where}: {came}, from the {one.side}'s side: {advice(one)}."


def advice(one: Fingerprint) -> str:
    """Return what to look for."""
    words = _LOOK[one.side, one.clock].format(limit=f"{one.seconds:g} s")
    known = [
        text
        for seconds, clocks, text in _KNOWN
        if one.clock in clocks and abs(one.seconds - seconds) <= _NEAR * seconds
    ]
    return f"{words} ({'; '.join(known)})" if known else words
