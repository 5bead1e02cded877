"""The end of a body, kept for the case that it ends badly.

It is content, and kept where a route says so (``capture = "content"``) and nowhere else.
"""

from __future__ import annotations

from collections.abc import Callable

MOST = 4096


class LastBytes:
    """Keeps the last bytes of a body, and hands each chunk on.

    Args:
        copy: called with each chunk, or None.

    Attributes:
        kept: at most :data:`MOST` bytes, as they came from the provider.
    """

    __slots__ = ("_copy", "kept")

    def __init__(self, copy: Callable[[bytes], None] | None = None) -> None:
        self._copy = copy
        self.kept = b""

    def feed(self, data: bytes) -> None:
        """Take a chunk."""
        self.kept = data[-MOST:] if len(data) >= MOST else (self.kept + data)[-MOST:]
        if self._copy is not None:
            self._copy(data)
