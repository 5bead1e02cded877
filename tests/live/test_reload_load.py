"""Reloads while clients come and streams run: nobody is refused or cut, and nothing is left."""

from __future__ import annotations

import gc
import json
import os
from collections import Counter
from pathlib import Path
from typing import Any

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
    read_response,
    until,
    write_credential,
)
from tests.support.load import Load, ask
from tests.support.reloads import failures, hang_up, reload, write
from tests.support.scripts import keep_replying
from tests.support.sockets import Provider, connect, request

RELOADS = int(os.environ.get("LLMPROXY_RELOADS", "50"))
KEY = "key-of-team"


def held(daemon: Daemon) -> tuple[int, int]:
    """How many files and sockets a daemon has open, and how many threads it has."""
    process = Path("/proc") / str(daemon.process.pid)
    return len(os.listdir(process / "fd")), len(os.listdir(process / "task"))


def assert_holds_no_more(daemon: Daemon, before: tuple[int, int]) -> None:
    """Wait until a daemon holds as little as before."""

    def is_so() -> bool:
        return all(now <= then for now, then in zip(held(daemon), before, strict=True))

    until(is_so, f"it holds {held(daemon)}, and held {before}")


def test_fifty_reloads_under_load_harm_nobody(tmp_path: Path, demo: Demo) -> None:
    """Each changes all there is to change: every text is exact, with one record, and nothing stays.

    The port that callers use stays, and refuses no connection; everything else comes and goes.
    """
    home, extra = '"tcp:0:interface=127.0.0.1"', free_port("127.0.0.1")
    credentials = write_credential(tmp_path, "p-key", "first")
    config = (
        f'ledger = "{tmp_path}/ledger"\n{credentials}'
        + provider_config(demo.url, provider='credential = "p-key"')
        + client_config("team", KEY)
    )
    with Daemon(tmp_path, config, proxy="") as daemon:
        with connect(daemon.port) as wire:
            wire.send(ask(1, "demo-fast", f"x-api-key: {KEY}", "x-request-id: first"))
            assert read_response(wire).status == 200
        assert_settles(daemon)
        before = held(daemon)
        plain = other = daemon.config_path.read_text()
        for old, new in {
            "trace.jsonl": "other.jsonl",
            'path = "/p"': 'path = "/p"\ncapture = "content"\nname = "other"',
            "[proxy]\n": '[proxy]\nvia = "other"\nmax_connections = 500\nreuse_port = true\n',
            f"listen = [{home}]": f'listen = [{home}, "tcp:{extra}:interface=127.0.0.1"]',
            "[trace]": '[timeouts]\nclient_idle = "7s"\nidle = "9s"\n[trace]',
        }.items():
            other = other.replace(old, new)
        other += '[providers.q]\nurl = "http://127.0.0.1:1"\ndialect = "raw"\n'
        other += '[[routes]]\npath = "/q"\nproviders = ["q"]\n'
        with Load(daemon.port, fresh=2, kept=2, streams=6, words=20, key=KEY) as load:
            for turn in range(RELOADS):
                if turn % 3 == 0:
                    write_credential(tmp_path, "p-key", f"key-{turn}")
                write(daemon, other if turn % 2 == 0 else plain)
                assert reload(daemon)["changed"]
            write(daemon, plain)
            reload(daemon)
        load.assert_whole("stream", "kept", "fresh")
        assert failures(daemon) == []
        assert_settles(daemon)
        write_credential(tmp_path, "p-key", "last")
        reload(daemon)  # it closes what is idle
        idle = 'llmproxy_upstream_connections{provider="p",state="idle"}'
        until(lambda: daemon.metrics()[idle] == 0, "idle connections are closed")
        assert_holds_no_more(daemon, before)
        lost = {value for name, value in daemon.metrics().items() if "records_lost_total" in name}
        assert lost == {0.0}
    files = [tmp_path / name for name in ("trace.jsonl", "other.jsonl")]
    records = [json.loads(line) for file in files for line in file.read_text().splitlines()]
    found = Counter(record["client_request_id"] for record in records)
    assert found == Counter([*load.ids, "first"])
    assert {record["end_reason"] for record in records} == {"complete"}


def test_a_storm_of_signals_leaves_nothing(tmp_path: Path) -> None:
    """The daemon has as many threads and files as before."""
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


@ensureDeferred
async def test_a_replaced_configuration_is_freed(tmp_path: Path) -> None:
    """No object, timer or secret of an old configuration stays behind."""
    clock: Any = reactor
    with Provider(keep_replying) as provider:
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

        def status() -> int:
            with connect(port) as wire:
                wire.send(request("GET", "/p/x", f"x-api-key: {KEY}-{number}"))
                return read_response(wire).status

        async def follow() -> None:
            at = service.reload.succeeded_at
            service.reload()
            await until_here(lambda: service.reload.succeeded_at > at)

        try:
            assert await deferToThread(status) == 200
            await follow()
            before, calls = living(), len(clock.getDelayedCalls())
            for number in range(1, 21):
                write_credential(tmp_path, "p-key", f"secret-{number}")
                await follow()
                assert await deferToThread(status) == 200
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
