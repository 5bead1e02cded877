"""Endpoints: what cannot be listened on is refused before the start, in words."""

from __future__ import annotations

import json
import socket
from pathlib import Path

import pytest
from twisted.internet import reactor

from llmproxy.server.handler import Handler, Router
from llmproxy.server.listen import listen
from llmproxy.server.site import Site
from tests.support.configs import accepted, problems_of
from tests.support.keypairs import Vault

IPV6 = r"an IPv6 address with a backslash before each colon, in single quotes: 'tcp6:8080:inter"

REFUSED = [
    ("tcp6:8080:interface=::1", IPV6),
    ("tcp6:8080:interface=[::1]", IPV6),
    (r"tcp6:8080:interface=[\:\:1]", IPV6),
    ("tcp:8080:::1", IPV6),
    ("tcp6:8080:::", IPV6),
    (r"tcp6:8080:interface=\:\:g", IPV6),
    ("haproxy:tcp6:8080:interface=::1", IPV6),
    ("tcp:8080:interfaces=127.0.0.1", "it takes no `interfaces`"),
    ("tcp:8080:interface=127.0.0.1:interface=127.0.0.2:7", "an endpoint"),
    ("tcp:8080:backlog=many", "'many'"),
    ("tcp:port=http", "a port from 0 to 65535"),
    ("tcp:8080:1.2.3.4:5:6", "these are not the arguments of `tcp:`"),
    ("tcp:8080:1.2.3.4:5", "these are not the arguments of `tcp:`"),
    ("unix:/run/x.sock:600", "these are not the arguments of `unix:`"),
    ("unix:/run/x.sock:mode=rw", "'rw'"),
    ("unix:/run/x.sock:user=x", "it takes no `user`"),
    ("ssl:8443:privateKey=/no/such.pem", "/no/such.pem"),
    ("systemd:domain=INET", "just one of `name` and `index`"),
    ("systemd:name=proxy", "`domain`"),
    ("systemd:domain=TCP:name=proxy", "INET, INET6 or UNIX"),
    ("systemd:domain=INET:name=proxy:fd=3", "it takes no `fd`"),
]
TAKEN = [
    "tcp:0",
    "tcp:0:127.0.0.1",
    "tcp:port=0:interface=127.0.0.1:backlog=5",
    "tcp:0:interface=localhost",
    r"tcp6:0:interface=\:\:1",
    r"tcp:0:interface=\:\:1",
    "tcp6:0",
    "haproxy:tcp:0:interface=127.0.0.1",
    "unix:{folder}/a:mode=600",
    "ssl:0:privateKey={folder}/both.pem:interface=127.0.0.1",
]


def of(endpoint: str) -> dict[str, str | None]:
    """Return a configuration that listens there."""
    return {"proxy.listen": json.dumps([endpoint])}


@pytest.mark.parametrize(("endpoint", "words"), REFUSED)
def test_the_check_refuses_what_the_start_refuses(endpoint: str, words: str) -> None:
    """The problem says why; and listening there really fails."""
    (problem,) = problems_of(of(endpoint))
    assert problem.startswith("proxy.listen[0]: expected ")
    assert words in problem
    with pytest.raises((OSError, ValueError, OverflowError)):
        listen(reactor, endpoint, a_site())


@pytest.mark.parametrize("endpoint", TAKEN)
def test_the_check_takes_what_can_be_listened_on(endpoint: str, tmp_path: Path) -> None:
    """Each of these opens a port."""
    if ("tcp6" in endpoint or r"\:" in endpoint) and not socket.has_dualstack_ipv6():
        pytest.skip("no IPv6 here")
    issued = Vault(tmp_path).put()
    (tmp_path / "both.pem").write_bytes(issued.key + issued.chain)
    endpoint = endpoint.replace("{folder}", str(tmp_path))
    (text,) = accepted(of(endpoint)).proxy.listen
    port = listen(reactor, text, a_site())
    port.stopListening()


def test_what_systemd_hands_over_is_not_asked_for() -> None:
    """A check by hand has no socket from systemd: the shape of the endpoint is enough."""
    for named in ("name=proxy", "index=0"):
        for domain in ("INET", "INET6", "UNIX"):
            accepted(of(f"systemd:domain={domain}:{named}"))


def test_every_listener_is_checked() -> None:
    """The admin site's, too."""
    bad = '"tcp6:9080:interface=::1"'
    (problem,) = problems_of({"admin.listen": bad})
    assert problem.startswith("admin.listen: expected an IPv6 address with a backslash")
    (problem,) = problems_of({"admin.metrics_listen": bad})
    assert problem.startswith("admin.metrics_listen: expected an IPv6")


def a_site() -> Site:
    """Return a site that serves nothing."""
    return Site(Router(Handler()), reactor, lambda: 0.0, wall=lambda: 0.0)
