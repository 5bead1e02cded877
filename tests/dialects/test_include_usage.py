"""The option is added where it is wanted and readable, and no other byte changes."""

from __future__ import annotations

import json
import random
from itertools import takewhile
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmproxy.dialects.dialect import Dialect
from llmproxy.dialects.include_usage import OPTIONS_BYTES, usage_edit
from llmproxy.dialects.json_body import inspect_json
from llmproxy.dialects.json_spans import Edit, edited, finish
from tests.support.written_json import TEXT, VALUES, write

CHAT = b"/v1/chat/completions"
ADDED = b',"stream_options":{"include_usage":true}'


def asked(body: bytes, target: bytes = CHAT, dialect: Dialect = Dialect.OPENAI) -> bytes:
    """Return what a provider gets."""
    edit = finish(usage_edit(body, dialect, target))
    return body if edit is None else edited(body, [edit])


@pytest.mark.parametrize(
    ("before", "after"),
    [
        (b'{"stream":true}', b'{"stream":true%b}' % ADDED),
        (
            b' { "model":"m" ,\n"stream" :\ttrue ,"a":1.0e2}\n',
            b' { "model":"m" ,\n"stream" :\ttrue%b ,"a":1.0e2}\n' % ADDED,
        ),
        (b'{"str\\u0065am":true}', b'{"str\\u0065am":true%b}' % ADDED),
        (
            b'{"stream":true,"x":{"stream_options":{"include_usage":false}}}',
            b'{"stream":true%b,"x":{"stream_options":{"include_usage":false}}}' % ADDED,
        ),
        (
            b'{"stream_options": null,"stream":true}',
            b'{"stream_options": {"include_usage":true},"stream":true}',
        ),
        (
            b'{"stream_options":{},"stream":true}',
            b'{"stream_options":{"include_usage":true},"stream":true}',
        ),
        (
            b'{"stream_options":{ \n},"stream":true}',
            b'{"stream_options":{"include_usage":true \n},"stream":true}',
        ),
        (
            b'{"stream":true,"stream_options":{ "include_obfuscation" : false }}',
            b'{"stream":true,"stream_options":{"include_usage":true,'
            b' "include_obfuscation" : false }}',
        ),
        (
            b'{"stream":true,"stream\\u005foptions":{"include_usage": null}}',
            b'{"stream":true,"stream\\u005foptions":{"include_usage": true}}',
        ),
    ],
)
def test_option_is_added_in_place(before: bytes, after: bytes) -> None:
    """The object, the member or the value comes where it is missing, whatever is around."""
    assert asked(before) == after


@pytest.mark.parametrize(
    "body",
    [
        b'{"stream":true,"stream_options":{"include_usage":true}}',
        b'{"stream":true,"stream_options":{"include_usage":false}}',
        b'{"stream":true,"stream_options":{"include\\u005fusage":false}}',
        b'{"stream":false}',
        b'{"stream":null}',
        b'{"model":"m"}',
        b'{"STREAM":true}',
        b"{}",
        b"",
        b"[]",
        b'[{"stream":true}]',
    ],
)
def test_body_with_the_option_or_without_a_stream_stays(body: bytes) -> None:
    """The caller's true or false stays, and a response in one piece has its counts anyway."""
    assert asked(body) == body


@pytest.mark.parametrize(
    "body",
    [
        b'{"stream":true,"stream_options":[]}',
        b'{"stream":true,"stream_options":"include_usage"}',
        b'{"stream":true,"stream_options":true}',
        b'{"stream":true,"stream_options":1}',
        b'{"stream":true,"stream_options":{"include_usage":1}}',
        b'{"stream":true,"stream_options":{"include_usage":"true"}}',
        b'{"stream":true,"stream_options":{},"stream_options":{}}',
        b'{"stream":true,"stream_options":{},"stream\\u005foptions":null}',
        b'{"stream":true,"stream_options":{},"Stream_Options":{}}',
        b'{"stream":true,"Stream_Options":{}}',
        '{"stream":true,"ſtream_options":{}}'.encode(),
        b'{"stream":true,"stream_options":{"include_usage":null,"include_usage":null}}',
        b'{"stream":true,"stream_options":{"INCLUDE_USAGE":true}}',
        b'{"stream":true,"stream":true}',
        b'{"stream":true',
        b'{"stream":true,}',
        b'{"stream":true}\x1f\x8b',
        b"\x1f\x8b\x08",
        b"[" * 100_000,
    ],
    ids=lambda body: body[:60].decode("latin-1"),
)
def test_body_that_can_be_read_in_two_ways_stays(body: bytes) -> None:
    """The provider judges what is misshapen, stands there twice or is not JSON."""
    assert asked(body) == body


@pytest.mark.parametrize(
    "target",
    [
        CHAT,
        b"/v1/completions",
        b"/chat/completions",
        b"/completions",
        b"/openai/v1/chat/completions?api-version=1",
        b"/api/paas/v4/completions",
        b"/openai/deployments/gpt%2D4/chat/completions?api-version=2024-10-21",
        b"/openai/deployments/gpt/completions",
    ],
)
def test_both_endpoints_are_known_wherever_they_stand(target: bytes) -> None:
    """A prefix, a deployment and a query change nothing."""
    assert asked(b'{"stream":true}', target) == b'{"stream":true%b}' % ADDED


@pytest.mark.parametrize(
    "target",
    [
        b"/v1/responses",
        b"/v1/embeddings",
        b"/v1/audio/transcriptions",
        b"/v1/messages",
        b"/v1/chat/completions/chatcmpl-1",
        b"/v1/chat/completions/",
        b"/v1/fim/completions",
        b"/v1/xchat/completions",
        b"/v1/mycompletions",
        b"/deployments/completions",
        b"/?/v1/chat/completions",
        b"/",
        b"*",
    ],
)
def test_other_endpoints_are_left_alone(target: bytes) -> None:
    """Other endpoints report their counts anyway, or may refuse a member that they do not know."""
    assert asked(b'{"stream":true}', target) == b'{"stream":true}'


@pytest.mark.parametrize("dialect", [d for d in Dialect if d is not Dialect.OPENAI])
def test_other_dialects_are_left_alone(dialect: Dialect) -> None:
    """No other dialect knows the option, whatever the path says."""
    assert asked(b'{"stream":true}', dialect=dialect) == b'{"stream":true}'


def test_options_of_many_bytes_are_left_alone() -> None:
    """They would have to be read in one step; no API has such options."""
    for size in (OPTIONS_BYTES - 8, OPTIONS_BYTES - 7):
        body = b'{"stream":true,"stream_options":{"x":"%b"}}' % (b"x" * size)
        assert (asked(body) == body) is (size + 8 > OPTIONS_BYTES)


_OPTIONS = st.fixed_dictionaries(
    {}, optional={"include_usage": VALUES | st.booleans(), "x": VALUES}
)
_BODIES = st.fixed_dictionaries(
    {"stream": st.just(True)},
    optional={
        "stream_options": st.none() | _OPTIONS | VALUES,
        "model": TEXT,
        "x": VALUES,
        "messages": st.lists(VALUES, max_size=3),
    },
).flatmap(lambda value: st.permutations(list(value.items())).map(dict))


def with_option(value: dict[str, Any]) -> dict[str, Any]:
    """Return what a body should say afterwards."""
    options = value.get("stream_options")
    if options is not None and not isinstance(options, dict):
        return value
    if (options or {}).get("include_usage") is not None:
        return value
    return {**value, "stream_options": {**(options or {}), "include_usage": True}}


def shared(one: bytes, other: bytes) -> int:
    """Return how many bytes two bodies have in common at their beginning."""
    return sum(1 for _ in takewhile(lambda two: two[0] == two[1], zip(one, other, strict=False)))


@given(_BODIES, st.randoms(use_true_random=False))
def test_any_body_says_the_same_and_the_option(value: dict[str, Any], rng: random.Random) -> None:
    """Parsed, nothing but the option is new; as bytes, nothing was taken away but a null."""
    before = write(value, rng).encode()
    after = asked(before)

    assert json.loads(after) == with_option(value)
    assert asked(after) == after
    start = shared(before, after)
    end = min(shared(before[::-1], after[::-1]), len(before) - start)
    assert before[start : len(before) - end] in (b"", b"null")
    assert len(after) - start - end <= len(ADDED)


@given(_BODIES, st.randoms(use_true_random=False), TEXT)
def test_option_goes_with_an_override(
    value: dict[str, Any], rng: random.Random, model: str
) -> None:
    """Both are done at once, in either order in the body, as if one after the other."""
    value = {**value, "model": "old"}
    before = write(value, rng).encode()
    span = inspect_json(before).model_span
    assert span is not None
    edits = [Edit(span, json.dumps(model).encode())]
    overridden = edited(before, edits)
    if (usage := finish(usage_edit(before, Dialect.OPENAI, CHAT))) is not None:
        edits.append(usage)

    assert edited(before, edits) == asked(overridden)
    assert json.loads(edited(before, edits)) == {**json.loads(asked(before)), "model": model}


@given(st.binary(max_size=80) | st.binary(max_size=40).map(lambda b: b'{"stream":true,' + b))
def test_any_bytes_give_a_body(body: bytes) -> None:
    """No bytes raise, and what is not JSON comes back as it was."""
    after = asked(body)
    try:
        json.loads(body)
    except ValueError:
        assert after == body
