"""Keys of a terminal, one at a time and without Enter; the terminal is as before in the end."""

from __future__ import annotations

import os
import re
import select
import sys
import termios
import tty
from collections import deque
from typing import Any, Self

_KEYS = re.compile(r"\x1b(?:\[[0-9;]*[A-Za-z~]|O[A-Z])|.", re.DOTALL)
"""A control sequence, or a character."""

_NAMES = {
    **dict.fromkeys(("\x1b[A", "\x1bOA"), "up"),
    **dict.fromkeys(("\x1b[B", "\x1bOB"), "down"),
    **dict.fromkeys(("\r", "\n"), "enter"),
    **dict.fromkeys(("\x7f", "\x08"), "back"),
    "\x1b": "escape",
}


class Keyboard:
    """The standard input, while it is read by keys."""

    def __init__(self) -> None:
        self._descriptor = sys.stdin.fileno()
        self._before: list[Any] = []
        self._waiting: deque[str] = deque()  # keys that were read together with others

    def __enter__(self) -> Self:
        self._before = termios.tcgetattr(self._descriptor)
        tty.setcbreak(self._descriptor)
        return self

    def __exit__(self, *_: object) -> None:
        termios.tcsetattr(self._descriptor, termios.TCSADRAIN, self._before)

    def read(self, seconds: float) -> str | None:
        """Return the next key: a character, or a name; None where none comes in time.

        A key without a meaning here is an empty text.

        Raises:
            EOFError: the terminal is gone.
        """
        if not self._waiting:
            if not select.select([self._descriptor], [], [], seconds)[0]:
                return None
            data = os.read(self._descriptor, 1024)
            if not data:
                raise EOFError
            self._waiting.extend(_KEYS.findall(data.decode("utf-8", "ignore")))
        if not self._waiting:
            return None
        key = self._waiting.popleft()
        return _NAMES.get(key, key if key.isprintable() else "")
