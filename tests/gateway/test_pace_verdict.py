"""What the page says of a run, by the arrivals that each kind of hop brings about."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

from llmproxy.gateway import pace_page

NODE = shutil.which("node")
pytestmark = pytest.mark.skipif(NODE is None, reason="node is not installed")

VERDICT = Path(pace_page.__file__).parent / "assets" / "verdict.mjs"
AWAY_MS = 1234.5
"""How much later the far end's clock began than ours."""

Run = dict[str, Any]


def sent_at(n: int, interval: float, silence: float = 0) -> list[float]:
    """Return when events are sent, with a silence in the middle."""
    half = -(-n // 2)
    return [number * interval + (silence if number >= half else 0) for number in range(n)]


def run_of(arrivals: list[float], sent: list[float], *, size: int = 400, **more: Any) -> Run:
    """Return what a page saw.

    Args:
        arrivals: when each event came, without the difference of the clocks; there may be fewer
            than were sent.
    """
    interval = sent[1] - sent[0] if len(sent) > 1 else 100
    times = [at + AWAY_MS for at in arrivals]
    reads: dict[float, int] = {}
    for at in times:
        reads[at] = reads.get(at, 0) + size
    return {
        "asked": {"n": len(sent), "interval_ms": interval, "bytes": size, "silence_ms": 0},
        "status": 200,
        "problem": "",
        "fields": {"content-type": "text/event-stream"},
        "is_paced": True,
        "head_ms": AWAY_MS,
        "events": [
            {"n": number + 1, "sent_ms": sent[number], "at_ms": at}
            for number, at in enumerate(times)
        ],
        "reads": [{"at_ms": at, "bytes": count} for at, count in sorted(reads.items())],
        "end": "complete",
        "end_ms": max(times, default=0),
        **more,
    }


def streamed(n: int = 60, interval: float = 100, jitter: float = 4, **more: Any) -> Run:
    """Each event comes when it is sent, within some jitter."""
    sent = sent_at(n, interval)
    return run_of(
        [at + (number * 7 % 5) / 4 * jitter for number, at in enumerate(sent)], sent, **more
    )


def to_the_end(n: int = 60, interval: float = 100, **more: Any) -> Run:
    """Everything comes with the last event."""
    sent = sent_at(n, interval)
    return run_of([sent[-1] + 2] * n, sent, **more)


def blocks(block: int, n: int = 60, interval: float = 100, size: int = 400, **more: Any) -> Run:
    """Bytes come when so many are there; what is cut within an event comes with the next block."""
    sent = sent_at(n, interval)
    arrivals, reads = [], []
    for number in range(n):
        needed = (number + 1) * size
        full = -(-needed // block) * block  # the end of the block that holds its last byte
        by = -(-full // size) - 1
        arrivals.append(sent[min(by, n - 1)])
    whole = n * size // block
    for number in range(whole):
        reads.append(
            {"at_ms": sent[-(-(number + 1) * block // size) - 1] + AWAY_MS, "bytes": block}
        )
    reads.append({"at_ms": sent[-1] + AWAY_MS, "bytes": n * size - whole * block})
    return run_of(arrivals, sent, size=size, **{"reads": reads, **more})


def with_reads(run: Run, large: int, small: int) -> Run:
    """Return the run with a small read behind each large one, 100 ms later."""
    reads = []
    for number in range(6):
        at = AWAY_MS + number * 600
        reads += [{"at_ms": at, "bytes": large}, {"at_ms": at + 100, "bytes": small}]
    return {**run, "reads": [*reads, {"at_ms": AWAY_MS + 3900, "bytes": 40000}]}


def first_held(events: int, n: int = 60) -> Run:
    """Nothing comes before so many events are there, and all of them then."""
    sent = sent_at(n, 100)
    return run_of([max(at, sent[events - 1]) for at in sent], sent)


def hiccup() -> Run:
    """One second in which the network lets nothing through."""
    sent = sent_at(60, 100)
    return run_of([2500 if 1500 <= at < 2500 else at for at in sent], sent)


def cut(events: int, after: float, *, n: int = 60, interval: float = 100, **more: Any) -> Run:
    """So many events come, and the connection ends so long after the last of them."""
    sent = sent_at(n, interval)
    end = (sent[events - 1] if events else 0) + after + AWAY_MS
    return run_of(sent[:events], sent, **{"end": "broken", "end_ms": end, **more})


def with_fields(run: Run, **fields: str) -> Run:
    """Return a run whose response has these fields; ``_`` stands for a hyphen."""
    named = {name.replace("_", "-"): value for name, value in fields.items()}
    return {**run, "fields": {**run["fields"], **named}}


def with_request(run: Run, **fields: str) -> Run:
    """Return a run whose request reached the proxy with these fields."""
    return {**run, "request": {name.replace("_", "-"): value for name, value in fields.items()}}


SILENT = run_of(sent_at(60, 100, 5000), sent_at(60, 100, 5000))
SILENT["asked"]["silence_ms"] = 5000

# A run, the word of its verdict, what its title says, what stands in its sentences and its advice.
CASES: dict[str, tuple[Run, str, str, str, str]] = {
    "streams": (streamed(), "streams", "It streams.", "4 ms later", ""),
    "two seconds apart": (streamed(5, 2000), "streams", "It streams.", "", ""),
    "a slow network": (streamed(jitter=90), "streams", "It streams.", "90 ms later", ""),
    "a hiccup": (hiccup(), "streams", "It streams.", "1.0 s later", ""),
    "every 20 ms": (streamed(200, 20), "streams", "It streams.", "", ""),
    "a silence that is not cut": (SILENT, "streams", "It streams.", "5.0 s was not cut", ""),
    "stopped": (streamed(end="stopped"), "streams", "It streams.", "before it was stopped", ""),
    "held": (
        to_the_end(),
        "held_to_end",
        "Held until the end.",
        "60 events were sent over 5.9 s",
        "nginx: proxy_buffering off",
    ),
    "five held": (to_the_end(5, 1000), "held_to_end", "Held until the end.", "", "doctor"),
    "held by Caddy": (
        with_fields(to_the_end(), via="1.1 Caddy"),
        "held_to_end",
        "Held until the end.",
        "On the way is Caddy.",
        "Caddy: no response_buffers",
    ),
    "held by Traefik": (
        with_request(to_the_end(), x_forwarded_server="edge", x_forwarded_port="443"),
        "held_to_end",
        "Held until the end.",
        "On the way is Traefik.",
        "Traefik: no buffering",
    ),
    "held by Apache": (
        with_request(to_the_end(), x_forwarded_server="edge"),
        "held_to_end",
        "Held until the end.",
        "On the way is Apache.",
        "Apache: flushpackets=on",
    ),
    "held by one that speaks HTTP/1.0": (
        with_request(to_the_end(), version="1.0"),
        "held_to_end",
        "Held until the end.",
        "speaks HTTP/1.0",
        "nginx: proxy_http_version 1.1;",
    ),
    "to be cut by Envoy": (
        with_request(streamed(), x_envoy_expected_rq_timeout_ms="15000"),
        "streams",
        "It streams.",
        "Envoy is on the way, and cuts each request after 15.0 s",
        "Envoy: timeout: 0s",
    ),
    "not to be cut by Envoy": (
        with_request(streamed(), x_envoy_attempt_count="1", version="1.0"),
        "streams",
        "It streams.",
        "",
        "",
    ),
    "blocks of 4 KiB": (
        blocks(4096),
        "held_in_blocks",
        "Held in blocks of 4.0 KiB.",
        "in 6 blocks, one every",
        "HAProxy: option http-no-delay",
    ),
    "blocks of 16 KiB": (
        blocks(16384, size=1000),
        "held_in_blocks",
        "Held in blocks of 16 KiB.",
        "in 4 blocks",
        "",
    ),
    "two to a block": (
        blocks(800, interval=250),
        "held_in_blocks",
        "Held in blocks of 800 bytes.",
        "250 ms late",
        "",
    ),
    "the first 2 KiB": (
        first_held(5),
        "held_at_first",
        "The first 2.0 KiB are held back.",
        "first 5 events",
        'padding = "2KiB"',
    ),
    "a small block behind each large one": (
        with_reads(blocks(61440, 40, size=10000), 56000, 4000),
        "held_in_blocks",
        "Held in blocks of 55 KiB.",
        "in 7 blocks, one every 600 ms",
        "",
    ),
    "one block, and the rest with the end": (
        blocks(4096, 13),
        "held_in_blocks",
        "Held in blocks of 4.0 KiB.",
        "in 2 blocks;",
        "",
    ),
    "compressed": (
        with_fields(streamed(), content_encoding="gzip", server="nginx/1.22"),
        "compressed",
        "Compressed with gzip.",
        "It streams all the same",
        "nginx: gzip off",
    ),
    "not compressed": (
        with_fields(streamed(), content_encoding="identity"),
        "streams",
        "It",
        "",
        "",
    ),
    "compressed and held": (
        with_fields(to_the_end(), content_encoding="br", server="cloudflare"),
        "held_to_end",
        "Held until the end.",
        "compressed with br, too",
        "Cloudflare: a compression",
    ),
    "cut in silence": (
        cut(30, 60020),
        "cut",
        "Cut after 60.0 s of silence.",
        "30 of 60 events arrived.",
        'heartbeat = "15s"',
    ),
    "cut in silence, by a limit": (cut(30, 60020), "cut", "Cut", "a limit of 60 s", "nginx"),
    "cut while busy": (
        with_fields(cut(138, 50, n=600, end_ms=15010), server="envoy"),
        "cut",
        "Cut 15.0 s after the request, while events came.",
        "a limit of 15 s",
        "Envoy: timeout: 0s",
    ),
    "cut as if whole": (
        cut(30, 50, end="complete"),
        "cut",
        "Cut 4.2 s after",
        "as if it were whole",
        "",
    ),
    "cut before any event": (
        cut(0, 58800),
        "cut",
        "Cut 60.0 s after the request.",
        "a hop held all of them",
        "",
    ),
    "held and cut": (
        {
            **cut(30, 50),
            "events": [
                {"n": number + 1, "sent_ms": number * 100, "at_ms": 4000} for number in range(30)
            ],
        },
        "cut",
        "Cut",
        "came all at once",
        "proxy_buffering",
    ),
    "too few": (streamed(3), "too_short", "Too short to tell.", "more events", ""),
    "too quick": (streamed(60, 1), "too_short", "Too short to tell.", "longer interval", ""),
    "no key": (
        streamed(0 + 2, status=401, problem="No key was given."),
        "refused",
        "Refused with status 401.",
        "No key was given.",
        "",
    ),
    "HTTP/1.0 before Envoy": (streamed(2, status=426), "refused", "Refused", "HTTP/1.0", ""),
    "another page": (
        streamed(2, is_paced=False),
        "other",
        "The response is no paced stream.",
        "",
        "",
    ),
    "nobody": (
        cut(0, 0, status=0, problem="The browser says: Failed to fetch.", end_ms=20),
        "unreachable",
        "No response came within 20 ms.",
        "Failed to fetch",
        "",
    ),
    "nobody for long": (
        cut(0, 0, status=0, end_ms=60000),
        "unreachable",
        "No response came within 60.0 s.",
        "given up",
        "",
    ),
    "stopped before the head": (
        cut(0, 0, status=0, end="stopped", end_ms=2000),
        "unreachable",
        "Stopped after 2.0 s.",
        "",
        "",
    ),
}


@pytest.fixture(scope="module")
def found() -> dict[str, Any]:
    """The verdict on each run."""
    script = Path(__file__).parent / "verdicts.mjs"
    runs = json.dumps([case[0] for case in CASES.values()])
    command = [str(NODE), str(script), str(VERDICT)]
    done = subprocess.run(command, input=runs, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return dict(zip(CASES, json.loads(done.stdout), strict=True))


@pytest.mark.parametrize("name", CASES)
def test_the_words_are_right(found: dict[str, Any], name: str) -> None:
    """The word, the title, what was seen, and what to change where something is to be changed."""
    _, word, title, sentence, advice = CASES[name]
    verdict = found[name]
    assert verdict["word"] == word, verdict
    assert verdict["title"].startswith(title)
    assert sentence in " ".join(verdict["sentences"])
    assert all(verdict["sentences"])
    assert advice in " ".join(verdict["advice"])
    assert bool(verdict["advice"]) is bool(advice or word == "cut" or word.startswith("held"))
