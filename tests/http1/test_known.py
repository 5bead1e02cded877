"""What is remembered of callers' values is bounded in number and length."""

from __future__ import annotations

import pytest

from llmproxy.http1.known import LONGEST, known


class Lengths:
    """Tells lengths, and keeps what it was asked for."""

    def __init__(self) -> None:
        self.asked: list[bytes | None] = []

    def of(self, value: bytes | None) -> int:
        """Return the length of a value."""
        self.asked.append(value)
        return len(value or b"")


def test_a_short_value_is_remembered() -> None:
    """None is one, too; a long one is worked out each time."""
    lengths, long = Lengths(), b"x" * (LONGEST + 1)
    length = known(9)(lengths.of)
    for _ in range(3):
        assert [length(value) for value in (None, b"ab", long)] == [0, 2, LONGEST + 1]
    assert lengths.asked == [None, b"ab", long, long, long]


def test_what_is_remembered_is_bounded() -> None:
    """Ever new values do not keep those out that come often."""
    lengths = Lengths()
    length = known(3)(lengths.of)
    for number in range(100):
        assert length(b"%d" % number) == len(str(number))
    del lengths.asked[:]
    assert [length(b"0"), length(b"x"), length(b"x")] == [1, 1, 1]
    assert lengths.asked == [b"0", b"x"]


def test_an_error_is_not_remembered() -> None:
    """It is raised each time."""

    def number(value: bytes) -> int:
        return int(value)

    for _ in range(2):
        with pytest.raises(ValueError, match="invalid"):
            known(3)(number)(b"x")
