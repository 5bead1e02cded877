"""Traces to an OpenTelemetry collector, by OTLP over HTTP with JSON (``POST /v1/traces``).

This output blocks, so it has a thread and a queue of its own: a collector that hangs holds up no
other output.  A batch is one request on a connection of its own, with one deadline for all of it.
``spans.py`` says what a span is.
"""

from __future__ import annotations

import ssl
import threading
from collections.abc import Callable
from contextlib import suppress
from http.client import HTTPConnection, HTTPException, HTTPResponse, HTTPSConnection
from math import inf

import msgspec

from llmproxy.config import Url
from llmproxy.record.sink_queue import Dropped, Retry
from llmproxy.record.spans import export_request
from llmproxy.record.trace import Trace

BATCH = 512
"""Most spans in a request, as the SDKs of OpenTelemetry have it."""

GATHER_S = 1.0
"""Seconds for which spans wait for one another."""

_DEADLINE_S = 4.0
"""Seconds that a request may take; less than the process waits at its end."""

_AGAIN_S = 1.0
"""Seconds until the next try at a collector that is not there."""

_RESPONSE_BYTES = 65536
"""Most bytes that are read of a collector's response."""

_AGAIN = frozenset((429, 502, 503, 504))
"""The statuses after which OTLP lets a client try again."""


class _Partial(msgspec.Struct, rename="camel"):
    """How many spans the collector refused of a batch that it took, and why."""

    rejected_spans: int | str = 0
    error_message: str = ""


class _Response(msgspec.Struct, rename="camel"):
    partial_success: _Partial | None = None


class Otlp:
    """Sends traces to a collector.

    Args:
        url: the collector; ``/v1/traces`` is put behind its path.
        resource: attributes of this process, such as ``service.name``.
        deadline_s: seconds that one request may take.
    """

    name = "otlp"
    patience_s = 5.0
    keeps_content = False

    def __init__(
        self, url: Url, resource: dict[str, str], *, deadline_s: float = _DEADLINE_S
    ) -> None:
        self._url = url
        self._path = f"{url.path}/v1/traces"
        self._resource = resource
        self._deadline_s = deadline_s
        self._context = ssl.create_default_context() if url.scheme == "https" else None

    def put(self, traces: list[Trace]) -> None:
        """Send these traces as one request.

        Raises:
            Retry: the collector cannot be reached, or asks for another try.
            Dropped: the collector refused some of them.
            OSError: the collector refused all.
        """
        body, refused = export_request(traces, self._resource)
        try:
            status, response = self._post(body)
        except (OSError, HTTPException) as error:
            raise Retry(str(error) or type(error).__name__, again_s=_AGAIN_S) from error
        if status in _AGAIN:
            raise Retry(f"the collector answered {status}", again_s=_AGAIN_S)
        if not 200 <= status < 300:
            raise OSError(f"the collector answered {status}")
        rejected, why = _rejected(response)
        if rejected or refused:
            count = min(rejected + refused, len(traces))
            raise Dropped(count, f"the collector refused spans: {why}" if rejected else "no span")

    def maintenance(self) -> float:
        """A collector needs none."""
        return inf

    def reopen(self) -> None:
        """No connection is kept."""

    def close(self) -> None:
        """No connection is kept."""

    def _post(self, body: bytes) -> tuple[int, bytes]:
        connection = self._connection()
        connection.connect()
        deadline = threading.Timer(self._deadline_s, _cutter(connection))
        deadline.daemon = True
        deadline.start()
        try:
            fields = {"Content-Type": "application/json", "Connection": "close"}
            connection.request("POST", self._path, body, fields)
            response: HTTPResponse = connection.getresponse()
            return response.status, response.read(_RESPONSE_BYTES)
        finally:
            deadline.cancel()
            connection.close()

    def _connection(self) -> HTTPConnection:
        host, port = self._url.host, self._url.port
        if self._context is None:
            return HTTPConnection(host, port, timeout=self._deadline_s)
        return HTTPSConnection(host, port, timeout=self._deadline_s, context=self._context)


def _cutter(connection: HTTPConnection) -> Callable[[], None]:
    """Return what ends a request; the socket's own timeout begins again with every byte."""
    sock = connection.sock

    def cut() -> None:
        with suppress(OSError):
            sock.shutdown(2)

    return cut


def _rejected(response: bytes) -> tuple[int, str]:
    """Return how many spans the collector refused of a request that it accepted, and why."""
    try:
        partial = msgspec.json.decode(response, type=_Response).partial_success
        return (0, "") if partial is None else (int(partial.rejected_spans), partial.error_message)
    except ValueError:  # an empty response, or one in another encoding
        return 0, ""
