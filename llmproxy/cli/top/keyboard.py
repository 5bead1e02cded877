"""Keys of a terminal, one at a time and without Enter; the terminal is as before in the end."""

from __future__ import annotations

import codecs
import os
import re
import select
import sys
import termios
import time
import tty
from contextlib import suppress
from typing import Self

_KEY = re.compile(r"\x1b(?:\[[0-9;]*[A-Za-z~]|O[A-Z])|.", re.DOTALL)
"""A control sequence, or a character."""

_UNFINISHED = re.compile(r"\x1b(?:\[[0-9;]*|O)?")

_ESCAPE_S = 0.05
"""Seconds for which the rest of a control sequence may be late; then it was the Escape key.

A key on a slow line comes in pieces; ncurses waits longer (ESCDELAY), vim's users about so long.
"""

_NAMES = {
    **dict.fromkeys(("\x1b[A", "\x1bOA"), "up"),
    **dict.fromkeys(("\x1b[B", "\x1bOB"), "down"),
    **dict.fromkeys(("\r", "\n"), "enter"),
    **dict.fromkeys(("\x7f", "\x08"), "back"),
    "\x1b": "escape",
    "\t": "tab",
}


class Keyboard:
    """The standard input, while it is read by keys; it can be entered again and again."""

    def __init__(self) -> None:
        self._descriptor = sys.stdin.fileno()
        self._before = termios.tcgetattr(self._descriptor)
        self._decoder = codecs.getincrementaldecoder("utf-8")("ignore")
        self._waiting = ""  # what was read, and is no key yet

    def __enter__(self) -> Self:
        tty.setcbreak(self._descriptor)
        return self

    def __exit__(self, *_: object) -> None:
        with suppress(termios.error):  # the terminal is gone
            termios.tcsetattr(self._descriptor, termios.TCSADRAIN, self._before)

    def read(self, seconds: float) -> str | None:
        """Return the next key: a character, or a name; None where none comes in time.

        A key without a meaning here is an empty text.

        Raises:
            EOFError: the terminal is gone.
        """
        deadline = time.monotonic() + seconds
        while not self._waiting or _UNFINISHED.fullmatch(self._waiting):
            left = _ESCAPE_S if self._waiting else max(0.0, deadline - time.monotonic())
            if not select.select([self._descriptor], [], [], left)[0]:
                break
            self._waiting += self._decoder.decode(self._read())
        if (found := _KEY.match(self._waiting)) is None:
            return None
        self._waiting = self._waiting[found.end() :]
        key = found[0]
        return _NAMES.get(key, key if key.isprintable() else "")

    def _read(self) -> bytes:
        """Return what has come.

        Raises:
            EOFError: the terminal is gone.
        """
        try:
            data = os.read(self._descriptor, 1024)
        except OSError:  # EIO, where the window was closed
            data = b""
        if not data:
            raise EOFError
        return data
