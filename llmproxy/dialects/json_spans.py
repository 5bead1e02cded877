"""JSON spans: where the members of an object stand in its bytes.

With its span, a member can be read or replaced alone.  These are pure functions over the bytes of
JSON; ``json_body.py`` and ``include_usage.py`` stand on them.  Nothing here knows what a member
means, or decodes a body and encodes it again.

Theory of operation: a body is read from its first byte to its last by patterns that run in C.
Each takes a bounded slice, so a body of any size and shape is read in short steps, and whoever runs
the steps may do something else between two of them (``net/turns.py``).  One pattern takes a whole
run of elements that are flat or nest little; what nests more is taken bracket by bracket, over a
stack.  Depth and the number of such rounds are bounded.

A group that may fail in the middle is repeated inside an atomic group and not possessively: before
3.11.5, Python's ``re`` gets that wrong (python/cpython#106052).
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Generator
from typing import Final, NamedTuple, TypeVar

DEPTH: Final = 512  # arrays and objects in each other; CPython's own json gives up near 1000
ROUNDS: Final = (
    1_000_000  # steps of Python code for one body; an API call of 32 MiB takes thousands
)
NUMBER_BYTES: Final = 16_384  # one number; CPython's own json reads no integer beyond 4300 digits

_SLICE: Final = 16_384  # bytes that one pattern takes at most: about half a millisecond
_RUN_DEPTH: Final = 3  # levels that a run may hold: messages of parts of objects
_NAME_BYTES: Final = 128  # of a member that may be wanted, with quotes and escapes

_BLANK = rb"[ \t\n\r]*+"
_CHARACTERS = rb'(?:[^"\\\x00-\x1f]++|\\(?:["\\/bfnrt]|u[0-9A-Fa-f]{4}))*'
_STRING = rb'"%b"' % _CHARACTERS
_SCALAR = rb"(?:-?(?:0|[1-9][0-9]*+)(?:\.[0-9]++)?(?:[eE][+-]?[0-9]++)?|true|false|null)"


def _element(depth: int) -> bytes:
    """Return the pattern of a value that nests at most ``depth`` levels."""
    if not depth:
        return rb"(?:%b|%b)" % (_STRING, _SCALAR)
    inner = _element(depth - 1)
    more = rb"%b(?:,%b(?!%%b)|(?=%%b))" % (_BLANK, _BLANK)  # a comma, or the closing bracket
    array = rb"\[%b(?>%b%b)*\]" % (_BLANK, inner, more % (rb"\]", rb"\]"))
    member = rb"%b%b:%b%b" % (_STRING, _BLANK, _BLANK, inner)
    table = rb"\{%b(?>%b%b)*\}" % (_BLANK, member, more % (rb"\}", rb"\}"))
    return rb"(?:%b|%b|%b|%b)" % (_STRING, _SCALAR, array, table)


_ANY = _element(_RUN_DEPTH)
_WANTED = (
    rb"models?|stream|stream_options|include_usage"
    rb"|fallbacks|context_window_fallbacks|content_policy_fallbacks"
)
_TRUE_NAME = rb'"(?!(?i:%b)")[^"\\\x00-\x1f\x80-\xff]*+"' % _WANTED

_blank = re.compile(_BLANK).match
_characters = re.compile(_CHARACTERS).match
_scalar = re.compile(_SCALAR).match
_elements = re.compile(rb"(?>%b%b%b,)*" % (_BLANK, _ANY, _BLANK)).match
_members = re.compile(
    rb"(?>%b%b%b:%b%b%b,)*" % (_BLANK, _STRING, _BLANK, _BLANK, _ANY, _BLANK)
).match
_others = re.compile(
    rb"(?>%b%b%b:%b%b%b,)*" % (_BLANK, _TRUE_NAME, _BLANK, _BLANK, _ANY, _BLANK)
).match
"""Members whose names are plain, and none that anybody wants."""
_openings = re.compile(rb"(?>(?:\[|\{%b%b%b:)%b)+" % (_BLANK, _STRING, _BLANK, _BLANK)).match
_closings = re.compile(rb"(?:%b[\]}])+" % _BLANK).match
_closing = re.compile(rb"%b[\]}]" % _BLANK).match
_strings = re.compile(_STRING)
_VALUE, _FIRST, _NEXT, _AFTER = range(4)
"""What is due: a value; the first element of an array or object, or its end; another element; what
follows a value."""

_CLOSERS = bytes.maketrans(b"[{", b"]}")
_NOT_OPENERS = bytes(set(range(256)) - set(b"[{"))

T = TypeVar("T")
Steps = Generator[None, None, T]
"""Work in short steps, which returns its result."""


class BodyError(ValueError):
    """What is wrong with a body or a path: a sentence for the caller that quotes nothing of it."""


class Span(NamedTuple):
    """Where a value stands in a body, without whitespace around it: byte offsets, end excluded."""

    start: int
    end: int

    def moved(self, by: int) -> Span:
        """Return the span in a body in which this one begins so many bytes later."""
        return Span(self.start + by, self.end + by)


class Edit(NamedTuple):
    """One change of a body: the bytes that stand at ``span`` from then on."""

    span: Span
    text: bytes


def finish(steps: Steps[T]) -> T:
    """Do all steps in a row, and return the result."""
    try:
        while True:
            next(steps)
    except StopIteration as end:
        result: T = end.value
        return result


def edited(body: bytes, edits: Collection[Edit]) -> bytes:
    """Return the body with all edits, whose spans do not overlap; other bytes stay as they are."""
    view, at = memoryview(body), 0
    pieces: list[bytes | memoryview] = []
    for (start, end), text in sorted(edits):
        pieces += (view[at:start], text)
        at = end
    return b"".join((*pieces, view[at:]))


def member_spans(body: bytes, wanted: Collection[str]) -> Steps[dict[str, Span]]:
    """Check the grammar of UTF-8 JSON; return where the values of the ``wanted`` members stand.

    Args:
        body: the JSON, alone but for whitespace.
        wanted: names in lower case, of those in ``_TRUE_NAME``.

    Returns:
        The span of each by its name in the body, which may differ from the wanted one in case.

    Raises:
        BodyError: it is not JSON, nests too deeply or in too many places, or has two members that
            some reader takes for one.
    """
    return _Reader(body).members(wanted)


class _Reader:
    """Reads one body."""

    def __init__(self, body: bytes) -> None:
        self._body = body
        self._rounds = 0

    def members(self, wanted: Collection[str]) -> Steps[dict[str, Span]]:
        """Do as :func:`member_spans`."""
        body = self._body
        spans: dict[str, Span] = {}
        at = yield from self._past_blank(0)
        if body[at : at + 1] != b"{":
            at = yield from self._value(at, 0)
        else:
            at = yield from self._top(at + 1, wanted, spans)
        if (yield from self._past_blank(at)) != len(body):
            raise _invalid()
        return spans

    def _top(self, at: int, wanted: Collection[str], spans: dict[str, Span]) -> Steps[int]:
        """Read the members of the object at the top, and its end."""
        body, first = self._body, True
        while True:
            self._count()
            yield
            end = _end(_others(body, at, at + _SLICE))
            first, at = first and end == at, end
            at = yield from self._past_blank(at)
            if first and body[at : at + 1] == b"}":
                return at + 1
            first = False
            start, at = at, (yield from self._string(at))
            name = body[start:at]
            at = yield from self._past_blank(at)
            if body[at : at + 1] != b":":
                raise _invalid()
            start = yield from self._past_blank(at + 1)
            at = yield from self._value(start, 1)
            if len(name) <= _NAME_BYTES:
                _note(spans, wanted, name, Span(start, at))
            at = yield from self._past_blank(at)
            mark, at = body[at : at + 1], at + 1
            if mark == b"}":
                return at
            if mark != b",":
                raise _invalid()

    def _value(self, at: int, depth: int) -> Steps[int]:
        """Return where the value ends that begins at ``at``, inside ``depth`` levels."""
        mark = self._body[at : at + 1]
        if mark == b'"':
            return (yield from self._string(at))
        if mark in (b"[", b"{"):
            return (yield from self._nested(at, depth))
        return self._end_of_scalar(at)

    def _nested(self, at: int, depth: int) -> Steps[int]:
        """Return where the array or the object ends that begins at ``at``."""
        body = self._body
        closers = bytearray()  # of what is open, from the outside to the inside
        due = _VALUE
        while True:
            self._count()
            yield
            if due == _AFTER:
                if not closers:
                    return at
                at = yield from self._past_blank(at)
                if body[at : at + 1] == b",":
                    at, due = at + 1, _NEXT
                else:
                    at = self._close(at, closers)
                continue
            if due in (_FIRST, _NEXT):
                if depth + len(closers) + _RUN_DEPTH <= DEPTH:
                    run = _elements if closers[-1:] == b"]" else _members
                    end = _end(run(body, at, at + _SLICE))
                    at, due = end, due if end == at else _NEXT
                at = yield from self._past_blank(at)
                if due == _FIRST and body[at : at + 1] == closers[-1:]:
                    del closers[-1]
                    at, due = at + 1, _AFTER
                    continue
                if closers[-1:] == b"}":
                    at = yield from self._past_name(at)
            else:
                at = yield from self._past_blank(at)
            if body[at : at + 1] in (b"[", b"{"):
                at, due = self._open(at, closers)
                if depth + len(closers) > DEPTH:
                    text = f"The body has more than {DEPTH} arrays and objects in each other."
                    raise BodyError(text)
            else:
                at = yield from self._value(at, depth)
                due = _AFTER

    def _open(self, at: int, closers: bytearray) -> tuple[int, int]:
        """Take as many opening brackets as there are; return where they end, and what is due."""
        opened = _openings(self._body, at, at + _SLICE)
        if opened is None:  # an object that is empty, or whose first name is long
            closers += b"}"
            return at + 1, _FIRST
        kinds = _strings.sub(b"", opened[0]).translate(None, _NOT_OPENERS)
        closers += kinds.translate(_CLOSERS)
        return opened.end(), _FIRST if kinds[-1:] == b"[" else _VALUE

    def _close(self, at: int, closers: bytearray) -> int:
        """Take as many closing brackets as there are, and as can be; return where they end."""
        body = self._body
        found = _closings(body, at, at + _SLICE)
        if found is None:
            raise _invalid()
        marks, end = found[0].translate(None, b" \t\n\r"), found.end()
        if len(marks) > len(closers):  # what is around this value ends here, too
            marks, end = marks[: len(closers)], at
            for _ in marks:
                end = _end(_closing(body, end))
        if marks != closers[: -len(marks) - 1 : -1]:
            raise _invalid()
        del closers[-len(marks) :]
        return end

    def _past_name(self, at: int) -> Steps[int]:
        """Take a member's name and what stands between that and its value."""
        at = yield from self._string(at)
        at = yield from self._past_blank(at)
        if self._body[at : at + 1] != b":":
            raise _invalid()
        return (yield from self._past_blank(at + 1))

    def _past_blank(self, at: int) -> Steps[int]:
        while True:
            end = _end(_blank(self._body, at, at + _SLICE))
            if end - at < _SLICE:
                return end
            at = end
            yield

    def _string(self, at: int) -> Steps[int]:
        body = self._body
        if body[at : at + 1] != b'"':
            raise _invalid()
        at += 1
        while True:
            end = _end(_characters(body, at, at + _SLICE))
            if body[end : end + 1] == b'"':
                return end + 1
            if end == at:
                raise _invalid()
            at = end  # the slice has ended, or something is wrong here
            yield

    def _end_of_scalar(self, at: int) -> int:
        found = _scalar(self._body, at, at + NUMBER_BYTES)
        if found is None:
            raise _invalid()
        if found.end() - at == NUMBER_BYTES:
            raise BodyError("The body has a number that is too long.")
        return found.end()

    def _count(self) -> None:
        self._rounds += 1
        if self._rounds > ROUNDS:
            raise BodyError("The body nests too deeply in too many places.")


def _note(spans: dict[str, Span], wanted: Collection[str], text: bytes, span: Span) -> None:
    """Keep the span of a wanted member, whose name is a JSON string."""
    try:
        name: str = json.loads(text)
    except UnicodeDecodeError:
        raise _invalid() from None
    folded = name.casefold()
    if folded in wanted:
        if any(other.casefold() == folded for other in spans):
            raise BodyError(f'The body has two "{folded}" members.')
        spans[name] = span


def _end(found: re.Match[bytes] | None) -> int:
    if found is None:
        raise _invalid()
    return found.end()


def _invalid() -> BodyError:
    return BodyError("The body is not valid JSON.")
