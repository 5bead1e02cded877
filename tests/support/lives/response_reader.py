"""The responses that a client saw, read by h11, which shares no code with the proxy."""

from __future__ import annotations

import h11


class Seen:
    """The part of one response that a client saw.

    Attributes:
        whole: it ended as its framing says.
        kept: the connection is good for another request.
    """

    def __init__(self) -> None:
        self.code: int | None = None
        self.fields: dict[bytes, bytes] = {}
        self.body = bytearray()
        self.whole = False
        self.kept = False

    def __repr__(self) -> str:
        whole = "whole" if self.whole else "not whole"
        shown = bytes(self.body[:60])
        return f"<{self.code}, {whole}, {len(self.body)} bytes {shown!r}, {self.fields}>"


class ResponseReader:
    """Reads the responses on one connection.

    Attributes:
        responses: one for each request that was announced.
        complaint: the reason why they are not HTTP; a response may break off without one.
        invitations: how many 100 responses came.
    """

    def __init__(self) -> None:
        self._conn = h11.Connection(h11.CLIENT)
        self.responses: list[Seen] = []
        self.complaint = ""
        self.invitations = 0

    def announce(self, method: str) -> None:
        """Prepare for the response to another request; it may be there already."""
        if self.responses:
            self._conn.start_next_cycle()
        self._conn.send(h11.Request(method=method, target="/", headers=[("Host", "proxy")]))
        self._conn.send(h11.EndOfMessage())
        self.responses.append(Seen())
        self._read()

    def feed(self, data: bytes) -> None:
        """Take bytes of responses."""
        self._conn.receive_data(data)
        self._read()

    def end(self) -> None:
        """Note a FIN, which may be the end of the response, too."""
        said = self.complaint
        self.feed(b"")
        self.complaint = said

    def _read(self) -> None:
        while not self.complaint and self.responses and not self.responses[-1].whole:
            try:
                event = self._conn.next_event()
            except h11.RemoteProtocolError as error:
                self.complaint = str(error)
                return
            if event in (h11.NEED_DATA, h11.PAUSED):
                return
            self._note(event, self.responses[-1])

    def _note(self, event: object, seen: Seen) -> None:
        if isinstance(event, h11.InformationalResponse):
            self.invitations += event.status_code == 100
        elif isinstance(event, h11.Response):
            seen.code = event.status_code
            seen.fields = dict(event.headers)
        elif isinstance(event, h11.Data):
            seen.body += event.data
        elif isinstance(event, h11.EndOfMessage):
            seen.whole = True
            seen.kept = self._conn.our_state is h11.DONE and self._conn.their_state is h11.DONE

    @property
    def behind(self) -> bytes:
        """The bytes after the last response, if that was whole."""
        whole = not self.responses or self.responses[-1].whole
        return self._conn.trailing_data[0] if whole else b""
