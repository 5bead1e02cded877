"""What a tap says in the end: everything that a stream held, and what of it is not known.

Nothing here knows how it was found.
"""

from __future__ import annotations

from enum import StrEnum

import msgspec

from llmproxy.dialects.accumulated import ProviderError, ToolCall, Usage
from llmproxy.errors import EndReason


class Degraded(StrEnum):
    """What a result may lack, and why: a label of ``llmproxy_tap_degraded_total``.

    ``encoding``: the coding is not known here, or the bytes are not in it; ``bomb``: they grow out
    of all proportion; ``overlong``: an event, or a response in one piece, was longer than
    ``limits.event`` and was left out; ``unreadable``: one was not what the dialect sends;
    ``internal``: an error of ours, which ended the tap.
    """

    ENCODING = "encoding"
    BOMB = "bomb"
    OVERLONG = "overlong"
    UNREADABLE = "unreadable"
    INTERNAL = "internal"


class Result(msgspec.Struct, frozen=True, kw_only=True):
    """What a stream held.

    Attributes:
        end_reason: why it ended, the verdict on its content included.
        text: of the first choice, as far as it is held; empty without ``capture = "content"``.
        text_bytes: how long the whole text is in UTF-8; 0 without ``capture = "content"``.
        tool_calls: of the first choice, as far as they are held.
        is_cut: text or tool calls were longer than ``limits.accumulate``.
        events: how many events with data there were, about one for each token of a stream.
        error: the provider's own error, if its response held one.
        degraded: what the tap did not understand, so that all else may lack something.
    """

    end_reason: EndReason
    text: str = ""
    text_bytes: int = 0
    tool_calls: tuple[ToolCall, ...] = ()
    is_cut: bool = False
    events: int = 0
    finish_reason: str | None = None
    model: str | None = None
    response_id: str | None = None
    usage: Usage = Usage()
    error: ProviderError | None = None
    degraded: tuple[Degraded, ...] = ()

    @property
    def is_complete(self) -> bool:
        """Whether the client got all that there was."""
        return self.end_reason is EndReason.COMPLETE
