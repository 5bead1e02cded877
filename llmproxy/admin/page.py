"""One page of the admin site: how it is read, to whom it belongs, and how a response is written.

A browser may reach the site, too, and run the page of somebody whose name points here for a moment
(DNS rebinding): whatever is not for probes and Prometheus asks for which host it is read.
"""

from __future__ import annotations

import hmac
import ipaddress
import socket
from collections.abc import Callable, Collection, Container
from urllib.parse import parse_qsl

import msgspec

from llmproxy.config import Secret
from llmproxy.config.values import Wrong
from llmproxy.http1.headers import host_of
from llmproxy.server.handler import NOT_DONE_YET, Handler
from llmproxy.server.request import Request

JSON = b"application/json"
TEXT = b"text/plain; charset=utf-8"

FOREIGN = "The Host field names another site than this one; see `hosts` in [admin]."

_FOREIGN_PAGES = (b"cross-site", b"same-site")

Response = tuple[int, bytes, bytes]
"""Status, content type, body."""


class ReadOnly(Handler):
    """One path that is read with GET or HEAD; any other method is a 405.

    Args:
        is_ours: whether a request is for this site; else it is a 421.
    """

    def __init__(self, is_ours: Callable[[Request], bool]) -> None:
        super().__init__()
        self._is_ours = is_ours

    def render(self, request: Request) -> int:
        """Respond, or refuse; a body is neither needed nor kept."""
        if not self._is_ours(request):
            return respond(request, error(421, FOREIGN))
        if request.method in (b"GET", b"HEAD"):
            return self.read(request)
        refusal = error(405, "This endpoint is only read.")
        return respond(request, refusal, (b"allow", b"GET, HEAD"))

    def read(self, request: Request) -> int:
        """Respond to a GET or a HEAD; returns what ``render`` returns."""
        raise NotImplementedError("a page is read")


class Changing(Handler):
    """Paths below which something is changed, for whoever shows the admin token as a Bearer.

    No web page knows the token, and none can send it across: there is nothing to forge.

    Args:
        token: returns what a change must show, or None where nothing can be changed.
        is_ours: whether a request is for this site; else it is a 421.
    """

    def __init__(
        self, token: Callable[[], Secret | None], is_ours: Callable[[Request], bool]
    ) -> None:
        super().__init__()
        self._token = token
        self._is_ours = is_ours

    def render(self, request: Request) -> int:
        """Respond at once; a body is neither needed nor kept."""
        if not self._is_ours(request):
            return respond(request, error(421, FOREIGN))
        return self.take(request)

    def take(self, request: Request) -> int:
        """Respond to a request for this site; returns what ``render`` returns."""
        raise NotImplementedError("a subclass says what is changed")

    def refuse_stranger(self, request: Request) -> bool:
        """Return whether the request does not show the token; it has its response then."""
        if (token := self._token()) is None:
            text = "Nothing can be changed here: the configuration has no `token` in [admin]."
            respond(request, error(403, text))
            return True
        if not _shows(request, token):
            text = "A change needs the admin token, as a Bearer."
            respond(request, error(401, text), (b"www-authenticate", b"Bearer"))
            return True
        return False


class Page(ReadOnly):
    """A path whose response is made at once.

    Args:
        make: makes the response to one request.
        is_ours: whether a request is for this site; else it is a 421.
        more: further header fields of the response.
    """

    def __init__(
        self,
        make: Callable[[Request], Response],
        is_ours: Callable[[Request], bool] = lambda request: True,
        more: tuple[tuple[bytes, bytes], ...] = (),
    ) -> None:
        super().__init__(is_ours)
        self._make = make
        self._more = more

    def read(self, request: Request) -> int:
        """Respond at once."""
        return respond(request, self._make(request), *self._more)


class NotFound(Handler):
    """Every other path, with any method."""

    def render(self, request: Request) -> int:
        """Respond at once."""
        return respond(request, error(404, "There is nothing at this path."))


def is_ours(request: Request, hosts: Container[str]) -> bool:
    """Return whether the host that a request names cannot be somebody else's.

    Nobody else can have an address here, or a name without a dot.  Through a Unix socket comes no
    browser, and none leaves ``Host`` out.
    """
    name = host_of(request.first.get(b"host")).removesuffix(".")
    if getattr(request.client, "host", None) is None or "." not in name:
        return True
    if name.endswith(".localhost") or name in hosts or name == socket.gethostname().lower():
        return True
    try:
        ipaddress.ip_address(name.strip("[]"))
    except ValueError:
        return False
    return True


def _shows(request: Request, token: Secret) -> bool:
    """Return whether a request shows the token, in a time that does not tell how much is right."""
    scheme, _, value = request.first.get(b"authorization", b"").partition(b" ")
    shown = value.strip(b" ") if scheme.lower() == b"bearer" else b""
    return hmac.compare_digest(shown, token.reveal().encode("ascii"))


def parameters(request: Request, known: Collection[str]) -> dict[str, str]:
    """Return what the query of a request says, by name.

    Args:
        known: the names that may be there, each at most once.

    Raises:
        Wrong: the query says something else.
    """
    query = request.uri.partition(b"?")[2].decode("latin-1")
    pairs = parse_qsl(query, keep_blank_values=True)
    given = dict(pairs)
    if len(given) < len(pairs) or not given.keys() <= set(known):
        *others, last = [f"`{name}`" for name in known]
        words = f"{', '.join(others)} and {last}" if others else last
        raise Wrong(f"nothing in the query but {words}, each at most once")
    return given


def is_foreign_page(request: Request) -> bool:
    """Return whether a page of another site sends the request, in somebody's browser.

    Such a page could not read the response; but it could take the place of those who may.
    """
    first = request.first
    return b"origin" in first or first.get(b"sec-fetch-site") in _FOREIGN_PAGES


def respond(request: Request, response: Response, *more: tuple[bytes, bytes]) -> int:
    """Send a response at once; ``more`` are further header fields."""
    status, kind, body = response
    request.start(
        status,
        [
            (b"content-type", kind),
            (b"content-length", b"%d" % len(body)),
            (b"cache-control", b"no-store"),
            *more,
        ],
    )
    request.write(body)
    request.finish()
    return NOT_DONE_YET  # it is finished: Twisted must not finish it again


def json(value: object) -> Response:
    """Return a response that holds ``value`` in JSON."""
    return 200, JSON, msgspec.json.encode(value) + b"\n"


def error(status: int, message: str) -> Response:
    """Return a refusal, in JSON."""
    return status, JSON, msgspec.json.encode({"error": {"message": message}})
