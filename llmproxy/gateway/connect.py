"""CONNECT: a client asks for a way to some host, and gets the host, this proxy, or a refusal.

By the authority that is asked for there are three outcomes (ADR-0033)::

    the host is in [intercept]     the connection goes on with this proxy: TLS is ended here, and
                                   each request in it is served by the gateway, as any other
    the host is in [tunnel] allow  bytes go both ways, unread
    neither                        403, with the reason in the status line: most programs show that

A host that is intercepted is never tunnelled.  What is wrong with a request to it is told within
TLS: a refusal of the CONNECT would leave some programs waiting for minutes.  A tunnel needs a
client's key in ``Proxy-Authorization``.  For a host that is intercepted it may be left out; then
each request in it must have one.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from twisted.internet.defer import Deferred

from llmproxy.config import Client, Config
from llmproxy.config.host_pattern import HostPatterns, as_compared
from llmproxy.dialects.dialect import Dialect
from llmproxy.dialects.errors import error_body
from llmproxy.errors import ClientGone, EndReason, ProxyError
from llmproxy.gateway.exchange import Exchange, end_failed
from llmproxy.gateway.recorder import Recorder
from llmproxy.gateway.repeats import Repeats
from llmproxy.http1.grammar import BadMessage, authority_of, parse_authority
from llmproxy.net.task import Task
from llmproxy.policy.auth import Auth, holds_made_key, no_proxy_key
from llmproxy.policy.tunnels import OpenTunnels, Tunnels
from llmproxy.record.metrics import Metrics
from llmproxy.server.error_response import METHODS, error_fields
from llmproxy.server.handler import NOT_DONE_YET, Handler
from llmproxy.server.inside import HANDSHAKE, LEFT, Inside
from llmproxy.server.request import Request
from llmproxy.stream.splice import Splice, Splices
from llmproxy.upstream.way_out import WayOut

INTERCEPTED, TUNNELLED, OBSERVED, REFUSED = "intercepted", "tunnelled", "would_refuse", "refused"
"""What became of a CONNECT: the words of its record and of the metric."""

_PHRASES = {
    "no_key": "Proxy key required",
    "unknown_key": "Proxy key unknown",
    "keys_disagree": "Proxy key is of another client",
    "key_expired": "Proxy key has expired",
    "bad_target": "Target must be HOST:PORT",
}
"""What stands behind the status, where the message would be too long for that."""

_OUT = 200
"""The status of what goes wrong when the response is out: it is for the record alone."""

_End = tuple[EndReason, str | None]
"""How a CONNECT ended, and for the log how a connection was lost."""


class Ways:
    """What lasts over a reload.

    Args:
        reactor: keeps time.
        clock: monotonic seconds.

    Attributes:
        handshakes: connections that were turned inside, and on which no request can come yet.
        waiting: those whose host's certificate is being made; they are to be turned inside.
        tunnels: those that each client has open.
        splices: their pumps.
        repeats: keeps their refusals from filling the log, and those of requests with a whole URL.
    """

    def __init__(self, reactor: Any, clock: Callable[[], float]) -> None:
        self.handshakes = self.waiting = 0
        self.tunnels = OpenTunnels()
        self.splices = Splices(reactor, clock)
        self.repeats = Repeats(reactor)


class Connect(Handler):
    """Serves every CONNECT, as one configuration has it.

    Args:
        config: the checked configuration.
        recorder: keeps a record of each.
        metrics: counts what became of them.
        ways: what is under way, whatever configuration it began with.
        leaf: makes the TLS of a host that is intercepted; it fires with a ``ServerTls``.
        way_out: opens connections for tunnels.
    """

    def __init__(
        self,
        config: Config,
        recorder: Recorder,
        metrics: Metrics,
        ways: Ways,
        *,
        leaf: Callable[[str], Deferred[Any]],
        way_out: WayOut,
    ) -> None:
        super().__init__()
        self._recorder = recorder
        self._metrics = metrics
        self._ways = ways
        self._leaf = leaf
        self._way_out = way_out
        self._auth = Auth(config, recorder.now)
        intercept = config.intercept
        self._intercepts = HostPatterns(() if intercept is None else intercept.hosts)
        self._most_handshakes = 0 if intercept is None else intercept.handshakes
        self._tunnels = Tunnels(config.tunnel)
        self._tunnel_settings = config.tunnel

    def early_refusal(self, request: Request) -> ProxyError:
        """Refuse a body in chunks, which a CONNECT cannot have either (RFC 9110, section 9.3.6)."""
        return ProxyError(400, "malformed", "The request is refused: a CONNECT has no body.")

    def render(self, request: Request) -> int:
        """Begin to serve ``request``."""
        exchange = self._recorder.begin(request)

        def client_left(why: ClientGone) -> None:
            exchange.left = why
            exchange.drop()

        request.gone = client_left
        exchange.task = Task(self._serve(exchange), end_failed)
        return NOT_DONE_YET

    # -- the story ------------------------------------------------------------------------------

    async def _tell(self, exchange: Exchange) -> _End:
        request, trace = exchange.request, exchange.trace
        if request.refusal is not None:
            raise request.refusal
        host, port = self._authority(request)
        if not holds_made_key(request.uri):
            trace.path = authority_of(host, port)
        if request.inside is not None:
            text = "A CONNECT within a connection that is intercepted is not served."
            allow = (b"allow", b", ".join(METHODS))
            raise ProxyError(405, "method", text, fields=(allow,))
        value = request.first.get(b"proxy-authorization")
        client = None if value is None else self._auth.identify_proxy(value)
        if client is not None:
            trace.client = client.name
        if self._intercepts.match(host):
            return await self._intercept(exchange, host, port, value)
        return await self._tunnel(exchange, host, port, client)

    async def _serve(self, exchange: Exchange) -> None:
        """Tell the story, and see to its end, whatever that is."""
        error: ProxyError | None = None
        detail = None
        try:
            end, detail = await self._tell(exchange)
            if exchange.left is not None:
                end = exchange.left.end
        except Exception as problem:
            end, error = exchange.judge(problem)
        if error is not None:
            self._refuse(exchange, error)
        trace = exchange.trace
        self._metrics.connected(trace.tunnel or REFUSED)
        is_new = error is None or self._ways.repeats.is_first(
            trace.path, trace.client or trace.peer, error.reason
        )
        self._recorder.close(exchange, end, error, writes_access=is_new, detail=detail)

    # -- its steps ------------------------------------------------------------------------------

    def _authority(self, request: Request) -> tuple[str, int]:
        try:
            host, port = parse_authority(request.uri)
        except BadMessage as error:
            raise ProxyError(400, "bad_target", f"The request is refused: {error}.") from None
        return as_compared(host), port

    async def _intercept(
        self, exchange: Exchange, host: str, port: int, authorization: bytes | None
    ) -> _End:
        """Let the client's connection go on with this proxy; it is over when requests can come."""
        exchange.trace.tunnel = INTERCEPTED
        tls, ways = await self._leaf_for(host, exchange), self._ways
        if self._are_enough(ways.handshakes):
            raise _too_many_handshakes()
        ways.handshakes += 1
        try:
            shaken: Deferred[tuple[str, str] | None] = Deferred()
            inside = Inside(host, port, authorization=authorization, tls=tls, ended=shaken.callback)
            exchange.request.turn_inside([], inside)
            why = await shaken
        finally:
            ways.handshakes -= 1
        if why is None:
            return EndReason.COMPLETE, None
        word, words = why
        if word == LEFT:
            return EndReason.CLIENT_GONE, None
        end = EndReason.CLIENT_GONE if word == HANDSHAKE else EndReason.REJECTED
        raise ProxyError(_OUT, word, "", end=end, detail=words)

    def _are_enough(self, count: int) -> bool:
        """Return whether so many connections are all that may be on their way to a request."""
        return 0 < self._most_handshakes <= count

    async def _leaf_for(self, host: str, exchange: Exchange) -> Any:
        """Return the TLS of a host; one that is to be made first is waited for.

        Those who wait are counted apart: a program that asks for many new names below a wildcard
        must not keep the others from the hosts whose TLS is there.
        """
        leaf, ways = self._leaf(host), self._ways
        if not leaf.called and self._are_enough(ways.waiting):
            leaf.addErrback(lambda _: None)
            leaf.cancel()
            raise _too_many_handshakes()
        ways.waiting += 1
        try:
            return await leaf
        except Exception as error:
            if exchange.left is not None:
                raise
            text = "The proxy has no certificate for this host now; try again later."
            raise ProxyError(
                503, "no_certificate", text, end=EndReason.INTERNAL, detail=str(error)
            ) from error
        finally:
            ways.waiting -= 1

    async def _tunnel(
        self, exchange: Exchange, host: str, port: int, client: Client | None
    ) -> _End:
        if client is None:
            raise no_proxy_key()
        trace, request, tunnels = exchange.trace, exchange.request, self._ways.tunnels
        trace.tunnel = OBSERVED if self._tunnels.permit(host, port) else TUNNELLED
        tunnels.enter(client.name, self._tunnel_settings.max_per_client)
        try:
            way = await self._way_out.open(host, port, client.name)
            splice = Splice(
                way,
                self._ways.splices,
                idle=self._tunnel_settings.idle,
                total=self._tunnel_settings.total,
            )
            try:
                request.hand_over(200, [], splice)
            except BaseException:
                way.abort()
                raise
            end = await splice.done
        finally:
            tunnels.leave(client.name)
        request.body_bytes, request.sent = splice.sent, splice.received
        self._metrics.tunnelled(splice.sent, splice.received)
        return end, splice.detail or None

    def _refuse(self, exchange: Exchange, error: ProxyError) -> None:
        """Respond with an error, unless the response is out already."""
        request, name = exchange.request, exchange.trace.id
        if request.startedWriting:
            exchange.to_client = "broken_off"
            return
        exchange.to_client = "error"
        if error.end is EndReason.REJECTED:
            exchange.trace.tunnel = REFUSED
        body = error_body(error, Dialect.OPENAI, name)
        fields = error_fields(error, name, len(body), self._recorder.now())
        phrase = _PHRASES.get(error.reason, error.message.rstrip("."))
        request.start(error.status, fields, phrase)
        request.write(body)
        request.finish()


def _too_many_handshakes() -> ProxyError:
    text = "The proxy makes as many TLS handshakes as it may; try again."
    fields = ((b"retry-after", b"1"),)
    return ProxyError(503, "handshakes", text, fields=fields, cause="intercept.handshakes")
