"""``make bench-watched``: what it costs the daemon to be looked at.

Two measurements, outside of what CI runs.  *Scrape*: what one takes of the processor where 5,000
streams run that are silent meanwhile, as OpenMetrics, and how long the longest slice of it was.
*Page*: W1 with and without programs that follow ``/events`` as the operators' page does, in turn.
"""

from __future__ import annotations

import argparse
import http.client
import json
import shutil
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from statistics import median

from bench import build, peers, results
from bench.processes import Program, free_port
from bench.rig import Bench, Target, open_bench
from bench.table import number
from bench.works import WARM_UP, WORKS, Figures

_OPENMETRICS = "application/openmetrics-text; version=1.0.0"
_SILENT_S, _REST_S = 40, 2.0
"""Seconds between the two events of a stream, and of those in which the daemon is left alone."""

_SLICE = "a slice of the metrics"
"""What ``/turns`` calls it."""


@contextmanager
def daemon(bench: Bench, folder: Path) -> Iterator[tuple[Program, Target, int]]:
    """Start a daemon that watches its turns; yield it, what clients ask, and its admin port."""
    port, admin = free_port(), free_port()
    made = peers.daemon_config(bench.plain, folder, port, admin, peers.KEY)
    config = folder / f"watched-{port}.toml"
    config.write_text(made.read_text().replace("[proxy]", "[proxy]\nwatch_turns = true", 1))
    command = [sys.executable, "-c", "from twisted.scripts.twistd import run; run()"]
    command += ["-n", "--pidfile=", "llmproxy", "--config", str(config)]
    log = folder / f"watched-{port}.log"
    with Program(command, bench.where.proxy, log, {"PYTHONPATH": str(build.ROOT)}) as program:
        if not program.wait_for(port):
            raise build.CannotBuildError(f"the daemon does not start: {log.read_text().strip()}")
        target = Target(port, f"/openai{peers.PATH}")
        for warming in WARM_UP:
            bench.load(target, warming.split())
        yield program, target, admin


def ask(admin: int, path: str, **fields: str) -> bytes:
    """Read a page of an admin site."""
    connection = http.client.HTTPConnection("127.0.0.1", admin, timeout=30)
    connection.request("GET", path, headers=fields)
    page = connection.getresponse().read()
    connection.close()
    return page


def longest_slice_ms(admin: int) -> float:
    """Return the longest slice of a scrape so far, in milliseconds."""
    rows = json.loads(ask(admin, "/turns"))["calls"]
    return max((float(row["longest_ms"]) for row in rows if row["name"] == _SLICE), default=0.0)


class Viewer(threading.Thread):
    """One that follows the events, and reads all of them."""

    def __init__(self, admin: int) -> None:
        super().__init__(daemon=True)
        self._connection = http.client.HTTPConnection("127.0.0.1", admin, timeout=30)
        self.size = 0
        self.start()

    def run(self) -> None:
        """Read until the daemon ends."""
        self._connection.request("GET", "/events?limit=50")
        response = self._connection.getresponse()
        with suppress(OSError, http.client.HTTPException):
            while data := response.read1():
                self.size += len(data)


def scraped(bench: Bench, folder: Path, streams: int, scrapes: int) -> Figures:
    """Measure scrapes of a daemon with so many streams, which are silent meanwhile."""
    ramp = max(1, streams // 500)
    options = f"--mode stream --conns {streams} --events 2 --interval-us {_SILENT_S}000000"
    options += f" --ramp {ramp} --timeout 140"
    with daemon(bench, folder) as (program, target, admin):
        load = threading.Thread(target=bench.load, args=(target, options.split()))
        load.start()
        while json.loads(ask(admin, "/streams?limit=0"))["total"] < streams:
            time.sleep(0.5)
        time.sleep(1)
        before, began = program.cpu_us(), time.monotonic()
        time.sleep(_REST_S)
        idle = (program.cpu_us() - before) / (time.monotonic() - began)
        spent, sizes = [], []
        for _ in range(scrapes):
            before, began = program.cpu_us(), time.monotonic()
            sizes.append(len(ask(admin, "/metrics", Accept=_OPENMETRICS)))
            spent.append(program.cpu_us() - before - idle * (time.monotonic() - began))
        longest = longest_slice_ms(admin)
        load.join()
    return Figures(
        {
            "scrape_ms": median(spent) / 1000,
            "scrape_bytes": float(median(sizes)),
            "longest_slice_ms": longest,
        }
    )


def followed(bench: Bench, folder: Path, viewers: int, rounds: int, secs: float) -> Figures:
    """Measure W1 without and with so many viewers, in turn."""
    alone: list[Figures] = []
    watched: list[Figures] = []
    for _ in range(rounds):
        for many, kept in ((0, alone), (viewers, watched)):
            with daemon(bench, folder) as (program, target, admin):
                for _ in range(many):
                    Viewer(admin)
                kept.append(bench.measure(WORKS["W1"], program, target, secs))
    found = Figures()
    for name in ("us_event", "delay_p99"):
        found[f"{name}_alone"] = median(one[name] for one in alone)
        found[name] = median(one[name] for one in watched)
    return found


def main(args: Sequence[str]) -> int:
    """Measure, print a line each, and keep the result."""
    parser = argparse.ArgumentParser(prog="make bench-watched ARGS=...", description=__doc__)
    add = parser.add_argument
    add("--streams", type=int, default=5000, help="open streams at a scrape (default 5000)")
    add("--scrapes", type=int, default=30, help="how many scrapes (default 30)")
    add("--secs", type=float, default=5.0, help="seconds of W1 (default 5)")
    add("--viewers", type=int, default=1, help="viewers of the page (default 1)")
    add("--rounds", type=int, default=3, help="rounds of W1 (default 3)")
    asked = parser.parse_args(args)
    build.CACHE.mkdir(parents=True, exist_ok=True)
    machine, when, commit = results.machine(), results.now(), results.commit()
    print(f"{results.describe(machine)}; commit {commit or 'unknown'}")
    folder = Path(tempfile.mkdtemp(prefix="run-", dir=build.CACHE))
    try:
        with open_bench(folder, secure=False) as bench:
            scrapes = scraped(bench, folder, asked.streams, asked.scrapes)
            pages = followed(bench, folder, asked.viewers, asked.rounds, asked.secs)
    except build.CannotBuildError as error:
        print(f"nothing is measured: {error}")
        return 1
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    print(
        f"a scrape with {asked.streams} streams: {number(scrapes['scrape_ms'])} ms of the processor"
        f" for {number(scrapes['scrape_bytes'])} bytes,"
        f" the longest slice {number(scrapes['longest_slice_ms'])} ms"
    )
    print(
        f"W1 with {asked.viewers} viewers: {number(pages['us_event_alone'])} ->"
        f" {number(pages['us_event'])} µs/event,"
        f" p99 {number(pages['delay_p99_alone'])} -> {number(pages['delay_p99'])} µs"
    )
    path = results.RESULTS / f"watched-{when:%Y%m%d-%H%M%S}-{commit or 'tree'}.json"
    kept = {"date": when.isoformat(), "commit": commit, "machine": machine}
    results.keep(path, {**kept, "scrape": scrapes, "page": pages})
    print(f"kept in {path}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
