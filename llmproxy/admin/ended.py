"""The flight recorder on the admin site: requests that did not end as they should.

``GET /streams/ended`` shows them, the newest first; ``/streams/ended/ID`` shows one of them.  That
is a capsule, which ``llmproxy demo --replay`` plays again (ADR-0037).
"""

from __future__ import annotations

from collections.abc import Callable

from llmproxy.admin.page import ReadOnly, error, json, respond
from llmproxy.record.flight import FlightRecorder
from llmproxy.server.request import Request

PATH = b"/streams/ended"


class Ended(ReadOnly):
    """The list, and below it each capsule by its request's id.

    Args:
        flights: keeps them.
        is_ours: whether a request is for this site; else it is a 421.
    """

    def __init__(self, flights: FlightRecorder, is_ours: Callable[[Request], bool]) -> None:
        super().__init__(is_ours)
        self._flights = flights

    def read(self, request: Request) -> int:
        """Respond at once."""
        if request.path == PATH:
            return respond(request, json(self._flights.newest_first()))
        found = self._flights.find(request.path[len(PATH) + 1 :].decode("latin-1"))
        if found is None:
            text = "No request with this id is kept; of each end reason only the newest are."
            return respond(request, error(404, text))
        return respond(request, json(found))
