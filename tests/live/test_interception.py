"""Hosts that are intercepted: from CONNECT to the provider, by TLS of a real authority."""

from __future__ import annotations

import json
import ssl
from collections.abc import Iterator

import pytest

from tests.support.live_proxy import assert_settles, post, read_response, trace_of, until
from tests.support.reloads import reload
from tests.support.sandbox import KEY, Sandbox, connect_head, open_sandbox
from tests.support.scripts import DONE, OK, SSE, Notes, event, reply
from tests.support.sockets import Wire, chunked, connect, request

CHAT = "/v1/chat/completions"


@pytest.fixture(scope="module")
def live(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Sandbox]:
    """One daemon for all tests that change nothing of it."""
    with open_sandbox(tmp_path_factory.mktemp("interception")) as live:
        yield live


@pytest.fixture(autouse=True)
def _replying(live: Sandbox) -> None:
    live.script = reply(OK)


def call(host: str, *fields: str) -> bytes:
    """Return a call of a chat API."""
    body = b'{"model":"m"}'
    return request("POST", CHAT, "Content-Type: application/json", *fields, body=body, host=host)


@pytest.mark.parametrize("host", ["inference.local", "api.openai.com"])
@pytest.mark.parametrize("where", ["connect", "request"])
def test_the_provider_gets_its_own_key_whoever_says_who_calls(
    live: Sandbox, host: str, where: str
) -> None:
    """The client's key stands on the proxy's URL, or in each request; neither crosses."""
    seen = Notes()

    def script(wire: Wire) -> None:
        seen.put(wire.read_request())
        wire.send(OK)

    live.script = script
    key, placeholder = (KEY, "placeholder") if where == "connect" else (None, KEY)
    with live.inside(host, key=key) as wire:
        wire.send(call(host, f"Authorization: Bearer {placeholder}", "X-Session-Id: s-" + where))
        got = read_response(wire)
    assert (got.status, got.body) == (200, b"ok")
    asked = seen.read()
    assert asked.values(b"authorization") == [b"Bearer the-provider-s-own"]
    assert asked.target == CHAT.encode()
    record = live.trace(got)
    assert (record["client"], record["route"], record["tunnel"]) == ("team", "native", None)
    assert_settles(live.daemon)


def test_a_connect_has_a_record_of_its_own(live: Sandbox) -> None:
    """It is complete as soon as requests can come."""
    with live.inside("inference.local", "User-Agent: first/1"):
        record = trace_of(live.daemon, user_agent="first/1")
    assert record["method"] == "CONNECT"
    assert record["path"] == "inference.local:443"
    assert (record["tunnel"], record["end_reason"], record["status"]) == (
        "intercepted",
        "complete",
        200,
    )
    assert live.daemon.metrics()['llmproxy_connects_total{outcome="intercepted"}'] >= 1


def test_tokens_come_one_by_one(live: Sandbox) -> None:
    """Each event is there before the provider sends the next one."""
    turn = live.stream(event(0), event(1), DONE)
    with live.inside("api.openai.com") as wire:
        wire.send(post(CHAT, b'{"model":"m","stream":true}').replace(b"proxy", b"api.openai.com"))
        wire.read_head()
        for piece in (event(0), event(1), DONE, b""):
            turn.give()
            assert wire.read_chunk() == piece


def test_no_session_ticket_is_sent(live: Sandbox) -> None:
    """Nobody would come back with it on another tunnel."""
    with live.inside("inference.local") as wire:
        wire.send(call("inference.local"))
        assert read_response(wire).status == 200
        assert isinstance(wire.sock, ssl.SSLSocket)
        assert wire.sock.session is None or not wire.sock.session.has_ticket


def test_many_requests_use_one_connection(live: Sandbox) -> None:
    """And each is checked anew: a wrong host in between is a 421, and the next one is served."""
    with live.inside("inference.local") as wire:
        for host, status in [("inference.local", 200), ("api.openai.com", 421)] * 3:
            wire.send(call(host))
            assert read_response(wire).status == status


def test_a_client_that_leaves_ends_the_provider_s_work(live: Sandbox) -> None:
    """As without an interception."""
    ended = live.hold(SSE, chunked(event(0)))
    with live.inside("inference.local") as wire:
        wire.send(call("inference.local"))
        wire.read_head()
        assert wire.read_chunk() == event(0)
    ended.read()
    assert_settles(live.daemon)


@pytest.mark.parametrize("where", ["connect", "request"])
def test_a_sandbox_can_measure_its_way(live: Sandbox, where: str) -> None:
    """The proxy's own paced stream is at every intercepted host, and for nobody else there."""
    key, shown = (KEY, "placeholder") if where == "connect" else (None, KEY)
    with live.inside("api.openai.com", key=key) as wire:
        for host, bearer, status in (
            ("api.openai.com", shown, 200),
            ("inference.local", shown, 421),
            *([("api.openai.com", "other", 401)] if key is None else []),
        ):
            fields = (f"Authorization: Bearer {bearer}", f"X-Request-Id: {where}-{status}")
            wire.send(request("GET", "/-/pace?n=2&interval_ms=1", *fields, host=host))
            got = read_response(wire)
            assert got.status == status
            if status == 200:
                assert got.body.count(b"data: {") == 2
    record = trace_of(live.daemon, client_request_id=f"{where}-200")
    assert (record["client"], record["route"]) == ("team", None)


HEADS = {
    "urllib on Python 3.11": b"CONNECT %b:443 HTTP/1.0\r\n%b\r\n",
    "aiohttp": b"CONNECT %b:443 HTTP/1.1\r\nHost: %b\r\nAccept: */*\r\n%b\r\n",
    "Node's fetch": b"CONNECT %b:443 HTTP/1.1\r\nhost: %b\r\nconnection: close\r\n"
    b"proxy-connection: keep-alive\r\n%b\r\n",
    "Claude Code": b"CONNECT %b:443 HTTP/1.1\r\nHost: %b:443\r\nProxy-Connection: close\r\n%b\r\n",
    "another case": b"CONNECT Inference.LOCAL.:443 HTTP/1.1\r\nHost: x\r\n%b\r\n",
}
"""How programs ask, as it was measured; names of fields and orders are theirs."""


@pytest.mark.parametrize("program", HEADS)
def test_the_connects_of_real_programs(live: Sandbox, program: str) -> None:
    """The tunnel is used whatever they say of their connection, and requests can follow."""
    host = b"inference.local"
    head = HEADS[program]
    names = [host] * (head.count(b"%b") - 1)
    head %= (*names, b"Proxy-Authorization: Bearer %b\r\n" % KEY.encode())
    with connect(live.daemon.port) as wire:
        wire.send(head)
        assert wire.read_until(b"\r\n\r\n") == b"HTTP/1.1 200 OK\r\n\r\n"
        with Wire(live.trust.wrap_socket(wire.sock, server_hostname="inference.local")) as inner:
            for _ in range(2):
                inner.send(call("inference.local"))
                assert read_response(inner).status == 200


def test_a_name_in_tls_that_is_another_one_is_421(live: Sandbox) -> None:
    """Host and CONNECT agree, and the handshake named somebody else."""
    with live.tunnel("inference.local") as wire:
        context = ssl.create_default_context(cafile=live.report["root"])
        context.check_hostname = False
        with Wire(context.wrap_socket(wire.sock, server_hostname="api.openai.com")) as inner:
            inner.send(call("inference.local"))
            got = read_response(inner)
    assert (got.status, got.error) == (421, "wrong_host")


# --- what is refused ------------------------------------------------------------------------------


def test_what_is_wrong_inside_is_told_inside(live: Sandbox) -> None:
    """In the shape of the API that the path belongs to, and not to be tried again."""
    with live.inside("api.anthropic.com", key=None) as wire:
        wire.send(request("POST", "/v1/messages", host="api.anthropic.com"))
        got = read_response(wire)
    assert (got.status, got.error) == (401, "no_key")
    assert got.values(b"x-should-retry") == [b"false"]
    assert got.json()["type"] == "error"


def test_a_connect_within_an_interception_is_405(live: Sandbox) -> None:
    """The response says what is served there, as each 405 must (RFC 9110, section 15.5.6)."""
    with live.inside("inference.local") as wire:
        wire.send(connect_head("api.openai.com"))
        got = read_response(wire)
    assert (got.status, got.error) == (405, "method")
    assert got.values(b"allow") == [b"GET, HEAD, POST, PUT, PATCH, DELETE, OPTIONS"]


def test_a_wrong_key_on_the_connect_is_407_and_the_next_one_counts(live: Sandbox) -> None:
    """On the same connection, as git does it."""
    with connect(live.daemon.port) as wire:
        wire.send(connect_head("inference.local", key="wrong"))
        got = read_response(wire)
        assert (got.status, got.error) == (407, "unknown_key")
        wire.send(connect_head("inference.local"))
        assert wire.read_until(b"\r\n\r\n") == b"HTTP/1.1 200 OK\r\n\r\n"
        with Wire(live.trust.wrap_socket(wire.sock, server_hostname="inference.local")) as inner:
            inner.send(call("inference.local"))
            assert read_response(inner).status == 200


def test_another_host_has_its_reason_in_the_status_line(live: Sandbox) -> None:
    """Nothing is listed here; the log says the same."""
    with connect(live.daemon.port) as wire:
        wire.send(connect_head("example.com"))
        first, fields = wire.read_head()
        assert first == b"HTTP/1.1 403 No host is on the tunnel list"
        body = json.loads(wire.read_body(fields))
    assert body["error"]["message"] == "No host is on the tunnel list."
    words = "No host is on the tunnel list."
    live.daemon.wait_log("CONNECT example.com:443 rejected", cause="host", detail=words)


def test_an_http_client_behind_the_connect_is_told_the_url(live: Sandbox) -> None:
    """Node's fetch sends http:// so."""
    with live.tunnel("inference.local", port=80) as wire:
        wire.send(call("inference.local"))
        got = read_response(wire)
    assert (got.status, got.error) == (403, "plain_http")
    assert "https://inference.local" in got.json()["error"]["message"]


def test_another_protocol_ends_with_a_line_in_the_log(live: Sandbox) -> None:
    """The client is dropped at once."""
    with live.tunnel("inference.local", "User-Agent: strange/1") as wire:
        wire.send(b"SSH-2.0-OpenSSH\r\n")
        wire.wait_closed()
    record = trace_of(live.daemon, user_agent="strange/1")
    assert (record["end_reason"], record["error"]) == ("rejected", "no_tls")
    live.daemon.wait_log("CONNECT", id=record["id"], detail="the client spoke neither TLS nor HTTP")


def test_a_client_that_does_not_trust_the_authority_is_in_the_log(live: Sandbox) -> None:
    """With what its TLS says, and what to do."""
    with live.tunnel("distrusted.models.example", "User-Agent: distrust/1") as wire:
        context = ssl.create_default_context()
        with pytest.raises(ssl.SSLCertVerificationError):
            context.wrap_socket(wire.sock, server_hostname="distrusted.models.example")
    record = trace_of(live.daemon, user_agent="distrust/1")
    assert (record["end_reason"], record["error"]) == ("client_gone", "tls_handshake")
    line = live.daemon.wait_log("CONNECT", id=record["id"])
    assert "does not trust the certificate (TLS alert: unknown ca)" in line["detail"]
    assert_settles(live.daemon)


def test_a_host_below_a_wildcard_has_a_leaf_of_its_own(live: Sandbox) -> None:
    """It is made when the first client asks; a model that no route has is refused inside."""
    host = "any.models.example"
    with live.inside(host) as wire:
        assert isinstance(wire.sock, ssl.SSLSocket)
        certificate = wire.sock.getpeercert()
        assert certificate
        assert certificate["subjectAltName"] == (("DNS", host),)
        wire.send(call(host))
        got = read_response(wire)
        assert (got.status, got.error) == (404, "no_route")


# --- reload ---------------------------------------------------------------------------------------


def test_a_key_that_is_taken_back_ends_its_use_on_an_open_connection(
    live: Sandbox,
) -> None:
    """Each request is checked by the configuration of its time."""
    with live.inside("inference.local") as wire:
        wire.send(call("inference.local"))
        assert read_response(wire).status == 200
        text = live.daemon.config_path.read_text()
        other = text.replace("keys = [", 'keys = ["sha256:' + "0" * 64 + '"] #')
        live.daemon.config_path.write_text(other)
        try:
            reload(live.daemon)
            wire.send(call("inference.local"))
            got = read_response(wire)
            assert (got.status, got.error) == (401, "unknown_key")
        finally:
            live.daemon.config_path.write_text(text)
            reload(live.daemon)


def test_a_host_that_is_no_more_intercepted_is_not_served_on_an_open_connection(
    live: Sandbox,
) -> None:
    """Its client is told to connect again, and meets what the host is now."""
    host = "api.openai.com"
    with live.inside(host) as wire:
        wire.send(call(host))
        assert read_response(wire).status == 200
        rest = '"api.anthropic.com", "*.models.example"'
        reload(live.daemon, (f'"{host}", {rest}', rest))
        try:
            wire.send(call(host))
            got = read_response(wire)
            assert (got.status, got.error) == (421, "not_intercepted")
            assert got.values(b"connection") == [b"close"]
            with connect(live.daemon.port) as again:
                again.send(connect_head(host))
                assert read_response(again).error == "tunnel_refused"
        finally:
            reload(live.daemon, (rest, f'"{host}", {rest}'))


def test_everything_is_let_go_of(live: Sandbox) -> None:
    """After all of the above."""
    until(lambda: live.gauge("client_connections") == 0, "no client is left")
    assert_settles(live.daemon)
