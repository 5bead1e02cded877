"""The line to change: for a program and a finding, what an operator writes where.

Each piece says whether it was tried here: with a real program and a stream, by a test or by hand.
What is known of a service that cannot be run here (Cloudflare, AWS) comes from its documentation.
"""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

from llmproxy.cli.doctor.hops import LLMPROXY, NODE
from llmproxy.cli.doctor.verdict import Guilt, Kind


class Advice(msgspec.Struct, frozen=True, kw_only=True):
    """What to change.

    Attributes:
        program: whose configuration it is.
        where: in that configuration.
        lines: what to write there; empty where nothing helps.
        note: what else there is to know.
        tried: whether it was tried here.
    """

    program: str
    where: str = ""
    lines: tuple[str, ...] = ()
    note: str = ""
    tried: bool = True


_HELD = (Kind.HELD, Kind.BLOCKS, Kind.HELD_AT_FIRST, Kind.LATE, Kind.LENGTH_KNOWN, Kind.TAKES_MUCH)
_PACKED = (Kind.COMPRESSED,)
_SILENCE = (Kind.CUT_IN_SILENCE,)
_LIMIT = (Kind.CUT, Kind.LIMIT_AHEAD)
_BREAK = (Kind.BREAK_HIDDEN, Kind.BREAK_LOST)
_FRAMING = (Kind.ASKED_IN_1_0,)
_CANCEL = (Kind.CANCEL_LOST, Kind.CANCEL_LOST_IN_SILENCE)
_LOST = (Kind.CANCEL_LOST_IN_SILENCE,)

_AT_LLMPROXY = "under [[routes]]"
_NGINX, _ROUTE = "in the location that passes requests on", "in the route"
_HTTP_11 = ("proxy_http_version 1.1;", 'proxy_set_header Connection "";')
_NO_CURE = "It has no line for that. timeouts.idle and heartbeat of llmproxy bound it."


def _lines(program: str, where: str, *lines: str, note: str = "", tried: bool = True) -> Advice:
    return Advice(program=program, where=where, lines=lines, note=note, tried=tried)


_TABLE: tuple[tuple[tuple[Kind, ...], Advice], ...] = (
    # nginx
    (_HELD, _lines("nginx", _NGINX, "proxy_buffering off;", *_HTTP_11)),
    (
        _PACKED,
        _lines("nginx", _NGINX, "gzip off;", note="Or take text/event-stream out of gzip_types."),
    ),
    (_SILENCE, _lines("nginx", _NGINX, "proxy_read_timeout 1h;")),
    ((*_FRAMING, *_BREAK), _lines("nginx", _NGINX, *_HTTP_11)),
    (_CANCEL, _lines("nginx", _NGINX, "proxy_ignore_client_abort off;", tried=False)),
    # HAProxy
    (
        _HELD,
        _lines(
            "HAProxy",
            "in defaults",
            "option http-no-delay",
            note="And no http-response wait-for-body.",
        ),
    ),
    (
        _PACKED,
        _lines(
            "HAProxy",
            "in the frontend or backend",
            "compression type application/json text/html",
            note="Every type but text/event-stream; or no compression at all.",
        ),
    ),
    (_SILENCE, _lines("HAProxy", "in defaults", "timeout client 1h", "timeout server 1h")),
    (_CANCEL, _lines("HAProxy", "", note=f"option abortonclose changes nothing. {_NO_CURE}")),
    # Caddy
    (
        _HELD,
        _lines(
            "Caddy",
            "in reverse_proxy",
            note="Take out response_buffers (2.6: buffer_responses): without it, Caddy holds "
            "nothing. flush_interval -1 is not needed, and with it 2.6 does not tell the far end "
            "that a client left in a silence.",
        ),
    ),
    (
        _CANCEL,
        _lines(
            "Caddy",
            "in reverse_proxy",
            note="Take out flush_interval -1: with it, 2.6 does not tell of a client that left in "
            "a silence.",
        ),
    ),
    (
        _PACKED,
        _lines(
            "Caddy",
            "in the site",
            "encode {",
            "    gzip",
            "    match {",
            "        header Content-Type text/html*",
            "    }",
            "}",
            note="So that it leaves text/event-stream alone.",
        ),
    ),
    (_SILENCE, _lines("Caddy", "in reverse_proxy", "transport http { read_timeout 1h }")),
    (
        _BREAK,
        _lines(
            "Caddy",
            "",
            note="Caddy 2.6 ends a broken body as if it were whole, and 2.11 does with "
            "response_buffers. Update, and take that out.",
        ),
    ),
    # Envoy
    (
        _HELD,
        _lines(
            "Envoy",
            "in http_filters",
            note="Take out what asks for whole bodies, such as a Lua filter with body(): without "
            "it, Envoy holds nothing.",
        ),
    ),
    (
        _PACKED,
        _lines(
            "Envoy",
            "in the compressor filter",
            "content_type: [application/json, text/html]",
            note="Every type but text/event-stream.",
        ),
    ),
    (
        (*_SILENCE, *_LIMIT),
        _lines(
            "Envoy",
            _ROUTE,
            "timeout: 0s",
            "idle_timeout: 3600s",
            note="Without the first, every stream is cut 15 s after its request; "
            "without the second, after 300 s of silence.",
        ),
    ),
    # Traefik
    (
        _HELD,
        _lines(
            "Traefik",
            "in the router's middlewares",
            note="Take out the buffering middleware: without it, Traefik holds nothing.",
        ),
    ),
    (
        _PACKED,
        _lines(
            "Traefik",
            "in the compress middleware",
            "excludedContentTypes: [text/event-stream]",
        ),
    ),
    (
        _SILENCE,
        _lines(
            "Traefik",
            "in the entry point",
            "transport: { respondingTimeouts: { writeTimeout: 0s } }",
            tried=False,
        ),
    ),
    # Apache
    (_HELD, _lines("Apache", "in ProxyPass", "flushpackets=on", tried=False)),
    (_PACKED, _lines("Apache", "in the virtual host", "SetEnv no-gzip 1")),
    (_SILENCE, _lines("Apache", "in the virtual host", "ProxyTimeout 3600")),
    (_LOST, _lines("Apache", "", note=_NO_CURE)),
    # Varnish
    (
        (*_HELD, *_CANCEL),
        _lines(
            "Varnish",
            "in vcl_recv, for these paths",
            "return (pipe);",
            note="What Varnish may cache, such as the response to a GET without Cache-Control, it "
            "fetches to its end, whoever leaves.",
        ),
    ),
    (
        _PACKED,
        _lines("Varnish", "in vcl_backend_response", "set beresp.do_gzip = false;", tried=False),
    ),
    (_SILENCE, _lines("Varnish", "in the backend", ".between_bytes_timeout = 3600s;")),
    # Node
    ((*_HELD, *_PACKED), _lines("Next.js", "in next.config.js", "compress: false")),
    (
        _SILENCE,
        _lines("Next.js", "in next.config.js", "experimental: { proxyTimeout: 3600000 }"),
    ),
    (
        (*_HELD, *_PACKED),
        _lines(
            NODE,
            "before the proxy",
            "app.use(compression({ filter: (req, res) => "
            "!/event-stream/.test(res.getHeader('Content-Type')) }))",
            note="http-proxy and Vite hold nothing: compression in front of them does.",
        ),
    ),
    (_SILENCE, _lines(NODE, "in the options of the proxy", "proxyTimeout: 3600000")),
    (
        (*_BREAK, Kind.CANCEL_LOST),
        _lines(
            NODE,
            "where the proxy is made; in Vite, in configure of server.proxy",
            "proxy.on('proxyRes', (up, req, res) => {",
            "  up.on('aborted', () => res.destroy())",
            "  res.on('close', () => up.destroy())",
            "})",
        ),
    ),
    # what cannot be run here
    (
        (*_HELD, *_PACKED),
        _lines(
            "Cloudflare",
            "in the response of the origin",
            "Cache-Control: no-cache, no-transform",
            note="llmproxy sends it. Switch compression rules off for these paths.",
            tried=False,
        ),
    ),
    (
        _SILENCE,
        _lines(
            "Cloudflare",
            "",
            note="It gives up after 100 s of silence, and only larger plans change that.",
            tried=False,
        ),
    ),
    (
        _SILENCE,
        _lines(
            "AWS ALB",
            "in the attributes of the load balancer",
            "idle_timeout.timeout_seconds = 3600",
            tried=False,
        ),
    ),
    # llmproxy itself, whatever the hop is
    (
        (Kind.HELD_AT_FIRST,),
        _lines(LLMPROXY, _AT_LLMPROXY, 'padding = "2KiB"', note="More than the hop holds."),
    ),
    (
        (*_SILENCE, *_LOST),
        _lines(
            LLMPROXY,
            _AT_LLMPROXY,
            'heartbeat = "15s"',
            note="It ends the silence: comments pass, and a client that left is noticed.",
        ),
    ),
    (
        _BREAK,
        _lines(LLMPROXY, _AT_LLMPROXY, "error_event = true", note="Clients then see an event."),
    ),
)

_UNNAMED = ("HAProxy", "Traefik", "Next.js", NODE)
"""Programs that do not name themselves, or not always."""


def advice(guilt: Guilt) -> list[Advice]:
    """Return what to change about a finding, the guilty program's own lines first."""
    programs: Sequence[str] = guilt.programs or _UNNAMED
    if LLMPROXY in programs and len(programs) == 1:
        return []
    wanted = [*programs, LLMPROXY]
    found = [one for kinds, one in _TABLE if guilt.kind in kinds and one.program in wanted]
    return sorted(found, key=lambda one: wanted.index(one.program))
