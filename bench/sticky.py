"""``make bench-sticky``: what providers find of prompts in their caches, with stickiness or not.

Conversations of the real SDKs grow turn by turn, several at once, through the daemon to several
demo providers, each of which has a prompt cache of its own.  That is done twice, with ``sticky =
"off"`` and with ``"session"``; the daemon and the providers are started anew for each.  The figures
are those of the daemon's own records; the SDKs and the providers count, too, and must agree.

Nothing is timed: how quiet the machine is does not matter.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import socket
import sys
import tempfile
import threading
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import Any, NamedTuple

import anthropic
import openai

from bench.processes import Program, cores

SDKS = ("openai", "anthropic")
_KEY = "key-of-the-benchmark"
_REPORTED = ("a public report, elsewhere", "0.085 % without stickiness, 99.4 % with it")

# All providers in one process, each on a port and with a cache of its own; their counts at the end.
_DEMOS = """\
import json, sys
from twisted.internet import reactor
from llmproxy.cli.demo import PromptCache, demo_site

class Counting(PromptCache):
    words = found = 0

    def use(self, account, model, parts, kept=None):
        found, new = super().use(account, model, parts, kept)
        self.words += sum(len(part.split()) for part in parts)
        self.found += found
        return found, new

caches = [Counting(reactor.seconds) for _ in sys.argv[1:]]
for port, cache in zip(sys.argv[1:], caches):
    reactor.listenTCP(int(port), demo_site(reactor, cache=cache), interface="127.0.0.1")
tell = lambda: print(json.dumps([[cache.words, cache.found] for cache in caches]), flush=True)
reactor.addSystemEventTrigger("after", "shutdown", tell)
reactor.run()
"""

_CONFIG = """\
[proxy]
listen = ["tcp:{port}:interface=127.0.0.1"]
[admin]
listen = "tcp:{admin}:interface=127.0.0.1"
[trace]
jsonl = "{trace}"
[log]
access = false
[clients.bench]
keys = ["sha256:{digest}"]
"""


class Count(NamedTuple):
    """Tokens of prompts: all of them, and those that were found in a cache."""

    whole: int
    cached: int

    @property
    def ratio(self) -> float:
        """The share that was found, in percent."""
        return 100 * self.cached / self.whole if self.whole else 0.0


class Outcome(NamedTuple):
    """Who counted what in one run, which must be the same.

    Attributes:
        by_records: from the daemon's trace.
        by_sdks: from the responses.
        by_providers: from their caches.
        requests: how many ended, and were complete by the records.
    """

    by_records: Count
    by_sdks: Count
    by_providers: Count
    requests: int


def config(asked: argparse.Namespace, sticky: str, ports: Sequence[int], **places: object) -> str:
    """Return the daemon's file: for each SDK one route over all providers."""
    text = _CONFIG.format(digest=hashlib.sha256(_KEY.encode()).hexdigest(), **places)
    for sdk in SDKS:
        names = [f"{sdk}-{number}" for number in range(len(ports))]
        for name, port in zip(names, ports, strict=True):
            url = f"http://127.0.0.1:{port}"
            text += f'[providers.{name}]\nurl = "{url}"\ndialect = "{sdk}"\n'
        text += f'[[routes]]\npath = "/{sdk}"\nproviders = {json.dumps(names)}\n'
        text += f'balance = "{asked.balance}"\nsticky = "{sticky}"\n'
    return text


def words(count: int, *name: object) -> str:
    """Return a text of so many words, which no text of another name has."""
    start = "-".join(map(str, name))
    return " ".join(f"{start}-{number}" for number in range(count))


class Conversations:
    """All conversations of a run, led by threads.

    Args:
        base: the daemon's URL.
        asked: how many, and how long.
    """

    def __init__(self, base: str, asked: argparse.Namespace) -> None:
        self._asked = asked
        self._left: SimpleQueue[int] = SimpleQueue()
        for number in range(asked.conversations):
            self._left.put(number)
        self._clients: dict[str, Any] = {
            "openai": openai.OpenAI(base_url=f"{base}/openai/v1", api_key=_KEY, max_retries=0),
            "anthropic": anthropic.Anthropic(
                base_url=f"{base}/anthropic", api_key=_KEY, max_retries=0
            ),
        }
        self._counts: list[Count] = []
        self._failure: Exception | None = None

    def lead(self) -> Count:
        """Lead them all, so many at once as were asked for; return what the SDKs counted."""
        threads = [threading.Thread(target=self._work) for _ in range(self._asked.at_once)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        for client in self._clients.values():
            client.close()
        if self._failure is not None:
            raise self._failure
        return total(self._counts)

    def _work(self) -> None:
        try:
            while self._failure is None:
                self._converse(self._left.get_nowait())
        except Empty:
            pass
        except Exception as failure:
            self._failure = failure

    def _converse(self, number: int) -> None:
        sdk = SDKS[number % len(SDKS)]
        asks: Callable[[str, list[Any]], tuple[str, Count]]
        asks = self._openai if sdk == "openai" else self._anthropic
        messages = [{"role": "user", "content": words(self._asked.opening, number)}]
        for turn in range(self._asked.turns):
            text, count = asks(f"{sdk}-{number}", messages)
            self._counts.append(count)
            messages.append({"role": "assistant", "content": text})
            question = words(self._asked.question, number, turn)
            messages.append({"role": "user", "content": question})

    def _openai(self, session: str, messages: list[Any]) -> tuple[str, Count]:
        completion = self._clients["openai"].chat.completions.create(
            model="demo-fast",
            messages=messages,
            max_tokens=self._asked.question,
            extra_headers={"x-session-id": session},
        )
        usage = completion.usage
        count = Count(usage.prompt_tokens, usage.prompt_tokens_details.cached_tokens)
        return completion.choices[0].message.content, count

    def _anthropic(self, session: str, messages: list[Any]) -> tuple[str, Count]:
        message = self._clients["anthropic"].messages.create(
            model="demo-fast",
            messages=messages,
            max_tokens=self._asked.question,
            cache_control={"type": "ephemeral"},
            extra_headers={"x-session-id": session},
        )
        usage = message.usage
        read, written = usage.cache_read_input_tokens, usage.cache_creation_input_tokens
        return message.content[0].text, Count(usage.input_tokens + read + written, read)


def free_ports(count: int) -> list[int]:
    """Return so many different ports that nobody listens on."""
    with ExitStack() as stack:
        probes = [stack.enter_context(socket.socket()) for _ in range(count)]
        for probe in probes:
            probe.bind(("127.0.0.1", 0))
        return [int(probe.getsockname()[1]) for probe in probes]


def total(counts: Sequence[Count]) -> Count:
    """Return the sum."""
    return Count(sum(one.whole for one in counts), sum(one.cached for one in counts))


def recorded(trace: Path) -> tuple[Count, int]:
    """Return what the records of a daemon count, and how many of them are of whole responses."""
    records = [json.loads(line) for line in trace.read_text().splitlines()]
    counts = []
    for record in records:
        whole, read = record["input_tokens"], record["cache_read_tokens"]
        if record["route"] == "anthropic":  # whose input does not include what was cached
            whole += read + record["cache_write_tokens"]
        counts.append(Count(whole, read))
    return total(counts), sum(record["end_reason"] == "complete" for record in records)


def run(asked: argparse.Namespace, sticky: str, folder: Path) -> Outcome:
    """Lead all conversations through a daemon with this ``sticky``.

    Raises:
        RuntimeError: a program did not start.
    """
    where = cores(os.sched_getaffinity(0))
    port, admin, *ports = free_ports(2 + asked.providers)
    trace, path = folder / "trace.jsonl", folder / "llmproxy.toml"
    path.write_text(config(asked, sticky, ports, port=port, admin=admin, trace=trace))
    twistd = [str(Path(sys.executable).parent / "twistd"), "-n", "--pidfile=", "llmproxy"]
    demos = [sys.executable, "-c", _DEMOS, *map(str, ports)]
    with Program(demos, where.provider, folder / "demos.log") as providers:
        if not all(map(providers.wait_for, ports)):
            raise RuntimeError(providers.log.read_text())
        command = [*twistd, "--config", str(path)]
        with Program(command, where.proxy, folder / "daemon.log") as daemon:
            if not daemon.wait_for(port):
                raise RuntimeError(daemon.log.read_text())
            by_sdks = Conversations(f"http://127.0.0.1:{port}", asked).lead()
    by_records, requests = recorded(trace)
    counts = json.loads((folder / "demos.log").read_text().splitlines()[-1])
    return Outcome(by_records, by_sdks, total([Count(*pair) for pair in counts]), requests)


def doubts(outcome: Outcome, asked: argparse.Namespace) -> list[str]:
    """Return why the figures cannot be right."""
    found = []
    if outcome.requests != asked.conversations * asked.turns:
        found.append(f"{outcome.requests} whole responses by the records")
    if not outcome.by_records == outcome.by_sdks == outcome.by_providers:
        found.append(
            f"counts differ: records {outcome.by_records}, SDKs {outcome.by_sdks}, "
            f"providers {outcome.by_providers}"
        )
    return found


def line(name: str, count: Count) -> str:
    """Return one line of the table."""
    full = count.whole - count.cached
    return f"{name:<20}{count.whole:>14,}{count.cached:>14,}{full:>14,}{count.ratio:>11.1f} %"


def options(args: Sequence[str]) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        prog="make bench-sticky ARGS=...",
        description="How much of the prompts providers find in their caches.",
    )
    add = parser.add_argument
    for flag, default, what in (
        ("--providers", 3, "providers of a route"),
        ("--conversations", 40, "conversations, half of them of each SDK"),
        ("--at-once", 8, "conversations at once"),
        ("--turns", 20, "requests of a conversation"),
        ("--opening", 1000, "words with which a conversation begins, its own"),
        ("--question", 60, "words of a question, and of a response"),
    ):
        add(flag, type=int, default=default, metavar="N", help=f"{what} (default: %(default)s)")
    add("--balance", default="weighted", choices=("weighted", "least_busy", "ordered"))
    found = parser.parse_args(args)
    if min(value for value in vars(found).values() if isinstance(value, int)) < 1:
        parser.error("all numbers are above zero")
    return found


def main(args: Sequence[str]) -> int:
    """Run both, and print the table; 1 where the figures cannot be right."""
    asked = options(args)
    print(
        f'{asked.providers} providers, balance = "{asked.balance}"; {asked.conversations} '
        f"conversations of {asked.turns} turns, {asked.at_once} at once; {asked.opening} words at "
        f"first, then {asked.question} a question and {asked.question} a response"
    )
    print(f"{'':<20}{'input tokens':>14}{'cached':>14}{'not cached':>14}{'hit ratio':>13}")
    wrong = []
    for sticky in ("off", "session"):
        with tempfile.TemporaryDirectory(prefix="llmproxy-sticky-") as name:
            outcome = run(asked, sticky, Path(name))
        print(line(f'sticky = "{sticky}"', outcome.by_records), flush=True)
        wrong += [f'sticky = "{sticky}": {doubt}' for doubt in doubts(outcome, asked)]
    print(": ".join(_REPORTED))
    print("\n".join(wrong) or "the daemon's records, the SDKs and the providers count the same")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
