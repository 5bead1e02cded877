"""The page that reads a paced stream and says what is between: its files, and how they are served.

The same files are served on the proxy port and on the admin site; two attributes of ``body`` say
which of them it is, and where the stream is.  Nothing outside is loaded, which a content security
policy sees to, and the page keeps nothing.
"""

from __future__ import annotations

from pathlib import Path

import msgspec

from llmproxy.http1.grammar import Fields

_FOLDER = Path(__file__).parent / "assets"
_KINDS = {
    "page.html": b"text/html; charset=utf-8",
    "page.css": b"text/css; charset=utf-8",
    "page.mjs": b"text/javascript; charset=utf-8",
    "verdict.mjs": b"text/javascript; charset=utf-8",
}
_POLICY = (
    b"default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; "
    b"img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
POLICY_FIELDS = (
    (b"content-security-policy", _POLICY),
    (b"x-content-type-options", b"nosniff"),
    (b"referrer-policy", b"no-referrer"),
)
"""The fields by which a browser lets the page do nothing but ask the site that it is from."""


class PageFile(msgspec.Struct, frozen=True):
    """One file of the page."""

    kind: bytes
    body: bytes


def proxy_files() -> dict[bytes, PageFile]:
    """Return the files by what stands behind ``/-/pace/``; the page itself has no name."""
    files = _read()
    return {b"": files.pop(b"page.html"), **files}


def admin_files() -> dict[bytes, PageFile]:
    """Return the files by what stands behind ``/pace`` of the admin site."""
    files = _read()
    page = files.pop(b"page.html")
    body = page.body.replace(b'="./', b'="./pace/')
    body = body.replace(b'data-site="proxy" data-stream="../pace"', ADMIN_BODY)
    named = {b"/" + name: file for name, file in files.items()}
    return {b"": PageFile(page.kind, body), **named}


ADMIN_BODY = b'data-site="admin" data-stream="./pace/stream"'
"""What the page is told where it is the admin site's."""


def page_fields(file: PageFile) -> Fields:
    """Return the header fields of a file, but for those that name the request."""
    return [
        (b"content-type", file.kind),
        (b"content-length", b"%d" % len(file.body)),
        (b"cache-control", b"no-store"),
        *POLICY_FIELDS,
    ]


def _read() -> dict[bytes, PageFile]:
    return {
        name.encode("ascii"): PageFile(kind, (_FOLDER / name).read_bytes())
        for name, kind in _KINDS.items()
    }
