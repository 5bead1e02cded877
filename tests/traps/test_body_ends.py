"""How a body ends that has no framing of its own: whole behind a FIN, broken behind all else."""

from __future__ import annotations

import pytest
from pytest_twisted import ensureDeferred

from tests.support.sockets import Provider, Wire
from tests.support.tls import Authority
from tests.traps.calls import Step
from tests.traps.parts import Body, Upstream
from tests.traps.waits import ended, until, within

TEXT = b"text without an end of its own"
BREAKS = ["reset", "tls reset", "tls truncated"]


@pytest.mark.trap("U16")
@pytest.mark.parametrize("version", [b"1.0", b"1.1"])
@pytest.mark.parametrize("how", ["fin", "tls close_notify", *BREAKS])
@ensureDeferred
async def test_a_body_without_framing_is_whole_behind_a_proper_end_alone(
    upstream: Upstream, authority: Authority, patience: float, how: str, version: bytes
) -> None:
    """FIN, and over TLS close_notify, end the body; a RST or a missing close_notify breaks it."""
    tls = how.startswith("tls")
    arrived = Step()

    def script(wire: Wire) -> None:
        wire.read_request()
        wire.send(b"HTTP/%b 200 OK\r\n\r\n" % version, TEXT)
        arrived.take()
        if how.endswith("reset"):
            wire.reset()
        elif how == "tls close_notify":
            wire.close_notify()

    with Provider(script, tls=authority.server() if tls else None) as provider:
        sender = upstream(provider.url, authority.ca_path if tls else None)
        reply = await within(patience, sender.send("GET", "/x", []).head)
        body = Body()
        reply.deliver(body)
        assert await until(lambda: body.data == TEXT)
        arrived.give()
        whole = await ended(body.ended, patience)
    assert whole is (how not in BREAKS)
