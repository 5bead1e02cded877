"""Keys, credentials, queries and contents are in no log, record, error or page."""

from __future__ import annotations

import json
import urllib.request
from pathlib import Path

from tests.support.daemon import Daemon, provider_config, provider_table, route_table
from tests.support.live_proxy import (
    client_config,
    post,
    read_response,
    response,
    until,
    write_credential,
)
from tests.support.scripts import SSE
from tests.support.sockets import WAIT, Provider, Wire, connect, request

KEY = "llmp_KEY-of-the-client"
FIELDS = {
    "x-llmproxy-key": KEY,
    "Authorization": f"Bearer {KEY}",
    "x-api-key": KEY,
    "api-key": KEY,
    "x-goog-api-key": KEY,
}
SECRETS = (
    "KEY-of-the-client",
    "WRONG-key",
    "CREDENTIAL-of-the-provider",
    "QUERY-secret",
    "CONTENT-of-the-body",
    "COOKIE-of-the-client",
    "ANSWER-of-the-provider",
    "HEADER-default",
    "PASSED-credential",
)


def script(wire: Wire) -> None:
    """Answer, refuse, break off or talk nonsense, as the path asks."""
    received = wire.read_request()
    if b"refuse" in received.target:
        text = b'{"error":"Incorrect API key: CREDENTIAL-of-the-provider, ANSWER-of-the-provider"}'
        wire.send(response(401, "WWW-Authenticate: ANSWER-of-the-provider", body=text))
    elif b"break" in received.target:
        wire.send(SSE, b"7\r\nANSWER-of-the-provider")
    elif b"nonsense" in received.target:
        wire.send(
            b"HTTP/1.1 200 ANSWER-of-the-provider\r\nBad Header: ANSWER-of-the-provider\r\n\r\n"
        )
    elif b"hang" in received.target:
        wire.wait_closed()
    else:
        wire.send(response(200, "Set-Cookie: s=ANSWER-of-the-provider", body=b"fine"))


def requests() -> list[bytes]:
    """Return requests that carry every secret, to good and to bad ends."""
    cookie = "Cookie: c=COOKIE-of-the-client"
    body = b'{"model":"m","messages":["CONTENT-of-the-body"]}'
    known = f"x-llmproxy-key: {KEY}"
    sent = [
        request("GET", "/p/x?k=QUERY-secret", f"{name}: {value}", cookie)
        for name, value in FIELDS.items()
    ]
    sent += [
        request("GET", "/p/x?k=QUERY-secret", f"{name}: {value.replace(KEY, 'WRONG-key')}")
        for name, value in FIELDS.items()
    ]
    sent += [
        post(f"/p/{what}?k=QUERY-secret", body, known, cookie)
        for what in ("x", "refuse", "break", "nonsense", "hang")
    ]
    sent += [
        post("/p/x?k=QUERY-secret", body[:-1] + b"CONTENT-of-the-body", known),
        post("/dead/x?k=QUERY-secret", body, known),
        post("/nowhere?k=QUERY-secret", body, known),
        post("/p/../x?k=QUERY-secret", body, known),
        post("/pass/x?k=QUERY-secret", body, known, "x-api-key: PASSED-credential"),
        request("GET", "/p/x?k=QUERY-secret", known, "x_api_key: WRONG-key"),
        request("TRACE", "/p/x?k=QUERY-secret", known),
        request("GET", "http://QUERY-secret@host/p/x?k=QUERY-secret", known),
        b"QUERY-secret\r\n\r\n",
        request("GET", "/p/x?k=QUERY-secret", known, "KEY-of-the-client"),
        request("POST", "/p/x?k=QUERY-secret", known, "Content-Length: KEY-of-the-client"),
    ]
    return sent


def test_no_secret_is_shown_anywhere(tmp_path: Path) -> None:
    """Logs, records, pages and the proxy's own errors are searched."""
    credentials = write_credential(tmp_path, "key", "sk-CREDENTIAL-of-the-provider")
    keys = 'credential = "key"\nheaders = { x-secret = "HEADER-default" }\n'
    more = (
        provider_table("dead", 'credential = "key"', url="http://127.0.0.1:1")
        + route_table("/dead", "dead")
        + provider_table("pass", "pass_credential = true")
        + route_table("/pass", "pass")
        + '[timeouts]\nfirst_byte = "300ms"\n'
    )
    shown: list[bytes] = []
    errors: list[bytes] = []
    with Provider(script) as provider:
        config = provider_config(provider.url, provider=keys) + more.replace("URL", provider.url)
        config += credentials + client_config("team", KEY)
        with Daemon(tmp_path, config, proxy="") as daemon:
            for sent in requests():
                with connect(daemon.port) as client:
                    client.send(sent)
                    if b"/break" in sent:
                        client.wait_closed()
                        continue
                    got = read_response(client)
                    if got.values(b"x-llmproxy-error"):
                        errors += [got.body, repr(got.fields).encode()]
            shown += [daemon.admin(path).encode() for path in ("/config", "/metrics")]
            count = len(daemon.wait_ended(len(requests()) - 4))
            until(lambda: len(daemon.traces()) >= count, "all records are written")
        shown += [json.dumps(daemon.log).encode(), daemon.errors.encode()]
        shown.append(daemon.trace_path.read_bytes())
    assert len(errors) > 20
    everything = b"\n".join([*shown, *errors])
    for secret in SECRETS:
        assert secret.encode() not in everything, secret
    for inside in (b"127.0.0.1", b".py", b"Traceback"):
        assert inside not in b"".join(errors)


def test_the_effective_configuration_is_shown_without_secrets(tmp_path: Path) -> None:
    """A credential is true, keys are a count, of added headers only the names are there."""
    credentials = write_credential(tmp_path, "key", "sk-CREDENTIAL-of-the-provider")
    keys = 'credential = "key"\nheaders = { x-secret = "HEADER-default" }\n'
    config = provider_config("http://127.0.0.1:1", provider=keys) + credentials
    with Daemon(tmp_path, config + client_config("team", KEY), proxy="") as daemon:
        url = f"http://127.0.0.1:{daemon.admin_port}/config"
        with urllib.request.urlopen(url, timeout=WAIT) as got:
            assert got.headers["Content-Type"] == "application/json"
            shown = json.loads(got.read())
    assert shown["providers"]["p"]["credential"] is True
    assert shown["providers"]["p"]["headers"] == ["x-secret"]
    assert shown["clients"]["team"]["keys"] == 1
    assert shown["timeouts"]["connect"] == "10s"
    assert shown["limits"]["request_body"] == "32MiB"
    assert shown["routes"][0]["path"] == "/p"
