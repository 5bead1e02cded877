"""A client's connection that goes on behind CONNECT with the same site: what it may say first."""

from __future__ import annotations

import ssl
import subprocess
from collections.abc import Callable
from typing import Any

import pytest
from OpenSSL import SSL
from pytest_twisted import ensureDeferred
from twisted.python.failure import Failure
from twisted.web.server import NOT_DONE_YET

from llmproxy.config import Timeouts
from llmproxy.server.handler import Handler, Router
from llmproxy.server.inside import Inside
from llmproxy.server.request import Request
from llmproxy.server.tls import ListenerTls
from tests.server.caller import Caller
from tests.support.fake_transport import until
from tests.support.keypairs import Vault
from tests.support.served import GET, TCP, Served
from tests.support.sockets import Wire, connect, request

CONNECT = request("CONNECT", "localhost:443")
BARE_CONNECT = b"CONNECT localhost:443 HTTP/1.0\r\n\r\n"
CLOSING_CONNECT = request("CONNECT", "localhost:443", "Connection: close")


class Within(Handler):
    """Turns each CONNECT inside, and tells every other request what it is inside of.

    Attributes:
        outcomes: why connections did not go on, or None for each that did.
    """

    def __init__(self, tls: Any) -> None:
        super().__init__()
        self.tls = tls
        self.outcomes: list[tuple[str, str] | None] = []

    def body_limit(self, request: Request) -> int:
        return 1_000_000

    def render(self, request: Request) -> int:
        if request.method == b"CONNECT":
            host, _, port = request.uri.decode().partition(":")
            turned = Inside(
                host, int(port), authorization=None, tls=self.tls, ended=self.outcomes.append
            )
            request.turn_inside([], turned)
            return NOT_DONE_YET
        inside = request.inside
        if request.path == b"/break":
            request.start(200, [])
            request.write(b"some")
            request.break_off()
            return NOT_DONE_YET
        assert inside is not None
        told = [inside.host, inside.port, inside.name, inside.is_secure, len(request.body)]
        body = " ".join(map(str, told)).encode()
        request.start(200, [(b"content-length", b"%d" % len(body))])
        request.write(body)
        request.finish()
        return NOT_DONE_YET

    def outcome(self) -> str | None:
        """Return the word of the only outcome."""
        (outcome,) = self.outcomes
        return None if outcome is None else outcome[0]


class Turned(Served):
    """A site on which CONNECT turns every connection inside."""

    def __init__(self, vault: Vault, text: str = TCP, **more: Any) -> None:
        super().__init__(text, **more)
        self.handler = Within(ListenerTls(vault.issue().keypair()))
        self.site.serve(Router(self.handler))


def opened(wire: Wire, head: bytes = CONNECT, *early: bytes) -> None:
    """Ask for a tunnel, and get it."""
    wire.send(head, *early)
    assert wire.read_until(b"\r\n\r\n") == b"HTTP/1.1 200 OK\r\n\r\n"


def secured(wire: Wire, context: ssl.SSLContext, name: str | None = "localhost") -> Wire:
    """Begin TLS on a wire."""
    return Wire(context.wrap_socket(wire.sock, server_hostname=name, suppress_ragged_eofs=False))


def asked(wire: Wire, *wires: bytes) -> bytes:
    """Send one request, and return the response's body."""
    wire.send(*(wires or (GET,)))
    first, fields = wire.read_head()
    body = wire.read_body(fields)
    assert first == b"HTTP/1.1 200 OK", (first, body)
    return body


KINDS = [
    pytest.param(TCP, True, b"", id="direct"),
    pytest.param(TCP, False, b"", id="twisted"),
    pytest.param(f"haproxy:{TCP}", True, b"PROXY TCP4 10.9.8.7 10.9.8.1 5 6\r\n", id="balancer"),
]


@pytest.mark.parametrize(("text", "direct", "before"), KINDS)
@pytest.mark.parametrize("head", [CONNECT, BARE_CONNECT, CLOSING_CONNECT])
@ensureDeferred
async def test_tls_ends_here_and_many_requests_follow(
    vault: Vault, text: str, direct: bool, before: bytes, head: bytes
) -> None:
    """Also behind a CONNECT that speaks of closing: the tunnel is what the client goes on with."""

    def client() -> list[bytes]:
        with connect(served.port) as wire:
            opened(wire, before + head)
            with secured(wire, vault.client(protocols=["h2", "http/1.1"])) as inner:
                assert isinstance(inner.sock, ssl.SSLSocket)
                assert inner.sock.selected_alpn_protocol() == "http/1.1"
                large = request("POST", "/", "Content-Length: 500000"), bytes(500_000)
                return [asked(inner), asked(inner, *large), asked(inner)]

    async with Turned(vault, text, direct=direct) as served:
        small = b"localhost 443 localhost True 0"
        assert await served.run(client) == [small, b"localhost 443 localhost True 500000", small]
        assert served.handler.outcomes == [None]
        await served.until_connected(0)


@pytest.mark.parametrize(("text", "direct", "before"), KINDS)
@ensureDeferred
async def test_a_hello_that_comes_with_the_connect_is_not_lost(
    vault: Vault, text: str, direct: bool, before: bytes
) -> None:
    """A client may be so sure of its tunnel; its first record is in the same read, or split."""

    def client(cut: int) -> bytes:
        begun, wanted = ssl.MemoryBIO(), ssl.MemoryBIO()
        tls = vault.client().wrap_bio(begun, wanted, server_hostname="localhost")
        with pytest.raises(ssl.SSLWantReadError):
            tls.do_handshake()
        hello = wanted.read()
        with connect(served.port) as wire:
            opened(wire, before + CONNECT, hello[:cut])
            wire.send(hello[cut:])
            answer = b""
            sent = False
            while b"True 0" not in answer:
                try:
                    if not sent:
                        tls.do_handshake()
                        tls.write(GET)
                        sent = True
                    answer += tls.read(65536)
                except ssl.SSLWantReadError:
                    wire.send(wanted.read())
                    if not wire.buffer:
                        wire.receive()
                    begun.write(wire.buffer)
                    wire.buffer = b""
            return answer.rpartition(b"\r\n\r\n")[2]

    async with Turned(vault, text, direct=direct) as served:
        for cut in (1, 2, 6, 100, 10_000):
            assert await served.run(client, cut) == b"localhost 443 localhost True 0"
        assert served.handler.outcomes == [None] * 5


@pytest.mark.parametrize(("text", "direct", "before"), KINDS)
@pytest.mark.parametrize("together", [True, False])
@ensureDeferred
async def test_http_in_the_clear_goes_on_as_http(
    vault: Vault, text: str, direct: bool, before: bytes, together: bool
) -> None:
    """What to do with it is the handler's affair."""

    def client() -> list[bytes]:
        with connect(served.port) as wire:
            if together:
                opened(wire, before + CONNECT, GET)
                first, fields = wire.read_head()
                return [first, wire.read_body(fields), asked(wire)]
            opened(wire, before + CONNECT)
            return [b"HTTP/1.1 200 OK", asked(wire), asked(wire)]

    async with Turned(vault, text, direct=direct) as served:
        plain = b"localhost 443 None False 0"
        assert await served.run(client) == [b"HTTP/1.1 200 OK", plain, plain]
        assert served.handler.outcomes == [None]


@pytest.mark.parametrize(("text", "direct", "before"), KINDS)
@pytest.mark.parametrize("first", [b"SSH-2.0-x\r\n", b"\x00\x00\x00\x01", b"get / http", b"\xff"])
@ensureDeferred
async def test_what_is_neither_ends_the_connection(
    vault: Vault, text: str, direct: bool, before: bytes, first: bytes
) -> None:
    """And it is told what the client spoke."""

    def client() -> str:
        with connect(served.port) as wire:
            opened(wire, before + CONNECT)
            wire.send(first)
            return wire.wait_closed()

    async with Turned(vault, text, direct=direct) as served:
        assert await served.run(client) == "reset"
        await served.until_connected(0)
        assert served.handler.outcome() == "no_tls"


@pytest.mark.parametrize(("text", "direct", "before"), KINDS)
@pytest.mark.parametrize(
    ("first", "word"), [(b"", "no_hello"), (b"\x16\x03\x01\x02\x00", "tls_timeout")]
)
@ensureDeferred
async def test_a_client_has_a_head_s_time_for_its_handshake(
    vault: Vault, text: str, direct: bool, before: bytes, first: bytes, word: str
) -> None:
    """Whether it says nothing or stops in the middle."""

    def client() -> Wire:
        wire = connect(served.port)
        opened(wire, before + CONNECT)
        wire.send(first)
        return wire

    timeouts = Timeouts(request_head=5.0)
    async with Turned(vault, text, direct=direct, timeouts=timeouts) as served:
        wire = await served.run(client)
        (connection,) = served.site.connections
        assert connection.inside is not None
        if first:
            await until(lambda: connection.inside is not None and connection.inside.is_secure)
        await served.pass_time(4.5)
        assert len(served.site.connections) == 1
        await served.pass_time(3)
        with wire:
            assert await served.run(wire.wait_closed) == "reset"
        assert served.handler.outcome() == word


@pytest.mark.parametrize(("text", "direct", "before"), KINDS)
@ensureDeferred
async def test_a_first_record_brings_no_further_time(
    vault: Vault, text: str, direct: bool, before: bytes
) -> None:
    """The deadline runs from the CONNECT on, whenever TLS begins."""

    def client() -> Wire:
        wire = connect(served.port)
        opened(wire, before + CONNECT)
        return wire

    timeouts = Timeouts(request_head=5.0)
    async with Turned(vault, text, direct=direct, timeouts=timeouts) as served:
        wire = await served.run(client)
        (connection,) = served.site.connections
        await served.pass_time(3)
        await served.run(lambda: wire.send(b"\x16\x03\x01\x02\x00"))
        await until(lambda: connection.inside is not None and connection.inside.is_secure)
        await served.pass_time(3)
        with wire:
            assert await served.run(wire.wait_closed) == "reset"
        assert served.handler.outcome() == "tls_timeout"


@pytest.mark.parametrize(("text", "direct", "before"), KINDS)
@pytest.mark.parametrize(
    "leave",
    [
        pytest.param(lambda wire: wire.close(), id="fin"),
        pytest.param(lambda wire: wire.reset(), id="reset"),
        pytest.param(lambda wire: (wire.send(b"\x16\x03\x01\x02\x00"), wire.reset()), id="amid"),
    ],
)
@ensureDeferred
async def test_a_client_that_leaves_before_it_is_through_is_let_go_of(
    vault: Vault, text: str, direct: bool, before: bytes, leave: Callable[[Wire], object]
) -> None:
    """Its end is told once."""

    def client() -> None:
        wire = connect(served.port)
        opened(wire, before + CONNECT)
        leave(wire)

    async with Turned(vault, text, direct=direct) as served:
        await served.run(client)
        await served.until_connected(0)
        assert served.handler.outcome() == "left"


@pytest.mark.parametrize(("text", "direct", "before"), KINDS)
@ensureDeferred
async def test_a_client_that_does_not_trust_us_says_so(
    vault: Vault, text: str, direct: bool, before: bytes
) -> None:
    """The alert of its TLS is in the words for the operator."""

    def client() -> None:
        with connect(served.port) as wire:
            opened(wire, before + CONNECT)
            with pytest.raises(ssl.SSLCertVerificationError):
                secured(wire, ssl.create_default_context())

    async with Turned(vault, text, direct=direct) as served:
        await served.run(client)
        await served.until_connected(0)
        ((word, words),) = served.handler.outcomes  # type: ignore[misc]  # it is no None
        assert word == "tls_handshake"
        assert words == (
            "the client does not trust the certificate (TLS alert: unknown ca): "
            "it needs the root of the authority"
        )


@pytest.mark.parametrize(
    ("said", "words"),
    [
        ("sslv3 alert bad certificate", "does not trust the certificate (TLS alert: bad cert"),
        ("tls alert bad certificate", "does not trust the certificate (TLS alert: bad cert"),
        ("ssl/tls alert certificate unknown", "does not trust the certificate (TLS alert: cert"),
        (
            "no shared cipher",
            "the TLS handshake failed: [('SSL routines', '', 'no shared cipher')]",
        ),
        (
            "sslv3 alert certificate expired",
            "alert certificate expired",
        ),
    ],
)
def test_what_a_handshake_failed_of_is_told_in_plain_words(said: str, words: str) -> None:
    """Go and Java say of an authority that they do not know that the certificate is bad."""
    assert words in failed_of(SSL.Error([("SSL routines", "", said)]))


def failed_of(error: SSL.Error) -> str:
    """Return what the operator is told of a handshake that failed of ``error``."""
    told: list[tuple[str, str] | None] = []
    Inside("a.example", 443, authorization=None, tls=None, ended=told.append).lost(Failure(error))
    ((word, words),) = told  # type: ignore[misc]  # it is no None
    assert word == "tls_handshake"
    return words


@pytest.mark.parametrize(("text", "direct", "before"), KINDS)
@ensureDeferred
async def test_a_body_that_breaks_is_not_closed_as_if_it_were_whole(
    vault: Vault, text: str, direct: bool, before: bytes
) -> None:
    """Where the end of the connection is the end of the body, no close_notify comes."""

    def client() -> tuple[str, bytes]:
        with connect(served.port) as wire:
            opened(wire, before + CONNECT)
            with secured(wire, vault.client()) as inner:
                inner.send(b"GET /break HTTP/1.0\r\n\r\n")
                return inner.wait_closed(), inner.buffer[-4:]

    async with Turned(vault, text, direct=direct) as served:
        end, body = await served.run_turning(client)
        assert end in ("truncated", "reset")
        assert body == b"some"


@ensureDeferred
async def test_tls_within_tls(vault: Vault) -> None:
    """The listener may have TLS itself, for another name: curl asks for a tunnel within it."""
    authority = str(vault.ca_path)
    for direct in (True, False):
        tls = ListenerTls(vault.issue().keypair())
        async with Turned(vault, tls=tls, direct=direct) as served:
            command = ["curl", "-sS", "--proxy", f"https://127.0.0.1:{served.port}"]
            command += ["--proxy-cacert", authority, "--cacert", authority, "https://localhost/a"]
            done = await served.run(subprocess.run, command, capture_output=True, timeout=20)
            assert (done.stdout, done.stderr) == (b"localhost 443 localhost True 0", b"")


def test_a_response_that_has_begun_is_not_turned() -> None:
    """A head goes out once; all else is refused as for a socket that is handed over."""
    caller = Caller(CONNECT)
    caller.request.start(200, [])
    ended: list[object] = []
    inside = Inside("localhost", 443, authorization=None, tls=None, ended=ended.append)
    with pytest.raises(RuntimeError):
        caller.request.turn_inside([], inside)
    assert not ended
