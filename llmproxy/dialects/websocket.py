"""OpenAI's two APIs over WebSocket, as far as usage needs them: Realtime, and Responses.

Both speak JSON events, one in each text message.  A client asks for a response with
``response.create``; the provider begins one with ``response.created`` and ends it with an event
that holds its usage: ``response.done`` in Realtime, the events of the HTTP stream in Responses.  In
Realtime the model is the session's, and a response may begin by itself, when the speaker falls
silent.  ``"generate": false`` warms the provider's cache up, and asks for no response that anybody
wants (Codex does so).  Nothing here knows frames, clients or limits.
"""

from __future__ import annotations

from typing import Literal

import msgspec

from llmproxy.dialects.accumulated import Accumulated
from llmproxy.dialects.dialect import Dialect
from llmproxy.dialects.endpoint import Count, ErrorMember, ErrorObject, Part, read_error
from llmproxy.errors import ProxyError

SocketApi = Literal["realtime", "responses"]

_ENDINGS = frozenset(
    ("response.done", "response.completed", "response.incomplete", "response.failed")
)
_TEXTS = frozenset(
    (
        *("response.output_text.delta", "response.text.delta"),
        *("response.output_audio_transcript.delta", "response.audio_transcript.delta"),
    )
)
_ARGUMENTS = frozenset(
    ("response.function_call_arguments.delta", "response.custom_tool_call_input.delta")
)


class _InputDetails(Part, gc=False):
    cached_tokens: Count | None = None
    cache_write_tokens: Count | None = None


class _OutputDetails(Part, gc=False):
    reasoning_tokens: Count | None = None


class _Usage(Part, gc=False):
    input_tokens: Count | None = None
    output_tokens: Count | None = None
    input_tokens_details: _InputDetails | None = None  # Responses
    output_tokens_details: _OutputDetails | None = None
    input_token_details: _InputDetails | None = None  # Realtime
    output_token_details: _OutputDetails | None = None


class _StatusDetails(Part, gc=False):
    reason: str | None = None
    error: ErrorObject | None = None


class _Response(Part, gc=False):
    id: str | None = None
    model: str | None = None
    status: str | None = None
    usage: _Usage | None = None
    error: ErrorMember = None
    incomplete_details: _StatusDetails | None = None  # Responses
    status_details: _StatusDetails | None = None  # Realtime


class _Session(Part, gc=False):
    model: str | None = None


class _Item(Part, gc=False):
    type: str = ""
    call_id: str | None = None
    name: str | None = None

    @property
    def calls(self) -> bool:
        """Whether it calls a tool."""
        return self.type in ("function_call", "custom_tool_call")


class _Other(Part, gc=False):
    """An object of which nothing is read."""


class ProviderEvent(Part, gc=False):
    """One event of the provider's."""

    type: str = ""
    response_id: str | None = None
    response: _Response | None = None
    session: _Session | None = None
    error: ErrorMember = None
    delta: str | _Other | None = None
    item: _Item | None = None
    output_index: int = 0

    @property
    def id(self) -> str | None:
        """The id of the response that the event belongs to, where it says one."""
        return self.response_id if self.response is None else self.response.id

    @property
    def begins(self) -> bool:
        """Whether a response begins."""
        return self.type == "response.created"

    @property
    def ends(self) -> bool:
        """Whether it is the last one of its response."""
        return self.type in _ENDINGS

    def read_into(self, seen: Accumulated) -> None:
        """Take what the event says of its response."""
        response, kind = self.response, self.type
        if response is not None:
            seen.name(response.id, response.model)
            if self.ends:
                _read_end(response, seen)
        elif kind == "error":
            read_error(self.error, seen)
            if seen.error is None:
                seen.fail("error", None)
        elif seen.keeps:
            self._keep(seen)

    def _keep(self, seen: Accumulated) -> None:
        if isinstance(self.delta, str):
            if self.type in _TEXTS:
                seen.add_text(self.delta)
            elif self.type in _ARGUMENTS:
                seen.add_arguments(self.output_index, self.delta)
        elif (
            self.type == "response.output_item.added" and self.item is not None and self.item.calls
        ):
            seen.open_call(self.output_index, self.item.call_id, self.item.name)


class ClientEvent(Part, gc=False):
    """One event of the client's."""

    type: str = ""
    model: str | None = None
    generate: bool | None = None
    response: _Session | None = None
    session: _Session | None = None

    @property
    def asks(self) -> bool:
        """Whether it asks for a response."""
        return self.type == "response.create"

    @property
    def is_wanted(self) -> bool:
        """Whether what it asks for is a response that anybody wants."""
        return self.generate is not False

    @property
    def names(self) -> tuple[str, ...]:
        """Every model that it names, wherever a provider may look for one."""
        nested = (part.model for part in (self.response, self.session) if part is not None)
        return tuple(dict.fromkeys(name for name in (self.model, *nested) if name))

    @property
    def named(self) -> str | None:
        """The model that it names, or None."""
        return next(iter(self.names), None)


read_provider_event = msgspec.json.Decoder(ProviderEvent).decode
read_client_event = msgspec.json.Decoder(ClientEvent).decode


def socket_api(dialect: Dialect, path: bytes) -> SocketApi | None:
    """Return which API is spoken at a path of a provider's, or None where it is not known.

    Args:
        path: raw; a query does not matter.
    """
    if dialect is Dialect.RAW:
        return None
    last = path.partition(b"?")[0].rstrip(b"/").rpartition(b"/")[2]
    if last == b"realtime":
        return "realtime"
    return "responses" if last == b"responses" else None


def error_message(api: SocketApi, error: ProxyError) -> bytes:
    """Return the event by which either API tells of an error on an open connection."""
    inner: dict[str, object] = {
        "type": "rate_limit_error" if error.status == 429 else "invalid_request_error",
        "code": "rate_limit_exceeded" if error.status == 429 else error.reason,
        "message": error.message,
        "param": None,
    }
    event: dict[str, object] = {"type": "error", "error": inner}
    if api == "realtime":
        event = {"type": "error", "event_id": "event_llmproxy", "error": inner}
    else:
        event["status"] = error.status
    return msgspec.json.encode(event)


def _read_end(response: _Response, seen: Accumulated) -> None:
    seen.has_ended = True
    details = response.status_details or response.incomplete_details
    if response.error is not None:
        read_error(response.error, seen)
    elif response.status == "failed":
        read_error(None if details is None else details.error, seen)
        if seen.error is None:
            seen.fail("failed", None)
    seen.finish((details and details.reason) or response.status)
    if (usage := response.usage) is not None:
        read = usage.input_tokens_details or usage.input_token_details
        made = usage.output_tokens_details or usage.output_token_details
        seen.count(
            input_tokens=usage.input_tokens,
            output_tokens=usage.output_tokens,
            cache_read_tokens=None if read is None else read.cached_tokens,
            cache_write_tokens=None if read is None else read.cache_write_tokens,
            reasoning_tokens=None if made is None else made.reasoning_tokens,
        )
