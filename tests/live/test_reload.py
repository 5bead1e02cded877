"""SIGHUP at a running daemon: all of its file takes effect, or nothing does (ADR-0014)."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from tests.live.test_starting import HEAD
from tests.support.daemon import ROOT, Daemon, provider_config
from tests.support.keypairs import Vault
from tests.support.reloads import (
    RELOADED,
    RELOADED_AT,
    edit,
    expect_failures,
    fail_to_reload,
    failures,
    hang_up,
    reload,
    write,
)
from tests.support.sockets import WAIT, Provider, Received, Wire, chunked, connect, request
from tests.support.stage import (
    LAST,
    OK,
    SSE,
    Notes,
    Stage,
    Turn,
    assert_settles,
    client_config,
    event,
    post,
    read_got,
    trace_of,
    until,
    write_credential,
)

KEY, OTHER_KEY = "key-of-team", "another-key-of-team"
BY_KEY = f"x-api-key: {KEY}"
GET = request("GET", "/p/x", BY_KEY)


class Desk(Stage):
    """A stage with a client ``team`` and a provider with a credential, and its operator's hand."""

    def keep_answering(self, response: bytes = b"ok") -> Notes:
        """Let the provider answer whatever comes, on kept connections; return what it gets."""
        seen = Notes()
        whole = b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%b" % (len(response), response)

        def script(wire: Wire) -> None:
            while True:
                seen.put(wire.read_request())
                wire.send(whole)

        self.script = script
        return seen

    def stream(self, count: int = 3) -> Turn:
        """Let the provider stream so many events from now on; each takes a turn."""
        turn = Turn()

        def script(wire: Wire) -> None:
            wire.read_request()
            wire.send(SSE)
            for number in range(count):
                turn.take()
                wire.send(chunked(event(number)))
            turn.take()
            wire.send(LAST)

        self.script = script
        return turn

    def begin(self, turn: Turn, path: str = "/p/s") -> Wire:
        """Begin a stream and read its first event."""
        client = self.connect()
        client.send(post(path, b'{"model":"m","stream":true}', BY_KEY))
        client.read_head()
        turn.give()
        assert client.read_chunk() == event(0)
        return client

    def status(self, sent: bytes = GET) -> int:
        """Return the status of a response on a connection of its own."""
        return self.get(sent).status


def finish(client: Wire, turn: Turn, count: int = 3) -> None:
    """Read a stream that was begun to its end."""
    for number in range(1, count):
        turn.give()
        assert client.read_chunk() == event(number)
    turn.give()
    assert client.read_chunk() == b""


@pytest.fixture
def desk(tmp_path: Path) -> Iterator[Desk]:
    """A daemon before one provider, and what its operator may do."""
    credentials = write_credential(tmp_path, "p-key", "first")
    desk = Desk()
    config = (
        credentials
        + provider_config(desk.provider.url, provider='credential = "p-key"')
        + client_config("team", KEY)
    )
    with desk.provider, Daemon(tmp_path, config, proxy="") as desk.daemon:
        yield desk


def digest_line(key: str) -> str:
    """Return a client's `keys` as the file has them."""
    return client_config("x", key).splitlines()[1]


def authorization(received: Received) -> list[bytes]:
    """Return the credential that the provider was shown."""
    return received.values(b"authorization")


# --- a bad file -----------------------------------------------------------------------------------

BAD = {
    "not TOML": ("[proxy]", "[proxy"),
    "an unknown key": ("[trace]", "[trace]\nnothing = 1"),
    "a wrong value": ('path = "/p"', 'path = "p"'),
    "a credential that is not there": ('"p-key"', '"q-key"'),
    "an address that cannot be": ("tcp:0:interface=127.0.0.1", "tcp:0:interface=203.0.113.1"),
    "a trace file that cannot be": ("trace.jsonl", "no-folder/trace.jsonl"),
}


@pytest.mark.parametrize("bad", BAD.values(), ids=BAD)
def test_a_bad_file_changes_nothing(desk: Desk, bad: tuple[str, str]) -> None:
    """Listeners, keys, routes and connections stay; the log and a metric say so; then it heals."""
    seen = desk.keep_answering()
    with desk.connect() as kept:
        kept.send(GET)
        assert read_got(kept).body == b"ok"
        old, new = bad
        text = desk.daemon.config_path.read_text()
        # All the rest of the file is good, and would close the route and lock the client out.
        better = text.replace(old, new, 1)
        better = better.replace('path = "/p"', 'path = "/q"').replace(
            digest_line(KEY), digest_line(OTHER_KEY)
        )
        at_first = desk.daemon.metrics()[RELOADED_AT]
        write(desk.daemon, better)
        told = fail_to_reload(desk.daemon)
        assert told["problems"]
        assert told["message"].startswith("reload failed, nothing has changed: ")
        metrics = desk.daemon.metrics()
        assert (metrics[RELOADED], metrics[RELOADED_AT]) == (0, at_first)
        for wire in (kept, desk.connect()):
            with wire:
                wire.send(GET)
                assert read_got(wire).body == b"ok"
        assert seen.read().target == b"/x"
        until(lambda: len(desk.daemon.traces()) == 3, "records are written")

    expect_failures(desk.daemon, 1)
    write(desk.daemon, text)
    reload(desk.daemon)
    assert desk.daemon.metrics()[RELOADED] == 1
    assert desk.status() == 200


# --- who may call, and where it goes --------------------------------------------------------------


def test_a_rotated_credential_is_used_by_the_next_request(desk: Desk) -> None:
    """And by nothing before: a stream goes on, and no connection of the old key is used again."""
    turn = desk.stream()
    with desk.begin(turn) as running:
        seen = desk.keep_answering()
        assert desk.status() == 200
        assert authorization(seen.read()) == [b"Bearer first"]
        accepted = desk.provider.accepted
        write_credential(desk.daemon.folder, "p-key", "second")
        assert desk.status() == 200
        assert authorization(seen.read()) == [b"Bearer first"]
        assert desk.provider.accepted == accepted
        assert reload(desk.daemon)["changed"] == ["providers.p"]
        assert desk.status() == 200
        assert authorization(seen.read()) == [b"Bearer second"]
        assert desk.provider.accepted == accepted + 1
        idle = 'llmproxy_upstream_connections{provider="p",state="idle"}'
        until(lambda: desk.daemon.metrics()[idle] == 1, "what was idle is closed")
        finish(running, turn)
    assert_settles(desk.daemon)


def test_a_revoked_key_is_refused_on_the_same_connection(desk: Desk) -> None:
    """Its next request is; what it began goes on; and a new key opens the door."""
    turn = desk.stream()
    with desk.begin(turn) as running, desk.connect() as kept:
        desk.keep_answering()
        kept.send(GET)
        assert read_got(kept).status == 200
        told = reload(desk.daemon, (digest_line(KEY), digest_line(OTHER_KEY)))
        assert told["changed"] == ["clients.team"]
        kept.send(GET)
        assert read_got(kept).status == 401
        kept.send(request("GET", "/p/x", f"x-api-key: {OTHER_KEY}"))
        assert read_got(kept).status == 200
        finish(running, turn)
        running.send(GET)
        assert read_got(running).status == 401
    assert KEY not in json.dumps(desk.daemon.log)


def test_routes_come_and_go(desk: Desk) -> None:
    """New requests find those of the file; a stream on one that is gone runs to its end."""
    turn = desk.stream()
    with desk.begin(turn) as running:
        desk.keep_answering()
        assert [desk.status(request("GET", f"/{at}/x", BY_KEY)) for at in "pq"] == [200, 404]
        assert reload(desk.daemon, ('path = "/p"', 'path = "/q"'))["changed"] == ["routes"]
        assert [desk.status(request("GET", f"/{at}/x", BY_KEY)) for at in "pq"] == [404, 200]
        finish(running, turn)
    assert trace_of(desk.daemon, path="/p/s")["end_reason"] == "complete"
    assert '"/q"' in desk.daemon.admin("/config").replace(" ", "")


def test_a_request_whose_body_comes_keeps_what_it_began_with(desk: Desk) -> None:
    """Route, provider, key and limits: whatever a reload takes away meanwhile."""
    seen = desk.keep_answering()
    whole = post("/p/x", b'{"model":"m"}', BY_KEY)
    with desk.connect() as client:
        client.send(whole[:-5])
        until(lambda: desk.daemon.metrics()["llmproxy_request_bytes_held"] > 0, "it comes")
        write_credential(desk.daemon.folder, "p-key", "second")
        reload(
            desk.daemon,
            ('path = "/p"', 'path = "/q"\nrequest_body = "3B"'),
            (digest_line(KEY), digest_line(OTHER_KEY)),
        )
        client.send(whole[-5:])
        assert read_got(client).status == 200
        assert authorization(seen.read()) == [b"Bearer first"]
        client.send(whole)
        assert read_got(client).status == 401
    assert_settles(desk.daemon)


def test_a_provider_moves(desk: Desk) -> None:
    """A stream goes on with the old one, whose idle connections are closed; new calls follow."""
    turn = desk.stream()
    ended = Notes()

    def old(wire: Wire) -> None:
        wire.read_request()
        wire.send(b"HTTP/1.1 200 OK\r\nContent-Length: 3\r\n\r\nold")
        ended.put(wire.wait_closed())

    def new(wire: Wire) -> None:
        wire.read_request()
        wire.send(b"HTTP/1.1 200 OK\r\nContent-Length: 3\r\nConnection: close\r\n\r\nnew")

    with desk.begin(turn) as running, Provider(new) as other:
        desk.script = old
        assert desk.get(GET).body == b"old"
        reload(desk.daemon, (desk.provider.url, other.url))
        assert ended.read() in ("fin", "reset")
        assert desk.get(GET).body == b"new"
        finish(running, turn)
    assert_settles(desk.daemon)


def test_a_warm_pool_stays_warm(desk: Desk) -> None:
    """Where nothing changed that its connections depend on."""
    desk.keep_answering()
    assert desk.status() == 200
    reload(desk.daemon, ('path = "/p"', 'path = "/q"'), ('dialect = "openai"', 'dialect = "raw"'))
    assert desk.status(request("GET", "/q/x", BY_KEY)) == 200
    assert desk.provider.accepted == 1


def test_whose_via_we_are_changes(desk: Desk) -> None:
    """Also for the loop that it finds."""
    seen = desk.keep_answering()
    reload(desk.daemon, ("[proxy]\n", '[proxy]\nvia = "renamed"\n'))
    assert desk.status() == 200
    assert seen.read().values(b"via") == [b"1.1 renamed"]
    assert desk.status(request("GET", "/p/x", BY_KEY, "Via: 1.1 renamed")) == 508


# --- deadlines and limits -------------------------------------------------------------------------


def test_deadlines_change(desk: Desk) -> None:
    """Of clients that are idle already, and of providers; a request keeps its own."""
    silent, turn = Turn(), desk.stream()
    with desk.begin(turn) as running, desk.connect() as idle:

        def script(wire: Wire) -> None:
            wire.read_request()
            silent.take()

        desk.script = script
        times = '[timeouts]\nclient_idle = "300ms"\nfirst_byte = "200ms"\nidle = "200ms"\n'
        reload(desk.daemon, ("[trace]", times + "[trace]"))
        assert idle.wait_closed() == "fin"
        assert desk.status() == 504  # longer than the stream's provider may be silent, too
        finish(running, turn)
        silent.give()


def test_limits_of_clients_change(desk: Desk) -> None:
    """Heads, bodies and connections; whoever is connected stays."""
    desk.keep_answering()
    long, large = request("GET", "/p/x", BY_KEY, "x-l: " + "x" * 2000), b'{"a":"%b"}' % (b"x" * 99)
    assert [desk.status(long), desk.status(post("/p/x", large, BY_KEY))] == [200, 200]
    limits = '[limits]\nrequest_head = "1KiB"\nrequest_body = "50B"\n[trace]'
    with desk.connect() as first, desk.connect() as second:
        for wire in (first, second):
            wire.send(GET)
            assert read_got(wire).status == 200
        reload(desk.daemon, ("[trace]", limits), ("[proxy]\n", "[proxy]\nmax_connections = 1\n"))
        refused = desk.get(GET)
        assert (refused.status, refused.json()["error"]["code"]) == (503, "max_connections")
        first.send(GET)
        assert read_got(first).status == 200
        second.send(post("/p/x", large, BY_KEY))
        assert read_got(second).status == 413
        first.send(long)
        assert read_got(first).status == 431
    until(lambda: desk.daemon.metrics()["llmproxy_client_connections"] == 0, "both have left")
    assert desk.status() == 200


def test_a_drain_has_the_time_of_the_last_file(desk: Desk) -> None:
    """And SIGHUP meanwhile is answered by a word, and changes nothing."""
    turn = desk.stream()
    with desk.begin(turn) as running:
        reload(desk.daemon, ("[proxy]\n", '[proxy]\ndrain_timeout = "3s"\n'))
        desk.daemon.terminate()
        desk.daemon.wait_log("draining")
        assert desk.daemon.metrics()["llmproxy_drain_remaining_seconds"] <= 3
        edit(desk.daemon, 'path = "/p"', 'path = "/q"')
        hang_up(desk.daemon)
        desk.daemon.wait_log("no reload: the process shuts down")
        assert desk.daemon.metrics()[RELOADED] == 1
        running.wait_closed()
    turn.give(3)  # its connection is gone; it need not wait out that nobody gives it a turn
    assert desk.daemon.process.wait(WAIT) == 0
    assert trace_of(desk.daemon, path="/p/s")["end_reason"] == "drained"


def test_the_loop_waits_for_the_next_start(desk: Desk) -> None:
    """The log names it, and the effective configuration shows what is in use."""
    desk.keep_answering()
    shown = json.loads(desk.daemon.admin("/config"))["proxy"]["tuned_loop"]
    text = desk.daemon.config_path.read_text()
    other = "true" if not shown else "false"
    write(
        desk.daemon,
        text.replace("tuned_loop = false\n", "").replace(
            "[proxy]\n", f"[proxy]\ntuned_loop = {other}\n"
        ),
    )
    told = reload(desk.daemon)
    assert told["message"] == "reloaded; nothing has changed; at the next start: proxy.tuned_loop"
    assert json.loads(desk.daemon.admin("/config"))["proxy"]["tuned_loop"] is shown
    assert desk.status() == 200


# --- where it listens -----------------------------------------------------------------------------


def free_port(host: str) -> int:
    """Return a port that nobody has now."""
    with socket.socket() as probe:
        probe.bind((host, 0))
        port: int = probe.getsockname()[1]
        return port


def get_at(port: int, sent: bytes = GET) -> int:
    """Return the status of a response of whoever listens there; 0 where nobody does.

    It is -1 where that one closed in the very moment.
    """
    try:
        with socket.socket() as sock:
            sock.settimeout(WAIT)
            sock.connect(("127.0.0.1", port))
            wire = Wire(sock)
            wire.send(sent)
            return read_got(wire).status
    except ConnectionRefusedError:
        return 0
    except ConnectionResetError:
        return -1


def test_listeners_come_and_go(desk: Desk) -> None:
    """The one that stays is the same; who is connected to the other one stays connected."""
    desk.keep_answering()
    port = free_port("127.0.0.1")
    home = '"tcp:0:interface=127.0.0.1"'
    line = f"listen = [{home}]"
    reload(desk.daemon, (line, f'listen = [{home}, "tcp:{port}:interface=127.0.0.1"]'))
    desk.daemon.wait_log("proxy listens on", port=port)
    assert [get_at(desk.daemon.port), get_at(port)] == [200, 200]
    with connect(port) as guest:
        guest.send(GET)
        assert read_got(guest).status == 200
        reload(desk.daemon, (f'{home}, "tcp:{port}:interface=127.0.0.1"', home))
        desk.daemon.wait_log("proxy listens no more on")
        until(lambda: get_at(port) == 0, "nobody listens")
        guest.send(GET)
        assert read_got(guest).status == 200
    assert get_at(desk.daemon.port) == 200


def test_listeners_with_tls_come_and_go(desk: Desk, tmp_path: Path) -> None:
    """A certificate that was not there at the start is shown, and measured, while it is in use."""
    desk.keep_answering()
    vault = Vault(tmp_path)
    vault.put()
    port = free_port("127.0.0.1")
    more = (
        f'listen_tls = ["tcp:{port}:interface=127.0.0.1"]\n'
        'certificate = "certificate"\nkey = "key"\n'
    )
    expires = "llmproxy_certificate_not_after_timestamp_seconds"
    reload(desk.daemon, ("[proxy]\n", "[proxy]\n" + more))
    with connect(port, tls=vault.client()) as secure:
        secure.send(GET)
        assert read_got(secure).status == 200
        assert f'{expires}{{certificate="listen_tls"}}' in desk.daemon.metrics()
        reload(desk.daemon, (more, ""))
        until(lambda: get_at(port) == 0, "nobody listens")
        assert f'{expires}{{certificate="listen_tls"}}' not in desk.daemon.metrics()
        secure.send(GET)
        assert read_got(secure).status == 200
    reload(desk.daemon, ("[proxy]\n", "[proxy]\n" + more))
    with connect(port, tls=vault.client()) as secure:
        secure.send(GET)
        assert read_got(secure).status == 200


def test_admin_listeners_move(desk: Desk) -> None:
    """Also while they are read from; Prometheus gets one of its own."""
    port, metrics = free_port("127.0.0.1"), free_port("127.0.0.1")
    admin = 'listen = "tcp:0:interface=127.0.0.1"\n'
    moved = (
        f'listen = "tcp:{port}:interface=127.0.0.1"\n'
        f'metrics_listen = "tcp:{metrics}:interface=127.0.0.1"\n'
    )
    old = desk.daemon.admin_port
    edit(desk.daemon, admin, moved)
    hang_up(desk.daemon)
    desk.daemon.wait_log("admin listens on", port=metrics)
    until(lambda: get_at(old, request("GET", "/livez")) == 0, "the old one is closed")
    paths = ["/livez", "/config"]
    assert [get_at(port, request("GET", path)) for path in paths] == [200, 200]
    assert [get_at(metrics, request("GET", path)) for path in paths] == [200, 404]


def test_a_port_that_is_taken_changes_nothing(desk: Desk) -> None:
    """The reload fails, says which, and has opened, closed and changed nothing."""
    desk.keep_answering()
    home, free = '"tcp:0:interface=127.0.0.1"]', free_port("127.0.0.1")
    with socket.create_server(("127.0.0.1", 0)) as taker:
        taken = f"tcp:{taker.getsockname()[1]}:interface=127.0.0.1"
        told = fail_to_reload(
            desk.daemon,
            (f"listen = [{home}", f'listen = ["tcp:{free}:interface=127.0.0.1", "{taken}"]'),
            ('path = "/p"', 'path = "/q"'),
            ("trace.jsonl", "other.jsonl"),
        )
        assert f"nothing has changed: {taken}: " in told["message"]
        assert [get_at(desk.daemon.port), get_at(free)] == [200, 0]
        until(lambda: len(desk.daemon.traces()) == 1, "its record is written")
    expect_failures(desk.daemon, 1)
    reload(desk.daemon)
    assert get_at(free, request("GET", "/q/x", BY_KEY)) == 200


def test_a_port_can_be_shared_later(desk: Desk, tmp_path: Path) -> None:
    """`reuse_port` counts for a port that stays open, so that a second process can join."""
    desk.keep_answering()
    (tmp_path / "second").mkdir()
    reload(desk.daemon, ("[proxy]\n", "[proxy]\nreuse_port = true\n"))
    proxy = (
        f'listen = ["tcp:{desk.daemon.port}:interface=127.0.0.1"]\n'
        "reuse_port = true\nanonymous = true"
    )
    second = Daemon(
        tmp_path / "second", provider_config(desk.provider.url), proxy=proxy, instance="2"
    )
    with second:

        def both() -> bool:
            assert desk.status() in (200, 401)  # the other one knows no key
            return bool(desk.daemon.traces() and second.traces())

        until(both, "each has served somebody")


def test_a_socket_of_systemds_is_left_and_taken_up_again(tmp_path: Path) -> None:
    """It is the same one, and its queue waits meanwhile."""
    with socket.create_server(("127.0.0.1", 0)) as systemds, Provider(_response_once) as peer:
        systemds.setblocking(False)
        port = systemds.getsockname()[1]
        inherited = '"systemd:domain=INET:name=proxy"'
        proxy = f"listen = [{inherited}]\nanonymous = true"
        with Daemon(
            tmp_path,
            provider_config(peer.url),
            proxy=proxy,
            environ={"LISTEN_FDNAMES": "proxy"},
            inherit=systemds,
        ) as daemon:
            asked = request("GET", "/p/x")
            assert get_at(port, asked) == 200
            reload(daemon, (inherited, '"tcp:0:interface=127.0.0.1"'))
            with connect(port) as early:
                early.send(asked)
                reload(daemon, ('["tcp:0:interface=127.0.0.1"]', f"[{inherited}]"))
                assert read_got(early).status == 200
            daemon.terminate()
            assert daemon.process.wait(WAIT) == 0


def _response_once(wire: Wire) -> None:
    wire.read_request()
    wire.send(OK)


# --- records --------------------------------------------------------------------------------------


def records_in(path: Path) -> list[str]:
    """Return the paths of the requests whose records are in a trace file."""
    return [json.loads(line)["path"] for line in path.read_text().splitlines()]


def test_records_move_with_the_file(desk: Desk) -> None:
    """Each is in one of both files, once: that of a stream where it ended."""
    turn = desk.stream()
    other = desk.daemon.folder / "other.jsonl"
    with desk.begin(turn) as running:
        desk.keep_answering()
        for number in range(20):
            assert desk.status(request("GET", f"/p/{number}", BY_KEY)) == 200
        reload(desk.daemon, ("trace.jsonl", "other.jsonl"))
        for number in range(20, 40):
            assert desk.status(request("GET", f"/p/{number}", BY_KEY)) == 200
        finish(running, turn)
    until(lambda: len(records_in(other)) == 21, "all are written")
    until(lambda: len(records_in(desk.daemon.trace_path)) == 20, "so is the rest")
    first, second = records_in(desk.daemon.trace_path), records_in(other)
    assert first == [f"/p/{number}" for number in range(20)]
    assert second == [f"/p/{number}" for number in range(20, 40)] + ["/p/s"]
    assert desk.daemon.metrics()['llmproxy_records_lost_total{sink="jsonl"}'] == 0


def test_sessions_are_named_by_the_new_field(desk: Desk) -> None:
    """From the next request on."""
    desk.keep_answering()
    both = ("x-session-id: one", "x-conversation: two")
    assert desk.status(request("GET", "/p/a", BY_KEY, *both)) == 200
    reload(desk.daemon, ("[trace]\n", '[trace]\nsession_header = "x-conversation"\n'))
    assert desk.status(request("GET", "/p/b", BY_KEY, *both)) == 200
    sessions = [trace_of(desk.daemon, path=f"/p/{at}")["session"] for at in "ab"]
    assert sessions == ["one", "two"]


def test_what_a_stream_captures_is_settled_when_it_begins(desk: Desk) -> None:
    """`capture` of the route that it began on."""
    turn = desk.stream()
    with desk.begin(turn, "/p/v1/chat/completions") as running:
        reload(desk.daemon, ('path = "/p"', 'path = "/p"\ncapture = "content"'))
        finish(running, turn)
    first = trace_of(desk.daemon, path="/p/v1/chat/completions")
    assert "text" not in first
    turn = desk.stream()
    with desk.begin(turn, "/p/v1/chat/completions?again") as running:
        finish(running, turn)
    until(lambda: len(desk.daemon.traces()) == 2, "both have their records")
    assert "text" in desk.daemon.traces()[1]


def test_a_log_file_is_opened_anew(tmp_path: Path) -> None:
    """Whether or not the file is good, what follows is in a file of the old name."""
    config = tmp_path / "llmproxy.toml"
    text = HEAD.format(proxy=0, admin=0) + provider_config("http://127.0.0.1:1")
    config.write_text(text)
    log = tmp_path / "x.log"
    with ExitStack() as stack:
        process = stack.enter_context(spawn(config, "--logfile", str(log)))
        stack.callback(process.terminate)
        until(lambda: log.exists() and "admin listens" in log.read_text(), "it listens")
        for number, content in enumerate((text, "nothing = 1", text)):
            log.rename(tmp_path / f"x.log.{number}")
            config.write_text(content)
            process.send_signal(signal.SIGHUP)
            word = "reload failed" if content != text else "reloaded; nothing"
            until(lambda word=word: log.exists() and word in log.read_text(), word)  # type: ignore[misc]  # the lambda's default


def spawn(config: Path, *options: str) -> subprocess.Popen[bytes]:
    """Start a daemon whose log goes where twistd's options say."""
    twistd = str(Path(sys.executable).parent / "twistd")
    return subprocess.Popen(
        [twistd, "-n", "--pidfile=", *options, "llmproxy", "--config", str(config)],
        cwd=config.parent,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )


# --- signals --------------------------------------------------------------------------------------


def test_signals_in_quick_succession_end_with_the_last_file(desk: Desk) -> None:
    """However they fall together with changes of the file."""
    desk.keep_answering()
    for number in range(10):
        edit(desk.daemon, 'path = "/p', f'path = "/p{number}')
        for _ in range(3):
            hang_up(desk.daemon)
    path = "/p9876543210/x"
    until(lambda: desk.status(request("GET", path, BY_KEY)) == 200, "the last file counts")
    assert failures(desk.daemon) == []
    assert desk.status() == 404
