"""A body is read as every provider would read it, or refused; and only the model's bytes change."""

from __future__ import annotations

import json
import random
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from types import FrameType
from typing import Any
from unittest.mock import patch

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmproxy.dialects import json_spans
from llmproxy.dialects.json_body import (
    MODEL_BYTES,
    JsonFacts,
    all_facts,
    inspect_json,
    is_json,
    plain_facts,
)
from llmproxy.dialects.json_spans import (
    DEPTH,
    NUMBER_BYTES,
    ROUNDS,
    BodyError,
    Edit,
    Span,
    edited,
    finish,
)
from tests.support.written_json import KEYS, TEXT, VALUES, write


def replace_model(body: bytes, span: Span, model: str) -> bytes:
    """Return the body with another model at a span."""
    return edited(body, [Edit(span, json.dumps(model, ensure_ascii=False).encode())])


# --- a JSON body ---------------------------------------------------------------------------------


def test_the_span_is_the_bytes_of_the_value() -> None:
    """The span of `model` holds the value alone, whatever whitespace is around."""
    body = b' \t{ "a" : [1, {"model": "no"}],\r\n"model"\n:\t"gpt-4" , "stream" :true\n} '

    facts = inspect_json(body)

    assert facts.model == "gpt-4"
    assert facts.stream is True
    assert facts.model_span is not None
    assert body[slice(*facts.model_span)] == b'"gpt-4"'


@pytest.mark.parametrize(
    "body", [b"", b"[]", b'["model"]', b'"model"', b"1", b"null", b"{}", b'{"x":1,"STREAM":2}']
)
def test_a_body_that_names_nothing_has_no_facts(body: bytes) -> None:
    """A body without the two members names nothing."""
    assert inspect_json(body) == JsonFacts()


@pytest.mark.parametrize(
    "body", [b'{"Model":1}', b'{"x":{"model":"a"},"MODEL":"b"}', b'{"\\u004dodel":"c"}']
)
def test_a_model_in_another_case_is_told(body: bytes) -> None:
    """Go's encoding/json takes it for the model, other readers do not."""
    assert inspect_json(body) == JsonFacts(is_misspelt=True)
    for other in (b'{"x":"Model"}', b'{"x":{"Model":1}}', b'{"Models":1}'):
        assert inspect_json(other) == JsonFacts()


def test_null_names_nothing_but_has_a_span() -> None:
    """A null model can be overridden, and a null stream counts as absent."""
    assert inspect_json(b'{"model":null,"stream":null}') == JsonFacts(None, Span(9, 13), None)


@pytest.mark.parametrize(
    ("body", "model"),
    [
        (b'{"model":""}', ""),
        (b'{"a":1,"a":2,"model":"m"}', "m"),
        (b'{"model":"m","x":{"model":1,"model":2}}', "m"),
        (rb'{"model":"\ud83d\ude00","x":"\ud83d"}', "\U0001f600"),
    ],
)
def test_the_model_is_the_value_at_the_top(body: bytes, model: str) -> None:
    """An empty name is a name, other and deeper names may repeat, and escapes are read in pairs."""
    assert inspect_json(body).model == model


@pytest.mark.parametrize(
    "name", [rb"mod\u0065l", rb"\u006d\u006F\u0064\u0065\u006C", rb"model"], ids=repr
)
def test_a_name_is_compared_after_unescaping(name: bytes) -> None:
    """A member whose name is written with escapes is the member it reads as."""
    facts = inspect_json(b'{"%b":"a"}' % name)

    assert facts.model == "a"
    assert facts.model_span == Span(len(name) + 4, len(name) + 7)


@pytest.mark.parametrize(
    "body",
    [
        b'{"model":"a","model":"a"}',
        rb'{"model":"a","mod\u0065l":"b"}',
        rb'{"model":"a","x":{},"\u006dodel":null}',
        b'{"model":"a","Model":"b"}',
        b'{"MODEL":"a","Model":"b"}',
        b'{"stream":true,"stream":true}',
        rb'{"stream":true,"strea\u006d":false}',
        '{"stream":true,"\u017ftream":false}'.encode(),
        rb'{"stream":true,"\u017ftream":false}',
        '{"stream":true,"\ufb06ream":false}'.encode(),
        rb'{"x":"\ud800","model":"a","mod\u0065l":"b"}',
    ],
)
def test_a_name_twice_at_the_top_is_refused(body: bytes) -> None:
    """Two members that any reader takes for one, by escapes or by case, are an error."""
    with pytest.raises(BodyError, match=r'two "(model|stream)" members'):
        inspect_json(body)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *((b"model", value) for value in (b"1", b"true", b"[]", b'["a"]', b"{}", b'{"a":"b"}')),
        *((b"stream", value) for value in (b"1", b"0", b'"true"', b"[]", b'{"a":true}')),
    ],
)
def test_a_value_of_another_type_is_refused(name: bytes, value: bytes) -> None:
    """A model is a string or null, and a stream is true, false or null."""
    words = {b"model": '"model" must be a string', b"stream": '"stream" must be true or false'}
    with pytest.raises(BodyError, match=words[name]):
        inspect_json(b'{"%b":%b}' % (name, value))


@pytest.mark.parametrize(
    "body",
    [
        b" ",
        b"{",
        b'{"model":"a"',
        b'{"model":"a"}}',
        b'{"model":"a"} x',
        b'{"model":"a"}{"model":"b"}',
        b'{"model":"a",}',
        b'{"model" "a"}',
        b'{model:"a"}',
        b"{'model':'a'}",
        b'{"model":"a" "stream":true}',
        b'{"model":"a","x":[1,2}',
        b'{"x":[1,]}',
        b'{"x":"',
        b'{"x":"\\"}',
        b'{"x":"\\x"}',
        b'{"x":"\\u12"}',
        b'{"x":"\\ud8"}',
        b'{"x":"\n"}',
        b'{"x":"\x00"}',
        b'{"x":01}',
        b'{"x":1.}',
        b'{"x":+1}',
        b'{"x":NaN}',
        b'{"x":-Infinity}',
        b'{"x":True}',
        b'{"x":1}//',
        b'\x0b{"x":1}',
        b'\x0c{"x":1}',
        b'{"x":\xc2\xa01}',
        b"\x00",
        '{"x":1}'.encode("utf-16-le"),
        '{"x":1}'.encode("utf-32-be"),
        rb"{\\ud800:1}",
    ],
)
def test_what_is_no_json_is_refused(body: bytes) -> None:
    """Only the grammar of RFC 8259 is accepted, all the way to the last byte."""
    with pytest.raises(BodyError, match="not valid JSON"):
        inspect_json(body)


def test_a_byte_order_mark_is_refused() -> None:
    """RFC 8259 forbids to send one, and readers differ in ignoring it."""
    with pytest.raises(BodyError, match="byte order mark"):
        inspect_json(b'\xef\xbb\xbf{"model":"a"}')


@pytest.mark.parametrize(
    "text", [b"\xff", b"\xc3", b"\xed\xa0\x80", b"\xc0\xaf", b"\xf4\x90\x80\x80"], ids=repr
)
@pytest.mark.parametrize("body", [b'{"x":"%b"}', b'{"%b":1}', b'["%b"]'], ids=repr)
def test_what_is_no_utf8_is_refused(body: bytes, text: bytes) -> None:
    """Every string of the body is UTF-8, in names and values that nobody looks at too."""
    with pytest.raises(BodyError, match="not UTF-8"):
        inspect_json(body % text)


@pytest.mark.parametrize("before", range(65_530, 65_538))
def test_utf8_is_checked_across_slices(before: int) -> None:
    """A character that two slices share is whole, and half of one at the end is not."""
    head = b'{"x":"' + b"a" * (before - 6)

    assert inspect_json(head + "\U0001f600".encode() + b'"}') == JsonFacts()
    with pytest.raises(BodyError, match="not UTF-8"):
        inspect_json(head + b"\xf0\x9f\x98")


@pytest.mark.parametrize(
    ("opening", "closing"), [(b"[", b"]"), (b'{"[":', b"}"), (b'[{"\\"]":', b"}]")], ids=repr
)
def test_nesting_is_bounded(opening: bytes, closing: bytes) -> None:
    """As many levels as the bound are accepted and one more is refused, not by a RecursionError."""
    count = DEPTH // len(closing)
    body = opening * count + b"1" + closing * count

    assert inspect_json(body) == JsonFacts()
    with pytest.raises(BodyError, match="arrays and objects in each other"):
        inspect_json(b"[" + body + b"]")


@pytest.mark.parametrize(
    "deep", [b"[" * 100_000, b'{"a":' * 100_000, b"[" * 10_000 + b"]" * 10_000]
)
def test_hostile_nesting_is_refused_in_words(deep: bytes) -> None:
    """Nesting that would end a recursive reader is a BodyError."""
    with pytest.raises(BodyError):
        inspect_json(deep)


def test_many_siblings_are_not_deep() -> None:
    """More brackets than the bound are fine as long as they close again."""
    body = b'{"x":[' + b'{"[":"]{\\"[\\\\"},' * 2000 + b'[]],"model":"m"}'

    assert inspect_json(body).model == "m"


@pytest.mark.parametrize(("opening", "closing"), [(b"[", b"]"), (b'{"a":', b"}")], ids=repr)
def test_nesting_is_bounded_on_the_short_way(opening: bytes, closing: bytes) -> None:
    """An object that C code could read in one pass may not nest more than others."""
    for count in (DEPTH - 1, DEPTH):
        body = b'{"model":"m","x":' + opening * count + b"1" + closing * count + b"}"
        assert len(body) < 10_000
        if count < DEPTH:
            assert inspect_json(body).model == "m"
        else:
            with pytest.raises(BodyError, match="arrays and objects in each other"):
                inspect_json(body)


def test_many_members_at_the_top_are_read() -> None:
    """Their number is not bounded; those that might be ours are read one by one."""
    for name in (b"", b"a", b"m", b"\\u006f", "é".encode()):
        body = b"{" + b'"%b":0,' % name * 100_000

        assert inspect_json(body + b'"model":"m"}').model == "m"
        with pytest.raises(BodyError, match="two"):
            inspect_json(body + b'"model":"m","mod\\u0065l":1}')


@pytest.mark.parametrize(
    "body",
    [
        b"{" + b'"a":[{"b":"c"}],' * 100_000 + b'"z":1}',
        b'{"x":[' + b'{"a":[{"b":"c"}]},' * 100_000 + b"1]}",
        b'{"x":{"y":{' + b'"a":[{"b":"c"}],' * 100_000 + b'"z":1}}}',
    ],
    ids=len,
)
def test_what_nests_little_is_read_in_runs(body: bytes) -> None:
    """A pattern takes a slice full of members or elements at once."""
    assert sum(1 for _ in all_facts(body)) < len(body) / 2000


def test_what_python_code_reads_one_by_one_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """A body that nests in more places than any API needs is refused."""
    monkeypatch.setattr(json_spans, "ROUNDS", 100)
    deep = b"[[[[[1],1],1],1],1],"

    assert finish(all_facts(b'{"x":[' + deep * 5 + b"1]}")) == JsonFacts()
    with pytest.raises(BodyError, match="too many places"):
        finish(all_facts(b'{"x":[' + deep * 100 + b"1]}"))
    assert ROUNDS == 1_000_000


def test_a_number_is_bounded() -> None:
    """One that is longer than what CPython's own reader takes is refused."""
    for size, good in ((5000, True), (NUMBER_BYTES, False), (10 * NUMBER_BYTES, False)):
        body = b'{"x":' + b"1" * size + b',"model":"m"}'
        if good:
            assert finish(all_facts(body)).model == "m"
        else:
            with pytest.raises(BodyError, match="number"):
                finish(all_facts(body))


def test_a_models_name_is_bounded() -> None:
    """A name is counted in bytes of UTF-8, after unescaping."""
    assert inspect_json(b'{"model":"%b"}' % (rb"\u0061" * MODEL_BYTES)).model == "a" * MODEL_BYTES
    with pytest.raises(BodyError, match="longer than"):
        inspect_json(b'{"model":"%b"}' % ("é".encode() * (MODEL_BYTES // 2) + b"a"))


@pytest.mark.parametrize("half", [rb"\ud800", rb"\uDFFF", rb"\udc00\ud800", rb"\\\ud83d"], ids=repr)
def test_half_a_surrogate_pair_is_let_through_outside_the_model(half: bytes) -> None:
    """The provider judges half an emoji in a message; a model's name must be text."""
    facts = inspect_json(rb'{"%b":"%b","mod\u0065l":"a"}' % (half, half))

    assert facts.model == "a"
    with pytest.raises(BodyError, match="whole characters"):
        inspect_json(b'{"model":"%b"}' % half)


@pytest.mark.parametrize(
    "name", [rb"mod\ud865l", rb"mod\uD065l", rb"mod\ud065l", rb"mod\\u0065l", rb"\ud86dodel"]
)
def test_no_name_becomes_ours_by_its_surrogates(name: bytes) -> None:
    """What stands in for half a surrogate pair spells neither `model` nor `stream`."""
    assert inspect_json(rb'{"%b":"a","x":"\ud800"}' % name) == JsonFacts()


def test_a_deep_stack_of_our_own_is_no_internal_error() -> None:
    """Where few frames are left, a nested body is refused in words."""

    def descend(frames: int) -> JsonFacts:
        return descend(frames - 1) if frames else inspect_json(b"[" * 300 + b"]" * 300)

    depth = 0
    frame: FrameType | None = sys._getframe()
    while frame is not None:
        depth, frame = depth + 1, frame.f_back
    left = sys.getrecursionlimit() - depth
    said = "too deeply"  # some versions of Python count the frames of C apart
    try:
        descend(left - 100)
    except BodyError as error:
        said = str(error)
    assert "too deeply" in said


@pytest.mark.parametrize(
    "body", [b'{"model":"SECRET","model":1}', b'{"SECRET', b'{"model":["SECRET"]}', b'{"x":SECRET}']
)
def test_an_error_repeats_no_content(body: bytes) -> None:
    """What the caller sent does not come back in the sentence that refuses it."""
    with pytest.raises(BodyError) as caught:
        inspect_json(body)

    assert "SECRET" not in str(caught.value)
    assert caught.value.__cause__ is None


# --- for any body --------------------------------------------------------------------------------

_OBJECTS = st.fixed_dictionaries(
    {},
    optional={
        "model": st.none() | TEXT,
        "stream": st.none() | st.booleans(),
        "x": VALUES,
        "y": VALUES,
    },
).flatmap(lambda value: st.permutations(list(value.items())).map(dict))


@given(_OBJECTS, st.randoms(use_true_random=False), TEXT)
def test_facts_and_replacement_agree_with_a_usual_parser(
    value: dict[str, Any], rng: random.Random, model: str
) -> None:
    """Spans hold what json.loads reads, and a replacement changes that value and no other byte."""
    body = write(value, rng).encode()

    facts = inspect_json(body)

    span = facts.model_span
    assert (span is not None) == ("model" in value)
    assert (facts.model, facts.stream) == (value.get("model"), value.get("stream"))
    assert span is None or json.loads(body[slice(*span)]) == facts.model
    if facts.model_span is not None:
        start, end = facts.model_span
        replaced = replace_model(body, facts.model_span, model)
        assert replaced.startswith(body[:start])
        assert replaced.endswith(body[end:])
        assert json.loads(replaced[start : len(replaced) - len(body) + end]) == model
        assert json.loads(replaced) == {**value, "model": model}
        assert inspect_json(replaced).model == model


def _refuse(constant: str) -> None:
    raise ValueError(constant)


def _loads(body: bytes) -> list[tuple[str, Any]] | None:
    """Read UTF-8 JSON without NaN and Infinity: the top's members, or None where it is none."""
    try:
        json.loads(body.decode(), parse_constant=_refuse)
        pairs = json.loads(body.decode(), object_pairs_hook=tuple)
    except (ValueError, RecursionError):
        return None
    return list(pairs) if body.strip().startswith(b"{") else []


def _is_ours(pairs: list[tuple[str, Any]]) -> bool:
    """Whether the two names are single and hold what they may hold."""
    folded = [name.casefold() for name, _ in pairs]
    values = dict(pairs)
    model, stream = values.get("model"), values.get("stream")
    return (
        max(folded.count("model"), folded.count("stream")) < 2
        and (model is None or (isinstance(model, str) and model.isascii()))
        and (stream is None or isinstance(stream, bool))
    )


_PIECES = st.sampled_from(
    [
        *'{}[],:"\\ \n\t\r\x00\x0b\xff0-.e+/',
        *('"model"', '"stream"', r'"mod\u0065l"', r'"mod\ud865l"', '"a"', '"\xe9"', "\xc3\xa9"),
        *(r"\ud83d", r"\ude00", r"\u00", r"\"", r"\\", "true", "false", "null", "NaN"),
    ]
).map(lambda piece: piece.encode("latin-1"))


def _assert_read_alike(body: bytes) -> None:
    for read in (inspect_json, lambda text: finish(all_facts(text)) if text else JsonFacts()):
        _assert_read_by(read, body)


def _assert_read_by(read: Callable[[bytes], JsonFacts], body: bytes) -> None:
    pairs = _loads(body) if body else []
    try:
        facts = read(body)
    except BodyError:
        assert pairs is None or not _is_ours(pairs) or body.startswith(b"\xef\xbb\xbf")
    else:
        assert pairs is not None
        assert (facts.model, facts.stream) == (dict(pairs).get("model"), dict(pairs).get("stream"))
        assert (facts.model_span is not None) == ("model" in dict(pairs))
        if facts.model_span is not None:
            changed = [(name, "new" if name == "model" else value) for name, value in pairs]
            assert _loads(replace_model(body, facts.model_span, "new")) == changed


@given(st.binary(max_size=40) | st.lists(_PIECES, max_size=14).map(b"".join))
def test_any_bytes_are_read_as_json_loads_reads_them(body: bytes) -> None:
    """We accept what json.loads accepts, where the names are single and fitting, and no more."""
    _assert_read_alike(body)


@given(
    st.dictionaries(KEYS, VALUES, max_size=4) | _OBJECTS,
    st.randoms(use_true_random=False),
    st.lists(st.tuples(st.integers(0, 200), st.integers(0, 2), _PIECES | st.just(b"")), max_size=2),
)
def test_damaged_json_is_read_as_json_loads_reads_it(
    value: dict[str, Any], rng: random.Random, edits: list[tuple[int, int, bytes]]
) -> None:
    """After a deletion or an insertion at any point, we and a usual parser read the same."""
    body = write(value, rng).encode()
    for at, length, piece in edits:
        body = body[:at] + piece + body[at + length :]

    _assert_read_alike(body)


def _nesting(value: Any) -> int:
    inner = (
        value.values() if isinstance(value, dict) else value if isinstance(value, list) else None
    )
    return 0 if inner is None else 1 + max(map(_nesting, inner), default=0)


@given(VALUES, st.randoms(use_true_random=False))
def test_depth_is_that_of_the_value(value: Any, rng: random.Random) -> None:
    """The levels are counted exactly, whatever brackets and quotes the strings hold."""
    left = DEPTH - _nesting(value)
    deepest = b"[" * left + write(value, rng).encode() + b"]" * left

    assert inspect_json(deepest) == JsonFacts()
    with pytest.raises(BodyError, match="arrays and objects in each other"):
        inspect_json(b"[" + deepest + b"]")


_HOSTILE = [
    (b'{"x":"', b"A", b'"}'),
    (b'{"x":"', b"\\\\", b'"}'),
    (b'{"x":"', b'\\"', b'"}'),
    (b'{"x":"', b"\\", b""),
    (b'{"x":"', b"\\ud800", b'"}'),
    (b'{"x":"', "é".encode(), b'"}'),
    (b'{"x":[', b"[],", b"1]}"),
    (b'{"x":[', b'["["],', b"1]}"),
    (b'{"x":[', b"[[[[[]]]]],", b"1]}"),
    (b'{"x":[', b'{"a":{"a":{"a":{"a":{"a":1}}}}},', b"1]}"),
    (b'{"x":[', b"[" * 500 + b"]" * 500 + b",", b"1]}"),
    (b'{"x":[', b"1,", b"1]}"),
    (b'{"x":', b"1", b"}"),
    (b"", b"[", b""),
    (b"", b'{"":', b""),
    (b"", b'{"%b":' % (b"a" * 9000), b""),
    (b"", b'"', b""),
    (b"", b" ", b"{}"),
    (b"{", b" ", b"}"),
    (b'{"x":1', b" ", b"}"),
    (b'{"model":"', b"a", b'"}'),
    (b'{"', b"a", b'":1}'),
    (b"{", b'"":0,', b'"a":1}'),
    (b"{", b'"m":0,', b'"a":1}'),
    (b"{", b'"model":{},', b'"a":1}'),
]


@pytest.mark.parametrize(("head", "unit", "tail"), _HOSTILE, ids=lambda part: repr(part[:16]))
def test_a_step_is_short_whatever_the_body(head: bytes, unit: bytes, tail: bytes) -> None:
    """No pattern takes more than a slice: a body of four megabytes takes steps of milliseconds."""
    body = head + unit * (4_000_000 // len(unit)) + tail
    longest, steps, before = 0.0, 0, time.thread_time()
    with suppress(BodyError):
        for _ in all_facts(body):
            now = time.thread_time()
            longest, before, steps = max(longest, now - before), now, steps + 1
    assert max(longest, time.thread_time() - before) < 0.25  # mostly some milliseconds
    assert steps < 2 * ROUNDS


@given(
    st.dictionaries(KEYS, VALUES, max_size=4),
    st.randoms(use_true_random=False),
    st.sampled_from([8, 9, 10, 13, 50]),
)
def test_slices_change_nothing(value: dict[str, Any], rng: random.Random, size: int) -> None:
    """However short the slices are, a body is read as in one piece."""
    body = write(value, rng).encode()

    def read() -> JsonFacts | str:
        try:
            return finish(all_facts(body))
        except BodyError as error:
            return str(error)

    whole = read()
    with patch.object(json_spans, "_SLICE", size):
        assert read() == whole


@given(_OBJECTS, st.randoms(use_true_random=False))
def test_the_short_way_reads_what_the_long_way_reads(
    value: dict[str, Any], rng: random.Random
) -> None:
    """C code in one pass and patterns in steps agree, wherever the first gives an answer."""
    body = write(value, rng).encode()
    facts = plain_facts(body)
    assert facts is None or facts == finish(all_facts(body))


def test_a_usual_body_takes_the_short_way() -> None:
    """What SDKs send is read in one pass of C code, in any language."""
    head = (
        '{"model":"m","stream":true,"messages":[{"content":"say \\"hi\\" \N{SNOWMAN}"}],'.encode()
    )
    for members in (20, 2000):
        assert plain_facts(head + b'"a":0,' * members + b'"b":1}') is not None


# --- replacing -----------------------------------------------------------------------------------


@pytest.mark.parametrize("old", [b'"gpt-4"', rb'"\u0067"', b'""', b"null"])
def test_a_replacement_leaves_every_other_byte_alone(old: bytes) -> None:
    """Whitespace, escapes, order and number formats of the rest stay as they were."""
    head, tail = b'\n{ "a":1.50,"mod\\u0065l" : ', b'\t, "b":"\\u00e9\\/" }\n'
    span = inspect_json(head + old + tail).model_span
    assert span is not None

    assert (
        replace_model(head + old + tail, span, 'é"\\\n') == head + '"é\\"\\\\\\n"'.encode() + tail
    )


# --- types ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("content_type", "known"),
    [
        (b"application/json", True),
        (b"Application/JSON; charset=utf-8", True),
        (b"application/json;", True),
        (b" application/problem+json ;x", True),
        (b"application/vnd.api+JSON", True),
        (None, False),
        (b"", False),
        (b"application/jsonl", False),
        (b"application/x-ndjson", False),
        (b"text/json", False),
        (b"application/+json", False),
        (b"text/x+json", False),
        (b"application/xml; a=application/json", False),
    ],
)
def test_json_types_are_known(content_type: bytes | None, known: bool) -> None:
    """Both forms count in any case and with any parameters; types that look alike do not."""
    assert is_json(content_type) is known
