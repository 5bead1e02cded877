"""A capsule that the demo provider plays: its sizes at every endpoint, and which files are none."""

from __future__ import annotations

import json
import re
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from llmproxy.cli.demo.replay import MOST_BYTES, BadCapsule, read_capsule
from llmproxy.cli.main import main
from tests.support.demo_wire import STREAM_ENDS, DemoConnection

_HEAD = b"\r\n\r\n"
_RESET = {"end_reason": "upstream_broken", "cause": "reset"}


def capsule(*chunks: tuple[float, int], **more: Any) -> dict[str, Any]:
    """Return a capsule whose last chunks came at these seconds, with these bytes."""
    more = {"bytes": sum(size for _, size in chunks), "chunks": len(chunks), **more}
    body = {"status": 200, "ends_between_events": True, "last_chunks": chunks, **more}
    return {"capsule": 1, **_RESET, "head_s": 0.0, "response": body}


def connected(played: dict[str, Any]) -> DemoConnection:
    """Return a connection to a provider that plays a capsule."""
    return DemoConnection(capsule=read_capsule(json.dumps(played).encode()))


def chunks_of(written: bytes) -> list[bytes]:
    """Return the chunks of what was written behind a head, each without its coding."""
    found = []
    while written:
        size, _, rest = written.partition(b"\r\n")
        found.append(rest[: int(size, 16)])
        written = rest[int(size, 16) + 2 :]
    return found


@example(path="/v1/messages", sizes=[2600], whole=True, events=1)
@example(path="/v1/responses", sizes=[3000], whole=False, events=1)
@example(path="/v1/responses", sizes=[1, 101, 3000], whole=True, events=16)
@given(
    path=st.sampled_from(sorted(STREAM_ENDS)),
    sizes=st.lists(st.integers(1, 3000), min_size=1, max_size=12),
    whole=st.booleans(),
    events=st.integers(0, 20) | st.none(),
)
def test_every_chunk_has_its_size(
    path: str, sizes: list[int], whole: bool, events: int | None
) -> None:
    """What was whole is whole, wherever the endpoint's first events have room for that."""
    played = capsule(*((n / 8, size) for n, size in enumerate(sizes, 1)))
    played["response"] |= {"ends_between_events": whole, "events": events}
    wire = connected(played)
    wire.ask(path, "demo-replay")
    assert wire.turn().endswith(_HEAD)
    content = b""
    for size in sizes:
        (chunk,) = chunks_of(wire.turn(0.125))
        assert len(chunk) == size
        content += chunk
    assert wire.transport.disconnecting or wire.turn() == b""
    if len(content) > 2500:  # the first events of each endpoint are shorter
        ends = b"\n" if path.startswith("/api/") else b"\n\n"
        assert content.endswith(ends) is whole
        documents = re.findall(rb"^(?:data: )?(\{.*\})\n", content, re.M)
        assert documents or not whole
        for document in documents:
            json.loads(document)


def test_chunks_that_were_not_kept_come_evenly() -> None:
    """From the first one to those that were; no byte is missing."""
    played = capsule((4.0, 300), (5.0, 50), bytes=1350, chunks=6, first_chunk_s=2.0)
    wire = connected(played)
    wire.ask("/v1/chat/completions", "demo-replay")
    seen: list[tuple[float, int]] = []
    for step in range(11):
        written = wire.turn(0.0 if step == 0 else 0.5).rpartition(_HEAD)[2]
        seen += [(step / 2, len(chunk)) for chunk in chunks_of(written)]
    assert seen == [(2.0, 250), (2.5, 250), (3.0, 250), (3.5, 250), (4.0, 300), (5.0, 50)]
    assert all(before < after for (before, _), (after, _) in pairwise(seen))


def test_the_head_waits_for_its_time_and_no_timer_outlives_its_client() -> None:
    """The time is the last attempt's; one who leaves before that is not waited for."""
    played = capsule((1.0, 400)) | {"attempts": [{"seconds": 9.0}, {"seconds": 0.5}]}
    wire = connected(played)
    wire.ask("/v1/messages", "demo-replay")
    assert wire.turn(0.4) == b""
    assert wire.turn(0.1).startswith(b"HTTP/1.1 200 OK\r\n")
    wire = connected(played)
    wire.ask("/v1/messages", "demo-replay")
    before = len(wire.clock.getDelayedCalls())
    wire.leave()
    assert len(wire.clock.getDelayedCalls()) < before
    assert wire.turn(1.0) == b""


def test_a_refusal_is_in_the_dialect_that_was_asked() -> None:
    """It has the capsule's status and bytes, and is whole whatever they are."""
    for size in (10, 500):
        played = capsule((0.0, size), status=429) | {"end_reason": "upstream_refused"}
        wire = connected(played)
        wire.ask("/v1/messages", "demo-replay")
        head, body = wire.turn(turns=4).split(_HEAD, 1)
        assert head.startswith(b"HTTP/1.1 429 ")
        document = b"".join(chunks_of(body))
        assert json.loads(document)["type"] == "error"
        assert len(document) >= size


def test_there_is_no_such_model_without_a_capsule() -> None:
    """It is not found, as any other name."""
    wire = DemoConnection()
    wire.ask("/v1/chat/completions", "demo-replay")
    assert wire.response()[0] == 404


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ("", "not a capsule"),
        ("[]", "not a capsule: Expected `object`, got `array`"),
        ("{}", "missing required field `capsule`"),
        ({"capsule": 2}, "a capsule of form 2; this version reads form 1"),
        ({"end_reason": "lost"}, "its end reason 'lost' is unknown to this version"),
        ({"response": None, "end_reason": "rejected"}, "no provider did anything"),
        ({"response": None, "end_reason": "upstream_unreachable"}, "no provider did anything"),
        (capsule(status=101), "a WebSocket, which the demo provider does not speak"),
        (capsule(status=7), "Expected `int` >= 100 - at `$.response.status`"),
        (capsule((2.0, 1), (1.0, 1)), "`response.last_chunks` are not in their order"),
        (capsule((1.0, 9), bytes=8), "disagree with `chunks` and `bytes`"),
        (capsule((1.0, 9), bytes=12), "disagree with `chunks` and `bytes`"),
        (capsule((1.0, 9), bytes=10, chunks=4), "disagree with `chunks` and `bytes`"),
        (capsule((1.0, 9), bytes=MOST_BYTES + 1), "Expected `int` <= 67108864"),
        (capsule((-1.0, 9)), "Expected `float` >= 0.0"),
    ],
)
def test_a_file_that_cannot_be_played_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], wrong: str | dict[str, Any], words: str
) -> None:
    """In words that say what is wrong; the demo does not start."""
    text = wrong if isinstance(wrong, str) else json.dumps({**capsule((1.0, 400)), **wrong})
    with pytest.raises(BadCapsule) as refused:
        read_capsule(text.encode())
    assert words in str(refused.value)
    file = tmp_path / "capsule.json"
    file.write_text(text)
    assert main(["demo", "--replay", str(file)]) == 1
    assert capsys.readouterr() == ("", f"llmproxy: {file}: {refused.value}\n")


def test_a_file_that_is_missing_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    """As the system says it."""
    assert main(["demo", "--replay", "/nowhere/x.json"]) == 1
    assert capsys.readouterr().err == "llmproxy: /nowhere/x.json: No such file or directory\n"
