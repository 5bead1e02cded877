"""Results that are remembered for the values that most requests share.

Callers send a few values of a field, and a few paths, again and again.  Whoever sends ever new
ones, or long ones, must take no memory for them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final, Generic, TypeVar

LONGEST: Final = 256  # bytes of a value whose result is remembered

K = TypeVar("K", bound="bytes | None")
V = TypeVar("V")


class _Known(dict[K, V], Generic[K, V]):
    """Results by value; when there are too many, all are forgotten."""

    def __init__(self, function: Callable[[K], V], most: int) -> None:
        super().__init__()
        self._function = function
        self._most = most

    def __missing__(self, value: K) -> V:
        result = self._function(value)
        if value is None or len(value) <= LONGEST:
            if len(self) == self._most:
                self.clear()
            self[value] = result
        return result


def known(most: int) -> Callable[[Callable[[K], V]], Callable[[K], V]]:
    """Give a function a memory of at most ``most`` results, for short values."""
    return lambda function: _Known(function, most).__getitem__
