"""``/-/pace``: a paced stream for known clients, to measure the way between them and the proxy.

The stream is made here (``stream/pace.py``) and goes to its client by a relay, as a provider's
does.  So it is seen, held up, counted, recorded and ended as any other; it has no route and no
provider.  It counts against its client's limits on requests, and costs no tokens.  What is timed
of providers' streams is left alone by it (ADR-0035).

A stream can be given a name (``mark=WORD``).  ``?ended=WORD`` then says what became of it, as seen
from here: a client that cancels cannot see whether that reached the proxy.  It also says what of
the request hops may have added or changed.
"""

from __future__ import annotations

import re
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import msgspec
from twisted.web.http import datetimeToString

from llmproxy.config import Client, Config
from llmproxy.dialects.dialect import Dialect
from llmproxy.errors import ClientGone, EndReason, ProxyError
from llmproxy.gateway.admission import Rules, admit_fields, refuse_elsewhere, who_calls
from llmproxy.gateway.exchange import Exchange, end_failed
from llmproxy.gateway.pace_page import PageFile, page_fields
from llmproxy.gateway.recorder import Recorder
from llmproxy.http1.headers import ANTI_BUFFERING
from llmproxy.net.task import Task
from llmproxy.policy.auth import ANONYMOUS, KeyPlaces, holds_made_key
from llmproxy.policy.limits import ClientLimits, limited
from llmproxy.policy.origins import refuse_page
from llmproxy.record.metrics import Metrics
from llmproxy.server.error_response import own_fields
from llmproxy.server.handler import NOT_DONE_YET, Handler
from llmproxy.server.request import Request
from llmproxy.stream.pace import Pace, PacedSource, pace_of, read_query
from llmproxy.stream.relay import Batch, Relay

PATH = b"/-/pace"

_KEYS = KeyPlaces()
_WORD = re.compile(r"[A-Za-z0-9-]{1,64}\Z")
_MOST_MARKS = 200
"""How many streams are remembered by their names, of all clients."""

_SHOWN = frozenset(
    (
        *(b"via", b"forwarded", b"x-forwarded-for", b"x-forwarded-proto", b"x-forwarded-host"),
        *(b"x-forwarded-port", b"x-forwarded-server"),
        *(b"x-real-ip", b"x-varnish", b"cf-ray", b"x-amzn-trace-id"),
        *(b"accept-encoding", b"connection"),
    )
)
_SHOWN_PREFIX = b"x-envoy-"
_LONGEST_SHOWN = 256
"""The fields of a request that hops add or change, and how much is shown of one."""


class Fate(msgspec.Struct):
    """What became of a stream that has a name.

    Attributes:
        ended: ``complete``, ``broken`` (as was asked) or another end reason; None while it runs.
        at: when it ended, in monotonic seconds.
        source: makes the stream; it knows how many events were made.
        request: what reached the proxy of the request.
    """

    source: PacedSource
    request: dict[str, str]
    ended: str | None = None
    at: float = 0.0


class Marks:
    """The streams that have names, of the whole process: the last of them, running or not."""

    def __init__(self) -> None:
        self._fates: OrderedDict[tuple[str, str], Fate] = OrderedDict()

    def keep(self, client: str, word: str, fate: Fate) -> None:
        """Remember a stream by its name; another one of that name is forgotten."""
        self._fates.pop((client, word), None)
        self._fates[client, word] = fate
        if len(self._fates) > _MOST_MARKS:
            self._fates.popitem(last=False)

    def find(self, client: str, word: str) -> Fate:
        """Return what became of a stream of that client.

        Raises:
            ProxyError: 404.
        """
        fate = self._fates.get((client, word))
        if fate is None:
            text = "No stream of this name is remembered here; another process may know it."
            raise ProxyError(404, "unknown_mark", text)
        return fate


class _Run(msgspec.Struct):
    """One stream while it runs.

    Attributes:
        breaks: it was asked to break off.
        fate: what is remembered of it, if it has a name.
    """

    breaks: bool = False
    fate: Fate | None = None


class PacedStreams(Handler):
    """Serves ``/-/pace``, as one configuration has it.

    Args:
        config: the checked configuration.
        rules: what requests are admitted by.
        recorder: keeps a record of each request.
        metrics: counts what is on the way.
        marks: remembers the streams that have names.
        limits: what clients use.
        reactor: paces; its timers keep to the millisecond.
        clock: monotonic seconds.
    """

    def __init__(
        self,
        config: Config,
        rules: Rules,
        recorder: Recorder,
        metrics: Metrics,
        marks: Marks,
        *,
        limits: ClientLimits,
        reactor: Any,
        clock: Callable[[], float],
    ) -> None:
        super().__init__()
        self._rules = rules
        self._recorder = recorder
        self._metrics = metrics
        self._marks = marks
        self._limits = limits
        self._limited = frozenset(limited(config.clients))
        self._reactor = reactor
        self._clock = clock
        self._batch = Batch()

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

    async def _serve(self, exchange: Exchange) -> None:
        """Tell the story, and see to its end, whatever that is."""
        run, error = _Run(), None
        try:
            await self._tell(exchange, run)
            end = EndReason.COMPLETE if exchange.left is None else exchange.left.end
        except Exception as problem:
            end, error = exchange.judge(problem)
        if error is not None:
            exchange.fail(error, Dialect.OPENAI, self._recorder.now())
        if (fate := run.fate) is not None:
            is_broken = run.breaks and end is EndReason.COMPLETE
            fate.ended, fate.at = "broken" if is_broken else end.value, self._clock()
        self._recorder.close(exchange, end, error)

    async def _tell(self, exchange: Exchange, run: _Run) -> None:
        request = exchange.request
        client = self._identify(request)
        exchange.trace.client = client.name
        asked = read_query(request.uri.partition(b"?")[2])
        if client.name in self._limited:
            exchange.lease = self._limits.admit(client, None, None)
        if "ended" in asked:
            self._tell_end(exchange, client, asked)
            return
        word = asked.get("mark")
        if word is not None and _WORD.match(word) is None:
            raise ProxyError(400, "bad_query", "mark must be 1 to 64 letters, digits and hyphens.")
        pace = pace_of(asked, ("mark", "ended"))
        exchange.trace.stream = True
        source = PacedSource(pace, self._reactor, self._clock, self._recorder.now)
        run.breaks = pace.break_after is not None
        if word is not None:
            run.fate = Fate(source, _shown(request))
            self._marks.keep(client.name, word, run.fate)
        request.start(200, stream_fields(pace, exchange.trace.id, self._recorder.now()))
        if request.method != b"HEAD":
            await self._pump(exchange, source)
        if run.breaks and request.method != b"HEAD":
            request.break_off()
            return
        request.finish()
        if (delivered := request.when_delivered()) is not None:
            await delivered

    # -- its steps ------------------------------------------------------------------------------

    def _identify(self, request: Request) -> Client:
        """Return who calls.

        Raises:
            ProxyError: the request cannot be served, or nobody is known.
        """
        if request.refusal is not None:
            raise request.refusal
        refuse_other_methods(request)
        if (inside := request.inside) is not None:
            refuse_elsewhere(request, inside, self._rules)
        admit_fields(request, self._rules.pseudonym)
        client = who_calls(request, _KEYS, self._rules.auth)
        if client is ANONYMOUS:
            refuse_page(request.first, ())
        return client

    def _tell_end(self, exchange: Exchange, client: Client, asked: dict[str, str]) -> None:
        """Respond with what became of a stream."""
        if len(asked) > 1:
            raise ProxyError(400, "bad_query", "ended stands alone in the query.")
        fate = self._marks.find(client.name, asked["ended"])
        now = self._clock()
        found = {
            "ended": fate.ended,
            "events": fate.source.sent,
            "seconds_ago": None if fate.ended is None else round(now - fate.at, 3),
            "request": fate.request,
        }
        body = msgspec.json.encode(found) + b"\n"
        request, now_s = exchange.request, self._recorder.now()
        no_store = (b"cache-control", b"no-store")
        request.start(200, [*own_fields(exchange.trace.id, len(body), now_s), no_store])
        request.write(body)
        request.finish()

    async def _pump(self, exchange: Exchange, source: PacedSource) -> None:
        """Relay the stream to the client."""
        relay = exchange.relay = Relay(
            source,
            exchange.request,
            self._reactor,
            self._clock,
            idle=None,
            batch=self._batch,
            gaps=_nothing,
            delays=_nothing,
        )
        self._metrics.began(relay)
        try:
            done = relay.start()
            exchange.request.flush()
            await done
        finally:
            self._metrics.finished(relay)


class PacePage(Handler):
    """Serves one file of the page below ``/-/pace/``, to whoever asks.

    Args:
        recorder: keeps a record of each request.
        file: what is served.
    """

    def __init__(self, recorder: Recorder, file: PageFile) -> None:
        super().__init__()
        self._recorder = recorder
        self._file = file

    def render(self, request: Request) -> int:
        """Respond at once."""
        exchange, now = self._recorder.begin(request), self._recorder.now()
        end, error = EndReason.COMPLETE, None
        try:
            if request.refusal is not None:
                raise request.refusal
            refuse_other_methods(request)
        except ProxyError as refusal:
            end, error = refusal.end, refusal
            exchange.fail(error, Dialect.OPENAI, now)
        else:
            name = (b"x-llmproxy-request-id", exchange.trace.id.encode("ascii"))
            request.start(200, [(b"date", datetimeToString(now)), *page_fields(self._file), name])
            request.write(self._file.body)
            request.finish()
        self._recorder.close(exchange, end, error)
        return NOT_DONE_YET


def stream_fields(pace: Pace, request_id: str, now: float) -> list[tuple[bytes, bytes]]:
    """Return the header fields of a paced stream: those that providers' streams have from us."""
    return [
        (b"date", datetimeToString(now)),
        (b"content-type", pace.content_type),
        *ANTI_BUFFERING,
        (b"x-llmproxy-request-id", request_id.encode("ascii")),
    ]


def refuse_other_methods(request: Request) -> None:
    """Refuse what is neither GET nor HEAD.

    Raises:
        ProxyError: 405.
    """
    if request.method not in (b"GET", b"HEAD"):
        allow = (b"allow", b"GET, HEAD")
        raise ProxyError(405, "method", "This path is only read.", fields=(allow,))


def _shown(request: Request) -> dict[str, str]:
    """Return what may be seen of a request: its version, and fields that hops add or change."""
    found = {"version": request.clientproto.removeprefix(b"HTTP/").decode("ascii")}
    for name, value in request.fields:
        if name not in _SHOWN and not name.startswith(_SHOWN_PREFIX):
            continue
        if holds_made_key(value):
            continue
        key, text = name.decode("ascii"), value[:_LONGEST_SHOWN].decode("latin-1")
        found[key] = f"{found[key]}, {text}"[:_LONGEST_SHOWN] if key in found else text
    return found


def _nothing(seconds: float) -> None:
    """Leave alone what is timed of providers' streams."""
