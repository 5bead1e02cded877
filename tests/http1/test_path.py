"""Paths: which of them some reader may take for a step elsewhere."""

from __future__ import annotations

import time
from urllib.parse import quote_from_bytes

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmproxy.http1.path import has_dot_segment


@pytest.mark.parametrize(
    "path",
    [
        b"/a/../b",
        b"/a/./b",
        b"/..",
        b"/a/.",
        b"/a/%2e%2E/b",
        b"/a/.%2e",
        b"/a/..%2fb",
        b"/a%2f..%2fb",
        b"/a/..\\b",
        b"/a%5c..%5cb",
        b"/%2e",
        b"/%zz/../b",
    ],
)
def test_a_dot_segment_is_found_encoded_or_not(path: bytes) -> None:
    """A slash may be a backslash, too, and each of the characters may be encoded."""
    assert has_dot_segment(path)


@pytest.mark.parametrize(
    "end", [b";", b";a=b", b"%3b", b"%3Ba=b", b"%00", b"%00.json", b"%20", b"%09", b"%3f", b"%23"]
)
@pytest.mark.parametrize("dots", [b"..", b".", b"%2e%2e", b"%2e"])
@pytest.mark.parametrize("rest", [b"", b"/b", b"%2fb"])
def test_what_a_reader_cuts_off_hides_no_dot_segment(dots: bytes, end: bytes, rest: bytes) -> None:
    """Tomcat cuts off parameters, C ends at a NUL, Windows drops blanks, others decode twice."""
    assert has_dot_segment(b"/a/" + dots + end + rest)


@pytest.mark.parametrize(
    "path",
    [
        b"/a/%252e%252e/b",
        b"/a/%25252e./b",
        b"/a/.%25252525252525252e/b",
        b"/a/%252e%252e%253b/b",
        b"/a%252f..%252fb",
        b"/a/%%32%65%%32%65/b",
        b"/a/%25%32%65./b",
        b"/a/%c0%ae%c0%ae/b",
        b"/a/%25c0%25ae./b",
        b"/a%c0%af..%c0%afb",
    ],
)
def test_a_dot_segment_is_found_however_often_it_is_encoded(path: bytes) -> None:
    """What decodes to a dot segment in several steps, or in a lenient decoder, is one."""
    assert has_dot_segment(path)


@pytest.mark.parametrize(
    "path",
    [
        b"/",
        b"/a.b/..c/d../...",
        b"/v1.0/x%2ey",
        b"/a%zz",
        b"/%c3%a4/.well-known",
        b"/a..b",
        b"/a;b=../c",
        b"/a..;b/c",
        b"/100%25",
        b"/a%2520b/c%252fd",
        b"/v1beta/models/gemini-2.5-pro:generateContent",
        b"/projects/p/locations/l/publishers/x/models/claude-4.5%4020250929:rawPredict",
    ],
)
def test_dots_within_a_segment_mean_nothing(path: bytes) -> None:
    """Names hold dots, and values may be encoded twice."""
    assert not has_dot_segment(path)


@given(
    st.sampled_from([b"..", b".", b"..;x"]),
    st.lists(st.sampled_from(["", ".", "./", "./;%"]), max_size=4),
)
def test_any_encoding_is_undone(segment: bytes, layers: list[str]) -> None:
    """Each layer encodes all bytes, or spares some of them, as many as four times."""
    path = b"/a/" + segment + b"/b"
    for spared in layers:
        path = quote_all(path) if not spared else quote_from_bytes(path, spared).encode()
    assert has_dot_segment(path)


def quote_all(path: bytes) -> bytes:
    """Return ``path`` with each byte encoded."""
    return b"".join(b"%%%02x" % byte for byte in path)


def test_a_path_with_more_escapes_than_any_real_one_is_refused() -> None:
    """It would take milliseconds to read, here and further on; a long name beyond ASCII is good."""
    assert not has_dot_segment(b"/" + quote_all(b"a" * 1024))
    assert has_dot_segment(b"/" + quote_all(b"a" * 1025))
    assert has_dot_segment(b"/models/" + b"%25" * 10_000)


def test_a_path_that_is_encoded_again_and_again_is_found_in_bounded_time() -> None:
    """No path of the longest head takes many rounds; one that would is refused."""
    encoded = [b"a"]
    for _ in range(4):
        encoded.append(quote_all(encoded[-1]))
    assert [has_dot_segment(b"/" + path) for path in encoded] == [False] * 4 + [True]
    began = time.process_time()
    for path in (b"/%" + b"25" * 16_000 + b"2e", b"/" + b"%25%32%35" * 3500, b"/%2e" * 8000):
        has_dot_segment(path)
    assert time.process_time() - began < 1
