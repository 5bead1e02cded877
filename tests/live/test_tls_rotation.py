"""Rotation of the listeners' certificate by SIGHUP, while clients come and streams run."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from tests.support.keypairs import shown_to
from tests.support.live_proxy import assert_settles, post, read_response, until
from tests.support.reloads import expect_failures, fail_to_reload, failures, hang_up, reload
from tests.support.scripts import event
from tests.support.sockets import request
from tests.support.tls_proxy import EVENTS, EXPIRES, TlsProxy, open_tls_proxy, short_reply


@pytest.fixture
def own(tmp_path: Path) -> Iterator[TlsProxy]:
    """A stand of one test's own."""
    with open_tls_proxy(tmp_path) as live:
        live.seen()  # it serves, and so it has begun
        yield live


def test_sighup_shows_the_new_certificate(own: TlsProxy) -> None:
    """New connections are shown it, while a stream goes on unharmed with the old one."""
    turn = own.stream(*EVENTS)
    with own.connect() as running:
        turn.give()
        running.send(post("/p/x"))
        running.read_head()
        assert running.read_chunk() == event(0)
        own.script = short_reply
        new = own.rotate()
        assert own.seen() == new.der
        for piece in (*EVENTS[1:], b""):
            turn.give()
            assert running.read_chunk() == piece
        running.send(request("GET", "/p/x"))  # a kept connection keeps what it began with, too
        assert read_response(running).body == b"ok"
        assert shown_to(running) == own.shown.der
    own.daemon.wait_log("reloaded; changed: proxy")
    assert_settles(own.daemon)


def test_the_metric_says_when_it_expires(own: TlsProxy) -> None:
    """It follows what is shown, and the files alone change nothing."""
    assert own.daemon.metrics()[EXPIRES] == own.shown.not_after
    soon = datetime.now(UTC).replace(microsecond=0) + timedelta(days=3)
    own.vault.put(own.vault.issue(not_after=soon))
    assert own.daemon.metrics()[EXPIRES] == own.shown.not_after
    reload(own.daemon)
    assert own.daemon.metrics()[EXPIRES] == soon.timestamp()


@pytest.mark.parametrize(
    ("name", "content", "key"),
    [
        ("certificate", b"", "proxy.certificate"),
        ("key", b"-----BEGIN PRIVATE KEY-----\nsecret\n", "proxy.key"),
        ("key", None, "proxy.key"),
        ("key", b"another", "proxy.key"),
    ],
    ids=["an empty certificate", "half a key", "no key", "the key of another certificate"],
)
def test_each_kind_of_mistake_is_survived(
    own: TlsProxy, name: str, content: bytes | None, key: str
) -> None:
    """The old certificate is still shown, and no word of the file is in the log."""
    if content is None:
        (own.vault.directory / name).unlink()
    else:
        own.vault.write(name, own.vault.issue().key if content == b"another" else content)
    for count in (1, 2):
        line = fail_to_reload(own.daemon)
        assert f"{key}: expected " in line["message"]
        assert "secret" not in str(line)
        assert own.seen() == own.shown.der
        assert len(failures(own.daemon)) == count
    expect_failures(own.daemon, 2)


def test_a_failed_reload_reports_each_mistake(own: TlsProxy) -> None:
    """The log line has them as a list in its own field, for a machine to read."""
    own.vault.write("key", b"")
    text = own.daemon.config_path.read_text()
    own.daemon.config_path.write_text(text + "\n[no_such_table]\n")
    problems = fail_to_reload(own.daemon)["problems"]
    expect_failures(own.daemon, 1)
    assert isinstance(problems, list)
    assert sorted(problem.split(":")[0] for problem in problems) == ["no_such_table", "proxy.key"]


def test_a_mistake_elsewhere_in_the_file_changes_nothing(own: TlsProxy) -> None:
    """The file is checked as a whole, as at the start; its certificate alone would be fine."""
    text = own.daemon.config_path.read_text()
    own.vault.put()
    own.daemon.config_path.write_text(text + "\n[no_such_table]\n")
    assert "no_such_table: unknown key" in fail_to_reload(own.daemon)["message"]
    assert own.seen() == own.shown.der
    own.daemon.config_path.write_text(text)
    new = own.rotate()
    assert own.seen() == new.der
    expect_failures(own.daemon, 1)


def test_many_sighups_are_survived(own: TlsProxy) -> None:
    """The signals may come together, and no file need have changed."""
    for _ in range(5):
        for _ in range(10):
            hang_up(own.daemon)
        reload(own.daemon)
    assert own.daemon.process.poll() is None
    assert own.seen() == own.shown.der
    new = own.rotate()  # its signal may have become one with another that came before
    until(lambda: own.seen() == new.der, "the new certificate is shown")


def test_a_sighup_during_the_start_is_survived(tmp_path: Path) -> None:
    """It comes in the same moment as the lines of the listeners, or just after."""
    with open_tls_proxy(tmp_path) as live:
        for _ in range(20):
            hang_up(live.daemon)
        assert live.seen() == live.shown.der


def test_handshakes_go_on_while_certificates_change(own: TlsProxy) -> None:
    """Every client is shown one certificate or the other, with the key that belongs to it."""
    issued = own.shown
    known = {issued.der}
    for _ in range(5):
        issued = own.vault.put()
        known.add(issued.der)
        hang_up(own.daemon)
        for _ in range(10):
            assert own.seen() in known
    until(lambda: own.seen() == issued.der, "the last certificate is shown")
