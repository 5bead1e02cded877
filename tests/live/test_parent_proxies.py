"""Debian's squid and tinyproxy between the proxy and its providers."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import NamedTuple

import pytest

from tests.support import parents
from tests.support.daemon import Daemon, provider_table, route_table
from tests.support.live_proxy import (
    assert_settles,
    begin,
    post,
    read_response,
    read_stepwise,
    trace_of,
)
from tests.support.parents import FAR_NAME, SQUID, TINYPROXY
from tests.support.scripts import DONE, KEPT, LAST, OK, SSE, Notes, Turn, event, reply, stream
from tests.support.sockets import Provider, Script, Wire, chunked, connect
from tests.support.tls import Authority

pytestmark = pytest.mark.skipif(
    SQUID is None or TINYPROXY is None, reason="squid and tinyproxy are not both installed"
)

USER = "team:pass-word_1"
PARENTS = ("squid", "squid with password", "tinyproxy", "tinyproxy with password")
FAR = {"squid": FAR_NAME, "tinyproxy": "localhost"}
CELLS = [(parent, scheme) for parent in PARENTS for scheme in ("http", "https")]
EACH = pytest.mark.parametrize(
    ("parent", "scheme"), CELLS, ids=[f"{scheme} through {parent}" for parent, scheme in CELLS]
)


class Refusal(NamedTuple):
    """A way in which a parent refuses.

    Attributes:
        parent: a key of the ports that :func:`ports` makes.
        cause: the word for it.
        words: what the log quotes of the parent's answer.
        user: the credential, if one is shown.
        is_open: whether the provider listens.
    """

    parent: str
    cause: str
    words: str
    user: str = ""
    is_open: bool = True


REFUSALS = {
    "squid, no password": Refusal(
        "squid with password",
        "parent_proxy_auth",
        "HTTP/1.1 407 Proxy Authentication Required, and asks for Basic",
    ),
    "squid, wrong password": Refusal(
        "squid with password",
        "parent_proxy_auth",
        "HTTP/1.1 407 Proxy Authentication Required, and asks for Basic",
        user="team:s3cret",
    ),
    "squid, port": Refusal(
        "squid of Debian", "parent_proxy_refused", "HTTP/1.1 403 Forbidden ERR_ACCESS_DENIED 0"
    ),
    "squid, nobody listens": Refusal(
        "squid",
        "parent_proxy_refused",
        "HTTP/1.1 503 Service Unavailable ERR_CONNECT_FAIL 111",
        is_open=False,
    ),
    "tinyproxy, no password": Refusal(
        "tinyproxy with password",
        "parent_proxy_auth",
        "HTTP/1.0 407 Proxy Authentication Required, and asks for Basic",
    ),
    "tinyproxy, wrong password": Refusal(
        "tinyproxy with password",
        "parent_proxy_auth",
        "HTTP/1.0 401 Unauthorized, and asks for nothing else",
        user="team:s3cret",
    ),
    "tinyproxy, port": Refusal(
        "tinyproxy for 443", "parent_proxy_refused", "HTTP/1.1 403 Access violation"
    ),
    "tinyproxy, nobody listens": Refusal(
        "tinyproxy", "parent_proxy_refused", "HTTP/1.1 500 Unable to connect", is_open=False
    ),
    "no parent": Refusal("nobody", "parent_proxy_unreachable", "Connection refused"),
}


class Behind:
    """A daemon, and the providers that it reaches through each parent and directly.

    Attributes:
        script: what the providers play on each connection that they accept from now on.
        providers: by their scheme.
    """

    def __init__(self, authority: Authority) -> None:
        self.script: Script = reply(OK)
        tls = authority.server("localhost", FAR_NAME)
        self.providers = {
            "http": Provider(lambda wire: self.script(wire)),
            "https": Provider(lambda wire: self.script(wire), tls=tls),
        }
        self.daemon: Daemon

    def connect(self) -> Wire:
        """Connect to the daemon."""
        return connect(self.daemon.port)


@pytest.fixture(scope="module")
def ports() -> Iterator[dict[str, int]]:
    """The ports of all parents, by their names."""
    with ExitStack() as stack, socket.socket() as nobody:
        nobody.bind(("127.0.0.1", 0))
        start = stack.enter_context
        yield {
            "squid": start(parents.squid(any_port=True)),
            "squid with password": start(parents.squid(any_port=True, user=USER)),
            "squid of Debian": start(parents.squid()),
            "tinyproxy": start(parents.tinyproxy()),
            "tinyproxy with password": start(parents.tinyproxy(user=USER)),
            "tinyproxy for 443": start(parents.tinyproxy(more="ConnectPort 443")),
            "nobody": nobody.getsockname()[1],
        }


def path_of(*words: str) -> str:
    """Return the path of a route, and the name of its provider behind a slash."""
    return "/" + "-".join(words).replace(" ", "-").replace(",", "")


@pytest.fixture(scope="module")
def behind(
    tmp_path_factory: pytest.TempPathFactory, authority: Authority, ports: dict[str, int]
) -> Iterator[Behind]:
    """A daemon with a route through each parent to each provider, and one for each refusal."""
    folder = tmp_path_factory.mktemp("parents")
    played = Behind(authority)
    with ExitStack() as stack:
        for provider in played.providers.values():
            stack.enter_context(provider)
        closed = stack.enter_context(socket.socket())
        closed.bind(("127.0.0.1", 0))
        config = _credentials(folder, right=USER, wrong="team:s3cret")

        def add(path: str, url: str, parent: str, credential: str = "") -> None:
            nonlocal config
            keys = [f'ca = "{authority.ca_path}"'] if url.startswith("https") else []
            if parent:
                keys.append(f'parent_proxy = "http://127.0.0.1:{ports[parent]}"')
            if credential:
                keys.append(f'parent_proxy_credential = "{credential}"')
            config += provider_table(path[1:], *keys, url=url) + route_table(path, path[1:])

        for scheme, provider in played.providers.items():
            add(path_of("direct", scheme), f"{scheme}://localhost:{provider.port}", "")
            for parent in PARENTS:
                host = FAR[parent.partition(" ")[0]]
                credential = "right" if "password" in parent else ""
                url = f"{scheme}://{host}:{provider.port}"
                add(path_of(parent, scheme), url, parent, credential)
        for name, refusal in REFUSALS.items():
            port = played.providers["http"].port if refusal.is_open else closed.getsockname()[1]
            credential = "wrong" if refusal.user else ""
            add(path_of(name), f"http://127.0.0.1:{port}", refusal.parent, credential)
        with Daemon(folder, config) as played.daemon:
            yield played


def _credentials(folder: Path, **files: str) -> str:
    directory = folder / "credentials"
    directory.mkdir(mode=0o700)
    for name, content in files.items():
        (directory / name).write_text(content + "\n")
    return f'[credentials]\ndirectory = "{directory}"\n'


@EACH
def test_each_chunk_comes_through_before_the_next_is_sent(
    behind: Behind, parent: str, scheme: str
) -> None:
    """No parent holds a chunk back, and the record is that of a whole response."""
    path = f"{path_of(parent, scheme)}/stream"
    chunks, turn = [*map(event, range(4)), DONE], Turn()
    behind.script = stream(turn, *chunks)
    with begin(behind.connect(), path) as client:
        read_stepwise(client, turn, *chunks, b"")
    record = trace_of(behind.daemon, path=path)
    assert (record["end_reason"], record["attempts"][0]["outcome"]) == ("complete", "ok")
    assert_settles(behind.daemon)


@EACH
def test_the_provider_gets_the_same_request_as_without_a_parent(
    behind: Behind, parent: str, scheme: str
) -> None:
    """No field is added, none is missing, and the parent's credential is in none."""
    seen, heads = Notes(), []

    def script(wire: Wire) -> None:
        request = wire.read_request()
        seen.put((request.target, request.fields, request.body))
        wire.send(OK.replace(b"\r\n", b"\r\nX-Own: a  b\r\n", 1))

    behind.script = script
    for path in (path_of("direct", scheme), path_of(parent, scheme)):
        with behind.connect() as client:
            client.send(post(f"{path}/a%7e?b=%41", b'{"a": 1}', "x-request-id: 1", "x-a: b"))
            got = read_response(client)
            ours = (b"x-llmproxy-request-id", b"x-llmproxy-provider", b"date")
            heads.append((got.status, [one for one in got.fields if one[0] not in ours], got.body))
    (*first, direct, body), (*second, tunnelled, same) = seen.read(), seen.read()
    assert first == second == [b"/a%7e?b=%41"]
    host = FAR[parent.partition(" ")[0]].encode()
    port = b":%d" % behind.providers[scheme].port
    assert (b"host", host + port) in tunnelled
    assert [one for one in tunnelled if one[0] != b"host"] == [
        one for one in direct if one[0] != b"host"
    ]
    assert body == same == b'{"a": 1}'
    assert heads[0] == heads[1]


@EACH
def test_a_tunnel_serves_one_request_after_the_other(
    behind: Behind, parent: str, scheme: str
) -> None:
    """It is kept as a connection is, and the parent is asked once."""
    path = f"{path_of(parent, scheme)}/kept"

    def script(wire: Wire) -> None:
        for response in (KEPT, KEPT, KEPT, OK):  # the last one says that it closes
            wire.read_request()
            wire.send(response)

    behind.script = script
    before = behind.providers[scheme].accepted
    with behind.connect() as client:
        for _ in range(4):
            client.send(post(path))
            assert read_response(client).body == b"ok"
    assert behind.providers[scheme].accepted == before + 1


@EACH
def test_a_client_that_leaves_is_seen_by_the_far_provider(
    behind: Behind, parent: str, scheme: str
) -> None:
    """The tunnel is closed at once, and the parent closes its other side."""
    path, ended = f"{path_of(parent, scheme)}/leaves", Notes()

    def script(wire: Wire) -> None:
        wire.read_request()
        wire.send(SSE, chunked(event(0)))
        ended.put(wire.wait_closed())

    behind.script = script
    with begin(behind.connect(), path) as client:
        assert client.read_chunk() == event(0)
    assert ended.read() in ("fin", "reset", "truncated")
    assert trace_of(behind.daemon, path=path)["end_reason"] == "client_gone"
    assert_settles(behind.daemon)


BODY = event(0) + event(1)
FRAMINGS = {
    "chunked": SSE + chunked(BODY),
    "length": b"HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\n" + BODY,
    "none": b"HTTP/1.1 200 OK\r\nConnection: close\r\n\r\n" + BODY,
}


@EACH
@pytest.mark.parametrize("end", ["fin", "reset"])
@pytest.mark.parametrize("framing", FRAMINGS)
def test_a_body_that_breaks_behind_a_parent_is_never_whole(
    behind: Behind, parent: str, scheme: str, framing: str, end: str
) -> None:
    """Both parents turn a reset into a FIN, so that a FIN ends no body that has no framing."""
    path, turn = f"{path_of(parent, scheme)}/{framing}/{end}", Turn()

    def script(wire: Wire) -> None:
        wire.read_request()
        wire.send(FRAMINGS[framing])
        turn.take()
        if end == "reset":
            wire.reset()

    behind.script = script
    with begin(behind.connect(), path) as client:
        while BODY not in client.buffer:
            assert client.receive()
        turn.give()
        client.wait_closed()
        assert LAST not in client.buffer
    record = trace_of(behind.daemon, path=path)
    assert (record["end_reason"], record["is_complete"]) == ("upstream_broken", False)
    assert_settles(behind.daemon)


@pytest.mark.parametrize("parent", PARENTS)
def test_close_notify_ends_a_body_behind_a_parent(behind: Behind, parent: str) -> None:
    """It is the provider's own word, which the parent cannot say in its place."""
    path = f"{path_of(parent, 'https')}/close-notify"

    def script(wire: Wire) -> None:
        wire.read_request()
        wire.send(FRAMINGS["none"])
        wire.close_notify()

    behind.script = script
    with behind.connect() as client:
        client.send(post(path))
        assert read_response(client).body == BODY
    assert trace_of(behind.daemon, path=path)["end_reason"] == "complete"


@pytest.mark.parametrize("name", REFUSALS)
def test_a_refusal_is_told_to_the_operator_alone(behind: Behind, name: str) -> None:
    """Record, metric and log have the cause, the log what the parent answered; no request left."""
    refusal, path = REFUSALS[name], path_of(name)
    before = behind.providers["http"].accepted
    with behind.connect() as client:
        client.send(post(f"{path}/x"))
        got = read_response(client)
    assert (got.status, got.error) == (502, "upstream_unreachable")
    assert b"parent" not in got.body
    record = trace_of(behind.daemon, path=f"{path}/x")
    assert record["end_reason"] == "upstream_unreachable"
    (attempt,) = record["attempts"]
    assert (attempt["outcome"], attempt["cause"]) == ("upstream_unreachable", refusal.cause)
    labels = f'{{cause="{refusal.cause}",provider="{path[1:]}"}}'
    assert behind.daemon.metrics()[f"llmproxy_upstream_failures_total{labels}"] == 1
    line = behind.daemon.wait_log("", path=f"{path}/x")
    assert line["cause"] == refusal.cause
    assert refusal.words in line["detail"]
    assert "s3cret" not in str(line)
    assert behind.providers["http"].accepted == before
    assert_settles(behind.daemon)
