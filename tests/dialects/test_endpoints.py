"""The table: which path is read how, and the odd things that providers send."""

from __future__ import annotations

import json
from typing import Any

import pytest

from llmproxy.dialects.accumulated import Accumulated, ProviderError
from llmproxy.dialects.dialect import Dialect
from llmproxy.dialects.endpoint import NEVER, Endpoint
from llmproxy.dialects.endpoints import TABLE, endpoint, endpoint_of_record


def accumulated(row: Endpoint | None, *events: Any, keeps: bool = True) -> Accumulated:
    """Return what these events of a stream say."""
    assert row is not None
    seen = Accumulated(keeps=keeps, budget=10_000)
    for event in events:
        row.event(json.dumps(event).encode(), seen)
    return seen


CHAT = endpoint(Dialect.OPENAI, b"/v1/chat/completions")
RESPONSES = endpoint(Dialect.OPENAI, b"/v1/responses")
MESSAGES = endpoint(Dialect.ANTHROPIC, b"/v1/messages")
OLLAMA = endpoint(Dialect.OLLAMA, b"/api/chat")
GEMINI = endpoint(Dialect.GEMINI, b"/v1beta/models/gemini-2.5-flash:streamGenerateContent")


@pytest.mark.parametrize(
    ("dialect", "path", "name"),
    [
        (Dialect.OPENAI, b"/v1/chat/completions", "openai chat"),
        (Dialect.OPENAI, b"/chat/completions", "openai chat"),
        (Dialect.OPENAI, b"/openai/deployments/gpt-4o/chat/completions", "openai chat"),
        (Dialect.OPENAI, b"/v1/chat/completions/", "openai chat"),
        (Dialect.OPENAI, b"/v1/chat/completions?api-version=1", "openai chat"),
        (Dialect.OPENAI, b"/v1/completions", "openai completions"),
        (Dialect.OPENAI, b"/v1/embeddings", "openai embeddings"),
        (Dialect.OPENAI, b"/v1/responses", "openai responses"),
        (Dialect.OPENAI, b"/v1/responses/resp_1", None),
        (Dialect.OPENAI, b"/v1/responses/compact?beta=true", "openai compact"),
        (Dialect.OPENAI, b"/v1/responses/input_tokens", None),
        (Dialect.OPENAI, b"/v1/decisions", "openai decisions"),
        (Dialect.OPENAI, b"/v1/images/generations", "openai images"),
        (Dialect.OPENAI, b"/v1/images/edits", "openai images"),
        (Dialect.OPENAI, b"/v1/images/variations", "openai images"),
        (Dialect.OPENAI, b"/openai/deployments/d/audio/transcriptions", "openai transcriptions"),
        (Dialect.OPENAI, b"/v1/threads/runs", "openai runs"),
        (Dialect.OPENAI, b"/v1/threads/t/runs", "openai runs"),
        (Dialect.OPENAI, b"/v1/threads/t/runs/?x", "openai runs"),
        (Dialect.OPENAI, b"/v1/threads/t/runs/r/submit_tool_outputs", "openai runs"),
        (Dialect.OPENAI, b"/v1/threads/t/runs/r", None),
        (Dialect.OPENAI, b"/v1/threads/t/runs/r/cancel", None),
        (Dialect.OPENAI, b"/v1/evals/e/runs", None),
        (Dialect.OPENAI, b"/v1/messages", "anthropic messages"),
        (Dialect.OPENAI, b"/v1/threads/thread_1/messages", None),
        (Dialect.OPENAI, b"/api/chat", "ollama chat"),
        (Dialect.OPENAI, b"/v1/audio/speech", None),
        (Dialect.OPENAI, b"/v1/xcompletions", None),
        (Dialect.OPENAI, b"/", None),
        (Dialect.OPENAI, b"", None),
        (Dialect.ANTHROPIC, b"/v1/messages", "anthropic messages"),
        (Dialect.ANTHROPIC, b"/messages", "anthropic messages"),
        (Dialect.ANTHROPIC, b"/v1/messages/count_tokens", None),
        (Dialect.ANTHROPIC, b"/v1/responses", "openai responses"),
        (Dialect.ANTHROPIC, b"/v1/chat/completions", "openai chat"),
        (Dialect.OLLAMA, b"/api/chat", "ollama chat"),
        (Dialect.OLLAMA, b"/ollama/api/generate", "ollama generate"),
        (Dialect.OLLAMA, b"/api/embed", "ollama embed"),
        (Dialect.OLLAMA, b"/v1/systemone", "ollama systemone"),
        (Dialect.OLLAMA, b"/api/tags", None),
        (Dialect.OLLAMA, b"/v1/chat/completions", "openai chat"),
        (Dialect.OLLAMA, b"/v1/messages", "anthropic messages"),
        (Dialect.OLLAMA, b"/v1/messages?beta=true", "anthropic messages"),
        (Dialect.OLLAMA, b"/v1/responses", "openai responses"),
        (Dialect.GEMINI, b"/v1beta/models/gemini-2.5-flash:generateContent", "gemini generate"),
        (Dialect.GEMINI, b"/v1/models/m:streamGenerateContent?alt=sse", "gemini stream"),
        (Dialect.GEMINI, b"/v1beta/models/m%3AstreamGenerateContent", "gemini stream"),
        (Dialect.GEMINI, b"/v1beta/tunedModels/a:b:generateContent", "gemini generate"),
        (Dialect.GEMINI, b"/v1beta/models/m:embedContent", "gemini embed"),
        (Dialect.GEMINI, b"/v1beta/models/m:batchEmbedContents", "gemini embed"),
        (
            Dialect.GEMINI,
            b"/v1/projects/p/locations/l/publishers/google/models/m:generateContent",
            "gemini generate",
        ),
        (Dialect.GEMINI, b"/v1beta/models/m:countTokens", None),
        (Dialect.GEMINI, b"/v1beta/models/m:batchGenerateContent", None),
        (Dialect.GEMINI, b"/v1beta/models/generateContent", None),
        (Dialect.GEMINI, b"/v1beta/openai/chat/completions", "openai chat"),
        (Dialect.OPENAI, b"/v1beta/models/m:generateContent", "gemini generate"),
        (Dialect.RAW, b"/v1beta/models/m:generateContent", None),
        (Dialect.RAW, b"/v1/messages", None),
        (Dialect.RAW, b"/v1/chat/completions", None),
    ],
)
def test_the_row_is_found_by_the_last_segments(
    dialect: Dialect, path: bytes, name: str | None
) -> None:
    """Wherever a provider is mounted, the end of the path names its endpoint."""
    row = endpoint(dialect, path)
    assert (row and row.name) == name


def test_every_row_but_embeddings_has_an_end_marker() -> None:
    """Every row with an end marker says what an unread one may look like."""
    unmarked = {row.name for row in TABLE.values() if not row.end_marker}
    assert unmarked == {
        *("openai embeddings", "openai decisions", "openai transcriptions"),
        *("ollama embed", "ollama systemone", "gemini embed"),
    }
    assert {row.name for row in TABLE.values() if row.may_end is NEVER} == unmarked


@pytest.mark.parametrize(
    ("path", "word"),
    [
        (b"/v1/chat/completions", "chat"),
        (b"/v1/chat/completions/", "chat"),
        (b"/v1/completions", "text_completion"),
        (b"/v1/embeddings", "embeddings"),
        (b"/v1/responses", "chat"),
        (b"/v1/messages", "chat"),
        (b"/api/chat", "chat"),
        (b"/api/generate", "text_completion"),
        (b"/api/embed", "embeddings"),
        (b"/api/embeddings", "embeddings"),
        (b"/generate", "text_completion"),
        (b"/v2/chat", "chat"),
        (b"/v1/responses/compact", "chat"),
        (b"/v1/threads/t/runs", "chat"),
        (b"/v1/images/edits", "generate_content"),
        (b"/v1/evals/e/runs", None),
        (b"/compact", None),
        (b"/v1beta/models/m:generateContent", "generate_content"),
        (b"/v1beta/models/m:streamGenerateContent", "generate_content"),
        (b"/v1beta/models/m:embedContent", "embeddings"),
        (b"/v1beta/models/m:countTokens", None),
        (b"/v1/messages/count_tokens", None),
        (b"/v1/models", None),
        (b"/api/tags", None),
        (b"/v1/xmessages", None),
        (b"/", None),
        (b"", None),
    ],
)
def test_the_path_names_the_operation(path: bytes, word: str | None) -> None:
    """The last segment of any dialect's endpoint names the operation, for any provider."""
    row = endpoint_of_record(path)
    assert (row and row.operation) == word


@pytest.mark.parametrize("dialect", [one for one in Dialect if one is not Dialect.RAW])
def test_a_path_has_its_row_at_every_dialect(dialect: Dialect) -> None:
    """Providers serve the APIs of others, too; a record finds the same row without a dialect."""
    for key, row in TABLE.items():
        assert endpoint(dialect, b"/x/" + key) is row
        assert endpoint_of_record(b"/x/" + key) is row
        assert row.name.partition(" ")[0] == row.dialect


@pytest.mark.parametrize(
    ("row", "event", "error"),
    [
        (CHAT, {"error": {"message": "m", "type": None, "code": 429}}, ProviderError("429", "m")),
        (CHAT, {"error": {"message": "m", "type": "t", "code": 1}}, ProviderError("t", "m")),
        (CHAT, {"error": "words"}, ProviderError(None, "words")),
        (CHAT, {"error": {}}, ProviderError(None, None)),
        (CHAT, {"error": None}, None),
        (CHAT, {"error": False, "choices": None}, None),
        (RESPONSES, {"type": "error", "code": None, "message": "m"}, ProviderError(None, "m")),
        (RESPONSES, {"type": "error", "error": {"type": "t"}}, ProviderError("t", None)),
        (
            RESPONSES,
            {"type": "response.failed", "response": {"status": "failed"}},
            ProviderError(None, None),
        ),
        (MESSAGES, {"type": "error"}, ProviderError(None, None)),
        (OLLAMA, {"error": "e"}, ProviderError(None, "e")),
        (
            GEMINI,
            {"error": {"code": 429, "status": "RESOURCE_EXHAUSTED", "message": "m"}},
            ProviderError("RESOURCE_EXHAUSTED", "m"),
        ),
        (GEMINI, {"error": {"code": 500, "message": "m"}}, ProviderError("500", "m")),
        (GEMINI, {"error": "e"}, ProviderError(None, "e")),
        (GEMINI, {"error": None}, None),
    ],
)
def test_errors(row: Endpoint, event: Any, error: ProviderError | None) -> None:
    """An error is an object or a sentence, with a type or a code; null is none."""
    assert accumulated(row, event).error == error
    assert accumulated(row, event, keeps=False).error == error


@pytest.mark.parametrize(
    ("row", "event"),
    [
        (CHAT, {"choices": [{"delta": {"content": None, "tool_calls": None}}], "usage": None}),
        (CHAT, {"choices": [{"delta": None}]}),
        (CHAT, {"choices": [{}]}),
        (CHAT, {"choices": [{"delta": {"content": [{"type": "thinking"}]}}]}),
        (CHAT, {}),
        (RESPONSES, {"type": "response.queued", "response": {"usage": None, "error": None}}),
        (RESPONSES, {"type": "response.shell_call_output_content.delta", "delta": {"a": 1}}),
        (RESPONSES, {"type": "response.output_item.added", "item": {"type": "reasoning"}}),
        (RESPONSES, {"type": "response.output_item.added", "item": {"type": "x", "name": 1}}),
        (MESSAGES, {"type": "ping"}),
        (MESSAGES, {"type": "content_block_delta", "delta": {"type": "thinking_delta"}}),
        (MESSAGES, {"type": "content_block_start", "content_block": {"type": "x", "text": {}}}),
        (MESSAGES, {"type": "message_start"}),
        (MESSAGES, {"type": "message_delta"}),
        (MESSAGES, {"type": "of tomorrow", "usage": {"output_tokens": 5}}),
        (OLLAMA, {"message": {"role": "assistant", "content": ""}, "done": False}),
        (OLLAMA, {}),
        (GEMINI, {}),
        (GEMINI, {"candidates": []}),
        (GEMINI, {"candidates": [{"content": {"parts": [{"text": "hm", "thought": True}]}}]}),
        (GEMINI, {"candidates": [{"content": {"parts": [{"executableCode": {"code": "1"}}]}}]}),
        (GEMINI, {"candidates": [{"content": None, "finishReason": None}]}),
        (GEMINI, {"candidates": [{"finishReason": "FINISH_REASON_UNSPECIFIED"}]}),
        (GEMINI, {"candidates": [{"index": 1, "content": {"parts": [{"text": "other"}]}}]}),
        (GEMINI, {"promptFeedback": {"safetyRatings": []}}),
        (GEMINI, {"usageMetadata": {}}),
    ],
)
@pytest.mark.parametrize("keeps", [True, False])
def test_events_that_say_nothing(row: Endpoint, event: Any, keeps: bool) -> None:
    """Nulls, absent members and events of other kinds are read, and nothing is found in them."""
    seen = accumulated(row, event, keeps=keeps)
    assert (seen.text, seen.tool_calls, seen.error, seen.has_ended) == ("", (), None, False)
    assert seen.usage(is_final=True).provenance == "none"


@pytest.mark.parametrize(
    "usage", [{"prompt_tokens": -1}, {"prompt_tokens": 2**60}, {"prompt_tokens": "7"}, 7, "", []]
)
def test_no_counts(usage: Any) -> None:
    """What is no number of tokens is not taken for one."""
    seen = accumulated(CHAT, {"usage": usage})
    assert (seen.has_counts, seen.is_odd) == (False, True)


def test_a_name_with_escapes_is_the_same_name() -> None:
    """JSON may spell a member's name in escapes; the usage is found nevertheless."""
    assert CHAT is not None
    seen = Accumulated(keeps=False, budget=0)
    for _ in range(20):
        CHAT.event(b'{"choices":[]}', seen)
    CHAT.event(b'{"\\u0075sage":{"prompt_tokens":0}}', seen)
    assert seen.usage(is_final=True).input_tokens == 0


def test_running_counts_replace_one_another() -> None:
    """The last of several counts holds, and what it does not say stays."""
    seen = accumulated(
        MESSAGES,
        {"type": "message_start", "message": {"usage": {"input_tokens": 9, "output_tokens": 1}}},
        {"type": "message_delta", "usage": {"output_tokens": 5}},
        {"type": "message_delta", "usage": {"output_tokens": 0}},
    )
    usage = seen.usage(is_final=False)
    assert (usage.input_tokens, usage.output_tokens, usage.provenance) == (9, 0, "partial")


def test_custom_tools_of_responses() -> None:
    """A custom tool's input is text, and comes in pieces as arguments do."""
    item = {"type": "custom_tool_call", "call_id": "c", "name": "run", "input": ""}
    piece = {"type": "response.custom_tool_call_input.delta", "output_index": 1}
    seen = accumulated(
        RESPONSES,
        {"type": "response.output_item.added", "output_index": 1, "item": item},
        {**piece, "delta": "print"},
        {**piece, "delta": "(1)"},
    )
    assert [(c.id, c.name, c.arguments) for c in seen.tool_calls] == [("c", "run", "print(1)")]
    assert RESPONSES is not None
    document = Accumulated(keeps=True, budget=1000)
    response = {"output": [{**item, "input": "print(1)"}, {"type": "message", "content": []}]}
    RESPONSES.document(json.dumps(response).encode(), document)
    assert document.tool_calls == seen.tool_calls


# --- where counts stand ---------------------------------------------------------------------------

START = {"type": "message_start", "message": {"usage": {"input_tokens": 10, "output_tokens": 1}}}
BARE = {"type": "message_start", "message": {"usage": {"input_tokens": 10}}}
SAYS: Any = {
    "candidates": [{"content": {"parts": [{"text": "a"}]}}],
    "usageMetadata": {"promptTokenCount": 3},
}
WORD = {"choices": [{"delta": {"content": "a"}}]}
STOP = {"choices": [{"delta": {}, "finish_reason": "stop"}]}
LLAMA = {"prompt_n": 5, "cache_n": 4, "predicted_n": 7, "predicted_ms": 3.5}
METRICS = {"inputTokenCount": 9, "outputTokenCount": 7, "cacheReadInputTokenCount": 0}


@pytest.mark.parametrize(
    ("row", "event", "cached"),
    [
        (CHAT, {"choices": [], "usage": {"prompt_tokens": 9, "completion_tokens": 7}}, None),
        (CHAT, {"choices": [{"usage": {"prompt_tokens": 9, "completion_tokens": 7}}]}, None),
        (
            CHAT,
            {
                "choices": [
                    {"usage": {"prompt_tokens": 9, "completion_tokens": 7, "cached_tokens": 4}}
                ]
            },
            4,
        ),
        (CHAT, {"x_groq": {"usage": {"prompt_tokens": 9, "completion_tokens": 7}}}, None),
        (CHAT, {"choices": [], "timings": LLAMA}, 4),
        (
            CHAT,
            {
                "usage": {
                    "prompt_tokens": 9,
                    "completion_tokens": 7,
                    "prompt_cache_hit_tokens": 4,
                    "prompt_cache_miss_tokens": 5,
                }
            },
            4,
        ),
        (CHAT, {"usage": {"input_tokens": 9, "output_tokens": 7}}, None),
        (CHAT, {"result": {"usage": {"prompt_tokens": 9, "completion_tokens": 7}}}, None),
        (CHAT, {"data": {"usage": {"prompt_tokens": 9, "completion_tokens": 7}}}, None),
        (
            MESSAGES,
            {"type": "message_delta", "usage": {"input_tokens": 9, "output_tokens": 7}},
            None,
        ),
        (
            MESSAGES,
            {"type": "message_delta", "delta": {"usage": {"input_tokens": 9, "output_tokens": 7}}},
            None,
        ),
        (MESSAGES, {"type": "message_stop", "amazon-bedrock-invocationMetrics": METRICS}, 0),
        (GEMINI, {"usageMetadata": {"promptTokenCount": 9, "candidatesTokenCount": 7}}, None),
        (
            GEMINI,
            {
                "usageMetadata": {
                    "promptTokenCount": 4,
                    "toolUsePromptTokenCount": 5,
                    "candidatesTokenCount": 1,
                    "thoughtsTokenCount": 6,
                    "cachedContentTokenCount": 4,
                    "totalTokenCount": 16,
                }
            },
            4,
        ),
        (
            GEMINI,
            {
                "usageMetadata": {
                    "promptTokenCount": 9,
                    "thoughtsTokenCount": 7,
                    "totalTokenCount": 16,
                }
            },
            None,
        ),
    ],
)
@pytest.mark.parametrize("keeps", [True, False])
def test_counts_are_found_where_vendors_put_them(
    row: Endpoint, event: Any, cached: int | None, keeps: bool
) -> None:
    """Each place is known, with content and without."""
    seen = accumulated(row, *[WORD] * 9, event, keeps=keeps)
    usage = seen.usage(is_final=True)
    assert (usage.input_tokens, usage.output_tokens, usage.provenance) == (9, 7, "reported")
    assert (usage.cache_read_tokens, seen.is_odd) == (cached, False)


def test_a_chunk_with_counts_is_no_envelope() -> None:
    """What is beside them in other members is another thing."""
    event = {"usage": {"prompt_tokens": 9}, "data": {"usage": {"prompt_tokens": 1}}}
    assert accumulated(CHAT, event).usage(is_final=True).input_tokens == 9


def test_the_usage_of_a_chunk_stands_before_its_timings() -> None:
    """Timings count what was computed, and older servers leave out what came from the cache."""
    both = {"usage": {"prompt_tokens": 9, "completion_tokens": 7}, "timings": {"prompt_n": 1}}
    assert accumulated(CHAT, both).usage(is_final=True).input_tokens == 9
    old = {"choices": [], "timings": {"prompt_n": 5, "predicted_n": 7}}
    usage = accumulated(CHAT, old).usage(is_final=True)
    assert (usage.input_tokens, usage.output_tokens) == (None, 7)


@pytest.mark.parametrize(
    ("row", "events", "provenance"),
    [
        (MESSAGES, [START], "partial"),
        (MESSAGES, [START, {"type": "message_delta"}], "partial"),
        (MESSAGES, [START, {"type": "message_delta", "usage": None}], "partial"),
        (MESSAGES, [START, {"type": "message_delta", "usage": {}}], "partial"),
        (MESSAGES, [START, {"type": "message_delta", "usage": {"input_tokens": 3}}], "partial"),
        (MESSAGES, [BARE, {"type": "message_delta", "usage": {}}], "partial"),
        (MESSAGES, [BARE, {"type": "message_delta", "usage": {"input_tokens": 3}}], "reported"),
        (MESSAGES, [START, {"type": "message_delta", "usage": {"output_tokens": 0}}], "reported"),
        (
            RESPONSES,
            [
                {"type": "response.created", "response": {"usage": {"input_tokens": 1}}},
                {"type": "response.completed", "response": {"status": "completed"}},
            ],
            "partial",
        ),
        (
            RESPONSES,
            [
                {"type": "response.created", "response": {"usage": {"input_tokens": 1}}},
                {"type": "response.completed", "response": {"usage": {"input_tokens": 1}}},
            ],
            "reported",
        ),
        (CHAT, [{**WORD, "usage": {"prompt_tokens": 3}}, WORD, STOP], "partial"),
        (CHAT, [{**WORD, "usage": {"prompt_tokens": 3}}, {**STOP, "usage": None}], "reported"),
        (CHAT, [WORD, {**STOP, "usage": {"prompt_tokens": 3}}, STOP], "reported"),
        (CHAT, [WORD, STOP, {"choices": [], "usage": {"prompt_tokens": 3}}], "reported"),
        (CHAT, [{**WORD, "usage": {"prompt_tokens": 3}}, {"choices": []}], "reported"),
        (GEMINI, [SAYS, {"candidates": [{"content": None}]}], "partial"),
        (GEMINI, [SAYS, {"candidates": [{"finishReason": "STOP"}]}], "reported"),
        (OLLAMA, [{"done": False, "eval_count": 1}, {"done": True}], "partial"),
        (OLLAMA, [{"done": False, "eval_count": 1}, {"done": True, "eval_count": 2}], "reported"),
    ],
)
@pytest.mark.parametrize("keeps", [True, False])
def test_counts_of_the_beginning_are_partial(
    row: Endpoint, events: list[Any], provenance: str, keeps: bool
) -> None:
    """Counts that came before the response went on are final only if others follow."""
    assert accumulated(row, *events, keeps=keeps).usage(is_final=True).provenance == provenance


# --- Gemini ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("usage", "output"),
    [
        ({"promptTokenCount": 9}, None),
        ({"promptTokenCount": 9, "totalTokenCount": 9}, 0),
        ({"promptTokenCount": 9, "totalTokenCount": 16}, 7),
        ({"promptTokenCount": 9, "totalTokenCount": 3}, 0),
        ({"promptTokenCount": 9, "candidatesTokenCount": 2, "totalTokenCount": 16}, 2),
    ],
)
def test_the_total_says_what_a_missing_count_was(usage: Any, output: int | None) -> None:
    """Protobuf leaves a zero out; without the total, nothing is known."""
    found = accumulated(GEMINI, {"usageMetadata": usage}).usage(is_final=True)
    assert (found.input_tokens, found.output_tokens) == (9, output)


def test_a_stream_of_two_candidates_ends_with_the_second_one() -> None:
    """Where one of them goes on, the stream does."""
    one = {"candidates": [{"index": 0, "finishReason": "STOP"}]}
    other: Any = {"candidates": [{"index": 1, "content": {"parts": [{"text": "b"}]}}]}
    assert accumulated(GEMINI, one).has_ended
    assert not accumulated(GEMINI, one, other).has_ended
    last = {"candidates": [{"index": 1, "finishReason": "MAX_TOKENS"}]}
    assert accumulated(GEMINI, one, other, last, {"usageMetadata": {}}).has_ended


def test_a_blocked_prompt_ends_the_stream() -> None:
    """There are no candidates then; the reason is the finish reason, and no failure."""
    seen = accumulated(GEMINI, {"promptFeedback": {"blockReason": "SAFETY"}})
    assert (seen.finish_reason, seen.has_ended, seen.error) == ("SAFETY", True, None)


# --- OpenAI's other endpoints ---------------------------------------------------------------------

USED = {
    "input_tokens": 9,
    "input_tokens_details": {"cached_tokens": 4, "cache_write_tokens": 1},
    "output_tokens": 7,
    "output_tokens_details": {"reasoning_tokens": 2},
}
RUN = {"object": "thread.run", "id": "run_1", "model": "gpt-4o"}


@pytest.mark.parametrize(
    ("path", "event", "counts", "model"),
    [
        (
            b"/v1/responses/compact",
            {"id": "r", "object": "response.compaction", "output": [], "usage": USED},
            (9, 7, 4, 1, 2),
            None,
        ),
        (b"/v1/decisions", {"answers": [], "model": "m", "usage": USED}, (9, 7, 4, 1, 2), "m"),
        (
            b"/v1/systemone",
            {"model": "m", "answers": {}, "usage": {"input_tokens": 9, "output_tokens": 7}},
            (9, 7, None, None, None),
            "m",
        ),
        (
            b"/v1/images/generations",
            {"created": 1, "data": [{"b64_json": "eA=="}], "usage": USED},
            (9, 7, 4, 1, 2),
            None,
        ),
        (
            b"/v1/images/edits",
            {
                "usage": {"input_tokens": 9, "output_tokens": 7},
                "svg_usage": {"input_tokens": 1, "output_tokens": 2, "reasoning_tokens": 1},
            },
            (10, 9, None, None, 1),
            None,
        ),
        (
            b"/v1/images/edits",
            {"usage": None, "svg_usage": {"input_tokens": 1, "output_tokens": 2}},
            (1, 2, None, None, None),
            None,
        ),
        (
            b"/v1/images/generations",
            {"type": "image_generation.completed", "b64_json": "eA==", "usage": USED},
            (9, 7, 4, 1, 2),
            None,
        ),
        (
            b"/v1/audio/transcriptions",
            {"text": "t", "usage": {"type": "tokens", "input_tokens": 9, "output_tokens": 7}},
            (9, 7, None, None, None),
            None,
        ),
        (
            b"/v1/audio/transcriptions",
            {"type": "transcript.text.done", "usage": {"input_tokens": 9, "output_tokens": 7}},
            (9, 7, None, None, None),
            None,
        ),
        (
            b"/v1/audio/transcriptions",
            {"text": "t", "usage": {"type": "duration", "seconds": 3.5}},
            (None, None, None, None, None),
            None,
        ),
        (
            b"/v1/threads/t/runs",
            {**RUN, "status": "completed", "usage": {"prompt_tokens": 9, "completion_tokens": 7}},
            (9, 7, None, None, None),
            "gpt-4o",
        ),
        (
            b"/v1/threads/t/runs",
            {"object": "thread.run.step", "usage": {"prompt_tokens": 9, "completion_tokens": 7}},
            (None, None, None, None, None),
            None,
        ),
    ],
)
def test_other_endpoints_have_counts(
    path: bytes, event: Any, counts: tuple[int | None, ...], model: str | None
) -> None:
    """An event and a document are read alike."""
    row = endpoint(Dialect.OPENAI, path)
    assert row is not None
    document = Accumulated(keeps=False, budget=0)
    row.document(json.dumps(event).encode(), document)
    for seen in (
        (accumulated(row, event), document) if row.name != "openai compact" else (document,)
    ):
        usage = seen.usage(is_final=True)
        assert (
            usage.input_tokens,
            usage.output_tokens,
            usage.cache_read_tokens,
            usage.cache_write_tokens,
            usage.reasoning_tokens,
        ) == counts
        assert (seen.model, seen.error, seen.is_odd) == (model, None, False)


@pytest.mark.parametrize(
    ("kind", "ends"),
    [
        ("image_generation.partial_image", False),
        ("image_generation.completed", True),
        ("image_edit.completed", True),
        ("transcript.text.delta", False),
        ("transcript.text.done", True),
    ],
)
def test_the_last_event_of_images_and_transcriptions(kind: str, ends: bool) -> None:
    """Its name says that it is the last one."""
    row = endpoint(Dialect.OPENAI, b"/v1/images/generations")
    assert accumulated(row, {"type": kind}).has_ended is ends


@pytest.mark.parametrize(
    ("event", "finish", "error"),
    [
        ({**RUN, "status": "in_progress", "usage": None}, None, None),
        ({**RUN, "status": "requires_action", "usage": None}, "requires_action", None),
        (
            {**RUN, "status": "failed", "last_error": {"code": "server_error", "message": "m"}},
            "failed",
            ProviderError("server_error", "m"),
        ),
        ({"error": {"type": "t", "message": "m"}}, None, ProviderError("t", "m")),
        ({"object": "error", "message": "m"}, None, ProviderError(None, "m")),
        ({"object": "thread.message", "status": "incomplete", "id": "msg_1"}, None, None),
    ],
)
def test_the_state_of_a_run(event: Any, finish: str | None, error: ProviderError | None) -> None:
    """A run that has failed is the provider's failure; one that goes on says nothing."""
    seen = accumulated(endpoint(Dialect.OPENAI, b"/v1/threads/t/runs"), event)
    assert (seen.finish_reason, seen.error) == (finish, error)
