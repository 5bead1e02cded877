"""``/pace`` on the admin site: the page of the paced stream, and a stream of this site's own.

The listener knows no clients, so that its stream asks for no key; some at once are enough for all
operators.  It measures the way to this site, which is another one than that of clients: for that,
the page leads to itself at the address that they use (ADR-0035).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from twisted.logger import Logger
from twisted.python.failure import Failure

from llmproxy.admin.page import Page, ReadOnly, Response, error, is_foreign_page, respond
from llmproxy.errors import ClientGone, ProxyError
from llmproxy.gateway.pace_page import POLICY_FIELDS, PageFile, admin_files
from llmproxy.http1.headers import ANTI_BUFFERING
from llmproxy.server.handler import NOT_DONE_YET, Handler
from llmproxy.server.request import Request
from llmproxy.stream.pace import PacedSource, pace_of, read_query
from llmproxy.stream.relay import Batch, Relay

PATH = b"/pace"
MOST_STREAMS = 10

_log = Logger()


class PacedStreams(ReadOnly):
    """Serves the site's own paced stream; a few at once, and none to pages of other sites.

    Args:
        is_ours: whether a request is for this site; else it is a 421.
        reactor: paces.
        clock: monotonic seconds.
        wall: seconds since the epoch.

    Attributes:
        running: how many there are.
    """

    def __init__(
        self,
        is_ours: Callable[[Request], bool],
        reactor: Any,
        clock: Callable[[], float],
        wall: Callable[[], float],
    ) -> None:
        super().__init__(is_ours)
        self._reactor = reactor
        self._clock = clock
        self._wall = wall
        self._batch = Batch()
        self.running = 0

    def read(self, request: Request) -> int:
        """Begin a stream, or refuse it."""
        if is_foreign_page(request):
            return respond(request, error(403, "Pages of other sites may not call here."))
        if self.running >= MOST_STREAMS:
            text = f"{MOST_STREAMS} streams run here at once at most; try again."
            return respond(request, error(503, text), (b"retry-after", b"1"))
        try:
            pace = pace_of(read_query(request.uri.partition(b"?")[2]))
        except ProxyError as refusal:
            return respond(request, error(refusal.status, refusal.message))
        request.start(200, [(b"content-type", pace.content_type), *ANTI_BUFFERING])
        if request.method == b"HEAD":
            request.finish()
        else:
            source = PacedSource(pace, self._reactor, self._clock, self._wall)
            self._pump(request, source, breaks=pace.break_after is not None)
        return NOT_DONE_YET

    def _pump(self, request: Request, source: PacedSource, *, breaks: bool) -> None:
        relay = Relay(
            source,
            request,
            self._reactor,
            self._clock,
            idle=None,
            batch=self._batch,
            gaps=_nothing,
            delays=_nothing,
        )
        request.gone = lambda _: relay.leave()
        self.running += 1

        def ended(result: Failure | None) -> None:
            self.running -= 1
            self._batch.read()
            if isinstance(result, Failure):
                if result.check(ClientGone) is None:
                    _log.failure("a paced stream failed", result)
                    request.break_off()
            elif breaks:
                request.break_off()
            else:
                request.finish()

        done = relay.start()
        request.flush()
        done.addBoth(ended)


def pace_pages(
    reactor: Any,
    clock: Callable[[], float],
    wall: Callable[[], float],
    is_ours: Callable[[Request], bool],
) -> dict[bytes, Handler]:
    """Return the handlers of ``/pace`` and of what is below it.

    The arguments are those of :class:`PacedStreams`.
    """
    pages: dict[bytes, Handler] = {
        PATH + name: _page(file, is_ours) for name, file in admin_files().items()
    }
    pages[PATH + b"/stream"] = PacedStreams(is_ours, reactor, clock, wall)
    return pages


def _page(file: PageFile, is_ours: Callable[[Request], bool]) -> Page:
    response: Response = (200, file.kind, file.body)
    return Page(lambda request: response, is_ours, POLICY_FIELDS)


def _nothing(seconds: float) -> None:
    """What is timed of providers' streams is left alone."""
