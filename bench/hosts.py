"""``make bench-hosts``: how the engine that hosts share bears it as they grow, by simulation.

Discrete events, without a socket: 200 hosts by default, whose requests come as a Poisson process
and last for a while.  Whose they are does not matter: an op costs the same for each client.  A host
has one call under way, and lets news wait for questions, as ``llmproxy/shared/engine.py`` does; the
engine serves calls one after the other.  What an op costs it was measured, what a call costs is
assumed (``--op-us``, ``--call-us``; compare ``make bench-shared``).

Printed for each rate: how busy the engine is, how many ops share a call, what a request waits, and
how many wait longer than the timeout.
"""

from __future__ import annotations

import argparse
import heapq
import random
import sys
from collections.abc import Callable, Sequence

import msgspec

from bench.table import number


class Costs(msgspec.Struct, frozen=True):
    """What takes how long, in seconds."""

    call: float
    op: float
    trip: float
    gather: float
    lasts: float
    timeout: float


class Host:
    """One process: what it will ask and tell, and whether a call is under way."""

    __slots__ = ("asked_at", "told", "waits")

    def __init__(self) -> None:
        self.asked_at: list[float] = []
        self.told = 0
        self.waits = False


class Simulation:
    """All hosts, and one engine.

    Args:
        hosts: how many.
        rate: requests a second of all of them.
        costs: what takes how long.
        seed: of the random numbers.
    """

    def __init__(self, hosts: int, rate: float, costs: Costs, seed: int) -> None:
        self._random = random.Random(seed)
        self._hosts = [Host() for _ in range(hosts)]
        self._rate = rate
        self._costs = costs
        self._events: list[tuple[float, int, Callable[[float], None]]] = []
        self._count = 0
        self._free_at = 0.0
        self.busy = 0.0
        self.calls = self.ops = 0
        self.waited: list[float] = []

    def _at(self, when: float, what: Callable[[float], None]) -> None:
        self._count += 1
        heapq.heappush(self._events, (when, self._count, what))

    def run(self, seconds: float) -> None:
        """Let so many seconds go by."""
        self._at(0.0, self._request)
        while self._events:
            now, _, what = heapq.heappop(self._events)
            if now > seconds:
                return
            what(now)

    def _request(self, now: float) -> None:
        self._at(now + self._random.expovariate(self._rate), self._request)
        host = self._random.choice(self._hosts)
        host.asked_at.append(now)
        self._call(host, now)

    def _call(self, host: Host, now: float) -> None:
        if host.waits or not (host.asked_at or host.told):
            return
        host.waits = True
        asked, host.asked_at = host.asked_at, []
        told, host.told = host.told, 0
        arrives = now + self._costs.trip / 2
        took = self._costs.call + self._costs.op * (len(asked) + told)
        self._at(arrives, lambda at: self._serve(host, asked, took, at))
        self.calls += 1
        self.ops += len(asked) + told

    def _serve(self, host: Host, asked: list[float], took: float, now: float) -> None:
        self._free_at = max(self._free_at, now) + took
        self.busy += took
        self._at(self._free_at + self._costs.trip / 2, lambda at: self._answered(host, asked, at))

    def _answered(self, host: Host, asked: list[float], now: float) -> None:
        host.waits = False
        for at in asked:
            self.waited.append(now - at)
            lasts = self._random.expovariate(1 / self._costs.lasts)
            self._at(now + lasts, lambda at: self._ended(host, at))
        if host.asked_at:
            self._call(host, now)

    def _ended(self, host: Host, now: float) -> None:
        host.told += 1
        if host.told == 1:
            self._at(now + self._costs.gather, lambda at: self._call(host, at))


def main(args: Sequence[str]) -> int:
    """Simulate, and print a line for each rate."""
    parser = argparse.ArgumentParser(prog="make bench-hosts ARGS=...", description=__doc__)
    add = parser.add_argument
    add("--hosts", type=int, default=200)
    add("--rates", default="1000,5000,10000,20000,30000,40000,60000", help="requests a second")
    add("--secs", type=float, default=3.0, help="simulated seconds (default 3)")
    add("--call-us", type=float, default=25.0, help="the engine's cost of a call (default 25)")
    add("--op-us", type=float, default=12.5, help="and of an op (default 12.5)")
    add("--trip-us", type=float, default=300.0, help="there and back (default 300)")
    add("--timeout-ms", type=float, default=50.0)
    add("--seed", type=int, default=1)
    asked = parser.parse_args(args)
    costs = Costs(
        call=asked.call_us / 1e6,
        op=asked.op_us / 1e6,
        trip=asked.trip_us / 1e6,
        gather=0.05,
        lasts=1.0,
        timeout=asked.timeout_ms / 1e3,
    )
    print(f"{asked.hosts} hosts, one engine")
    print("requests/s  engine busy %  ops a call  wait p50 ms  p99 ms  over the timeout %")
    for rate in map(float, asked.rates.split(",")):
        one = Simulation(asked.hosts, rate, costs, asked.seed)
        one.run(asked.secs)
        waits = sorted(one.waited) or [0.0]
        late = sum(wait > costs.timeout for wait in waits) / len(waits)
        cells = [rate, 100 * min(1.0, one.busy / asked.secs), one.ops / max(1, one.calls)]
        cells += [1000 * waits[len(waits) // 2], 1000 * waits[len(waits) * 99 // 100], 100 * late]
        widths = (10, 13, 10, 11, 6, 18)
        print(
            "  ".join(f"{number(cell):>{width}}" for cell, width in zip(cells, widths, strict=True))
        )
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
