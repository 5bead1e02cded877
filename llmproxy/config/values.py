"""Single values of the configuration: readers that turn one TOML value into ours, and back.

A reader takes whatever stood in the file and returns the value, or raises :class:`Wrong` with what
was expected; it knows neither the key nor the file, which ``schema.py`` adds.  Nothing here knows
a section, a struct or the environment.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from datetime import UTC, datetime
from typing import TypeVar

T = TypeVar("T")

#: Longer deadlines than this are a slip, and would overflow what the kernel waits for.
LONGEST_DURATION_S = 365 * 86400

_SHOWN_CHARACTERS = 160
_SHOWN_NUMBER = 10**18
_UNITS_S = {"d": 86400, "h": 3600, "m": 60, "s": 1}
_DURATION = re.compile(r"([0-9]{1,12}(?:\.[0-9]{1,6})?)(ms|s|m|h|d)")
_UNITS_BYTES = {"GiB": 1024**3, "MiB": 1024**2, "KiB": 1024, "B": 1}
_SIZE = re.compile(r"([0-9]{1,12})(GiB|MiB|KiB|B)")
_NUMBER = re.compile(r"[0-9]{1,12}(\.[0-9]{1,6})?")
_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f]")
_TOKEN = re.compile(r"[!#$%&'*+\-.^_`|~0-9A-Za-z]+")  # RFC 9110, section 5.6.2


class Wrong(Exception):
    """A value is not what its key takes.

    Args:
        expected: the end of a sentence that begins with "expected".
        hidden: what stood there may be a secret, and is not to be shown.
    """

    def __init__(self, expected: str, *, hidden: bool = False) -> None:
        super().__init__(expected)
        self.expected = expected
        self.hidden = hidden


def show(value: object) -> str:
    """Return ``value`` as an error may quote it: one line, in the file's own spelling, short."""
    if isinstance(value, str):
        long = len(value) > _SHOWN_CHARACTERS
        return json.dumps(value[:_SHOWN_CHARACTERS] + "..." if long else value)
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, int | float) and abs(value) < _SHOWN_NUMBER:
        return str(value)
    if isinstance(value, list) and not value:
        return "an empty array"
    return kind(value)


def kind(value: object) -> str:
    """Return what sort of TOML value this is, without anything that it holds."""
    sorts = {str: "a string", bool: "a boolean", int: "a number", float: "a number"}
    sorts |= {list: "an array", dict: "a table"}
    return sorts.get(type(value), "a date or a time")


def text(value: object) -> str:
    """Read a non-empty string without control characters."""
    if not isinstance(value, str) or not value or _CONTROL.search(value):
        raise Wrong("a non-empty string without control characters")
    return value


def boolean(value: object) -> bool:
    """Read true or false."""
    if not isinstance(value, bool):
        raise Wrong("true or false")
    return value


def boolean_or(word: str) -> Callable[[object], bool | str]:
    """Return a reader of true, false or one word."""

    def read(value: object) -> bool | str:
        if value != word and not isinstance(value, bool):
            raise Wrong(f"true, false or {json.dumps(word)}")
        return value if isinstance(value, bool) else word

    return read


def integer(lowest: int, highest: int) -> Callable[[object], int]:
    """Return a reader of whole numbers from ``lowest`` to ``highest``."""

    def read(value: object) -> int:
        if isinstance(value, bool) or not isinstance(value, int) or not lowest <= value <= highest:
            raise Wrong(f"a whole number from {lowest} to {highest}")
        return value

    return read


def choice(words: dict[str, T]) -> Callable[[object], T]:
    """Return a reader of one of ``words``, which stand for their values."""

    def read(value: object) -> T:
        if not isinstance(value, str) or value not in words:
            raise Wrong("one of " + ", ".join(json.dumps(word) for word in words))
        return words[value]

    return read


def duration(value: object) -> float:
    """Read a positive duration with its unit, such as ``"250ms"`` or ``"1.5h"``, in seconds."""
    if value == "off":
        raise Wrong('a duration such as "10s" (this one cannot be off)')
    bare = str(value) if _is_number(value) else value
    if isinstance(bare, str) and _NUMBER.fullmatch(bare):
        raise Wrong(f'a duration with its unit: write "{bare}s"')
    found = _DURATION.fullmatch(value) if isinstance(value, str) else None
    if found is None:
        raise Wrong('a duration such as "250ms", "10s", "5m", "2h" or "30d"')
    number, unit = float(found[1]), found[2]
    seconds = number / 1000 if unit == "ms" else number * _UNITS_S[unit]
    if not 0 < seconds <= LONGEST_DURATION_S:
        raise Wrong('a duration above zero and up to "365d"')
    return seconds


def duration_or_off(value: object) -> float | None:
    """Read a duration in seconds, or ``"off"``, which is ``None``."""
    if value == "off":
        return None
    try:
        return duration(value)
    except Wrong as wrong:
        raise Wrong(f'{wrong.expected}, or "off"') from None


def show_duration(seconds: float | None) -> str:
    """Return a duration as :func:`duration_or_off` reads it, in the largest unit that is whole."""
    if seconds is None:
        return "off"
    for unit, length in _UNITS_S.items():
        if seconds % length == 0:
            return f"{seconds / length:.0f}{unit}"
    return f"{seconds * 1000:.6f}".rstrip("0").rstrip(".") + "ms"


def instant(value: object) -> float:
    """Read a point in time, as TOML or RFC 3339 writes it, in seconds since the epoch."""
    sample = 'such as "2027-01-31T00:00:00Z"'
    try:
        found = datetime.fromisoformat(value) if isinstance(value, str) else value
    except ValueError:
        found = None
    if not isinstance(found, datetime):
        raise Wrong(f"a date with a time and an offset, {sample}")
    if found.tzinfo is None:
        raise Wrong(
            f"a time with its offset, {sample}: without one each machine would take it for another"
        )
    return found.timestamp()


def show_instant(seconds: float) -> str:
    """Return a point in time as :func:`instant` reads it, in UTC and whole seconds."""
    return f"{datetime.fromtimestamp(seconds, UTC):%Y-%m-%dT%H:%M:%SZ}"


def size(value: object) -> int:
    """Read a size with its unit, such as ``"16KiB"``, or ``"0"``, in bytes."""
    if value == "0":
        return 0
    if _is_number(value) or (isinstance(value, str) and _NUMBER.fullmatch(value)):
        raise Wrong('a size with its unit: write "32KiB", "1MiB" or "512B"')
    found = _SIZE.fullmatch(value) if isinstance(value, str) else None
    if found is None:
        raise Wrong('a size such as "512B", "16KiB", "32MiB", "1GiB" or "0"')
    return int(found[1]) * _UNITS_BYTES[found[2]]


def size_above_zero(value: object) -> int:
    """Read a size that leaves room for something: nothing could pass under ``"0"``."""
    if (read := size(value)) == 0:
        raise Wrong("a size above zero")
    return read


_SHORTEST_FILLER, _LONGEST_FILLER = 3, 64 * 1024


def filler_size(value: object) -> int:
    """Read the size of a comment in a stream: one needs three bytes, and is held as a whole."""
    if (read := size(value)) and not _SHORTEST_FILLER <= read <= _LONGEST_FILLER:
        raise Wrong('"0", or a size from "3B" to "64KiB"')
    return read


def show_size(size_bytes: int) -> str:
    """Return a size as :func:`size` reads it, in the largest unit that is whole."""
    if size_bytes == 0:
        return "0"
    for unit, length in _UNITS_BYTES.items():
        if size_bytes % length == 0:
            return f"{size_bytes // length}{unit}"
    raise AssertionError("every whole number is a number of bytes")


def token(value: object) -> str:
    """Read a token of RFC 9110, the alphabet of header names and pseudonyms."""
    if not isinstance(value, str) or not _TOKEN.fullmatch(value):
        raise Wrong("a token (letters, digits and !#$%&'*+-.^_`|~)")
    return value


def absolute_path(value: object) -> str:
    """Read the absolute path of a file or a directory."""
    if not text(value).startswith("/"):
        raise Wrong("an absolute path")
    return str(value)


def model_pattern(value: object) -> str:
    """Read a model's name, in which ``*`` stands for anything, or ``"-"`` for no model."""
    try:
        return text(value)
    except Wrong:
        raise Wrong('a model such as "gpt-4o", a pattern such as "gpt-*", or "-"') from None


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 10**12
