"""Whatever model a real FastAPI, Go or Node server sees in a request is one that the rules allow.

Each server (``tests/support/readers``) reads a request in every way that its own library has, and
says which models it found.  Requests of all kinds are sent to them through the daemon.  A request
is refused, or every model that a server saw is allowed; how the proxy reads it is not asked.
"""

from __future__ import annotations

import gzip
import json
import os
import shutil
import subprocess
import sys
import zlib
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import NamedTuple

import brotli
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.support.daemon import Daemon, provider_table, route_table
from tests.support.live_proxy import Response, client_config, read_response
from tests.support.sockets import connect, request

READERS = Path(__file__).parents[1] / "support" / "readers"
JSON = "Content-Type: application/json"
RULES = {
    "limited": ("", "limited-key"),
    "few": ('models = ["cheap*", "-"]', "any-key"),
    "over": ('[routes.override]\n{} = {{ model = "prod" }}', "any-key"),
}


class Peers(NamedTuple):
    """The daemon, and the port of each server that can be run here by its name."""

    daemon: Daemon
    ports: dict[str, int]

    def through(self, rule: str, server: str, sent: Sent) -> Response:
        """Send a request through the daemon."""
        fields = (*sent.fields, f"x-llmproxy-key: {RULES[rule][1]}")
        target = f"/{rule}-{server}{sent.target}"
        return ask(self.daemon.port, request(sent.method, target, *fields, body=sent.body))

    def straight(self, server: str, sent: Sent) -> list[str]:
        """Return what a server sees without the daemon."""
        text = request(sent.method, sent.target, *sent.fields, "Connection: close", body=sent.body)
        seen: list[str] = ask(self.ports[server], text).json()["seen"]
        return seen


class Sent(NamedTuple):
    """A request, without its key."""

    target: str = "/chat"
    fields: tuple[str, ...] = (JSON,)
    body: bytes = b""
    method: str = "POST"


def ask(port: int, sent: bytes) -> Response:
    """Send one request on a connection of its own."""
    with connect(port) as wire:
        wire.send(sent)
        return read_response(wire)


def is_allowed(rule: str, model: str) -> bool:
    """Return whether a server may see a model."""
    return model == "prod" if rule == "over" else model.startswith("cheap")


@contextmanager
def running(*command: str) -> Iterator[int]:
    """Run a server, and yield the port that it prints first."""
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            yield int(process.stdout.readline())
        finally:
            process.kill()


def commands(folder: Path) -> dict[str, tuple[str, ...]]:
    """Return how each server is run that can be run here."""
    found: dict[str, tuple[str, ...]] = {"fastapi": (sys.executable, str(READERS / "reader.py"))}
    if (node := shutil.which("node")) is not None:
        found["node"] = (node, str(READERS / "reader.mjs"))
    if (go := shutil.which("go")) is not None:
        program = str(folder / "reader")
        environ = {**os.environ, "GOCACHE": str(folder / "cache"), "GO111MODULE": "off"}
        build = [go, "build", "-o", program, str(READERS / "reader.go")]
        subprocess.run(build, check=True, env=environ)
        found["go"] = (program,)
    return found


@pytest.fixture(scope="module")
def peers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Peers]:
    """Every server that can be run here, behind one daemon."""
    folder = tmp_path_factory.mktemp("seen")
    with ExitStack() as stack:
        ports = {
            name: stack.enter_context(running(*command))
            for name, command in commands(folder).items()
        }
        config = client_config("limited", "limited-key", 'models = ["cheap*", "-"]')
        config += client_config("any", "any-key")
        for name, port in ports.items():
            config += provider_table(name, url=f"http://127.0.0.1:{port}")
            for rule, (keys, _) in RULES.items():
                config += route_table(f"/{rule}-{name}", name, keys.format(name))
        yield Peers(stack.enter_context(Daemon(folder, config)), ports)


# --- requests that try to walk around the rules ---------------------------------------------------

UTF_7 = b'{"model":"cheap","x":"+ACIALAAi-model+ACIAOgAi-big"}'
FORM = "Content-Type: multipart/form-data; boundary=b"


def form(*fields: tuple[str, str], boundary: str = "b") -> bytes:
    """Write a multipart form."""
    parts = (
        f'--{boundary}\r\nContent-Disposition: form-data; name="{name}"\r\n\r\n{value}\r\n'
        for name, value in fields
    )
    return "".join((*parts, f"--{boundary}--\r\n")).encode()


TRICKS = {
    "octets": Sent(fields=("Content-Type: application/octet-stream",), body=b'{"model":"big"}'),
    "no type": Sent(fields=(), body=b'{"model":"big"}'),
    "text": Sent(fields=("Content-Type: text/plain",), body=b" " * 65 + b'{"model":"big"}'),
    "case": Sent(body=b'{"Model":"big"}'),
    "two": Sent(body=b'{"model":"cheap","MODEL":"big"}'),
    "escape": Sent(body=rb'{"model":"cheap","mod\u0065l":"big"}'),
    "tail": Sent(fields=("Content-Type: text/plain",), body=b'{"model":"big"} x'),
    "utf-16": Sent(fields=("Content-Type: x/y",), body='{"model":"big"}'.encode("utf-16")),
    "form": Sent(fields=(FORM,), body=form(("model", "big"))),
    "urlencoded": Sent(
        fields=("Content-Type: application/x-www-form-urlencoded",), body=b"model=big"
    ),
    "path": Sent("/x/deployments/big/chat", body=b'{"model":"cheap"}'),
    "encoded path": Sent("/x/deployments%2Fbig/chat", body=b'{"model":"cheap"}'),
    "slashes": Sent("/x/deployments//big/chat", body=b'{"model":"cheap"}'),
    "parameters": Sent("/x/deployments;a=b/big/chat", body=b'{"model":"cheap"}'),
    "slashes in a name": Sent("/x/models/org/big:generate", body=b'{"model":"cheap"}'),
    "predictions": Sent("/x/models/org/big/predictions", body=b'{"model":"cheap"}'),
    "bedrock": Sent("/x/model/big/invoke", body=b'{"model":"cheap"}'),
    "query": Sent("/chat?model=big", body=b'{"model":"cheap"}'),
    "comma": Sent(fields=("Content-Type: application/json, a/b",), body=b'{"model":"big"}'),
    "nbsp": Sent(fields=("Content-Type: application/json\xa0",), body=b'{"model":"big"}'),
    "nominated": Sent(fields=(FORM, "Connection: content-type"), body=form(("model", "big"))),
    "gzip": Sent(fields=(JSON, "Content-Encoding: gzip"), body=gzip.compress(b'{"model":"big"}')),
    "get": Sent(method="GET", body=b'{"model":"big"}'),
}


def test_the_servers_see_what_the_tricks_hide(peers: Peers) -> None:
    """Sent straight, every trick shows some server its model; or they would prove little."""
    assert set(peers.ports) >= {"fastapi"}
    for name, sent in TRICKS.items():
        seen = [model for server in peers.ports for model in peers.straight(server, sent)]
        if set(peers.ports) == {"fastapi", "go", "node"}:
            assert {"big", "org/big"} & set(seen), name


@pytest.mark.parametrize("server", ["fastapi", "go", "node"])
@pytest.mark.parametrize("rule", RULES)
def test_no_trick_walks_around_the_rules(peers: Peers, rule: str, server: str) -> None:
    """Each is refused, or the server sees what it may see."""
    if server not in peers.ports:
        pytest.skip(f"{server} is not installed")
    for sent in TRICKS.values():
        check(peers, rule, server, sent)


def check(peers: Peers, rule: str, server: str, sent: Sent) -> bool:
    """Check one request; return whether it was let through."""
    got = peers.through(rule, server, sent)
    if got.error is not None:
        assert got.status in (400, 403, 404, 415), (got, sent)
        return False
    if got.status != 200:  # the server's own refusal
        return False
    bad = [model for model in got.json()["seen"] if not is_allowed(rule, model)]
    assert not bad, (rule, server, bad, sent)
    return True


# --- a search for others --------------------------------------------------------------------------

_NAMES = st.sampled_from(
    [*["model"] * 6, "Model", "MODEL", r"mod\u0065l", r"\u006dodel", "model ", "models", "x"]
)
_MODELS = st.sampled_from([*["cheap"] * 4, "cheap-2", "big", "BIG", "", "cheap/big", "big/cheap"])
_VALUES = st.one_of(
    _MODELS.map(json.dumps),
    st.sampled_from(
        ["null", "1", '["big"]', '{"model":"big"}', r'"ch\u0065ap"', r'"cheap\ud800"', "NaN"]
    ),
)
_OBJECTS = st.lists(st.tuples(_NAMES, _VALUES), min_size=1, max_size=3).map(
    lambda members: "{" + ",".join(f'"{name}":{value}' for name, value in members) + "}"
)
_JSON_BODIES = st.tuples(
    st.sampled_from([*[""] * 8, " ", " " * 70, "\n", "\ufeff", "[", "{}", ")]}'\n", "\0"]),
    _OBJECTS,
    st.sampled_from([*[""] * 8, " ", "x", "]", '{"model":"big"}', "\0"]),
    st.sampled_from([*["utf-8"] * 8, "utf-16", "utf-16-le", "utf-32", "utf-7"]),
).map(lambda one: "".join(one[:3]).encode(one[3]))
_FORM_NAMES = st.sampled_from(
    [*["model"] * 4, "Model", "file", "_charset_", '"; name="model', 'x"; filename="model', "m%6f"]
)
_FORM_BODIES = st.tuples(
    st.lists(st.tuples(_FORM_NAMES, _MODELS), max_size=3),
    st.sampled_from(["b", "b", "b", "c"]),
    st.sampled_from([b"", b"", b"", b"\r\n", b"--b\r\n", b'{"model":"big"}']),
).map(lambda one: one[2] + form(*one[0], boundary=one[1]))
_BODIES = st.one_of(
    _JSON_BODIES,
    _JSON_BODIES,
    _FORM_BODIES,
    _MODELS.map(lambda model: f"model={model}".encode()),
    st.just(b""),
    st.just(UTF_7),
    st.binary(max_size=20),
)
_TYPES = st.sampled_from(
    [
        *[JSON] * 6,
        *[FORM] * 3,
        *[JSON + "; charset=utf-16", JSON + "; charset=utf-7", JSON + "; charset=utf-8"],
        *[JSON + "\xa0", JSON + ", a/b", "Content-Type: a/b, application/json", JSON + ";"],
        *[FORM + "; boundary=c", FORM + "; charset=utf-16le", FORM + ", application/json"],
        *["Content-Type: text/plain", "Content-Type: application/octet-stream", "X-None: 1"],
        *["Content-Type: application/x-www-form-urlencoded", "Content-Type: application/x+json"],
        *["Content-Type: text/json", "Content-Type:", "Content-Type: multipart/mixed; boundary=b"],
    ]
)
_OTHER_FIELDS = st.sampled_from(
    [
        *[()] * 8,
        ("Connection: content-type",),
        ("Connection: close, Content-Encoding",),
        (JSON,),
        (FORM,),
        ("Content_Type: multipart/form-data; boundary=b",),
    ]
)
_CODERS = {
    "": lambda body: body,
    "identity": lambda body: body,
    "gzip": gzip.compress,
    "deflate": zlib.compress,
    "br": brotli.compress,
    "gzip, identity": gzip.compress,
    "GZip": gzip.compress,
    "gzip, br": lambda body: brotli.compress(gzip.compress(body)),
}
_CODINGS = st.sampled_from([*[""] * 8, *_CODERS])
_SEPARATORS = st.sampled_from([*["/"] * 5, "//", "%2F", "%2f/", "%252f", ";a=b/", "\\", "/;/"])
_KINDS = st.sampled_from(["deployments", "Deployments", "d%65ployments", "deployments%20"])
_ENDS = st.sampled_from(["/chat", "", "/", ";v=1/chat", "%2Fchat", "//chat", ":generate", "%3Ago"])
_DEPLOYMENTS = st.tuples(
    st.sampled_from(["/x/", "//", "/deployments/cheap/", "/x%2F"]),
    _KINDS | st.sampled_from(["models", "Models"]),
    _SEPARATORS,
    _MODELS.map(lambda model: model.replace("/", "%2F")),
    _ENDS,
).map("".join)
_PATHS = st.one_of(
    st.sampled_from(["/chat", "/v1/chat/completions", "/v1/models", "/api/tags", "/"]),
    _DEPLOYMENTS,
    st.tuples(
        st.sampled_from(["/x/model/", "/x/models/", "/x/models/cheap/", "/x/model/big%2F"]),
        _MODELS,
        st.sampled_from(
            ["/invoke", "/predictions", ":go", "/x:go", "/v1/predictions", "%2Finvoke"]
        ),
    ).map("".join),
)
_QUERIES = st.sampled_from(
    [*[""] * 8, "?x=1", "?model=cheap", "?model=big", "?Model=big", "?mod%65l=big", "?a;model=big"]
)


@st.composite
def requests(draw: st.DrawFn) -> Sent:
    """Draw a request: any body under any type, in any coding, to any path."""
    coding = draw(_CODINGS)
    body = _CODERS[coding](draw(_BODIES))
    if draw(st.integers(0, 9)) == 0:
        coding = draw(_CODINGS)  # which may not be the one that the body is in
    fields = (draw(_TYPES), *draw(_OTHER_FIELDS))
    if coding:
        fields = (*fields, f"Content-Encoding: {coding}")
    method = draw(st.sampled_from(["POST", "POST", "POST", "PUT", "GET"]))
    return Sent(draw(_PATHS) + draw(_QUERIES), fields, body, method)


@pytest.mark.timeout(600)
def test_every_model_that_a_server_sees_is_allowed(peers: Peers) -> None:
    """For random bodies, types, codings and paths; most kinds of requests do come through."""
    passed: Counter[str] = Counter()

    @given(requests())
    def search(sent: Sent) -> None:
        for rule in RULES:
            for server in peers.ports:
                passed[rule] += check(peers, rule, server, sent)

    search()
    assert all(passed[rule] > 10 for rule in RULES), passed
