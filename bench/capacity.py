"""``make bench-capacity``: what one process holds, and what a second one adds.

Two measurements of the daemon alone, outside of what CI runs.  *Crowd*: ten thousand open streams
(or as many as the limit of descriptors allows: two each) of one event a second.  *Instances*: one
and then two processes that share a port (``reuse_port``), each with a processor; where there are
two in all, the second shares its own with the load generator and the provider, and the figures say
what is left.  ``docs/benchmark.rst`` says what the columns mean.
"""

from __future__ import annotations

import argparse
import os
import resource
import shutil
import sys
import tempfile
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

from bench import build, peers, results
from bench.processes import Program, free_port
from bench.ramps import highest
from bench.rig import Bench, Target, open_bench
from bench.table import number
from bench.works import WARM_UP, WORKS, Figures, Work

_SPARE = 500
"""Descriptors of the daemon beside those of its streams."""


class Several:
    """Some programs, looked at as one."""

    def __init__(self, programs: Sequence[Program]) -> None:
        self._programs = programs

    def cpu_us(self) -> float:
        """Return the processor time of all so far, in microseconds."""
        return sum(program.cpu_us() for program in self._programs)

    def pss_kib(self) -> int:
        """Return the memory of all, in KiB."""
        return sum(program.pss_kib() for program in self._programs)


def start(bench: Bench, count: int, folder: Path, stack: ExitStack) -> tuple[Several, int]:
    """Start so many daemons on one port, each on a processor of its own as far as there are some.

    Raises:
        CannotBuildError: one does not start.
    """
    port, programs = free_port(), []
    on = [bench.where.proxy, *sorted(os.sched_getaffinity(0) - {bench.where.proxy})]
    for at in range(count):
        made = peers.daemon_config(bench.plain, folder, port, free_port(), peers.KEY)
        text = made.read_text().replace("[admin]", "reuse_port = true\n[admin]", 1)
        config = folder / f"instance-{count}-{at}.toml"
        config.write_text(text.replace(f"trace-{port}", f"trace-{port}-{at}"))
        command = [sys.executable, "-c", "from twisted.scripts.twistd import run; run()"]
        command += ["-n", "--pidfile=", "llmproxy", "--config", str(config), "--instance", str(at)]
        log = folder / f"instance-{count}-{at}.log"
        program = Program(command, on[at % len(on)], log, {"PYTHONPATH": str(build.ROOT)})
        programs.append(stack.enter_context(program))
        if not program.wait_for(port):
            raise build.CannotBuildError(f"the daemon does not start: {log.read_text().strip()}")
    for warming in WARM_UP:
        bench.load(_target(port), warming.split())
    return Several(programs), port


def _target(port: int) -> Target:
    return Target(port, f"/openai{peers.PATH}")


def crowd(bench: Bench, folder: Path, streams: int, secs: int) -> Figures:
    """Open so many streams, five hundred a second, and hold them for so many seconds."""
    ramp = max(1, streams // 500)
    work = Work(
        "crowd",
        "",
        f"--mode stream --conns {streams} --events {secs + ramp} --interval-us 1000000"
        f" --ramp {ramp}"
        f" --timeout {secs + 120}",
        "kib_stream",
        (),
        secs,
    )
    with ExitStack() as stack:
        proxy, port = start(bench, 1, folder, stack)
        found = bench.measure(work, proxy, _target(port), secs)
    found["kib_stream"] = found["grown_mib"] * 1024 / streams
    found["core_share"] = found["us_event"] * streams / 1e4  # percent, at one event a second each
    return found


def instances(bench: Bench, folder: Path, count: int, secs: float) -> Figures:
    """Measure W1, W3 and MAX with so many processes."""
    found = Figures()
    for name in ("W1", "W3"):
        with ExitStack() as stack:
            proxy, port = start(bench, count, folder, stack)
            seen = bench.measure(WORKS[name], proxy, _target(port), secs)
            found |= {f"{name}.{key}": value for key, value in seen.items()}
    with ExitStack() as stack:
        _, port = start(bench, count, folder, stack)
        found |= {f"MAX.{key}": value for key, value in highest(bench, _target(port)).items()}
    return found


def lines(measured: dict[str, Figures], streams: int) -> list[str]:
    """Return what is printed."""
    told = []
    if "crowd" in measured:
        f = measured["crowd"]
        told.append(
            f"{streams} streams of one event a second: {number(f['kib_stream'])} KiB/stream,"
            f" PSS {number(f['pss_mib'])} MiB, {number(f['us_event'])} µs/event,"
            f" {number(f['core_share'])} % of a processor, p50 {number(f['delay_p50'])} µs,"
            f" p99 {number(f['delay_p99'])} µs, load {number(f['load_share'])} %,"
            f" failed {number(f['failures'])}"
        )
    for count in (1, 2):
        f = measured.get(f"instances-{count}", {})
        if f:
            told.append(
                f"instances {count}: W1 {number(f['W1.us_event'])} µs/event,"
                f" p99 {number(f['W1.delay_p99'])} µs; W3 {number(f['W3.requests_s'])} requests/s,"
                f" {number(f['W3.us_request'])} µs/request, load {number(f['W3.load_share'])} %;"
                f" MAX {number(f['MAX.max_events_s'])} events/s"
            )
    return told


def main(args: Sequence[str]) -> int:
    """Measure, print a line each, and keep the result."""
    parser = argparse.ArgumentParser(prog="make bench-capacity ARGS=...", description=__doc__)
    add = parser.add_argument
    add("--streams", type=int, default=10_000, help="open streams of the crowd (default 10000)")
    add("--secs", type=int, default=20, help="seconds that all of them are open (default 20)")
    add("--only", choices=("crowd", "instances"), help="one of the two measurements")
    asked = parser.parse_args(args)
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    streams = min(asked.streams, (most - _SPARE) // 2)
    if streams < asked.streams:
        print(f"{streams} streams instead of {asked.streams}: {most} descriptors are allowed")
    build.CACHE.mkdir(parents=True, exist_ok=True)
    machine, when, commit = results.machine(), results.now(), results.commit()
    print(f"{results.describe(machine)}; commit {commit or 'unknown'}")
    folder = Path(tempfile.mkdtemp(prefix="run-", dir=build.CACHE))
    measured: dict[str, Figures] = {}
    try:
        with open_bench(folder, secure=False) as bench:
            if asked.only != "instances":
                measured["crowd"] = crowd(bench, folder, streams, asked.secs)
            if asked.only != "crowd":
                for count in (1, 2):
                    measured[f"instances-{count}"] = instances(bench, folder, count, 5.0)
    except build.CannotBuildError as error:
        print(f"nothing is measured: {error}")
        return 1
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    print("\n".join(lines(measured, streams)))
    path = results.RESULTS / f"capacity-{when:%Y%m%d-%H%M%S}-{commit or 'tree'}.json"
    results.keep(path, {"date": when.isoformat(), "commit": commit, "machine": machine, **measured})
    print(f"kept in {path}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
