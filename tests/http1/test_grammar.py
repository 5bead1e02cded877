"""The grammar of HTTP: valid lines are read; invalid ones are refused and never repaired."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmproxy.http1 import grammar
from llmproxy.http1.grammar import (
    MAX_FIELDS,
    MAX_LINE,
    BadMessage,
    RequestHead,
    field_values,
    list_tokens,
    parse_fields,
    parse_known_fields,
    parse_length,
    parse_request_head,
    parse_status_line,
)

# --- status lines ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        (b"HTTP/1.1 200 OK", (1, 200)),
        (b"HTTP/1.0 404 Not Found", (0, 404)),
        (b"HTTP/1.1 204 ", (1, 204)),
        (b"HTTP/1.1 599", (1, 599)),
        (b"HTTP/1.1 100 \xe4\tx", (1, 100)),
    ],
)
def test_status_lines(line: bytes, expected: tuple[int, int]) -> None:
    """Version and status are read, with any phrase or none."""
    assert parse_status_line(line) == expected


@pytest.mark.parametrize(
    "line",
    [
        b"",
        b"HTTP/1.1",
        b"HTTP/1.1 20",
        b"HTTP/1.1 2000 OK",
        b"HTTP/1.1 2_0 OK",
        b"HTTP/1.1 -20 OK",
        b"HTTP/1.1 +20 OK",
        b"HTTP/1.1 099 OK",
        b"HTTP/1.1 600 OK",
        b"HTTP/1.1  200 OK",
        b"HTTP/1.1\t200 OK",
        b"HTTP/1.1 200OK",
        b"HTTP/1.2 200 OK",
        b"HTTP/2.0 200 OK",
        b"HTTP/11.1 200 OK",
        b"http/1.1 200 OK",
        b" HTTP/1.1 200 OK",
        b"HTTP/1.1 200 O\rK",
        b"HTTP/1.1 200 O\nK",
        b"HTTP/1.1 200 O\0K",
        b"HTTP/1.1 200 O\x7fK",
        "HTTP/1.1 ٢٠٠ OK".encode(),
    ],
)
def test_invalid_status_lines_are_refused(line: bytes) -> None:
    """Signs, other digits, spaces, control characters and other versions are not repaired."""
    with pytest.raises(BadMessage):
        parse_status_line(line)


# --- request heads --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("head", "expected"),
    [
        (b"GET / HTTP/1.1\r\nHost: h", (b"GET", b"/", 1, [(b"host", b"h")])),
        (b"GET / HTTP/1.0", (b"GET", b"/", 0, [])),
        (b"GET / HTTP/1.0\r\nHost: [::1]:8080", (b"GET", b"/", 0, [(b"host", b"[::1]:8080")])),
        (b"x-Y!1 * HTTP/1.1\r\nhost:", (b"x-Y!1", b"*", 1, [(b"host", b"")])),
        (
            b'POST /a%2f{x}|"?b?%zz HTTP/1.1\r\nHost: a.b:1\r\nX: y',
            (b"POST", b'/a%2f{x}|"?b?%zz', 1, [(b"host", b"a.b:1"), (b"x", b"y")]),
        ),
    ],
)
def test_request_heads(
    head: bytes, expected: tuple[bytes, bytes, int, list[tuple[bytes, bytes]]]
) -> None:
    """The first line has method, target and version; the target is raw."""
    assert parse_request_head(head) == RequestHead(*expected, dict(expected[3]))


@pytest.mark.parametrize(
    ("head", "status"),
    [
        (b"", 400),
        (b"GET /", 400),
        (b"GET  / HTTP/1.1\r\nHost: h", 400),
        (b"GET\t/ HTTP/1.1\r\nHost: h", 400),
        (b"GET / HTTP/1.1 \r\nHost: h", 400),
        (b" GET / HTTP/1.1\r\nHost: h", 400),
        (b"GET / /HTTP/1.1\r\nHost: h", 400),
        (b"G(T / HTTP/1.1\r\nHost: h", 400),
        (b"GET /#x HTTP/1.1\r\nHost: h", 400),
        (b"GET /\x7f HTTP/1.1\r\nHost: h", 400),
        (b"GET /\xe4 HTTP/1.1\r\nHost: h", 400),
        (b"GET /\0 HTTP/1.1\r\nHost: h", 400),
        (b"GET / http/1.1\r\nHost: h", 400),
        (b"GET / HTTP/1.\r\nHost: h", 400),
        (b"GET / HTTP/0.9\r\nHost: h", 505),
        (b"GET / HTTP/1.2\r\nHost: h", 505),
        (b"GET / HTTP/2.0\r\nHost: h", 505),
        (b"GET / HTTP/1.1", 400),
        (b"GET / HTTP/1.1\r\nHost: h\r\nHost: h", 400),
        (b"GET / HTTP/1.0\r\nHost: h\r\nHost: h", 400),
        (b"GET / HTTP/1.1\r\nHost: h/x", 400),
        (b"GET / HTTP/1.1\r\nHost: a b", 400),
        (b"GET / HTTP/1.1\r\nHost: user@h", 400),
        (b"GET / HTTP/1.1\r\nHost: h:80x", 400),
        (b"GET / HTTP/1.1\r\nHost: a, b:1:2", 400),
        (b"GET / HTTP/1.1\r\n folded: x\r\nHost: h", 400),
        (b"GET / HTTP/1.1\r\nHost: h\r\nA: b\r\n folded", 400),
        (b"GET / HTTP/1.1\r\nHost : h", 400),
        (b"GET / HTTP/1.1\nHost: h", 400),
        (b"GET / HTTP/1.1\r\nHost: h\nX: y", 400),
        (b"GET / HTTP/1.1\r\nHost: h\r\nX: a\0", 400),
        (b"POST / HTTP/1.1\r\nContent-Type: a/b\r\nHost: h\r\ncontent-type: a/b", 400),
        (b"POST / HTTP/1.1\r\nHost: h\r\nContent-Type: a/b\r\nX: y\r\nContent-Type:", 400),
        (b"GET / HTTP/1.1\r\nHost: h" + b"\r\na: b" * MAX_FIELDS, 431),
    ],
)
def test_invalid_request_heads_are_refused(head: bytes, status: int) -> None:
    """The error has the status of the response."""
    with pytest.raises(BadMessage) as caught:
        parse_request_head(head)

    assert caught.value.status == status


# --- fields ---------------------------------------------------------------------------------------


def test_fields_keep_order_and_bytes() -> None:
    """Names are in lower case, values lose the white space around, and nothing else changes."""
    lines = [b"X-B: 1", b"a:", b"X-b:\t 2 3 \t", b"!#$%&'*+-.^_`|~09:\xff:\x80"]

    assert parse_fields(lines) == [
        (b"x-b", b"1"),
        (b"a", b""),
        (b"x-b", b"2 3"),
        (b"!#$%&'*+-.^_`|~09", b"\xff:\x80"),
    ]


@pytest.mark.parametrize(
    "line",
    [
        b"",
        b"no colon",
        b": no name",
        b"space : x",
        b"tab\t: x",
        b" folded: x",
        b"\tfolded",
        b"na me: x",
        b"na\0me: x",
        b"n\xe4me: x",
        b"(name): x",
        *[b"name: a" + bytes([ctl]) + b"b" for ctl in (*range(9), *range(10, 32), 127)],
        b"name: x\r",
    ],
)
def test_invalid_fields_are_refused(line: bytes) -> None:
    """These are folded lines, wrong names, and each control character but the tab."""
    with pytest.raises(BadMessage):
        parse_fields([b"a: b", line])


def test_fields_are_bounded() -> None:
    """The most lines and the most bytes of a line pass, and one more is refused."""
    longest = b"a: " + b"x" * (MAX_LINE - 3)
    assert len(parse_fields([longest] * MAX_FIELDS)) == MAX_FIELDS
    with pytest.raises(BadMessage):
        parse_fields([b"a: b"] * (MAX_FIELDS + 1))
    with pytest.raises(BadMessage):
        parse_fields([longest + b"x"])
    assert parse_fields([b"a: b"], most=1)
    with pytest.raises(BadMessage):
        parse_fields([b"a: b"], most=0)


def test_errors_quote_no_values() -> None:
    """A value may be a key, and an error does not show it."""
    with pytest.raises(BadMessage) as caught:
        parse_fields([b"authorization: secret\0"])

    assert "secret" not in str(caught.value)


def test_field_values_are_in_order() -> None:
    """Every line of a name counts, and no other."""
    fields = [(b"a", b"1"), (b"b", b"2"), (b"a", b"3")]

    assert field_values(fields, b"a") == [b"1", b"3"]
    assert field_values(fields, b"c") == []


# --- lists, tokens, lengths -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([], []),
        ([b""], []),
        ([b" , ,, "], []),
        ([b"Close"], [b"close"]),
        ([b"a, b\t,C", b"d"], [b"a", b"b", b"c", b"d"]),
        ([b"a b"], [b"a b"]),
    ],
)
def test_lists_are_read_over_all_lines(values: list[bytes], expected: list[bytes]) -> None:
    """Members are in lower case and in order, without empty ones."""
    assert list_tokens(values) == expected


@pytest.mark.parametrize(
    ("values", "expected"),
    [([], None), ([b"0"], 0), ([b"007"], 7), ([b"9" * 18], 10**18 - 1)],
)
def test_lengths(values: list[bytes], expected: int | None) -> None:
    """Plain digits are a length; without the field there is none."""
    assert parse_length(values) == expected


@pytest.mark.parametrize(
    "values",
    [
        [b""],
        [b"-1"],
        [b"+1"],
        [b"1_0"],
        [b"1 0"],
        [b"0x1"],
        [b"1.0"],
        [b"1,1"],
        [b"1, 1"],
        [b"1", b"1"],
        [b"1", b"2"],
        [b"9" * 19],
        [b"9" * 5000],
        ["٥".encode()],
    ],
)
def test_invalid_lengths_are_refused(values: list[bytes]) -> None:
    """Signs, other digits, lists, repetitions and huge sizes are no length."""
    with pytest.raises(BadMessage):
        parse_length(values)


# --- lines of servers -----------------------------------------------------------------------------

LINES = st.lists(
    st.sampled_from([b"Server: x", b"DATE:  now ", b"a: 1", b"Set-Cookie: s=1", b"x:", b"b: \t2"])
    | st.binary(max_size=12)
    | st.binary(min_size=200, max_size=300).map(lambda value: b"long: " + value),
    max_size=10,
)


@given(LINES)
def test_lines_that_came_before_are_read_as_others(lines: list[bytes]) -> None:
    """Twice the same as a first reading, or the same refusal."""
    readings = []
    for read in (partial(parse_fields, longest=1000), parse_known_fields, parse_known_fields):
        try:
            readings.append(read(lines))
        except BadMessage as error:
            readings.append([(b"refused", str(error).encode())])

    assert readings[1:] == readings[:1] * 2


def test_few_lines_are_remembered_and_no_private_one() -> None:
    """Neither a cookie, nor a long one, nor ever more of them."""
    known: Any = grammar._field_of.__self__  # type: ignore[attr-defined]  # of a dictionary
    known.clear()
    parse_known_fields([b"Set-Cookie: s=secret", b"long: " + b"x" * 200, b"server: x"])
    assert list(known) == [b"server: x"]

    for number in range(3000):
        parse_known_fields([b"n: %d" % number])
        assert len(known) <= 1024
