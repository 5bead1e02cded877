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
from typing import Any, NamedTuple, Protocol

from bench import build, peers
from bench.peers import Upstream
from bench.processes import Cores, Program, cores, free_port, pinned
from bench.works import Figures, Observed, Work, arguments, figures

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


class Target(NamedTuple):
    """What clients ask: where it listens, and what requests must have for it.

    Attributes:
        port: on this machine.
        path: of the chats.
        fields: lines of a request's head.
        authority: verifies it, where it ends TLS.
    """

    port: int
    path: str
    fields: tuple[str, ...] = ()
    authority: Path | None = None

    @property
    def options(self) -> list[str]:
        """The load generator's arguments for it."""
        tls = [] if self.authority is None else ["--ca", str(self.authority)]
        fields = [word for line in self.fields for word in ("--field", line)]
        return ["--port", str(self.port), "--path", self.path, *fields, *tls]


class _Nobody:
    """A proxy that is not looked at."""

    def cpu_us(self) -> float:
        """Return nothing."""
        return 0

    def pss_kib(self) -> int:
        """Return nothing."""
        return 0


_NOBODY = _Nobody()


class LoadError(Exception):
    """The load generator did not come to its end."""


class Bench:
    """The provider, the load generator, and where they run."""

    def __init__(self, load: str, where: Cores, provider: Program, port: int) -> None:
        self._load = load
        self.where = where
        self._provider = [provider]
        self._port = port
        self._handshakes: Path | None = None
        self.plain = Upstream(port)
        self.secure: Upstream | None = None

    def add_terminator(self, program: Program, upstream: Upstream) -> None:
        """Take the TLS terminator in front of the provider into account."""
        self._provider.append(program)
        self._handshakes = program.log
        self.secure = upstream

    def load(self, target: Target, args: Sequence[str]) -> dict[str, Any]:
        """Run the load generator once; return its line.

        Raises:
            LoadError: it did not end in time, or not well.
        """
        own = [self._load if target.authority is None else build.load_by_tls(), *target.options]
        command = [*pinned(self.where.load), *own, "--key", peers.KEY, *args]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=150)
        except subprocess.TimeoutExpired:
            raise LoadError("the load generator did not end") from None
        if done.returncode or not done.stdout:
            raise LoadError(f"the load generator ended with {done.returncode}: {done.stderr}")
        line: dict[str, Any] = json.loads(done.stdout)
        return line

    def measure(self, work: Work, proxy: Measured, target: Target, secs: float) -> Figures:
        """Run one workload once."""
        return figures(work, self.observe(target, arguments(work, secs), proxy))

    def observe(
        self, target: Target, args: Sequence[str], proxy: Measured | None = None
    ) -> Observed:
        """Run the load generator once; return what was seen, without a proxy's cost if none."""
        looked_at = proxy or _NOBODY
        self.tell("reset")
        known = len(self._sessions())
        with _memory(looked_at) as pss:
            cpu, other = looked_at.cpu_us(), self._provider_us()
            line = self.load(target, args)
            cpu, other = looked_at.cpu_us() - cpu, self._provider_us() - other
        stats = json.loads(self.tell("stats"))
        closes = self.closes(len(line["left"])) if line["left"] else {}
        resumed = [each == "1" for each in self._sessions()[known:]]
        return Observed(line, stats, cpu, other, pss, self.where.shared, closes, resumed)

    def _sessions(self) -> list[str]:
        """Return what the terminator wrote of each connection that has ended."""
        lines = self._handshakes.read_text().splitlines() if self._handshakes else []
        return [line for line in lines if line in ("0", "1")]

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
