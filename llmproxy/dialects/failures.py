"""How a provider says that it failed, where no ``error`` member says so.

An event in which a reader found nothing that it knows comes here: such events are rare, so that
what is done here costs no stream anything.  There are three kinds.  Many servers send the object of
an error without an ``error`` around it, as the SDKs make it and as old servers do.  Others send a
word of their own in its place.  And others wrap the whole response into an envelope
(ADR-0017).
"""

from __future__ import annotations

import re
from typing import Any

import msgspec

from llmproxy.dialects.accumulated import Accumulated
from llmproxy.dialects.endpoint import Reader
from llmproxy.dialects.lenient import FAULTS, tolerant_json

_LONGEST = 16 * 1024
"""Most bytes of a member that is looked at; no error is longer."""

_SHORTEST = 12
"""Bytes of the shortest event that can tell of anything."""

_MEMBERS = msgspec.json.Decoder(dict[str, msgspec.Raw]).decode

_ERRORS = ("errorText", "error_code", "error_msg", "error_message", "errors")
"""Members that only a failure has: the AI SDK, Baidu, others, GraphQL."""

_PROBLEM = frozenset(("type", "title", "status", "detail", "instance", "code"))
"""The members of a failure that is told by ``detail``: FastAPI's, and RFC 9457's."""

_FAILS = re.compile("error|exception|fail|denied|invalid|overload|limit|exceed|unavail|abort", re.I)
"""Types that speak of a failure; others, such as ``status``, speak of how far something is."""

_MESSAGES = ("message", "msg", *_ERRORS, "detail", "status_msg")
"""Where the sentence of an error may stand; the first one counts."""

_FIRST_FAILURE = 400

_FINE = (None, "", 0, 200, "0", "200", "success", "Success", "ok", "OK")
"""Values of ``code`` that stand for no error (Zhipu, Baidu, DashScope)."""

_ENVELOPES = ("result", "data", "response")
"""Members that hold the whole response (Cloudflare, gateways)."""


def read_unknown(data: bytes, seen: Accumulated, reader: Reader | None = None) -> None:
    """Take the failure that an event tells of, if it does, or read what is in its envelope.

    Args:
        data: JSON, of which nothing is known.
        reader: reads the content of an envelope.
    """
    if len(data) < _SHORTEST:
        return
    try:
        members = _MEMBERS(data)
    except FAULTS:
        return
    if reader is not None:
        for name in _ENVELOPES:
            content = bytes(members.get(name, b""))
            if content.startswith(b"{"):
                reader(content, seen)
                return
    _read_failure(members, seen)


def read_error_event(data: bytes, seen: Accumulated) -> None:
    """Take the failure of an event that is named ``error``: JSON of any shape, or a sentence."""
    value, _ = tolerant_json(data[:_LONGEST])
    if isinstance(value, dict):
        inner = value.get("error")
        value = inner if isinstance(inner, dict) else value
        seen.fail(_kind(value), _message(value))
    elif isinstance(value, str):
        seen.fail(None, value)
    else:
        seen.fail(None, data[:_LONGEST].decode("utf-8", "replace").strip() or None)


def _read_failure(members: dict[str, msgspec.Raw], seen: Accumulated) -> None:
    known = ("type", "param", "object", "status", "success", "code", "base_resp", *_MESSAGES)
    said = {name: _value(members[name]) for name in known if name in members}
    inner = said.get("base_resp")  # MiniMax
    if isinstance(inner, dict) and inner.get("status_code"):
        seen.fail(str(inner["status_code"]), _message(inner))
    elif (
        "error" in (said.get("type"), said.get("object"), said.get("status"))
        or said.get("success") is False
        or any(said.get(name) for name in _ERRORS)
        or (
            said.get("detail")
            and _PROBLEM.issuperset(members)
            and said.get("status") not in _FINE[3:]
        )
        or (_is_failing(said) and _message(said) is not None)
    ):
        seen.fail(_kind(said), _message(said))


def _is_failing(said: dict[str, Any]) -> bool:
    """Return whether an object with a sentence is an error: it has the type, or the code, of one.

    Only OpenAI's own error has a ``param``.  A code is a word, or a number from 400 on.
    """
    code, kind = said.get("code"), said.get("type")
    if isinstance(kind, str) and ("param" in said or _FAILS.search(kind)):
        return True
    if isinstance(code, str) and code.isdecimal():
        code = int(code[:9])
    if isinstance(code, int):
        return code >= _FIRST_FAILURE
    return isinstance(code, str) and code not in _FINE


def _kind(said: dict[str, Any]) -> str | None:
    for name in ("type", "code", "error_code"):
        value = said.get(name)
        if isinstance(value, str | int) and value not in (*_FINE, "error"):
            return str(value)
    return None


def _message(said: dict[str, Any]) -> str | None:
    texts = (said.get(name) for name in _MESSAGES)
    return next((text for text in texts if text and isinstance(text, str)), None)


def _value(member: msgspec.Raw) -> Any:
    return tolerant_json(bytes(member))[0] if len(bytes(member)) <= _LONGEST else None
