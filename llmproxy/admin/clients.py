"""``/clients``: every client of the configuration, how many streams it has, what it has left."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping

import msgspec

from llmproxy.config import Client
from llmproxy.gateway.recorder import Recorder
from llmproxy.policy.limits import ClientLimits, Use


class ClientRow(msgspec.Struct, frozen=True):
    """One client of the configuration, or another one while it has streams.

    Attributes:
        client: its name.
        streams: how many of its requests are being served.
        limits: what it uses of each limit that it has, by the limit's name.
    """

    client: str
    streams: int
    limits: dict[str, Use]


class Clients:
    """The clients of the configuration that is in use.

    Args:
        configured: returns them, by name.
        recorder: knows what is being served.
        limits: knows what they use of their limits.
    """

    def __init__(
        self,
        configured: Callable[[], Mapping[str, Client]],
        recorder: Recorder,
        limits: ClientLimits,
    ) -> None:
        self._configured = configured
        self._recorder = recorder
        self._limits = limits

    def rows(self, most: int | None = None) -> list[ClientRow]:
        """Return a row for each, those with the most streams first.

        A client that is none of the configuration's has one while it has streams: ``anonymous``,
        or one that a reload has removed.

        Args:
            most: most rows; None for all.
        """
        streams = Counter(
            one.trace.client for one in self._recorder.exchanges if one.trace.client is not None
        )
        names = list(dict.fromkeys((*self._configured(), *streams)))
        names.sort(key=lambda name: -streams[name])
        return [ClientRow(name, streams[name], self._limits.use(name)) for name in names[:most]]
