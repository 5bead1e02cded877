"""``/events``: the overview again and again, to viewers that come, are slow, and leave."""

from __future__ import annotations

import json
from typing import Any

import pytest

from llmproxy.admin.events import MOST_VIEWERS
from llmproxy.dialects.json_body import MODEL_BYTES
from tests.admin.one_site import Admin, exchange
from tests.support.fake_transport import FIN


class Viewer:
    """One that follows the events of a site, on a connection of its own.

    Args:
        admin: the site.
        query: what it asks for.
        field: a line of its head.

    Attributes:
        size: how many bytes came at once.
    """

    def __init__(self, admin: Admin, query: str = "", field: str = "Accept: */*") -> None:
        self.admin = admin
        self.wire, self.channel = admin.connect()
        head = f"GET /events{query} HTTP/1.1\r\nHost: a\r\n{field}\r\n\r\n"
        self.channel.dataReceived(head.encode())
        self.head, _, self._rest = self.wire.take().partition(b"\r\n\r\n")
        self.size = len(self._rest)

    def events(self) -> list[Any]:
        """Return the events that came since the last call."""
        data = self._rest + self.wire.take()
        self._rest = b""
        lines = data.replace(b"\r\n", b"\n").split(b"\n")
        return [json.loads(line[6:]) for line in lines if line.startswith(b"data: ")]


def test_a_viewer_gets_the_overview_at_once_and_each_second() -> None:
    """Each event is whole."""
    admin = Admin()
    viewer = Viewer(admin)
    assert viewer.head.startswith(b"HTTP/1.1 200 ")
    assert b"\r\ncontent-type: text/event-stream\r\n" in viewer.head + b"\r\n"
    (first,) = viewer.events()
    assert (first["process"]["version"], first["streams"]) == ("1.2.3", [])
    assert [row["name"] for row in first["providers"]] == ["p", "q.1"]
    admin.exchanges.append(exchange(name="a"))
    admin.reactor.advance(0.9)
    assert viewer.events() == []
    admin.reactor.advance(0.1)
    (second,) = viewer.events()
    assert [row["id"] for row in second["streams"]] == ["a"]


def test_a_viewer_says_what_and_how_often() -> None:
    """The parameters are those of ``/streams``, and the seconds between two events."""
    admin = Admin()
    admin.exchanges += [exchange(name="a", client="x"), exchange(name="b")]
    viewer = Viewer(admin, "?client=x&every=3")
    (first,) = viewer.events()
    assert ([row["id"] for row in first["streams"]], first["total"]) == (["a"], 2)
    admin.reactor.advance(2.9)
    assert viewer.events() == []
    admin.reactor.advance(0.1)
    assert len(viewer.events()) == 1
    for every in ("0", "61", "1.5", "", "-1"):
        assert Viewer(admin, f"?every={every}").head.startswith(b"HTTP/1.1 400 ")


def test_a_viewer_that_takes_nothing_is_left_out() -> None:
    """What it has not taken does not grow, and it gets the newest when it goes on."""
    admin = Admin()
    viewer = Viewer(admin)
    assert len(viewer.events()) == 1
    viewer.wire.producer.pauseProducing()
    admin.reactor.advance(1)
    admin.reactor.advance(1)
    assert viewer.events() == []
    viewer.wire.producer.resumeProducing()
    admin.reactor.advance(1)
    assert len(viewer.events()) == 1


def test_a_viewer_that_takes_nothing_for_long_gives_its_place_up() -> None:
    """There are few of them."""
    admin = Admin()
    slow, idle = Viewer(admin), [Viewer(admin) for _ in range(MOST_VIEWERS - 1)]
    slow.wire.producer.pauseProducing()
    for _ in range(59):
        admin.reactor.advance(1)
    assert Viewer(admin).head.startswith(b"HTTP/1.1 503 ")
    admin.reactor.advance(1)
    assert slow.wire.disconnecting
    assert Viewer(admin).head.startswith(b"HTTP/1.1 200 ")
    assert not any(viewer.wire.disconnecting for viewer in idle)


def test_an_event_is_no_larger_where_thousands_of_streams_run() -> None:
    """It grows with the window that is asked for, whatever callers name their models."""
    admin = Admin()
    admin.exchanges += [exchange(float(number), name=f"{number:024}") for number in range(50)]
    few = Viewer(admin, "?limit=50")
    for number in range(50, 5000):
        one = exchange(float(number), name=f"{number:024}", client=f"c{number}")
        one.trace.model = one.trace.session = "\x00" * MODEL_BYTES  # six bytes each in JSON
        admin.exchanges.append(one)
    many, worst = Viewer(admin, "?limit=50"), Viewer(admin, "?limit=50&sort=age")
    assert many.size <= few.size + 50 * len('{"client":"c4999","streams":1,"limits":{}},')
    row = 2 * 6 * MODEL_BYTES + len("c4999")
    assert worst.size <= many.size + 50 * row
    (shown,) = worst.events()
    assert (shown["total"], len(shown["streams"]), len(shown["clients"])) == (5000, 50, 50)


def test_viewers_are_few_and_leave_nothing() -> None:
    """One more is told to come again; one that leaves makes room, and has no timer left."""
    admin = Admin()
    viewers = [Viewer(admin) for _ in range(MOST_VIEWERS)]
    more = Viewer(admin)
    assert more.head.startswith(b"HTTP/1.1 503 ")
    assert b"\r\nretry-after: 5" in more.head
    viewers.pop().wire.end(FIN)
    assert Viewer(admin).head.startswith(b"HTTP/1.1 200 ")
    for viewer in [*viewers, more]:
        viewer.wire.end(FIN)


@pytest.mark.parametrize(
    "field", ["Origin: https://evil.example", "Sec-Fetch-Site: cross-site", "Origin: null"]
)
def test_pages_of_other_sites_take_no_place(field: str) -> None:
    """They could read nothing, but keep operators out."""
    admin = Admin()
    assert Viewer(admin, field=field).head.startswith(b"HTTP/1.1 403 ")
    own = Viewer(admin, field="Sec-Fetch-Site: same-origin")
    assert own.head.startswith(b"HTTP/1.1 200 ")
    own.wire.end(FIN)
