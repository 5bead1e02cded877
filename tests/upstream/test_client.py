"""What treq must not do to a request or a response, and how a request's body goes out."""

from __future__ import annotations

import gzip
import queue
import select
import socket
from typing import Any

import pytest
import pytest_twisted
import treq.client
import twisted.web.client
from treq.client import HTTPClient
from twisted.internet.defer import CancelledError, Deferred
from twisted.internet.threads import deferToThread
from twisted.web.client import ResponseDone
from twisted.web.iweb import UNKNOWN_LENGTH, IBodyProducer
from zope.interface import implementer

from llmproxy.config import Config, Timeouts, Url
from llmproxy.config import Provider as ProviderConfig
from llmproxy.dialects.dialect import Dialect
from llmproxy.errors import EndReason, ProxyError
from llmproxy.http1.grammar import Fields
from llmproxy.net.transport import pending_bytes
from llmproxy.upstream.client import LeanClient, NoCookies, PreparedUrl, Upstream
from llmproxy.upstream.request_body import HeldBody
from llmproxy.upstream.response import Response
from tests.support.fake_transport import Collector, FakeTransport, TurnedReactor, turn, until
from tests.support.sockets import WAIT, Provider, Received, Wire

OFF = Timeouts(connect=None, first_byte=None)


class Peer(Provider):
    """A provider that gives the same response to every request, and tells what it got."""

    def __init__(self, response: bytes, **kwargs: Any) -> None:
        super().__init__(self.serve, **kwargs)
        self.response = response
        self.requests: queue.Queue[Received] = queue.Queue()

    def serve(self, wire: Wire) -> None:
        """Answer until the client's end."""
        while True:
            self.requests.put(wire.read_request())
            wire.send(self.response)

    async def got(self) -> Received:
        """Wait for the next request."""
        return await deferToThread(self.requests.get, True, WAIT)


class Rig:
    """An upstream with one provider."""

    def __init__(self, peer: Provider) -> None:
        url = Url(scheme="http", host="127.0.0.1", port=peer.port)
        self.provider = ProviderConfig(name="p", url=url, dialect=Dialect.RAW)
        self.reactor = TurnedReactor()
        config = Config(providers={"p": self.provider})
        self.upstream = Upstream(self.reactor, self.reactor.seconds, config)

    def send(
        self,
        method: str = "GET",
        target: bytes = b"/",
        fields: Fields | None = None,
        body: bytes | IBodyProducer = b"",
        timeouts: Timeouts = OFF,
    ) -> Deferred[Response]:
        """Send one request."""
        return self.upstream.send(
            self.provider, method, target, fields or [], body, credential=b"", timeouts=timeouts
        )

    async def fetch(self, *args: Any) -> tuple[Response, bytes]:
        """Send one request and return its response and whole body."""
        response = await self.send(*args)
        collector = Collector()
        response.deliverBody(collector)
        await collector.ended
        assert isinstance(collector.ends[0], ResponseDone)
        return response, collector.body

    async def rest(self) -> None:
        """Close what is open; nothing may be left."""
        self.upstream.close()
        await until(lambda: not any(self.upstream.counts().values()))
        assert not self.reactor.timers()


def plain(body: bytes, *fields: bytes, status: bytes = b"200 OK") -> bytes:
    """Return a response with a length."""
    lines = [b"HTTP/1.1 " + status, *fields, b"Content-Length: %d" % len(body)]
    return b"\r\n".join(lines) + b"\r\n\r\n" + body


# --- treq stays out of it -------------------------------------------------------------------------


@pytest_twisted.ensureDeferred
async def test_treq_adds_nothing_to_a_request() -> None:
    """The provider gets our fields and target alone: no cookie, no encoding, no pool's name."""
    with Peer(plain(b"x", b"Set-Cookie: a=b; Path=/")) as peer:
        rig = Rig(peer)
        for _ in range(2):
            await rig.fetch("GET", b"/v1/{x}|?", [(b"x-a", b"1")])
            got = await peer.got()
            assert got.target == b"/v1/{x}|?"
            assert got.fields == [(b"host", f"127.0.0.1:{peer.port}".encode()), (b"x-a", b"1")]
        await rig.rest()


def test_only_two_names_of_treqs_request_mean_something_else() -> None:
    """The call is treq's own code, which asks for both agents by name, and treq keeps its own."""
    theirs, ours = HTTPClient.request, LeanClient.request
    assert ours.__code__ is theirs.__code__
    assert {"CookieAgent", "ContentDecoderAgent"} <= set(theirs.__code__.co_names)
    own, lean = vars(treq.client), ours.__globals__
    changed = {name for name in own if name != "__builtins__" and own[name] is not lean.get(name)}
    assert changed == {"CookieAgent", "ContentDecoderAgent"}
    pool = object()
    assert lean["CookieAgent"](pool, None) is lean["ContentDecoderAgent"](pool, []) is pool
    assert own["CookieAgent"] is twisted.web.client.CookieAgent


@pytest_twisted.ensureDeferred
@pytest.mark.parametrize("coding", [b"gzip", b"deflate", b"br"])
async def test_encoded_bodies_are_not_decoded(coding: bytes) -> None:
    """Bytes and ``Content-Encoding`` are those of the provider, also where they do not match."""
    body = gzip.compress(b"text")
    with Peer(plain(body, b"Content-Encoding: " + coding)) as peer:
        rig = Rig(peer)
        response, got = await rig.fetch()
        assert (b"content-encoding", coding) in response.fields
        assert got == body
        await rig.rest()


@pytest_twisted.ensureDeferred
@pytest.mark.parametrize("status", [b"301", b"302", b"303", b"307", b"308"])
async def test_redirects_are_not_followed(status: bytes) -> None:
    """The response is the redirect itself, and nothing else is asked for."""
    with Peer(plain(b"", b"Location: /else", status=status + b" Gone")) as peer:
        rig = Rig(peer)
        response, _ = await rig.fetch("POST", b"/", [], b"{}")
        assert response.code == int(status)
        await peer.got()
        assert peer.requests.empty()
        await rig.rest()


@pytest_twisted.ensureDeferred
@pytest.mark.parametrize("method", ["GET", "POST", "DELETE"])
async def test_nothing_is_sent_a_second_time(method: str) -> None:
    """A request that an old connection lost is not repeated behind our back."""
    responses = [plain(b"x")]
    seen: queue.Queue[bytes] = queue.Queue()

    def serve_once(wire: Wire) -> None:
        seen.put(wire.read_request().method)
        wire.send(responses.pop())
        seen.put(wire.read_request().method)

    with Provider(serve_once) as peer:
        rig = Rig(peer)
        await rig.fetch(method)
        with pytest.raises(ProxyError) as caught:
            await rig.fetch(method)
        assert caught.value.end is EndReason.UPSTREAM_BROKEN
        assert (seen.qsize(), peer.accepted) == (2, 1)
        await rig.rest()


@pytest_twisted.ensureDeferred
async def test_a_response_is_handed_over_before_its_body() -> None:
    """The head is a response as soon as it is there, whatever comes later."""
    with Peer(b"HTTP/1.1 200 OK\r\n\r\n") as peer:
        rig = Rig(peer)
        response = await rig.send()
        assert isinstance(response, Response)
        assert rig.upstream.counts() == {
            ("p", "idle"): 0,
            ("p", "active"): 1,
            ("p", "connecting"): 0,
        }
        response.abort()
        await rig.rest()


@pytest_twisted.ensureDeferred
async def test_cancelling_reaches_through_treq() -> None:
    """Cancel before the head closes the connection, although treq stands between."""
    with Peer(b"") as peer:
        rig = Rig(peer)
        request = rig.send()
        await peer.got()
        request.cancel()
        with pytest.raises(CancelledError):
            await request
        await until(lambda: not any(rig.upstream.counts().values()))
        assert not rig.reactor.timers()


def test_the_jar_neither_takes_nor_gives() -> None:
    """Whatever treq asks of the cookie jar, it stays empty."""
    jar = NoCookies()
    jar.extract_cookies(object(), object())
    jar.add_cookie_header(object())
    jar.set_cookie(object())  # type: ignore[arg-type]  # whatever it is

    assert not list(jar)


def test_a_prepared_url_is_itself() -> None:
    """Asking it for its URI or its text parses nothing and changes nothing."""
    url = PreparedUrl.prepare("https://p.example:8443/")

    assert url.to_uri() is url
    assert url.to_text() == "https://p.example:8443/"


# --- bodies ---------------------------------------------------------------------------------------


@pytest_twisted.ensureDeferred
@pytest.mark.parametrize("size", [1, HeldBody.SLICE, HeldBody.SLICE + 1, 5_000_000])
async def test_a_body_arrives_as_it_is(size: int) -> None:
    """With its length, whole and once, whether it goes out at once or slice by slice."""
    body = bytes(range(251)) * (size // 251 + 1)
    body = body[:size]
    with Peer(plain(b"ok")) as peer:
        rig = Rig(peer)
        for _ in range(2):
            _, response = await rig.fetch("POST", b"/", [], body)
            got = await peer.got()
            assert (response, got.body) == (b"ok", body)
            assert got.values(b"content-length") == [b"%d" % size]
        assert peer.accepted == 1
        await rig.rest()


@pytest_twisted.ensureDeferred
async def test_no_body_is_no_body() -> None:
    """An empty body is sent as none."""
    with Peer(plain(b"ok")) as peer:
        rig = Rig(peer)
        await rig.fetch("POST", b"/", [], b"")
        assert (await peer.got()).values(b"content-length") == [b"0"]
        await rig.rest()


@implementer(IBodyProducer)
class Streamed:
    """A body that the test produces."""

    def __init__(self, length: Any = UNKNOWN_LENGTH) -> None:
        self.length = length
        self.consumer: Any = None
        self.calls: list[str] = []
        self.done: Deferred[None] = Deferred()

    def startProducing(self, consumer: Any) -> Deferred[None]:
        self.consumer = consumer
        consumer.registerProducer(self, True)
        return self.done

    def end(self) -> None:
        """The body is whole."""
        self.consumer.unregisterProducer()
        self.done.callback(None)

    def pauseProducing(self) -> None:
        self.calls.append("pause")

    def resumeProducing(self) -> None:
        self.calls.append("resume")

    def stopProducing(self) -> None:
        self.calls.append("stop")


@pytest_twisted.ensureDeferred
@pytest.mark.parametrize("length", [UNKNOWN_LENGTH, 5])
async def test_a_body_may_stream(length: Any) -> None:
    """With its length, or in chunks where that is not known; an empty piece ends nothing."""
    with Peer(plain(b"ok")) as peer:
        rig = Rig(peer)
        for _ in range(2):
            body = Streamed(length)
            request = rig.send("POST", b"/", [], body)
            await until(lambda body=body: body.consumer)  # type: ignore[misc]  # the lambda's default
            for piece in (b"he", b"", b"llo"):
                body.consumer.write(piece)
            body.end()
            got = await peer.got()
            assert got.body == b"hello"
            chunked = length is UNKNOWN_LENGTH
            assert got.values(b"transfer-encoding") == ([b"chunked"] if chunked else [])
            assert got.values(b"content-length") == ([] if chunked else [b"5"])
            collector = Collector()
            (await request).deliverBody(collector)
            await collector.ended
        assert peer.accepted == 1
        await rig.rest()


@pytest_twisted.ensureDeferred
async def test_a_body_that_fails_on_the_way_fails_the_request() -> None:
    """The connection is given up, so that the provider cannot take the body for whole."""
    ends: queue.Queue[str] = queue.Queue()

    def script(wire: Wire) -> None:
        wire.read_until(b"2\r\nhe\r\n")
        ends.put(wire.wait_closed())

    with Provider(script) as peer:
        rig = Rig(peer)
        body = Streamed()
        request = rig.send("POST", b"/", [], body)
        await until(lambda: body.consumer)
        body.consumer.write(b"he")
        error = ProxyError(413, "body_too_large", "Too large.")
        await until(lambda: rig.upstream.counts()["p", "active"] == 1)
        await until(lambda: not pending_bytes(body.consumer._transport))
        body.done.errback(error)
        with pytest.raises(ProxyError) as caught:
            await request
        assert caught.value is error
        await until(lambda: not ends.empty())
        await rig.rest()


@pytest_twisted.ensureDeferred
async def test_a_provider_that_does_not_read_pauses_the_body() -> None:
    """Backpressure reaches whoever produces the body, and its end stops it."""
    go_on = queue.Queue[None]()

    def script(wire: Wire) -> None:
        go_on.get(timeout=WAIT)

    with Provider(script, receive_buffer=65536) as peer:
        rig = Rig(peer)
        body = Streamed()
        request = rig.send("POST", b"/", [], body)
        await until(lambda: body.consumer)
        pool: Any = rig.upstream._reached["p"].pool
        await until(lambda: pool._live)
        (connection,) = pool._live
        for _ in range(2000):
            if body.calls[-1:] == ["pause"] and is_full(connection.transport.socket):
                break
            if body.calls[-1:] != ["pause"]:
                body.consumer.write(bytes(65536))
            await turn()
        assert body.calls[-1] == "pause"
        assert pending_bytes(connection.transport) <= 2 * 65536
        request.cancel()
        with pytest.raises(CancelledError):
            await request
        await until(lambda: body.calls[-1] == "stop")
        go_on.put(None)
        await rig.rest()


@pytest_twisted.ensureDeferred
async def test_an_upload_that_makes_progress_is_not_late() -> None:
    """``first_byte`` begins when all was sent; before, what it bounds is the provider's taking."""
    with Peer(plain(b"ok")) as peer:
        rig = Rig(peer)
        body = Streamed()
        request = rig.send("POST", b"/", [], body, timeouts=Timeouts(first_byte=10.0))
        await until(lambda: body.consumer)
        transport = body.consumer._transport
        for _ in range(5):
            body.consumer.write(b"x" * 100)
            await until(lambda: not pending_bytes(transport))
            rig.reactor.clock.advance(9)
            assert not request.called
        rig.reactor.clock.pump([10, 10])  # the provider waits for the client: that is not its fault
        assert not request.called
        body.end()
        response = await request
        assert response.code == 200
        response.abort()
        await rig.rest()


@pytest_twisted.ensureDeferred
async def test_an_early_response_is_delivered_and_ends_the_upload() -> None:
    """A provider that answers while the body is still being sent is heard, and gets no more."""
    size = 30_000_000
    received: queue.Queue[int] = queue.Queue()

    def refuse(wire: Wire) -> None:
        wire.read_until(b"\r\n\r\n")
        wire.send(plain(b"too large", status=b"413 Too Large"))
        count = len(wire.buffer)
        try:
            while data := wire.sock.recv(65536):
                count += len(data)
        finally:
            received.put(count)

    with Provider(refuse, receive_buffer=65536) as peer:
        rig = Rig(peer)
        response, body = await rig.fetch("POST", b"/", [], bytes(size))
        assert (response.code, body) == (413, b"too large")
        assert await deferToThread(received.get, True, WAIT) < size
        await until(lambda: not any(rig.upstream.counts().values()))
        assert not rig.reactor.timers()


@pytest_twisted.ensureDeferred
async def test_a_provider_that_does_not_read_is_not_buffered_for() -> None:
    """Of a large body no more is taken from memory than the kernel took and one slice."""
    size = 30_000_000
    stuck, go_on = queue.Queue[Wire](), queue.Queue[None]()

    def script(wire: Wire) -> None:
        stuck.put(wire)
        go_on.get(timeout=WAIT)

    with Provider(script, receive_buffer=65536) as peer:
        rig = Rig(peer)
        request = rig.send("POST", b"/", [], bytes(size))
        await deferToThread(stuck.get, True, WAIT)
        pool: Any = rig.upstream._reached["p"].pool
        await until(lambda: rig.upstream.counts()["p", "active"] == 1)
        (connection,) = pool._live
        await until(lambda: is_full(connection.transport.socket))
        assert 0 < connection.sending.untaken() < size // 2
        assert pending_bytes(connection.transport) <= 2 * HeldBody.SLICE
        request.cancel()
        with pytest.raises(CancelledError):
            await request
        go_on.put(None)
        await rig.rest()


def is_full(handle: socket.socket) -> bool:
    """Tell whether the kernel takes nothing more."""
    return not select.select([], [handle], [], 0)[1]


def test_a_short_body_is_written_at_once() -> None:
    """Up to one slice there is nothing to wait for."""
    transport = FakeTransport()
    done = HeldBody(b"abc").startProducing(transport)

    assert done.called
    assert transport.writes == [b"abc"]
    assert transport.producer is None


def test_a_long_body_is_a_pull_producer() -> None:
    """Each slice is written when the one before is sent; the last one ends it."""
    transport = FakeTransport()
    body = HeldBody(b"x" * (HeldBody.SLICE + 1))
    done = body.startProducing(transport)
    whole: list[None] = []
    done.addCallback(whole.append)
    assert transport.streaming is False
    body.resumeProducing()
    body.pauseProducing()
    assert not whole
    body.resumeProducing()

    assert whole == [None]
    assert [len(piece) for piece in transport.writes] == [HeldBody.SLICE, 1]
    assert transport.producer is None


@pytest.mark.parametrize("how", ["stop", "cancel"])
def test_a_long_body_can_be_stopped(how: str) -> None:
    """A stopped body writes no more, lets go of the transport and never says that it was whole."""
    transport = FakeTransport()
    body = HeldBody(b"x" * (HeldBody.SLICE * 3))
    done = body.startProducing(transport)
    whole: list[Any] = []
    done.addCallbacks(whole.append, lambda failure: failure.trap(CancelledError))
    body.resumeProducing()
    body.stopProducing() if how == "stop" else done.cancel()
    body.resumeProducing()
    body.stopProducing()

    assert not whole
    assert len(transport.writes) == 1
    assert transport.producer is None
