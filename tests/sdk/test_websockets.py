"""WebSockets of npm programs, of OpenAI's SDKs and of a real browser, through the daemon."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from openai import OpenAI
from websockets.sync.server import ServerConnection

from tests.support.live_proxy import listener_credentials, trace_of
from tests.support.page import CHROMIUM, WITHIN, report_of, serving
from tests.support.scripts import Notes
from tests.support.sockets import WAIT
from tests.support.tls import Authority
from tests.support.websocket_peers import KEY, Peers, running_peers

FOLDER = Path(__file__).parents[1] / "browser"
NODE = shutil.which("node")
USAGE = {
    "total_tokens": 30,
    "input_tokens": 10,
    "output_tokens": 20,
    "input_token_details": {"cached_tokens": 4},
    "output_token_details": {"text_tokens": 20},
}

needs_npm = pytest.mark.skipif(
    NODE is None or not (FOLDER / "node_modules" / "ws").exists(), reason="needs node and ws"
)


def realtime(connection: ServerConnection) -> None:
    """Do as OpenAI's Realtime API does, in short."""

    def send(**event: Any) -> None:
        connection.send(json.dumps(event))

    send(type="session.created", session={"id": "sess_1", "model": "gpt-realtime"})
    for message in connection:
        if json.loads(message)["type"] == "response.create":
            response = {"id": "resp_1", "status": "in_progress"}
            send(type="response.created", response=response)
            send(type="response.output_text.delta", response_id="resp_1", delta="hi")
            done = {**response, "status": "completed", "usage": USAGE, "output": []}
            send(type="response.done", response=done)


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    """An authority of the tests' own."""
    return Authority(tmp_path_factory.mktemp("authority"))


@pytest.fixture(scope="module")
def peers(tmp_path_factory: pytest.TempPathFactory, authority: Authority) -> Iterator[Peers]:
    """A daemon that is reached in the clear and by TLS."""
    folder = tmp_path_factory.mktemp("peers")
    proxy = 'listen_tls = ["tcp:0:interface=127.0.0.1"]\ncertificate = "certificate"\nkey = "key"\n'
    listener_credentials(folder, authority)
    with running_peers(folder, proxy=proxy) as running:
        yield running


def npm(what: str, address: str, key: str = KEY, **environ: str) -> dict[str, Any]:
    """Run one of the programs, and return what it reports."""
    command = [NODE or "", str(FOLDER / "sockets.mjs"), what, address, key]
    ended = subprocess.run(
        command,
        cwd=FOLDER,
        env={**os.environ, **environ},
        capture_output=True,
        text=True,
        timeout=WITHIN,
        check=False,
    )
    assert ended.stdout, ended.stderr
    found: dict[str, Any] = json.loads(ended.stdout)
    return found


@needs_npm
def test_ws_of_npm_is_a_client(peers: Peers) -> None:
    """Compressed messages, a large one, fragments, a ping and its close code."""
    closed = Notes()

    def play(connection: ServerConnection) -> None:
        for message in connection:
            connection.send(message)

    def noting(connection: ServerConnection) -> None:
        try:
            play(connection)
        finally:
            closed.put(connection.close_code)

    peers.play = noting
    found = npm("echoed", f"ws://127.0.0.1:{peers.daemon.port}/p/echo")
    assert found["messages"] == [
        [False, 4, False],
        [False, 8000, False],
        [False, 8000, False],
        [True, 5 * 1024 * 1024, True],
        [False, 9, False],
    ]
    assert (found["code"], found["reason"], found["pongs"]) == (4001, "enough", 1)
    assert "permessage-deflate" in found["extensions"]
    assert closed.read() == 4001


@needs_npm
def test_ws_of_npm_is_refused(peers: Peers) -> None:
    """It sees status and words."""
    found = npm("refused", f"ws://127.0.0.1:{peers.daemon.port}/p/refused")
    assert found["status"] == 401
    assert "not one of this proxy's client keys" in found["body"]


@needs_npm
def test_ws_of_npm_is_a_provider(tmp_path: Path) -> None:
    """Messages of another library cross, compressed."""
    with _node_server() as (port, told):
        with (
            running_peers(tmp_path, url=f"http://127.0.0.1:{port}") as peers,
            peers.connect("/p/x") as client,
        ):
            assert client.protocol.extensions
            for message in ("one", "again and again " * 500, b"\0" * 3_000_000):
                client.send(message)
                assert client.recv(WAIT) == message
            client.close(4002)
        assert told() == {"code": 4002}


@contextmanager
def _node_server() -> Iterator[tuple[int, Any]]:
    command = [NODE or "", str(FOLDER / "sockets.mjs"), "served", "-", "-"]
    with subprocess.Popen(command, cwd=FOLDER, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None

        def told() -> Any:
            assert process.stdout is not None
            return json.loads(process.stdout.readline())

        try:
            yield told()["port"], told
        finally:
            process.kill()


@needs_npm
@pytest.mark.parametrize("kind", ["realtime ws", "realtime websocket"])
def test_openai_of_npm_speaks_realtime(peers: Peers, authority: Authority, kind: str) -> None:
    """It always speaks wss, so it comes to a TLS listener; one kind has its key as a subprotocol.

    Whether Node has a WebSocket of its own depends on its version.
    """
    if kind == "realtime websocket" and not _has_own_websocket():
        pytest.skip("this Node has no WebSocket of its own")
    peers.play = realtime
    address = f"https://localhost:{peers.daemon.tls_port}/p/v1"
    found = npm(kind, address, NODE_EXTRA_CA_CERTS=str(authority.ca_path))
    assert found == {
        "types": [
            *("session.created", "response.created", "response.output_text.delta"),
            "response.done",
        ],
        "total": 30,
    }


def _has_own_websocket() -> bool:
    command = [NODE or "", "-e", "process.exit(typeof WebSocket === 'undefined' ? 1 : 0)"]
    return subprocess.run(command, check=False).returncode == 0


@pytest.mark.filterwarnings("ignore:connect.. must be used as a context manager")
def test_openai_of_python_speaks_realtime(peers: Peers) -> None:
    """Its events come one by one, and the key is a client's."""
    peers.play = realtime
    url = f"http://127.0.0.1:{peers.daemon.port}/p/v1"
    client = OpenAI(api_key=KEY, base_url=url, websocket_base_url=url.replace("http", "ws"))
    with client.realtime.connect(model="gpt-realtime") as connection:
        assert connection.recv().type == "session.created"
        connection.response.create()
        types = [connection.recv().type for _ in range(3)]
    assert types == ["response.created", "response.output_text.delta", "response.done"]


@pytest.mark.skipif(CHROMIUM is None, reason="needs chromium")
def test_a_browser_speaks_with_its_key_as_a_subprotocol(peers: Peers, tmp_path: Path) -> None:
    """It fails unless one of its subprotocols is answered; it sees text, bytes and close codes."""

    def play(connection: ServerConnection) -> None:
        for message in connection:
            connection.send(message)
            if message == "last":
                connection.close(4003, "that was all")

    peers.play = play
    with serving(_PAGE) as server:
        server.config = {
            "address": f"ws://127.0.0.1:{peers.daemon.port}/p/page",
            "key": KEY,
        }
        found = report_of(server, tmp_path)
    assert found == {
        "protocol": "realtime",
        "extensions": "permessage-deflate; server_max_window_bits=12; client_max_window_bits=12",
        "messages": [16000, 2000000, 4],
        "code": 4003,
        "reason": "that was all",
        "wasClean": True,
    }
    assert trace_of(peers.daemon, path="/p/page")["client"] == "team"


_PAGE = b"""
const { address, key } = await (await fetch("/config")).json();
const socket = new WebSocket(address, ["realtime", `openai-insecure-api-key.${key}`]);
socket.binaryType = "arraybuffer";
const found = { messages: [] };
socket.onopen = () => {
  Object.assign(found, { protocol: socket.protocol, extensions: socket.extensions });
  socket.send("again and again ".repeat(1000));
  socket.send(new Uint8Array(2000000));
  socket.send("last");
};
socket.onmessage = ({ data }) => found.messages.push(data.byteLength ?? data.length);
socket.onclose = ({ code, reason, wasClean }) =>
  fetch("/report", { method: "POST", body: JSON.stringify({ ...found, code, reason, wasClean }) });
"""
