"""A provider that says which models FastAPI sees in a request, whatever its endpoint reads."""

from __future__ import annotations

import socket
import sys
from contextlib import suppress
from typing import Any

import uvicorn
from fastapi import FastAPI, Request

app = FastAPI()


async def _in_body(request: Request) -> list[Any]:
    """Read the body as JSON whatever its type, and as a form."""
    seen: list[Any] = []
    with suppress(ValueError, TypeError, LookupError, RecursionError):
        seen.append((await request.json())["model"])
    with suppress(Exception):  # whatever it is, the form is not read
        seen += (await request.form()).getlist("model")
    return seen


# The decorator next to the function adds its route first, so the route of all paths comes last.
@app.api_route("/{rest:path}", methods=["GET", "POST", "PUT"])
@app.api_route("/{before:path}/deployments/{model}/{rest:path}", methods=["GET", "POST", "PUT"])
@app.api_route("/{before:path}/model/{model:path}/invoke", methods=["POST", "PUT"])
@app.api_route("/{before:path}/models/{model:path}/predictions", methods=["POST", "PUT"])
@app.api_route("/{before:path}/models/{model:path}:{verb}", methods=["POST", "PUT"])
@app.api_route("/{before:path}/models/{model}:{verb}", methods=["GET", "POST", "PUT"])
async def read(request: Request, model: str = "") -> dict[str, list[str]]:
    """Say what there is of models."""
    named = request.path_params.get("model")
    seen = [*await _in_body(request), *request.query_params.getlist("model")]
    return {"seen": [one for one in (named, *seen) if isinstance(one, str)]}


def main() -> None:
    """Serve on a port that is printed."""
    listening = socket.create_server(("127.0.0.1", 0))
    sys.stdout.write(f"{listening.getsockname()[1]}\n")
    sys.stdout.flush()
    config = uvicorn.Config(app, log_level="critical", access_log=False)
    uvicorn.Server(config).run(sockets=[listening])


if __name__ == "__main__":
    main()
