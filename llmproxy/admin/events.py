"""``/events``: the overview again and again, as one stream of server-sent events.

Each event is whole, so that none has to be remembered, and none is lost: a viewer that does not
take what it got is left out until it does, and for a minute at most.  A few viewers at once are
enough for all operators; to put the overview together for one of them is some milliseconds of the
reactor's time where thousands of streams run.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import msgspec
from twisted.internet.interfaces import IPushProducer
from twisted.internet.task import LoopingCall
from twisted.logger import Logger
from twisted.python.failure import Failure
from zope.interface import implementer

from llmproxy.admin.page import ReadOnly, error, is_foreign_page, parameters, respond
from llmproxy.admin.streams import PARAMETERS, Window, window_of
from llmproxy.config.values import Wrong
from llmproxy.errors import ClientGone
from llmproxy.http1.headers import ANTI_BUFFERING
from llmproxy.server.handler import NOT_DONE_YET
from llmproxy.server.request import Request

PATH = b"/events"

MOST_VIEWERS = 10
LONGEST_S = 60

_PATIENCE_S = 60.0
"""A viewer that takes nothing for so long gives its place to another."""

_SECONDS = re.compile(r"[1-9][0-9]?\Z")
_BEGIN = b"retry: 2000\n\n"

_log = Logger()


class Events(ReadOnly):
    """Serves the events.

    Args:
        overview: makes what is shown, of a window of the streams.
        reactor: keeps time.
        is_ours: whether a request is for this site; else it is a 421.

    Attributes:
        viewers: how many there are.
    """

    def __init__(
        self,
        overview: Callable[[Window], object],
        reactor: Any,
        is_ours: Callable[[Request], bool],
    ) -> None:
        super().__init__(is_ours)
        self._overview = overview
        self._reactor = reactor
        self.viewers = 0

    def read(self, request: Request) -> int:
        """Begin to send events, or refuse."""
        if is_foreign_page(request):
            return respond(request, error(403, "Pages of other sites may not call here."))
        try:
            given = parameters(request, (*PARAMETERS, "every"))
            window = window_of(given)
            every = given.get("every", "1")
            if _SECONDS.match(every) is None or int(every) > LONGEST_S:
                raise Wrong(f"`every` to be a whole number of seconds from 1 to {LONGEST_S}")
        except Wrong as wrong:
            return respond(request, error(400, f"Expected {wrong.expected}."))
        if self.viewers >= MOST_VIEWERS:
            text = f"As many pages and programs follow the events as may: {MOST_VIEWERS}."
            return respond(request, error(503, text), (b"retry-after", b"5"))
        request.start(200, [(b"content-type", b"text/event-stream"), *ANTI_BUFFERING])
        if request.method == b"HEAD":
            request.finish()
            return NOT_DONE_YET
        self.viewers += 1
        Viewer(request, lambda: self._overview(window), self._left).start(self._reactor, int(every))
        return NOT_DONE_YET

    def _left(self) -> None:
        self.viewers -= 1


@implementer(IPushProducer)
class Viewer:
    """One program that follows the events, until it leaves."""

    def __init__(
        self, request: Request, make: Callable[[], object], left: Callable[[], object]
    ) -> None:
        self._request = request
        self._make = make
        self._left = left
        self._paused_at: float | None = None
        self._call = LoopingCall(self.tell)

    def start(self, reactor: Any, every: int) -> None:
        """Send one event now, and one every so many seconds."""
        self._call.clock = reactor
        self._request.gone = lambda why: self._end()
        self._request.registerProducer(self, True)
        self._request.write(_BEGIN)
        self._call.start(every).addErrback(self._failed)

    def tell(self) -> None:
        """Send an event, unless what came before is not taken; that may not last for ever."""
        if self._paused_at is None:
            self._request.write(b"event: state\ndata: %b\n\n" % msgspec.json.encode(self._make()))
        elif self._call.clock.seconds() - self._paused_at >= _PATIENCE_S:
            self._request.abort(ClientGone("the viewer takes nothing"))

    def _failed(self, failure: Failure) -> None:
        _log.failure("the overview could not be made", failure)
        self._left()
        self._request.break_off()

    def _end(self) -> None:
        if self._call.running:
            self._call.stop()
            self._left()

    def pauseProducing(self) -> None:
        """The viewer does not take what it got."""
        self._paused_at = self._call.clock.seconds()

    def resumeProducing(self) -> None:
        """It has taken that."""
        self._paused_at = None

    def stopProducing(self) -> None:
        """It is gone."""
        self._end()
