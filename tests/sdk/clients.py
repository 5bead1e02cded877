"""The clients of the OpenAI and the Anthropic SDK, which are of one make with different names."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from operator import attrgetter
from typing import Any, NamedTuple

import anthropic
import openai

from tests.sdk.sdks import FUNCTION, KEY, SAID, TOOLS, user
from tests.support.sockets import WAIT

OPTIONS: Any = {"max_retries": 0, "timeout": WAIT}
TOOL_SAID = "Use the tool for Oslo"


class Kit(NamedTuple):
    """One SDK, and its names for what both have.

    Attributes:
        path: what its base URL has behind the provider's.
        resource: where its client has ``create`` and ``stream``.
        final: what its stream helper calls for the whole object.
        more: arguments that each call needs.
        tools: the tools of a question that calls one.
        marker: the last line of a stream.
    """

    name: str
    client: Any
    async_client: Any
    path: str
    resource: str
    final: str
    more: dict[str, Any]
    tools: Any
    marker: str

    def __str__(self) -> str:
        return self.name

    def open(self, base: str) -> Any:
        """Return a client."""
        return self.client(base_url=base + self.path, api_key=KEY, **OPTIONS)

    def calls(self, client: Any) -> Any:
        """Return what has ``create``, ``stream`` and the raw views of a client."""
        return attrgetter(self.resource)(client)

    def asked(self, said: str = SAID, *, model: str = "demo-fast") -> dict[str, Any]:
        """Return the arguments of a question."""
        return {"model": model, "messages": user(said), **self.more}

    def asked_tool(self) -> dict[str, Any]:
        """Return the arguments of a question that calls a tool."""
        return {**self.asked(TOOL_SAID), "tools": self.tools}

    def final_of(self, stream: Any) -> Any:
        """Return the object that a stream helper puts together, or what gives it."""
        return getattr(stream, self.final)()

    def run_async(self, base: str, scene: Callable[[Any], Awaitable[Any]]) -> Any:
        """Play a scene with an async client."""

        async def play() -> Any:
            url = base + self.path
            async with self.async_client(base_url=url, api_key=KEY, **OPTIONS) as client:
                return await scene(client)

        return asyncio.run(play())


OPENAI = Kit(
    "openai",
    openai.OpenAI,
    openai.AsyncOpenAI,
    "/v1",
    "chat.completions",
    "get_final_completion",
    {},
    [FUNCTION],
    "data: [DONE]",
)
ANTHROPIC = Kit(
    "anthropic",
    anthropic.Anthropic,
    anthropic.AsyncAnthropic,
    "",
    "messages",
    "get_final_message",
    {"max_tokens": 1024},
    TOOLS["anthropic"],
    'data: {"type":"message_stop"}',
)
KITS = (OPENAI, ANTHROPIC)
