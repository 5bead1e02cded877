"""``make bench-shared``: what it costs that processes share an engine for their limits.

Outside of what CI runs.  *One process*: W3 of a client with limits, with and without an engine on
loopback, in turn.  *Several processes*: each has a load generator of its own at once, and the
engine's processor time for a request says how many it carries.
"""

from __future__ import annotations

import argparse
import http.client
import shutil
import sys
import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path
from statistics import median

from bench import build, peers, results
from bench.processes import Program, free_port
from bench.rig import Bench, Target, open_bench
from bench.table import number
from bench.works import WARM_UP, WORKS, Figures

_LIMITS = "requests_per_minute = 10000000\ntokens_per_day = 1000000000000\nmax_streams = 100000\n"
"""Limits that nothing reaches: what is measured is the question."""


@contextmanager
def engine(bench: Bench, program: str, folder: Path) -> Iterator[tuple[Program, str]]:
    """Start an engine; yield it, and its URL."""
    port = free_port()
    command = [program, "--port", str(port), "--bind", "127.0.0.1", "--save", ""]
    with Program(
        [*command, "--dir", str(folder)], bench.where.load, folder / "engine.log", {}
    ) as one:
        if not one.wait_for(port):
            raise build.CannotBuildError("the engine does not start")
        yield one, f"redis://127.0.0.1:{port}/0"


@contextmanager
def daemon(bench: Bench, folder: Path, shared: str | None) -> Iterator[tuple[Program, Target, int]]:
    """Start a daemon whose client has limits; yield it, what clients ask, and its admin port."""
    port, admin = free_port(), free_port()
    made = peers.daemon_config(bench.plain, folder, port, admin, peers.KEY)
    text = made.read_text().replace("[clients.bench]", f"[clients.bench]\n{_LIMITS}", 1)
    if shared is not None:
        text += f'[shared]\nurl = "{shared}"\ntimeout = "1s"\n'
    made.write_text(text)
    command = [sys.executable, "-c", "from twisted.scripts.twistd import run; run()"]
    command += ["-n", "--pidfile=", "llmproxy", "--config", str(made)]
    log = folder / f"shared-{port}.log"
    with Program(command, bench.where.proxy, log, {"PYTHONPATH": str(build.ROOT)}) as program:
        if not program.wait_for(port):
            raise build.CannotBuildError(f"the daemon does not start: {log.read_text().strip()}")
        target = Target(port, f"/openai{peers.PATH}")
        for warming in WARM_UP:
            bench.load(target, warming.split())
        yield program, target, admin


def calls(admin: int) -> float:
    """Return how many calls the engine has answered to a daemon."""
    connection = http.client.HTTPConnection("127.0.0.1", admin, timeout=30)
    connection.request("GET", "/metrics")
    lines = connection.getresponse().read().decode().splitlines()
    connection.close()
    return float(next((x.split()[1] for x in lines if x.startswith("llmproxy_shared_calls")), 0))


def one_process(bench: Bench, program: str, folder: Path, rounds: int, secs: float) -> Figures:
    """Measure W3 with and without an engine, in turn."""
    seen: dict[bool, list[Figures]] = {False: [], True: []}
    for _ in range(rounds):
        for is_shared, kept in seen.items():
            with ExitStack() as stack:
                server, url = stack.enter_context(engine(bench, program, folder))
                shared = url if is_shared else None
                proxy, target, admin = stack.enter_context(daemon(bench, folder, shared))
                said, spent = calls(admin), server.cpu_us()
                found = bench.measure(WORKS["W3"], proxy, target, secs)
                requests = found["requests_s"] * secs
                found["engine_us"] = (server.cpu_us() - spent) / requests
                found["requests_call"] = requests / max(1.0, calls(admin) - said)
                kept.append(found)
    found = Figures()
    for name in ("us_request", "round_p50", "round_p99"):
        found[f"{name}_alone"] = median(one[name] for one in seen[False])
        found[name] = median(one[name] for one in seen[True])
    for name in ("engine_us", "requests_call"):
        found[name] = median(one[name] for one in seen[True])
    return found


def several(bench: Bench, program: str, folder: Path, count: int, secs: float) -> Figures:
    """Let so many daemons ask one engine at once."""
    with ExitStack() as stack:
        server, url = stack.enter_context(engine(bench, program, folder))
        daemons = [stack.enter_context(daemon(bench, folder, url)) for _ in range(count)]
        options = ["--mode", "short", "--conns", "64", "--seconds", str(secs), "--timeout", "60"]
        spent = server.cpu_us()
        with ThreadPoolExecutor(count) as pool:
            lines = list(pool.map(lambda one: bench.load(one[1], options), daemons))
        requests = sum(line["whole"] for line in lines)
        return Figures(
            {
                "processes": float(count),
                "requests_s": requests / secs,
                "engine_us": (server.cpu_us() - spent) / requests,
            }
        )


def main(args: Sequence[str]) -> int:
    """Measure, print lines, and keep the result."""
    parser = argparse.ArgumentParser(prog="make bench-shared ARGS=...", description=__doc__)
    add = parser.add_argument
    add("--engine", default="redis-server", help="the engine's program (default redis-server)")
    add("--secs", type=float, default=5.0, help="seconds of a measurement (default 5)")
    add("--rounds", type=int, default=3, help="rounds with one process (default 3)")
    asked = parser.parse_args(args)
    program = shutil.which(asked.engine)
    build.CACHE.mkdir(parents=True, exist_ok=True)
    machine, when, commit = results.machine(), results.now(), results.commit()
    print(f"{results.describe(machine)}; commit {commit or 'unknown'}")
    folder = Path(tempfile.mkdtemp(prefix="run-", dir=build.CACHE))
    try:
        if program is None:
            raise build.CannotBuildError(f"there is no {asked.engine}: make peers")
        with open_bench(folder, secure=False) as bench:
            one = one_process(bench, program, folder, asked.rounds, asked.secs)
            many = [several(bench, program, folder, count, asked.secs) for count in (1, 2, 4)]
    except build.CannotBuildError as error:
        print(f"nothing is measured: {error}")
        return 1
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    for name, words in (
        ("us_request", "µs/request"),
        ("round_p50", "µs p50"),
        ("round_p99", "µs p99"),
    ):
        alone, shared = one[f"{name}_alone"], one[name]
        print(f"W3 {words}: {number(alone)} -> {number(shared)} ({shared / alone:.2f})")
    print(
        f"the engine: {number(one['engine_us'])} µs of a processor for a request,"
        f" {number(one['requests_call'])} requests a call"
    )
    for row in many:
        print(
            f"{row['processes']:.0f} processes: {number(row['requests_s'])} requests/s,"
            f" {number(row['engine_us'])} µs of the engine for each"
        )
    path = results.RESULTS / f"shared-{when:%Y%m%d-%H%M%S}-{commit or 'tree'}.json"
    kept = {"date": when.isoformat(), "commit": commit, "machine": machine}
    results.keep(path, {**kept, "one": one, "several": many})
    print(f"kept in {path}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
