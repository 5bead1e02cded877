"""What may stand in a stream of events without a meaning: comments, and Anthropic's ping.

A comment is a line that begins with a colon (HTML, section 9.2.6, "Interpreting an event stream").
Whoever reads events drops it; hops on the way count its bytes.  Anthropic's own streams use an
event instead, which its SDKs drop: ``ping``.
"""

from __future__ import annotations

from llmproxy.dialects.dialect import Dialect

LEAST = len(b":\n\n")
"""Bytes of the shortest comment with the empty line behind it."""

_PING = b'event: ping\ndata: {"type": "ping"}\n\n'
_COMMENT = b": heartbeat\n\n"


def padding(size: int) -> bytes:
    """Return a comment of exactly ``size`` bytes, line ends included, or nothing for 0.

    Args:
        size: 0, or at least :data:`LEAST`.
    """
    return b":" + b" " * (size - LEAST) + b"\n\n" if size else b""


def heartbeat(dialect: Dialect, least: int) -> bytes:
    """Return what tells readers and hops that a stream goes on, as a whole block of lines.

    Args:
        dialect: the provider's.
        least: how many bytes it has at least, line ends included.
    """
    beat = _PING if dialect is Dialect.ANTHROPIC else _COMMENT
    missing = least - len(beat)
    if missing <= 0:
        return beat
    if beat is _COMMENT:
        return _COMMENT[:-2] + b" " * missing + b"\n\n"
    return b":" + b" " * max(0, missing - len(b":\n")) + b"\n" + beat
