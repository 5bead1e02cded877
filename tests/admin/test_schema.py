"""The schema of the admin site's JSON: the documentation has it, and responses keep to it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from jsonschema import Draft202012Validator  # type: ignore[import-untyped]  # it has no types

from llmproxy.admin import schema
from llmproxy.record.flight import Body, capsule
from llmproxy.record.trace import Attempt, Trace
from tests.admin.one_site import BEARER, Admin, exchange, relay, tap

DOCUMENTED = Path(__file__).parents[2] / "docs" / "admin-api.json"


def test_the_documentation_has_the_schema() -> None:
    """``make docs`` writes it anew."""
    assert DOCUMENTED.read_bytes() == schema.text()


def closed() -> dict[str, Any]:
    """Return the schema as one that knows no other members than those that it names."""
    found: dict[str, Any] = schema.schema()
    for part in found["$defs"].values():
        part["additionalProperties"] = False
    return found


def busy() -> Admin:
    """Return a site that has something of everything."""
    admin = Admin()
    admin.clock.advance(20)
    admin.exchanges += [exchange(name="a", relay=relay(), tap=tap(3, 2)), exchange(name="b")]
    provider = admin.followed.providers["p"]
    admin.standing.health.cool_down(provider, "c", "m", 30, 429)
    for _ in range(10):
        admin.standing.health.failed(provider, "c", was_asked=True)
    admin.standing.headroom.note("p", {b"x-ratelimit-remaining-tokens": b"7"})
    admin.standing.switches.disable("p", "m", 60, "127.0.0.1")
    attempts = [Attempt("p", "upstream_broken", 0.5, "reset")]
    given: dict[str, Any] = {"client": "c", "attempts": attempts, "status": 200}
    given |= {"instance": "0", "peer": "127.0.0.1", "method": "POST", "path": "/"}
    trace = Trace(time="t", id="e", end_reason="upstream_broken", **given)
    body = Body(
        status=200,
        content_type="text/event-stream",
        content_encoding=None,
        length=None,
        chunks=1,
        bytes=3,
        events=1,
        first_chunk_s=0.1,
        last_chunk_s=0.1,
        longest_gap_s=0.0,
        chunks_at_once=0,
        ends_between_events=True,
        last_chunks=[(0.1, 3)],
        fields=[("via", "x")],
        last_bytes=b"abc",
    )
    admin.flights.keep(capsule(trace, "reset", "in words", body))
    return admin


@pytest.mark.parametrize("asked", sorted(schema.RESPONSES.keys() - {"GET /events"}))
def test_a_response_keeps_to_its_schema(asked: str) -> None:
    """What the schema does not name is not there, and what it demands is."""
    method, _, target = asked.partition(" ")
    name = "e" if "ended" in target else "a"
    path = target.replace("ID", name).replace("NAME", "p")
    status, _, body = busy().get(path, BEARER, method=method)
    assert status == 200
    whole = closed()
    wanted = {"$defs": whole["$defs"], **whole["responses"][asked]}
    Draft202012Validator.check_schema(wanted)
    Draft202012Validator(wanted).validate(json.loads(body))
