"""Reloads while clients come and streams run: nobody is refused or cut, and nothing is left."""

from __future__ import annotations

import gc
import json
import os
import threading
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from pytest_twisted import ensureDeferred
from twisted.internet import reactor
from twisted.internet.threads import deferToThread

from llmproxy.config import Config, parse
from llmproxy.gateway.gateway import Gateway
from llmproxy.policy.auth import Auth
from llmproxy.record.writer import Writer
from llmproxy.server.tls import ListenerTls
from llmproxy.service import ProxyService
from llmproxy.upstream.client import Upstream
from llmproxy.upstream.pool import ProviderPool
from tests.live.test_reload import free_port
from tests.support.daemon import Daemon, provider_config
from tests.support.demo import Demo
from tests.support.fake_transport import until as until_here
from tests.support.live_proxy import (
    assert_settles,
    client_config,
    post,
    read_response,
    until,
    write_credential,
)
from tests.support.load import Load
from tests.support.reloads import failures, hang_up, reload, write
from tests.support.scripts import LAST, event
from tests.support.sockets import Provider, Wire, chunked, connect, request

RELOADS = int(os.environ.get("LLMPROXY_RELOADS", "50"))
KEY = "key-of-team"

EVENTS = [event(number) for number in range(40)]
WHOLE = b"".join(EVENTS)


def play(wire: Wire) -> None:
    """A provider's script: a stream of known bytes, or a short response, as the path says."""
    while True:
        asked = wire.read_request()
        if asked.target != b"/stream":
            wire.send(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok")
            continue
        wire.send(
            b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\n"
            b"Transfer-Encoding: chunked\r\n\r\n"
        )
        for piece in EVENTS:
            wire.send(chunked(piece))
            time.sleep(0.01)  # the pace of a provider, not a wait for anything
        wire.send(LAST)


class Callers:
    """Clients that stream, that call shortly, and that connect anew each time, until told to end.

    Attributes:
        paths: of every request that was sent.
        failures: what went wrong.
    """

    def __init__(self, port: int) -> None:
        self.paths: list[str] = []
        self.failures: list[str] = []
        self.done: Counter[str] = Counter()
        self._port = port
        self._over = threading.Event()
        self._threads = [
            threading.Thread(target=self._go_on, args=(kind, number), daemon=True)
            for kind, count in (("stream", 6), ("kept", 2), ("fresh", 2))
            for number in range(count)
        ]

    def __enter__(self) -> Callers:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        for thread in self._threads:
            thread.join(30)

    def _go_on(self, kind: str, number: int) -> None:
        turn = 0
        while not self._over.is_set():
            try:
                with connect(self._port) as wire:
                    while not self._over.is_set():
                        turn += 1
                        self._ask(wire, kind, f"{kind}-{number}-{turn}")
                        if kind == "fresh":
                            break
            except (OSError, EOFError, AssertionError) as error:
                self.failures.append(f"{kind} {number} {turn}: {error!r}")

    def _ask(self, wire: Wire, kind: str, name: str) -> None:
        path = "/p/stream" if kind == "stream" else "/p/short"
        self.paths.append(name)
        wire.send(post(path, b"{}", f"x-api-key: {KEY}", f"x-request-id: {name}"))
        got = read_response(wire)
        assert got.status == 200, got
        assert got.body == (WHOLE if kind == "stream" else b"ok"), got.body[-200:]
        self.done[kind] += 1
        if kind != "stream":
            self._over.wait(0.01)


def held(daemon: Daemon) -> tuple[int, int]:
    """How many files and sockets a daemon has open, and how many threads it has."""
    process = Path("/proc") / str(daemon.process.pid)
    return len(os.listdir(process / "fd")), len(os.listdir(process / "task"))


def assert_holds_no_more(daemon: Daemon, before: tuple[int, int]) -> None:
    """Wait until a daemon holds as little as before."""

    def is_so() -> bool:
        return all(now <= then for now, then in zip(held(daemon), before, strict=True))

    until(is_so, f"it holds {held(daemon)}, and held {before}")


def test_fifty_reloads_under_load_harm_nobody(tmp_path: Path) -> None:
    """Each changes all there is to change: exact bytes, none failed, a record each, nothing left.

    The port that callers use stays; everything else comes and goes.
    """
    extra = free_port("127.0.0.1")
    with Provider(play) as provider:
        credentials = write_credential(tmp_path, "p-key", "first")
        config = (
            f'ledger = "{tmp_path}/ledger"\n{credentials}'
            + provider_config(provider.url, provider='credential = "p-key"')
            + client_config("team", KEY)
        )
        with Daemon(tmp_path, config, proxy="") as daemon:
            with connect(daemon.port) as wire:
                wire.send(request("GET", "/p/short", f"x-api-key: {KEY}", "x-request-id: first"))
                assert read_response(wire).body == b"ok"
            assert_settles(daemon)
            before = held(daemon)
            plain = daemon.config_path.read_text()
            other = (
                plain.replace("trace.jsonl", "other.jsonl")
                .replace('path = "/p"', 'path = "/p"\ncapture = "content"\nname = "other"')
                .replace(
                    "[proxy]\n",
                    '[proxy]\nvia = "other"\nmax_connections = 500\nreuse_port = true\n',
                )
                .replace(
                    'listen = ["tcp:0:interface=127.0.0.1"]',
                    f'listen = ["tcp:0:interface=127.0.0.1", "tcp:{extra}:interface=127.0.0.1"]',
                )
                .replace("[trace]", '[timeouts]\nclient_idle = "7s"\nidle = "9s"\n[trace]')
            )
            other += '[providers.q]\nurl = "http://127.0.0.1:1"\ndialect = "raw"\n'
            other += '[[routes]]\npath = "/q"\nproviders = ["q"]\n'
            with Callers(daemon.port) as callers:
                for turn in range(RELOADS):
                    if turn % 3 == 0:
                        write_credential(tmp_path, "p-key", f"key-{turn}")
                    write(daemon, other if turn % 2 == 0 else plain)
                    told = reload(daemon)
                    assert told["changed"]
                write(daemon, plain)
                reload(daemon)
            assert not callers.failures, (callers.failures[:5], len(callers.failures))
            assert all(callers.done[kind] for kind in ("stream", "kept", "fresh")), callers.done
            assert failures(daemon) == []
            assert_settles(daemon)
            write_credential(tmp_path, "p-key", "last")
            reload(daemon)  # it closes what is idle
            idle = 'llmproxy_upstream_connections{provider="p",state="idle"}'
            until(lambda: daemon.metrics()[idle] == 0, "idle connections are closed")
            assert_holds_no_more(daemon, before)
            lost = {
                value for name, value in daemon.metrics().items() if "records_lost_total" in name
            }
            assert lost == {0.0}
    files = [tmp_path / name for name in ("trace.jsonl", "other.jsonl")]
    records = [json.loads(line) for file in files for line in file.read_text().splitlines()]
    assert Counter(record["client_request_id"] for record in records) == Counter(
        [*callers.paths, "first"]
    )
    assert {record["end_reason"] for record in records} == {"complete"}


@pytest.fixture(scope="module")
def demo() -> Iterator[Demo]:
    """The demo provider."""
    with Demo() as demo:
        yield demo


def test_no_connection_is_refused_while_listeners_change(tmp_path: Path, demo: Demo) -> None:
    """A storm of connections at the port that stays, while another comes and goes beside it."""
    extra = free_port("127.0.0.1")
    with Daemon(tmp_path, provider_config(demo.url)) as daemon:
        home = '"tcp:0:interface=127.0.0.1"]'
        more = f'"tcp:0:interface=127.0.0.1", "tcp:{extra}:interface=127.0.0.1"]'
        with Load(daemon.port, fresh=6, kept=2, streams=2, words=20) as load:
            load.wait_more("fresh", 20)
            for _ in range(5):
                reload(daemon, (f"listen = [{home}", f"listen = [{more}"))
                reload(daemon, (f"listen = [{more}", f"listen = [{home}"))
            load.wait_more("fresh", 20)
        load.assert_whole("fresh", "kept", "stream")


def test_a_storm_of_signals_leaves_nothing(tmp_path: Path) -> None:
    """However many readings that becomes, threads and files are as many as before."""
    with Daemon(tmp_path, provider_config("http://127.0.0.1:1")) as daemon:
        reload(daemon)
        before = held(daemon)
        for _ in range(200):
            hang_up(daemon)
        reload(daemon)
        assert_holds_no_more(daemon, before)


# --- in this process, where objects can be counted ------------------------------------------------

KINDS = (Config, Gateway, Auth, Upstream, ProviderPool, Writer, ListenerTls)


def living() -> Counter[str]:
    """How many objects there are that a configuration is made into."""
    gc.collect()
    return Counter(type(one).__name__ for one in gc.get_objects() if isinstance(one, KINDS))


def response(wire: Wire) -> None:
    """A provider's script: answer until the client's end."""
    while True:
        wire.read_request()
        wire.send(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok")


@ensureDeferred
async def test_what_is_replaced_is_let_go_of(tmp_path: Path) -> None:
    """No object, timer or secret of an old configuration stays behind."""
    clock: Any = reactor
    with Provider(response) as provider:
        credentials = write_credential(tmp_path, "p-key", "secret-of-the-first")

        def text(number: int) -> str:
            return (
                f'[proxy]\nlisten = ["tcp:0:interface=127.0.0.1"]\nvia = "v{number}"\n'
                '[admin]\nlisten = "tcp:0:interface=127.0.0.1"\n'
                f'[trace]\njsonl = "{tmp_path}/t{number % 2}"\n{credentials}'
                + provider_config(provider.url, provider='credential = "p-key"')
                + client_config("team", f"{KEY}-{number}")
            )

        number = 0

        def reread() -> Config:
            return parse(text(number), environ={})

        service = ProxyService(reread(), reactor, reread=reread, handle_signals=False)
        service.privilegedStartService()
        service.startService()
        port = service.proxy_ports[0].getHost().port

        def ask() -> int:
            with connect(port) as wire:
                wire.send(request("GET", "/p/x", f"x-api-key: {KEY}-{number}"))
                return read_response(wire).status

        async def follow() -> None:
            at = service.reload.succeeded_at
            service.reload()
            await until_here(lambda: service.reload.succeeded_at > at)

        try:
            assert await deferToThread(ask) == 200
            await follow()
            before, calls = living(), len(clock.getDelayedCalls())
            for number in range(1, 21):
                write_credential(tmp_path, "p-key", f"secret-{number}")
                await follow()
                assert await deferToThread(ask) == 200
            number = 0
            write_credential(tmp_path, "p-key", "secret-of-the-last")
            await follow()
            await until_here(lambda: not service.site.connections)
            await until_here(lambda: not any(service.setup.upstream.counts().values()))
            # Those of other tests may be among them, and end meanwhile.
            await until_here(lambda: service.sinks.losses() and not living() - before)
            assert len(clock.getDelayedCalls()) <= calls
            assert service.setup.config.clients["team"].keys == reread().clients["team"].keys
        finally:
            await service.stopService()
