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

WARM_UP = (
    "--mode stream --conns 10 --events 50 --interval-us 2000 --ramp 0.2 --timeout 20",
    "--mode short --conns 8 --seconds 1 --timeout 20",
)

_BEGINNINGS = (
    "--mode stream --conns {streams} --events 2 --interval-us 5000 --ramp {ramp} --close 1"
    " --timeout 60"
)
"""Streams on connections of their own, on both sides of the proxy."""

_PACE = "--mode stream --events 64 --interval-us 20000 --ramp 1.28 --timeout 30"
"""The pace of the public suites for streams."""

_LATENCIES = (("p50 µs", "delay_p50"), ("p99 µs", "delay_p99"))
_WORST = (*_LATENCIES, ("p999 µs", "delay_p999"))
_STREAM_COLUMNS = (
    ("µs/stream", "us_stream"),
    ("first p50 µs", "first_p50"),
    ("first p99 µs", "first_p99"),
)


@dataclass(frozen=True)
class Work:
    """One workload.

    Attributes:
        main: the figure by which proxies are compared; less is better but for a rate.
        columns: titles and names of all figures of its table.
        seconds: about how long one run takes.
        more_is_better: the main figure is a rate or a number.
        warm_up: the load generator's arguments for what comes before.
        tls_upstream: proxies that reach the provider by TLS are measured, too.
        tls_clients: clients come by TLS, so that all is by TLS.
    """

    name: str
    title: str
    arguments: str
    main: str
    columns: tuple[tuple[str, str], ...]
    seconds: float
    more_is_better: bool = field(default=False)
    warm_up: tuple[str, ...] = WARM_UP
    tls_upstream: bool = True
    tls_clients: bool = False


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
            (("µs/event", "us_event"), *_LATENCIES, ("events/s", "events_s"), ("MB/s", "mb_s")),
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
            (("KiB/stream", "kib_stream"), ("µs/event", "us_event"), *_WORST),
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
            "W8",
            "1500 streams of two events, 300 a second, each on two connections of its own",
            _BEGINNINGS.format(streams=1500, ramp=5),
            "us_stream",
            _STREAM_COLUMNS,
            6,
            warm_up=(_BEGINNINGS.format(streams=150, ramp=0.5),),
        ),
        Work(
            "W8T",
            "W8 with TLS on both sides",
            _BEGINNINGS.format(streams=1500, ramp=5),
            "us_stream",
            (*_STREAM_COLUMNS, ("resumed %", "resumed_share")),
            6,
            warm_up=(_BEGINNINGS.format(streams=150, ramp=0.5),),
            tls_clients=True,
        ),
        Work(
            "W9",
            "5000 streams opened within 5 s beside 200 of 50 events a second: delays of the 200",
            "--mode stream --conns 5200 --events 8 --interval-us 1000000 --beside 200"
            " --beside-events 700 --wait 2 --ramp 5 --timeout 60",
            "beside_p99",
            (
                ("p50 µs", "beside_p50"),
                ("p99 µs", "beside_p99"),
                ("p999 µs", "beside_p999"),
                ("first p50 µs", "first_p50"),
                ("first p99 µs", "first_p99"),
            ),
            17,
            tls_upstream=False,
        ),
        Work(
            "W10",
            "1000 streams at once of 64 events, 20 ms apart, six in turn on a connection",
            f"{_PACE} --conns 1000 --requests 6",
            "gap_p99",
            (
                ("gap p50 µs", "gap_p50"),
                ("gap p99 µs", "gap_p99"),
                *_WORST,
                ("µs/event", "us_event"),
            ),
            10,
            tls_upstream=False,
        ),
        Work(
            "MAX",
            "W1 at rising rates: the highest with every stream whole and p99 below 100 ms",
            "--mode stream --conns 200 --events {step} --interval-us {interval} --ramp 1"
            " --timeout 14",
            "max_events_s",
            (("events/s", "max_events_s"), *_LATENCIES),
            35,
            more_is_better=True,
        ),
        Work(
            "STREAMS",
            "W10 with more and more streams: the most with every one whole and p99 below 100 ms",
            f"{_PACE} --conns {{step}} --requests 3",
            "max_streams",
            (("streams", "max_streams"), *_LATENCIES, ("next p99 µs", "beyond_p99")),
            45,
            more_is_better=True,
            tls_upstream=False,
        ),
        Work(
            "START",
            "five starts of a proxy that serves nothing yet",
            "",
            "ready_ms",
            (
                ("answers after ms", "ready_ms"),
                ("READY=1 after ms", "notified_ms"),
                ("idle PSS MiB", "idle_mib"),
            ),
            12,
            tls_upstream=False,
        ),
    )
}


def arguments(work: Work, secs: float, step: int = 200, interval: int = 20000) -> list[str]:
    """Return the load generator's arguments for a run of about ``secs`` seconds.

    Args:
        work: the workload.
        secs: of W1 and W3.
        step: what a step of MAX or of STREAMS has of events or of streams.
        interval: microseconds between two events of a step of MAX.
    """
    events, timeout = max(1, int(secs * 50)), secs * 2 + 20
    filled = work.arguments.format(
        events=events, secs=secs, timeout=timeout, step=step, interval=interval
    )
    return filled.split()


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
        resumed: of each handshake with the provider, whether it went on with an earlier session.
    """

    load: Mapping[str, Any]
    stats: Mapping[str, Any]
    cpu_us: float
    provider_us: float
    pss: Sequence[int]
    shared: bool
    closes: Mapping[int, int] = field(default_factory=dict)
    resumed: Sequence[bool] = ()


def figures(work: Work, seen: Observed) -> Figures:
    """Return the figures of one run."""
    load, found = seen.load, Figures()
    for name in ("delay", "gap", "beside", "first", "round"):
        for quantile, value in (load[f"{name}_us"] or {}).items():
            found[f"{name}_{quantile}"] = value
    for key in ("events_s", "requests_s", "mb_s"):
        found[key] = load[key]
    if load["events"]:
        found["us_event"] = seen.cpu_us / load["events"]
    if load["whole"]:
        each = "us_stream" if load["round_us"] is None else "us_request"
        found[each] = seen.cpu_us / load["whole"]
    if seen.resumed:
        found["resumed_share"] = 100 * sum(seen.resumed) / len(seen.resumed)
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
    worst = (
        "failures",
        "untold",
        "load_share",
        "late_share",
        "beyond_load_share",
        "beyond_late_share",
    )
    names = dict.fromkeys(name for run in runs for name in run)
    return {
        name: (max if name in worst else median)([run[name] for run in runs if name in run])
        for name in names
    }
