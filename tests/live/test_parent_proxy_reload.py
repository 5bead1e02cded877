"""The parent proxy of ``[proxy]`` in a running daemon: who uses it, and a new password."""

from __future__ import annotations

import base64
from pathlib import Path

from tests.support.daemon import Daemon, provider_table, route_table
from tests.support.live_proxy import (
    assert_settles,
    post,
    read_response,
    trace_of,
    write_credential,
)
from tests.support.parents import ESTABLISHED, PlayedParent
from tests.support.reloads import reload
from tests.support.scripts import OK, reply
from tests.support.sockets import Provider, Wire, connect

REFUSED = b'HTTP/1.1 407 No\r\nProxy-Authenticate: Basic realm="corp"\r\n\r\n'


class CheckingParent(PlayedParent):
    """A parent that opens a tunnel to whoever shows the password, in UTF-8."""

    password = "team:päss"

    def _relay(self, wire: Wire) -> None:
        line, fields = wire.read_head()
        right = b"Basic " + base64.b64encode(self.password.encode())
        if dict(fields).get(b"proxy-authorization") == right:
            wire.send(ESTABLISHED)
            self.pump(line, wire)
        else:
            wire.send(REFUSED)
            wire.wait_closed()


def test_a_wrong_password_is_mended_by_a_reload(tmp_path: Path) -> None:
    """The credential file is read again; a provider of this machine is reached past the parent."""
    with Provider(reply(OK)) as provider, CheckingParent() as parent:
        proxy = "\n".join(
            (
                "anonymous = true",
                f'parent_proxy = "{parent.url}"',
                'parent_proxy_credential = "parent"',
            )
        )
        config = write_credential(tmp_path, "parent", "team:wrong")
        for name, host in (("far", "far.test"), ("near", "127.0.0.1")):
            config += provider_table(name, url=f"http://{host}:{provider.port}")
            config += route_table(f"/{name}", name)

        def status(path: str) -> int:
            with connect(daemon.port) as client:
                client.send(post(path))
                return read_response(client).status

        with Daemon(tmp_path, config, proxy=proxy) as daemon:
            assert status("/near/1") == 200
            assert parent.accepted == 0
            assert status("/far/1") == 502
            (attempt,) = trace_of(daemon, path="/far/1")["attempts"]
            assert attempt["cause"] == "parent_proxy_auth"
            write_credential(tmp_path, "parent", CheckingParent.password)
            assert reload(daemon)["changed"] == ["proxy"]
            assert status("/far/2") == 200
            assert parent.accepted == 2
            assert_settles(daemon)
