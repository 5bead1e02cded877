"""The ways to split bytes into chunks."""

from __future__ import annotations

from collections.abc import Iterator

from hypothesis import strategies as st


def every_split(body: bytes) -> Iterator[list[bytes]]:
    """Yield the body in two parts, for every point and with empty parts, too; then byte by byte."""
    for at in range(len(body) + 1):
        yield [body[:at], body[at:]]
    yield [body[at : at + 1] for at in range(len(body))]


def drawn_split(data: st.DataObject, body: bytes) -> list[bytes]:
    """Return the body in up to thirteen parts; Hypothesis chooses the points."""
    at = sorted(data.draw(st.lists(st.integers(0, len(body)), max_size=12)))
    return [body[a:b] for a, b in zip([0, *at], [*at, len(body)], strict=True)]
