"""How an engine is reached: by TLS that is verified, through a socket, as a user of its own."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import trustme

from tests.support.daemon import Daemon, provider_table, route_table
from tests.support.engines import SERVERS, EngineServer
from tests.support.live_proxy import client_config, until
from tests.support.programs import free_port

CONFIG = provider_table("p", url="http://127.0.0.1:1") + route_table("/p", "p")
CONFIG += client_config("c", "k")


def program() -> str:
    """Return the program of an engine that speaks TLS."""
    if (found := SERVERS["redis"]) is None:
        pytest.skip("there is no redis: make peers")
    return found


def shared(**keys: str) -> str:
    """Return a file with ``[shared]``."""
    lines = [f"{name} = {json.dumps(value)}" for name, value in keys.items()]
    return CONFIG + "[shared]\n" + "\n".join(lines) + "\n"


def is_up(daemon: Daemon) -> bool:
    """Return whether the engine answers a daemon."""
    return daemon.metrics()["llmproxy_shared_up"] == 1


@pytest.mark.parametrize("name", ["127.0.0.1", "engine.example", "unknown"])
def test_tls_is_verified(tmp_path: Path, name: str) -> None:
    """The name, and who has signed it; txredisapi by itself would take any certificate."""
    authority, port = trustme.CA(), free_port()
    signer = trustme.CA() if name == "unknown" else authority
    certificate = signer.issue_cert("127.0.0.1" if name == "unknown" else name)
    certificate.private_key_and_cert_chain_pem.write_to_path(tmp_path / "engine.pem")
    authority.cert_pem.write_to_path(tmp_path / "ca.pem")
    options = [f"--tls-port {port}", f"--tls-cert-file {tmp_path}/engine.pem"]
    options += [f"--tls-key-file {tmp_path}/engine.pem", "--tls-auth-clients no"]
    options += [f"--tls-ca-cert-file {tmp_path}/ca.pem"]
    words = " ".join(options).split()
    text = shared(url=f"rediss://127.0.0.1:{port}", ca=str(tmp_path / "ca.pem"))
    with (
        EngineServer(program(), tmp_path, *words),
        Daemon(tmp_path, text, proxy="") as daemon,
    ):
        if name == "127.0.0.1":
            until(lambda: is_up(daemon), "it answers")
        else:
            assert "certificate" in daemon.wait_log("shared engine is away")["message"]
            assert not is_up(daemon)


def test_a_socket_and_a_user(tmp_path: Path) -> None:
    """Whose password is in a file, and is in no log."""
    path, folder = tmp_path / "engine.sock", tmp_path / "keys"
    folder.mkdir(mode=0o700)
    (folder / "engine").write_text("p4ssw0rd\n")
    text = shared(url=f"unix://{path}", user="llmproxy", credential="engine", prefix="own:")
    text += f'[credentials]\ndirectory = "{folder}"\n'
    with EngineServer(program(), tmp_path, "--unixsocket", str(path)) as engine:
        engine.command(
            "ACL", "SETUSER", "llmproxy", "on", ">p4ssw0rd", "~own:*", "+@all", "-@admin"
        )
        with Daemon(tmp_path, text, proxy="") as daemon:
            until(lambda: is_up(daemon), "it answers")
            assert engine.command("ZCARD", "own:procs") == 1
            assert "p4ssw0rd" not in json.dumps(daemon.log) + daemon.admin("/config")
        assert engine.command("ZCARD", "own:procs") == 0
