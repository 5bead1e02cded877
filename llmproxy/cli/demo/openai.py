"""What the demo provider's OpenAI endpoints share: errors, header fields, models and usage.

It knows the published shapes of that API and what ``dialect.py`` offers; no HTTP, no reactor.
"""

from __future__ import annotations

from collections.abc import Mapping

from llmproxy.cli.demo.dialect import (
    RELEASED,
    REQUESTS_PER_MINUTE,
    Clock,
    Dialect,
    Document,
    Event,
    Fields,
    json_bytes,
    sse,
)
from llmproxy.cli.demo.response import MODELS, BadAsk, Response

STREAM_TYPE = b"text/event-stream; charset=utf-8"

DONE = Event(sse(b"[DONE]"))
"""The end marker of chat completions and completions."""

_ERRORS = {
    429: ("requests", "rate_limit_exceeded"),
    500: ("server_error", None),
    503: ("server_error", "service_unavailable"),
}
_REASONING: Mapping[object, int] = {"minimal": 2, "low": 4, "medium": 8, "high": 16, "xhigh": 32}


class OpenAI(Dialect):
    """Errors as an object in ``error``, models as a list of objects."""

    def error(self, status: int, bad: BadAsk, request_id: str) -> Document:
        """``{"error": {"message", "type", "param", "code"}}``."""
        kind, code = _ERRORS.get(status, ("invalid_request_error", None))
        if status == 404 and bad.param == "model":
            code = "model_not_found"
        error = {"message": bad.message, "type": kind, "param": bad.param, "code": code}
        return {"error": error}

    def unknown_model(self, name: str) -> BadAsk:
        """OpenAI's sentence, and ``model`` as the parameter at fault."""
        return BadAsk(
            f"The model `{name}` does not exist or you do not have access to it.", "model"
        )

    def fields(self, request_id: str, remaining: int, clock: Clock) -> Fields:
        """``x-request-id``, ``openai-*`` and ``x-ratelimit-*``."""
        return (
            (b"x-request-id", request_id.encode()),
            (b"openai-organization", b"demo"),
            (b"openai-processing-ms", b"12"),
            (b"openai-version", b"2020-10-01"),
            (b"x-ratelimit-limit-requests", b"%d" % REQUESTS_PER_MINUTE),
            (b"x-ratelimit-remaining-requests", b"%d" % remaining),
            (b"x-ratelimit-reset-requests", b"1s"),
        )

    def models(self) -> Document:
        """``GET /v1/models``."""
        return {"object": "list", "data": [self.model(name) for name in MODELS]}

    def model(self, name: str) -> Document:
        """``GET /v1/models/NAME``."""
        return {"id": name, "object": "model", "created": RELEASED, "owned_by": "llmproxy-demo"}


OPENAI = OpenAI()


def reasoning_at(effort: object) -> int:
    """The tokens that an effort takes; none where no effort that we know is asked for."""
    return _REASONING.get(effort, 0) if isinstance(effort, str) else 0


def usage_of(response: Response) -> Document:
    """``usage`` of chat completions and completions: cached and reasoning tokens are in totals."""
    return {
        "prompt_tokens": response.prompt_tokens,
        "completion_tokens": response.made,
        "total_tokens": response.prompt_tokens + response.made,
        "prompt_tokens_details": {
            "cached_tokens": response.read_tokens,
            "cache_write_tokens": response.written_tokens,
            "audio_tokens": 0,
        },
        "completion_tokens_details": {
            "reasoning_tokens": response.reasoning_tokens,
            "audio_tokens": 0,
            "accepted_prediction_tokens": 0,
            "rejected_prediction_tokens": 0,
        },
    }


def failure_event(failure: str) -> Event:
    """The data line with which a stream of chat completions or completions gives up."""
    return Event(sse(json_bytes(OPENAI.error(500, BadAsk(failure), ""))))
