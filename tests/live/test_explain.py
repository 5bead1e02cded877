"""What ``llmproxy explain`` says is what the daemon does with the same request."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

import pytest

from tests.support.daemon import ROOT, provider_table, route_table
from tests.support.live_proxy import LiveProxy, client_config, live_fixture
from tests.support.sockets import request

KEY = "llmp_team-key"
HOST = "localhost"
CONFIG = (
    provider_table(
        "o",
        *('credential = "key"', 'query = { v = "1" }', 'headers = { openai-beta = "x" }'),
        *('drop_query = ["secret"]', 'drop_headers = ["x-dropped"]'),
        url="URL/base",
    )
    + provider_table("a", 'credential = "key"', dialect="anthropic")
    + provider_table("raw", "pass_credential = true", dialect="raw")
    + route_table("/o", "o", 'models = ["m", "n"]')
    + route_table("/over", "o", 'override = { o = { model = "own" } }', 'accept_encoding = "pass"')
    + route_table("/a", "a", "strip = false")
    + route_table("/raw", "raw", "websocket = true")
    + route_table("/list", "a", 'models = ["m", "n", "k*"]', 'models_list = "configured"')
    + client_config("team", KEY, 'models = ["m", "k1", "-"]')
)
live = live_fixture(CONFIG, proxy="", credentials={"key": "sk-credential"})

ASKED = [
    # path, method, model, stream, headers
    ("/o/v1/chat/completions?x=1&secret=2", "POST", "m", True, ()),
    ("/o/v1/chat/completions", "POST", "m", False, ("X-Dropped: 1", "X-Kept: 1", "TE: trailers")),
    ("/over/v1/chat/completions", "POST", "m", True, ("Accept-Encoding: gzip",)),
    ("/over/deployments/m/chat/completions", "POST", None, False, ()),
    ("/a/v1/messages", "POST", "m", True, ("Accept: application/json", "X-Forwarded-For: 1.2.3.4")),
    ("/a/v1/models", "GET", None, False, ()),
    ("/raw/x", "GET", None, False, ("Authorization: Bearer theirs", "X-Real-IP: 1.2.3.4")),
    ("/list/v1/messages", "POST", "k1", False, ()),
    (
        *("/raw/socket", "GET", None, False),
        (
            *("Upgrade: websocket", "Connection: upgrade", "Sec-WebSocket-Version: 13"),
            *("Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==", "Sec-WebSocket-Protocol: a, b"),
        ),
    ),
]
REFUSED = [
    ("/else", "POST", "m", False, ()),
    ("/o/v1/chat/completions", "POST", "n", False, ()),
    ("/o/v1/chat/completions", "POST", "other", False, ()),
    ("/o/v1/chat/completions", "POST", None, False, ()),
    ("/over/v1/chat/completions", "POST", None, False, ()),
    ("/over/v1/chat/completions?model=m", "POST", "m", False, ()),
    ("/o/%2e%2e/x", "POST", "m", False, ()),
    ("/o/v1", "TRACE", None, False, ()),
    ("/o/v1", "POST", "m", False, ("x_api_key: 1",)),
    ("/o/v1", "POST", "m", False, ("Upgrade: websocket", "Connection: upgrade")),
    ("/raw/x", "GET", None, False, ("Upgrade: websocket", "Connection: upgrade")),
    ("/o/v1", "POST", "m", False, ("Content-Type: text/csv",)),
    ("/list/v1/models/n", "GET", None, False, ()),
]


def explain(
    live: LiveProxy, path: str, method: str, model: str | None, stream: bool, *fields: str
) -> Any:
    """Return what the command says of a request, with the file of the daemon."""
    command = [sys.executable, "-m", "llmproxy.cli.main", "explain", str(live.daemon.config_path)]
    command += ["--json", "--client", "team", "--path", path, "--method", method, "--host", HOST]
    command += [] if model is None else ["--model", model]
    command += ["--stream"] * stream
    for one in fields:
        command += ["--header", one]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert ended.stderr == ""
    report = json.loads(ended.stdout)
    assert ended.returncode == (0 if report["ok"] else 1)
    return report


def sent(path: str, method: str, model: str | None, stream: bool, *fields: str) -> bytes:
    """Return the same request as bytes."""
    said: dict[str, Any] = {} if model is None else {"model": model}
    if stream:
        said["stream"] = True
    body = json.dumps(said).encode() if method == "POST" else b""
    has_kind = any(line.startswith("Content-Type") for line in fields)
    kind = ("Content-Type: application/json",) if body and not has_kind else ()
    return request(method, path, f"x-llmproxy-key: {KEY}", *kind, *fields, body=body)


@pytest.mark.parametrize("asked", ASKED, ids=lambda one: f"{one[1]} {one[0]} {one[4]}")
def test_the_provider_gets_what_was_explained(
    live: LiveProxy, asked: tuple[str, str, str | None, bool, tuple[str, ...]]
) -> None:
    """Target, model and headers: what is added is there, and what is dropped is not."""
    path, method, model, stream, fields = asked
    report = explain(live, path, method, model, stream, *fields)
    received, got = live.ask(sent(path, method, model, stream, *fields))
    assert got.status == 200
    (one,) = report["candidates"]
    record = live.trace(got)
    assert (record["route"], record["provider"]) == (report["route"]["name"], one["provider"])
    assert record["model"] == report["model"]
    assert one["url"] == live.provider.url + received.target.decode()
    names = {name.decode() for name, _ in received.fields}
    assert set(one["adds"]) <= names
    assert names.isdisjoint(set(one["drops"]) - set(one["adds"]))
    for name, _, value in (line.partition(": ") for line in fields):
        crossed = value.encode() in received.values(name.lower().encode())
        assert crossed is (name.lower() not in one["drops"])
    given = {line.partition(":")[0].lower() for line in fields} | (
        {"content-type"} if method == "POST" else set()
    )
    framing = {"host", "content-length", "transfer-encoding"}
    assert names - framing == (given - set(one["drops"])) | set(one["adds"])
    if model is not None:
        assert json.loads(received.body)["model"] == one["model"]


@pytest.mark.parametrize("asked", REFUSED, ids=lambda one: f"{one[1]} {one[0]} {one[2]}")
def test_a_refusal_is_explained_as_it_is_sent(
    live: LiveProxy, asked: tuple[str, str, str | None, bool, tuple[str, ...]]
) -> None:
    """Status, reason and text are the same."""
    path, method, model, stream, fields = asked
    report = explain(live, path, method, model, stream, *fields)
    got = live.reject(sent(path, method, model, stream, *fields))
    refused = report["refused"]
    assert (got.status, got.error) == (refused["status"], refused["reason"])
    assert refused["message"] in got.body.decode()


def test_a_list_is_explained_as_it_is_sent(live: LiveProxy) -> None:
    """The names are those of the response."""
    report = explain(live, "/list/v1/models", "GET", None, False)
    got = live.reject(sent("/list/v1/models", "GET", None, False))
    assert [one["id"] for one in got.json()["data"]] == report["listed"] == ["m", "k1"]


def test_the_head_of_a_list_is_that_of_its_get(live: LiveProxy) -> None:
    """It has the length of the body, and no body."""
    got, head = (
        live.reject(sent("/list/v1/models", method, None, False)) for method in ("GET", "HEAD")
    )
    assert head.status == 200
    assert head.values(b"content-length") == got.values(b"content-length")
    assert head.values(b"content-type") == [b"application/json"]
    assert live.trace(head)["end_reason"] == "complete"
