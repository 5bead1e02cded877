"""SIGHUP at a running daemon: all of its file takes effect, or nothing does (ADR-0014)."""

from __future__ import annotations

import json
import signal
import socket
import subprocess
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from tests.live.test_starting import HEAD
from tests.support.daemon import Daemon, environment, provider_config, twistd
from tests.support.keypairs import LISTEN_TLS, Vault
from tests.support.live_proxy import (
    STREAM_BODY,
    LiveProxy,
    assert_settles,
    client_config,
    post,
    read_response,
    read_stepwise,
    response,
    trace_of,
    until,
    write_credential,
)
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
from tests.support.scripts import KEPT, OK, Notes, Turn, event, reply
from tests.support.sockets import WAIT, Provider, Received, Wire, connect, request
from tests.support.tls_proxy import EXPIRES

KEY, OTHER_KEY = "key-of-team", "another-key-of-team"
EVENTS = [*map(event, range(3))]
BY_KEY = f"x-api-key: {KEY}"
GET = request("GET", "/p/x", BY_KEY)


class ReloadedProxy(LiveProxy):
    """A live proxy with a client ``team`` and a provider with a credential."""

    def keep_replying(self) -> Notes:
        """Let the provider reply to each request, on kept connections; return what it gets."""
        seen = Notes()

        def script(wire: Wire) -> None:
            while True:
                seen.put(wire.read_request())
                wire.send(KEPT)

        self.script = script
        return seen

    def begin_stream(self, path: str = "/p/s") -> tuple[Wire, Turn]:
        """Begin a stream of ``EVENTS`` and read the first; return what the rest takes turns of."""
        turn = self.stream(*EVENTS)
        client = self.begin(path, STREAM_BODY, BY_KEY)
        turn.give()
        assert client.read_chunk() == EVENTS[0]
        return client, turn

    def status(self, sent: bytes = GET) -> int:
        """Return the status of a response on a connection of its own."""
        return self.get(sent).status


def finish(client: Wire, turn: Turn) -> None:
    """Read a stream that was begun to its end."""
    read_stepwise(client, turn, *EVENTS[1:], b"")


@pytest.fixture
def live(tmp_path: Path) -> Iterator[ReloadedProxy]:
    """A daemon before one provider, and what its operator may do."""
    credentials = write_credential(tmp_path, "p-key", "first")
    live = ReloadedProxy()
    config = (
        credentials
        + provider_config(live.provider.url, provider='credential = "p-key"')
        + client_config("team", KEY)
    )
    with live.provider, Daemon(tmp_path, config, proxy="") as live.daemon:
        yield live


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
    "an address that cannot be": (
        '"tcp:0:interface=127.0.0.1"',
        '"tcp:0:interface=127.0.0.2", "tcp:0:interface=203.0.113.1"',
    ),
    "a trace file that cannot be": ("trace.jsonl", "no-folder/trace.jsonl"),
}


@pytest.mark.parametrize("bad", BAD.values(), ids=BAD)
def test_a_bad_file_changes_nothing(live: ReloadedProxy, bad: tuple[str, str]) -> None:
    """Listeners, keys, routes and connections stay; the log and a metric say so; then it heals."""
    seen = live.keep_replying()
    with live.connect() as kept:
        kept.send(GET)
        assert read_response(kept).body == b"ok"
        old, new = bad
        text = live.daemon.config_path.read_text()
        # All the rest of the file is good, and would close the route and lock the client out.
        better = text.replace(old, new, 1)
        better = better.replace('path = "/p"', 'path = "/q"').replace(
            digest_line(KEY), digest_line(OTHER_KEY)
        )
        at_first = live.daemon.metrics()[RELOADED_AT]
        write(live.daemon, better)
        line = fail_to_reload(live.daemon)
        assert line["problems"]
        assert line["message"].startswith("reload failed, nothing has changed: ")
        metrics = live.daemon.metrics()
        assert (metrics[RELOADED], metrics[RELOADED_AT]) == (0, at_first)
        for wire in (kept, live.connect()):
            with wire:
                wire.send(GET)
                assert read_response(wire).body == b"ok"
        assert seen.read().target == b"/x"
        until(lambda: len(live.daemon.traces()) == 3, "records are written")

    expect_failures(live.daemon, 1)
    write(live.daemon, text)
    reload(live.daemon)
    assert live.daemon.metrics()[RELOADED] == 1
    assert live.status() == 200


# --- who may call, and where it goes --------------------------------------------------------------


def test_a_rotated_credential_is_used_by_the_next_request(live: ReloadedProxy) -> None:
    """A stream goes on, and no connection of the old key is used again."""
    running, turn = live.begin_stream()
    with running:
        seen = live.keep_replying()
        assert live.status() == 200
        assert authorization(seen.read()) == [b"Bearer first"]
        accepted = live.provider.accepted
        write_credential(live.daemon.folder, "p-key", "second")
        assert live.status() == 200
        assert authorization(seen.read()) == [b"Bearer first"]
        assert live.provider.accepted == accepted
        assert reload(live.daemon)["changed"] == ["providers.p"]
        assert live.status() == 200
        assert authorization(seen.read()) == [b"Bearer second"]
        assert live.provider.accepted == accepted + 1
        idle = 'llmproxy_upstream_connections{provider="p",state="idle"}'
        until(lambda: live.daemon.metrics()[idle] == 1, "what was idle is closed")
        finish(running, turn)
    assert_settles(live.daemon)


def test_a_revoked_key_is_rejected_on_the_same_connection(live: ReloadedProxy) -> None:
    """Its next request is refused, its stream goes on, and a new key is served."""
    running, turn = live.begin_stream()
    with running, live.connect() as kept:
        live.keep_replying()
        kept.send(GET)
        assert read_response(kept).status == 200
        line = reload(live.daemon, (digest_line(KEY), digest_line(OTHER_KEY)))
        assert line["changed"] == ["clients.team"]
        kept.send(GET)
        assert read_response(kept).status == 401
        kept.send(request("GET", "/p/x", f"x-api-key: {OTHER_KEY}"))
        assert read_response(kept).status == 200
        finish(running, turn)
        running.send(GET)
        assert read_response(running).status == 401
    assert KEY not in json.dumps(live.daemon.log)


def test_routes_come_and_go(live: ReloadedProxy) -> None:
    """New requests find the routes of the file; a stream on a removed route runs to its end."""
    running, turn = live.begin_stream()
    with running:
        live.keep_replying()
        assert [live.status(request("GET", f"/{at}/x", BY_KEY)) for at in "pq"] == [200, 404]
        assert reload(live.daemon, ('path = "/p"', 'path = "/q"'))["changed"] == ["routes"]
        assert [live.status(request("GET", f"/{at}/x", BY_KEY)) for at in "pq"] == [404, 200]
        finish(running, turn)
    assert trace_of(live.daemon, path="/p/s")["end_reason"] == "complete"
    assert '"/q"' in live.daemon.admin("/config").replace(" ", "")


def test_a_request_whose_body_comes_keeps_what_it_began_with(live: ReloadedProxy) -> None:
    """It keeps route, provider, key and limits, although a reload removes them meanwhile."""
    seen = live.keep_replying()
    whole = post("/p/x", b'{"model":"m"}', BY_KEY)
    with live.connect() as client:
        client.send(whole[:-5])
        until(lambda: live.gauge("request_bytes_held") > 0, "it comes")
        write_credential(live.daemon.folder, "p-key", "second")
        reload(
            live.daemon,
            ('path = "/p"', 'path = "/q"\nrequest_body = "3B"'),
            (digest_line(KEY), digest_line(OTHER_KEY)),
        )
        client.send(whole[-5:])
        assert read_response(client).status == 200
        assert authorization(seen.read()) == [b"Bearer first"]
        client.send(whole)
        assert read_response(client).status == 401
    assert_settles(live.daemon)


def test_a_provider_moves(live: ReloadedProxy) -> None:
    """A stream stays with the old provider, whose idle connections are closed; new calls move."""
    running, turn = live.begin_stream()
    ended = Notes()

    def old(wire: Wire) -> None:
        wire.read_request()
        wire.send(b"HTTP/1.1 200 OK\r\nContent-Length: 3\r\n\r\nold")
        ended.put(wire.wait_closed())

    new = reply(response(200, body=b"new"))
    with running, Provider(new) as other:
        live.script = old
        assert live.get(GET).body == b"old"
        reload(live.daemon, (live.provider.url, other.url))
        assert ended.read() in ("fin", "reset")
        assert live.get(GET).body == b"new"
        finish(running, turn)
    assert_settles(live.daemon)


def test_a_warm_pool_stays_warm(live: ReloadedProxy) -> None:
    """Connections are kept if nothing changed that they depend on."""
    live.keep_replying()
    assert live.status() == 200
    reload(live.daemon, ('path = "/p"', 'path = "/q"'), ('dialect = "openai"', 'dialect = "raw"'))
    assert live.status(request("GET", "/q/x", BY_KEY)) == 200
    assert live.provider.accepted == 1


def test_via_and_session_field_change(live: ReloadedProxy) -> None:
    """The next request has them, and a loop is found by the new name."""
    seen = live.keep_replying()
    both = ("x-session-id: one", "x-conversation: two")
    assert live.status(request("GET", "/p/a", BY_KEY, *both)) == 200
    seen.read()
    reload(
        live.daemon,
        ("[proxy]\n", '[proxy]\nvia = "renamed"\n'),
        ("[trace]\n", '[trace]\nsession_header = "x-conversation"\n'),
    )
    assert live.status(request("GET", "/p/b", BY_KEY, *both)) == 200
    assert seen.read().values(b"via") == [b"1.1 renamed"]
    assert live.status(request("GET", "/p/x", BY_KEY, "Via: 1.1 renamed")) == 508
    sessions = [trace_of(live.daemon, path=f"/p/{at}")["session"] for at in "ab"]
    assert sessions == ["one", "two"]


# --- deadlines and limits -------------------------------------------------------------------------


def test_deadlines_change(live: ReloadedProxy) -> None:
    """Those of idle clients and of providers do; a running request keeps its own."""
    running, turn = live.begin_stream()
    silent = Turn()
    with running, live.connect() as idle:

        def script(wire: Wire) -> None:
            wire.read_request()
            silent.take()

        live.script = script
        times = '[timeouts]\nclient_idle = "300ms"\nfirst_byte = "200ms"\nidle = "200ms"\n'
        reload(live.daemon, ("[trace]", times + "[trace]"))
        assert idle.wait_closed() == "fin"
        assert live.status() == 504  # longer than the stream's provider may be silent, too
        finish(running, turn)
        silent.give()


def test_limits_of_clients_change(live: ReloadedProxy) -> None:
    """Those of heads, bodies and connections do; a connected client stays."""
    live.keep_replying()
    long, large = request("GET", "/p/x", BY_KEY, "x-l: " + "x" * 2000), b'{"a":"%b"}' % (b"x" * 99)
    assert [live.status(long), live.status(post("/p/x", large, BY_KEY))] == [200, 200]
    limits = '[limits]\nrequest_head = "1KiB"\nrequest_body = "50B"\n[trace]'
    with live.connect() as first, live.connect() as second:
        for wire in (first, second):
            wire.send(GET)
            assert read_response(wire).status == 200
        reload(live.daemon, ("[trace]", limits), ("[proxy]\n", "[proxy]\nmax_connections = 1\n"))
        refused = live.get(GET)
        assert (refused.status, refused.json()["error"]["code"]) == (503, "max_connections")
        first.send(GET)
        assert read_response(first).status == 200
        second.send(post("/p/x", large, BY_KEY))
        assert read_response(second).status == 413
        first.send(long)
        assert read_response(first).status == 431
    until(lambda: live.gauge("client_connections") == 0, "both have left")
    assert live.status() == 200


def test_a_drain_has_the_time_of_the_last_file(live: ReloadedProxy) -> None:
    """SIGHUP meanwhile logs a word, and changes nothing."""
    running, turn = live.begin_stream()
    with running:
        reload(live.daemon, ("[proxy]\n", '[proxy]\ndrain_timeout = "3s"\n'))
        live.daemon.terminate()
        live.daemon.wait_log("draining")
        assert live.gauge("drain_remaining_seconds") <= 3
        edit(live.daemon, 'path = "/p"', 'path = "/q"')
        hang_up(live.daemon)
        live.daemon.wait_log("no reload: the process shuts down")
        assert live.daemon.metrics()[RELOADED] == 1
        running.wait_closed()
    turn.give(3)  # its connection is gone; it need not wait out that nobody gives it a turn
    assert live.daemon.process.wait(WAIT) == 0
    assert trace_of(live.daemon, path="/p/s")["end_reason"] == "drained"


def test_the_loop_waits_for_the_next_start(live: ReloadedProxy) -> None:
    """The log names the key, and /config shows the value in use."""
    live.keep_replying()
    shown = json.loads(live.daemon.admin("/config"))["proxy"]["tuned_loop"]
    text = live.daemon.config_path.read_text()
    other = "true" if not shown else "false"
    write(
        live.daemon,
        text.replace("tuned_loop = false\n", "").replace(
            "[proxy]\n", f"[proxy]\ntuned_loop = {other}\n"
        ),
    )
    line = reload(live.daemon)
    assert line["message"] == "reloaded; nothing has changed; at the next start: proxy.tuned_loop"
    assert json.loads(live.daemon.admin("/config"))["proxy"]["tuned_loop"] is shown
    assert live.status() == 200


# --- where it listens -----------------------------------------------------------------------------


def free_port(host: str) -> int:
    """Return a port that nobody has now."""
    with socket.socket() as probe:
        probe.bind((host, 0))
        port: int = probe.getsockname()[1]
        return port


def get_at(port: int, sent: bytes = GET) -> int:
    """Return the status of a response on that port; 0 where nobody listens.

    It is -1 where that one closed in the very moment.
    """
    try:
        with socket.socket() as sock:
            sock.settimeout(WAIT)
            sock.connect(("127.0.0.1", port))
            wire = Wire(sock)
            wire.send(sent)
            return read_response(wire).status
    except ConnectionRefusedError:
        return 0
    except ConnectionResetError:
        return -1


def test_listeners_come_and_go(live: ReloadedProxy) -> None:
    """The listener that stays is the same; clients of the other one stay connected."""
    live.keep_replying()
    port = free_port("127.0.0.1")
    home = '"tcp:0:interface=127.0.0.1"'
    line = f"listen = [{home}]"
    reload(live.daemon, (line, f'listen = [{home}, "tcp:{port}:interface=127.0.0.1"]'))
    live.daemon.wait_log("proxy listens on", port=port)
    assert [get_at(live.daemon.port), get_at(port)] == [200, 200]
    with connect(port) as guest:
        guest.send(GET)
        assert read_response(guest).status == 200
        reload(live.daemon, (f'{home}, "tcp:{port}:interface=127.0.0.1"', home))
        live.daemon.wait_log("proxy listens no more on")
        until(lambda: get_at(port) == 0, "nobody listens")
        guest.send(GET)
        assert read_response(guest).status == 200
    assert get_at(live.daemon.port) == 200


def test_listeners_with_tls_come_and_go(live: ReloadedProxy, tmp_path: Path) -> None:
    """A certificate that was not there at the start is shown, and measured, while it is in use."""
    live.keep_replying()
    vault = Vault(tmp_path)
    vault.put()
    port = free_port("127.0.0.1")
    more = LISTEN_TLS.replace("tcp:0", f"tcp:{port}")
    reload(live.daemon, ("[proxy]\n", "[proxy]\n" + more))
    with connect(port, tls=vault.client()) as secure:
        secure.send(GET)
        assert read_response(secure).status == 200
        assert EXPIRES in live.daemon.metrics()
        reload(live.daemon, (more, ""))
        until(lambda: get_at(port) == 0, "nobody listens")
        assert EXPIRES not in live.daemon.metrics()
        secure.send(GET)
        assert read_response(secure).status == 200


def test_a_socket_of_systemds_is_left_and_taken_up_again(tmp_path: Path) -> None:
    """It is the same socket, and its queue waits meanwhile."""
    with socket.create_server(("127.0.0.1", 0)) as systemds, Provider(reply(OK)) as peer:
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
                assert read_response(early).status == 200
            daemon.terminate()
            assert daemon.process.wait(WAIT) == 0


# --- records --------------------------------------------------------------------------------------


def records_in(path: Path) -> list[str]:
    """Return the paths of the requests whose records are in a trace file."""
    return [json.loads(line)["path"] for line in path.read_text().splitlines()]


def test_records_move_with_the_file(live: ReloadedProxy) -> None:
    """Each record is in one of both files, once; a stream's is in the later one."""
    running, turn = live.begin_stream()
    other = live.daemon.folder / "other.jsonl"
    with running:
        live.keep_replying()
        for number in range(20):
            assert live.status(request("GET", f"/p/{number}", BY_KEY)) == 200
        reload(live.daemon, ("trace.jsonl", "other.jsonl"))
        for number in range(20, 40):
            assert live.status(request("GET", f"/p/{number}", BY_KEY)) == 200
        finish(running, turn)
    until(lambda: len(records_in(other)) == 21, "all are written")
    until(lambda: len(records_in(live.daemon.trace_path)) == 20, "so is the rest")
    first, second = records_in(live.daemon.trace_path), records_in(other)
    assert first == [f"/p/{number}" for number in range(20)]
    assert second == [f"/p/{number}" for number in range(20, 40)] + ["/p/s"]
    assert live.daemon.metrics()['llmproxy_records_lost_total{sink="jsonl"}'] == 0


def test_what_a_stream_captures_is_settled_when_it_begins(live: ReloadedProxy) -> None:
    """The route that it began on decides on `capture`."""
    running, turn = live.begin_stream("/p/v1/chat/completions")
    with running:
        reload(live.daemon, ('path = "/p"', 'path = "/p"\ncapture = "content"'))
        finish(running, turn)
    first = trace_of(live.daemon, path="/p/v1/chat/completions")
    assert "text" not in first
    running, turn = live.begin_stream("/p/v1/chat/completions?again")
    with running:
        finish(running, turn)
    until(lambda: len(live.daemon.traces()) == 2, "both have their records")
    assert "text" in live.daemon.traces()[1]


def test_a_log_file_is_opened_anew(tmp_path: Path) -> None:
    """The following lines are in a file of the old name, whether or not the file is good."""
    config = tmp_path / "llmproxy.toml"
    text = HEAD.format(proxy=0, admin=0) + provider_config("http://127.0.0.1:1")
    config.write_text(text)
    log = tmp_path / "x.log"
    with ExitStack() as stack:
        command = twistd(config, "--logfile", str(log))
        process = stack.enter_context(subprocess.Popen(command, cwd=tmp_path, env=environment()))
        stack.callback(process.terminate)
        until(lambda: log.exists() and "admin listens" in log.read_text(), "it listens")
        for number, content in enumerate((text, "nothing = 1", text)):
            log.rename(tmp_path / f"x.log.{number}")
            config.write_text(content)
            process.send_signal(signal.SIGHUP)
            word = "reload failed" if content != text else "reloaded; nothing"
            until(lambda word=word: log.exists() and word in log.read_text(), word)  # type: ignore[misc]  # the lambda's default


# --- signals --------------------------------------------------------------------------------------


def test_signals_in_quick_succession_end_with_the_last_file(live: ReloadedProxy) -> None:
    """The last file counts, whenever the signals come."""
    live.keep_replying()
    for number in range(10):
        edit(live.daemon, 'path = "/p', f'path = "/p{number}')
        for _ in range(3):
            hang_up(live.daemon)
    path = "/p9876543210/x"
    until(lambda: live.status(request("GET", path, BY_KEY)) == 200, "the last file counts")
    assert failures(live.daemon) == []
    assert live.status() == 404
