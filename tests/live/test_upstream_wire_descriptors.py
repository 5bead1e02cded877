"""Out of descriptors: said by its name, and over as soon as there are some again."""

from __future__ import annotations

import resource
from pathlib import Path

import pytest

from tests.support.daemon import Daemon, provider_config
from tests.support.live_proxy import (
    Link,
    assert_settles,
    busy_gauges,
    post,
    read_response,
    trace_of,
    until,
)
from tests.support.scripts import OK, reply
from tests.support.sockets import Provider, Wire, connect, request

PINNED = 8
"""Descriptors that the daemon gets beyond those that it has."""


serve = reply(OK)


def ask(client: Wire, body: bytes = b'{"model":"m"}') -> tuple[int, dict[bytes, bytes]]:
    """Send a request on a client connection that stands; return status and fields."""
    client.send(post("/p/x", body))
    got = read_response(client)
    return got.status, dict(got.fields)


def assert_alone(daemon: Daemon) -> None:
    """Wait until nothing is left in the daemon but one client's connection, which is kept."""
    until(
        lambda: busy_gauges(daemon) == {"llmproxy_client_connections": 1},
        f"one quiet client: {busy_gauges(daemon)}",
    )


@pytest.mark.trap("U18")
def test_a_connection_that_has_no_descriptor_is_a_503(tmp_path: Path, link: Link) -> None:
    """The caller reads when to come again, and is served once there are descriptors again."""
    with link.provider(serve) as provider:
        config = link.config(provider)
        with Daemon(tmp_path, config) as daemon, connect(daemon.port) as client:
            assert ask(client)[0] == 200
            assert_alone(daemon)
            with daemon.limited(resource.RLIMIT_NOFILE, 3):
                for number in range(2):
                    status, fields = ask(client)
                    assert status == 503, number
                    assert fields[b"x-llmproxy-error"] == b"no_descriptors"
                    assert fields[b"retry-after"] == b"1"
                    assert b"x-should-retry" not in fields
            assert ask(client)[0] == 200
            assert provider.accepted == 2
            record = trace_of(daemon, error="no_descriptors", id=_last_refused(daemon))
            assert (record["status"], record["is_complete"]) == (503, False)
            line = daemon.wait_log("/p/x", error="no_descriptors")
            assert "descriptors" in line["detail"]
            assert_alone(daemon)
    assert [line for line in daemon.log if "unhandled" in line["message"].lower()] == []


@pytest.mark.trap("U18")
def test_a_name_that_cannot_be_looked_up_for_want_of_descriptors_is_a_503(tmp_path: Path) -> None:
    """The system's resolver says that the name is not known; nothing was looked up before."""
    with Provider(serve) as provider:
        url = provider.url.replace("127.0.0.1", "localhost")
        with Daemon(tmp_path, provider_config(url)) as daemon, connect(daemon.port) as client:
            client.send(b"GET /")  # accepted
            until(lambda: daemon.metrics()["llmproxy_client_connections"] == 1, "the client")
            with daemon.limited(resource.RLIMIT_NOFILE, 3):
                client.send(request("GET", "/p/x").removeprefix(b"GET /"))
                got = read_response(client)
                assert (got.status, got.values(b"x-llmproxy-error")) == (503, [b"no_descriptors"])
            assert ask(client)[0] == 200


def _last_refused(daemon: Daemon) -> str:
    lines = [line for line in daemon.wait_ended(3) if line.get("error") == "no_descriptors"]
    return str(lines[-1]["id"])


@pytest.mark.trap("U18")
def test_a_crowd_of_clients_leaves_the_daemon_standing(tmp_path: Path) -> None:
    """They take the last descriptor; a served client gets a 503 until they leave."""
    with Provider(serve) as provider, Daemon(tmp_path, provider_config(provider.url)) as daemon:
        with connect(daemon.port) as client:
            assert ask(client)[0] == 200
            assert_alone(daemon)
            most = max(daemon.descriptors()) + PINNED
            with daemon.limited(resource.RLIMIT_NOFILE, most):
                crowd = [connect(daemon.port) for _ in range(4 * PINNED)]
                until(lambda: daemon.descriptors() >= set(range(most)), "none is left")
                status, fields = ask(client)
                assert (status, fields[b"x-llmproxy-error"]) == (503, b"no_descriptors")
                for one in crowd:
                    one.close()
                until(lambda: ask(client)[0] == 200, "the daemon serves again")
        with connect(daemon.port) as client:
            client.send(request("GET", "/p/x"))
            assert read_response(client).body == b"ok"
        assert_settles(daemon)
