"""``make soak``: whether the daemon's memory goes flat under a mixed load and reloads.

Threads with the real SDKs ask the demo provider through the daemon, for as long as is asked:
streams and whole responses, streams that are left, wrong keys, failures, large bodies.  Meanwhile
the file is edited and reloaded again and again.  The daemon runs in a process that can count its
own objects, which it does at two quiet moments, a quarter after the beginning and at the end.
Outside of what CI runs.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import signal
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import anthropic
import ollama
import openai

from bench.processes import Program, cores, free_port

KEYS = ("key-of-the-soak", "another-key-of-the-soak")
"""Each file lets in one more of them than the other; the first one is always let in."""

_DEMO = """\
import sys
from twisted.internet import reactor
from llmproxy.cli.demo import demo_site
reactor.listenTCP(int(sys.argv[1]), demo_site(reactor), interface="127.0.0.1")
reactor.run()
"""

# twistd, in a process that counts what it holds when it is asked to by a signal.
_COUNTED = """\
import collections, gc, json, os, signal, sys, tracemalloc

def count(*_):
    gc.collect()
    kinds = map(type, gc.get_objects())
    types = collections.Counter(f"{kind.__module__}.{kind.__qualname__}" for kind in kinds)
    lines = {}
    if tracemalloc.is_tracing():
        found = tracemalloc.take_snapshot().statistics("lineno")
        lines = {str(one.traceback): one.size for one in found[:5000]}
    path = os.environ["SOAK_COUNTS"]
    with open(path + ".new", "w") as file:
        json.dump({"types": types, "lines": lines}, file)
    os.replace(path + ".new", path)

signal.signal(signal.SIGRTMIN, count)
if os.environ.get("SOAK_TRACE"):
    tracemalloc.start()
from twisted.scripts.twistd import run
run()
"""

_CONFIG = """\
[proxy]
listen = ["tcp:{port}:interface=127.0.0.1"]
[admin]
listen = "tcp:{admin}:interface=127.0.0.1"
[limits]
drains = {number}
[trace]
jsonl = "{folder}/trace.jsonl"
{ledger}
[clients.soak]
keys = {keys}
"""
_ROUTE = """\
[providers.{name}]
url = "http://127.0.0.1:{port}"
dialect = "{name}"
headers = {{ x-soak = "{number}" }}
[[routes]]
path = "/{name}"
providers = ["{name}"]
on_disconnect = "{leave}"
capture = "content"
"""

SAMPLE_S = 2.0
"""Seconds between two looks at the memory."""

QUIET_S = 3.0
"""Seconds without load before objects are counted, so that what is under way has ended."""


class Sdks:
    """One program's clients; each has connections of its own.

    Args:
        base: the daemon's URL.
        key: what they call with.
    """

    def __init__(self, base: str, key: str = KEYS[0]) -> None:
        self.openai = openai.OpenAI(base_url=f"{base}/openai/v1", api_key=key, max_retries=0)
        self.anthropic = anthropic.Anthropic(
            base_url=f"{base}/anthropic", api_key=key, max_retries=0
        )
        self.ollama = ollama.Client(f"{base}/ollama", headers={"authorization": f"Bearer {key}"})

    def close(self) -> None:
        """Close their connections."""
        self.openai.close()
        self.anthropic.close()

    def chat(self, model: str = "demo-fast", *, more: object = None) -> None:
        """Ask OpenAI's way, and read the whole stream."""
        for _ in self._stream(model, more):
            pass

    def leave(self) -> None:
        """Leave in the middle of a stream."""
        stream = self._stream("demo-50tps")
        for _ in range(3):
            next(stream)
        stream.close()

    def whole(self) -> None:
        """Ask for a response in one piece."""
        self.openai.chat.completions.create(model="demo-fast", messages=_asked("hello"))

    def embed(self) -> None:
        """Ask for embeddings."""
        self.openai.embeddings.create(model="demo-fast", input=["one", "two"])

    def messages(self) -> None:
        """Ask Anthropic's way, and read the whole stream."""
        with self.anthropic.messages.stream(
            model="demo-fast", max_tokens=64, messages=_asked("hello")
        ) as stream:
            for _ in stream.text_stream:
                pass

    def lines(self) -> None:
        """Ask Ollama's way, and read the whole stream."""
        for _ in self.ollama.chat(model="demo-fast", messages=_asked("hello"), stream=True):
            pass

    def large(self) -> None:
        """Send a body of 200 KB."""
        self.chat(more={"metadata": {"notes": "word " * 40_000}})

    def fail(self) -> None:
        """Ask a model that fails in one of many ways."""
        self.chat(
            random.choice(("demo-500", "demo-429", "demo-break", "demo-unfinished", "demo-fail"))
        )

    def nowhere(self) -> None:
        """Ask for what no route has."""
        self.openai.get("../../nowhere", cast_to=object)

    def _stream(self, model: str, more: object = None) -> Any:
        return self.openai.chat.completions.create(
            model=model,
            messages=_asked("hello"),
            stream=True,
            stream_options={"include_usage": True},
            extra_body=more,
        )


def _asked(words: str) -> Any:
    return [{"role": "user", "content": words}]


CASES: tuple[tuple[int, Callable[[Sdks], None]], ...] = (
    (6, Sdks.chat),
    (2, Sdks.leave),
    (2, Sdks.whole),
    (1, Sdks.embed),
    (3, Sdks.messages),
    (2, Sdks.lines),
    (1, Sdks.large),
    (2, Sdks.fail),
    (1, Sdks.nowhere),
)
"""What is asked, and how often among the others."""


class Load:
    """Threads that ask.

    Args:
        base: the daemon's URL.
        threads: how many.
        pause_s: for which each waits between two requests.
    """

    def __init__(self, base: str, threads: int, pause_s: float) -> None:
        self._base = base
        self._pause_s = pause_s
        self._ended = threading.Event()
        self._may = threading.Event()
        self._may.set()
        self._busy: set[int] = set()
        self.ended: Counter[str] = Counter()
        self._threads = [threading.Thread(target=self._ask, daemon=True) for _ in range(threads)]
        for thread in self._threads:
            thread.start()

    def rest(self, secs: float) -> None:
        """Ask nothing any more; return so many seconds after the last response."""
        self._may.clear()
        while self._busy:
            time.sleep(0.05)
        time.sleep(secs)

    def go_on(self) -> None:
        """Ask again."""
        self._may.set()

    def end(self) -> None:
        """Ask no more."""
        self._ended.set()
        self._may.set()
        for thread in self._threads:
            thread.join(30)

    def _ask(self) -> None:
        weights = [weight for weight, _ in CASES]
        calls = [call for _, call in CASES]
        while not self._ended.is_set():
            sdks = Sdks(self._base, KEYS[0] if random.random() < 0.9 else "wrong-key-of-the-soak")
            for call in random.choices(calls, weights, k=20):
                self._may.wait()
                if self._ended.wait(self._pause_s):
                    break
                self._busy.add(threading.get_ident())
                try:
                    call(sdks)
                except Exception as error:
                    self.ended[f"{call.__name__}: {type(error).__name__}"] += 1
                else:
                    self.ended[f"{call.__name__}: ok"] += 1
                self._busy.discard(threading.get_ident())
            with suppress(Exception):
                sdks.close()


def slope(samples: Sequence[tuple[float, float]]) -> float:
    """Return by how much the second of each pair rises while the first rises by one."""
    count = len(samples)
    mean_x = sum(x for x, _ in samples) / count
    mean_y = sum(y for _, y in samples) / count
    spread = sum((x - mean_x) ** 2 for x, _ in samples)
    return sum((x - mean_x) * (y - mean_y) for x, y in samples) / spread if spread else 0.0


def grown(before: dict[str, int], after: dict[str, int], most: int) -> list[tuple[str, int, int]]:
    """Return what grew most, with its counts before and after."""
    rows = [(name, before.get(name, 0), count) for name, count in after.items()]
    rows = [row for row in rows if row[2] > row[1]]
    return sorted(rows, key=lambda row: row[1] - row[2])[:most]


class File:
    """The daemon's file, and how it is edited.

    Args:
        folder: where it lies, and whatever the daemon writes.
        ledger: whether the daemon keeps one.
    """

    def __init__(self, folder: Path, *, ledger: bool) -> None:
        self.path = folder / "llmproxy.toml"
        self.demo_port, self.port, self._admin = free_port(), free_port(), free_port()
        self._folder = folder
        self._ledger = f'ledger = "{folder}/ledger.sqlite3"' if ledger else ""

    def write(self, number: int) -> None:
        """Write the file of an even or of an odd number, which differ."""
        odd = number % 2
        text = _CONFIG.format(
            port=self.port,
            admin=self._admin,
            folder=self._folder,
            ledger=self._ledger,
            number=100 + odd,
            keys=json.dumps([_digest(key) for key in KEYS[: 1 + odd]]),
        )
        leave = ("cancel", "drain")[odd]
        for name in ("openai", "anthropic", "ollama"):
            text += _ROUTE.format(name=name, port=self.demo_port, number=odd, leave=leave)
        new = self.path.with_suffix(".new")
        new.write_text(text)
        new.replace(self.path)


class Soak:
    """A daemon before the demo provider, and what it holds.

    Args:
        folder: where its files lie.
        trace: whether Python records where memory was taken.
        ledger: whether the daemon keeps one.
    """

    def __init__(self, folder: Path, *, trace: bool, ledger: bool) -> None:
        where = cores(os.sched_getaffinity(0))
        self._file = File(folder, ledger=ledger)
        self._counts = folder / "counts.json"
        self.base = f"http://127.0.0.1:{self._file.port}"
        self.reloads = 0
        self._file.write(0)
        demo = [sys.executable, "-c", _DEMO, str(self._file.demo_port)]
        self.demo = Program(demo, where.provider, folder / "demo.log")
        twistd = ["-n", "--pidfile=", "llmproxy", "--config", str(self._file.path)]
        environ = {"SOAK_COUNTS": str(self._counts), "SOAK_TRACE": "1" if trace else ""}
        command = [sys.executable, "-c", _COUNTED, *twistd]
        self.daemon = Program(command, where.proxy, folder / "daemon.log", environ)
        for program, port in ((self.demo, self._file.demo_port), (self.daemon, self._file.port)):
            if not program.wait_for(port):
                raise RuntimeError(program.log.read_text())
        self._pid = self.daemon.pids()[0]

    def close(self) -> None:
        """End both."""
        self.daemon.stop()
        self.demo.stop()

    def reload(self) -> None:
        """Edit the file and let the daemon read it."""
        self.reloads += 1
        self._file.write(self.reloads)
        os.kill(self._pid, signal.SIGHUP)

    def rss_kib(self) -> float:
        """Return the daemon's resident memory."""
        pages = int(Path(f"/proc/{self._pid}/statm").read_text().split()[1])
        return pages * os.sysconf("SC_PAGE_SIZE") / 1024

    def count(self) -> dict[str, dict[str, int]]:
        """Return the daemon's objects by type, and its memory by line where that is traced."""
        self._counts.unlink(missing_ok=True)
        os.kill(self._pid, signal.SIGRTMIN)
        for _ in range(600):
            if self._counts.exists():
                found: dict[str, dict[str, int]] = json.loads(self._counts.read_text())
                return found
            time.sleep(0.1)
        raise RuntimeError("the daemon does not count")


def _digest(key: str) -> str:
    return f"sha256:{hashlib.sha256(key.encode()).hexdigest()}"


def soak(run: Soak, asked: argparse.Namespace) -> list[str]:
    """Let it run; return what is to be said."""
    load = Load(run.base, asked.threads, asked.pause / 1000)
    whole_s = asked.minutes * 60
    began = time.monotonic()
    samples: list[tuple[float, float]] = []
    first: dict[str, dict[str, int]] | None = None
    try:
        while (now := time.monotonic() - began) < whole_s:
            if first is None and now > whole_s / 4:
                load.rest(QUIET_S)
                first = run.count()
                load.go_on()
            if run.reloads < asked.reloads * now / whole_s:
                run.reload()
            if now >= len(samples) * SAMPLE_S:
                samples.append((now / 60, run.rss_kib()))
                if len(samples) % 15 == 0:
                    print(f"{now / 60:6.1f} min  {samples[-1][1] / 1024:7.2f} MiB", flush=True)
            time.sleep(0.05)
        load.rest(QUIET_S)
        last = run.count()
    finally:
        load.end()
    return report(run, load, samples, first or last, last)


def report(
    run: Soak,
    load: Load,
    samples: list[tuple[float, float]],
    first: dict[str, dict[str, int]],
    last: dict[str, dict[str, int]],
) -> list[str]:
    """Return the lines at the end."""
    half = samples[len(samples) // 2 :]
    lines = [
        f"requests: {sum(load.ended.values())}, reloads: {run.reloads}",
        *(f"  {count:7d}  {name}" for name, count in sorted(load.ended.items())),
        f"memory: {samples[0][1] / 1024:.2f} MiB at first, {half[0][1] / 1024:.2f} MiB at half, "
        f"{samples[-1][1] / 1024:.2f} MiB at the end",
        f"slope of the last half: {slope(half):+.1f} KiB a minute",
        f"slope of the last quarter: {slope(samples[len(samples) * 3 // 4 :]):+.1f} KiB a minute",
        "objects that grew from the first quarter to the end:",
        *(f"  {b:8d} -> {a:8d}  {name}" for name, b, a in grown(first["types"], last["types"], 20)),
    ]
    if last["lines"]:
        lines.append("lines whose memory grew, in bytes:")
        lines += [
            f"  {b:9d} -> {a:9d}  {n}" for n, b, a in grown(first["lines"], last["lines"], 20)
        ]
    return lines


def options(args: Sequence[str]) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(prog="make soak", description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=120.0, help="(default: %(default)s)")
    parser.add_argument("--reloads", type=int, default=1200, help="in all (default: %(default)s)")
    parser.add_argument("--threads", type=int, default=4, help="that ask (default: %(default)s)")
    parser.add_argument(
        "--pause", type=float, default=20.0, help="of a thread, in ms (default: %(default)s)"
    )
    parser.add_argument(
        "--trace", action="store_true", help="say which lines took memory; twice as slow"
    )
    parser.add_argument("--no-ledger", action="store_true", help="traces go to a file alone")
    return parser.parse_args(args)


def main(args: Sequence[str]) -> int:
    """Run it and print what it says."""
    asked = options(args)
    with tempfile.TemporaryDirectory(prefix="llmproxy-soak-") as name:
        run = Soak(Path(name), trace=asked.trace, ledger=not asked.no_ledger)
        try:
            print("\n".join(soak(run, asked)))
        finally:
            run.close()
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
