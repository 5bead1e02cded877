"""``/streams``: windows of the requests that are being served, one of them, and its end.

``GET /streams`` takes what ``admin/streams.py`` lists as parameters.  ``GET /streams/ID`` shows one
request, and ``DELETE /streams/ID`` ends it, with ``killed`` as its end reason; that asks for the
admin token as a Bearer.
"""

from __future__ import annotations

from collections.abc import Callable

from twisted.logger import Logger

from llmproxy.admin.page import Changing, Response, error, json, parameters, respond
from llmproxy.admin.streams import PARAMETERS, Streams, window_of
from llmproxy.config import Secret
from llmproxy.config.values import Wrong
from llmproxy.server.handler import NOT_DONE_YET
from llmproxy.server.request import Request

PATH = b"/streams"

_ALLOWED = (b"allow", b"GET, HEAD, DELETE")

_log = Logger()


def window_page(streams: Streams, request: Request) -> Response:
    """Return the response to ``GET /streams``."""
    try:
        window = window_of(parameters(request, PARAMETERS))
    except Wrong as wrong:
        return error(400, f"Expected {wrong.expected}.")
    return json(streams.window(window))


class OneStream(Changing):
    """``/streams/ID``.

    Args:
        streams: those that are being served.
        token: returns what a change must show, or None where nothing can be changed.
        is_ours: whether a request is for this site; else it is a 421.
    """

    def __init__(
        self,
        streams: Streams,
        token: Callable[[], Secret | None],
        is_ours: Callable[[Request], bool],
    ) -> None:
        super().__init__(token, is_ours)
        self._streams = streams

    def take(self, request: Request) -> int:
        """Show the request, or end it."""
        if request.method not in (b"GET", b"HEAD", b"DELETE"):
            return respond(request, error(405, "This endpoint takes GET and DELETE."), _ALLOWED)
        ends = request.method == b"DELETE"
        if ends and self.refuse_stranger(request):
            return NOT_DONE_YET
        found = self._streams.find(request.path[len(PATH) + 1 :].decode("latin-1"))
        if found is None:
            return respond(request, error(404, "No request with this id is being served."))
        row = self._streams.row(found)
        if ends:
            peer = request.channel.peer_name
            _log.info("request {id} is ended by an operator, from {peer}", id=row.id, peer=peer)
            found.kill()
        return respond(request, json(row))
