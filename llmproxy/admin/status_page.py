"""``/``: the page that an operator keeps open, and its files.

The page follows ``/events``.  Nothing outside is loaded, which a content security policy sees to,
and nothing is kept: the admin token lasts as long as the page does.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from llmproxy.admin.page import Page, Response
from llmproxy.gateway.pace_page import POLICY_FIELDS
from llmproxy.server.handler import Handler
from llmproxy.server.request import Request

_FOLDER = Path(__file__).parent / "assets"
_FILES = {
    b"/": ("status.html", b"text/html; charset=utf-8"),
    b"/status.css": ("status.css", b"text/css; charset=utf-8"),
    b"/status.mjs": ("status.mjs", b"text/javascript; charset=utf-8"),
}


def status_pages(is_ours: Callable[[Request], bool]) -> dict[bytes, Handler]:
    """Return the handlers of the page's files, by their paths.

    Args:
        is_ours: whether a request is for this site; else it is a 421.
    """
    return {path: _page(name, kind, is_ours) for path, (name, kind) in _FILES.items()}


def _page(name: str, kind: bytes, is_ours: Callable[[Request], bool]) -> Page:
    response: Response = (200, kind, (_FOLDER / name).read_bytes())
    return Page(lambda request: response, is_ours, POLICY_FIELDS)
