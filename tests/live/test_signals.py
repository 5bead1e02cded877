"""What an operator can ask of a running daemon by a signal: who is being served."""

from __future__ import annotations

import signal
from pathlib import Path

from tests.support.daemon import Daemon, provider_config
from tests.support.live_proxy import client_config, post, until
from tests.support.scripts import SSE, event
from tests.support.sockets import Provider, Wire, chunked, connect, request

KEY = "key-of-bob"


def test_the_streams_are_logged_on_demand(tmp_path: Path) -> None:
    """Each has a line: client, route, bytes and age; and the log counts those still coming in."""

    def script(wire: Wire) -> None:
        if wire.read_request().target == b"/stream":
            wire.send(SSE, chunked(event(0)))
        wire.wait_closed()

    key = f"x-api-key: {KEY}"
    with (
        Provider(script) as provider,
        Daemon(
            tmp_path, provider_config(provider.url) + client_config("bob", KEY), proxy=""
        ) as daemon,
        connect(daemon.port) as streaming,
        connect(daemon.port) as waiting,
        connect(daemon.port) as coming,
    ):
        streaming.send(post("/p/stream", b'{"model":"m","stream":true}', key))
        streaming.read_head()
        assert streaming.read_chunk() == event(0)
        waiting.send(request("GET", "/p/wait", key))
        until(lambda: provider.accepted == 2, "the second request has reached the provider")
        coming.send(post("/p/x", b"{}", key)[:-1])
        until(lambda: daemon.metrics()["llmproxy_request_bytes_held"] > 0, "a body is coming")

        daemon.process.send_signal(signal.SIGUSR1)
        counted = daemon.wait_log("are being served")
        assert (counted["count"], counted["coming"]) == (2, 1)
        line = daemon.wait_log("streaming since")
        assert {name: line[name] for name in ("client", "route", "provider", "model")} == {
            "client": "bob",
            "route": "p",
            "provider": "p",
            "model": "m",
        }
        assert line["phase"] == "streaming"
        assert line["bytes"] == len(event(0))
        assert len(line["id"]) == 24
        assert 0 <= line["last_chunk_s"] <= line["age_s"] < 60
        assert line["paused_s"] == 0
        other = daemon.wait_log("waiting since")
        assert (other["bytes"], other["last_chunk_s"], other["model"]) == (0, None, None)


def test_a_signal_that_finds_nothing_is_logged(tmp_path: Path) -> None:
    """The log says that nothing is being served."""
    with Daemon(tmp_path, provider_config("http://127.0.0.1:1")) as daemon:
        daemon.process.send_signal(signal.SIGUSR1)
        assert daemon.wait_log("are being served")["count"] == 0
