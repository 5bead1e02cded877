"""Limits of clients in the real daemon: over restarts, kills and reloads, and in its metrics."""

from __future__ import annotations

import json
import signal
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

from tests.support.daemon import Daemon, provider_config
from tests.support.live_proxy import (
    LiveProxy,
    Response,
    client_config,
    open_live_proxy,
    post,
    response,
    until,
)
from tests.support.records import query
from tests.support.reloads import reload
from tests.support.scripts import reply
from tests.support.sockets import Provider

KEY = "x-api-key: k"
CHAT = "/p/v1/chat/completions"
USAGE = b'{"usage":{"prompt_tokens":300,"completion_tokens":100}}'
ANSWER = response(200, "Content-Type: application/json", body=USAGE)
LEFT = 'llmproxy_limit_remaining{client="team",limit="%s"}'
LIMITED = 'llmproxy_limited_total{client="team",limit="%s"}'


def chat(model: str = "m") -> bytes:
    """Return a request that costs 400 tokens."""
    return post(CHAT, b'{"model":"%b"}' % model.encode(), KEY)


def header(got: Response, name: bytes) -> str:
    """Return the value of a field that stands once."""
    (value,) = got.values(name)
    return value.decode()


def in_ledger(daemon: Daemon) -> int:
    """Return how many requests are in the ledger by now."""
    found: int = query(daemon.folder / "ledger", "SELECT count(*) FROM traces")[0][0]
    return found


@pytest.fixture(autouse=True)
def far_from_midnight() -> None:
    """A budget of a day would be whole again in the middle of a test."""
    left = 86400 - time.time() % 86400
    if left < 30:
        time.sleep(left)


@pytest.fixture
def provider() -> Iterator[Provider]:
    """A provider that outlives daemons; each response costs 400 tokens."""
    with Provider(reply(ANSWER)) as provider:
        yield provider


@contextmanager
def daemon_of(folder: Path, provider: Provider, limits: str) -> Iterator[LiveProxy]:
    """Run a daemon with a ledger, and a client with these limits."""
    config = f'ledger = "{folder}/ledger"\n' + provider_config(provider.url)
    live = LiveProxy.__new__(LiveProxy)  # with a provider of its own it could not be restarted
    with Daemon(folder, config + client_config("team", "k", limits), proxy="") as live.daemon:
        yield live


@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGKILL])
def test_what_was_used_today_is_known_after_a_restart(
    tmp_path: Path, provider: Provider, how: signal.Signals
) -> None:
    """A daemon that was killed in the middle of its work counts on where it was."""
    with daemon_of(tmp_path, provider, "tokens_per_day = 3000\n") as live:
        for _ in range(2):
            assert live.get(chat()).status == 200
        until(lambda: in_ledger(live.daemon) == 2, "both are in the ledger")
        live.daemon.process.send_signal(how)
        live.daemon.process.wait()
    with daemon_of(tmp_path, provider, "tokens_per_day = 3000\n") as live:
        assert live.daemon.metrics()[LEFT % "tokens_per_day"] == 3000 - 2 * 400
        for _ in range(5):
            assert live.get(chat()).status == 200
        got = live.get(chat())
        assert (got.status, got.error) == (429, "limited")
        assert header(got, b"x-llmproxy-limit") == "tokens_per_day"
        assert 0 < int(header(got, b"retry-after")) <= 86400
        assert live.daemon.metrics()[LEFT % "tokens_per_day"] == 200
        assert live.daemon.metrics()[LIMITED % "tokens_per_day"] == 1


def test_a_reload_changes_limits_at_once_and_forgets_nothing(
    tmp_path: Path, provider: Provider
) -> None:
    """What was used before counts; and a limit of a day that is new knows the ledger."""
    with daemon_of(tmp_path, provider, "requests_per_minute = 3\n") as live:
        for _ in range(3):
            assert live.get(chat()).status == 200
        assert live.get(chat()).status == 429
        until(lambda: in_ledger(live.daemon) == 4, "all are in the ledger")
        reload(live.daemon, ("per_minute = 3", "per_minute = 5\ntokens_per_day = 1300"))
        metrics = live.daemon.metrics()
        assert metrics[LEFT % "requests_per_minute"] == 2
        assert metrics[LEFT % "tokens_per_day"] == 100
        assert header(live.get(chat()), b"x-llmproxy-limit") == "tokens_per_day"
        reload(live.daemon, ("tokens_per_day = 1300", "tokens_per_day = 5000"))
        for _ in range(2):
            assert live.get(chat()).status == 200
        assert header(live.get(chat()), b"x-llmproxy-limit") == "requests_per_minute"
        reload(live.daemon, ("requests_per_minute = 5\n", ""), ("tokens_per_day = 5000", ""))
        got = live.get(chat())
        assert (got.status, got.values(b"x-llmproxy-remaining")) == (200, [])


def test_a_ledger_that_cannot_be_read_stops_no_start(tmp_path: Path, provider: Provider) -> None:
    """The log says what that means, and the day begins at zero."""
    with daemon_of(tmp_path, provider, "tokens_per_day = 3000\n") as live:
        for number in range(30):
            live.get(post(f"/p/{'x' * 1000}/{number}", b"{}", KEY))
        until(lambda: in_ledger(live.daemon) == 30, "all are in the ledger")
    ledger = tmp_path / "ledger"
    whole = ledger.read_bytes()
    ledger.write_bytes(whole[:8192] + b"\xff" * (len(whole) - 8192))
    with daemon_of(tmp_path, provider, "tokens_per_day = 3000\n") as live:
        line = live.daemon.wait_log("the tokens of today begin at zero")
        assert (line["level"], "malformed" in line["message"]) == ("warn", True)
        assert live.daemon.metrics()[LEFT % "tokens_per_day"] == 3000


def test_a_stream_holds_a_slot_until_its_end(tmp_path: Path) -> None:
    """The next one is told to come again soon, and passes when the first one is over."""
    config = provider_config("URL") + client_config("team", "k", "max_streams = 2\n")
    with open_live_proxy(tmp_path, config, proxy="") as live, ExitStack() as clients:
        ended = live.hold(b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\n\r\n")
        first, _ = [clients.enter_context(live.begin(CHAT, b"{}", KEY)) for _ in range(2)]
        got = live.reject(chat())
        assert (got.status, header(got, b"x-llmproxy-limit")) == (429, "max_streams")
        assert header(got, b"retry-after") == "1"
        assert live.daemon.metrics()[LEFT % "max_streams"] == 0
        (row,) = json.loads(live.daemon.admin("/clients"))
        assert row == {
            "client": "team",
            "streams": 2,
            "limits": {"max_streams": {"limit": 2, "used": 2, "remaining": 0, "here": 2}},
        }
        first.close()
        ended.read()
        until(lambda: live.daemon.metrics()[LEFT % "max_streams"] == 1, "the slot is free")
        clients.enter_context(live.begin(CHAT, b"{}", KEY))
        line = live.daemon.wait_log("rejected", error="limited")
        assert line["cause"] == "max_streams"
        assert "max_streams = 2 of client team" in line["detail"]
