"""Streams a POST with one library, and writes each piece as it comes; errors go to stderr."""

from __future__ import annotations

import asyncio
import json
import sys
from typing import Any

BODY: Any = {"model": "m", "stream": True, "messages": [{"role": "user", "content": "hi"}]}


def show(piece: bytes) -> None:
    """Write one piece at once."""
    sys.stdout.buffer.write(piece)
    sys.stdout.buffer.flush()


def with_urllib(url: str) -> None:
    """CPython's own."""
    import urllib.request

    head = {"content-type": "application/json"}
    asked = urllib.request.Request(url, json.dumps(BODY).encode(), head)  # noqa: S310 - the test's own
    with urllib.request.urlopen(asked) as response:  # noqa: S310 - the test's own
        while piece := response.read1(65536):
            show(piece)


def with_requests(url: str) -> None:
    """Requests."""
    import requests

    with requests.post(url, json=BODY, stream=True, timeout=60) as response:
        response.raise_for_status()
        for piece in response.iter_content(None):
            show(piece)


def with_httpx(url: str, module: str = "httpx") -> None:
    """Httpx."""
    library: Any = __import__(module)
    with library.stream("POST", url, json=BODY, timeout=60) as response:
        response.raise_for_status()
        for piece in response.iter_raw():
            show(piece)


def with_httpx2(url: str) -> None:
    """Its successor, which the SDKs of OpenAI and Anthropic run on."""
    with_httpx(url, "httpx2")


def with_aiohttp(url: str) -> None:
    """Aiohttp, which looks at the environment where it is told to."""
    import aiohttp

    async def main() -> None:
        async with (
            aiohttp.ClientSession(trust_env=True, raise_for_status=True) as session,
            session.post(url, json=BODY) as response,
        ):
            async for piece in response.content.iter_any():
                show(piece)

    asyncio.run(main())


def with_openai(url: str) -> None:
    """OpenAI's SDK."""
    import openai

    client = openai.OpenAI(base_url=url.partition("/chat/")[0], api_key="placeholder")
    for part in client.chat.completions.create(model="m", messages=[], stream=True):
        show(b'data: {"n":%d}\n\n' % getattr(part, "n"))  # noqa: B009 - the SDK's type has none


def with_anthropic(url: str) -> None:
    """Anthropic's SDK."""
    import anthropic

    client = anthropic.Anthropic(base_url=url.partition("/v1/")[0], api_key="placeholder")
    for part in client.messages.create(model="m", messages=[], max_tokens=9, stream=True):
        if part.type == "content_block_delta":
            show(getattr(part.delta, "text").encode())  # noqa: B009 - some deltas have none


def with_ollama(url: str) -> None:
    """Ollama's."""
    import ollama

    client = ollama.Client(host=url.partition("/api/")[0])
    for part in client.chat(model="m", messages=[], stream=True):
        show((part.message.content or "").encode())


if __name__ == "__main__":
    globals()[f"with_{sys.argv[1]}"](sys.argv[2])
