"""Metrics: as prometheus_client counts them, never falling, and readable for its parsers."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client import Histogram as PrometheusHistogram
from prometheus_client.openmetrics.exposition import generate_latest as generate_openmetrics
from prometheus_client.openmetrics.parser import text_string_to_metric_families as parse_openmetrics
from prometheus_client.parser import text_string_to_metric_families as parse_text

from llmproxy.record.metrics import Histogram, Metrics

BOUNDS = (0.005, 0.1, 1.0, 2.5, 10.0)


class Body:
    """The counts of a body that is relayed."""

    def __init__(self, chunks: int = 0, byte_count: int = 0) -> None:
        self.chunks = chunks
        self.byte_count = byte_count
        self.paused_s = 0.0
        self.is_paused = False


def samples(families: Iterable[Any]) -> dict[tuple[str, tuple[tuple[str, str], ...]], float]:
    """Return every sample by its name and labels."""
    return {
        (sample.name, tuple(sorted(sample.labels.items()))): sample.value
        for family in families
        for sample in family.samples
    }


def busy() -> Metrics:
    """Return metrics in which everything has happened."""
    metrics = Metrics("1.2.3")
    metrics.watch("client_connections", "Open.", [], lambda: {(): 3})
    metrics.watch(
        "upstream_connections", "To.", ["provider", "state"], lambda: {("p", "idle"): 2.0}
    )
    metrics.watch("draining", "1 while.", [], lambda: {(): False})
    metrics.watch_count("records_lost", "Lost.", ["sink"], lambda: {("jsonl",): 4})
    for number in range(3):
        metrics.request_began()
        body = Body(number, 10 * number)
        metrics.began(body)
        metrics.finished(body)
        metrics.request_ended(("r", "p", 'a"\\\n', "GET", "2xx"), "complete", 7)
        metrics.attempted("p", "ok", None)
    metrics.attempted("p", "upstream_tls", "expired")
    metrics.request_began()
    metrics.began(Body(5, 50))
    for histogram in (
        metrics.head,
        metrics.first_chunk,
        metrics.gap,
        metrics.stream,
        metrics.overhead,
        metrics.cancel,
        metrics.reactor_lag,
    ):
        histogram.observe(0.2)
    return metrics


# --- histograms -----------------------------------------------------------------------------------

VALUES = st.lists(
    st.one_of(st.floats(0, 100), st.sampled_from([*BOUNDS, 0.0, 0.1 + 1e-17, 1e6])), max_size=40
)


@given(VALUES)
def test_a_histogram_counts_as_prometheus_client_does(values: list[float]) -> None:
    """Buckets, bounds and sum are those of its own Histogram for the same values."""
    registry = CollectorRegistry()
    theirs = PrometheusHistogram("h", "text", buckets=BOUNDS, registry=registry)
    ours = Histogram(BOUNDS)
    for value in values:
        theirs.observe(value)
        ours.observe(value)
    rows, total = ours.buckets()
    (family,) = theirs.collect()
    expected = [(s.labels["le"], s.value) for s in family.samples if s.name == "h_bucket"]

    assert rows == expected
    assert total == pytest.approx(registry.get_sample_value("h_sum"))


# --- totals ---------------------------------------------------------------------------------------


@given(
    st.lists(st.tuples(st.sampled_from("bgf"), st.integers(0, 3), st.integers(1, 99)), max_size=40)
)
def test_totals_never_fall(steps: list[tuple[str, int, int]]) -> None:
    """The counts of running and ended bodies are one sum that only grows."""
    metrics, bodies = Metrics("1"), [Body() for _ in range(4)]
    names = ("chunks_total", "bytes_total", "pause_seconds_total")
    last = (0.0, 0.0, 0.0)
    pushed = 0
    for kind, which, size in steps:
        body = bodies[which]
        if kind == "b":
            metrics.began(body)
        elif kind == "g" and body in metrics.live:
            body.chunks += 1
            body.byte_count += size
            body.paused_s += size / 10
            pushed += size
        elif kind == "f" and body in metrics.live:
            metrics.finished(body)
            metrics.finished(body)
            bodies[which] = Body()
        found = metrics.registry.get_sample_value
        now = tuple(
            found(f"llmproxy_{name}", {"direction": "out"} if name == "bytes_total" else {}) or 0.0
            for name in names
        )
        assert all(a >= b - 1e-9 for a, b in zip(now, last, strict=True))
        assert now[1] == pushed
        last = now  # type: ignore[assignment]  # three floats


def test_a_running_body_is_counted() -> None:
    """A scrape sees the chunks of a running body, and whether its client holds it up."""
    metrics, body = Metrics("1"), Body()
    value = metrics.registry.get_sample_value
    metrics.began(body)
    body.chunks, body.byte_count, body.is_paused, body.paused_s = 3, 30, True, 1.5

    assert value("llmproxy_chunks_total") == 3
    assert value("llmproxy_bytes_total", {"direction": "out"}) == 30
    assert value("llmproxy_paused_streams") == 1
    assert value("llmproxy_pause_seconds_total") == 1.5
    metrics.finished(body)
    assert value("llmproxy_paused_streams") == 0


def test_a_request_is_counted_by_its_labels() -> None:
    """A request is active until it ends; then it counts by its labels and its end reason."""
    metrics = Metrics("1")
    value = metrics.registry.get_sample_value
    metrics.request_began()
    assert value("llmproxy_active_streams") == 1
    metrics.request_ended(("r", "p", "c", "POST", "5xx"), "upstream_broken", 11)

    labels = {"route": "r", "provider": "p", "client": "c", "method": "POST", "status": "5xx"}
    assert value("llmproxy_active_streams") == 0
    assert value("llmproxy_requests_total", labels) == 1
    assert value("llmproxy_ended_total", {"reason": "upstream_broken"}) == 1
    assert value("llmproxy_bytes_total", {"direction": "in"}) == 11


def test_watched_values_are_read_at_each_scrape() -> None:
    """A watched gauge or counter has the present value of its owner."""
    metrics = Metrics("1")
    held: dict[tuple[str, ...], float] = {("x",): 1.0}
    metrics.watch("held", "Held.", ["what"], lambda: held)
    metrics.watch_count("lost", "Lost.", ["what"], lambda: held)
    value = metrics.registry.get_sample_value
    assert value("llmproxy_held", {"what": "x"}) == 1
    held["x",] = 2.0
    assert value("llmproxy_held", {"what": "x"}) == 2
    assert value("llmproxy_lost_total", {"what": "x"}) == 2


# --- what is shown --------------------------------------------------------------------------------

NAMES = {
    "requests_total": ("route", "provider", "client", "method", "status"),
    "ended_total": ("reason",),
    "upstream_attempts_total": ("provider", "outcome"),
    "bytes_total": ("direction",),
    "chunks_total": (),
    "active_streams": (),
    "paused_streams": (),
    "pause_seconds_total": (),
    "head_seconds_count": (),
    "first_chunk_seconds_count": (),
    "chunk_gap_seconds_count": (),
    "stream_seconds_count": (),
    "overhead_seconds_count": (),
    "cancel_seconds_count": (),
    "reactor_lag_seconds_count": (),
    "client_connections": (),
    "upstream_connections": ("provider", "state"),
    "records_lost_total": ("sink",),
    "draining": (),
    "build_info": ("version",),
}


@pytest.mark.parametrize("name", NAMES)
def test_names_and_labels_are_those_of_the_design(name: str) -> None:
    """Dashboards and rules rely on them (design 11)."""
    found = [key for key in samples(busy().collect()) if key[0] == "llmproxy_" + name]

    assert found
    assert {tuple(label for label, _ in key[1]) for key in found} == {tuple(sorted(NAMES[name]))}


def test_every_metric_has_our_prefix_and_says_what_it_is() -> None:
    """Each name begins with the prefix, and each help text is one sentence."""
    for family in busy().collect():
        assert family.name.startswith("llmproxy_")
        assert family.documentation.endswith(".")


@pytest.mark.parametrize("make", [busy, lambda: Metrics("1")])
def test_both_formats_can_be_read(make: Callable[[], Metrics]) -> None:
    """The parsers find every sample: odd labels, and a daemon that has just started, too."""
    metrics = make()
    text = generate_latest(metrics.registry).decode()
    openmetrics = generate_openmetrics(metrics.registry).decode()

    collected = samples(metrics.collect())
    assert collected
    assert samples(parse_text(text)) == samples(parse_openmetrics(openmetrics)) == collected
    assert openmetrics.endswith("# EOF\n")


def test_latencies_have_an_example_of_each_bucket() -> None:
    """The last one counts; OpenMetrics shows it, and the other format has none."""
    metrics = Metrics("1.2.3")
    for trace, head in (("a" * 32, 0.03), ("b" * 32, 0.04), ("c" * 32, 700.0)):
        metrics.head.note(head)
        metrics.exemplify(trace, 1000.5, head_s=head, first_chunk_s=None, gap_s=0.2, queued_s=0.0)
    families = parse_openmetrics(generate_openmetrics(metrics.registry).decode())
    found = {
        (sample.name.removeprefix("llmproxy_"), sample.labels["le"]): sample.exemplar
        for family in families
        for sample in family.samples
        if sample.exemplar
    }
    assert found.keys() == {
        ("head_seconds_bucket", "0.05"),
        ("head_seconds_bucket", "+Inf"),
        ("chunk_gap_seconds_bucket", "0.25"),
    }
    example = found["head_seconds_bucket", "0.05"]
    assert (example.labels, example.value, float(example.timestamp)) == (
        {"trace_id": "b" * 32},
        0.04,
        1000.5,
    )
    assert b"trace_id" not in generate_latest(metrics.registry)


def test_slow_requests_are_examples_and_some_of_the_others() -> None:
    """One in sixteen, whichever begins or ends."""
    metrics = Metrics("1.2.3")
    wanted = 0
    for _ in range(160):
        metrics.request_began()
        wanted += metrics.wants_example(0.001)
        assert metrics.wants_example(1.1)
    assert wanted == 10


def test_bodies_are_summed_up_a_slice_at_a_time() -> None:
    """Each is counted once, whether it begins, goes on or ends between two slices."""
    metrics = Metrics("1")
    value = metrics.registry.get_sample_value
    bodies = [Body(1, 10) for _ in range(1200)]
    for body in bodies:
        metrics.began(body)
    turns = 0
    for _ in metrics.sum_bodies():
        turns += 1
        metrics.finished(bodies[turns])
        metrics.finished(bodies[-turns])
        metrics.began(Body(1, 10))
    assert turns == 3
    assert value("llmproxy_chunks_total") == 1200
    assert value("llmproxy_chunks_total") == 1203
