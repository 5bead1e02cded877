"""Paths, raw as they came: what another reader of a path may take for a step elsewhere.

A route is found by the raw path, and the provider gets these bytes.  Servers and frameworks behind
the proxy may decode a path more than once, cut parameters off its segments, or end it at a NUL.
None of them may find a ``.`` or ``..`` segment that was not seen here.  No route is known here.
"""

from __future__ import annotations

import re
from urllib.parse import unquote_to_bytes

_MOST_DECODED = 4
"""Rounds of decoding, of which the last must change nothing; real paths need two, or three."""

_MOST_ESCAPES = 1024
"""Escapes of a path; real ones have some hundred at most, for names beyond ASCII."""

_PERCENT, _DOT = b"%."  # bytes find a number ten times as fast as a bytes object of length one
_ESCAPED_PERCENT = re.compile(rb"%(?:25)+")
"""A percent sign, encoded as often as somebody likes."""

_OVERLONG = ((b"\xc0\xae", b"."), (b"\xc0\xaf", b"/"))
"""What lenient decoders of UTF-8 read as a dot and a slash (RFC 3629, section 10)."""

_DOT_SEGMENT = re.compile(rb"(?:\A|[/\\])\.{1,2}(?:[/\\;?#\x00-\x20\x7f]|\Z)")
"""Behind the dots may be parameters (RFC 3986, 3.3), or what some readers cut off with the rest."""


def has_dot_segment(path: bytes) -> bool:
    """Return whether some reader may find a ``.`` or ``..`` segment in ``path``.

    A path that is encoded more often than any real one counts as well, and one with more escapes:
    it would take milliseconds to read.

    Args:
        path: raw, without its query.
    """
    if _PERCENT not in path:
        return _DOT in path and _DOT_SEGMENT.search(path) is not None
    if path.count(b"%") > _MOST_ESCAPES:
        return True
    for _ in range(_MOST_DECODED):
        plain = unquote_to_bytes(_ESCAPED_PERCENT.sub(b"%", path))
        for overlong, character in _OVERLONG:
            plain = plain.replace(overlong, character)
        if _DOT_SEGMENT.search(plain) is not None:
            return True
        if plain == path:
            return False
        path = plain
    return True
