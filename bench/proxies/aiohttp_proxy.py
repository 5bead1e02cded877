"""A streaming proxy on aiohttp and uvloop, as one would write it.  Arguments: PORT URL [CA]."""

from __future__ import annotations

import ssl
import sys
from collections.abc import AsyncIterator

import aiohttp
import uvloop
from aiohttp import web

HOP = {"connection", "transfer-encoding", "keep-alive"}
ASKED_ANEW = {*HOP, "host", "content-length"}


async def forward(request: web.Request) -> web.StreamResponse:
    """Hand one request on, and its response back piece by piece."""
    body = await request.read()
    fields = [(k, v) for k, v in request.headers.items() if k.lower() not in ASKED_ANEW]
    url = request.app["url"] + request.raw_path
    async with request.app["session"].request(
        request.method, url, data=body, headers=fields, allow_redirects=False
    ) as answer:
        response = web.StreamResponse(status=answer.status)
        for name, value in answer.headers.items():
            if name.lower() not in HOP:
                response.headers.add(name, value)
        await response.prepare(request)
        async for piece in answer.content.iter_any():
            await response.write(piece)
        await response.write_eof()
        return response


async def make(url: str, authority: str | None) -> web.Application:
    """Make the application."""
    context = True if authority is None else ssl.create_default_context(cafile=authority)

    async def session(app: web.Application) -> AsyncIterator[None]:
        connector = aiohttp.TCPConnector(limit=0, ssl=context)
        timeout = aiohttp.ClientTimeout(total=None)
        async with aiohttp.ClientSession(
            auto_decompress=False, connector=connector, timeout=timeout
        ) as app["session"]:
            yield

    app = web.Application(client_max_size=1 << 30)
    app["url"] = url
    app.cleanup_ctx.append(session)
    app.router.add_route("*", "/{path:.*}", forward)
    return app


if __name__ == "__main__":
    uvloop.install()
    web.run_app(
        make(sys.argv[2], sys.argv[3] if len(sys.argv) > 3 else None),
        host="127.0.0.1",
        port=int(sys.argv[1]),
        access_log=None,
        backlog=4096,
        print=None,
        handler_cancellation=True,
    )
