"""The workloads, and what the load generator's line of JSON says about each."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from statistics import median
from typing import Any

Figures = dict[str, float]
"""What one run showed, by name; a name that is missing was not measured."""

BUSY = 85.0
"""Percent of a processor above which a load generator may be what limits."""

LATE = 1.0
"""Percent of events that the provider sent 10 ms late by its own fault, above which it is said."""

RAMP_RATES = (
    *(500, 1000, 1500, 2000, 3000, 4000, 6000, 8000, 10_000, 12_500, 15_000, 17_500, 20_000),
    *(22_500, 25_000, 27_500, 30_000, 35_000, 40_000, 45_000, 50_000, 55_000, 60_000, 70_000),
    *(80_000, 90_000, 100_000, 110_000, 125_000, 150_000),
)
MAX_DELAY_US = 100_000.0

_LATENCIES = (("p50 µs", "delay_p50"), ("p99 µs", "delay_p99"))


@dataclass(frozen=True)
class Work:
    """One workload.

    Attributes:
        main: the figure by which proxies are compared; less is better but for a rate.
        columns: titles and names of all figures of its table.
        seconds: about how long one run takes.
    """

    name: str
    title: str
    arguments: str
    main: str
    columns: tuple[tuple[str, str], ...]
    seconds: float
    more_is_better: bool = field(default=False)


WORKS = {
    work.name: work
    for work in (
        Work(
            "W1",
            "200 streams of 50 events a second, 223 bytes each",
            "--mode stream --conns 200 --events {events} --interval-us 20000 --ramp 1"
            " --timeout {timeout}",
            "us_event",
            (("µs/event", "us_event"), *_LATENCIES, ("first p99 µs", "first_p99")),
            4,
        ),
        Work(
            "W2",
            "50 streams of 2000 events without a pause",
            "--mode stream --conns 50 --events 2000 --interval-us 0 --ramp 0 --timeout 60",
            "us_event",
            (("µs/event", "us_event"), ("events/s", "events_s"), ("MB/s", "mb_s")),
            3,
        ),
        Work(
            "W3",
            "64 kept connections in a closed loop, 0.6 KB in, 1.5 KB out",
            "--mode short --conns 64 --seconds {secs} --timeout {timeout}",
            "us_request",
            (
                ("µs/request", "us_request"),
                ("requests/s", "requests_s"),
                ("p50 µs", "round_p50"),
                ("p99 µs", "round_p99"),
            ),
            2,
        ),
        Work(
            "W4",
            "5000 streams of one event a second, for 15 s",
            "--mode stream --conns 5000 --events 15 --interval-us 1000000 --ramp 10 --timeout 60",
            "kib_stream",
            (("KiB/stream", "kib_stream"), ("µs/event", "us_event"), *_LATENCIES),
            28,
        ),
        Work(
            "W5",
            "40 requests on 4 connections, 1 MB in, 10 MB out",
            "--mode big --conns 4 --requests 10 --request-bytes 1000000 --answer-bytes 10000000"
            " --timeout 60",
            "us_request",
            (("µs/request", "us_request"), ("MB/s", "mb_s")),
            4,
        ),
        Work(
            "W6",
            "10 clients that read nothing of an endless response, for 5 s",
            "--mode stuck --conns 10 --seconds 5 --ramp 0",
            "stuck_mb",
            (("MB taken", "stuck_mb"), ("grew by MiB", "grown_mib")),
            7,
        ),
        Work(
            "W7",
            "200 clients that leave in mid-stream",
            "--mode leave --conns 200 --events 10000 --interval-us 20000 --ramp 1 --seconds 3",
            "close_p99",
            (("p50 ms", "close_p50"), ("p99 ms", "close_p99"), ("not told", "untold")),
            8,
        ),
        Work(
            "MAX",
            "W1 at rising rates: the highest with every stream whole and p99 below 100 ms",
            "--mode stream --conns 200 --events {events} --interval-us {interval} --ramp 1"
            " --timeout 14",
            "max_events_s",
            (("events/s", "max_events_s"), *_LATENCIES),
            35,
            more_is_better=True,
        ),
    )
}

WARM_UP = (
    "--mode stream --conns 10 --events 50 --interval-us 2000 --ramp 0.2 --timeout 20",
    "--mode short --conns 8 --seconds 1 --timeout 20",
)


def arguments(work: Work, secs: float) -> list[str]:
    """Return the load generator's arguments for a run of about ``secs`` seconds."""
    filled = work.arguments.format(
        events=max(1, int(secs * 50)), secs=secs, timeout=secs * 2 + 20, interval=20000
    )
    return filled.split()


def rising_arguments(rate: int) -> list[str]:
    """Return the load generator's arguments for one step of MAX."""
    interval = 200_000_000 // rate
    filled = WORKS["MAX"].arguments.format(events=max(10, 4_000_000 // interval), interval=interval)
    return filled.split()


def is_sustained(load: Mapping[str, Any]) -> bool:
    """Tell whether a step of MAX went well."""
    delay = load["delay_us"]
    return not failures(load) and delay is not None and delay["p99"] < MAX_DELAY_US


def failures(load: Mapping[str, Any]) -> int:
    """Return how many requests failed, never ended, or brought a wrong byte."""
    return int(load["failed"] + load["unfinished"] + load["wrong"])


@dataclass(frozen=True)
class Observed:
    """What was seen of one run from outside; memory in KiB, processor time in microseconds.

    Attributes:
        load: the load generator's line.
        stats: what the provider counted.
        closes: when the provider saw each stream close, in nanoseconds, by its number.
        cpu_us: the proxy's.
        provider_us: the provider's and its TLS terminator's.
        pss: the proxy's memory, before and then now and then.
        shared: whether provider and load generator share a processor.
    """

    load: Mapping[str, Any]
    stats: Mapping[str, Any]
    cpu_us: float
    provider_us: float
    pss: Sequence[int]
    shared: bool
    closes: Mapping[int, int] = field(default_factory=dict)


def figures(work: Work, seen: Observed) -> Figures:
    """Return the figures of one run."""
    load, found = seen.load, Figures()
    for name, key in (("delay", "delay_us"), ("first", "first_us"), ("round", "round_us")):
        if load[key] is not None:
            found[f"{name}_p50"], found[f"{name}_p99"] = load[key]["p50"], load[key]["p99"]
    for key in ("events_s", "requests_s", "mb_s"):
        found[key] = load[key]
    if load["events"]:
        found["us_event"] = seen.cpu_us / load["events"]
    if load["whole"] and load["round_us"] is not None:
        found["us_request"] = seen.cpu_us / load["whole"]
    before, peak = seen.pss[0], max(seen.pss)
    found["pss_mib"] = peak / 1024
    found["grown_mib"] = (peak - before) / 1024
    if work.name == "W4":
        found["kib_stream"] = (peak - before) / 5000
    if work.name == "W6":
        found["stuck_mb"] = seen.stats["stuck_bytes"] / 1e6
    if work.name == "W7":
        found |= _closing(load["left"], seen.closes)
    elapsed = max(load["elapsed"], 1e-3) * 1e6
    generating = load["cpu_us"], seen.provider_us
    busiest = sum(generating) if seen.shared else max(generating)
    found["load_share"] = 100 * busiest / elapsed
    if seen.stats["timed"]:
        found["late_share"] = 100 * seen.stats["late"] / seen.stats["timed"]
    found["failures"] = failures(load)
    return found


def _closing(left: Sequence[Sequence[int]], closes: Mapping[int, int]) -> Figures:
    told = sorted((closes[who] - at) / 1e6 for who, at in left if who in closes)
    found = Figures(untold=len(left) - len(told))
    if told:
        found["close_p50"] = told[len(told) // 2]
        found["close_p99"] = told[len(told) * 99 // 100]
    return found


def combine(runs: Sequence[Figures]) -> Figures:
    """Return the medians of several runs; failures and shares are the worst."""
    worst = ("failures", "untold", "load_share", "late_share")
    names = dict.fromkeys(name for run in runs for name in run)
    return {
        name: (max if name in worst else median)([run[name] for run in runs if name in run])
        for name in names
    }
