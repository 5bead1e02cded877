"""Requests, judged by us, h11 and llhttp: valid ones are read, and none that either refuses."""

from __future__ import annotations

import pytest
from hypothesis import given, settings

from tests.differential.judges import h11_request, llhttp_request, our_request
from tests.differential.messages import Message, mangled, mistakes, requests
from tests.differential.past import REQUESTS as PAST
from tests.differential.past import Past
from tests.differential.recorded import Recorded, load
from tests.differential.strictness import REQUESTS as STRICT
from tests.differential.strictness import Strict
from tests.differential.strictness import faults as faults_of
from tests.differential.verdict import Ending

RECORDED = load("requests")
PLAIN = [
    b"POST /x HTTP/1.1\r\nHost: h\r\nContent-Length: 5\r\n\r\nhello",
    b"PUT / HTTP/1.1\r\nHost: h\r\nTransfer-Encoding:chunked\r\n\r\n2;a\r\nhi\r\n0\r\nt: v\r\n\r\n",
    b"GET / HTTP/1.0\r\nX: y\r\n\r\nGET /2 HTTP/1.0\r\n\r\n",
]
EXAMPLES = settings().max_examples


def faults(wire: bytes) -> list[str]:
    """Return how our reading differs from the others' where it must not."""
    others = (h11_request(wire), llhttp_request(wire))
    return faults_of(our_request(wire), others, STRICT)


@pytest.mark.parametrize("recorded", RECORDED, ids=[message.name for message in RECORDED])
def test_requests_of_real_clients_are_read(recorded: Recorded) -> None:
    """Each is whole, and the three readers agree on it."""
    ours = our_request(recorded.wire)

    assert (ours.ending, ours.leftover) == (Ending.WHOLE, b"")
    assert h11_request(recorded.wire) == ours
    if b"\nupgrade:" not in recorded.wire.lower():  # behind which httptools reads nothing
        assert llhttp_request(recorded.wire) == ours


@pytest.mark.parametrize("recorded", RECORDED, ids=[message.name for message in RECORDED])
def test_requests_of_real_clients_may_be_split_at_any_point(recorded: Recorded) -> None:
    """The same request is read with every single split, and byte by byte."""
    wire = recorded.wire
    whole = our_request(wire)

    for at in range(1, len(wire)):
        assert our_request(wire, splits=(at,)) == whole
    assert our_request(wire, splits=tuple(range(1, len(wire)))) == whole


def test_there_are_requests_of_every_kind() -> None:
    """The recorded ones are of all clients that were named, and of every framing."""
    names = {message.name.partition("-")[0] for message in RECORDED}
    sdks = {"openai", "anthropic", "ollama"}
    assert names >= {"curl", "node", "go", "java", "chromium", "firefox", "httpx", *sdks}
    wires = b"".join(message.wire for message in RECORDED)
    for mark in (b"HTTP/1.0", b"100-continue", b"chunked", b"GET http://", b"OPTIONS *"):
        assert mark in wires


@given(requests())
@settings(max_examples=2 * EXAMPLES)
def test_valid_requests_are_read_as_they_were_written(message: Message) -> None:
    """The content is what was written, with any split, and the others read the same."""
    wire = message.wire + message.extra
    ours = our_request(wire)

    assert (ours.ending, ours.body, ours.leftover) == (Ending.WHOLE, message.body, message.extra)
    assert our_request(wire, splits=(len(wire) // 2, len(wire) - 1)) == ours
    assert faults(wire) == []


@given(mangled(requests()))
@settings(max_examples=5 * EXAMPLES)
def test_mangled_requests_are_not_read_where_others_refuse(message: Message) -> None:
    """What we read both others read alike, and what both read we refuse only for a reason."""
    assert faults(message.wire) == []


@pytest.mark.parametrize("plain", PLAIN)
def test_no_single_mistake_is_read_where_others_refuse(plain: bytes) -> None:
    """Each strange byte at each place, and each strange line, is judged as by the others."""
    found = {wire: found for wire in mistakes(plain) if (found := faults(wire))}

    assert found == {}


@pytest.mark.parametrize("strict", STRICT, ids=lambda strict: strict.reason)
def test_strict_refusals_have_their_reason(strict: Strict) -> None:
    """The message is refused in these words, also where another reader accepts it."""
    ours = our_request(strict.wire)

    assert ours.ending is Ending.REFUSED
    assert ours.why.startswith(strict.words)
    assert h11_request(strict.wire).whole or llhttp_request(strict.wire).whole


@pytest.mark.parametrize("past", PAST, ids=lambda past: past.what)
def test_faults_of_the_past_stay_away(past: Past) -> None:
    """What another reader refuses for its framing is refused."""
    assert our_request(past.wire).ending is Ending.REFUSED
    assert faults(past.wire) == []


def test_a_tab_beside_a_coding_is_refused() -> None:
    """Some readers take this for chunks and others do not."""
    wire = b"POST / HTTP/1.1\r\nHost: h\r\nTransfer-Encoding: chunked\t\r\n\r\n0\r\n\r\n"

    assert our_request(wire).ending is Ending.REFUSED
