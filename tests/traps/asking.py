"""A client whose requests are not as they should be, and the responses that it gets."""

from __future__ import annotations

import json
from contextlib import suppress
from typing import NamedTuple

from tests.support.sockets import Wire, connect
from tests.traps.endings import read_ending


class ClientResponse(NamedTuple):
    """A response, or that there was none.

    Attributes:
        status: its status; None where no head came.
        fields: its header fields, names in lower case.
        body: its body; where it is the last response, everything that came behind its head.
        how: the connection's end as :class:`~tests.traps.endings.Ending` has it; ``open`` where the
            response is not the last.
    """

    status: int | None
    fields: list[tuple[bytes, bytes]]
    body: bytes
    how: str

    @property
    def message(self) -> str:
        """What a refusal says in its JSON; empty where there is no JSON, or more than that."""
        if (b"content-type", b"application/json") not in self.fields:
            return ""
        try:
            said = json.loads(self.body)
        except ValueError:
            return ""
        return str(said["error"]["message"])


NOTHING = ClientResponse(None, [], b"", "open")


def ask(port: int, seconds: float, *pieces: bytes) -> ClientResponse:
    """Send bytes in one piece; return the first response, waiting for so many seconds."""
    with connect(port) as wire:
        with suppress(ConnectionError):  # a server may refuse while we are still sending
            wire.send(*pieces)
        return read_response(wire, seconds)


def read_response(wire: Wire, seconds: float) -> ClientResponse:
    """Read one response, and the end of the connection where the response announces it."""
    wire.sock.settimeout(seconds)
    try:
        first, fields = wire.read_head()
    except (EOFError, OSError):  # a timeout is an OSError, too
        return NOTHING
    status = int(first.split(b" ")[1])
    framed = {name for name, _ in fields} & {b"content-length", b"transfer-encoding"}
    if status >= 200 and ((b"connection", b"close") in fields or not framed):
        ending = read_ending(wire, seconds)
        return ClientResponse(status, fields, ending.raw, ending.how)
    return ClientResponse(status, fields, wire.read_body(fields), "open")
