"""One provider's connections: who may use which again, what may take how long, what is left."""

from __future__ import annotations

import contextlib
import datetime
import errno
import queue
import resource
import socket
import ssl
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import pytest_twisted
from twisted.internet.defer import CancelledError, Deferred
from twisted.internet.threads import deferToThread

from llmproxy.config import Provider as ProviderConfig
from llmproxy.config import Timeouts, Url
from llmproxy.errors import EndReason, ProxyError
from llmproxy.http1.grammar import Fields
from llmproxy.net.transport import raw_transport
from llmproxy.upstream.pool import OutgoingRequest, ProviderPool
from llmproxy.upstream.resolver import KEPT, Resolver
from llmproxy.upstream.response import Response
from tests.support.fake_transport import Collector, TurnedReactor, until
from tests.support.sockets import WAIT, Provider, Received, Script, Wire, connect
from tests.support.tls import Authority

OK = b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok"
OFF = Timeouts(connect=None, first_byte=None)


class Peer(Provider):
    """A provider that answers every request in the same way, and tells what it saw."""

    def __init__(self, script: Script | None = None, response: bytes = OK, **kwargs: Any) -> None:
        super().__init__(script or self.serve, **kwargs)
        self.response = response
        self.wires: queue.Queue[Wire] = queue.Queue()
        self.requests: queue.Queue[Received] = queue.Queue()
        self.closed: queue.Queue[None] = queue.Queue()

    def serve(self, wire: Wire) -> None:
        """Answer until the client's end."""
        self.wires.put(wire)
        try:
            while True:
                self.requests.put(wire.read_request())
                wire.send(self.response)
        finally:
            self.closed.put(None)

    def silent(self, wire: Wire) -> None:
        """Read whatever comes and say nothing, until the client's end."""
        self.wires.put(wire)
        wire.wait_closed()
        self.closed.put(None)

    async def take(self, notes: queue.Queue[Any]) -> Any:
        """Wait for the next note."""
        return await deferToThread(notes.get, True, WAIT)


class Rig:
    """An pool for one peer, with a clock that the test turns."""

    def __init__(
        self,
        peer: Provider | None = None,
        *,
        url: Url | None = None,
        ca: str | None = None,
        pool: int = 10,
        pool_idle: float | None = 60.0,
    ) -> None:
        if url is None:
            assert peer is not None
            scheme, _, rest = peer.url.partition("://")
            url = Url(scheme=scheme, host=rest.rpartition(":")[0], port=peer.port)
        self.reactor = TurnedReactor()
        self.clock = self.reactor.clock
        self.lookups: list[str] = []
        self.lookup: Callable[[], None] = lambda: None
        provider = ProviderConfig(name="p", url=url, dialect="raw", ca=ca, pool=pool)  # type: ignore[arg-type]  # text will do
        self.pool = ProviderPool(
            self.reactor,
            self.clock.seconds,
            provider,
            resolver=Resolver(self.reactor, self.clock.seconds, getaddrinfo=self._getaddrinfo),
            pool_idle=pool_idle,
            max_head=4096,
        )

    def _getaddrinfo(self, name: str, *_: object) -> list[Any]:
        """Find every name on loopback, unless ``lookup`` says otherwise; runs on a thread."""
        self.lookups.append(name)
        self.lookup()
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", ("127.0.0.1", 0))]

    def send(
        self,
        method: bytes = b"GET",
        *,
        target: bytes = b"/",
        fields: Fields | None = None,
        credential: bytes = b"",
        timeouts: Timeouts = OFF,
    ) -> Deferred[Response]:
        """Send one request as treq would."""
        outgoing = OutgoingRequest(self.pool, target, fields or [], credential, timeouts)
        response: Any = outgoing.request(method, b"http://else.where/", None, None)
        return response  # type: ignore[no-any-return]  # an IResponse to treq

    async def fetch(self, **kwargs: Any) -> bytes:
        """Send one request and return its body, however it ended."""
        collector = Collector()
        (await self.send(**kwargs)).deliverBody(collector)
        await collector.ended
        return collector.body

    def assert_counts(self, *, idle: int = 0, active: int = 0, connecting: int = 0) -> None:
        """The pool has so many connections."""
        assert self.pool.counts() == {"idle": idle, "active": active, "connecting": connecting}

    async def rest(self) -> None:
        """Close what is open and wait for it; nothing may be left."""
        self.pool.close()
        await until(lambda: not any(self.pool.counts().values()))
        assert not self.reactor.timers()


async def failure_of(request: Deferred[Response]) -> ProxyError:
    """Await a request that must fail, and return its error."""
    with pytest.raises(ProxyError) as caught:
        await request
    return caught.value


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    """The authority that providers' certificates come from."""
    return Authority(tmp_path_factory.mktemp("ca"))


# --- what goes out --------------------------------------------------------------------------------


@pytest_twisted.ensureDeferred
async def test_a_request_goes_out_as_it_was_ordered() -> None:
    """Target and fields are those of the order, byte for byte, behind the provider's Host."""
    with Peer() as peer:
        rig = Rig(peer)
        target = b'/a/../b%2f{x}|"?'
        await rig.fetch(target=target, fields=[(b"x-b", b"\xff"), (b"a", b""), (b"x-b", b"2")])
        got = await peer.take(peer.requests)
        await rig.rest()

    assert (got.method, got.target) == (b"GET", target)
    host = f"127.0.0.1:{peer.port}".encode()
    assert got.fields == [(b"host", host), (b"x-b", b"\xff"), (b"a", b""), (b"x-b", b"2")]


@pytest_twisted.ensureDeferred
@pytest.mark.parametrize(
    ("method", "length"),
    [(b"GET", []), (b"DELETE", []), (b"HEAD", []), (b"POST", [b"0"]), (b"PUT", [b"0"])],
)
async def test_a_request_without_body_says_so_where_one_is_expected(
    method: bytes, length: list[bytes]
) -> None:
    """POST, PUT and PATCH without a body carry a length of zero, other methods none (RFC 9110)."""
    with Peer(response=b"HTTP/1.1 204 No\r\n\r\n") as peer:
        rig = Rig(peer)
        await rig.fetch(method=method)
        got = await peer.take(peer.requests)
        await rig.rest()

    assert got.values(b"content-length") == length


# --- the pool -------------------------------------------------------------------------------------


@pytest_twisted.ensureDeferred
async def test_a_connection_serves_one_request_after_the_other() -> None:
    """A whole response gives its connection back, and the next request takes it."""
    with Peer() as peer:
        rig = Rig(peer)
        rig.assert_counts()
        for _ in range(3):
            assert await rig.fetch() == b"ok"
            rig.assert_counts(idle=1)
        assert peer.accepted == 1
        await rig.rest()
        await peer.take(peer.closed)


@pytest_twisted.ensureDeferred
async def test_requests_at_once_have_connections_of_their_own() -> None:
    """A connection whose response is not over serves nobody else."""
    with Peer() as peer:
        rig = Rig(peer)
        first, second = await rig.send(), await rig.send()
        rig.assert_counts(active=2)
        for response in (first, second):
            collector = Collector()
            response.deliverBody(collector)
            await collector.ended
        rig.assert_counts(idle=2)
        assert peer.accepted == 2
        await rig.rest()


@pytest_twisted.ensureDeferred
async def test_credentials_never_share_a_connection() -> None:
    """An idle connection is taken only for the credential that went over it before."""
    with Peer() as peer:
        rig = Rig(peer)
        for credential in (b"a", b"b", b"a", b"b", b""):
            await rig.fetch(credential=credential)
        rig.assert_counts(idle=3)
        assert peer.accepted == 3
        await rig.rest()


@pytest_twisted.ensureDeferred
@pytest.mark.parametrize("pool", [0, 1])
async def test_the_pool_is_bounded_over_all_credentials(pool: int) -> None:
    """What does not fit is closed when its response is over."""
    with Peer() as peer:
        rig = Rig(peer, pool=pool)
        await rig.fetch(credential=b"a")
        await rig.fetch(credential=b"b")
        for _ in range(2 - pool):
            await peer.take(peer.closed)
        await until(lambda: rig.pool.counts()["active"] == 0)
        rig.assert_counts(idle=pool)
        await rig.rest()


@pytest_twisted.ensureDeferred
@pytest.mark.parametrize(
    ("pool_idle", "hint", "kept_s"),
    [
        (60.0, b"", 60.0),
        (60.0, b"keep-alive: timeout=5, max=100\r\n", 4.0),
        (60.0, b"keep-alive: timeout=300\r\n", 60.0),
        (None, b"keep-alive: timeout=10\r\n", 9.0),
    ],
)
async def test_an_idle_connection_is_given_up_in_time(
    pool_idle: float | None, hint: bytes, kept_s: float
) -> None:
    """After ``pool_idle``, or a second before the provider would, and not sooner."""
    head, _, body = OK.partition(b"\r\n\r\n")
    with Peer(response=head + b"\r\n" + hint + b"\r\n" + body) as peer:
        rig = Rig(peer, pool_idle=pool_idle)
        await rig.fetch()
        rig.clock.advance(kept_s - 0.1)
        await rig.fetch()
        rig.clock.advance(kept_s - 0.1)
        rig.assert_counts(idle=1)
        rig.clock.advance(0.2)
        await peer.take(peer.closed)
        await until(lambda: not any(rig.pool.counts().values()))
        assert not rig.reactor.timers()
        assert peer.accepted == 1


@pytest_twisted.ensureDeferred
async def test_one_timer_serves_the_whole_pool() -> None:
    """Each idle connection is closed at its own time, however many there are."""
    with Peer() as peer:
        rig = Rig(peer)
        for credential in (b"a", b"b", b"c"):
            await rig.fetch(credential=credential)
            rig.clock.advance(10)
        assert rig.reactor.timers() == 1
        for left in (2, 1, 0):
            rig.clock.advance(30 if left == 2 else 10)
            await peer.take(peer.closed)
            await until(lambda left=left: rig.pool.counts()["idle"] == left)  # type: ignore[misc]  # the lambda's default
        assert not rig.reactor.timers()


@pytest_twisted.ensureDeferred
async def test_without_a_deadline_idle_connections_stay() -> None:
    """``pool_idle`` off keeps them, without any timer."""
    with Peer() as peer:
        rig = Rig(peer, pool_idle=None)
        await rig.fetch()
        assert not rig.reactor.timers()
        rig.clock.advance(1e6)
        rig.assert_counts(idle=1)
        await rig.rest()


@pytest_twisted.ensureDeferred
@pytest.mark.parametrize("stray", [b"", b"HTTP/1.1 200 OK\r\ncontent-length: 5\r\n\r\ntrick"])
async def test_idle_connections_are_watched(stray: bytes) -> None:
    """A FIN, or bytes that nobody asked for, end an idle connection when they come."""
    with Peer() as peer:
        rig = Rig(peer)
        await rig.fetch()
        wire = await peer.take(peer.wires)
        wire.send(stray) if stray else wire.sock.shutdown(socket.SHUT_WR)
        await until(lambda: not any(rig.pool.counts().values()))
        assert await rig.fetch() == b"ok"
        assert peer.accepted == 2
        await rig.rest()


@pytest_twisted.ensureDeferred
@pytest.mark.parametrize("stray", [b"", b"H"])
async def test_what_waits_on_an_idle_connection_is_seen_before_it_is_used(stray: bytes) -> None:
    """What arrived while the reactor was busy keeps the request off that connection."""
    with Peer() as peer:
        rig = Rig(peer)
        await rig.fetch()
        wire = await peer.take(peer.wires)
        wire.send(stray) if stray else wire.sock.shutdown(socket.SHUT_WR)
        prober = threading.Thread(target=probe, args=(peer.port,))
        prober.start()
        prober.join(WAIT)  # the reactor does not turn meanwhile
        assert await rig.fetch() == b"ok"
        assert peer.accepted == 3
        await rig.rest()


def probe(port: int) -> None:
    """Make a round trip over loopback, behind whatever was sent before."""
    with connect(port) as wire:
        wire.send(b"GET / HTTP/1.1\r\n\r\n")
        wire.read_until(b"ok")


@pytest_twisted.ensureDeferred
async def test_a_connection_that_just_expired_is_not_taken() -> None:
    """A request in the turn in which an idle connection is given up gets another one."""
    with Peer() as peer:
        rig = Rig(peer)
        await rig.fetch()
        rig.clock.advance(61)
        assert await rig.fetch() == b"ok"
        assert peer.accepted == 2
        await rig.rest()


# --- the deadlines --------------------------------------------------------------------------------


@pytest.fixture
def silence() -> Iterator[Callable[[], None]]:
    """What a name server says that does not answer, until the test is over."""
    over = threading.Event()

    def wait() -> None:
        over.wait(WAIT)

    yield wait
    over.set()


@pytest_twisted.ensureDeferred
async def test_the_name_lookup_is_under_the_connect_deadline(
    silence: Callable[[], None],
) -> None:
    """A name server that does not answer is a timeout before any work was done."""
    rig = Rig(url=Url(scheme="https", host="p.example", port=443))
    rig.lookup = silence
    request = rig.send(timeouts=Timeouts(connect=3.0))
    rig.assert_counts(connecting=1)
    rig.clock.advance(2.9)
    assert not request.called
    rig.clock.advance(0.2)
    error = await failure_of(request)

    assert (error.end, error.may_have_run) == (EndReason.UPSTREAM_TIMEOUT, False)
    rig.assert_counts()
    assert not rig.reactor.timers()


@pytest_twisted.ensureDeferred
async def test_the_handshake_is_under_the_connect_deadline(authority: Authority) -> None:
    """A provider that accepts and never speaks TLS is a timeout, and its socket is closed."""
    peer = Peer()
    peer._script = peer.silent
    with peer:
        rig = Rig(url=Url(scheme="https", host="localhost", port=peer.port))
        request = rig.send(timeouts=Timeouts(connect=3.0))
        await peer.take(peer.wires)
        rig.clock.advance(3.1)
        error = await failure_of(request)
        await peer.take(peer.closed)

    assert (error.end, error.may_have_run) == (EndReason.UPSTREAM_TIMEOUT, False)
    rig.assert_counts()
    assert not rig.reactor.timers()


@pytest_twisted.ensureDeferred
async def test_the_head_is_under_the_first_byte_deadline() -> None:
    """A provider that took the request and is silent may have done the work."""
    peer = Peer()
    peer._script = peer.silent
    with peer:
        rig = Rig(peer)
        request = rig.send(timeouts=Timeouts(connect=3.0, first_byte=30.0))
        await peer.take(peer.wires)
        await until(lambda: rig.pool.counts()["active"] == 1)
        assert rig.reactor.timers() == 1
        rig.clock.advance(29.9)
        assert not request.called
        rig.clock.advance(0.2)
        error = await failure_of(request)
        await peer.take(peer.closed)
        await rig.rest()

    assert (error.end, error.may_have_run) == (EndReason.UPSTREAM_TIMEOUT, True)


@pytest_twisted.ensureDeferred
async def test_deadlines_end_with_their_phase() -> None:
    """Once the head is there no deadline of the pool's stands any more."""
    with Peer() as peer:
        rig = Rig(peer)
        response = await rig.send(timeouts=Timeouts(connect=3.0, first_byte=30.0))
        assert not rig.reactor.timers()
        response.abort()
        await rig.rest()


# --- giving up ------------------------------------------------------------------------------------


@pytest_twisted.ensureDeferred
async def test_cancelling_the_name_lookup_leaves_nothing(silence: Callable[[], None]) -> None:
    """The lookup is given up, and no connection or timer stays."""
    rig = Rig(url=Url(scheme="http", host="p.example", port=80))
    rig.lookup = silence
    request = rig.send(timeouts=Timeouts())
    rig.assert_counts(connecting=1)
    request.cancel()
    with pytest.raises(CancelledError):
        await request

    rig.assert_counts()
    assert not rig.reactor.timers()


@pytest_twisted.ensureDeferred
async def test_cancelling_the_connecting_leaves_nothing() -> None:
    """A TCP connection that does not come about is given up."""
    with socket.socket() as listener, socket.socket() as first, socket.socket() as second:
        listener.bind(("127.0.0.1", 0))
        listener.listen(0)
        port = listener.getsockname()[1]
        for filler in (first, second):  # the queue is full now: further SYNs are not answered
            filler.setblocking(False)
            filler.connect_ex(("127.0.0.1", port))
        rig = Rig(url=Url(scheme="http", host="127.0.0.1", port=port))
        request = rig.send(timeouts=Timeouts())
        rig.assert_counts(connecting=1)
        request.cancel()
        with pytest.raises(CancelledError):
            await request
        rig.assert_counts()
        assert not rig.reactor.timers()


@pytest_twisted.ensureDeferred
@pytest.mark.parametrize("secure", [True, False])
async def test_cancelling_the_wait_for_a_head_closes_the_connection(
    secure: bool, authority: Authority
) -> None:
    """The provider sees the end at once, and no connection or timer stays."""
    peer = Peer(tls=authority.server() if secure else None)
    seen: queue.Queue[Received] = queue.Queue()

    def script(wire: Wire) -> None:
        seen.put(wire.read_request())
        wire.wait_closed()
        peer.closed.put(None)

    peer._script = script
    with peer:
        rig = Rig(peer, ca=str(authority.ca_path))
        request = rig.send(timeouts=Timeouts())
        await peer.take(seen)
        request.cancel()
        with pytest.raises(CancelledError):
            await request
        await peer.take(peer.closed)
        await until(lambda: not any(rig.pool.counts().values()))
        assert not rig.reactor.timers()


@pytest_twisted.ensureDeferred
async def test_cancelling_the_handshake_closes_the_connection() -> None:
    """A handshake that is under way is cut off, and no connection or timer stays."""
    peer = Peer()
    peer._script = peer.silent
    with peer:
        rig = Rig(url=Url(scheme="https", host="localhost", port=peer.port))
        request = rig.send(timeouts=Timeouts())
        wire = await peer.take(peer.wires)
        await until(lambda: wire.buffer)  # the ClientHello
        request.cancel()
        with pytest.raises(CancelledError):
            await request
        await peer.take(peer.closed)
        rig.assert_counts()
        assert not rig.reactor.timers()


@pytest_twisted.ensureDeferred
@pytest.mark.parametrize("secure", [True, False])
async def test_aborting_a_running_response_closes_the_connection(
    secure: bool, authority: Authority
) -> None:
    """In the middle of a body, read or paused, the provider sees the end at once."""
    peer = Peer(
        tls=authority.server() if secure else None,
        response=b"HTTP/1.1 200 OK\r\ncontent-length: 9\r\n\r\npart",
    )
    with peer:
        rig = Rig(peer, ca=str(authority.ca_path))
        collector = Collector()
        paused, flowing = await rig.send(), await rig.send()
        flowing.deliverBody(collector)
        await until(lambda: collector.body == b"part")
        for response in (flowing, paused):
            response.abort()
            await peer.take(peer.closed)
        assert (await collector.ended).ends[0].end is EndReason.UPSTREAM_BROKEN
        await rig.rest()


@pytest_twisted.ensureDeferred
async def test_close_ends_connections_in_every_state(silence: Callable[[], None]) -> None:
    """Idle, active or just being made: after ``close`` there are none, nor timers."""
    with Peer() as peer:
        rig = Rig(url=Url(scheme="http", host="p.example", port=peer.port))
        await rig.fetch(credential=b"idle")
        response = await rig.send(credential=b"active")
        rig.clock.advance(KEPT)
        rig.lookup = silence
        connecting = rig.send(credential=b"connecting", timeouts=Timeouts())
        rig.assert_counts(idle=1, active=1, connecting=1)
        rig.pool.close()
        assert rig.pool.counts()["connecting"] == 0
        with pytest.raises((CancelledError, ProxyError)):
            await connecting
        await rig.rest()
        response.abort()  # harmless by now


@pytest_twisted.ensureDeferred
async def test_nothing_is_pooled_after_close() -> None:
    """A request that is sent later is served, and its connection is not kept."""
    with Peer() as peer:
        rig = Rig(peer)
        rig.pool.close()
        assert await rig.fetch() == b"ok"
        await rig.rest()


# --- no connection at all -------------------------------------------------------------------------


@pytest_twisted.ensureDeferred
@pytest.mark.parametrize("scheme", ["http", "https"])
async def test_a_refused_connection_is_unreachable(scheme: str) -> None:
    """Nobody listens there: the provider is unreachable, whether by TLS or not."""
    with Peer() as peer:
        port = peer.port
    rig = Rig(url=Url(scheme=scheme, host="127.0.0.1", port=port))
    error = await failure_of(rig.send())

    assert (error.status, error.end) == (502, EndReason.UPSTREAM_UNREACHABLE)
    assert not error.may_have_run
    rig.assert_counts()


@pytest_twisted.ensureDeferred
@pytest.mark.parametrize("scheme", ["http", "https"])
async def test_an_unknown_name_is_unreachable(scheme: str) -> None:
    """A name without an address makes the provider unreachable; the caller is told no name."""

    def unknown() -> None:
        raise socket.gaierror(socket.EAI_NONAME, "who is that?")

    rig = Rig(url=Url(scheme=scheme, host="secret.example", port=1))
    rig.lookup = unknown
    error = await failure_of(rig.send())

    assert (error.end, error.may_have_run) == (EndReason.UPSTREAM_UNREACHABLE, False)
    assert "secret.example" in error.detail
    assert "who is that?" in error.detail
    assert "secret.example" not in error.message
    rig.assert_counts()


@pytest_twisted.ensureDeferred
async def test_a_name_is_looked_up_once_for_all_who_wait() -> None:
    """Requests share a lookup and, for a while, what it found."""
    with Peer() as peer:
        rig = Rig(url=Url(scheme="http", host="p.example", port=peer.port), pool=0)
        responses = [rig.send(), rig.send()]
        for response in responses:
            (await response).abort()
        rig.clock.advance(KEPT - 0.1)
        await rig.fetch()
        assert rig.lookups == ["p.example"]
        rig.clock.advance(0.2)
        await rig.fetch()
        assert rig.lookups == ["p.example"] * 2
        await rig.rest()


@pytest_twisted.ensureDeferred
async def test_a_failed_lookup_is_not_kept() -> None:
    """The next request asks anew, and is served where the name is known again."""
    with Peer() as peer:
        rig = Rig(url=Url(scheme="http", host="p.example", port=peer.port))

        def unknown() -> None:
            raise socket.gaierror(socket.EAI_AGAIN, "later")

        rig.lookup = unknown
        await failure_of(rig.send())
        rig.lookup = lambda: None
        assert await rig.fetch() == b"ok"
        await rig.rest()


@pytest_twisted.ensureDeferred
@pytest.mark.parametrize("host", ["p.example", "127.0.0.1"])
async def test_being_out_of_descriptors_is_told(host: str) -> None:
    """In the lookup or in connecting: 503, with a hint when to come again."""
    with Peer() as peer:
        rig = Rig(url=Url(scheme="http", host=host, port=peer.port))

        def exhausted() -> None:
            raise OSError(errno.EMFILE, "too many")

        rig.lookup = exhausted
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        if host == "127.0.0.1":
            resource.setrlimit(resource.RLIMIT_NOFILE, (min(soft, 3), hard))
        try:
            request = rig.send()
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        error = await failure_of(request)

    assert (error.status, error.reason) == (503, "no_descriptors")
    assert dict(error.fields)[b"retry-after"] == b"1"
    rig.assert_counts()


@pytest_twisted.ensureDeferred
@pytest.mark.parametrize(
    ("fault", "cause"),
    [
        ("authority", "unknown_authority"),
        ("name", "wrong_name"),
        ("plain", "protocol"),
        ("expired", "expired"),
    ],
)
async def test_a_provider_that_cannot_be_trusted_gets_no_request(
    fault: str, cause: str, authority: Authority, tmp_path: Path
) -> None:
    """A wrong authority, name or time, or no TLS at all, is a TLS failure before a byte is sent."""
    tls: ssl.SSLContext | None = authority.server()
    if fault == "authority":
        tls = Authority(tmp_path).server()
    elif fault == "name":
        tls = authority.server("else.where")
    elif fault == "expired":
        tls = expired(authority)
    if fault == "plain":
        peer = Peer(lambda wire: wire.send(b"HTTP/1.1 400 Speak plainly\r\n\r\n"))
    else:
        peer = Peer(tls=tls)
    url = Url(scheme="https", host="localhost", port=peer.port)
    rig = Rig(url=url, ca=str(authority.ca_path))
    with contextlib.suppress(ssl.SSLError), peer:  # which the peer's side of the handshake is
        error = await failure_of(rig.send())

    assert peer.requests.empty()
    assert (error.status, error.end) == (502, EndReason.UPSTREAM_TLS)
    assert (error.cause, error.may_have_run) == (cause, False)
    rig.assert_counts()


def expired(authority: Authority) -> ssl.SSLContext:
    """Return a server's context whose certificate is of the past."""
    past = datetime.datetime(2001, 1, 1, tzinfo=datetime.UTC)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    certificate = authority._ca.issue_cert(
        "localhost", not_before=past, not_after=past + datetime.timedelta(days=1)
    )
    certificate.configure_cert(context)
    return context


@pytest_twisted.ensureDeferred
@pytest.mark.parametrize("host", ["localhost", "127.0.0.1"])
async def test_tls_is_verified_for_names_and_addresses(host: str, authority: Authority) -> None:
    """A certificate for the URL's host is accepted, and HTTP/1.1 is all that is offered."""
    context = authority.server(host)
    context.set_alpn_protocols(["h2", "http/1.1"])
    with Peer(tls=context) as peer:
        url = Url(scheme="https", host=host, port=peer.port)
        rig = Rig(url=url, ca=str(authority.ca_path))
        assert await rig.fetch() == b"ok"
        wire = await peer.take(peer.wires)
        assert wire.sock.selected_alpn_protocol() == "http/1.1"
        await rig.rest()


@pytest_twisted.ensureDeferred
@pytest.mark.parametrize("secure", [True, False])
async def test_nagle_is_off(secure: bool, authority: Authority) -> None:
    """Small writes leave at once, with TLS as without."""
    with Peer(tls=authority.server() if secure else None) as peer:
        rig = Rig(peer, ca=str(authority.ca_path))
        collector = Collector()
        (await rig.send()).deliverBody(collector)
        handle = raw_transport(collector.transport).socket
        assert handle.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
        await collector.ended
        await rig.rest()
