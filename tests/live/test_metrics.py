"""What Prometheus reads after a known series of requests (design 11)."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from prometheus_client.openmetrics.parser import text_string_to_metric_families as parse_openmetrics
from prometheus_client.parser import text_string_to_metric_families as parse_text

from tests.support.daemon import provider_table, route_table
from tests.support.live_proxy import (
    ONE_ROUTE,
    LiveProxy,
    assert_settles,
    client_config,
    open_live_proxy,
    post,
    read_response,
    read_stepwise,
    response,
)
from tests.support.scripts import SSE, event
from tests.support.sockets import Wire, chunked, connect, request

DEAD = provider_table("dead", url="http://127.0.0.1:1")
DEAD += route_table("/dead", "dead", 'name = "nobody"')


@pytest.fixture
def live(tmp_path: Path) -> Iterator[LiveProxy]:
    """A daemon that has counted nothing yet."""
    with open_live_proxy(tmp_path, ONE_ROUTE + DEAD + client_config("team", "team-key")) as live:
        yield live


def counted(live: LiveProxy, name: str) -> dict[str, float]:
    """Return the samples of one counter, by their labels as they are written."""
    full = f"llmproxy_{name}"
    return {
        key.removeprefix(full): value
        for key, value in live.daemon.metrics().items()
        if key == full or key.startswith(full + "{")
    }


def labels(route: str, provider: str, client: str, method: str, status: str) -> str:
    """Return the labels of `requests_total`, as they are written."""
    return (
        f'{{client="{client}",method="{method}",provider="{provider}",'
        f'route="{route}",status="{status}"}}'
    )


def test_a_known_series_of_requests_is_counted(live: LiveProxy) -> None:
    """Each request is counted once, under its labels."""
    body = b'{"model":"m"}'
    turn = live.stream(event(0), event(1))
    with live.begin("/p/x", body, "x-api-key: team-key") as client:
        read_stepwise(client, turn, event(0), event(1), b"")
    live.ask(request("GET", "/p/x"), response(200, body=b"12345"))
    live.ask(request("GET", "/p/x"), response(429, body=b"no"))
    live.reply()
    live.get(request("GET", "/p/x"))
    live.get(request("PUT", "/dead/x"))
    live.get(request("GET", "/nowhere"))
    live.get(request("PROPFIND", "/p/x"))
    live.get(request("GET", "/p/x", "x-api-key: wrong"))
    assert_settles(live.daemon)
    assert counted(live, "requests_total") == {
        labels("p", "p", "team", "POST", "2xx"): 1,
        labels("p", "p", "anonymous", "GET", "2xx"): 1,
        labels("p", "p", "anonymous", "GET", "4xx"): 1,
        labels("p", "p", "anonymous", "GET", "5xx"): 1,
        labels("nobody", "dead", "anonymous", "PUT", "5xx"): 1,
        labels("", "", "anonymous", "GET", "4xx"): 1,
        labels("", "", "", "other", "4xx"): 1,
        labels("", "", "", "GET", "4xx"): 1,
    }
    assert counted(live, "ended_total") == {
        '{reason="complete"}': 2,
        '{reason="upstream_refused"}': 1,
        '{reason="upstream_broken"}': 1,
        '{reason="upstream_unreachable"}': 1,
        '{reason="rejected"}': 3,
    }
    attempts = counted(live, "upstream_attempts_total")
    assert sum(attempts.values()) == 5
    assert attempts['{outcome="ok",provider="p"}'] == 2
    assert attempts['{outcome="upstream_refused",provider="p"}'] == 1
    size = len(event(0)) + len(event(1)) + 5 + 2
    assert counted(live, "bytes_total") == {
        '{direction="in"}': len(body),
        '{direction="out"}': size,
    }
    assert counted(live, "chunks_total") == {"": 4}
    assert counted(live, "head_seconds_count") == {"": 3}
    assert counted(live, "first_chunk_seconds_count") == {"": 3}
    assert counted(live, "chunk_gap_seconds_count") == {"": 1}
    assert counted(live, "stream_seconds_count") == {"": 3}
    assert counted(live, "cancel_seconds_count") == {"": 0}
    assert counted(live, "records_lost_total") == {'{sink="jsonl"}': 0}


def test_a_running_stream_is_counted_while_it_runs(live: LiveProxy) -> None:
    """Bytes and chunks do not wait for its end; after that the gauges are zero."""
    ended = live.hold(SSE, chunked(event(0)))
    with live.begin("/p/x") as client:
        assert client.read_chunk() == event(0)
        assert counted(live, "active_streams") == {"": 1}
        assert counted(live, "client_connections") == {"": 1}
        assert counted(live, "chunks_total") == {"": 1}
        assert counted(live, "bytes_total")['{direction="out"}'] == len(event(0))
        assert counted(live, "requests_total") == {}
        states = counted(live, "upstream_connections")
        assert states['{provider="p",state="active"}'] == 1
    ended.read()
    assert_settles(live.daemon)
    assert counted(live, "ended_total") == {'{reason="client_gone"}': 1}
    assert counted(live, "cancel_seconds_count") == {"": 1}
    assert counted(live, "cancel_seconds_bucket")['{le="0.1"}'] == 1


def read(live: LiveProxy, accept: str) -> tuple[str, str]:
    """Return the content type and the text of /metrics."""
    with connect(live.daemon.admin_port) as client:
        client.send(request("GET", "/metrics", *([f"Accept: {accept}"] if accept else [])))
        got = read_response(client)
    (kind,) = got.values(b"content-type")
    return kind.decode(), got.body.decode()


BUILT = """
requests active_streams client_connections upstream_connections head_seconds first_chunk_seconds
chunk_gap_seconds overhead_seconds stream_seconds bytes chunks ended upstream_attempts
paused_streams pause_seconds buffered_bytes cancel_seconds records_lost draining
reactor_lag_seconds build_info
"""


def test_both_formats_can_be_parsed_and_have_the_same_names(live: LiveProxy) -> None:
    """OpenMetrics where it is asked for, the text format else; each with help and a type."""
    live.ask(request("GET", "/p/x"))
    kind, text = read(live, "")
    assert kind.startswith("text/plain")
    families: list[Any] = list(parse_text(text))
    kind, text = read(live, "application/openmetrics-text; version=1.0.0")
    assert kind.startswith("application/openmetrics-text")
    assert text.endswith("# EOF\n")
    opened: list[Any] = list(parse_openmetrics(text))
    for found in (families, opened):
        names = {family.name.removeprefix("llmproxy_") for family in found}
        assert names >= set(BUILT.split())
        assert all(family.documentation for family in found)
        assert all(family.type != "unknown" for family in found)
        assert all(family.name.startswith(("llmproxy_", "process_")) for family in found)


def test_the_process_is_among_the_metrics(live: LiveProxy) -> None:
    """Descriptors and their limit, memory, CPU time and start have the names that all know."""
    metrics = live.daemon.metrics()
    assert abs(metrics["process_open_fds"] - len(live.daemon.descriptors())) <= 2
    assert metrics["process_max_fds"] >= metrics["process_open_fds"]
    assert metrics["process_resident_memory_bytes"] > 10 << 20
    assert metrics["process_cpu_seconds_total"] > 0


INVENTIONS = 300


def invented(word: str) -> list[bytes]:
    """Return requests in which a caller has invented whatever it can: most are refused."""
    body = json.dumps({"model": word, "stream": True}).encode()
    host = f"{word}.example"
    return [
        post(f"/p/{word}?{word}={word}", body, "x-api-key: team-key", f"user-agent: {word}"),
        post("/p/x", body, f"x-session-id: {word}", f"x-request-id: {word}", f"{word}: {word}"),
        post("/p/x", b'{"model":"%b"' % word.encode(), f"content-type: {word}/{word}"),
        post("/p/x", body, f"x-api-key: {word}"),
        post(f"/{word}", body),
        request(word.upper(), "/p/x"),
        request("GET", "/p/x", f"Host: {host}"),
        request("GET", f"http://{host}/"),
        request("CONNECT", f"{host}:443"),
    ]


def test_nothing_that_a_caller_invents_becomes_a_label(live: LiveProxy) -> None:
    """Models, paths, keys, methods, hosts, sessions: the series are those of the first of each."""
    usage = {"prompt_tokens": 1, "completion_tokens": 2}

    def script(wire: Wire) -> None:
        while True:
            asked = wire.read_request()
            model = json.loads(asked.body)["model"] if asked.method == b"POST" else "m"
            told = json.dumps({"model": f"{model}-served", "usage": usage, "id": model})
            wire.send(response(200, "content-type: application/json", body=told.encode()))

    live.script = script

    def ask_all(word: str) -> None:
        for sent in invented(word):
            with connect(live.daemon.port) as client:
                client.send(sent)
                client.read_head()

    ask_all("first")
    before = live.daemon.metrics()
    for number in range(INVENTIONS):
        ask_all(f"invented{number}")
    after = live.daemon.metrics()
    assert after.keys() == before.keys()
    grown = sum(after.values()) - sum(before.values())
    assert grown > INVENTIONS * len(invented("x"))
