"""Rotation of the listeners' certificate by SIGHUP, while clients come and streams run."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from tests.support.daemon import Daemon, provider_config
from tests.support.keypairs import shown_to
from tests.support.reloads import RELOADED, RELOADED_AT
from tests.support.sockets import request
from tests.support.stage import assert_settles, event, post, read_got, until
from tests.support.tls_stand import EVENTS, EXPIRES, Stand, response, standing


@pytest.fixture
def own(tmp_path: Path) -> Iterator[Stand]:
    """A stand of one test's own."""
    with standing(tmp_path) as stand:
        stand.seen()  # it answers, and so it has begun
        yield stand


def test_sighup_shows_the_new_certificate(own: Stand) -> None:
    """To whoever connects from then on, while a stream goes on unharmed with the old one."""
    turn = own.stream()
    with own.connect() as running:
        turn.give()
        running.send(post("/p/x"))
        running.read_head()
        assert running.read_chunk() == event(0)
        own.script = response
        new = own.rotate()
        assert own.seen() == new.der
        for piece in EVENTS[1:]:
            turn.give()
            assert running.read_chunk() == piece
        assert running.read_chunk() == b""
        running.send(request("GET", "/p/x"))  # a kept connection keeps what it began with, too
        assert read_got(running).body == b"ok"
        assert shown_to(running) == own.shown.der
    own.daemon.wait_log("reloaded; changed: proxy")
    assert_settles(own.daemon)


def test_the_metric_says_when_it_expires(own: Stand) -> None:
    """It follows what is shown, and the files alone change nothing."""
    assert own.daemon.metrics()[EXPIRES] == own.shown.not_after
    soon = datetime.now(UTC).replace(microsecond=0) + timedelta(days=3)
    own.vault.put(own.vault.issue(not_after=soon))
    assert own.daemon.metrics()[EXPIRES] == own.shown.not_after
    own.reload()
    assert own.daemon.metrics()[EXPIRES] == soon.timestamp()


def test_a_mistake_changes_nothing(own: Stand) -> None:
    """A key of another certificate: told in log and metric, and mended by the next SIGHUP."""
    at_first = own.daemon.metrics()
    assert at_first[RELOADED] == 1
    new = own.vault.issue()
    own.vault.write("key", new.key)
    told = own.fail_to_reload()["message"]
    assert "nothing has changed" in told
    assert "proxy.key: expected the key of `certificate`" in told
    metrics = own.daemon.metrics()
    assert (metrics[RELOADED], metrics[RELOADED_AT]) == (0, at_first[RELOADED_AT])
    assert metrics[EXPIRES] == own.shown.not_after
    assert own.seen() == own.shown.der

    own.vault.write("certificate", new.chain)
    own.reload()
    assert own.daemon.metrics()[RELOADED] == 1
    assert own.seen() == new.der
    own.expect_failures(1)


@pytest.mark.parametrize(
    ("name", "content", "key"),
    [
        ("certificate", b"", "proxy.certificate"),
        ("key", b"-----BEGIN PRIVATE KEY-----\nsecret\n", "proxy.key"),
        ("key", None, "proxy.key"),
    ],
    ids=["an empty certificate", "half a key", "no key"],
)
def test_each_kind_of_mistake_is_survived(
    own: Stand, name: str, content: bytes | None, key: str
) -> None:
    """Again and again: what is shown is shown on, and no word of the file is in the log."""
    if content is None:
        (own.vault.directory / name).unlink()
    else:
        own.vault.write(name, content)
    for count in (1, 2):
        line = own.fail_to_reload()
        assert f"{key}: expected " in line["message"]
        assert "secret" not in str(line)
        assert own.seen() == own.shown.der
        assert len(own.failures()) == count
    own.expect_failures(2)


def test_a_failed_reload_tells_each_mistake(own: Stand) -> None:
    """As a list in the line's own field, for whoever reads logs by machine."""
    own.vault.write("key", b"")
    text = own.daemon.config_path.read_text()
    own.daemon.config_path.write_text(text + "\n[no_such_table]\n")
    problems = own.fail_to_reload()["problems"]
    own.expect_failures(1)
    assert isinstance(problems, list)
    assert sorted(problem.split(":")[0] for problem in problems) == ["no_such_table", "proxy.key"]


def test_a_mistake_elsewhere_in_the_file_changes_nothing(own: Stand) -> None:
    """The file is checked as a whole, as at the start; its certificate alone would be fine."""
    text = own.daemon.config_path.read_text()
    own.vault.put()
    own.daemon.config_path.write_text(text + "\n[no_such_table]\n")
    assert "no_such_table: unknown key" in own.fail_to_reload()["message"]
    assert own.seen() == own.shown.der
    own.daemon.config_path.write_text(text)
    new = own.rotate()
    assert own.seen() == new.der
    own.expect_failures(1)


def test_many_sighups_are_survived(own: Stand) -> None:
    """However they fall together, and also where no file has changed."""
    for _ in range(5):
        for _ in range(10):
            own.hang_up()
        own.reload()
    assert own.daemon.process.poll() is None
    assert own.seen() == own.shown.der
    new = own.rotate()
    assert own.seen() == new.der


def test_a_sighup_during_the_start_is_survived(tmp_path: Path) -> None:
    """It comes in the same moment in which the listeners are told, or just after."""
    with standing(tmp_path) as stand:
        for _ in range(20):
            stand.hang_up()
        assert stand.seen() == stand.shown.der


def test_sighup_without_tls_is_survived(tmp_path: Path) -> None:
    """A daemon that has no certificate reads its file again, too, and shows none."""
    with Daemon(tmp_path, provider_config("http://127.0.0.1:1")) as daemon:
        before = daemon.metrics()
        assert EXPIRES not in before
        for _ in range(3):
            daemon.process.send_signal(signal.SIGHUP)
        until(lambda: daemon.metrics()[RELOADED_AT] > before[RELOADED_AT], "the file is read again")
        assert daemon.metrics()[RELOADED] == 1
        assert EXPIRES not in daemon.metrics()


def test_handshakes_go_on_while_certificates_change(own: Stand) -> None:
    """Every client is shown one certificate or the other, with the key that belongs to it."""
    issued = own.shown
    known = {issued.der}
    for _ in range(5):
        issued = own.vault.put()
        known.add(issued.der)
        own.hang_up()
        for _ in range(10):
            assert own.seen() in known
    own.reload()
    assert own.seen() == issued.der
