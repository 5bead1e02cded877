"""Google's SDK through the proxy, before a provider that speaks Gemini's API as the test says.

Most tests bring their provider along: the demo has no blocked prompts and no embeddings.  Each call
is made with the sync and with the async client.
"""

from __future__ import annotations

import asyncio
import json
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import pytest
from google import genai
from google.genai import errors, types

from tests.sdk.played import Played
from tests.sdk.sdks import KEY
from tests.support.daemon import Daemon, provider_table, route_table
from tests.support.demo import Demo
from tests.support.golden import BY_FILE
from tests.support.live_proxy import (
    client_config,
    post,
    trace_of,
    write_credential,
)
from tests.support.sockets import WAIT, Provider

MODEL = "gemini-2.5-flash"
PROVIDER_KEY = "AIza-key-of-the-provider"
STREAM = BY_FILE["gemini-generate.sse"].data
ARRAY = BY_FILE["gemini-generate.array"].data
SAID = BY_FILE["gemini-generate.sse"].result
TOOL: Any = {
    "function_declarations": [{"name": "f", "parameters": {"type": "OBJECT", "properties": {}}}]
}
VECTORS = (
    b'{"embeddings":[{"values":[0.5]},{"values":[0.25]}],"usageMetadata":{"promptTokenCount":2}}'
)


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory, demo: Demo) -> Iterator[Played]:
    """A proxy with three routes to one provider, and ``demo`` and ``gone`` for themselves."""
    folder = tmp_path_factory.mktemp("gemini")
    pair = Played()
    config = client_config("team", KEY) + write_credential(folder, "google", PROVIDER_KEY)
    with Provider(pair.play) as provider:
        keyed = 'credential = "google"\nkey_query = true\n'
        config += provider_table("google", url=provider.url, dialect="gemini") + keyed
        config += provider_table("gone", url="http://127.0.0.1:1", dialect="gemini")
        config += route_table("/gemini", "google")
        config += route_table("/kept", "google") + 'capture = "content"\n'
        config += route_table("/event", "google") + "error_event = true\n"
        config += route_table("/gone", "gone")
        config += provider_table("demo", url=demo.url, dialect="gemini")
        config += route_table("/demo", "demo")
        with Daemon(folder, config, proxy="") as pair.daemon:
            yield pair


@pytest.fixture
def gemini(running: Played) -> Played:
    """The same, with no request so far."""
    running.received = []
    running.session = uuid.uuid4().hex
    running.streams(STREAM)
    return running


Call = Callable[[Any], Any]


def generate(client: Any) -> Any:
    """Ask for a whole response."""
    return client.models.generate_content(model=MODEL, contents="Hello", config={"tools": [TOOL]})


def stream(client: Any) -> Any:
    """Ask for a stream."""
    return client.models.generate_content_stream(model=MODEL, contents="Hello")


def stream_demo(client: Any) -> Any:
    """Ask the demo for one."""
    return client.models.generate_content_stream(model="demo-fast", contents="Hello")


STREAMS = (stream, stream_demo)


def embed(client: Any) -> Any:
    """Ask for two vectors."""
    return client.models.embed_content(model="gemini-embedding-001", contents=["a", "b"])


def count(client: Any) -> Any:
    """Ask for the number of tokens."""
    return client.models.count_tokens(model=MODEL, contents="Hello")


@dataclass
class Caller:
    """The SDK's sync or async client."""

    is_async: bool

    def ask(self, pair: Played, call: Call, route: str = "gemini", key: str = KEY) -> Any:
        """Return what a call gives, a list of chunks for a stream; raise what it raises."""
        options = types.HttpOptions(
            base_url=f"http://127.0.0.1:{pair.daemon.port}/{route}",
            headers={"x-session-id": pair.session},
            timeout=int(WAIT * 1000),
        )
        with genai.Client(api_key=key, http_options=options) as client:
            if self.is_async:
                return asyncio.run(self._ask(client, call))
            found = call(client)
            return list(found) if call in STREAMS else found

    async def _ask(self, client: genai.Client, call: Call) -> Any:
        async with client.aio as aio:
            found = await call(aio)
            return [chunk async for chunk in found] if call in STREAMS else found


@pytest.fixture(params=[False, True], ids=["sync", "async"])
def caller(request: pytest.FixtureRequest) -> Caller:
    """Both clients of the SDK."""
    return Caller(request.param)


@pytest.fixture
def ended(gemini: Played) -> Callable[[], dict[str, Any]]:
    """Return what waits for the record of this test's one request."""
    return lambda: trace_of(gemini.daemon, session=gemini.session)


Ended = Callable[[], dict[str, Any]]
TOKENS = ("input_tokens", "output_tokens", "cache_read_tokens", "reasoning_tokens", "usage")


def tokens(record: dict[str, Any]) -> tuple[Any, ...]:
    """Return the counts of a record, and where they come from."""
    return tuple(record[name] for name in TOKENS)


def text_of(chunks: list[Any]) -> str:
    """Return the text of a stream; the SDK leaves thoughts out."""
    return "".join(chunk.text or "" for chunk in chunks)


# -- responses -------------------------------------------------------------------------------------


def test_a_stream_of_the_sdk(gemini: Played, caller: Caller, ended: Ended) -> None:
    """The caller gets the text, the record has model, counts and end, all known from the path."""
    chunks = caller.ask(gemini, stream)
    assert text_of(chunks) == SAID.text
    assert chunks[-1].candidates[0].finish_reason is types.FinishReason.STOP
    record = ended()
    assert (record["stream"], record["end_reason"], record["dialect"]) == (
        True,
        "complete",
        "gemini",
    )
    assert (record["model"], record["model_from"], record["served_model"]) == (MODEL, "path", MODEL)
    assert tokens(record) == (12, 27, 4, 18, "reported")
    (asked,) = gemini.received
    assert asked.target == f"/v1/models/{MODEL}:streamGenerateContent?alt=sse".encode()
    assert asked.values(b"accept-encoding") == [b"identity"]


def test_a_whole_response_of_the_sdk(gemini: Played, caller: Caller, ended: Ended) -> None:
    """Text and the call of a function are the caller's, and the record's where it keeps them."""
    gemini.says(BY_FILE["gemini-generate.json"].data)
    found = caller.ask(gemini, generate, "kept")
    (called,) = found.function_calls
    assert (called.name, called.args) == ("f", {"a": 1})
    record = ended()
    assert (record["stream"], record["end_reason"]) == (False, "complete")
    assert (record["text"], record["finish_reason"]) == ("Hello 🌍", "STOP")
    assert record["response_id"] == found.response_id
    assert record["tool_calls"] == [{"id": None, "name": "f", "arguments": '{"a":1}'}]
    usage = found.usage_metadata
    assert usage.total_token_count == record["input_tokens"] + record["output_tokens"]
    assert tokens(record) == (17, 27, 4, 18, "reported")


def test_function_calls_in_a_stream(gemini: Played, caller: Caller, ended: Ended) -> None:
    """Each comes whole, in one chunk."""
    gemini.streams(BY_FILE["gemini-generate-tools.sse"].data)
    chunks = caller.ask(gemini, stream, "kept")
    names = [call.name for chunk in chunks for call in chunk.function_calls or ()]
    assert names == [call["name"] for call in ended()["tool_calls"]] == ["get_weather", "now"]


@pytest.mark.parametrize("call", [generate, stream])
def test_a_blocked_prompt(gemini: Played, caller: Caller, ended: Ended, call: Call) -> None:
    """It is a whole response without candidates; its input is counted."""
    gemini.says(BY_FILE["gemini-blocked.json"].data)
    if call is stream:
        gemini.streams(BY_FILE["gemini-generate-blocked.sse"].data)
    found = caller.ask(gemini, call, "kept")
    feedback = (found[0] if call is stream else found).prompt_feedback
    assert feedback.block_reason is types.BlockedReason.PROHIBITED_CONTENT
    record = ended()
    assert (record["end_reason"], record["finish_reason"]) == ("complete", "PROHIBITED_CONTENT")
    assert tokens(record) == (7, 0, None, None, "reported")


def test_embeddings_of_the_sdk(gemini: Played, caller: Caller, ended: Ended) -> None:
    """Several texts are one request, and it counts what Google says of it."""
    gemini.says(VECTORS)
    assert [one.values for one in caller.ask(gemini, embed).embeddings] == [[0.5], [0.25]]
    record = ended()
    assert gemini.received[0].target.endswith(b":batchEmbedContents")
    assert (record["model"], record["stream"]) == ("gemini-embedding-001", False)
    assert tokens(record) == (2, None, None, None, "reported")


def test_counting_tokens_uses_none(gemini: Played, caller: Caller, ended: Ended) -> None:
    """What is counted there was not used."""
    gemini.says(b'{"totalTokens": 31, "promptTokensDetails": []}')
    assert caller.ask(gemini, count).total_tokens == 31
    record = ended()
    assert (record["model"], record["stream"]) == (MODEL, False)
    assert tokens(record) == (None, None, None, None, None)


@pytest.mark.parametrize("query", ["", "?key=" + KEY, "?prettyPrint=true&key=" + KEY])
def test_a_stream_without_sse_is_an_array(gemini: Played, ended: Ended, query: str) -> None:
    """It crosses byte for byte, is read item by item, and a key in the query is cut out of it."""
    gemini.streams(ARRAY, "application/json; charset=UTF-8")
    fields = [f"x-session-id: {gemini.session}"]
    if "key=" not in query:
        fields.append(f"x-goog-api-key: {KEY}")
    got = gemini.get(
        post(f"/gemini/v1beta/models/{MODEL}:streamGenerateContent{query}", b"{}", *fields)
    )
    assert (got.status, got.body) == (200, ARRAY)
    record = ended()
    assert (record["stream"], record["end_reason"]) == (True, "complete")
    assert tokens(record) == (12, 27, 4, 18, "reported")
    (asked,) = gemini.received
    assert KEY.encode() not in asked.target
    assert asked.target.endswith(b"Content?prettyPrint=true" if "pretty" in query else b"Content")


def test_the_demo_speaks_gemini(gemini: Played, caller: Caller, ended: Ended) -> None:
    """The SDK reads its stream, and the record counts as many tokens."""
    chunks = caller.ask(gemini, stream_demo, "demo")
    assert text_of(chunks).startswith("You said: Hello. This is the demo provider.")
    record = ended()
    assert (record["end_reason"], record["served_model"]) == ("complete", "demo-fast")
    used = chunks[-1].usage_metadata
    said = (used.prompt_token_count, used.candidates_token_count, None, None, "reported")
    assert tokens(record) == said


def test_the_provider_sees_its_own_key(gemini: Played, caller: Caller) -> None:
    """It stands where Google's clients put theirs, and the caller's does not cross."""
    caller.ask(gemini, stream)
    (asked,) = gemini.received
    assert asked.values(b"x-goog-api-key") == [PROVIDER_KEY.encode()]
    assert asked.values(b"authorization") == []
    assert KEY.encode() not in b"".join([asked.target, *(b"".join(one) for one in asked.fields)])


# -- what goes wrong -------------------------------------------------------------------------------


@pytest.mark.parametrize("call", [generate, stream, embed, count])
@pytest.mark.parametrize(
    ("route", "key", "code", "status"),
    [
        ("gemini", "wrong", 401, "UNAUTHENTICATED"),
        ("gone", KEY, 502, "UNAVAILABLE"),
        ("", KEY, 404, "NOT_FOUND"),
    ],
)
def test_our_errors_are_the_sdks_own(
    gemini: Played, caller: Caller, call: Call, route: str, key: str, code: int, status: str
) -> None:
    """Its exception has our status, Google's word for it, and our sentence."""
    kind = errors.ClientError if code < 500 else errors.ServerError
    with pytest.raises(kind) as caught:
        caller.ask(gemini, call, route, key)
    assert (caught.value.code, caught.value.status) == (code, status)
    assert caught.value.message
    assert gemini.received == []


def test_an_error_of_google_is_forwarded(gemini: Played, caller: Caller, ended: Ended) -> None:
    """The SDK raises what Google said."""
    body = BY_FILE["gemini-error.json"].data
    head = b"HTTP/1.1 404 Not Found\r\nContent-Type: application/json\r\nConnection: close\r\n"
    gemini.response = head + b"Content-Length: %d\r\n\r\n" % len(body) + body
    with pytest.raises(errors.ClientError) as caught:
        caller.ask(gemini, generate)
    assert (caught.value.code, caught.value.details) == (404, json.loads(body))
    assert ended()["end_reason"] == "upstream_refused"


def test_an_error_inside_a_stream(gemini: Played, caller: Caller, ended: Ended) -> None:
    """The SDK raises it, and the record says who failed."""
    gemini.streams(BY_FILE["gemini-generate-error.sse"].data)
    with pytest.raises(errors.ServerError, match="overloaded"):
        caller.ask(gemini, stream)
    assert ended()["end_reason"] == "upstream_failed"


def test_a_stream_without_a_finish_reason_is_unfinished(
    gemini: Played, caller: Caller, ended: Ended
) -> None:
    """The SDK takes it in silence; the record does not."""
    gemini.streams(BY_FILE["gemini-generate-partial.sse"].data)
    assert text_of(caller.ask(gemini, stream)) == "Half"
    record = ended()
    assert (record["end_reason"], record["usage"]) == ("unfinished", "partial")


def test_a_last_event_without_its_blank_line(gemini: Played, caller: Caller, ended: Ended) -> None:
    """This SDK hands the event on; Google's for Node fails, so the record calls it unfinished."""
    gemini.streams(STREAM.rstrip())
    assert caller.ask(gemini, stream)[-1].candidates[0].finish_reason is types.FinishReason.STOP
    record = ended()
    assert (record["end_reason"], *tokens(record)) == ("unfinished", 12, 27, 4, 18, "reported")


def test_a_break_is_reported_in_an_event(gemini: Played, caller: Caller, ended: Ended) -> None:
    """On a route with ``error_event`` the SDK raises our error in place of its transport's."""
    gemini.streams(BY_FILE["gemini-generate-partial.sse"].data, last=b"")
    with pytest.raises(errors.ServerError) as caught:
        caller.ask(gemini, stream, "event")
    assert (caught.value.code, caught.value.status) == (502, "UNAVAILABLE")
    assert "The provider" in (caught.value.message or "")
    assert ended()["end_reason"] == "upstream_broken"
