"""nginx between the client and the proxy: a stream stays a stream, a broken body stays broken."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from tests.support.daemon import Daemon
from tests.support.live_proxy import LiveProxy, begin, live_fixture, post, read_stepwise, until
from tests.support.scripts import DONE, LAST, SSE, event
from tests.support.sockets import WAIT, Wire, chunked

_PATH = os.environ.get("PATH", "") + ":/usr/sbin:/sbin"
NGINX = shutil.which("nginx", path=_PATH)
pytestmark = pytest.mark.skipif(NGINX is None, reason="nginx is not installed")

CONFIG = """
daemon off;
master_process off;
pid {folder}/nginx.pid;
error_log {folder}/error.log;
events {{ worker_connections 64; }}
http {{
    access_log off;
    client_body_temp_path {folder}/body;
    proxy_temp_path {folder}/proxy;
    fastcgi_temp_path {folder}/fastcgi;
    uwsgi_temp_path {folder}/uwsgi;
    scgi_temp_path {folder}/scgi;
    server {{
        listen unix:{folder}/nginx.sock;
        proxy_buffering off;
        location /old/ {{ proxy_pass http://127.0.0.1:{port}/p/; }}
        location /new/ {{
            proxy_http_version 1.1;
            proxy_set_header Connection "";
            proxy_pass http://127.0.0.1:{port}/p/;
        }}
        location /buffered/ {{
            proxy_buffering on;
            proxy_http_version 1.1;
            proxy_pass http://127.0.0.1:{port}/p/;
        }}
    }}
}}
"""

live = live_fixture()


@pytest.fixture(scope="module")
def front(live: LiveProxy, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """nginx before the daemon, on a socket file."""
    folder = tmp_path_factory.mktemp("nginx")
    daemon: Daemon = live.daemon
    (folder / "nginx.conf").write_text(CONFIG.format(folder=folder, port=daemon.port))
    assert NGINX is not None
    command = [NGINX, "-p", str(folder), "-c", str(folder / "nginx.conf")]
    with subprocess.Popen(command, stderr=subprocess.PIPE) as process:
        path = folder / "nginx.sock"

        def listens() -> bool:
            assert process.poll() is None, "nginx ended"
            with suppress(OSError), connect(path):
                return True
            return False

        try:
            until(listens, "nginx listens")
            yield path
        finally:
            process.terminate()
            process.wait(WAIT)


def connect(path: Path) -> Wire:
    """Connect to a socket file."""
    sock = socket.socket(socket.AF_UNIX)
    try:
        sock.connect(str(path))
    except OSError:
        sock.close()
        raise
    return Wire(sock)


@pytest.mark.parametrize("location", ["/old", "/new", "/buffered"])
def test_each_chunk_passes_nginx_before_the_next_is_sent(
    live: LiveProxy, front: Path, location: str
) -> None:
    """It passes over HTTP/1.0 and 1.1; our header turns off the buffering of nginx."""
    chunks = [*map(event, range(3)), DONE]
    turn = live.stream(*chunks)
    with begin(connect(front), f"{location}/x") as client:
        read_stepwise(client, turn, *chunks, b"")


@pytest.mark.parametrize("location", ["/old", "/new"])
@pytest.mark.parametrize(
    ("framing", "end"),
    [
        ("chunked", "fin"),
        ("chunked", "reset"),
        ("length", "fin"),
        ("length", "reset"),
        ("none", "reset"),  # without framing a FIN is a proper end
    ],
)
def test_a_broken_body_does_not_look_whole_behind_nginx(
    live: LiveProxy, front: Path, framing: str, end: str, location: str
) -> None:
    """No last chunk, and no full length, comes out of nginx; all bytes before the break do."""
    whole = event(0) + event(1)
    head = {
        "chunked": SSE,
        "length": SSE.replace(b"Transfer-Encoding: chunked", b"Content-Length: 1000"),
        "none": SSE.replace(b"Transfer-Encoding: chunked\r\n", b""),
    }[framing]
    turn = live.break_off(end, head, chunked(whole) if framing == "chunked" else whole)
    with connect(front) as client:
        client.send(post(f"{location}/x"))
        _, fields = client.read_head()
        is_chunked = (b"transfer-encoding", b"chunked") in fields
        assert (client.read_chunk() if is_chunked else client.read(len(whole))) == whole
        turn.give()
        client.wait_closed()
        assert client.buffer == b""


def test_a_whole_body_is_whole_behind_nginx(live: LiveProxy, front: Path) -> None:
    """The counterpart: what ended well ends well, over HTTP/1.0 too."""
    live.reply(SSE, chunked(event(0), DONE), LAST)
    for location in ("/old", "/new"):
        with connect(front) as client:
            client.send(post(f"{location}/x"))
            client.read_head()
            assert client.read_chunks() == event(0) + DONE
