"""Those who follow ``/events`` of a running daemon: many, slow, and there to the end."""

from __future__ import annotations

import json
import signal
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest

from llmproxy.admin.events import MOST_VIEWERS
from llmproxy.dialects.json_body import MODEL_BYTES
from tests.support.live_proxy import (
    ONE_ROUTE,
    LiveProxy,
    assert_settles,
    live_fixture,
    open_live_proxy,
    read_stepwise,
    trace_of,
    until,
)
from tests.support.scripts import SSE, event
from tests.support.sockets import WAIT, Wire, chunked, connect, request

live = live_fixture()


@contextmanager
def viewers(
    live: LiveProxy, query: str = "", *, count: int = MOST_VIEWERS, receive_buffer: int = 0
) -> Iterator[list[Wire]]:
    """Let so many follow the events; yield their connections, of which the head is read."""
    with ExitStack() as stack:
        found = []
        for _ in range(count):
            wire = connect(live.daemon.admin_port, receive_buffer=receive_buffer)
            found.append(stack.enter_context(wire))
            wire.send(request("GET", f"/events{query}"))
            assert wire.read_head()[0] == b"HTTP/1.1 200 OK"
        yield found


def next_event(wire: Wire) -> bytes:
    """Take the next event; return its data."""
    while True:
        for line in wire.read_chunk().split(b"\n"):
            if line.startswith(b"data: "):
                return line[6:]


def next_state(wire: Wire) -> Any:
    """Take the next event; return what it says."""
    return json.loads(next_event(wire))


def read_all(wire: Wire) -> None:
    """Take events for as long as they come."""
    while True:
        next_state(wire)


def test_viewers_stay_at_a_reload(live: LiveProxy) -> None:
    """Each sees the providers of the new configuration."""
    path = live.daemon.config_path
    before = path.read_text()
    with viewers(live) as following:
        for wire in following:
            assert [row["name"] for row in next_state(wire)["providers"]] == ["p"]
        path.write_text(f'{before}\n[providers.q]\nurl = "http://127.0.0.1:1"\ndialect = "raw"\n')
        live.daemon.process.send_signal(signal.SIGHUP)
        for wire in following:
            while [row["name"] for row in next_state(wire)["providers"]] != ["p", "q"]:
                pass
    path.write_text(before)
    live.daemon.process.send_signal(signal.SIGHUP)


def test_viewers_hold_no_shutdown_up(tmp_path: Path) -> None:
    """They see how far it is, and end behind a whole event once the last stream is over."""
    proxy = 'anonymous = true\ndrain_timeout = "60s"'
    with open_live_proxy(tmp_path, ONE_ROUTE, proxy=proxy) as live:
        turn = live.stream(event(0))
        with viewers(live) as following, live.begin("/p/x") as client:
            live.daemon.terminate()
            for wire in following:
                while next_state(wire)["process"]["draining"] is None:
                    pass
            read_stepwise(client, turn, event(0), b"")
            for wire in following:
                with pytest.raises(EOFError):
                    read_all(wire)
                assert wire.buffer == b""
                assert wire.wait_closed() == "fin"
            assert live.daemon.process.wait(WAIT) == 0


STALLED_S = 9
STREAMS = 100


def test_viewers_that_never_read_cost_little(live: LiveProxy) -> None:
    """Each holds what the kernel takes and one event; the streams go on, one event at a time.

    When they read again, they find the events of before, whole, and then the present: what came
    between is not there.
    """
    pieces = [event(number) for number in range(20)]
    most = int(Path("/proc/sys/net/ipv4/tcp_wmem").read_text().split()[2])
    with ExitStack() as clients:
        live.hold(SSE, chunked(event(0)))
        for _ in range(STREAMS):
            model = "\x01" * MODEL_BYTES
            body = json.dumps({"model": model, "stream": True}).encode()
            clients.enter_context(live.begin("/p/v1/chat/completions", body))
        (awake,) = clients.enter_context(viewers(live, "?limit=0", count=1))
        slow = viewers(live, "?limit=100", count=MOST_VIEWERS - 1, receive_buffer=2048)
        idle = clients.enter_context(slow)
        began = next_state(awake)["process"]["uptime_s"]
        turn = live.stream(*pieces)
        with live.begin("/p/x") as client:
            read_stepwise(client, turn, *pieces)
        while (now := next_state(awake)["process"]["uptime_s"]) < began + STALLED_S:
            pass
        for wire in idle:
            waited = 0
            while True:
                data = next_event(wire)
                state = json.loads(data)
                if state["process"]["uptime_s"] >= now:
                    break
                assert len(state["streams"]) == STREAMS
                waited += len(data)
            assert waited < most + len(data), "one event is kept besides what the kernel holds"


def only_row(live: LiveProxy) -> dict[str, Any] | None:
    """Return the row of the one request that is served; None while others have not ended."""
    rows: list[dict[str, Any]] = json.loads(live.daemon.admin("/streams"))["streams"]
    return rows[0] if len(rows) == 1 else None


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        ("s" * 5000, "s" * 256),
        ("<img src=x onerror=alert(1)>", "<img src=x onerror=alert(1)>"),
        ("a\u202eb", None),
        ("a\u2028b", None),
        ("\ud800", "\ufffd" * 3),
    ],
)
def test_what_a_caller_calls_itself_is_short_and_to_be_seen(
    live: LiveProxy, value: str, shown: str | None
) -> None:
    """Of its session and of its program's name; what cannot be seen is left out."""
    sent = value.encode("utf-8", "surrogatepass").decode("latin-1")
    fields = (f"X-Session-Id: {sent}", f"User-Agent: {sent}")
    live.hold(SSE, chunked(event(0)))
    body = b'{"model":"m","stream":true}'
    with live.begin("/p/v1/chat/completions", body, *fields):
        row = until(lambda: only_row(live), "it alone is served")
        assert row["session"] == shown
    record = trace_of(live.daemon, id=row["id"])
    assert (record["session"], record["user_agent"]) == (shown, shown)
    assert_settles(live.daemon)
