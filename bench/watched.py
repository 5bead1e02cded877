"""``make bench-watched``: what it costs the daemon to be looked at.

Two measurements, outside of what CI runs, each without and with somebody who looks.  *Scrape*:
5,000 streams of one event a second, and a scrape each second, as OpenMetrics.  *Page*: W1, and
programs that follow ``/events`` as the operators' page does.  The difference is divided by what was
looked at.
"""

from __future__ import annotations

import argparse
import http.client
import json
import shutil
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from statistics import median

from bench import build, peers, results
from bench.processes import Program, free_port
from bench.rig import Bench, Target, open_bench
from bench.table import number
from bench.works import WARM_UP, WORKS, Figures, Work

_OPENMETRICS = "application/openmetrics-text; version=1.0.0"
_SLICE = "a slice of the metrics"
"""What ``/turns`` calls it."""


def crowd(streams: int, secs: int) -> Work:
    """Return so many streams of one event a second, for so many seconds."""
    ramp = max(1, streams // 500)
    return Work(
        "crowd",
        "",
        f"--mode stream --conns {streams} --events {secs + ramp} --interval-us 1000000"
        f" --ramp {ramp} --timeout {secs + 120}",
        "us_event",
        (),
        secs,
    )


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


@contextmanager
def looking(look: Callable[[], int], every: float) -> Iterator[list[int]]:
    """Look again and again, in a thread; the list fills with what was seen."""
    seen: list[int] = []
    over = threading.Event()

    def run() -> None:
        while not over.wait(every):
            seen.append(look())

    thread = threading.Thread(target=run)
    thread.start()
    try:
        yield seen
    finally:
        over.set()
        thread.join()


def scrape(admin: int) -> int:
    """Read the metrics; return how many bytes that was."""
    connection = http.client.HTTPConnection("127.0.0.1", admin, timeout=30)
    connection.request("GET", "/metrics", headers={"Accept": _OPENMETRICS})
    size = len(connection.getresponse().read())
    connection.close()
    return size


def slices(admin: int) -> int:
    """Return how many slices were made of all scrapes."""
    connection = http.client.HTTPConnection("127.0.0.1", admin, timeout=30)
    connection.request("GET", "/turns")
    rows = json.loads(connection.getresponse().read())["calls"]
    connection.close()
    return sum(row["count"] for row in rows if row["name"] == _SLICE)


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
        while data := response.read1():
            self.size += len(data)


def scraped(bench: Bench, folder: Path, streams: int, secs: int) -> Figures:
    """Measure a scrape of a daemon with so many streams."""
    work = crowd(streams, secs)
    with daemon(bench, folder) as (program, target, admin):
        alone = bench.measure(work, program, target, secs)
        with looking(lambda: scrape(admin), 1.0) as seen:
            watched = bench.measure(work, program, target, secs)
        count, made = len(seen), slices(admin)
    events = streams * (secs + max(1, streams // 500))
    return Figures(
        {
            "scrape_ms": (watched["us_event"] - alone["us_event"]) * events / count / 1000,
            "scrape_bytes": float(median(seen)),
            "slices": made / count,
            "p99_alone": alone["delay_p99"],
            "p99": watched["delay_p99"],
            "p999_alone": alone["delay_p999"],
            "p999": watched["delay_p999"],
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
    add("--secs", type=int, default=15, help="seconds of each run (default 15)")
    add("--viewers", type=int, default=1, help="viewers of the page (default 1)")
    add("--rounds", type=int, default=3, help="rounds of W1 (default 3)")
    asked = parser.parse_args(args)
    build.CACHE.mkdir(parents=True, exist_ok=True)
    machine, when, commit = results.machine(), results.now(), results.commit()
    print(f"{results.describe(machine)}; commit {commit or 'unknown'}")
    folder = Path(tempfile.mkdtemp(prefix="run-", dir=build.CACHE))
    try:
        with open_bench(folder, secure=False) as bench:
            scrapes = scraped(bench, folder, asked.streams, asked.secs)
            pages = followed(bench, folder, asked.viewers, asked.rounds, asked.secs)
    except build.CannotBuildError as error:
        print(f"nothing is measured: {error}")
        return 1
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    print(
        f"scrape with {asked.streams} streams: {number(scrapes['scrape_ms'])} ms of the processor,"
        f" {number(scrapes['scrape_bytes'])} bytes, {number(scrapes['slices'])} slices;"
        f" p99 {number(scrapes['p99_alone'])} -> {number(scrapes['p99'])} µs,"
        f" p999 {number(scrapes['p999_alone'])} -> {number(scrapes['p999'])} µs"
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
