"""Ten thousand requests of every end: whatever counts or keeps them says the same of them.

The requests are made on purpose, so that it is known beforehand how many end in which way.
Metrics, trace file, ledger, flight recorder and the admin site's pages are asked; none may know one
more or less than the others.
"""

from __future__ import annotations

import asyncio
import json
import random
import socket
import sqlite3
import threading
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from llmproxy.record.flight import KEPT
from tests.support.daemon import Daemon, provider_table, route_table
from tests.support.demo import Demo
from tests.support.live_proxy import until, write_credential

TOKEN = "admin-TOKEN"
WORKERS = 32

COUNTS = {
    "complete": 3600,
    "rejected": 2000,
    "upstream_refused": 1500,
    "upstream_failed": 500,
    "upstream_broken": 500,
    "upstream_protocol": 500,
    "unfinished": 500,
    "upstream_unreachable": 300,
    "client_gone": 300,
    "upstream_tls": 100,
    "upstream_timeout": 50,
    "upstream_idle": 50,
    "killed": 50,
    "drained": 46,
    "client_stalled": 4,
}
"""How many requests end in which way; ``internal`` cannot be made."""

TOKENS = ("input_tokens", "output_tokens", "cache_read_tokens", "reasoning_tokens")


class Callers:
    """Programs that call a daemon over raw sockets, and know how each request will end.

    Args:
        port: where the daemon listens.
    """

    def __init__(self, port: int) -> None:
        self._port = port

    async def leave(self, model: str) -> None:
        """Read the beginning of a stream, and leave."""
        reader, writer = await self._ask("/p", model, stream=True)
        await reader.readuntil(b"data:")
        await self._end(writer)

    async def stall(self) -> None:
        """Ask for more than anybody holds, and read nothing of it, until the daemon drops it."""
        loop = asyncio.get_running_loop()
        with socket.socket() as sock:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            sock.setblocking(False)
            await loop.sock_connect(sock, ("127.0.0.1", self._port))
            asked = b"GET /-/pace?n=900&interval_ms=0&bytes=60000 HTTP/1.1\r\nHost: a\r\n\r\n"
            await loop.sock_sendall(sock, asked)
            while not sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR):
                await asyncio.sleep(0.05)

    async def whole(self, target: str, model: str, *fields: str, stream: bool = False) -> None:
        """Send a request, and read until the connection ends."""
        reader, writer = await self._ask(target, model, *fields, stream=stream)
        with suppress(ConnectionError):  # some are broken off
            while await reader.read(65536):
                pass
        await self._end(writer)

    async def _ask(
        self, target: str, model: str, *fields: str, stream: bool
    ) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        reader, writer = await asyncio.open_connection("127.0.0.1", self._port)
        messages = [{"role": "user", "content": f"{random.random()}"}]
        body = json.dumps({"model": model, "stream": stream, "messages": messages}).encode()
        head = f"POST {target}/v1/chat/completions HTTP/1.1\r\nHost: a\r\nConnection: close\r\n"
        head += "".join(f"{line}\r\n" for line in ("Content-Type: application/json", *fields))
        writer.write(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
        return reader, writer

    @staticmethod
    async def _end(writer: asyncio.StreamWriter) -> None:
        writer.close()
        with suppress(ConnectionError):
            await writer.wait_closed()


async def in_turn(calls: Sequence[Callable[[], Awaitable[None]]]) -> None:
    """Make all calls, some at once."""
    left = iter(calls)

    async def work() -> None:
        for call in left:
            await call()

    await asyncio.gather(*(work() for _ in range(WORKERS)))


def calls_of(callers: Callers) -> list[Callable[[], Awaitable[None]]]:
    """Return the requests that end by themselves, shuffled."""

    def whole(*asked: str, stream: bool = False) -> Callable[[], Awaitable[None]]:
        return lambda: callers.whole(*asked, stream=stream)

    kinds = {
        "complete": whole("/p", "demo-fast"),
        "rejected": whole("/p", "demo-fast", "Authorization: Bearer wrong"),
        "upstream_refused": whole("/p", "demo-429"),
        "upstream_failed": whole("/p", "demo-fail", stream=True),
        "upstream_broken": whole("/p", "demo-break", stream=True),
        "upstream_protocol": whole("/p", "demo-malformed", stream=True),
        "unfinished": whole("/p", "demo-unfinished", stream=True),
        "upstream_unreachable": whole("/dead", "m"),
        "upstream_tls": whole("/tls", "m"),
        "upstream_timeout": whole("/silent", "m"),
        "upstream_idle": whole("/idle", "demo-stall", stream=True),
        "client_gone": lambda: callers.leave("demo-1tps"),
        "client_stalled": callers.stall,
    }
    calls = [call for name, call in kinds.items() for _ in range(COUNTS[name])]
    random.shuffle(calls)
    return calls


def ask_admin(daemon: Daemon, path: str) -> Any:
    """Read JSON of the admin site."""
    return json.loads(daemon.admin(path))


async def killed(daemon: Daemon, callers: Callers) -> None:
    """Let streams run, and end each from the admin site."""
    running = [
        asyncio.ensure_future(callers.whole("/p", "demo-1tps", stream=True))
        for _ in range(COUNTS["killed"])
    ]
    ended: set[str] = set()
    while len(ended) < COUNTS["killed"]:
        found = await asyncio.to_thread(ask_admin, daemon, "/streams?phase=streaming")
        for name in {row["id"] for row in found["streams"]} - ended:
            reader, writer = await asyncio.open_connection("127.0.0.1", daemon.admin_port)
            head = f"DELETE /streams/{name} HTTP/1.1\r\nHost: a\r\nConnection: close\r\n"
            writer.write(f"{head}Authorization: Bearer {TOKEN}\r\n\r\n".encode())
            assert (await reader.read()).startswith(b"HTTP/1.1 200 ")
            writer.close()
            ended.add(name)
    await asyncio.gather(*running)


def by_reason(metrics: dict[str, float]) -> dict[str, float]:
    """Return how many requests ended in which way, as Prometheus has it."""
    begin = 'llmproxy_ended_total{reason="'
    return {
        name.removeprefix(begin).removesuffix('"}'): value
        for name, value in metrics.items()
        if name.startswith(begin)
    }


def total(metrics: dict[str, float], name: str, label: str = "") -> float:
    """Return the sum of a metric, or of those of its values that have a label."""
    return sum(
        value
        for key, value in metrics.items()
        if key.partition("{")[0] == f"llmproxy_{name}" and label in key
    )


def assert_metrics_fit(metrics: dict[str, float], traces: list[dict[str, Any]]) -> None:
    """The counters are those of the records."""
    assert by_reason(metrics) == Counter(trace["end_reason"] for trace in traces)
    assert total(metrics, "requests_total") == len(traces)
    assert total(metrics, "records_lost_total") == 0
    assert total(metrics, "active_streams") == 0
    for kind in TOKENS:
        counted = sum(trace[kind] or 0 for trace in traces)
        assert total(metrics, "tokens_total", f'type="{kind.removesuffix("_tokens")}"') == counted
    attempts = Counter(one["outcome"] for trace in traces for one in trace["attempts"])
    for outcome, count in attempts.items():
        assert total(metrics, "upstream_attempts_total", f'outcome="{outcome}"') == count
    assert total(metrics, "bytes_total", 'direction="in"') == sum(t["bytes_in"] for t in traces)
    resent = Counter(trace["resent"] for trace in traces if trace["resent"] is not None)
    assert total(metrics, "resent_total") == sum(resent.values())


def assert_recorder_fits(kept: list[dict[str, Any]], traces: list[dict[str, Any]]) -> None:
    """Of each end but ``complete`` the newest are kept, with what their records say."""
    known = {trace["id"]: trace for trace in traces}
    counts = Counter(trace["end_reason"] for trace in traces)
    del counts["complete"]
    assert Counter(one["end_reason"] for one in kept) == {
        reason: min(KEPT, count) for reason, count in counts.items()
    }
    for one in kept:
        trace = known[one["id"]]
        assert {name: one[name] for name in one.keys() & trace.keys()} == {
            name: trace[name] for name in one.keys() & trace.keys()
        }


def assert_ledger_fits(path: Path, traces: list[dict[str, Any]]) -> None:
    """The ledger has the same requests, ends and tokens."""
    with sqlite3.connect(path) as ledger:
        rows = dict(ledger.execute("SELECT end_reason, count(*) FROM traces GROUP BY 1"))
        sums = ledger.execute(f"SELECT {', '.join(f'sum({name})' for name in TOKENS)} FROM traces")  # noqa: S608 - names of ours
        (tokens,) = sums
        names = {name for (name,) in ledger.execute("SELECT id FROM traces")}
    assert rows == Counter(trace["end_reason"] for trace in traces)
    assert names == {trace["id"] for trace in traces}
    assert len(names) == len(traces)
    for name, value in zip(TOKENS, tokens, strict=True):
        assert (value or 0) == sum(trace[name] or 0 for trace in traces)


@pytest.fixture
def silent() -> Iterator[int]:
    """A port that takes connections and says nothing."""
    with socket.create_server(("127.0.0.1", 0), backlog=200) as server:
        yield server.getsockname()[1]


@pytest.fixture
def garbled() -> Iterator[int]:
    """A port that says something which is no TLS, and leaves."""
    with socket.create_server(("127.0.0.1", 0), backlog=200) as server:

        def serve() -> None:
            with suppress(OSError):  # the server is closed
                while True:
                    peer, _ = server.accept()
                    with peer:
                        peer.sendall(b"this is no TLS\n")
                        peer.recv(65536)

        threading.Thread(target=serve, daemon=True).start()
        yield server.getsockname()[1]
        server.shutdown(socket.SHUT_RDWR)


@pytest.mark.timeout(240)
def test_ten_thousand_requests_are_told_the_same_everywhere(
    tmp_path: Path, silent: int, garbled: int
) -> None:
    """No request is counted twice, or forgotten, however it ended."""
    ledger = tmp_path / "ledger.sqlite3"
    with Demo() as demo:
        config = f'ledger = "{ledger}"\n'
        for name, url in {
            "p": demo.url,
            "dead": "http://127.0.0.1:1",
            "tls": f"https://127.0.0.1:{garbled}",
            "silent": f"http://127.0.0.1:{silent}",
        }.items():
            config += provider_table(name, "health = { failures = 0 }", url=url)
        config += route_table("/p", "p")
        config += route_table("/dead", "dead") + route_table("/tls", "tls")
        config += route_table("/silent", "silent", 'timeouts = { first_byte = "100ms" }')
        config += route_table("/idle", "p", 'timeouts = { idle = "100ms" }')
        config += '[timeouts]\nclient_stall = "2s"\n[limits]\nconnections_per_address = 1000\n'
        config += write_credential(tmp_path, "admin-token", TOKEN)
        proxy = 'anonymous = true\ndrain_timeout = "100ms"'
        with Daemon(tmp_path, config, proxy=proxy, admin='token = "admin-token"') as daemon:
            made = sum(COUNTS.values()) - COUNTS["drained"]

            async def call_all() -> None:
                callers = Callers(daemon.port)
                await in_turn(calls_of(callers))
                await killed(daemon, callers)

            asyncio.run(call_all())
            until(lambda: total(daemon.metrics(), "requests_total") == made, "all have ended")
            traces = until(lambda: (t := daemon.traces()) and len(t) == made and t, "all are kept")
            metrics = daemon.metrics()
            wanted = Counter(COUNTS)
            del wanted["drained"]
            assert by_reason(metrics) == wanted
            assert_metrics_fit(metrics, traces)
            assert_recorder_fits(ask_admin(daemon, "/streams/ended"), traces)
            assert ask_admin(daemon, "/streams")["total"] == 0

            async def drained() -> None:
                callers = Callers(daemon.port)
                calls = [
                    asyncio.ensure_future(callers.whole("/p", "demo-1tps", stream=True))
                    for _ in range(COUNTS["drained"])
                ]
                path = "/streams?phase=streaming"
                while (await asyncio.to_thread(ask_admin, daemon, path))["total"] < len(calls):
                    await asyncio.sleep(0.05)
                daemon.terminate()
                await asyncio.gather(*calls)

            asyncio.run(drained())
            daemon.process.wait(20)
        traces = daemon.traces()
        assert Counter(trace["end_reason"] for trace in traces) == COUNTS
        assert_ledger_fits(ledger, traces)
