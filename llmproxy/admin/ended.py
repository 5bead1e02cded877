"""The flight recorder on the admin site: requests that did not end as they should.

``GET /streams/ended`` shows them, the newest first, or those of one ``reason``, ``client``,
``provider`` or ``route``, and as many as ``limit``; ``/streams/ended/ID`` shows one.  That is a
capsule, which ``llmproxy demo --replay`` plays again (ADR-0037).
"""

from __future__ import annotations

from collections.abc import Callable

from llmproxy.admin.page import ReadOnly, Response, error, json, parameters, respond
from llmproxy.admin.streams import number
from llmproxy.config.values import Wrong
from llmproxy.record.flight import FlightRecorder
from llmproxy.server.request import Request

PATH = b"/streams/ended"

_FILTERS = {
    "reason": "end_reason",
    "client": "client",
    "provider": "provider",
    "route": "route",
}
"""What the list can be asked for, and the field of a capsule that must have the value."""

_MOST = 1000


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
            return respond(request, self._list(request))
        found = self._flights.find(request.path[len(PATH) + 1 :].decode("latin-1"))
        if found is None:
            text = "No request with this id is kept; of each end reason only the newest are."
            return respond(request, error(404, text))
        return respond(request, json(found))

    def _list(self, request: Request) -> Response:
        try:
            given = parameters(request, (*_FILTERS, "limit"))
            limit = number(given, "limit", _MOST, _MOST)
        except Wrong as wrong:
            return error(400, f"Expected {wrong.expected}.")
        wanted = [(field, given[name]) for name, field in _FILTERS.items() if name in given]
        chosen = [
            one
            for one in self._flights.newest_first()
            if all(getattr(one, field) == value for field, value in wanted)
        ]
        return json(chosen[:limit])
