"""Faults of the tap and of every sink, while two hundred streams run: no client ever feels them.

Mistakes are put into the daemon by a module that its interpreter imports at the start
(``sitecustomize``); full disks, locks and hanging collectors are real.
"""

from __future__ import annotations

import json
import resource
import sqlite3
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

import pytest

from tests.support.collector import OtlpCollector
from tests.support.daemon import ROOT, Daemon, provider_config
from tests.support.live_proxy import assert_settles, post, until
from tests.support.records import query
from tests.support.scripts import DONE, LAST, SSE
from tests.support.sockets import WAIT, Provider, Wire, chunked, connect

MANY = 200
CHAT = "/p/v1/chat/completions"
COUNTS = b'data: {"choices":[],"usage":{"prompt_tokens":3,"completion_tokens":5}}\n\n'
LOST = 'llmproxy_records_lost_total{sink="%s"}'
BROKEN = 'llmproxy_tap_degraded_total{reason="internal"}'
SINKS = ("jsonl", "ledger", "otlp")

MISTAKE = """\
class Mistake(Exception):
    pass

def fail(*_, **__):
    raise Mistake("put here by a test")
"""

TAP = (
    MISTAKE
    + """
from llmproxy.gateway import inspection
from llmproxy.dialects.accumulated import Accumulated
from llmproxy.stream.tap import StreamAccumulator

def fails_at(number):
    take = StreamAccumulator._take
    def mistaken(self, events):
        (fail if self.events >= number else take)(self, events)
    return mistaken

"""
)
FAULTS = {
    "opening": "inspection.StreamAccumulator = fail",
    "first event": "StreamAccumulator._take = fails_at(0)",
    "third event": "StreamAccumulator._take = fails_at(2)",
    "last event": "StreamAccumulator._take = fails_at(6)",
    "what is gathered": "Accumulated.add_text = fail",
    "end": "StreamAccumulator._flush = fail",
    "verdict": "StreamAccumulator._verdict = fail",
    "text": "Accumulated.text = property(fail)",
    "all of its end": "StreamAccumulator.finish = fail",
}


def events(number: int) -> list[bytes]:
    """Return the events of one stream, which are no other's."""
    said = [
        {"choices": [{"index": 0, "delta": {"content": f"{number}:{word} "}}]} for word in range(5)
    ]
    return [*(b"data: %b\n\n" % json.dumps(one).encode() for one in said), COUNTS, DONE]


class Streams:
    """Two hundred streams that are begun together, and go on when the test says so."""

    def __init__(self, daemon: Daemon, stack: ExitStack, go: threading.Event) -> None:
        self._daemon = daemon
        self._go = go
        self._clients = [stack.enter_context(connect(daemon.port)) for _ in range(MANY)]
        for number, client in enumerate(self._clients):
            body = {"model": "m", "stream": True, "number": number}
            client.send(post(CHAT, json.dumps(body).encode()))
        for number, client in enumerate(self._clients):
            status, _ = client.read_head()
            assert status == b"HTTP/1.1 200 OK"
            assert client.read_chunk() == events(number)[0]

    def end(self) -> None:
        """Let them go on to their end; every client must have every byte of its own."""
        assert self._daemon.metrics()["llmproxy_active_streams"] == MANY
        self._go.set()
        for number, client in enumerate(self._clients):
            assert client.read_chunks() == b"".join(events(number)[1:])
            client.sock.close()


@contextmanager
def running(folder: Path, mistakes: str = "", trace: str = "") -> Iterator[tuple[Daemon, Streams]]:
    """Run a daemon with two hundred streams through it."""
    go = threading.Event()

    def script(wire: Wire) -> None:
        number = json.loads(wire.read_request().body)["number"]
        first, *rest = (chunked(one) for one in events(number))
        wire.send(SSE, first)
        if not go.wait(WAIT):
            raise TimeoutError("the test did not let it go on")
        for piece in rest:
            wire.send(piece)
        wire.send(LAST)

    (folder / "sitecustomize.py").write_text(mistakes)
    with Provider(script) as provider, ExitStack() as stack:
        config = trace + provider_config(provider.url, route='capture = "content"')
        environ = {"PYTHONPATH": f"{folder}:{ROOT}"}
        daemon = stack.enter_context(Daemon(folder, config, environ=environ))
        yield daemon, Streams(daemon, stack, go)
        assert_settles(daemon)


@pytest.mark.parametrize("where", FAULTS)
def test_a_broken_tap_is_felt_by_no_client(where: str, tmp_path: Path) -> None:
    """Bytes are exact, each request has its record, each broken tap one line and one count."""
    with running(tmp_path, TAP + FAULTS[where]) as (daemon, streams):
        streams.end()
        until(lambda: len(daemon.traces()) == MANY, "every request has its record")
        records = daemon.traces()
        ended = Counter((record["end_reason"], *record["degraded"]) for record in records)
        assert ended == {("complete", "internal"): MANY}
        assert daemon.metrics()[BROKEN] == MANY
        until(lambda: len(daemon.log) > MANY, "the log is read")
        errors = daemon.take_errors()
        assert sorted(error.partition(":")[0] for error in errors) == sorted(
            record["id"] for record in records
        )


def test_taps_that_do_not_break_report_nothing(tmp_path: Path) -> None:
    """The same without a fault: two hundred contents, none mixed up with another's."""
    with running(tmp_path) as (daemon, streams):
        streams.end()
        until(lambda: len(daemon.traces()) == MANY, "every request has its record")
        texts = Counter(record["text"] for record in daemon.traces())
        wanted = ["".join(f"{number}:{word} " for word in range(5)) for number in range(MANY)]
        assert texts == Counter(wanted)
        assert BROKEN not in daemon.metrics()


# -- sinks -----------------------------------------------------------------------------------------


def sinks(folder: Path, collector: OtlpCollector) -> str:
    """Return the keys of every sink beside the trace file."""
    return f'ledger = "{folder}/ledger.db"\notlp = "{collector.url}"\n'


def lost(daemon: Daemon) -> tuple[float, ...]:
    """Return how many records each sink has lost."""
    metrics = daemon.metrics()
    return tuple(metrics[LOST % name] for name in SINKS)


def kept(folder: Path, collector: OtlpCollector) -> tuple[int, ...]:
    """Return how many records each sink has; none where it is just being made."""
    lines = (folder / "trace.jsonl").read_text().count("\n")
    rows = 0
    with suppress(sqlite3.OperationalError):
        ((rows,),) = query(folder / "ledger.db", "SELECT count(*) FROM traces")
    return lines, rows, len(collector.spans())


OUTPUTS = {
    "jsonl": "llmproxy.record.jsonl import JsonLines as Output",
    "ledger": "llmproxy.record.ledger import Ledger as Output",
    "otlp": "llmproxy.record.otlp import Otlp as Output",
}
EVERY_SECOND = """
put = Output.put
turns = []

def mistaken(self, traces):
    turns.append(1)
    (fail if len(turns) % 2 else put)(self, traces)

Output.put = mistaken
"""


@pytest.mark.parametrize("sink", SINKS)
def test_a_sink_that_fails_costs_itself_alone(
    sink: str, tmp_path: Path, collector: OtlpCollector
) -> None:
    """Every other batch meets a mistake: what is kept and what is counted are all of them."""
    mistakes = f"{MISTAKE}\nfrom {OUTPUTS[sink]}\n{EVERY_SECOND}"
    with running(tmp_path, mistakes, sinks(tmp_path, collector)) as (daemon, streams):
        streams.end()

        def is_settled() -> bool:
            both = zip(lost(daemon), kept(tmp_path, collector), strict=True)
            return [gone + there for gone, there in both] == [MANY] * 3

        until(is_settled, "all are kept or counted")
        gone = dict(zip(SINKS, lost(daemon), strict=True))
        assert gone.pop(sink) > 0
        assert set(gone.values()) == {0}
        assert BROKEN not in daemon.metrics()
        errors = daemon.take_errors()
        assert set(errors) == {f"{sink}: records are being lost: put here by a test"}


def test_a_collector_that_hangs(tmp_path: Path, collector: OtlpCollector) -> None:
    """Its own records are lost after a while; file and ledger have all of them at once."""
    collector.hang = threading.Event()
    with running(tmp_path, trace=sinks(tmp_path, collector)) as (daemon, streams):
        streams.end()
        until(lambda: kept(tmp_path, collector)[:2] == (MANY, MANY), "the others have all")
        until(lambda: lost(daemon) == (0, 0, MANY), "they are counted", seconds=2 * WAIT)
        collector.hang.set()
        (error,) = daemon.take_errors()
        assert error.startswith("otlp: records are being lost")


def test_everything_fails_together(tmp_path: Path, collector: OtlpCollector) -> None:
    """Taps, files and collector fail at once, and every byte still arrives."""
    collector.status = 500
    mistakes = TAP + FAULTS["third event"]
    with running(tmp_path, mistakes, sinks(tmp_path, collector)) as (daemon, streams):
        with daemon.limited(resource.RLIMIT_FSIZE, 0):
            streams.end()
            until(lambda: lost(daemon) == (MANY, MANY, MANY), "they are counted")
        assert daemon.metrics()[BROKEN] == MANY
        until(lambda: len(daemon.log) >= 2 * MANY, "the log is read")
        assert len(daemon.take_errors()) == MANY + 3
