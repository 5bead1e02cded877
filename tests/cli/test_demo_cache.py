"""The demo provider with a prompt cache: what its counts say, in each dialect that has such counts.

What the cache itself does stands in ``test_prompt_cache.py``.
"""

from __future__ import annotations

import json
from typing import Any

import pytest

from llmproxy.cli.demo.prompt_cache import BLOCK_WORDS, KEPT_S
from tests.support.demo_wire import DemoConnection

LONG = "word " * (2 * BLOCK_WORDS)
MARK: Any = {"cache_control": {"type": "ephemeral"}}
OPENAI: dict[str, dict[str, Any]] = {
    "/v1/chat/completions": {"messages": [{"role": "user", "content": LONG + "end"}]},
    "/v1/completions": {"prompt": LONG + "end"},
    "/v1/responses": {"input": LONG + "end"},
}


def openai_counts(usage: dict[str, Any]) -> tuple[int, int, int]:
    """Return the whole prompt, and what of it was read from the cache and written to it."""
    details = usage.get("prompt_tokens_details") or usage["input_tokens_details"]
    whole = usage.get("prompt_tokens") or usage["input_tokens"]
    return whole, details["cached_tokens"], details["cache_write_tokens"]


def anthropic_counts(usage: dict[str, Any]) -> tuple[int, int, int]:
    """Return what was neither read from the cache nor written to it, and those two."""
    read, written = usage["cache_read_input_tokens"], usage["cache_creation_input_tokens"]
    return usage["input_tokens"], read, written


def messages(*texts: str) -> list[dict[str, str]]:
    """Return a talk of these texts."""
    return [
        {"role": "assistant" if at % 2 else "user", "content": text}
        for at, text in enumerate(texts)
    ]


@pytest.mark.parametrize("path", OPENAI)
def test_openai_counts_what_was_seen_before(path: str) -> None:
    """The first time all is written, the second time it is read; cached tokens are in the total."""
    wire = DemoConnection(caching=True)
    seen = [openai_counts(wire.whole(path, **OPENAI[path])["usage"]) for _ in range(2)]
    assert seen == [(33, 0, 32), (33, 32, 0)]


def test_a_stream_counts_as_its_document_does() -> None:
    """Both use the same cache."""
    path = "/v1/chat/completions"
    wire = DemoConnection(caching=True)
    wire.whole(path, **OPENAI[path])
    events = wire.events(path, stream_options={"include_usage": True}, **OPENAI[path])
    usage = json.loads(events[-2].removeprefix(b"data: "))["usage"]
    assert openai_counts(usage) == (33, 32, 0)


def test_anthropic_counts_apart_what_was_seen_before() -> None:
    """A mark at the request keeps all of it; what was cached is not among the input tokens."""
    wire = DemoConnection(caching=True)
    talk = messages(LONG)
    seen = []
    for _ in range(2):
        seen.append(wire.whole("/v1/messages", messages=talk, **MARK)["usage"])
        talk += messages("", "answer", LONG)[1:]
    assert [anthropic_counts(usage) for usage in seen] == [(0, 0, 32), (1, 32, 32)]


def test_anthropic_keeps_what_stands_before_the_last_mark() -> None:
    """What follows the marked system text is neither kept nor found."""
    wire = DemoConnection(caching=True)
    system = [{"type": "text", "text": LONG + "end", **MARK}]
    for expected in ((33, 0, 32), (33, 32, 0)):
        usage = wire.whole("/v1/messages", system=system, messages=messages(LONG))["usage"]
        assert anthropic_counts(usage) == expected


def test_a_mark_at_a_tool_stands_for_the_system_text() -> None:
    """Tools have no words here."""
    tool = {"name": "now", "input_schema": {}, **MARK}
    wire = DemoConnection(caching=True)
    asked: Any = {"system": LONG, "tools": [tool], "messages": messages(LONG)}
    assert anthropic_counts(wire.whole("/v1/messages", **asked)["usage"]) == (32, 0, 32)


def test_anthropic_keeps_nothing_unasked() -> None:
    """Nor does counting keep anything."""
    wire = DemoConnection(caching=True)
    talk: Any = {"messages": messages(LONG + "end")}
    wire.whole("/v1/messages", **talk)
    wire.whole("/v1/messages/count_tokens", **talk, **MARK)
    assert anthropic_counts(wire.whole("/v1/messages", **talk, **MARK)["usage"]) == (1, 0, 32)


@pytest.mark.parametrize("field", ["Authorization: Bearer", "x-api-key:", "api-key:"])
def test_accounts_share_nothing(field: str) -> None:
    """Wherever the key stands."""
    path = "/v1/chat/completions"
    wire = DemoConnection(caching=True)
    found = [
        openai_counts(wire.whole(path, "demo-fast", f"{field} {key}", **OPENAI[path])["usage"])[1]
        for key in ("a", "b", "a")
    ]
    assert found == [0, 0, 32]


def test_models_share_nothing_and_time_passes() -> None:
    """Another model begins anew, and so does the same one after a while."""
    path = "/v1/chat/completions"
    wire = DemoConnection(caching=True)

    def found() -> int:
        return openai_counts(wire.whole(path, **OPENAI[path])["usage"])[1]

    wire.ask(path, "demo-9999tps", stream=False, **OPENAI[path])
    assert b'"cached_tokens":0' in wire.turn(1.0, turns=2)
    assert [found(), found()] == [0, 32]
    wire.clock.rightNow += KEPT_S
    assert found() == 0


def test_a_refusal_keeps_nothing() -> None:
    """A model that always refuses has read nothing."""
    wire = DemoConnection(caching=True)
    wire.ask("/v1/chat/completions", "demo-429", **OPENAI["/v1/chat/completions"])
    provider: Any = wire.site.resource
    assert len(provider._cache) == 0


def test_embeddings_and_ollama_are_not_cached() -> None:
    """Their counts have no words for it."""
    wire = DemoConnection(caching=True)
    wire.whole("/v1/embeddings", input=LONG)
    wire.whole("/api/chat", messages=messages(LONG))
    provider: Any = wire.site.resource
    assert len(provider._cache) == 0
