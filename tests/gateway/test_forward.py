"""Requests with a whole URL, on real sockets: what crosses, what is refused, and how it fails."""

from __future__ import annotations

import hashlib
import json
import socket
from base64 import b64encode
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from functools import partial
from typing import Any, NamedTuple, cast

import msgspec
import pytest
from pytest_twisted import ensureDeferred
from twisted.internet.defer import Deferred
from twisted.internet.task import Clock
from twisted.logger import LogLevel, capturedLogs

from llmproxy.config import (
    Client,
    ClientKey,
    Config,
    Intercept,
    Limits,
    Proxy,
    Timeouts,
    Tunnel,
)
from llmproxy.config.tunnel_target import tunnel_target
from llmproxy.gateway.connect import Ways
from llmproxy.gateway.forward import Forward
from llmproxy.gateway.recorder import Recorder
from llmproxy.http1.grammar import BadMessage, parse_absolute
from llmproxy.net.addresses import AddressGuard
from llmproxy.policy.limits import ClientLimits
from llmproxy.record.metrics import Metrics
from llmproxy.record.trace import Trace
from llmproxy.server.handler import Handler, Router
from llmproxy.upstream.way_out import WayOut, tunnel_resolver
from tests.gateway.played import KeptTraces
from tests.support.fake_transport import until
from tests.support.served import Served
from tests.support.sockets import Provider, Wire, connect, request
from tests.upstream.one_provider import RespondingProvider, plain, take

SECRET = "llmp_" + "k" * 43
CLIENT = Client(name="c", keys=(ClientKey(hash=hashlib.sha256(SECRET.encode()).digest()),))
KEY = "Proxy-Authorization: Basic " + b64encode(f"c:{SECRET}".encode()).decode()
INTERCEPT = Intercept(hosts=("inference.local", "*.ours.example"), authority=cast("Any", None))
SMALL_BODY = 1000


class Forwarding(NamedTuple):
    """A site that forwards, and what it keeps."""

    served: Served
    sink: KeptTraces
    clock: Clock
    ways: Ways
    accessed: list[Trace]

    async def ask(self, data: bytes) -> tuple[bytes, dict[bytes, bytes], bytes]:
        """Send a request on a connection of its own; return status line, fields and body."""

        def talk() -> tuple[bytes, dict[bytes, bytes], bytes]:
            with connect(self.served.port) as wire:
                wire.send(data)
                line, fields = wire.read_head()
                head = data.startswith(b"HEAD ")
                return line, dict(fields), b"" if head else read_body(wire, fields)

        return await self.served.run(talk)

    async def record(self, count: int = 1) -> Trace:
        """Return the last record, once there are so many."""
        await until(lambda: len(self.sink.traces) == count)
        return self.sink.traces[-1]


def read_body(wire: Wire, fields: list[tuple[bytes, bytes]]) -> bytes:
    """Read a body in whichever framing it has."""
    if dict(fields).get(b"transfer-encoding") == b"chunked":
        return wire.read_chunks()
    return wire.read_body(fields)


@asynccontextmanager
async def forwarding(
    *allow: str,
    is_strict: bool = False,
    observe: bool = False,
    client: Client = CLIENT,
    limits: Limits | None = None,
    timeouts: Timeouts | None = None,
) -> AsyncIterator[Forwarding]:
    """Forward to these hosts; if it is strict, only to public addresses."""
    async with Served() as served:
        reactor = served.reactor
        config = Config(
            proxy=Proxy(via="us"),
            timeouts=timeouts or Timeouts(),
            limits=limits or Limits(),
            tunnel=Tunnel(
                allow=tuple(map(tunnel_target, allow)), allow_private=True, observe=observe
            ),
            clients={"c": client},
            intercept=INTERCEPT,
        )
        sink, metrics = KeptTraces(), Metrics("1")
        clock, accessed = Clock(), list[Trace]()
        ways = Ways(clock, clock.seconds)
        recorder = Recorder(
            metrics,
            sink,
            access=lambda trace, *_: accessed.append(trace),
            clock=reactor.seconds,
            wall=lambda: 1_700_000_000.0,
            instance="0",
        )
        client_limits = ClientLimits(reactor.seconds, lambda: 1_700_000_000.0)
        client_limits.follow(config.clients)
        out = WayOut(
            reactor,
            tunnel_resolver(reactor, reactor.seconds),
            config,
            AddressGuard(lambda: [("127.0.0.1", served.port)], allow_private=not is_strict),
        )
        forward = Forward(
            config,
            recorder,
            metrics,
            ways,
            way_out=out,
            limits=client_limits,
            reactor=reactor,
            clock=reactor.seconds,
        )
        served.site.serve(Router(Handler(), urls=forward))
        yield Forwarding(served, sink, clock, ways, accessed)


def url(host: Provider, path: str = "/") -> str:
    """Return the URL of a path at a host."""
    return f"http://127.0.0.1:{host.port}{path}"


ANY = "127.0.0.1:*"


# --- the target -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("target", "read"),
    [
        (b"http://a.example/x?y=%20#", None),
        (b"http://a.example/x?y=%20", ("a.example", "a.example", 80, b"/x?y=%20")),
        (b"HTTP://A.example:80/", ("A.example", "A.example", 80, b"/")),
        (b"http://a.example:8080", ("a.example:8080", "a.example", 8080, b"/")),
        (b"http://a.example?x", ("a.example", "a.example", 80, b"/?x")),
        (b"http://[fd12::1]:81/", ("[fd12::1]:81", "fd12::1", 81, b"/")),
        (b"https://a.example/", None),
        (b"ftp://a.example/", None),
        (b"http://u:p@a.example/", None),
        (b"http:///x", None),
        (b"http://a.example:0/", None),
        (b"http://a.example:65536/", None),
        (b"http://a.example:/", None),
        (b"http://a%2eexample/", None),
    ],
)
def test_a_url_is_read_strictly(target: bytes, read: tuple[Any, ...] | None) -> None:
    """Path and query stay as they are; no user, no fragment, no other scheme."""
    if b"#" in target:  # which no request line can have
        return
    if read is None:
        with pytest.raises(BadMessage):
            parse_absolute(target)
    else:
        assert parse_absolute(target) == read


# --- what crosses ---------------------------------------------------------------------------------


@ensureDeferred
async def test_a_host_gets_the_request_as_its_own() -> None:
    """Path and query byte for byte, the URL's host in Host, and nothing that is for the proxy."""
    response = plain(b"there", b"X-Own: 1", b"Proxy-Authenticate: x", status=b"201 Made")
    with RespondingProvider(response) as host:
        async with forwarding(ANY) as site:
            line, fields, body = await site.ask(
                request(
                    "POST",
                    url(host, "/a%2Fb/../c?q=%41&r"),
                    KEY,
                    "Authorization: Basic aG9zdDpvd24=",
                    f"X-LLMProxy-Key: {SECRET}",
                    "Proxy-Connection: keep-alive",
                    "Connection: x-hop",
                    "X-Hop: 1",
                    "X-Own: yes",
                    "X-Forwarded-For: 10.0.0.1",
                    host="elsewhere.example",
                    body=b"hello",
                )
            )
            got = await take(host.requests)
            assert (got.method, got.target) == (b"POST", b"/a%2Fb/../c?q=%41&r")
            assert got.body == b"hello"
            sent = dict(got.fields)
            assert len(sent) == len(got.fields)
            name = sent.pop(b"x-request-id").decode()
            assert sent == {
                b"host": b"127.0.0.1:%d" % host.port,
                b"authorization": b"Basic aG9zdDpvd24=",
                b"x-own": b"yes",
                b"via": b"1.1 us",
                b"connection": b"close",
                b"content-length": b"5",
            }
            assert (line, body) == (b"HTTP/1.1 201 Created", b"there")
            assert fields[b"x-own"] == b"1"
            assert fields[b"x-llmproxy-request-id"] == name.encode()
            assert b"proxy-authenticate" not in fields
            trace = await site.record()
            assert (trace.id, trace.client, trace.status) == (name, "c", 201)
            assert trace.tunnel == "forwarded"
            assert (trace.method, trace.path) == ("POST", url(host, "/a%2Fb/../c"))
            assert (trace.end_reason, trace.bytes_in, trace.bytes_out) == ("complete", 5, 5)


@ensureDeferred
async def test_both_bodies_stream() -> None:
    """Each piece arrives before the next is sent; the framing of the request is kept."""

    def host_side(wire: Wire) -> None:
        wire.read_head()
        assert wire.read_chunk() == b"one"
        wire.send(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nuno\r\n")
        assert wire.read_chunk() == b"two"
        wire.send(b"3\r\ndos\r\n")
        assert wire.read_chunk() == b""
        wire.send(b"0\r\n\r\n")

    def client_side() -> list[bytes]:
        with connect(site.served.port) as wire:
            wire.send(request("PUT", url(host), KEY, "Transfer-Encoding: chunked"))
            wire.send(b"3\r\none\r\n")
            wire.read_head()
            got = [wire.read_chunk()]
            wire.send(b"3\r\ntwo\r\n")
            got.append(wire.read_chunk())
            wire.send(b"0\r\n\r\n")
            return [*got, wire.read_chunk()]

    with Provider(host_side) as host:
        async with forwarding(ANY) as site:
            assert await site.served.run(client_side) == [b"uno", b"dos", b""]
            assert (await site.record()).end_reason == "complete"


@pytest.mark.parametrize("method", ["GET", "HEAD", "DELETE", "OPTIONS", "PATCH"])
@ensureDeferred
async def test_a_request_without_a_body_has_the_framing_of_its_method(method: str) -> None:
    """And a response of 404 is the host's own, and is handed on."""
    with RespondingProvider(plain(b"" if method == "HEAD" else b"no", status=b"404 No")) as host:
        async with forwarding(ANY) as site:
            line, _, _ = await site.ask(request(method, url(host), KEY))
            assert line == b"HTTP/1.1 404 Not Found"
            trace = await site.record()
            assert (trace.end_reason, trace.error) == ("upstream_refused", None)


@ensureDeferred
async def test_a_body_that_the_end_of_the_connection_ends_is_whole_behind_a_fin() -> None:
    """An old server speaks so; the client gets it in chunks."""

    def old(wire: Wire) -> None:
        wire.read_head()
        wire.send(b"HTTP/1.0 200 OK\r\n\r\nall of it")

    with Provider(old) as host:
        async with forwarding(ANY) as site:
            _, fields, body = await site.ask(request("GET", url(host), KEY))
            assert (fields[b"transfer-encoding"], body) == (b"chunked", b"all of it")


# --- what is refused ------------------------------------------------------------------------------


@ensureDeferred
async def test_a_key_is_asked_for_and_may_come_on_the_same_connection() -> None:
    """As git does it; the host sees nothing of the first try."""
    with RespondingProvider() as host:
        async with forwarding(ANY) as site:

            def twice() -> list[bytes]:
                lines = []
                with connect(site.served.port) as wire:
                    for more in ([], [KEY]):
                        wire.send(request("GET", url(host), *more))
                        line, fields = wire.read_head()
                        lines.append(line)
                        wire.read_body(fields)
                        if not more:
                            assert dict(fields)[b"proxy-authenticate"] == b'Basic realm="llmproxy"'
                return lines

            lines = await site.served.run(twice)
            assert [line.split(b" ")[1] for line in lines] == [b"407", b"200"]
            assert host.accepted == 1


@pytest.mark.parametrize(
    ("target", "more", "status", "reason", "words"),
    [
        ("http://other.example/", (), 403, "tunnel_refused", "Host not on the tunnel list."),
        ("http://127.0.0.1:1/", (), 403, "tunnel_refused", "Port not on the tunnel list"),
        ("http://inference.local/v1/x", (), 403, "plain_http", "https://inference.local"),
        ("http://a.OURS.example./", (), 403, "plain_http", "https://a.ours.example"),
        ("https://a.example/", (), 400, "bad_target", "CONNECT"),
        ("http://me:secret@a.example/", (), 400, "bad_target", "without a user"),
        ("http://127.0.0.1:80/", ("Via: 1.1 us",), 508, "loop", "came through"),
        ("http://127.0.0.1:80/", ("X_Api_Key: k",), 400, "bad_header", "x_api_key"),
        (
            "http://127.0.0.1:80/",
            ("Upgrade: websocket", "Connection: upgrade"),
            426,
            "websocket",
            "",
        ),
    ],
)
@ensureDeferred
async def test_what_is_not_forwarded_is_refused_with_the_reason(
    target: str, more: tuple[str, ...], status: int, reason: str, words: str
) -> None:
    """Before anything is looked up; a password is in no record."""
    async with forwarding("127.0.0.1:80") as site:
        line, fields, body = await site.ask(request("GET", target, KEY, *more))
        assert line.startswith(b"HTTP/1.1 %d " % status)
        assert fields[b"x-llmproxy-error"] == reason.encode()
        assert words in json.loads(body)["error"]["message"]
        trace = await site.record()
        assert (trace.end_reason, trace.error) == ("rejected", reason)
        assert trace.tunnel == (None if reason == "bad_target" else "refused")
        assert "secret" not in trace.path


@ensureDeferred
async def test_a_method_that_is_not_served_is_refused() -> None:
    """TRACE would show the host's answer to what the proxy added."""
    async with forwarding(ANY) as site:
        line, fields, _ = await site.ask(request("TRACE", "http://127.0.0.1:80/", KEY))
        assert line.startswith(b"HTTP/1.1 405 ")
        assert b"GET" in fields[b"allow"]


@ensureDeferred
async def test_addresses_are_checked_as_those_of_tunnels() -> None:
    """The list has this one, and it may not be reached."""
    async with forwarding(ANY, is_strict=True) as site:
        line, fields, _ = await site.ask(request("GET", "http://127.0.0.1:80/", KEY))
        assert line.startswith(b"HTTP/1.1 403 ")
        assert fields[b"x-llmproxy-error"] == b"address_forbidden"
        trace = await site.record()
        assert (trace.error, trace.tunnel) == ("address_forbidden", "refused")


@ensureDeferred
async def test_the_proxy_is_not_reached_through_itself() -> None:
    """Whatever is allowed."""
    async with forwarding(ANY) as site:
        target = f"http://127.0.0.1:{site.served.port}/"
        line, fields, _ = await site.ask(request("GET", target, KEY))
        assert fields[b"x-llmproxy-error"] == b"address_forbidden"
        assert line.startswith(b"HTTP/1.1 403 ")


@ensureDeferred
async def test_a_refusal_comes_before_the_body() -> None:
    """A client that waits to be invited is not."""
    async with forwarding(ANY) as site:
        waits = ("Expect: 100-continue", "Content-Length: 5")
        line, _, _ = await site.ask(request("POST", "http://other.example/", KEY, *waits))
        assert line.startswith(b"HTTP/1.1 403 ")


@ensureDeferred
async def test_a_body_that_is_too_large_is_refused() -> None:
    """``limits.request_body`` counts here, too."""
    with RespondingProvider() as host:
        async with forwarding(ANY, limits=Limits(request_body=SMALL_BODY)) as site:
            line, _, _ = await site.ask(request("POST", url(host), KEY, body=bytes(SMALL_BODY + 1)))
            assert line.startswith(b"HTTP/1.1 413 ")


@ensureDeferred
async def test_refusals_that_repeat_are_a_line_and_a_count() -> None:
    """Whatever path of the host is asked for; each has its record."""
    async with forwarding("127.0.0.1:80") as site:
        for target in ("http://other.example/a", "http://OTHER.example:80/b?c", "http://[::2]/"):
            await site.ask(request("GET", target, KEY))
            await site.ask(request("GET", target, KEY))
        await site.ask(request("GET", "http://other.example/"))
        await site.record(7)
        assert [(one.path, one.client) for one in site.accessed] == [
            ("http://other.example/a", "c"),
            ("http://[::2]/", "c"),
            ("http://other.example/", None),
        ]
        with capturedLogs() as lines:
            site.clock.advance(60)
        assert [(line["host"], line["count"], line["client"]) for line in lines] == [
            ("other.example:80", 3, "c"),
            ("[::2]:80", 1, "c"),
        ]
        assert {line["log_level"] for line in lines} == {LogLevel.warn}
        await site.ask(request("GET", "http://other.example/", KEY))
        await site.record(8)
        assert len(site.accessed) == 4


@ensureDeferred
async def test_a_refused_connect_and_a_refused_url_of_a_host_are_the_same() -> None:
    """A program that cannot have the one tries the other."""
    async with forwarding("127.0.0.1:80") as site:
        assert site.ways.repeats.is_first("other.example:80", "c", "tunnel_refused")
        await site.ask(request("GET", "http://other.example/", KEY))
        await site.record()
        assert not site.accessed


@pytest.mark.parametrize("target", ["https://a.example/", f"http://{SECRET}/"])
@ensureDeferred
async def test_a_target_that_is_not_shown_is_counted_without_it(target: str) -> None:
    """It may be anything, and hold a key."""
    async with forwarding("127.0.0.1:80") as site:
        for _ in range(2):
            await site.ask(request("GET", target, KEY))
        await site.record(2)
        assert len(site.accessed) == 1
        with capturedLogs() as lines:
            site.clock.advance(60)
        assert [line["host"] for line in lines] == ["a target that is not shown"]


# --- how it fails ---------------------------------------------------------------------------------


def closes(wire: Wire) -> None:
    """Close before a response."""
    wire.read_head()


def no_http(wire: Wire) -> None:
    """Speak another protocol."""
    wire.read_head()
    wire.send(b"SSH-2.0-x\r\n\r\n\r\n")
    wire.wait_closed()


@pytest.mark.parametrize(
    ("script", "end", "words"),
    [
        (closes, "upstream_broken", "The host broke off its response."),
        (no_http, "upstream_protocol", "The host's response is not valid HTTP."),
    ],
)
@ensureDeferred
async def test_a_host_that_does_not_respond_is_a_502(
    script: Callable[[Wire], None], end: str, words: str
) -> None:
    """The words are of a host, and not of a provider."""
    with Provider(script) as host:
        async with forwarding(ANY) as site:
            line, _, body = await site.ask(request("GET", url(host), KEY))
            assert line.startswith(b"HTTP/1.1 502 ")
            assert json.loads(body)["error"]["message"] == words
            assert (await site.record()).end_reason == end
            await site.ask(request("GET", url(host), KEY))
            await site.record(2)
            assert len(site.accessed) == 2  # it was not refused: each has its line


@ensureDeferred
async def test_a_host_that_nobody_is_at_is_a_502() -> None:
    """The cause is in the log, the caller reads a sentence."""
    with socket.socket() as nobody:
        nobody.bind(("127.0.0.1", 0))
        async with forwarding(ANY) as site:
            target = f"http://127.0.0.1:{nobody.getsockname()[1]}/"
            line, _, body = await site.ask(request("GET", target, KEY))
            assert line.startswith(b"HTTP/1.1 502 ")
            assert json.loads(body)["error"]["message"] == "The host cannot be reached."


@pytest.mark.parametrize("key", ["first_byte", "total"])
@ensureDeferred
async def test_a_silent_host_is_given_up(key: str) -> None:
    """Under the deadlines of ``[timeouts]``; the host's connection is closed."""
    with RespondingProvider(None) as host:
        timeouts = Timeouts(**{"first_byte": None, key: 30.0})
        async with forwarding(ANY, timeouts=timeouts) as site:
            asked = Deferred.fromCoroutine(site.ask(request("GET", url(host), KEY)))
            wire = await take(host.wires)
            await until(partial(has_head, wire))
            await site.served.pass_time(31)
            line, _, body = await asked
            assert line.startswith(b"HTTP/1.1 504 ")
            assert "The host did not answer in time." in json.loads(body)["error"]["message"]
            assert (await site.record()).end_reason == "upstream_timeout"
            await take(host.closed)


@ensureDeferred
async def test_a_client_that_leaves_takes_the_hosts_connection_along() -> None:
    """While it waits for the response, and in the middle of it."""
    begun = b"HTTP/1.1 200 OK\r\nContent-Length: 10\r\n\r\nhalf"
    for response in (None, begun):
        with RespondingProvider(response) as host:
            async with forwarding(ANY) as site:
                client = await site.served.run(connect, site.served.port)
                client.send(request("GET", url(host), KEY))
                wire = await take(host.wires)
                if response is None:
                    await until(partial(has_head, wire))
                else:
                    await site.served.run(client.read_until, b"half")
                client.reset()
                await take(host.closed)
                assert (await site.record()).end_reason == "client_gone"


def has_head(wire: Wire) -> bool:
    """Tell whether a host's own thread has read the head of a request."""
    return b"\r\n\r\n" in wire.buffer


@ensureDeferred
async def test_a_body_that_breaks_is_not_whole_for_the_client() -> None:
    """What came before the break arrives."""

    def breaks(wire: Wire) -> None:
        wire.read_head()
        wire.send(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n4\r\nhalf\r\n")
        wire.reset()

    with Provider(breaks) as host:
        async with forwarding(ANY) as site:
            with pytest.raises((EOFError, ConnectionError)):
                await site.ask(request("GET", url(host), KEY))
            trace = await site.record()
            assert (trace.end_reason, trace.status, trace.is_complete) == (
                "upstream_broken",
                200,
                False,
            )


@ensureDeferred
async def test_limits_of_the_client_count() -> None:
    """A request counts for its limits as every other."""
    client = msgspec.structs.replace(CLIENT, requests_per_minute=1)
    with RespondingProvider() as host:
        async with forwarding(ANY, client=client) as site:
            statuses = []
            for _ in range(2):
                line, _, _ = await site.ask(request("GET", url(host), KEY))
                statuses.append(line.split(b" ")[1])
            assert statuses == [b"200", b"429"]


@pytest.mark.parametrize(
    ("target", "field", "place"),
    [
        ("/", f"Authorization: Bearer {SECRET}", "the header authorization"),
        ("/", f"X-Api-Key: {SECRET}", "the header x-api-key"),
        ("/", f"Cookie: k={SECRET}", "the header cookie"),
        (f"/?key={SECRET}", "Accept: */*", "the query"),
        (f"/{SECRET}/", "Accept: */*", "the path"),
    ],
)
@ensureDeferred
async def test_no_key_of_a_client_crosses(target: str, field: str, place: str) -> None:
    """A host that anybody may own must not get one; it is in no record, either."""
    async with forwarding("127.0.0.1:80") as site:
        line, fields, body = await site.ask(request("GET", f"http://127.0.0.1{target}", KEY, field))
        assert line.startswith(b"HTTP/1.1 401 ")
        assert fields[b"x-llmproxy-error"] == b"misplaced_key"
        assert place in json.loads(body)["error"]["message"]
        assert SECRET not in (await site.record()).path


@ensureDeferred
async def test_what_is_observed_passes_and_is_marked() -> None:
    """As a tunnel."""
    with RespondingProvider() as host:
        async with forwarding("a.example:80", observe=True) as site:
            line, _, _ = await site.ask(request("GET", url(host), KEY))
            assert line == b"HTTP/1.1 200 OK"
            trace = await site.record()
            assert (trace.tunnel, trace.end_reason) == ("would_refuse", "complete")


@ensureDeferred
async def test_a_wrong_key_is_a_407() -> None:
    """It is not a 401, which would be the host's."""
    async with forwarding(ANY) as site:
        line, fields, _ = await site.ask(
            request("GET", "http://127.0.0.1:80/", "Proxy-Authorization: Bearer wrong")
        )
        assert line.startswith(b"HTTP/1.1 407 ")
        assert fields[b"proxy-authenticate"] == b'Basic realm="llmproxy"'
