"""The authority of intercepted hosts in a running daemon: at the start, and when it is replaced."""

from __future__ import annotations

import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

from tests.support.authorities import DAY_S, OpenAuthority, signed
from tests.support.daemon import Daemon, environment, provider_config, twistd
from tests.support.reloads import expect_failures, fail_to_reload, reload

EXPIRES = 'llmproxy_certificate_not_after_timestamp_seconds{{certificate="{}"}}'
HOSTS = ("inference.local", "*.corp.example")


class Live(NamedTuple):
    """A daemon, and the authority that its file names."""

    daemon: Daemon
    made: OpenAuthority

    def expiry(self, of: str) -> float | None:
        """Return what the metric says of the authority or the first leaf."""
        return self.daemon.metrics().get(EXPIRES.format(f"intercept_{of}"))


@pytest.fixture
def live(tmp_path: Path) -> Iterator[Live]:
    """A daemon of one test's own."""
    made = OpenAuthority(tmp_path, *HOSTS)
    with Daemon(tmp_path, provider_config("http://127.0.0.1:1") + made.config()) as daemon:
        yield Live(daemon, made)


def test_the_metric_says_when_they_expire(live: Live) -> None:
    """The leaf of an exact host is there before anybody asks; both follow a new authority."""
    assert live.expiry("ca") == live.made.made.not_after
    leaf = live.expiry("leaf")
    assert leaf is not None
    assert 6 * DAY_S < leaf - time.time() < 8 * DAY_S
    new = OpenAuthority(live.daemon.folder, *HOSTS, days=5).made  # over the old files
    assert live.expiry("ca") == live.made.made.not_after
    assert reload(live.daemon)["changed"] == ["intercept"]
    assert live.expiry("ca") == live.expiry("leaf") == new.not_after


def test_hosts_come_and_go_with_a_reload(live: Live) -> None:
    """Inside the constraints that needs no other authority; without the section there is none."""
    changed = reload(live.daemon, ('hosts = ["inference.local", "*', 'hosts = ["*'))
    assert changed["changed"] == ["intercept"]
    assert live.expiry("ca") == live.made.made.not_after
    assert live.expiry("leaf") is None
    text = live.daemon.config_path.read_text()
    reload(live.daemon, (text, text[: text.index("[intercept]")]))
    assert live.expiry("ca") is None


def test_no_daemon_starts_with_an_authority_that_has_expired(tmp_path: Path) -> None:
    """No client would believe what it signs: the operator is told at once."""
    made = OpenAuthority(tmp_path, *HOSTS, now=time.time() - 9 * DAY_S, days=8)
    path = tmp_path / "bad.toml"
    path.write_text(
        '[proxy]\nlisten = ["tcp:0:interface=127.0.0.1"]\nanonymous = true\n'
        + provider_config("http://127.0.0.1:1")
        + made.config()
    )
    ended = subprocess.run(
        twistd(path), env=environment(), capture_output=True, text=True, timeout=20, check=False
    )
    assert ended.returncode == 78
    words = "intercept.ca_certificate: expected a certificate that has not expired (this one did at"
    assert words in ended.stderr
    assert "Traceback" not in ended.stderr + ended.stdout


def test_each_kind_of_mistake_is_survived(live: Live) -> None:
    """What was in use stays in use, and the log says what is wrong."""
    before = live.made.made
    free = signed(signed(), ca=False)
    expired = OpenAuthority(live.daemon.folder, *HOSTS, now=time.time() - 9 * DAY_S, days=8).made
    mistakes = (
        (free.pem, free.key_pem, "intercept.ca_certificate: expected a certificate of an auth"),
        (before.chain, free.key_pem, "intercept.ca_key: expected the key of the first cert"),
        (expired.chain, expired.key, "intercept.ca_certificate: expected a certificate that has"),
        (b"", before.key, "intercept.ca_certificate: expected a PEM file"),
    )
    for chain, key, words in mistakes:
        live.made.put(chain, key)
        line = fail_to_reload(live.daemon)
        assert words in line["message"]
        assert live.expiry("ca") == before.not_after
    live.made.put(before.chain, before.key)
    line = fail_to_reload(live.daemon, ('"inference.local"', '"elsewhere.example"'))
    assert '"elsewhere.example" wants a new authority' in line["message"]
    assert "`llmproxy ca new`" in line["message"]
    expect_failures(live.daemon, len(mistakes) + 1)
    reload(live.daemon, ('"elsewhere.example"', '"inference.local"'))
    assert live.expiry("ca") == before.not_after


def test_the_admin_site_shows_no_key(live: Live) -> None:
    """Where the certificate is may be known."""
    shown = live.daemon.admin("/config")
    assert f'"ca_certificate":"{live.made.chain}","ca_key":true' in shown.replace(" ", "")
    assert live.made.made.key.decode().splitlines()[1] not in shown
