"""Every Prometheus metric, in one class and one registry.

The path of a request counts in plain integers; a collector turns them into metrics when Prometheus
asks (ADR-0003).  Labels come from closed sets: names in the configuration, and words of this
program.  Streams that are still running are counted at the scrape, so that no chunk has to touch a
metric.  Nothing here knows where the values come from.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections import defaultdict, deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import islice
from operator import add
from typing import Protocol

from prometheus_client import CollectorRegistry
from prometheus_client.core import Exemplar, HistogramMetricFamily, Metric, Sample

_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0, 600.0)
_FINE_SECONDS = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 5.0)
_DELAYS = (0.00005, 0.0001, 0.00025, *_FINE_SECONDS, 10.0, 60.0)

TOKENS = ("input", "output", "cache_read", "cache_write", "reasoning")
"""The types of tokens, as labels have them."""

_SLOW_S, _SOME = 1.0, 16
"""Each request that lasted longer is an example of its latencies, and one in so many others."""

_STEPS = 256
"""Beginnings and ends of requests after which the values that they have are counted."""

_SLICE = 500
"""Bodies that are summed up at once."""

_Sums = tuple[int, int, float, int]
"""Of all bodies: chunks, bytes, seconds of pauses, and how many are paused."""

_NOTHING: _Sums = 0, 0, 0.0, 0

_PREFIX = "llmproxy_"


class Histogram:
    """A histogram in plain integers.

    Args:
        bounds: upper bounds of the buckets, ascending, in the unit that is observed.
    """

    __slots__ = ("_bounds", "_counts", "_examples", "_sum")

    def __init__(self, bounds: tuple[float, ...]) -> None:
        self._bounds = bounds
        self._counts = [0] * (len(bounds) + 1)
        self._sum = 0.0
        self._examples: dict[str, Exemplar] = {}

    def observe(self, value: float) -> None:
        """Count one value."""
        self._counts[bisect_left(self._bounds, value)] += 1
        self._sum += value

    def exemplify(self, value: float, example: Exemplar) -> None:
        """Keep an example of a value that was observed, for its bucket."""
        place = bisect_left(self._bounds, value)
        bound = "+Inf" if place == len(self._bounds) else str(self._bounds[place])
        self._examples[bound] = example

    def examples(self) -> Mapping[str, Exemplar]:
        """Return the last example of each bucket that has one, by its upper bound."""
        return self._examples

    def buckets(self) -> tuple[list[tuple[str, float]], float]:
        """Return cumulative buckets by their upper bound, and the sum."""
        total = 0
        rows: list[tuple[str, float]] = []
        for bound, count in zip((*self._bounds, float("inf")), self._counts, strict=True):
            total += count
            rows.append(("+Inf" if bound == float("inf") else str(bound), total))
        return rows, self._sum


class NotingHistogram(Histogram):
    """A histogram whose values are noted, and counted many at once, which is quicker.

    Attributes:
        note: takes one value; :meth:`count` must be called now and then.
    """

    __slots__ = ("_noted", "note")

    def __init__(self, bounds: tuple[float, ...]) -> None:
        super().__init__(bounds)
        self._noted: list[float] = []
        self.note: Callable[[float], None] = self._noted.append

    def count(self) -> None:
        """Count what was noted so far."""
        noted, counts, at = self._noted, self._counts, 0
        if not noted:
            return
        noted.sort()
        self._sum += sum(noted)
        for place, bound in enumerate(self._bounds):
            before, at = at, bisect_right(noted, bound, at)
            counts[place] += at - before
        counts[-1] += len(noted) - at
        noted.clear()

    def buckets(self) -> tuple[list[tuple[str, float]], float]:
        """Return cumulative buckets by their upper bound, and the sum."""
        self.count()
        return super().buckets()


class Live(Protocol):
    """What a running body reports at a scrape; ``stream.relay.Relay`` is one."""

    @property
    def chunks(self) -> int:
        """How many chunks were forwarded, so far."""

    @property
    def byte_count(self) -> int:
        """How many bytes these chunks had."""

    @property
    def paused_s(self) -> float:
        """For how many seconds the client has paused the body so far."""

    @property
    def is_paused(self) -> bool:
        """Whether the client pauses the body now."""


Labels = tuple[str, ...]
Source = Callable[[], Mapping[Labels, float]]
"""Returns the values of one metric, by its labels."""


class Metrics:
    """The figures of one process.

    Args:
        version: shown in ``build_info``.

    Attributes:
        live: the bodies that are being relayed.
        websockets: the WebSockets that are open.
    """

    def __init__(self, version: str) -> None:
        self.registry = CollectorRegistry()
        self.live: set[Live] = set()
        self.websockets = 0
        self._requests: dict[Labels, int] = defaultdict(int)
        self._ended: dict[Labels, int] = defaultdict(int)
        self._attempts: dict[Labels, int] = defaultdict(int)
        self._causes: dict[Labels, int] = defaultdict(int)
        self._degraded: dict[Labels, int] = defaultdict(int)
        self._held_back: dict[Labels, int] = defaultdict(int)
        self._resent: dict[Labels, int] = defaultdict(int)
        self._tokens: dict[Labels, tuple[int, ...]] = {}
        self._connects: dict[Labels, int] = defaultdict(int)
        self._active = 0
        self._steps = 0  # requests that began or ended since values were counted
        self.head = NotingHistogram(_SECONDS)
        self.first_chunk = NotingHistogram(_SECONDS)
        self.gap = Histogram(_SECONDS)
        self.relay_delay = Histogram(_DELAYS)
        self.stream = NotingHistogram(_SECONDS)
        self.overhead = NotingHistogram(_FINE_SECONDS)
        self.cancel = Histogram(_FINE_SECONDS)
        self.reactor_lag = Histogram(_FINE_SECONDS)
        self.queue_wait = Histogram(_SECONDS)
        self._turns: Histogram | None = None
        self._bytes = {"in": 0, "out": 0}
        self._tunnelled: dict[Labels, int] = {("in",): 0, ("out",): 0}
        self._chunks = 0
        self._paused_s = 0.0
        self._sums: _Sums | None = None
        self._version = version
        self._sources: list[tuple[str, str, list[str], bool, Source]] = []
        self.registry.register(self)

    def watch(self, name: str, text: str, labels: list[str], source: Source) -> None:
        """Expose a gauge whose values another part holds; ``source`` is called at each scrape."""
        self._sources.append((name, text, labels, False, source))

    def watch_count(self, name: str, text: str, labels: list[str], source: Source) -> None:
        """Expose a counter whose values another part holds."""
        self._sources.append((name, text, labels, True, source))

    def watch_turns(self) -> Histogram:
        """Return what counts the reactor's turns, which is exposed from now on."""
        self._turns = Histogram(_FINE_SECONDS)
        return self._turns

    def began(self, body: Live) -> None:
        """A body is being relayed."""
        self.live.add(body)

    def finished(self, body: Live) -> None:
        """A body has ended: its figures are added to the totals."""
        if body in self.live:
            self.live.discard(body)
            self.passed(body)

    def passed(self, body: Live) -> None:
        """Add the figures of a body that is over."""
        self._chunks += body.chunks
        self._bytes["out"] += body.byte_count
        self._paused_s += body.paused_s

    def attempted(self, provider: str, outcome: str, cause: str | None) -> None:
        """A provider was tried."""
        self._attempts[provider, outcome] += 1
        if cause is not None:
            self._causes[provider, cause] += 1

    def connected(self, outcome: str) -> None:
        """A CONNECT has come to something: a word of ``gateway/connect.py``."""
        self._connects[outcome,] += 1

    def tunnelled(self, sent: int, received: int) -> None:
        """A tunnel has ended, with so many bytes from its client and to it."""
        self._tunnelled["in",] += sent
        self._tunnelled["out",] += received

    def degraded(self, reason: str) -> None:
        """A tap did not understand its response in full."""
        self._degraded[reason,] += 1

    def held_back(self, provider: str) -> None:
        """The events of a stream came in bursts."""
        self._held_back[provider,] += 1

    def resent(self, client: str, first: str) -> None:
        """A request came again; ``first`` says how the one before it stood."""
        self._resent[client, first] += 1

    def used(self, labels: Labels, *tokens: int) -> None:
        """Count the tokens of a response.

        Args:
            labels: client, provider and model.
            tokens: of each type of :data:`TOKENS`; 0 where the provider did not say.
        """
        counted = self._tokens.get(labels)
        self._tokens[labels] = tokens if counted is None else (*map(add, counted, tokens),)

    def request_began(self) -> None:
        """A request is being served."""
        self._active += 1
        self._steps += 1
        if self._steps >= _STEPS:
            self._count_noted()

    def request_ended(self, labels: Labels, reason: str, bytes_in: int) -> None:
        """A request has ended.

        Args:
            labels: route, provider, client, method and status class; empty where there is none.
            reason: the end reason.
            bytes_in: of its body.
        """
        self._active -= 1
        self._steps += 1
        if self._steps >= _STEPS:
            self._count_noted()
        self._requests[labels] += 1
        self._ended[reason,] += 1
        self._bytes["in"] += bytes_in

    def wants_example(self, duration_s: float) -> bool:
        """Return whether a request that lasted so long is to be an example (:meth:`exemplify`)."""
        return duration_s > _SLOW_S or not self._steps % _SOME

    def exemplify(
        self,
        trace_id: str,
        now: float,
        *,
        head_s: float | None,
        first_chunk_s: float | None,
        gap_s: float | None,
        queued_s: float,
    ) -> None:
        """Let a request be the example of the latencies that it had, for OpenMetrics.

        Args:
            trace_id: by which it is found in a tracing system, as its span has it.
            now: seconds since the epoch.
            head_s, first_chunk_s, gap_s, queued_s: what was observed of it, where it was.
        """
        for histogram, value in (
            (self.head, head_s),
            (self.first_chunk, first_chunk_s),
            (self.gap, gap_s),
            (self.queue_wait, queued_s or None),
        ):
            if value is not None:
                histogram.exemplify(value, Exemplar({"trace_id": trace_id}, value, now))

    def _count_noted(self) -> None:
        """Count the values of many requests; the next ones are noted anew."""
        self._steps = 0
        for histogram in (self.head, self.first_chunk, self.stream, self.overhead):
            histogram.count()

    # -- at a scrape ----------------------------------------------------------------------------

    def collect(self) -> Iterator[Metric]:
        """Yield every metric, as ``prometheus_client`` asks for them."""
        yield from self._counters()
        yield from self._bodies()
        yield from self._gauges()
        yield from self._histograms()
        for name, text, labels, is_count, source in self._sources:
            yield (_counter if is_count else _gauge)(name, text, labels, source().items())

    def _counters(self) -> Iterator[Metric]:
        for name, text, labels, counts in (
            (
                "requests",
                "Requests that ended. Compare by status, route and client; ended_total says why.",
                ["route", "provider", "client", "method", "status"],
                self._requests,
            ),
            (
                "ended",
                (
                    "Requests that ended, by end reason. Other than complete: /streams/ended of "
                    "the admin site has examples."
                ),
                ["reason"],
                self._ended,
            ),
            (
                "upstream_attempts",
                (
                    "Tries at a provider, by outcome. Many failed ones before an ok: look at the "
                    "first candidate."
                ),
                ["provider", "outcome"],
                self._attempts,
            ),
            (
                "upstream_failures",
                (
                    "Failed tries at a provider, by cause, where an outcome has several. The "
                    "cause says whom to ask: docs/trouble.rst."
                ),
                ["provider", "cause"],
                self._causes,
            ),
            (
                "tokens",
                "Tokens, as the providers count them; llmproxy usage has them by day and session.",
                ["client", "provider", "model", "type"],
                self._tokens_by_type(),
            ),
            (
                "tap_degraded",
                (
                    "Responses that were not understood in full: their tokens may be missing. "
                    "The record's degraded says why."
                ),
                ["reason"],
                self._degraded,
            ),
            (
                "buffered_upstream",
                (
                    "Streams whose events came in bursts, as if a hop behind the proxy held them "
                    "back. Measure with llmproxy doctor."
                ),
                ["provider"],
                self._held_back,
            ),
            (
                "resent",
                (
                    "Requests that came again, while the first ran or behind its cut. Behind "
                    "client_gone: look for an idle limit before the proxy."
                ),
                ["client", "first"],
                self._resent,
            ),
            (
                "connects",
                (
                    "CONNECTs, by what became of them. refused: llmproxy usage --tunnels says "
                    "which hosts."
                ),
                ["outcome"],
                self._connects,
            ),
            ("tunnel_bytes", "Bytes of tunnels that ended.", ["direction"], self._tunnelled),
        ):
            yield _counter(name, text, labels, counts.items())

    def sum_bodies(self) -> Iterator[None]:
        """Sum up what bodies have come to, with a pause behind each slice of them.

        The next :meth:`collect` shows these sums.  Those who begin meanwhile are not in them; those
        who end are, once, and so no sum is ever less than the one before.
        """
        chunks, out, paused_s, paused = self._chunks, self._bytes["out"], self._paused_s, 0
        bodies = iter(list(self.live))
        while some := list(islice(bodies, _SLICE)):
            for body in some:
                chunks += body.chunks
                out += body.byte_count
                if body.is_paused:
                    paused += 1
                paused_s += body.paused_s
            yield
        self._sums = chunks, out, paused_s, paused

    def _bodies(self) -> Iterator[Metric]:
        if self._sums is None:
            deque(self.sum_bodies(), 0)
        chunks, out, paused_s, paused = self._sums or _NOTHING
        self._sums = None
        rows = [(("in",), self._bytes["in"]), (("out",), out)]
        yield _counter("bytes", "Bytes of bodies, of running ones, too.", ["direction"], rows)
        yield _counter("chunks", "Chunks forwarded, of running bodies, too.", [], [((), chunks)])
        text = "Seconds for which clients paused bodies. Much of it: clients or networks are slow."
        yield _counter("pause_seconds", text, [], [((), paused_s)])
        text = "Response bodies that wait for their client; /streams?phase=paused lists them."
        yield _gauge("paused_streams", text, [], [((), paused)])

    def _tokens_by_type(self) -> dict[Labels, int]:
        return {
            (*labels, kind): count
            for labels, counts in self._tokens.items()
            for kind, count in zip(TOKENS, counts, strict=True)
            if count
        }

    def _gauges(self) -> Iterator[Metric]:
        yield _gauge(
            "active_streams",
            "Requests that are being served; /streams of the admin site lists them.",
            [],
            [((), self._active)],
        )
        yield _gauge("websocket_connections", "Open WebSockets.", [], [((), self.websockets)])
        yield _gauge("build_info", "What is running.", ["version"], [((self._version,), 1)])

    def _histograms(self) -> Iterator[Metric]:
        for name, text, histogram in (
            (
                "head_seconds",
                "Request sent to response's head: the provider's own time.",
                self.head,
            ),
            (
                "first_chunk_seconds",
                (
                    "Request received to first chunk: what a user waits. Compare with "
                    "head_seconds and queue_wait_seconds."
                ),
                self.first_chunk,
            ),
            (
                "chunk_gap_seconds",
                "Between two chunks of a body, without pauses of the client: the provider's pace.",
                self.gap,
            ),
            (
                "relay_delay_seconds",
                (
                    "Chunk read to chunk taken by the kernel, for one chunk in 32: what the "
                    "proxy adds. High: see reactor_lag_seconds."
                ),
                self.relay_delay,
            ),
            ("stream_seconds", "Head sent to body's end.", self.stream),
            (
                "overhead_seconds",
                (
                    "Request received to request sent, without connecting: what the proxy adds "
                    "before the provider."
                ),
                self.overhead,
            ),
            (
                "cancel_seconds",
                (
                    "Client gone to provider's connection aborted; above 0.1 s the process is "
                    "late: see reactor_lag_seconds."
                ),
                self.cancel,
            ),
            (
                "queue_wait_seconds",
                (
                    "In a provider's queue. Long: raise the provider's max_streams, or add a "
                    "candidate."
                ),
                self.queue_wait,
            ),
            (
                "reactor_lag_seconds",
                (
                    "How late the reactor calls a timer: every stream waits as long. High with a "
                    "busy processor: add an instance; else watch_turns."
                ),
                self.reactor_lag,
            ),
            ("turn_seconds", "From one poll of the reactor to the next.", self._turns),
        ):
            if histogram is None:
                continue
            counted, total = histogram.buckets()
            examples = histogram.examples()
            buckets = [
                (bound, count, examples[bound]) if bound in examples else (bound, count)
                for bound, count in counted
            ]
            yield HistogramMetricFamily(_PREFIX + name, text, buckets=buckets, sum_value=total)


class _Samples:
    """The samples of a family, each made when it is asked for: there may be thousands.

    Args:
        name: of the samples.
        labels: their names.
        rows: the values of the labels, and the value.
    """

    def __init__(
        self, name: str, labels: Sequence[str], rows: Iterable[tuple[Labels, float]]
    ) -> None:
        self._name = name
        self._labels = labels
        self._rows = sorted(rows)

    def __iter__(self) -> Iterator[Sample]:
        """Make one after the other."""
        for labels, value in self._rows:
            yield Sample(self._name, dict(zip(self._labels, labels, strict=True)), value)


def _counter(
    name: str, text: str, labels: Sequence[str], rows: Iterable[tuple[Labels, float]]
) -> Metric:
    family = Metric(_PREFIX + name, text, "counter")
    family.samples = _Samples(f"{_PREFIX}{name}_total", labels, rows)  # type: ignore[assignment]  # it is only gone through
    return family


def _gauge(
    name: str, text: str, labels: Sequence[str], rows: Iterable[tuple[Labels, float]]
) -> Metric:
    family = Metric(_PREFIX + name, text, "gauge")
    family.samples = _Samples(_PREFIX + name, labels, rows)  # type: ignore[assignment]  # it is only gone through
    return family
