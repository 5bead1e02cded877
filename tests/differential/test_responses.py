"""Responses, judged by us, h11 and llhttp: valid ones are read, and none that either refuses."""

from __future__ import annotations

import pytest
from hypothesis import given, settings

from tests.differential.judges import h11_response, llhttp_response, our_response
from tests.differential.messages import Message, mangled, mistakes, responses
from tests.differential.past import RESPONSES as PAST
from tests.differential.past import Past
from tests.differential.recorded import Recorded, load
from tests.differential.strictness import RESPONSES as STRICT
from tests.differential.strictness import Strict
from tests.differential.strictness import faults as faults_of
from tests.differential.verdict import Ending

RECORDED = load("responses")
PLAIN = [
    b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nhello",
    b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5;a=b\r\nhello\r\n0\r\nt: v\r\n\r\n",
    b"HTTP/1.1 103 X\r\n\r\nHTTP/1.0 200 OK\r\nX: y\r\n\r\nhello",
]
EXAMPLES = settings().max_examples


def faults(method: bytes, wire: bytes) -> list[str]:
    """Return how our reading differs from the others' where it must not."""
    others = (h11_response(wire, method), llhttp_response(wire, method))
    return faults_of(our_response(wire, method), others, STRICT)


@pytest.mark.parametrize("recorded", RECORDED, ids=[message.name for message in RECORDED])
def test_responses_of_real_servers_are_read(recorded: Recorded) -> None:
    """Each is whole, with the status that its server gave, and all three readers agree on it."""
    method = recorded.about["method"].encode()
    ours = our_response(recorded.wire, method)

    assert (ours.ending, ours.leftover) == (Ending.WHOLE, b"")
    assert ours.start[1] == int(recorded.about["status"])
    assert ours.keep is (recorded.about["end"] == "kept")
    for other in (h11_response(recorded.wire, method), llhttp_response(recorded.wire, method)):
        assert other == ours


@pytest.mark.parametrize("recorded", RECORDED, ids=[message.name for message in RECORDED])
def test_responses_of_real_servers_may_be_split_at_any_point(recorded: Recorded) -> None:
    """The same response is read with every single split, and byte by byte."""
    method, wire = recorded.about["method"].encode(), recorded.wire
    whole = our_response(wire, method)

    for at in range(1, len(wire)):
        assert our_response(wire, method, splits=(at,)) == whole
    assert our_response(wire, method, splits=tuple(range(1, len(wire)))) == whole


def test_there_are_responses_of_every_kind() -> None:
    """The recorded ones are of all servers that were named, and of every framing."""
    names = {message.name.partition("-")[0] for message in RECORDED}
    assert names >= {"nginx", "node", "go", "uvicorn", "python", "haproxy", "llamacpp"}
    about = [(m.about["method"], m.about["status"], m.about["end"]) for m in RECORDED]
    for kind in (("GET", "204", "kept"), ("GET", "304", "kept"), ("HEAD", "200", "kept")):
        assert kind in about
    wires = b"".join(message.wire for message in RECORDED)
    for mark in (b"HTTP/1.0", b" 100 ", b" 103 ", b"event-stream", b"chunked", b"0\r\nX-Tokens: 5"):
        assert mark in wires


@given(responses())
@settings(max_examples=2 * EXAMPLES)
def test_valid_responses_are_read_as_they_were_written(message: Message) -> None:
    """The content is what was written, with any split, and the others read the same."""
    wire = message.wire + message.extra
    ours = our_response(wire, message.method)

    assert (ours.ending, ours.body, ours.leftover) == (Ending.WHOLE, message.body, message.extra)
    assert not (ours.keep and message.extra)
    split = our_response(wire, message.method, splits=(len(wire) // 2, len(wire) - 1))
    assert split._replace(leftover=message.extra) == ours  # it is that of the last read alone
    assert faults(message.method, wire) == []


@given(mangled(responses()))
@settings(max_examples=5 * EXAMPLES)
def test_mangled_responses_are_not_read_where_others_refuse(message: Message) -> None:
    """What we read both others read alike, and what both read we refuse only for a reason."""
    assert faults(message.method, message.wire) == []


@pytest.mark.parametrize("plain", PLAIN)
def test_no_single_mistake_is_read_where_others_refuse(plain: bytes) -> None:
    """Each strange byte at each place, and each strange line, is judged as by the others."""
    found = {wire: found for wire in mistakes(plain) if (found := faults(b"GET", wire))}

    assert found == {}


@pytest.mark.parametrize("strict", STRICT, ids=lambda strict: strict.reason)
def test_strict_refusals_have_their_reason(strict: Strict) -> None:
    """The message is refused in these words, also where another reader accepts it."""
    ours = our_response(strict.wire)

    assert ours.ending is Ending.REFUSED
    assert ours.why.startswith(strict.words)
    assert h11_response(strict.wire).whole or llhttp_response(strict.wire).whole


@pytest.mark.parametrize("past", PAST, ids=lambda past: past.what)
def test_faults_of_the_past_stay_away(past: Past) -> None:
    """What another reader refuses for its framing is refused."""
    assert our_response(past.wire, past.method).ending is Ending.REFUSED
    assert faults(past.method, past.wire) == []


def test_a_tab_beside_a_coding_is_refused() -> None:
    """Some readers take this for chunks and others do not."""
    wire = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\t\r\n\r\n0\r\n\r\n"

    assert our_response(wire).ending is Ending.REFUSED
