"""What stands around a proxy that is measured: provider, TLS terminator and load generator.

A :class:`Bench` puts a running proxy through one workload at a time, and looks from outside at what
that costs it.  It knows no proxy by name.
"""

from __future__ import annotations

import json
import os
import subprocess
import threading
import time
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, Protocol

from bench import build, peers
from bench.peers import Upstream
from bench.processes import Cores, Program, cores, free_port, pinned
from bench.works import (
    RAMP_RATES,
    WORKS,
    Figures,
    Observed,
    Work,
    arguments,
    figures,
    is_sustained,
    rising_arguments,
)

_SAMPLE = 0.25
"""Seconds between two looks at a proxy's memory."""

_TOLD_WITHIN = 6.0
"""Seconds after which a provider that was not told of a client's leaving never will be."""


class Measured(Protocol):
    """What is looked at; ``processes.Program`` is one."""

    def cpu_us(self) -> float:
        """Return its processor time so far, in microseconds."""

    def pss_kib(self) -> int:
        """Return its memory, in KiB."""


class LoadError(Exception):
    """The load generator did not come to its end."""


class Bench:
    """The provider, the load generator, and where they run."""

    def __init__(self, load: str, where: Cores, provider: Program, port: int) -> None:
        self._load = load
        self.where = where
        self._provider = [provider]
        self._port = port
        self.plain = Upstream(port)
        self.secure: Upstream | None = None

    def add_terminator(self, program: Program, upstream: Upstream) -> None:
        """Take the TLS terminator in front of the provider into account."""
        self._provider.append(program)
        self.secure = upstream

    def load(self, port: int, path: str, args: Sequence[str]) -> dict[str, Any]:
        """Run the load generator once; return its line.

        Raises:
            LoadError: it did not end in time, or not well.
        """
        own = [self._load, "--port", str(port), "--path", path, "--key", peers.KEY]
        command = [*pinned(self.where.load), *own, *args]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=150)
        except subprocess.TimeoutExpired:
            raise LoadError("the load generator did not end") from None
        if done.returncode or not done.stdout:
            raise LoadError(f"the load generator ended with {done.returncode}: {done.stderr}")
        line: dict[str, Any] = json.loads(done.stdout)
        return line

    def measure(self, work: Work, proxy: Measured, port: int, path: str, secs: float) -> Figures:
        """Run one workload once."""
        self.tell("reset")
        with _memory(proxy) as pss:
            cpu, other = proxy.cpu_us(), self._provider_us()
            line = self.load(port, path, arguments(work, secs))
            cpu, other = proxy.cpu_us() - cpu, self._provider_us() - other
        stats = json.loads(self.tell("stats"))
        closes = self.closes(len(line["left"])) if line["left"] else {}
        shared = self.where.shared
        return figures(work, Observed(line, stats, cpu, other, pss, shared, closes))

    def highest(self, port: int, path: str) -> Figures:
        """Find the highest rate that holds."""
        low, high, found = 0, len(RAMP_RATES) - 1, Figures(max_events_s=0)
        while low <= high:
            middle = (low + high) // 2
            self.tell("reset")
            other = self._provider_us()
            line = self.load(port, path, rising_arguments(RAMP_RATES[middle]))
            seen = self._provider_us() - other
            stats = json.loads(self.tell("stats"))
            if is_sustained(line):
                step = figures(WORKS["MAX"], Observed(line, stats, 0, seen, [0], self.where.shared))
                keep = ("delay_p50", "delay_p99", "load_share", "late_share")
                found = {name: step[name] for name in keep if name in step}
                found["max_events_s"] = RAMP_RATES[middle]
                low = middle + 1
            else:
                high = middle - 1
                time.sleep(2)  # what was cut is still being cleared away
        return found

    def _provider_us(self) -> float:
        return sum(program.cpu_us() for program in self._provider)

    def closes(self, wanted: int) -> dict[int, int]:
        """Wait until the provider has seen so many closes; return when it saw each."""
        over = time.monotonic() + _TOLD_WITHIN
        while True:
            lines = self.tell("closes").splitlines()
            if len(lines) >= wanted or time.monotonic() > over:
                return {int(who): int(at) for who, at in (line.split() for line in lines)}
            time.sleep(0.2)

    def tell(self, what: str) -> str:
        """Ask the provider for its ``stats`` or its ``closes``, or to ``reset`` both."""
        url = f"http://127.0.0.1:{self._port}/mock/{what}"
        with urllib.request.urlopen(url, timeout=10) as response:
            text: str = response.read().decode()
        return text


@contextmanager
def _memory(program: Measured) -> Iterator[list[int]]:
    """Look at a program's memory before, now and then, and after; the list fills meanwhile."""
    seen, over = [program.pss_kib()], threading.Event()

    def look() -> None:
        while not over.wait(_SAMPLE):
            seen.append(program.pss_kib())

    thread = threading.Thread(target=look)
    thread.start()
    try:
        yield seen
    finally:
        over.set()
        thread.join()
        seen.append(program.pss_kib())


@contextmanager
def open_bench(folder: Path, *, secure: bool) -> Iterator[Bench]:
    """Start the provider, and a TLS terminator where one is wanted and can be had."""
    where = cores(os.sched_getaffinity(0))
    mock, load, port = build.tool("mock"), build.tool("load"), free_port()
    with ExitStack() as stack:
        provider = stack.enter_context(
            Program([mock, str(port)], where.provider, folder / "mock.log")
        )
        if not provider.wait_for(port):
            raise build.CannotBuildError("the provider does not start")
        bench = Bench(load, where, provider, port)
        if secure:
            try:
                terminator, upstream = _terminator(folder, port, where)
            except build.CannotBuildError as error:
                print(f"left out: all with -tls: {error}")
            else:
                stack.enter_context(terminator)
                bench.add_terminator(terminator, upstream)
        yield bench


def _terminator(folder: Path, provider: int, where: Cores) -> tuple[Program, Upstream]:
    haproxy, (authority, certificate) = build.find("haproxy"), build.certificates()
    port, made = free_port(), folder / "terminator.cfg"
    values = {"port": port, "upstream": provider, "certificate": certificate}
    config = peers.render("terminator.cfg", made, **values)
    log = folder / "terminator.log"
    program = Program([haproxy, "-f", str(config)], where.provider, log)
    if not program.wait_for(port):
        program.stop()
        raise build.CannotBuildError(f"haproxy does not start: {log.read_text().strip()}")
    return program, Upstream(port, authority)
