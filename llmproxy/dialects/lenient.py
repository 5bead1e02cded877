"""Decodes what providers send: strictly at first, and member by member if that fails.

Providers send counts of -1, ``"usage": ""`` or ``[]`` where an object is due (PHP), counts such as
``7.0`` (Lua), half of a surrogate pair (RFC 8259, section 8.2, allows it), ``NaN``, and control
characters inside strings.  One such member must not hide all others.  So what the strict decoder
refuses is decoded again, as tolerantly as the SDKs do it, and only the members that do not fit are
left out.

The second way costs twenty times the first one.  An event that is longer than :data:`_LONGEST` does
not go there, so that no event can hold up the reactor for long (ADR-0017); of such a one, only
halves of surrogate pairs are mended.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from functools import lru_cache
from typing import Any, TypeVar

import msgspec
from msgspec import inspect

from llmproxy.dialects.accumulated import Accumulated

_T = TypeVar("_T", bound=msgspec.Struct)

FAULTS = (msgspec.DecodeError, UnicodeDecodeError, RecursionError)
"""What a decoder raises for an event that it cannot read."""

_LONGEST = 256 * 1024
"""Most bytes that are decoded tolerantly; a MiB of brackets would take 40 ms."""

_SHORT = 64
"""Bytes of an event of which there may be so many in one read that only a few, those that
:attr:`Accumulated.patience` counts, are decoded tolerantly.  Events that say anything are longer.
"""

_ITEMS = 64
"""Most items of a list in which one does not fit; the others are left out with it."""

_HALVES = 10_000
"""Most surrogates of a long event; it may have no more characters beyond the basic plane."""

_SURROGATES = re.compile(
    rb"\\u[dD](?:[89abAB][0-9a-fA-F]{2}\\u[dD][c-fC-F][0-9a-fA-F]{2}|[89a-fA-F][0-9a-fA-F]{2})"
).sub
"""Replaces pairs of surrogates, and halves of pairs."""

_PAIR = len(rb"\ud83d\ude00")

_MISFIT = object()

_shape_of = lru_cache(maxsize=64)(inspect.type_info)

_PLAIN: dict[type[inspect.Type], type] = {
    inspect.StrType: str,
    inspect.BoolType: bool,
    inspect.FloatType: float,
    inspect.NoneType: type(None),
}


def decoder(kind: type[_T]) -> Callable[[bytes, Accumulated], _T]:
    """Return a function that decodes JSON into ``kind``; it raises one of :data:`FAULTS`.

    What does not fit is left out, and :attr:`Accumulated.is_odd` is set.
    """
    strict = msgspec.json.Decoder(kind).decode

    def decode(data: bytes, seen: Accumulated) -> _T:
        try:
            return strict(data)
        except FAULTS:
            found = tolerant(data, kind, seen)
            if found is None:
                raise
            return found

    return decode


def tolerant(data: bytes, kind: type[_T], seen: Accumulated) -> _T | None:
    """Return what fits of an event that the strict decoder has refused; None where nothing does."""
    if not data.lstrip(b" \t\r\n").startswith(b"{"):
        return None
    if len(data) > _LONGEST:
        return _without_halves(data, kind)
    if len(data) < _SHORT:
        seen.patience -= 1
        if seen.patience < 0:
            return None
    found, is_whole = fitted(data, kind)
    if found is not None and not is_whole:
        seen.is_odd = True
    return found


def _without_halves(data: bytes, kind: type[_T]) -> _T | None:
    """Decode a long event strictly, with U+FFFD for each half of a surrogate pair."""
    if not 0 < data.count(b"\\ud") + data.count(b"\\uD") <= _HALVES:
        return None
    try:
        return msgspec.json.decode(_SURROGATES(_mended, data), type=kind)
    except FAULTS:
        return None


def _mended(found: re.Match[bytes]) -> bytes:
    return found[0] if len(found[0]) == _PAIR else rb"\ufffd"


def fitted(data: bytes, kind: type[_T]) -> tuple[_T | None, bool]:
    """Return what fits of an object, and whether that is all of it and the object is JSON.

    Returns:
        None where ``data`` is no object, even for a tolerant reader.
    """
    value, is_json = tolerant_json(data)
    if not isinstance(value, dict):
        return None, False
    fitting = _Fitting()
    found = fitting.struct(value, _shape_of(kind))
    return found, is_json and not fitting.left_out


def tolerant_json(data: bytes) -> tuple[Any, bool]:
    """Return the value of a JSON text, and whether it is JSON by the letter.

    Half a surrogate pair is kept, for the other half may come with the next event.

    Returns:
        None if the text is not JSON in any reading.
    """
    text, is_utf8 = _text_of(data)
    constants: list[str] = []
    options: dict[str, Any] = {"parse_constant": constants.append}
    try:
        try:
            value = json.loads(text, **options)
            return value, is_utf8 and not constants
        except json.JSONDecodeError:
            return json.loads(text, strict=False, **options), False
        except ValueError:  # a number of more digits than Python reads
            return json.loads(text, parse_int=float, **options), is_utf8
    except (ValueError, RecursionError):
        return None, False


def _text_of(data: bytes) -> tuple[str, bool]:
    try:
        return data.decode(), True
    except UnicodeDecodeError:
        return data.decode("utf-8", "replace"), False


def raw_text(member: msgspec.Raw) -> str:
    """Return a member that may be a string or a whole object, as a tool's arguments are, as text.

    An object loses its blanks.  An absent member and null are no text.
    """
    data = bytes(member)
    if data in (b"", b"null"):
        return ""
    try:
        if data.startswith(b'"'):
            return msgspec.json.decode(data, type=str)
        return msgspec.json.format(data, indent=-1).decode()
    except FAULTS:
        value, _ = tolerant_json(data)
        return value if isinstance(value, str) else data.decode("utf-8", "replace")


class _Fitting:
    """Makes structs of decoded JSON; what does not fit is left out.

    Attributes:
        left_out: whether anything did not fit.
    """

    def __init__(self) -> None:
        self.left_out = False

    def struct(self, value: dict[str, Any], kind: Any) -> Any:
        """Return the struct of an object; members that do not fit have their defaults."""
        given = {}
        for field in kind.fields:
            if field.encode_name in value:
                found = self._fit(value[field.encode_name], field.type)
                if found is _MISFIT:
                    self.left_out = True
                else:
                    given[field.name] = found
        return kind.cls(**given)

    def _fit(self, value: Any, kind: Any) -> Any:
        match kind:
            case inspect.UnionType():
                kinds = (self._fit(value, one) for one in kind.types)
                return next((found for found in kinds if found is not _MISFIT), _MISFIT)
            case inspect.StructType():
                return self.struct(value, kind) if isinstance(value, dict) else _MISFIT
            case inspect.ListType():
                return self._list(value, kind) if isinstance(value, list) else _MISFIT
            case inspect.IntType():
                return _count(value, kind)
            case inspect.RawType():
                return msgspec.Raw(json.dumps(value, separators=(",", ":")).encode())
        return value if isinstance(value, _PLAIN[type(kind)]) else _MISFIT

    def _list(self, value: list[Any], kind: inspect.ListType) -> list[Any]:
        found = [self._fit(one, kind.item_type) for one in value[:_ITEMS]]
        fitting = [one for one in found if one is not _MISFIT]
        if len(fitting) < len(value):
            self.left_out = True
        return fitting


def _count(value: Any, kind: inspect.IntType) -> Any:
    """Return a whole number within the bounds of its kind; ``7.0`` is one, ``true`` is none."""
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if not isinstance(value, int) or isinstance(value, bool):
        return _MISFIT
    fits = (kind.ge is None or value >= kind.ge) and (kind.le is None or value <= kind.le)
    return value if fits else _MISFIT
