"""Programs that the benchmark starts: where they run, what they cost, and that they end.

Only what was started here is ever ended, by its process number.  Every program is the leader of a
session of its own, so that Ctrl-C reaches the benchmark alone, which then ends them.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import time
from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

_TICK_US = 1e6 / os.sysconf("SC_CLK_TCK")
_PATIENCE = 10.0


class Cores(NamedTuple):
    """Which processor the proxy has to itself, and which ones are for all the rest."""

    proxy: int
    provider: int
    load: int

    @property
    def shared(self) -> bool:
        """Whether provider and load generator take from each other."""
        return self.provider == self.load


def cores(available: Iterable[int]) -> Cores:
    """Deal out processors: one for the proxy, one each for the others where there are enough."""
    first, *others = sorted(available)
    if not others:
        return Cores(first, first, first)
    return Cores(first, others[0], others[-1])


class Program:
    """A running program, and whatever it starts.

    Args:
        command: what to run.
        core: the processor that it has.
        log: where its output goes.
        environ: variables beside those of this process.
    """

    def __init__(
        self, command: list[str], core: int, log: Path, environ: Mapping[str, str] | None = None
    ) -> None:
        with log.open("ab") as out:
            self._process = subprocess.Popen(
                [*pinned(core), *command],
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=subprocess.STDOUT,
                env={**os.environ, **(environ or {})},
                start_new_session=True,
            )
        self.log = log

    def __enter__(self) -> Program:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def is_running(self) -> bool:
        """Tell whether it still runs."""
        return self._process.poll() is None

    def wait_for(self, port: int, seconds: float = 60.0, pause: float = 0.05) -> bool:
        """Wait until it listens, and look after each pause; return whether it does."""
        over = time.monotonic() + seconds
        while self.is_running() and time.monotonic() < over:
            with suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
                return True
            time.sleep(pause)
        return False

    def last_word(self) -> str:
        """Return the last line of its output."""
        return (self.log.read_text().strip().splitlines()[-1:] or ["without a word"])[0]

    def stop(self) -> None:
        """End it and all that it started, at the latest after some seconds."""
        pids = self.pids()
        self._signal(pids, signal.SIGTERM)
        over = time.monotonic() + _PATIENCE
        while self._living(pids) and time.monotonic() < over:
            self._process.poll()
            time.sleep(0.01)
        self._signal(pids, signal.SIGKILL)
        self._process.wait()

    def _living(self, pids: list[int]) -> list[int]:
        """Return those that still run; a number that is another program's by now is not among."""
        found = []
        for pid in pids:
            with suppress(OSError):
                state, _, _, session = _stat(Path(f"/proc/{pid}"))[:4]
                if state != "Z" and int(session) == self._process.pid:
                    found.append(pid)
        return found

    def _signal(self, pids: list[int], number: signal.Signals) -> None:
        for pid in reversed(self._living(pids)):
            with suppress(ProcessLookupError):
                os.kill(pid, number)

    # -- what it costs --------------------------------------------------------------------------

    def pids(self) -> list[int]:
        """Return its process number and those of its descendants."""
        children: dict[int, list[int]] = {}
        for entry in Path("/proc").iterdir():
            if entry.name.isdigit():
                with suppress(OSError):
                    parent = int(_stat(entry)[1])
                    children.setdefault(parent, []).append(int(entry.name))
        found, todo = [], [self._process.pid]
        while todo:
            pid = todo.pop()
            found.append(pid)
            todo += children.get(pid, [])
        return found

    def cpu_us(self) -> float:
        """Return the processor time so far, in microseconds."""
        ticks = precise = 0.0
        for pid in self.pids():
            with suppress(OSError):
                fields = _stat(Path(f"/proc/{pid}"))
                ticks += (int(fields[11]) + int(fields[12])) * _TICK_US
                for task in Path(f"/proc/{pid}/task").iterdir():
                    precise += int((task / "schedstat").read_text().split()[0]) / 1000
        # Threads that have ended are in the ticks alone; else the ticks are the coarser ones.
        return max(ticks, precise) if abs(ticks - precise) > 3 * _TICK_US else precise

    def pss_kib(self) -> int:
        """Return its proportional set size, in KiB."""
        total = 0
        for pid in self.pids():
            with suppress(OSError):
                lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
                total += sum(int(line.split()[1]) for line in lines if line.startswith("Pss:"))
        return total


def pinned(core: int) -> list[str]:
    """Return what goes before a command so that it runs on ``core`` alone."""
    first = ["nice", "-n", "-10"] if os.geteuid() == 0 else []
    return [*first, "taskset", "-c", str(core)]


def free_port() -> int:
    """Return a port that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _stat(folder: Path) -> list[str]:
    return (folder / "stat").read_text().rpartition(")")[2].split()
