"""What is odd in an event is left out, and nothing else of it."""

from __future__ import annotations

import json
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec import inspect

from llmproxy.dialects import anthropic, lenient, ollama, openai, openai_responses
from llmproxy.dialects.accumulated import Accumulated
from llmproxy.dialects.dialect import Dialect
from llmproxy.dialects.endpoint import Endpoint
from llmproxy.dialects.endpoints import TABLE, endpoint
from llmproxy.dialects.lenient import FAULTS, decoder, raw_text

CHAT = endpoint(Dialect.OPENAI, b"/v1/chat/completions")
RESPONSES = endpoint(Dialect.OPENAI, b"/v1/responses")
MESSAGES = endpoint(Dialect.ANTHROPIC, b"/v1/messages")
OLLAMA = endpoint(Dialect.OLLAMA, b"/api/chat")

HALF, OTHER = b"\\ud83d", b"\\ude00"


def read(row: Endpoint | None, *events: bytes, keeps: bool = False) -> Accumulated:
    """Return what events say."""
    assert row is not None
    seen = Accumulated(keeps=keeps, budget=10**6)
    for event in events:
        row.event(event, seen)
    return seen


ODD = [
    b'""',
    b"[]",
    b"7",
    b"-7",
    b"true",
    b"[[]]",
    b'[{"a":1},7]',
    b'{"error":{}}',
    b"1e999",
    b"9" * 5000,
]


@pytest.mark.parametrize("odd", ODD)
@pytest.mark.parametrize(
    ("row", "event", "member"),
    [
        (CHAT, b'{"id":"i","model":"m","usage":{"prompt_tokens":3,"completion_tokens":ODD}}', "u"),
        (CHAT, b'{"model":"m","usage":{"prompt_tokens":3,"prompt_tokens_details":ODD}}', "d"),
        (CHAT, b'{"model":"m","usage":{"prompt_tokens":3},"choices":ODD}', "choices"),
        (CHAT, b'{"model":"m","usage":{"prompt_tokens":3},"x_groq":ODD,"timings":ODD}', "x"),
        (CHAT, b'{"model":"m","id":ODD,"usage":{"prompt_tokens":3}}', "id"),
        (
            MESSAGES,
            b'{"type":"message_start","message":{"model":"m","stop_reason":ODD,'
            b'"usage":{"input_tokens":3,"cache_read_input_tokens":ODD}}}',
            "u",
        ),
        (
            RESPONSES,
            b'{"type":"response.completed","response":{"model":"m","incomplete_details":ODD,'
            b'"usage":{"input_tokens":3,"output_tokens_details":ODD}}}',
            "u",
        ),
        (OLLAMA, b'{"model":"m","done":true,"done_reason":ODD,"prompt_eval_count":3}', "u"),
    ],
)
@pytest.mark.parametrize("keeps", [True, False])
def test_an_odd_member_is_left_out_alone(
    row: Endpoint, event: bytes, member: str, odd: bytes, keeps: bool
) -> None:
    """The other counts, the model and the marker are read."""
    seen = read(row, event.replace(b"ODD", odd), keeps=keeps)
    assert seen.usage(is_final=True).input_tokens == 3
    assert seen.model == "m"
    assert seen.error is None
    assert seen.has_ended == (row in (RESPONSES, OLLAMA))


def test_an_odd_choice_does_not_hide_the_others() -> None:
    """A list loses the items that do not fit."""
    event = b'{"choices":[7,{"finish_reason":[]},{"finish_reason":"stop"}],"usage":[]}'
    seen = read(CHAT, event)
    assert (seen.finish_reason, seen.is_odd) == ("stop", True)


def test_a_long_list_with_an_odd_item_is_cut() -> None:
    """So that no list costs much; the record says that something is missing."""
    seen = read(CHAT, b'{"choices":[%b7]}' % (b'{"finish_reason":"stop"},' * 100))
    assert (seen.finish_reason, seen.is_odd) == ("stop", True)


@pytest.mark.parametrize("keeps", [True, False])
def test_an_odd_member_does_not_hide_the_error(keeps: bool) -> None:
    """The error of the provider is found beside it, and within it."""
    event = b'{"usage":"","choices":{},"error":{"message":["m"],"code":5}}'
    seen = read(CHAT, event, keeps=keeps)
    assert seen.error is not None
    assert seen.error.kind == "5"


@pytest.mark.parametrize("count", [b"7.0", b"7", b"0.7e1"])
def test_a_whole_number_is_a_count_however_it_is_written(count: bytes) -> None:
    """Servers in Lua write all numbers with a point; nothing is lost."""
    seen = read(CHAT, b'{"usage":{"prompt_tokens":%b}}' % count)
    assert (seen.usage(is_final=True).input_tokens, seen.is_odd) == (7, False)


@pytest.mark.parametrize("count", [b"7.5", b"-1", b"-1.0", b"1e13", b"NaN", b"Infinity", b'"7"'])
def test_an_impossible_count_is_left_out(count: bytes) -> None:
    """It is no whole number, below zero, or larger than any count can be."""
    seen = read(CHAT, b'{"usage":{"prompt_tokens":%b,"completion_tokens":2}}' % count)
    usage = seen.usage(is_final=True)
    assert (usage.input_tokens, usage.output_tokens, seen.is_odd) == (None, 2, True)


# --- half a surrogate pair ------------------------------------------------------------------------

TEXTS = [
    (CHAT, b'{"model":"m","choices":[{"delta":{"content":"TEXT"}}],"usage":{"prompt_tokens":3}}'),
    (
        CHAT,
        b'{"model":"m","choices":[{"delta":{"content":[{"text":"TEXT"}]}}],"usage":{"prompt_tokens":3}}',
    ),
    (OLLAMA, b'{"model":"m","message":{"content":"TEXT"},"done":true,"prompt_eval_count":3}'),
    (
        MESSAGES,
        b'{"type":"content_block_delta","delta":{"type":"text_delta","text":"TEXT"}}',
    ),
    (RESPONSES, b'{"type":"response.output_text.delta","delta":"TEXT"}'),
]


@pytest.mark.parametrize(("row", "event"), TEXTS)
@pytest.mark.parametrize("keeps", [True, False])
def test_half_a_pair_hides_nothing(row: Endpoint, event: bytes, keeps: bool) -> None:
    """It is JSON by the letter: text and counts are read, and nothing is odd."""
    seen = read(row, event.replace(b"TEXT", b"a" + HALF + b"b"), keeps=keeps)
    assert seen.text == ("a\ufffdb" if keeps else "")
    assert not seen.is_odd
    if b"model" in event:
        assert (seen.model, seen.usage(is_final=True).input_tokens) == ("m", 3)


@pytest.mark.parametrize(("row", "event"), TEXTS)
def test_a_pair_that_two_events_share_is_one_character(row: Endpoint, event: bytes) -> None:
    """Servers cut strings of JavaScript between its halves; clients join them again."""
    seen = read(row, *(event.replace(b"TEXT", text) for text in (HALF, OTHER)), keeps=True)
    assert seen.text == "\U0001f600"


def test_half_a_pair_in_a_name() -> None:
    """Whatever is read can be written into a record."""
    event = b'{"id":"i%b","model":"m%b","choices":[{"finish_reason":"f%b"}],"error":"e%b"}'
    seen = read(CHAT, event % (HALF, HALF, HALF, HALF))
    names = [seen.response_id, seen.model, seen.finish_reason, seen.error and seen.error.message]
    assert names == ["i\ufffd", "m\ufffd", "f\ufffd", "e\ufffd"]
    msgspec.json.encode(names)


def test_half_a_pair_in_a_tools_arguments() -> None:
    """The call is held, with its arguments as text."""
    call = b'{"index":0,"id":"c","function":{"name":"f","arguments":%b}}'
    for arguments, text in (
        (b'"{%b}"' % HALF, "{\ufffd}"),
        (b'{"a": "%b"}' % HALF, '{"a":"\\ud83d"}'),
    ):
        event = b'{"choices":[{"delta":{"tool_calls":[%b]}}]}' % (call % arguments)
        (found,) = read(CHAT, event, keeps=True).tool_calls
        assert (found.id, found.name, found.arguments) == ("c", "f", text)


def test_half_a_pair_in_a_long_event() -> None:
    """The event is too long for the tolerant way, and read nevertheless; whole pairs are kept."""
    text = b"%b%b,%b,%b,%b%b%b" % (HALF, OTHER, HALF, OTHER, OTHER, HALF, OTHER)
    event = TEXTS[0][1].replace(
        b"TEXT", text.upper().replace(b"\\U", b"\\u") + text + b"x" * 300_000
    )
    seen = read(CHAT, event, keeps=True)
    once = "\U0001f600,\ufffd,\ufffd,\ufffd\U0001f600"
    assert seen.text.rstrip("x") == once * 2
    assert (seen.usage(is_final=True).input_tokens, seen.is_odd) == (3, False)
    many = event.replace(b"xxxxxx", HALF, 20_000)
    with pytest.raises(FAULTS):
        read(CHAT, many)


# --- what is no JSON ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "odd", [b"NaN", b"-Infinity", b'"a\nb"', b'"\xff"', b'"\x00"', b'"\xed\xa0\xbd"']
)
@pytest.mark.parametrize("keeps", [True, False])
def test_a_tolerant_reader_would_take_it(odd: bytes, keeps: bool) -> None:
    """The rest of the event is read; that the event is no JSON is said where it was in the way."""
    event = b'{"model":"m","usage":{"prompt_tokens":3},"choices":[{"delta":{"content":%b}}]}' % odd
    seen = read(CHAT, event, keeps=keeps)
    assert (seen.model, seen.usage(is_final=True).input_tokens) == ("m", 3)
    assert seen.is_odd or (b"\xff" in odd or b"\xed" in odd)


@pytest.mark.parametrize(
    "event", [b"{", b'{"usage":', b"[DONE]", b"7", b"[" * 100_000, b'{"a":' * 100_000, b"\xff"]
)
def test_what_no_reader_takes_raises(event: bytes) -> None:
    """One of the faults that the tap expects."""
    with pytest.raises(FAULTS):
        read(CHAT, event)


def test_a_long_odd_event_is_not_decoded() -> None:
    """It would hold up the reactor."""
    fits = b'{"usage":{"prompt_tokens":-1},"x":"%b"}' % (b"a" * (lenient._LONGEST - 100))
    assert read(CHAT, fits).is_odd
    with pytest.raises(msgspec.ValidationError):
        read(CHAT, fits.replace(b"aaa", b"a" * 103, 1))


def test_many_short_odd_events_are_not_decoded() -> None:
    """One read of a connection may bring ten thousand of them."""
    seen = read(CHAT, *[b'{"usage":""}'] * 256)
    row = CHAT
    assert row is not None
    with pytest.raises(msgspec.ValidationError):
        row.event(b'{"usage":""}', seen)
    row.event(b'{"usage":"","choices":[{"finish_reason":"stop","delta":{}}],"object":"x"}', seen)
    assert seen.finish_reason == "stop"


# --- the shapes -----------------------------------------------------------------------------------


def kinds_in(kind: Any) -> set[type]:
    """Return the kinds of all that a shape holds."""
    inner: list[Any] = []
    match kind:
        case inspect.StructType():
            inner = [field.type for field in kind.fields]
        case inspect.UnionType():
            inner = list(kind.types)
        case inspect.ListType():
            inner = [kind.item_type]
    return {type(kind)}.union(*map(kinds_in, inner))


def test_every_kind_of_member_can_be_fitted() -> None:
    """A new shape must not ask for a kind that the tolerant way does not know."""
    modules = (anthropic, ollama, openai, openai_responses)
    shapes = {
        one
        for module in modules
        for one in vars(module).values()
        if isinstance(one, type)
        and issubclass(one, msgspec.Struct)
        and one not in (Endpoint, Accumulated)
    }
    assert len(shapes) > 30
    known = {inspect.StructType, inspect.UnionType, inspect.ListType, inspect.IntType}
    found = set().union(*(kinds_in(inspect.type_info(one)) for one in shapes))
    assert found - known - {inspect.RawType} == set(lenient._PLAIN)


class Shape(msgspec.Struct):
    """Some members."""

    a: int | None = None
    b: list[str] | None = None
    c: msgspec.Raw = msgspec.Raw()


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=3),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from("abc"), inner, max_size=3)
    ),
    max_leaves=8,
)


@given(st.dictionaries(st.sampled_from("abc"), JSON))
def test_what_is_strict_json_is_read_the_same_way(value: Any) -> None:
    """Where the strict decoder takes a value, so does the tolerant one; else nothing is raised."""
    data = json.dumps(value).encode()
    try:
        strict = msgspec.json.decode(data, type=Shape)
    except FAULTS:
        seen = Accumulated(keeps=False, budget=0)
        decoder(Shape)(data, seen)
    else:
        found, is_whole = lenient.fitted(data, Shape)
        assert found is not None
        assert is_whole
        assert (found.a, found.b, raw_text(found.c)) == (strict.a, strict.b, raw_text(strict.c))


@given(st.sampled_from(list(TABLE.values())), st.binary(max_size=60), st.booleans())
def test_nothing_else_is_raised(row: Endpoint, data: bytes, keeps: bool) -> None:
    """Whatever bytes come, a reader raises nothing but what the tap expects."""
    for read_with in (row.event, row.document):
        for sent in (data, b'{"usage":' + data + b"}", b'{"type":"error",' + data + b"}"):
            try:
                read_with(sent, Accumulated(keeps=keeps, budget=100))
            except FAULTS:
                continue
