"""What crosses of a query: parameters are dropped and added, and the rest keeps its bytes."""

from __future__ import annotations

import pytest

from llmproxy.http1.query import QueryRewriter, without


@pytest.mark.parametrize(
    ("target", "rest"),
    [
        (b"/a", b"/a"),
        (b"/a?", b"/a?"),
        (b"/a?x=1", b"/a?x=1"),
        (b"/a?model=m", b"/a"),
        (b"/a?model", b"/a"),
        (b"/a?x=%20&&model=m&y=+?&model=n", b"/a?x=%20&&y=+?"),
        (b"/a?Model=m&x", b"/a?x"),
        (b"/a?m%6Fdel=m&x", b"/a?x"),
        (b"/a?x=1;model=m;y", b"/a?x=1;y"),
        (b"/a?model=m;x&y", b"/a?x&y"),
        (b"/a?models=m&x=model", b"/a?models=m&x=model"),
        (b"?model=m&x", b"?x"),
        (b"?model=m", b""),
    ],
)
def test_a_dropped_parameter_is_cut_out(target: bytes, rest: bytes) -> None:
    """In whatever case and spelling a server may read its name; nothing else changes."""
    assert without(target, frozenset((b"model",))) == rest


@pytest.mark.parametrize(
    ("query", "sent"),
    [
        (b"", b"?api-version=2024-10-21&a=%C3%A4%20%26"),
        (b"?", b"?api-version=2024-10-21&a=%C3%A4%20%26"),
        (b"?x=%zz", b"?x=%zz&api-version=2024-10-21&a=%C3%A4%20%26"),
        (b"?x&", b"?x&api-version=2024-10-21&a=%C3%A4%20%26"),
        (b"?api-version=1&a", b"?api-version=1&a"),
        (b"?API-Version=1", b"?API-Version=1&a=%C3%A4%20%26"),
        (b"?api%2dversion=1", b"?api%2dversion=1&a=%C3%A4%20%26"),
        (b"?x=api-version", b"?x=api-version&api-version=2024-10-21&a=%C3%A4%20%26"),
    ],
)
def test_a_parameter_is_added_where_the_client_sent_none(query: bytes, sent: bytes) -> None:
    """It is encoded, and stands behind what the client sent."""
    added = (("api-version", "2024-10-21"), ("a", "ä &"))
    assert QueryRewriter((), added).for_provider(query) == sent


def test_what_is_dropped_and_added_has_the_operators_value() -> None:
    """Whatever the client says, the provider gets one value."""
    rewriter = QueryRewriter(("v", "x"), (("v", "ours"),))
    assert rewriter.for_provider(b"?V=1&a=b&v=2&x") == b"?a=b&v=ours"
    assert rewriter.for_provider(b"") == b"?v=ours"
