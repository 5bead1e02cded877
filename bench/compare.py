"""``make bench``: the daemon and its peers, in turn, under the same workloads.

In every round each proxy is started anew for each workload and warmed up, so that none sees what
another left behind, and a machine that changes its pace in between changes it for all.  The proxy
has one processor to itself; provider, TLS terminator and load generator have others.
``docs/benchmark.rst`` says what the figures mean.
"""

from __future__ import annotations

import argparse
import os
import resource
import shutil
import signal
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from bench import build, peers, results
from bench.peers import PEERS, Listen, Upstream
from bench.processes import Program, free_port
from bench.ramps import highest, most_streams
from bench.rig import Bench, LoadError, Target, open_bench
from bench.starting import starts
from bench.table import OURS, table
from bench.works import WORKS, Figures, Work

Runs = dict[str, dict[str, list[Figures]]]


def options(args: Sequence[str]) -> argparse.Namespace:
    """Read the command line; every mistake in it ends the program."""
    parser = argparse.ArgumentParser(prog="make bench ARGS=...", description=__doc__)
    add = parser.add_argument
    add("--peer", default="all", help=f"some of {','.join(peers.EVERY)} (default all)")
    add("--work", default=",".join(WORKS), help=f"some of {','.join(WORKS)} (default all)")
    add("--python", action="append", default=[], help="another CPython, for a line of its own")
    add("--runs", type=int, default=3, help="rounds, of which medians are shown (default 3)")
    add("--secs", type=float, default=5.0, help="seconds of W1 and W3 (default 5)")
    add(
        "--out", type=Path, help="where the result is kept (default bench/results/DATE-COMMIT.json)"
    )
    found = parser.parse_args(args)
    found.work = [name.strip() for name in found.work.split(",")]
    unknown = [name for name in found.work if name not in WORKS]
    if unknown:
        parser.error(f"no workload {unknown[0]!r}; there are {', '.join(WORKS)}")
    if found.runs < 1 or found.secs <= 0:
        parser.error("--runs and --secs are above zero")
    try:
        found.peer = peers.choose(found.peer)
    except ValueError as error:
        parser.error(str(error))
    return found


def estimate(names: Sequence[str], works: Sequence[str], runs: int, secs: float) -> float:
    """Return how long it takes, in minutes."""
    own = {"W1": secs, "W3": secs}
    seconds = sum(
        4 + work.seconds + own.get(work.name, 0) for name in names for work in _taken(name, works)
    )
    return runs * seconds / 60


def other_interpreters(paths: Sequence[str], names: Sequence[str]) -> list[str]:
    """Return the names of the daemon under other CPythons, by TLS where the daemon is."""
    found: list[str] = []
    for path in paths:
        try:
            plain, secure = peers.add_interpreter(path)
        except build.CannotBuildError as error:
            print(f"left out: {error}")
        else:
            found += [plain] if OURS in names else []
            found += [secure] if f"{OURS}-tls" in names else []
    return list(dict.fromkeys(found))


def available(names: Sequence[str]) -> dict[str, str]:
    """Return the program of each proxy that can be had; a line tells of every other."""
    found: dict[str, str] = {}
    for name in dict.fromkeys(peers.split(name)[0] for name in names):
        try:
            found[name] = PEERS[name].needs()
        except build.CannotBuildError as error:
            print(f"left out: {name}: {error}")
    return found


def one_run(
    bench: Bench, name: str, program: str, folder: Path, work: Work, secs: float
) -> Figures | None:
    """Start one proxy, put it through one workload, and end it; None where that cannot be."""
    kind, secure = peers.split(name)
    upstream = bench.secure if secure else bench.plain
    if upstream is None:
        return None
    try:
        if work.name == "START":
            peer, log = PEERS[kind], folder / f"{name}.log"
            return starts(
                lambda listen: peer.start(program, listen, upstream, folder), bench.where.proxy, log
            )
        return _one_load(bench, name, program, upstream, folder, work, secs)
    except (LoadError, build.CannotBuildError) as error:
        print(f"left out: {name} {work.name}: {error}", flush=True)
        return None


def _one_load(
    bench: Bench,
    name: str,
    program: str,
    upstream: Upstream,
    folder: Path,
    work: Work,
    secs: float,
) -> Figures:
    log = folder / f"{name}.log"
    authority, certificate = build.certificates() if work.tls_clients else (None, None)
    listen = Listen(free_port(), certificate)
    start = PEERS[peers.split(name)[0]].start(program, listen, upstream, folder)
    target = Target(listen.port, start.path, start.fields, authority)
    with Program(start.command, bench.where.proxy, log, start.environ) as proxy:
        if not proxy.wait_for(listen.port):
            raise build.CannotBuildError(f"it does not start: {proxy.last_word()}")
        for warming in work.warm_up:
            bench.load(target, warming.split())
        if work.name == "MAX":
            return highest(bench, target)
        if work.name == "STREAMS":
            return most_streams(bench, target, proxy)
        return bench.measure(work, proxy, target, secs)


def _taken(name: str, works: Sequence[str]) -> list[Work]:
    return [WORKS[each] for each in works if peers.takes(name, WORKS[each])]


def tell(name: str, work: Work, found: Figures) -> None:
    """Say how far it is."""
    print(f"  {name} {work.name} {work.main} {found.get(work.main, 0):.1f}", file=sys.stderr)


def rounds(asked: argparse.Namespace, folder: Path, programs: dict[str, str]) -> Runs:
    """Measure everything, so many times."""
    runs: Runs = {work: {} for work in asked.work}
    with open_bench(folder, secure=any(peers.split(name)[1] for name in asked.peer)) as bench:
        if bench.where.proxy == bench.where.load:
            print("one processor only: proxy and load generator take from each other")
        os.sched_setaffinity(0, {bench.where.load})
        for _ in range(asked.runs):
            for name in asked.peer:
                program = programs.get(peers.split(name)[0])
                if program is not None:
                    for work in _taken(name, asked.work):
                        seen = runs[work.name].setdefault(name, [])
                        found = one_run(bench, name, program, folder, work, asked.secs)
                        if found is not None:
                            seen.append(found)
                            tell(name, work, found)
    return runs


def main(args: Sequence[str]) -> int:
    """Measure, print the table, and keep the result."""
    asked = options(args)
    build.CACHE.mkdir(parents=True, exist_ok=True)
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    for name in {"W4", "W9"} & set(asked.work):
        if most < 11_000:
            print(f"left out: {name}: it needs 11000 descriptors, and {most} are allowed")
            asked.work.remove(name)
    signal.signal(signal.SIGINT, _interrupted)
    signal.signal(signal.SIGTERM, _interrupted)
    asked.peer += other_interpreters(asked.python, asked.peer)
    programs = available(asked.peer)
    machine, when, commit = results.machine(), results.now(), results.commit()
    minutes = estimate(asked.peer, asked.work, asked.runs, asked.secs)
    print(f"{results.describe(machine)}; commit {commit or 'unknown'}; about {minutes:.0f} min")
    versions = {n: results.version_of(PEERS[n].version(p)) for n, p in programs.items()}
    folder = Path(tempfile.mkdtemp(prefix="run-", dir=build.CACHE))
    try:
        folder.chmod(0o755)  # nginx drops its privileges
        runs = rounds(asked, folder, programs)
    except build.CannotBuildError as error:
        print(f"nothing is measured: {error}")
        return 1
    except KeyboardInterrupt:
        print("interrupted; everything that was started has ended")
        return 130
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    print(f"\n{table(runs)}")
    path = asked.out or results.RESULTS / f"{when:%Y%m%d-%H%M%S}-{commit or 'tree'}.json"
    what = {"date": when.isoformat(), "commit": commit, "machine": machine, "versions": versions}
    results.keep(path, {**what, "secs": asked.secs, "runs": runs})
    print(f"kept in {path}")
    return 0


def _interrupted(*_: object) -> NoReturn:
    """Let everything end, undisturbed by a second Ctrl-C."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    raise KeyboardInterrupt


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
