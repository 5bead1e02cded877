"""What tokens are counted as: metrics, records, ledger and sessions agree on mixed traffic."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from tests.support.daemon import Daemon, provider_table, route_table
from tests.support.live_proxy import (
    LiveProxy,
    assert_settles,
    chunked_response,
    client_config,
    open_live_proxy,
    post,
    response,
    trace_of,
    until,
)
from tests.support.scripts import Turn
from tests.support.sockets import Wire, request

TYPES = ("input", "output", "cache_read", "cache_write", "reasoning")
NAMED = {"gpt-a", "gpt-b", "claude-b", "gpt-prod"}
CONFIG = (
    provider_table("one")
    + provider_table("two", dialect="anthropic")
    + route_table("/one", "one", 'models = ["gpt-a", "gpt-*", "*", "-"]')
    + '[routes.override]\none = { model = "gpt-prod" }\n'
    + route_table("/two", "two")
    + route_table("/drained", "two", 'on_disconnect = "drain"')
)
KEYS = {"team-a": "key-a", "team-b": "key-b", "anonymous": ""}
ASKED = {
    "one": ("gpt-a", "gpt-b", "gpt-c", "claude-b", "made\nup"),
    "two": ("claude-b", "claude-c", None),
}
PATHS = {"one": "/one/v1/chat/completions", "two": "/two/v1/messages"}


class Used(NamedTuple):
    """What one response says that it used, by our types; None is not said."""

    input: int | None
    output: int | None
    cache_read: int | None = None
    cache_write: int | None = None
    reasoning: int | None = None


def openai_usage(used: Used) -> dict[str, Any]:
    """Return it in OpenAI's words."""
    read = {"cached_tokens": used.cache_read, "cache_write_tokens": used.cache_write}
    return {
        "prompt_tokens": used.input,
        "completion_tokens": used.output,
        "prompt_tokens_details": read,
        "completion_tokens_details": {"reasoning_tokens": used.reasoning},
    }


def anthropic_usage(used: Used) -> dict[str, Any]:
    """Return it in Anthropic's words."""
    return {
        "input_tokens": used.input,
        "output_tokens": used.output,
        "cache_read_input_tokens": used.cache_read,
        "cache_creation_input_tokens": used.cache_write,
        "output_tokens_details": {"thinking_tokens": used.reasoning},
    }


def whole(provider: str, used: Used) -> bytes:
    """Return a response in one piece."""
    if provider == "one":
        document = {"choices": [{"finish_reason": "stop"}], "usage": openai_usage(used)}
    else:
        document = {"stop_reason": "end_turn", "usage": anthropic_usage(used)}
    return response(200, "Content-Type: application/json", body=json.dumps(document).encode())


def streamed(provider: str, used: Used) -> bytes:
    """Return a stream whose first counts are replaced by the last ones."""
    if provider == "one":
        counts = {"choices": [], "usage": openai_usage(used)}
        return chunked_response(b"data: %b\n\ndata: [DONE]\n\n" % json.dumps(counts).encode())
    first = {"usage": {"input_tokens": 1, "output_tokens": 1}}
    start: dict[str, Any] = {"type": "message_start", "message": first}
    delta = {"type": "message_delta", "delta": {}, "usage": anthropic_usage(used)}
    return chunked_response(*(sse(one) for one in (start, delta, {"type": "message_stop"})))


def sse(event: dict[str, Any]) -> bytes:
    """Return a named event."""
    return b"event: %b\ndata: %b\n\n" % (event["type"].encode(), json.dumps(event).encode())


@pytest.fixture
def live(tmp_path: Path) -> Iterator[LiveProxy]:
    """Two clients and anybody, two providers, and a ledger."""
    known = client_config("team-a", "key-a") + client_config(
        "team-b", "key-b", 'models = ["gpt-b", "claude-b", "*", "-"]'
    )
    ledger = f'ledger = "{tmp_path}/ledger-{{instance}}.db"\n'
    with open_live_proxy(tmp_path, ledger + CONFIG + known) as live:
        yield live


def tokens_by_label(daemon: Daemon) -> Counter[tuple[str, ...]]:
    """Return the samples of the counter by client, provider, model and type."""
    found: Counter[tuple[str, ...]] = Counter()
    for name, value in daemon.metrics().items():
        if name.startswith("llmproxy_tokens_total{"):
            labels = dict(re.findall(r'(\w+)="([^"]*)"', name))
            key = (labels["client"], labels["provider"], labels["model"], labels["type"])
            found[key] = int(value)
    return found


def by_type(totals: dict[str, Any]) -> dict[str, int | None]:
    """Return the sums of tokens among totals."""
    return {name: totals[f"{name}_tokens"] for name in TYPES}


def test_every_place_has_the_same_sums(live: LiveProxy) -> None:
    """They agree for clients, providers and models; a model that nobody configured is `other`."""
    expected: Counter[tuple[str, ...]] = Counter()
    sessions: Counter[tuple[str, ...]] = Counter()
    sent = 0

    def ask(client: str, provider: str, model: str | None, reply: bytes, session: str) -> None:
        nonlocal sent
        live.reply(reply)
        body = {"stream": True} if model is None else {"model": model, "stream": True}
        fields = [f"X-Session-Id: {session}"]
        if KEYS[client]:
            fields.append(f"X-Api-Key: {KEYS[client]}")
        live.get(post(PATHS[provider], json.dumps(body).encode(), *fields))
        sent += 1

    for number, client in enumerate(KEYS):
        for provider, models in ASKED.items():
            for at, model in enumerate(models):
                for form in (whole, streamed):
                    cached = None if at % 2 else 0
                    used = Used(1000 * sent + 7, sent, cached, at or None, number)
                    session = f"s-{sent % 4}"
                    ask(client, provider, model, form(provider, used), session)
                    label = model if model in NAMED else "other"
                    for name, count in zip(TYPES, used, strict=True):
                        if count:
                            expected[client, provider, label, name] += count
                            sessions[session, client, name] += count
        refusal = response(429, "Content-Type: application/json", body=b'{"usage":{}}')
        ask(client, "one", "gpt-a", refusal, "s-0")
        ask(client, "one", "gpt-a", chunked_response(b"data: {}\n\n"), "s-0")
    live.get(request("GET", "/one/v1/models"))
    sent += 1

    until(lambda: live.daemon.usage()["total"]["requests"] == sent, "the ledger has all")
    assert tokens_by_label(live.daemon) == expected
    recorded: Counter[tuple[str, ...]] = Counter()
    for record in live.daemon.traces():
        label = record["model"] if record["model"] in NAMED else "other"
        for name, count in by_type(record).items():
            if count:
                recorded[record["client"], record["provider"], label, name] += count
    assert recorded == expected
    reported: Counter[tuple[str, ...]] = Counter()
    for group in live.daemon.usage("--by", "client,provider,model")["groups"]:
        label = group["model"] if group["model"] in NAMED else "other"
        for name, count in by_type(group).items():
            reported[group["client"], group["provider"], label, name] += count or 0
    assert +reported == expected
    checkpoints: Counter[tuple[str, ...]] = Counter()
    for point in live.daemon.usage("--sessions")["sessions"]:
        for name, count in by_type(point).items():
            checkpoints[point["session"], point["client"], name] += count or 0
    assert +checkpoints == sessions
    assert_settles(live.daemon)


def test_what_is_read_on_is_counted(live: LiveProxy) -> None:
    """The tokens of a response whose client left are in the counter and in the ledger."""
    asked = Turn()
    live.script = lambda wire: _after_the_client(live, wire, asked)
    path = "/drained/v1/messages"
    with live.connect() as client:
        client.send(post(path, b'{"model":"claude-b"}', "X-Api-Key: key-a"))
        asked.take()  # a request that nobody has asked for yet would not be read on
    record = trace_of(live.daemon, path=path)
    assert (record["end_reason"], record["usage"]) == ("client_gone", "reported")
    found = tokens_by_label(live.daemon)
    assert found["team-a", "two", "claude-b", "output"] == 20
    until(lambda: live.daemon.usage()["total"]["output_tokens"] == 20, "the ledger has it")


def _after_the_client(live: LiveProxy, wire: Wire, asked: Turn) -> None:
    wire.read_request()
    asked.give()
    until(lambda: live.gauge("drains") == 1, "its client has left")
    wire.send(whole("two", Used(10, 20)))


# -- sessions --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("lines", "session"),
    [
        (("X-Claude-Code-Session-Id: claude",), "claude"),
        (("session_id: codex",), "codex"),
        (("session-id: codex-2",), "codex-2"),
        (("X-Session-Id: opencode", "x-session-affinity: other"), "opencode"),
        (("session-id: 3", "session_id: 2", "x-claude-code-session-id: 1"), "1"),
        (("session-id: 3", "x-session-id: 0"), "0"),
        (("x-session-id: a\tb", "session-id: 3"), None),
    ],
)
def test_each_client_names_its_session_otherwise(
    live: LiveProxy, lines: tuple[str, ...], session: str | None
) -> None:
    """The first field of the list that a request has counts, whatever stands in it."""
    live.reply(whole("two", Used(1, 2)))
    assert (
        live.trace(live.get(post("/two/v1/messages", b'{"model":"claude-b"}', *lines)))["session"]
        == session
    )


def test_a_session_is_named_by_x_session_id(live: LiveProxy) -> None:
    """One that is no printable text is none, and a long one is cut; two clients' are not one."""
    live.reply(whole("two", Used(1, 2)))
    fields = {
        "/two/a/v1/messages": ("X-SESSION-ID: s", "X-Api-Key: key-a"),
        "/two/b/v1/messages": ("x-session-id: s", "X-Api-Key: key-b"),
        "/two/c/v1/messages": ("x-session-id: " + "s" * 300,),
        "/two/d/v1/messages": ("x-session-id: a\tb",),
        "/two/e/v1/messages": ("x-conversation: s",),
    }
    for path, lines in fields.items():
        live.get(post(path, b'{"model":"claude-b"}', *lines))
    named = [trace_of(live.daemon, path=path)["session"] for path in fields]
    assert named == ["s", "s", "s" * 256, None, None]
    until(lambda: live.daemon.usage()["total"]["requests"] == 5, "the ledger has all")
    points = live.daemon.usage("--sessions")["sessions"]
    assert sorted((point["session"][:3], point["client"]) for point in points) == [
        ("s", "team-a"),
        ("s", "team-b"),
        ("sss", "anonymous"),
    ]
