"""Providers behind a parent proxy: the tunnel, what is said in it, and how the parent may fail.

The parent is played here.  ``tests/live/test_parent_proxies.py`` has real ones.
"""

from __future__ import annotations

import base64
import contextlib
import errno
import queue
import socket
import ssl
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
from pytest_twisted import ensureDeferred
from twisted.internet.testing import StringTransport

from llmproxy.config import ParentProxy, Proxy, Secret, Timeouts, Url
from llmproxy.config import Provider as ProviderConfig
from llmproxy.dialects.dialect import Dialect
from llmproxy.errors import EndReason, ProxyError
from llmproxy.upstream.client import connection_key
from llmproxy.upstream.tunnel import Tunnel
from tests.support.fake_transport import Collector, until
from tests.support.kernel import held
from tests.support.parents import ESTABLISHED, PlayedParent
from tests.support.sockets import Provider, Wire, chunked
from tests.support.tls import Authority
from tests.upstream.hello import read_hello
from tests.upstream.one_provider import (
    OK,
    OneProviderPool,
    RespondingProvider,
    config_of,
    failure_of,
    plain,
    pool_of,
    read,
    take,
    upstream_of,
    url_of,
)
from tests.upstream.test_tls import Resuming

SCHEMES = pytest.mark.parametrize("scheme", ["http", "https"])
TRANSPORTS = pytest.mark.parametrize("direct", [True, False], ids=["direct", "twisted"])


def parent_at(parent: Provider, credential: str | None = None, host: str = "") -> ParentProxy:
    """Return how a parent is configured."""
    return ParentProxy(url_of(parent, host), None if credential is None else Secret(credential))


@asynccontextmanager
async def through(
    parent: PlayedParent,
    authority: Authority,
    scheme: str,
    *,
    provider: RespondingProvider | None = None,
    direct: bool = True,
    credential: str | None = None,
) -> AsyncIterator[tuple[RespondingProvider, OneProviderPool]]:
    """Start parent and provider, and make the pool of a provider that is reached through it."""
    tls = authority.server("api.test") if scheme == "https" else None
    provider = provider or RespondingProvider(tls=tls)
    url = Url(scheme=scheme, host="api.test", port=provider.port)
    with parent:
        where = parent_at(parent, credential, "parent.test")
        options = {"ca": authority.ca_path, "parent": where, "direct": direct}
        async with pool_of(provider, url, **options) as (_, pool):
            yield provider, pool


# --- the tunnel -----------------------------------------------------------------------------------


@SCHEMES
@TRANSPORTS
@ensureDeferred
async def test_requests_go_through_a_tunnel_that_is_kept(
    authority: Authority, scheme: str, direct: bool
) -> None:
    """One CONNECT serves several requests, which say nothing of it; the parent finds the name."""
    parent = PlayedParent()
    async with through(parent, authority, scheme, direct=direct) as (provider, pool):
        assert await pool.fetch() == b"ok"
        await until(lambda: pool.counts()["idle"])
        assert await pool.fetch() == b"ok"
        assert pool.lookup.names == ["parent.test"]
        where = b"api.test:%d" % provider.port
        assert await take(parent.heads) == (b"CONNECT %b HTTP/1.1" % where, {b"host": where})
        request = await take(provider.requests)
        assert request.fields == [(b"host", where)]
        assert (parent.accepted, provider.accepted) == (1, 1)


@SCHEMES
@ensureDeferred
async def test_the_credential_is_for_the_parent_alone(authority: Authority, scheme: str) -> None:
    """It goes with the CONNECT, in UTF-8 (RFC 7617), and not with the request inside."""
    parent = PlayedParent()
    secret = "jürgen:p:äss"
    async with through(parent, authority, scheme, credential=secret) as (provider, pool):
        assert await pool.fetch() == b"ok"
        _, fields = await take(parent.heads)
        kind, _, value = fields[b"proxy-authorization"].partition(b" ")
        assert (kind, base64.b64decode(value).decode()) == (b"Basic", secret)
        request = await take(provider.requests)
        assert [name for name, _ in request.fields] == [b"host"]


@ensureDeferred
async def test_an_address_of_ipv6_stands_in_brackets() -> None:
    """The authority of a CONNECT is written as a URL has it (RFC 9112, section 3.2.3)."""
    parent = PlayedParent(b"HTTP/1.1 403 No\r\n\r\n")
    with parent:
        url = Url(scheme="https", host="2001:db8::1", port=443)
        pool = OneProviderPool(url, parent=parent_at(parent))
        await failure_of(pool.send())
        line, fields = await take(parent.heads)
        assert line == b"CONNECT [2001:db8::1]:443 HTTP/1.1"
        assert fields == {b"host": b"[2001:db8::1]:443"}
        await pool.close()


@pytest.mark.parametrize(
    "answer",
    [
        b"HTTP/1.0 200 Connection established\r\nProxy-agent: tinyproxy/1.11.1\r\n\r\n",
        b"HTTP/1.1 200\r\n\r\n",
        b"HTTP/1.1 204 No Content\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n",
        b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 102 Wait\r\nX: y\r\n\r\nHTTP/1.1 200 OK\r\n\r\n",
    ],
)
@TRANSPORTS
@ensureDeferred
async def test_an_answer_may_come_byte_by_byte(
    authority: Authority, answer: bytes, direct: bool
) -> None:
    """Any 2xx opens the tunnel, whatever it says of a length, and whatever 1xx came before it."""
    parent = PlayedParent(*(answer[at : at + 1] for at in range(len(answer))))
    async with through(parent, authority, "https", direct=direct) as (_, pool):
        assert await pool.fetch() == b"ok"


# --- what the parent refuses ----------------------------------------------------------------------

REFUSALS = {
    "squid, no credentials": (
        b"HTTP/1.1 407 Proxy Authentication Required\r\nContent-Length: 5\r\n"
        b'Proxy-Authenticate: Basic realm="corp"\r\nConnection: keep-alive\r\n\r\nhello',
        "auth",
        "responded with HTTP/1.1 407 Proxy Authentication Required, and asks for Basic",
    ),
    "other schemes": (
        b"HTTP/1.1 407 No\r\nProxy-Authenticate: Negotiate\r\nProxy-Authenticate: NTLM\r\n\r\n",
        "auth",
        "responded with HTTP/1.1 407 No, and asks for Negotiate, NTLM",
    ),
    "tinyproxy, wrong password": (
        b"HTTP/1.0 401 Unauthorized\r\nWWW-Authenticate: Basic\r\nConnection: close\r\n\r\n",
        "auth",
        "responded with HTTP/1.0 401 Unauthorized, and asks for nothing else",
    ),
    "squid, denied port": (
        b"HTTP/1.1 403 Forbidden\r\nX-Squid-Error: ERR_ACCESS_DENIED 0\r\n\r\n",
        "refused",
        "responded with HTTP/1.1 403 Forbidden ERR_ACCESS_DENIED 0",
    ),
    "squid, nobody listens": (b"HTTP/1.1 503 Service Unavailable\r\n\r\n", "refused", None),
    "tinyproxy, nobody listens": (b"HTTP/1.1 500 Unable to connect\r\n\r\n", "refused", None),
    "a redirect": (b"HTTP/1.1 302 Found\r\nLocation: http://login/\r\n\r\n", "refused", None),
    "a longer body than a head may be": (
        b"HTTP/1.1 403 Forbidden\r\n\r\n" + bytes(9000),
        "refused",
        "responded with HTTP/1.1 403 Forbidden",
    ),
}


def assert_unreachable(error: ProxyError, cause: str) -> None:
    """The provider was not reached, for a reason of its own; nothing of that is for the caller."""
    assert (error.status, error.end, error.cause) == (502, EndReason.UPSTREAM_UNREACHABLE, cause)
    assert (error.reason, error.may_have_run) == ("upstream_unreachable", False)
    assert error.message == "The provider cannot be reached."


@pytest.mark.parametrize("name", REFUSALS)
@TRANSPORTS
@ensureDeferred
async def test_a_refusal_is_told_by_its_cause(name: str, direct: bool) -> None:
    """The operator reads what the parent answered; no request was sent, and nothing stays open."""
    answer, cause, detail = REFUSALS[name]
    parent = PlayedParent(answer)
    with parent:
        url = Url(scheme="http", host="api.test", port=80)
        pool = OneProviderPool(url, parent=parent_at(parent, "team:s3cret"), direct=direct)
        error = await failure_of(pool.send())
        assert_unreachable(error, f"parent_proxy_{cause}")
        if detail is not None:
            assert error.detail == f"the parent proxy {detail}"
        assert "s3cret" not in error.detail
        await until(lambda: not held(peer=parent.port).sockets)
        await pool.close()


def stays(*pieces: bytes) -> PlayedParent:
    """Return a parent that sends something else, and then waits for the end."""
    parent = PlayedParent()

    def play(wire: Wire) -> None:
        wire.send(*pieces)
        wire.wait_closed()

    parent._script = play
    return parent


def leaves(data: bytes, *, by_reset: bool = False) -> PlayedParent:
    """Return a parent that takes the CONNECT, sends something, and leaves."""
    parent = PlayedParent()

    def play(wire: Wire) -> None:
        wire.read_head()
        wire.send(data)
        if by_reset:
            wire.reset()

    parent._script = play
    return parent


NO_ANSWERS = {
    "another protocol": lambda: stays(b"SSH-2.0-OpenSSH_9.2p1\r\n"),
    "TLS": lambda: stays(b"\x15\x03\x01\x00\x02\x02\x32"),
    "HTTP/2": lambda: stays(b"HTTP/2 200\r\n\r\n"),
    "a status that is none": lambda: stays(b"HTTP/1.1 2_0 OK\r\n\r\n"),
    "a bare line feed": lambda: stays(b"HTTP/1.1 200 OK\nX: y\r\n\r\n"),
    "a folded line": lambda: stays(b"HTTP/1.1 200 OK\r\nX: y\r\n z\r\n\r\n"),
    "a field that is none": lambda: stays(b"HTTP/1.1 200 OK\r\nX y\r\n\r\n"),
    "a protocol switch": lambda: stays(b"HTTP/1.1 101 Switch\r\n\r\n"),
    "an endless head": lambda: stays(b"HTTP/1.1 200 OK\r\nX: " + b"y" * 5000),
    "a long head": lambda: stays(b"HTTP/1.1 200 OK\r\nX: " + b"y" * 5000 + b"\r\n\r\n"),
    "endless 1xx": lambda: stays(b"HTTP/1.1 100 Continue\r\n\r\n" * 300),
    "a body": lambda: stays(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nhi"),
    "bytes behind the head": lambda: stays(ESTABLISHED + OK),
    "a FIN before it answers": lambda: leaves(b""),
    "a FIN within the head": lambda: leaves(b"HTTP/1.1 200 OK\r\nX: "),
    "a reset": lambda: leaves(b"HTTP/1.1 200 OK\r\nX: ", by_reset=True),
}


@pytest.mark.parametrize("name", NO_ANSWERS)
@TRANSPORTS
@SCHEMES
@ensureDeferred
async def test_what_is_no_answer_is_told_as_that(
    name: str, direct: bool, scheme: str, authority: Authority
) -> None:
    """It is found as soon as it can be, without a deadline, and the connection is closed."""
    with NO_ANSWERS[name]() as parent:
        url = Url(scheme=scheme, host="api.test", port=80)
        pool = OneProviderPool(
            url, ca=authority.ca_path, parent=parent_at(parent, "team:s3cret"), direct=direct
        )
        error = await failure_of(pool.send())
        assert_unreachable(error, "parent_proxy_protocol")
        assert "s3cret" not in error.detail
        await until(lambda: not held(peer=parent.port).sockets)
        await pool.close()


@ensureDeferred
async def test_a_response_to_a_request_that_is_not_sent_yet_opens_nothing() -> None:
    """A parent that speaks first may have spoken to somebody else."""

    class Queue(StringTransport):
        """A transport that queues what is written."""

        dataBuffer, offset, _tempDataLen = b"", 0, 0  # noqa: N815 - Twisted's name

        def write(self, data: bytes) -> None:
            self._tempDataLen += len(data)

    tunnel = Tunnel(4096)
    tunnel.makeConnection(Queue())
    opened = tunnel.ask(b"CONNECT a:1 HTTP/1.1\r\n\r\n")
    tunnel.dataReceived(ESTABLISHED)
    with pytest.raises(ProxyError) as caught:
        await opened
    assert_unreachable(caught.value, "parent_proxy_protocol")


# --- which hop is at fault ------------------------------------------------------------------------


@ensureDeferred
async def test_the_parent_that_answers_at_another_address_is_asked_once() -> None:
    """Its addresses are tried one after the other; the CONNECT goes to the one that lets us in."""
    parent = PlayedParent()
    with parent:
        provider = RespondingProvider()
        url = Url(scheme="http", host="api.test", port=provider.port)
        where = parent_at(parent, host="parent.test")
        async with pool_of(provider, url, parent=where) as (_, pool):
            both = [(socket.AF_INET, 1, 6, "", (f"127.0.0.{last}", 0)) for last in (2, 1)]
            pool.resolver._getaddrinfo = lambda *_: both
            assert await pool.fetch() == b"ok"
        assert parent.accepted == 1


@ensureDeferred
async def test_a_lack_of_descriptors_is_not_the_parents_fault() -> None:
    """It is told as on the way to a provider: the caller may try again."""
    url = Url(scheme="http", host="api.test", port=80)
    parent = ParentProxy(Url(scheme="http", host="parent.test", port=3128), None)
    pool = OneProviderPool(url, parent=parent)
    pool.lookup.error = OSError(errno.EMFILE, "Too many open files")
    error = await failure_of(pool.send())
    assert (error.status, error.reason, error.cause) == (503, "no_descriptors", None)
    await pool.close()


@pytest.mark.parametrize("fault", ["refused", "no name"])
@TRANSPORTS
@ensureDeferred
async def test_a_parent_that_cannot_be_reached_has_its_own_cause(direct: bool, fault: str) -> None:
    """Its name is not known, or nobody listens there."""
    with socket.socket() as nobody:
        nobody.bind(("127.0.0.1", 0))
        parent = ParentProxy(
            Url(scheme="http", host="parent.test", port=nobody.getsockname()[1]), None
        )
        url = Url(scheme="http", host="127.0.0.1", port=80)
        pool = OneProviderPool(url, parent=parent, direct=direct)
        if fault == "no name":
            pool.lookup.error = socket.gaierror(socket.EAI_NONAME, "Name or service not known")
        error = await failure_of(pool.send())
        assert_unreachable(error, "parent_proxy_unreachable")
        words = {"refused": "ConnectionRefusedError", "no name": "Name or service not known"}
        assert words[fault] in error.detail
        assert error.detail.startswith("parent proxy: ")
        await pool.close()


@ensureDeferred
async def test_a_deadline_says_which_hop_was_late(authority: Authority) -> None:
    """``connect`` covers the parent's name, its answer and the handshake; the cause names each."""
    played = PlayedParent()
    deadline = Timeouts(connect=10.0)

    async def late(is_there: Callable[[], object]) -> str | None:
        response = pool.send(timeouts=deadline)
        await until(is_there)
        pool.clock.advance(9.9)
        assert not response.called
        pool.clock.advance(0.2)
        error = await failure_of(response)
        assert (error.status, error.end) == (504, EndReason.UPSTREAM_TIMEOUT)
        assert not error.may_have_run
        return error.cause

    with played:
        url = Url(scheme="https", host="api.test", port=443)
        pool = OneProviderPool(
            url, ca=authority.ca_path, parent=parent_at(played, host="parent.test")
        )
        pool.lookup.hangs = lambda name: True
        assert await late(lambda: pool.lookup.names) == "parent_proxy"
        pool.lookup.over.set()
        await until(lambda: not pool.resolver._waiting)

        seen: queue.Queue[bytes] = queue.Queue()

        def silent(wire: Wire) -> None:
            seen.put(wire.read_until(b"\r\n\r\n"))
            wire.wait_closed()

        played._script = silent
        assert await late(lambda: not seen.empty()) == "tunnel"

        hellos: queue.Queue[bytes] = queue.Queue()

        def opens(wire: Wire) -> None:
            wire.read_head()
            wire.send(ESTABLISHED)
            hellos.put(wire.receive())
            wire.wait_closed()

        played._script = opens
        assert await late(lambda: not hellos.empty()) == "handshake"
        assert read_hello(hellos.get()).name == b"api.test"
        await pool.close()


# --- TLS in the tunnel ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fault", "cause"), [("name", "wrong_name"), ("authority", "unknown_authority")]
)
@TRANSPORTS
@ensureDeferred
async def test_the_certificate_is_for_the_provider_and_not_for_the_parent(
    authority: Authority, tmp_path: Path, fault: str, cause: str, direct: bool
) -> None:
    """The parent's own name in it is wrong, too; the cause is that of any handshake."""
    issuer = authority if fault == "name" else Authority(tmp_path)
    tls = issuer.server("parent.test" if fault == "name" else "api.test")
    parent, provider = PlayedParent(), RespondingProvider(tls=tls)
    with parent:
        url = Url(scheme="https", host="api.test", port=provider.port)
        options = {"ca": authority.ca_path, "parent": parent_at(parent), "direct": direct}
        with contextlib.suppress(ssl.SSLError):  # which the provider's side of the handshake is
            async with pool_of(provider, url, **options) as (_, pool):
                error = await failure_of(pool.send())
    assert (error.end, error.cause) == (EndReason.UPSTREAM_TLS, cause)


@ensureDeferred
async def test_a_provider_that_is_no_server_of_tls_fails_as_without_a_parent() -> None:
    """The tunnel is there; what comes through it is not TLS."""
    parent = PlayedParent()

    def speaks_plainly(wire: Wire) -> None:
        wire.receive()
        wire.send(b"HTTP/1.1 400 Bad Request\r\n\r\n")
        wire.wait_closed()

    with parent:
        provider = Provider(speaks_plainly)
        url = Url(scheme="https", host="api.test", port=provider.port)
        async with pool_of(provider, url, parent=parent_at(parent)) as (_, pool):
            error = await failure_of(pool.send())
    assert (error.end, error.cause) == (EndReason.UPSTREAM_TLS, "protocol")


@TRANSPORTS
@ensureDeferred
async def test_a_session_is_resumed_through_a_tunnel(authority: Authority, direct: bool) -> None:
    """The second tunnel costs no full handshake inside."""
    script = Resuming(plain(b"ok", b"Connection: close"))
    provider = Provider(script, tls=authority.server("api.test"))
    parent = PlayedParent()
    with parent:
        url = Url(scheme="https", host="api.test", port=provider.port)
        options = {"ca": authority.ca_path, "parent": parent_at(parent), "direct": direct}
        async with pool_of(provider, url, **options) as (_, pool):
            for _ in range(2):
                assert await pool.fetch() == b"ok"
            assert script.resumed == [False, True]
        assert parent.accepted == 2


# --- how a body ends ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("scheme", "end", "is_whole"),
    [
        ("http", "fin", False),
        ("http", "reset", False),
        ("https", "close_notify", True),
        ("https", "fin", False),
        ("https", "reset", False),
    ],
)
@TRANSPORTS
@ensureDeferred
async def test_a_fin_behind_a_parent_ends_no_body(
    authority: Authority, scheme: str, end: str, is_whole: bool, direct: bool
) -> None:
    """The parent turns a reset into a FIN. Inside TLS, close_notify is the provider's own end."""

    def play(wire: Wire) -> None:
        wire.read_request()
        wire.send(b"HTTP/1.1 200 OK\r\n\r\ndata: 1\n\n")
        if end == "close_notify":
            wire.close_notify()
        elif end == "reset":
            wire.reset()

    provider = RespondingProvider(tls=authority.server("api.test") if scheme == "https" else None)
    provider._script = play
    async with through(PlayedParent(), authority, scheme, provider=provider, direct=direct) as (
        _,
        pool,
    ):
        response = await pool.send()
        body = Collector()
        response.deliverBody(body)
        await body.ended
        assert body.body == b"data: 1\n\n"
        broken = None if is_whole else EndReason.UPSTREAM_BROKEN
        assert getattr(body.ends[0], "end", None) == broken


@SCHEMES
@ensureDeferred
async def test_a_framed_body_is_whole_behind_a_parent(authority: Authority, scheme: str) -> None:
    """What its framing says counts, and the connection is kept."""
    tls = authority.server("api.test") if scheme == "https" else None
    response = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n" + chunked(b"1", b"2")
    provider = RespondingProvider(response + b"0\r\n\r\n", tls=tls)
    async with through(PlayedParent(), authority, scheme, provider=provider) as (_, pool):
        assert await read(await pool.send()) == b"12"
        pool.assert_counts(idle=1)


# --- from one configuration to the next -----------------------------------------------------------


def test_the_parent_and_its_credential_keep_connections_apart() -> None:
    """Another parent, or another password for it, is another way to the provider."""
    url = Url(scheme="https", host="api.test", port=443)
    provider = ProviderConfig(name="p", url=url, dialect=Dialect.RAW)
    one, two = (Url(scheme="http", host="parent.test", port=port) for port in (1, 2))

    def key(parent: Url | None, credential: str | None = None) -> object:
        secret = None if credential is None else Secret(credential)
        proxy = Proxy(parent_proxy=parent, parent_proxy_credential=secret)
        return connection_key(provider, config_of(provider, proxy=proxy))

    assert key(one, "a:b") == key(one, "a:b")
    assert len({key(None), key(one), key(two), key(one, "a:b"), key(one, "a:c")}) == 5


@ensureDeferred
async def test_a_reload_that_changes_the_password_makes_new_connections() -> None:
    """Idle tunnels of the old password are closed, and the next request brings the new one."""
    parent = PlayedParent()
    with parent:
        old = parent_at(parent, "team:old")
        async with upstream_of(RespondingProvider(), parent=old) as (_, upstream):
            await upstream.fetch()
            values = {
                name: getattr(upstream.provider, name)
                for name in upstream.provider.__struct_fields__
            }
            upstream.follow(ProviderConfig(**values))
            assert upstream.count("idle") == 1
            values["parent_proxy_credential"] = Secret("team:new")
            upstream.follow(ProviderConfig(**values))
            await until(lambda: upstream.count("idle") == 0)
            await upstream.fetch()
        sent = [parent.heads.get()[1][b"proxy-authorization"] for _ in range(2)]
        assert sent == [b"Basic " + base64.b64encode(one) for one in (b"team:old", b"team:new")]
