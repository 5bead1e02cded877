"""A reactor of which a test lets one turn pass at a time; it has nothing but ``callLater(0)``."""

from __future__ import annotations

from collections.abc import Callable


class Call:
    """A call that is to be made in the next turn."""

    def __init__(self, calls: list[Call], call: Callable[[], object]) -> None:
        self._calls = calls
        self.call = call
        calls.append(self)

    def cancel(self) -> None:
        """Do not make it."""
        self._calls.remove(self)


class TurningReactor:
    """A reactor in turns: what is called for in one is done in the next."""

    def __init__(self) -> None:
        self.calls: list[Call] = []

    def callLater(self, delay: float, call: Callable[[], object]) -> Call:
        """Call in the next turn."""
        assert delay == 0
        return Call(self.calls, call)

    def turn(self) -> None:
        """Let one turn pass."""
        for one in list(self.calls):
            one.cancel()
            one.call()
