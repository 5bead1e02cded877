"""Real programs between a client and a far end, each with a configuration that a test chooses.

They listen on a port of loopback, as the doctor reaches what it examines by TCP.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from tests.support.programs import free_port, running_program

_PATH = os.environ.get("PATH", "") + ":/usr/sbin:/sbin"
NGINX = shutil.which("nginx", path=_PATH)
HAPROXY = shutil.which("haproxy", path=_PATH)
CADDY = shutil.which("caddy", path=_PATH)

_NGINX = """
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
        listen 127.0.0.1:{port};
        location / {{
            proxy_pass http://127.0.0.1:{origin};
            {lines}
        }}
    }}
}}
"""
_HAPROXY = """
defaults
    mode http
    timeout connect 5s
    timeout client 30s
    timeout server 30s
    {lines}
listen hop
    bind 127.0.0.1:{port}
    server origin 127.0.0.1:{origin}
"""
_CADDY = """
{{
    admin off
    auto_https off
}}
http://127.0.0.1:{port} {{
    {lines}
    reverse_proxy 127.0.0.1:{origin}
}}
"""
_KINDS = {
    "nginx": (NGINX, _NGINX, ("-e", "stderr", "-p", "FOLDER", "-c")),
    "haproxy": (HAPROXY, _HAPROXY, ("-db", "-f")),
    "caddy": (CADDY, _CADDY, ("run", "--adapter", "caddyfile", "--config")),
}
KINDS = tuple(_KINDS)
"""The programs that there is a configuration for."""


def is_installed(kind: str) -> bool:
    """Return whether a program can be run here."""
    return _KINDS[kind][0] is not None


@contextlib.contextmanager
def hop(kind: str, origin: int, *lines: str) -> Iterator[int]:
    """Run a program in front of a port of loopback; its own port is yielded.

    Args:
        kind: which program.
        origin: the port behind it.
        lines: of its configuration, where it says how it passes requests on.
    """
    program, text, options = _KINDS[kind]
    assert program is not None
    port = free_port()
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "config"
        joined = "\n    ".join(lines)
        file.write_text(text.format(folder=folder, port=port, origin=origin, lines=joined))
        command = [program, *(folder if one == "FOLDER" else one for one in options), str(file)]
        environment = {**os.environ, "HOME": folder, "XDG_DATA_HOME": folder}
        with running_program(command, port, environment):
            yield port
