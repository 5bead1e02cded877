"""All that an operator sees at one glance, put together for the page and for ``llmproxy top``."""

from __future__ import annotations

from collections.abc import Callable

import msgspec

from llmproxy.admin.clients import ClientRow, Clients
from llmproxy.admin.providers import ProviderRow, Providers
from llmproxy.admin.streams import Streams, StreamWindow, Window
from llmproxy.record.flight import Capsule, FlightRecorder

_CLIENTS = 50
"""Most clients that are shown, those with the most streams; ``/clients`` has all."""

_ENDED = 20
"""How many abnormal ends are shown; ``/streams/ended`` has more."""


class Draining(msgspec.Struct, frozen=True):
    """How far a shutdown has come.

    Attributes:
        remaining: how many requests it waits for.
        cut_in_s: seconds until they are cut.
    """

    remaining: int
    cut_in_s: float


class Reloaded(msgspec.Struct, frozen=True):
    """How the last reload went; the start counts as one.

    Attributes:
        succeeded: the configuration in use is that of the file as it was then.
        last_success: when a reload went well last, in RFC 3339.
    """

    succeeded: bool
    last_success: str


class ProcessRow(msgspec.Struct, frozen=True):
    """The process itself.

    Attributes:
        version, instance: of the daemon.
        time, started: now, and when the process began, in RFC 3339.
        uptime_s: seconds since then.
        connections: of clients.
        draining: None unless it shuts down.
        reload: how the last one went.
    """

    version: str
    instance: str
    time: str
    started: str
    uptime_s: float
    connections: int
    draining: Draining | None
    reload: Reloaded


class EndedRow(msgspec.Struct, frozen=True):
    """One request that did not end as it should; the fields mean what they mean in its record.

    Attributes:
        cause: one word that distinguishes ends of the same reason.
    """

    id: str
    time: str
    client: str | None
    route: str | None
    provider: str | None
    model: str | None
    status: int | None
    end_reason: str
    error: str | None
    cause: str | None
    duration_s: float
    bytes_out: int


_ended_fields = EndedRow.__struct_fields__


class State(StreamWindow, frozen=True):
    """Everything, as it is now; of the streams those of a window.

    Attributes:
        process: the process itself.
        providers: those of the configuration.
        clients: those with the most streams.
        ended: the newest abnormal ends.
    """

    process: ProcessRow
    providers: list[ProviderRow]
    clients: list[ClientRow]
    ended: list[EndedRow]


class Overview:
    """What one process does.

    Args:
        process: makes what is known of the process itself.
        streams, providers, clients, flights: the parts that are shown.
    """

    def __init__(
        self,
        process: Callable[[], ProcessRow],
        streams: Streams,
        providers: Providers,
        clients: Clients,
        flights: FlightRecorder,
    ) -> None:
        self._process = process
        self._streams = streams
        self._providers = providers
        self._clients = clients
        self._flights = flights

    def __call__(self, window: Window) -> State:
        """Return everything, as it is now; of the streams those of the window."""
        found = self._streams.window(window)
        return State(
            total=found.total,
            matching=found.matching,
            offset=found.offset,
            streams=found.streams,
            process=self._process(),
            providers=self._providers.rows(),
            clients=self._clients.rows(_CLIENTS),
            ended=[_brief(one) for one in self._flights.newest_first()[:_ENDED]],
        )


def _brief(capsule: Capsule) -> EndedRow:
    return EndedRow(*(getattr(capsule, name) for name in _ended_fields))
