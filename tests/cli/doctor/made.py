"""What an exchange has seen, made up: streams whose arrivals a test writes down."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby
from typing import Any

from llmproxy.cli.doctor.examination import Observations
from llmproxy.cli.doctor.exchange import End, Event, Read, Seen

SENT_AT = 1_790_000_000.0
"""The far end's clock, when it begins; it has nothing to do with the doctor's."""

OPEN = [("x-accel-buffering", "no"), ("cache-control", "no-cache, no-transform")]
"""What llmproxy sends with a stream."""


def paced(
    arrivals: Sequence[float],
    *,
    interval_s: float = 0.25,
    size: int = 200,
    fields: Sequence[tuple[str, str]] = OPEN,
    end: End = End.WHOLE,
) -> Seen:
    """Return a paced stream whose events were sent in intervals, and came at these times."""
    events = [
        Event(at, size - 8, SENT_AT + number * interval_s) for number, at in enumerate(arrivals)
    ]
    reads = [Read(at, size * len([*same])) for at, same in groupby(arrivals)]
    return _seen(events, reads, fields, end)


def arrived(
    arrivals: Sequence[float],
    *,
    size: int = 200,
    reads: Sequence[tuple[float, int]] | None = None,
    fields: Sequence[tuple[str, str]] = OPEN,
    end: End = End.WHOLE,
) -> Seen:
    """Return a stream of a provider, of which only arrivals are known."""
    events = [Event(at, size) for at in arrivals]
    made = [Read(at, size * len([*same])) for at, same in groupby(arrivals)]
    return _seen(events, made if reads is None else [Read(*one) for one in reads], fields, end)


def _seen(
    events: list[Event], reads: list[Read], fields: Sequence[tuple[str, str]], end: End
) -> Seen:
    last = reads[-1].at if reads else 0.0
    return Seen(
        connect_s=0.001,
        minor=1,
        status=200,
        framing="chunked",
        head_s=0.002,
        fields=[("content-type", "text/event-stream"), *fields],
        reads=reads,
        events=events,
        end=end,
        end_s=last,
    )


def every(interval_s: float, count: int, *, late: float = 0.002) -> list[float]:
    """Return times in intervals."""
    return [late + number * interval_s for number in range(count)]


def at_url(stream: Seen, url: str = "http://a.example/-/pace", **more: Any) -> Observations:
    """Return what was seen at a URL."""
    return Observations(target=url, direct=False, stream=stream, **more)
