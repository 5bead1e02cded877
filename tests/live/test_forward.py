"""Programs that know a proxy and ask for http://: the proxy fetches it for them."""

from __future__ import annotations

import queue
import shutil
import subprocess
import sys
from collections.abc import Iterator

import pytest

from tests.support.live_proxy import assert_settles, read_response, trace_of, until
from tests.support.sandbox import KEY, Sandbox, open_sandbox
from tests.support.sockets import Provider, Wire, connect, request

TUNNELS = """
[tunnel]
allow = ["127.0.0.1:*"]
allow_private = true
"""
PROGRAMS = {
    "curl": ["curl", "-sSN", "--noproxy", "", "{url}"],
    "urllib": [
        sys.executable,
        "-c",
        "import sys, urllib.request; "
        "sys.stdout.buffer.write(urllib.request.urlopen(sys.argv[1]).read())",
        "{url}",
    ],
}


@pytest.fixture(scope="module")
def live(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Sandbox]:
    """A proxy whose tunnels may reach this machine."""
    with open_sandbox(tmp_path_factory.mktemp("forward"), more=TUNNELS) as live:
        yield live


@pytest.mark.parametrize("program", PROGRAMS)
def test_a_program_gets_what_the_host_says_piece_by_piece(live: Sandbox, program: str) -> None:
    """With the proxy's variable alone; the host sees a request for itself, and no key."""
    if shutil.which(PROGRAMS[program][0]) is None:
        pytest.skip(f"{program} is not installed")
    heads: queue.Queue[tuple[bytes, dict[bytes, bytes]]] = queue.Queue()
    go_on: queue.Queue[None] = queue.Queue()

    def respond(wire: Wire) -> None:
        line, fields = wire.read_head()
        heads.put((line, dict(fields)))
        wire.send(b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\n\r\ndata: one\n\n")
        go_on.get(timeout=20)
        wire.send(b"data: two\n\n")

    with Provider(respond) as host:
        where = f"http://127.0.0.1:{host.port}/a%2Fb?x=1"
        command = [one.format(url=where) for one in PROGRAMS[program]]
        environ = {**live.environment(), "NO_PROXY": "", "no_proxy": ""}
        with subprocess.Popen(command, env=environ, stdout=subprocess.PIPE) as running:
            assert running.stdout is not None
            line, fields = heads.get(timeout=20)
            if program == "curl":  # urllib reads to the end
                assert running.stdout.readline() == b"data: one\n"
            go_on.put(None)
            assert running.stdout.read().endswith(b"data: two\n\n")
        assert running.returncode == 0
    assert line == b"GET /a%2Fb?x=1 HTTP/1.1"
    assert fields[b"host"] == b"127.0.0.1:%d" % host.port
    assert not [name for name in fields if name.startswith(b"proxy-")]
    assert KEY.encode() not in b"".join(fields.values())
    record = trace_of(live.daemon, path=where.partition("?")[0])
    assert (record["status"], record["end_reason"]) == (200, "complete")
    assert (record["client"], record["tunnel"]) == ("team", "forwarded")
    assert_settles(live.daemon)


@pytest.mark.parametrize("which", ["admin", "proxy"])
def test_the_proxy_s_own_ports_are_never_reached(live: Sandbox, which: str) -> None:
    """By a URL as little as by a tunnel."""
    port = live.daemon.admin_port if which == "admin" else live.daemon.port
    with connect(live.daemon.port) as wire:
        key = f"Proxy-Authorization: Bearer {KEY}"
        wire.send(request("GET", f"http://127.0.0.1:{port}/config", key))
        got = read_response(wire)
        assert (got.status, got.error) == (403, "address_forbidden")


def test_an_intercepted_host_says_https(live: Sandbox) -> None:
    """In words that a person reads."""
    with connect(live.daemon.port) as wire:
        wire.send(request("GET", "http://inference.local/v1/models", "User-Agent: plain/1"))
        got = read_response(wire)
        assert (got.status, got.error) == (403, "plain_http")
        assert b"https://inference.local" in got.body
    record = trace_of(live.daemon, user_agent="plain/1")
    assert (record["end_reason"], record["tunnel"]) == ("rejected", "refused")


def test_refusals_that_repeat_are_one_line_of_the_log(live: Sandbox) -> None:
    """By CONNECT and by URL together; each has its record."""
    key = f"Proxy-Authorization: Bearer {KEY}"
    with connect(live.daemon.port) as wire:
        for method, target in (
            ("GET", "http://again.example/1"),
            ("GET", "http://again.example/2"),
            ("CONNECT", "again.example:80"),
            ("GET", "http://last.example/"),
        ):
            wire.send(request(method, target, key, "User-Agent: repeats/1"))
            assert read_response(wire).status == 403

    def lines() -> list[str]:
        return [one["path"] for one in live.daemon.log if one.get("user_agent") == "repeats/1"]

    until(lambda: "http://last.example/" in lines(), "the last refusal is in the log")
    assert lines() == ["http://again.example/1", "http://last.example/"]
    until(
        lambda: sum(one["user_agent"] == "repeats/1" for one in live.daemon.traces()) == 4,
        "each is recorded",
    )


def test_a_whole_url_within_an_interception_is_no_path(live: Sandbox) -> None:
    """There the proxy is the host, and forwards nothing."""
    with live.inside("inference.local") as wire:
        wire.send(request("GET", "http://127.0.0.1:1/", host="inference.local"))
        got = read_response(wire)
        assert (got.status, got.error) == (400, "bad_target")
