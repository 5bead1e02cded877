"""What Prometheus is told after a known series of requests (design 11)."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from prometheus_client.openmetrics.parser import (
    text_string_to_metric_families as parse_openmetrics,
)
from prometheus_client.parser import text_string_to_metric_families as parse_text

from tests.support.daemon import provider_config
from tests.support.sockets import Wire, chunked, connect, request
from tests.support.stage import (
    LAST,
    SSE,
    Notes,
    Stage,
    Turn,
    assert_settles,
    client_config,
    event,
    open_stage,
    post,
    read_got,
    response,
    until,
)

DEAD = """
[providers.dead]
url = "http://127.0.0.1:1"
dialect = "openai"
[[routes]]
path = "/dead"
name = "nobody"
providers = ["dead"]
"""


@pytest.fixture
def stage(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stage]:
    """A daemon that has counted nothing yet."""
    folder = tmp_path_factory.mktemp("metrics")
    known = client_config("team", "team-key")
    with open_stage(folder, lambda url: provider_config(url) + DEAD + known) as stage:
        yield stage


def counted(stage: Stage, name: str) -> dict[str, float]:
    """Return the samples of one counter, by their labels as they are written."""
    full = f"llmproxy_{name}"
    return {
        key.removeprefix(full): value
        for key, value in stage.daemon.metrics().items()
        if key == full or key.startswith(full + "{")
    }


def labels(route: str, provider: str, client: str, method: str, status: str) -> str:
    """Return the labels of `requests_total`, as they are written."""
    return (
        f'{{client="{client}",method="{method}",provider="{provider}",'
        f'route="{route}",status="{status}"}}'
    )


def test_a_known_series_of_requests_is_counted(stage: Stage) -> None:
    """Each once, under the labels that it belongs to."""
    body = b'{"model":"m"}'

    def streams(wire: Wire) -> None:
        wire.read_request()
        for piece in (SSE, chunked(event(0)), chunked(event(1))):
            wire.send(piece)
            sent.take()
        wire.send(LAST)

    sent = Turn()
    stage.script = streams
    with stage.connect() as client:
        client.send(post("/p/x", body, "x-api-key: team-key"))
        client.read_head()
        for number in range(2):
            sent.give()
            assert client.read_chunk() == event(number)
        sent.give()
        assert client.read_chunk() == b""
    stage.ask(request("GET", "/p/x"), response(200, body=b"12345"))
    stage.ask(request("GET", "/p/x"), response(429, body=b"no"))
    stage.script = _drop
    stage.get(request("GET", "/p/x"))
    stage.get(request("PUT", "/dead/x"))
    stage.get(request("GET", "/nowhere"))
    stage.get(request("PROPFIND", "/p/x"))
    stage.get(request("GET", "/p/x", "x-api-key: wrong"))
    assert_settles(stage.daemon)
    assert counted(stage, "requests_total") == {
        labels("p", "p", "team", "POST", "2xx"): 1,
        labels("p", "p", "anonymous", "GET", "2xx"): 1,
        labels("p", "p", "anonymous", "GET", "4xx"): 1,
        labels("p", "p", "anonymous", "GET", "5xx"): 1,
        labels("nobody", "dead", "anonymous", "PUT", "5xx"): 1,
        labels("", "", "anonymous", "GET", "4xx"): 1,
        labels("", "", "", "other", "4xx"): 1,
        labels("", "", "", "GET", "4xx"): 1,
    }
    assert counted(stage, "ended_total") == {
        '{reason="complete"}': 2,
        '{reason="upstream_refused"}': 1,
        '{reason="upstream_broken"}': 1,
        '{reason="upstream_unreachable"}': 1,
        '{reason="rejected"}': 3,
    }
    attempts = counted(stage, "upstream_attempts_total")
    assert sum(attempts.values()) == 5
    assert attempts['{outcome="ok",provider="p"}'] == 3
    size = len(event(0)) + len(event(1)) + 5 + 2
    assert counted(stage, "bytes_total") == {
        '{direction="in"}': len(body),
        '{direction="out"}': size,
    }
    assert counted(stage, "chunks_total") == {"": 4}
    assert counted(stage, "head_seconds_count") == {"": 3}
    assert counted(stage, "first_chunk_seconds_count") == {"": 3}
    assert counted(stage, "chunk_gap_seconds_count") == {"": 1}
    assert counted(stage, "stream_seconds_count") == {"": 3}
    assert counted(stage, "cancel_seconds_count") == {"": 0}
    assert counted(stage, "records_lost_total") == {'{sink="jsonl"}': 0}


def test_a_running_stream_is_counted_while_it_runs(stage: Stage) -> None:
    """Bytes and chunks do not wait for its end; then it is gone from the gauges."""
    ended = Notes()

    def script(wire: Wire) -> None:
        wire.read_request()
        wire.send(SSE, chunked(event(0)))
        ended.put(wire.wait_closed())

    stage.script = script
    with stage.connect() as client:
        client.send(post("/p/x"))
        client.read_head()
        assert client.read_chunk() == event(0)
        assert counted(stage, "active_streams") == {"": 1}
        assert counted(stage, "client_connections") == {"": 1}
        assert counted(stage, "chunks_total") == {"": 1}
        assert counted(stage, "bytes_total")['{direction="out"}'] == len(event(0))
        assert counted(stage, "requests_total") == {}
        states = counted(stage, "upstream_connections")
        assert states['{provider="p",state="active"}'] == 1
    ended.read()
    assert_settles(stage.daemon)
    assert counted(stage, "ended_total") == {'{reason="client_gone"}': 1}
    assert counted(stage, "cancel_seconds_count") == {"": 1}
    assert counted(stage, "cancel_seconds_bucket")['{le="0.1"}'] == 1


def test_a_connection_that_waits_is_idle(stage: Stage) -> None:
    """It leaves the gauge when its provider closes it."""
    turn = Turn()

    def script(wire: Wire) -> None:
        wire.read_request()
        wire.send(b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n")
        turn.take()

    stage.script = script
    assert stage.get(request("GET", "/p/x")).status == 200
    idle = '{provider="p",state="idle"}'
    assert counted(stage, "upstream_connections")[idle] == 1
    turn.give()
    until(lambda: counted(stage, "upstream_connections")[idle] == 0, "it is gone")


def read(stage: Stage, accept: str) -> tuple[str, str]:
    """Return the content type and the text of /metrics."""
    with connect(stage.daemon.admin_port) as client:
        client.send(request("GET", "/metrics", *([f"Accept: {accept}"] if accept else [])))
        got = read_got(client)
    (kind,) = got.values(b"content-type")
    return kind.decode(), got.body.decode()


BUILT = {
    "requests",
    "active_streams",
    "client_connections",
    "upstream_connections",
    "head_seconds",
    "first_chunk_seconds",
    "chunk_gap_seconds",
    "overhead_seconds",
    "stream_seconds",
    "bytes",
    "chunks",
    "ended",
    "upstream_attempts",
    "paused_streams",
    "pause_seconds",
    "buffered_bytes",
    "cancel_seconds",
    "records_lost",
    "draining",
    "reactor_lag_seconds",
    "build_info",
}


def test_both_formats_can_be_parsed_and_tell_the_same_names(stage: Stage) -> None:
    """OpenMetrics where it is asked for, the text format else; each with help and a type."""
    stage.ask(request("GET", "/p/x"))
    kind, text = read(stage, "")
    assert kind.startswith("text/plain")
    families: list[Any] = list(parse_text(text))
    kind, text = read(stage, "application/openmetrics-text; version=1.0.0")
    assert kind.startswith("application/openmetrics-text")
    assert text.endswith("# EOF\n")
    opened: list[Any] = list(parse_openmetrics(text))
    for found in (families, opened):
        names = {family.name.removeprefix("llmproxy_") for family in found}
        assert names >= BUILT
        assert all(family.documentation for family in found)
        assert all(family.type != "unknown" for family in found)
        assert all(family.name.startswith("llmproxy_") for family in found)


def _drop(wire: Wire) -> None:
    wire.read_request()
