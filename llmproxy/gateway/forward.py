"""Requests with a whole URL: a client asks the proxy to fetch ``http://host/path`` for it.

Most programs ask so for ``http://`` when they know a proxy (RFC 9112, section 3.2.2).  Such a
request goes to the hosts that tunnels may reach, and to the address that was checked, as a tunnel
does; but it is HTTP, so it has a record and header rules as every other request.  It needs a
client's key in ``Proxy-Authorization``, which does not cross; ``Authorization`` is the host's, and
does.  What the body means is not looked at.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import msgspec

from llmproxy.config import Client, Config
from llmproxy.config.host_pattern import HostPatterns, as_compared
from llmproxy.dialects.dialect import Dialect
from llmproxy.errors import ClientGone, EndReason, ProxyError
from llmproxy.gateway.admission import admit_fields
from llmproxy.gateway.connect import OBSERVED, REFUSED, Ways
from llmproxy.gateway.exchange import Exchange, end_failed
from llmproxy.gateway.recorder import Recorder
from llmproxy.http1.grammar import BadMessage, authority_of, field_lines, parse_absolute
from llmproxy.http1.headers import HeaderRewriter, for_client
from llmproxy.net.task import Task
from llmproxy.policy.auth import Auth, KeyPlaces, holds_made_key, no_proxy_key
from llmproxy.policy.limits import ClientLimits, limited
from llmproxy.policy.tunnels import Tunnels
from llmproxy.record.metrics import Metrics
from llmproxy.server.error_response import METHODS
from llmproxy.server.handler import NOT_DONE_YET, Handler
from llmproxy.server.request import Request
from llmproxy.stream.relay import Batch, Relay
from llmproxy.upstream.http1 import Connection
from llmproxy.upstream.pool import request_head
from llmproxy.upstream.response import Response
from llmproxy.upstream.way_out import WayOut, of_host

FORWARDED = "forwarded"
"""What became of such a request; the words of a CONNECT are the others."""

_KEYS = KeyPlaces(passes=True)
"""The fields in which SDKs send keys are the host's, and cross."""


class Destination(msgspec.Struct, frozen=True):
    """Where a request goes, and who sends it.

    Attributes:
        authority: as a Host field has it.
        host, port: where it is connected to.
        target: path and query, byte for byte.
        client: who calls.
    """

    authority: str
    host: str
    port: int
    target: bytes
    client: Client


class Forward(Handler):
    """Serves every request whose target is a URL, as one configuration has it.

    Args:
        config: the checked configuration.
        recorder: keeps a record of each.
        metrics: counts what is on the way.
        ways: keeps repeated refusals from filling the log.
        way_out: opens connections to hosts.
        limits: what clients use.
        reactor: keeps the deadlines of requests.
        clock: monotonic seconds.
    """

    def __init__(
        self,
        config: Config,
        recorder: Recorder,
        metrics: Metrics,
        ways: Ways,
        *,
        way_out: WayOut,
        limits: ClientLimits,
        reactor: Any,
        clock: Callable[[], float],
    ) -> None:
        super().__init__()
        self._recorder = recorder
        self._metrics = metrics
        self._repeats = ways.repeats
        self._way_out = way_out
        self._auth = Auth(config, recorder.now)
        intercept = config.intercept
        self._intercepts = HostPatterns(() if intercept is None else intercept.hosts)
        self._tunnels = Tunnels(config.tunnel)
        self._limits = limits
        self._limited = frozenset(limited(config.clients))
        self._reactor = reactor
        self._clock = clock
        self._timeouts = config.timeouts
        self._body_limit = config.limits.request_body
        self._max_head = config.limits.response_head
        via = config.proxy.via.encode("ascii")
        self._pseudonym = via.lower()
        self._via_1_1, self._via_1_0 = b"1.1 " + via, b"1.0 " + via
        self._rewriter = HeaderRewriter(
            pass_credential=True, credential=None, dropped=(), defaults=(), accept_events=False
        )
        self._batch = Batch()

    # -- what the server asks before a request is served ----------------------------------------

    def body_limit(self, request: Request) -> int:
        """Return the most bytes that the body of ``request`` may have."""
        return self._body_limit

    def holds_body(self, request: Request) -> bool:
        """Return False: every body streams, and none is invited before the host is there."""
        return False

    def render(self, request: Request) -> int:
        """Begin to serve ``request``."""
        exchange = self._recorder.begin(request)

        def client_left(why: ClientGone) -> None:
            exchange.left, left_at = why, self._clock()
            exchange.drop()
            self._metrics.cancel.observe(self._clock() - left_at)

        request.gone = client_left
        exchange.task = Task(self._serve(exchange), end_failed)
        return NOT_DONE_YET

    # -- the story ------------------------------------------------------------------------------

    async def _tell(self, exchange: Exchange) -> EndReason:
        request, trace = exchange.request, exchange.trace
        trace.path = _shown(request.path)
        if request.refusal is not None:
            raise request.refusal
        to = self._judge(exchange)
        if to.client.name in self._limited:
            exchange.lease = self._limits.admit(to.client, None, None)
        request.stall_after = self._timeouts.client_stall
        if self._timeouts.total is not None:
            exchange.timer = self._reactor.callLater(self._timeouts.total, exchange.expire)

        response = await self._send(exchange, to)
        exchange.response = response
        fields = for_client(response.fields, response.first, trace.id.encode("ascii"))
        request.start(response.code, fields)
        await self._pump(exchange, response)
        request.finish()
        if (delivered := request.when_delivered()) is not None:
            exchange.stop_timer()
            await delivered
        return EndReason.COMPLETE if response.code < 400 else EndReason.UPSTREAM_REFUSED

    async def _serve(self, exchange: Exchange) -> None:
        """Tell the story, and see to its end, whatever that is."""
        error: ProxyError | None = None
        has_line = True
        try:
            end = await self._tell(exchange)
            if exchange.left is not None:
                end = exchange.left.end
        except Exception as problem:
            end, error = exchange.judge(problem)
        if error is not None:
            of_host(error)
            if end is EndReason.REJECTED and not exchange.request.startedWriting:
                has_line = self._note_refusal(exchange, error)
            exchange.fail(error, Dialect.OPENAI, self._recorder.now())
        self._recorder.close(exchange, end, error, writes_access=has_line)

    # -- its steps ------------------------------------------------------------------------------

    def _judge(self, exchange: Exchange) -> Destination:
        """Return where the request goes, or refuse it.

        Raises:
            ProxyError: whatever is wrong with it, before anything is looked up.
        """
        request, trace = exchange.request, exchange.trace
        if request.inside is not None:
            raise ProxyError(400, "bad_target", "The request target must be a path.")
        if request.method not in METHODS:
            allow = (b"allow", b", ".join(METHODS))
            raise ProxyError(405, "method", "This method is not served.", fields=(allow,))
        try:
            authority, name, port, target = parse_absolute(request.uri)
        except BadMessage as error:
            raise ProxyError(400, "bad_target", f"The request is refused: {error}.") from None
        trace.tunnel, host = REFUSED, as_compared(name)
        if self._intercepts.match(host):
            text = f"This proxy serves https://{host} and not http://: change the URL."
            raise ProxyError(403, "plain_http", text)
        client = self._identify(request, target)
        trace.client = client.name
        admit_fields(request, self._pseudonym)
        trace.tunnel = OBSERVED if self._tunnels.permit(host, port) else FORWARDED
        return Destination(authority, host, port, target, client)

    def _identify(self, request: Request, target: bytes) -> Client:
        """Return who calls.

        Raises:
            ProxyError: 407 without a good key; 401 where a client's key stands in what crosses.
        """
        value = request.first.get(b"proxy-authorization")
        if value is None:
            raise no_proxy_key()
        client = self._auth.identify_proxy(value)
        self._auth.refuse_crossing(request.fields, target, _KEYS)
        return client

    def _note_refusal(self, exchange: Exchange, error: ProxyError) -> bool:
        """The request is refused: return whether that has a line of the log."""
        trace = exchange.trace
        if trace.tunnel is not None:
            trace.tunnel = REFUSED
        host = _host_of(exchange.request.uri) if trace.path else ""
        return self._repeats.is_first(host, trace.client or trace.peer, error.reason)

    async def _send(self, exchange: Exchange, to: Destination) -> Response:
        """Send the request on a connection of its own; return the head of the response.

        Raises:
            ProxyError: no connection, no head in time, or a head that is not HTTP.
        """
        request = exchange.request
        way = await self._way_out.open(to.host, to.port, to.client.name)
        connection = Connection(
            max_head=self._max_head,
            became_idle=Connection.abort,
            closed=_nothing,
            secure=False,
            tunnelled=way.is_tunnelled,
        )
        way.begin(connection)
        fields = self._rewriter.for_provider(
            request.fields,
            request.first,
            via=self._via_1_1 if request.clientproto == b"HTTP/1.1" else self._via_1_0,
            request_id=exchange.trace.id.encode("ascii"),
            streams=False,
            identity=False,
            credential=None,
        )
        fields.append((b"connection", b"close"))
        host = b"host: " + to.authority.encode("ascii")
        head = request_head(request.method, to.target, host, field_lines(fields), request.upload)
        exchange.asked()
        answer = connection.send(request.method, head, request.upload)
        connection.await_head(self._reactor, self._timeouts.first_byte)
        return await answer

    async def _pump(self, exchange: Exchange, response: Response) -> None:
        """Relay the body to the client."""
        began = self._clock()
        exchange.keep_of(response)
        relay = exchange.relay = Relay(
            response,
            exchange.request,
            self._reactor,
            self._clock,
            idle=self._timeouts.idle,
            batch=self._batch,
            gaps=self._metrics.gap.observe,
            delays=self._metrics.relay_delay.observe,
        )
        self._metrics.began(relay)
        try:
            done = relay.start()
            exchange.request.flush()
            await done
        finally:
            self._metrics.finished(relay)
            self._metrics.stream.note(self._clock() - began)


def _shown(url: bytes) -> str:
    """Return a URL for the record: nothing of one with a key or a password in it."""
    if b"@" in url or holds_made_key(url):
        return ""
    return url.decode("ascii", "backslashreplace")[:2048]


def _host_of(url: bytes) -> str:
    """Return host and port of a URL; empty where it has none."""
    try:
        _, name, port, _ = parse_absolute(url)
    except BadMessage:
        return ""
    return authority_of(as_compared(name), port)


def _nothing(connection: Connection) -> None:
    """A connection has ended, which nobody counts."""
