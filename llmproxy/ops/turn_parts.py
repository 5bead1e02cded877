"""Which parts of the program a watch over the reactor's turns knows by name.

They are what may take long in one turn beside the reading and writing of sockets, which the loop
itself names.
"""

from __future__ import annotations

from llmproxy.admin.events import Viewer
from llmproxy.admin.metrics_page import Making
from llmproxy.admin.page import Page
from llmproxy.gateway.gateway import Gateway
from llmproxy.gateway.recorder import Recorder
from llmproxy.net.timers import Timers
from llmproxy.net.turn_watch import TurnWatch
from llmproxy.record.log import JsonLog
from llmproxy.record.writer import Writer
from llmproxy.server.connection import ClientConnection
from llmproxy.server.site import Site
from llmproxy.stream.relay import Batch, Relay
from llmproxy.upstream.pool import ProviderPool

_PARTS = (
    (Page, "read", "a page of the admin site"),
    (Making, "go_on", "a slice of the metrics"),
    (Viewer, "tell", "an event for a viewer"),
    (Gateway, "render", "a request begins"),
    (ProviderPool, "request", "a request to a provider"),
    (Relay, "start", "a body begins"),
    (Batch, "read", "a batch of chunks is read"),
    (Recorder, "close", "a record is closed"),
    (Recorder, "_write", "a record is written"),
    (JsonLog, "_put_access", "access lines"),
    (JsonLog, "__call__", "a log line"),
    (Writer, "write", "a record is handed to its writer"),
    (ClientConnection, "connectionMade", "a connection begins"),
    (ClientConnection, "connectionLost", "a connection ends"),
    (Site, "_check_all", "the sweep over client connections"),
)


def name_parts(watch: TurnWatch) -> None:
    """Let ``watch`` time these parts, and the timers of :class:`Timers` by what they call."""
    for owner, attribute, name in _PARTS:
        watch.part(owner, attribute, name)
    watch.later(Timers, "callLater")
