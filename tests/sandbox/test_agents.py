"""Coding agents in a sandbox, unmodified: an answer, and refusals that end soon and say why."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from websockets.sync.server import ServerConnection

from tests.support.demo import Demo
from tests.support.live_proxy import trace_of
from tests.support.sandbox import KEY, Sandbox, open_sandbox
from tests.support.websocket_peers import Peers, running_provider

BINARIES = Path(__file__).parent / "node_modules" / ".bin"
LONGEST = 110.0
"""Seconds after which an agent hangs; on an idle machine each of them takes up to 13."""

OVERRIDE = '\n[routes.override]\na = { model = "demo-fast" }\n'
"""Agents ask for models that the demo provider has not."""


@pytest.fixture(scope="module")
def live(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Sandbox]:
    """A proxy in front of the demo provider."""
    with (
        Demo() as demo,
        open_sandbox(tmp_path_factory.mktemp("agents"), url=demo.url, override=OVERRIDE) as live,
    ):
        yield live


def run(live: Sandbox, folder: Path, name: str, *arguments: str, **environ: str) -> tuple[int, str]:
    """Let an agent work in an empty home; return its exit code and all that it wrote."""
    program = BINARIES / name
    if not program.exists():
        pytest.skip(f"{name} is not installed; make peers")
    home = folder / "home"
    home.mkdir(exist_ok=True)
    done = subprocess.run(
        [str(program), *arguments],
        env={**live.environment(), "PATH": os.environ["PATH"], **environ, "HOME": str(home)},
        cwd=home,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=LONGEST,
        check=False,
    )
    return done.returncode, done.stdout


def claude(live: Sandbox, folder: Path, **environ: str) -> tuple[int, str]:
    """Ask Claude Code."""
    given = {"ANTHROPIC_API_KEY": "placeholder", **environ}
    return run(live, folder, "claude", "-p", "Say hello", "--model", "demo-fast", **given)


def codex(live: Sandbox, folder: Path, model: str = "demo-fast", **environ: str) -> tuple[int, str]:
    """Ask Codex."""
    given = {"CODEX_API_KEY": "placeholder", "OPENAI_API_KEY": "placeholder", **environ}
    command = ("exec", "--skip-git-repo-check", "-m", model, "Say hello")
    return run(live, folder, "codex", *command, **given)


def opencode(live: Sandbox, folder: Path, **environ: str) -> tuple[int, str]:
    """Ask opencode."""
    given = {"ANTHROPIC_API_KEY": "placeholder", **environ}
    command = ("run", "-m", "anthropic/claude-sonnet-4-5", "Say hello")
    return run(live, folder, "opencode", *command, **given)


Agent = Callable[..., tuple[int, str]]
AGENTS = [claude, codex, opencode]


@pytest.mark.parametrize("agent", AGENTS)
def test_an_answer(live: Sandbox, tmp_path: Path, agent: Agent) -> None:
    """The agent's key is a placeholder, and the client's stands on the proxy's URL."""
    code, text = agent(live, tmp_path)
    assert code == 0, text
    assert "This is the demo provider." in text


@pytest.mark.parametrize("agent", AGENTS)
def test_a_client_s_key_in_place_of_the_provider_s(
    live: Sandbox, tmp_path: Path, agent: Agent
) -> None:
    """And nothing on the proxy's URL."""
    names = ("ANTHROPIC_API_KEY", "CODEX_API_KEY", "OPENAI_API_KEY")
    given = {**live.environment(key=None), **dict.fromkeys(names, KEY)}
    code, text = agent(live, tmp_path, **given)
    assert code == 0, text
    assert "This is the demo provider." in text


@pytest.mark.parametrize("agent", AGENTS)
def test_a_wrong_key_ends_soon_with_our_words(live: Sandbox, tmp_path: Path, agent: Agent) -> None:
    """Inside TLS, and the agent is told not to come again; Claude Code has words of its own."""
    code, text = agent(live, tmp_path, **live.environment(key=None))
    assert code != 0
    shown = "Invalid API key" if agent is claude else "is not one of this proxy's client keys"
    assert shown in text, text


def test_a_model_that_is_not_there_ends_soon_with_our_words(live: Sandbox, tmp_path: Path) -> None:
    """As the provider would say it."""
    code, text = codex(live, tmp_path, "forbidden")
    assert code != 0
    assert "forbidden" in text


def test_codex_asks_by_http_where_the_route_has_no_websocket(live: Sandbox, tmp_path: Path) -> None:
    """It tries one first, and the refusal says how to go on: one handshake is enough."""
    before = len(live.daemon.traces())
    code, text = codex(live, tmp_path)
    assert code == 0, text
    record = trace_of(live.daemon, method="POST", path="/v1/responses", session=_session(text))
    assert (record["status"], record["usage"]) == (200, "reported")
    tried = [one for one in live.daemon.traces()[before:] if one["error"] == "websocket"]
    assert [(one["method"], one["status"]) for one in tried] == [("GET", 426)]


def test_codex_over_a_websocket(tmp_path: Path) -> None:
    """Its warm-up, with ``"generate": false``, costs nothing; the response behind it is counted."""
    peers, asked = Peers(), list[dict[str, Any]]()

    def play(connection: ServerConnection) -> None:
        for message in connection:
            asked.append(json.loads(message))
            for event in _response(generates=asked[-1].get("generate") is not False):
                connection.send(json.dumps(event))

    peers.play = play
    with (
        running_provider(peers) as url,
        open_sandbox(tmp_path, url=url, native="\nwebsocket = true") as live,
    ):
        code, text = codex(live, tmp_path)
        assert code == 0, text
        assert "Hello from the WebSocket" in text
        record = trace_of(live.daemon, responses=1)
        assert (record["client"], record["status"], record["input_tokens"]) == ("team", 101, 100)
        inside = trace_of(live.daemon, id=record["id"] + "-1")
        assert (inside["usage"], inside["output_tokens"]) == ("reported", 7)
    assert len([one for one in asked if one.get("generate") is not False]) == 1


def _session(text: str) -> str:
    return next(line.split()[-1] for line in text.splitlines() if line.startswith("session id:"))


def _response(*, generates: bool) -> Iterator[dict[str, Any]]:
    """Yield the events of one response, as far as Codex needs them."""
    response = {"id": "resp_1", "object": "response", "model": "demo-fast", "output": []}
    yield {"type": "response.created", "response": {**response, "status": "in_progress"}}
    if generates:
        part = {"type": "output_text", "text": "Hello from the WebSocket", "annotations": []}
        item = {"id": "msg_1", "type": "message", "role": "assistant", "content": [part]}
        yield {"type": "response.output_item.added", "output_index": 0, "item": item}
        yield {"type": "response.output_item.done", "output_index": 0, "item": item}
    out = 7 if generates else 0
    usage = {"input_tokens": 100, "output_tokens": out, "total_tokens": 100 + out}
    done = {**response, "status": "completed", "usage": usage}
    yield {"type": "response.completed", "response": done}
