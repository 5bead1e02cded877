"""Endpoints beside the chats, called with the real SDKs: their counts are in the record.

The demo does not have them, so these tests bring their provider along.  Which endpoints there are
is what ``test_paths.py`` finds out.
"""

from __future__ import annotations

import json
import uuid
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import ollama
import openai
import pytest

from tests.sdk.played import Played
from tests.sdk.sdks import KEY
from tests.support.daemon import Daemon, provider_table, route_table
from tests.support.live_proxy import client_config, trace_of
from tests.support.sockets import WAIT, Provider


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Played]:
    """A proxy with a route to one provider."""
    pair = Played()
    with Provider(pair.play) as provider:
        config = client_config("team", KEY) + provider_table("p", url=provider.url)
        config += route_table("/p", "p")
        with Daemon(tmp_path_factory.mktemp("counted"), config, proxy="") as pair.daemon:
            yield pair


@pytest.fixture
def pair(running: Played) -> Played:
    """The same, with no request so far."""
    running.received = []
    running.session = uuid.uuid4().hex
    return running


USED = {
    "input_tokens": 9,
    "input_tokens_details": {"cached_tokens": 4, "cache_write_tokens": 1},
    "output_tokens": 7,
    "output_tokens_details": {"reasoning_tokens": 2},
    "total_tokens": 16,
}
PLAIN = {"type": "tokens", "input_tokens": 9, "output_tokens": 7, "total_tokens": 16}
PNG = ("a.png", b"\x89PNG", "image/png")
WAV = ("a.wav", b"RIFF", "audio/wav")
COMPACTED = {"id": "r", "object": "response.compaction", "created_at": 1, "output": []}
RUN = {"id": "run_1", "object": "thread.run", "model": "m", "status": "completed"}
STEP = {"object": "thread.run.step", "usage": {"prompt_tokens": 1, "completion_tokens": 1}}
SPENT = {"prompt_tokens": 9, "completion_tokens": 7, "total_tokens": 16}


def sse(*events: tuple[str, Any]) -> bytes:
    """Return a stream of named events."""
    texts = [(name, data if isinstance(data, str) else json.dumps(data)) for name, data in events]
    return "".join(f"event: {name}\ndata: {data}\n\n" for name, data in texts).encode()


class Case(NamedTuple):
    """A call of an SDK, what the provider sends, and what the record says of it.

    Attributes:
        counts: input, output, cache read, cache write and reasoning tokens.
        model: what the record has as ``model``.
    """

    call: Callable[[Any], Any]
    sent: dict[str, Any] | bytes
    counts: tuple[int | None, ...]
    model: str | None = "m"


OPENAI = {
    "compact": Case(
        lambda api: api.responses.compact(model="m", input="x"),
        {**COMPACTED, "usage": USED},
        (9, 7, 4, 1, 2),
    ),
    "decisions": Case(
        lambda api: api.decisions.create(model="m", input="x", questions=[]),
        {"answers": [], "model": "m", "usage": USED},
        (9, 7, 4, 1, 2),
    ),
    "images": Case(
        lambda api: api.images.generate(model="m", prompt="x"),
        {"created": 1, "data": [{"b64_json": "x" * 3_000_000}], "usage": USED},
        (9, 7, 4, 1, 2),
    ),
    "images, edited": Case(
        lambda api: api.images.edit(model="m", prompt="x", image=PNG),
        {"created": 1, "data": [{"b64_json": "eA=="}], "usage": PLAIN},
        (9, 7, None, None, None),
        None,
    ),
    "images, streamed": Case(
        lambda api: list(api.images.generate(model="m", prompt="x", stream=True)),
        sse(
            ("image_generation.partial_image", {"type": "image_generation.partial_image"}),
            ("image_generation.completed", {"type": "image_generation.completed", "usage": PLAIN}),
        ),
        (9, 7, None, None, None),
    ),
    "transcriptions": Case(
        lambda api: api.audio.transcriptions.create(model="m", file=WAV),
        {"text": "x", "usage": PLAIN},
        (9, 7, None, None, None),
        None,
    ),
    "transcriptions, streamed": Case(
        lambda api: list(api.audio.transcriptions.create(model="m", file=WAV, stream=True)),
        sse(
            ("transcript.text.delta", {"type": "transcript.text.delta", "delta": "x"}),
            ("transcript.text.done", {"type": "transcript.text.done", "text": "x", "usage": PLAIN}),
        ),
        (9, 7, None, None, None),
        None,
    ),
    "runs": Case(
        lambda api: list(api.beta.threads.runs.create("t_1", assistant_id="a", stream=True)),
        sse(
            ("thread.run.created", {**RUN, "status": "queued", "usage": None}),
            ("thread.run.step.completed", STEP),
            ("thread.run.completed", {**RUN, "usage": SPENT}),
            ("done", "[DONE]"),
        ),
        (9, 7, None, None, None),
        None,
    ),
}


def assert_counted(pair: Played, counts: tuple[int | None, ...], model: str | None) -> None:
    """The record has the model that was asked for, the counts, and that the response was whole."""
    record = trace_of(pair.daemon, session=pair.session)
    kinds = ("input", "output", "cache_read", "cache_write", "reasoning")
    assert tuple(record[f"{kind}_tokens"] for kind in kinds) == counts
    assert (record["end_reason"], record["usage"]) == ("complete", "reported")
    assert (record["model"], record["degraded"]) == (model, [])


@pytest.mark.parametrize("name", OPENAI)
@pytest.mark.filterwarnings("ignore:The Assistants API is deprecated:DeprecationWarning")
def test_counts_of_openais_other_endpoints(name: str, pair: Played) -> None:
    """In one piece, also one of three megabytes, and streamed."""
    case = OPENAI[name]
    if isinstance(case.sent, bytes):
        pair.streams(case.sent)
    else:
        pair.says(json.dumps(case.sent).encode())
    with openai.OpenAI(
        base_url=f"http://127.0.0.1:{pair.daemon.port}/p/v1",
        api_key=KEY,
        max_retries=0,
        timeout=WAIT,
        default_headers={"x-session-id": pair.session},
    ) as api:
        assert case.call(api)
    assert_counted(pair, case.counts, case.model)


def test_counts_of_ollamas_judge(pair: Played) -> None:
    """Its response has a usage as OpenAI's have."""
    usage = {"input_tokens": 9, "output_tokens": 7}
    pair.says(json.dumps({"model": "m", "answers": {}, "usage": usage}).encode())
    client = ollama.Client(
        host=f"http://127.0.0.1:{pair.daemon.port}/p",
        headers={"authorization": f"Bearer {KEY}", "x-session-id": pair.session},
        timeout=WAIT,
    )
    assert client.systemone(model="m", state="x", questions={}).usage.input_tokens == 9
    client._client.close()
    assert_counted(pair, (9, 7, None, None, None), "m")
