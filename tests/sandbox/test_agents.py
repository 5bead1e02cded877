"""Coding agents in a sandbox, unmodified: an answer, and refusals that end soon and say why."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
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
AT_ONCE = 4
"""Agents that work at the same time: each of them waits much longer than it computes."""

Worked = dict[tuple[Agent, str], Future[Any]]
KEYS = ("ANTHROPIC_API_KEY", "CODEX_API_KEY", "OPENAI_API_KEY")


@pytest.fixture(scope="module")
def worked(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Worked]:
    """What every agent does in every situation; all of it begins with the first test."""
    new = tmp_path_factory.mktemp
    with (
        Demo() as demo,
        open_sandbox(new("agents"), url=demo.url, override=OVERRIDE) as live,
        ThreadPoolExecutor(AT_ONCE) as pool,
    ):
        keyless = live.environment(key=None)
        situations = {
            "placeholder": {},
            "client's key": {**keyless, **dict.fromkeys(KEYS, KEY)},
            "wrong key": keyless,
        }
        begun: Worked = {
            (agent, name): pool.submit(agent, live, new("agent"), **environ)
            for name, environ in situations.items()
            for agent in AGENTS
        }
        begun[codex, "no model"] = pool.submit(codex, live, new("agent"), "forbidden")
        begun[codex, "http"] = pool.submit(codex_by_http, new("agent"), demo)
        begun[codex, "websocket"] = pool.submit(codex_over_a_websocket, new("agent"))
        yield begun


@pytest.mark.parametrize("agent", AGENTS)
def test_an_answer(worked: Worked, agent: Agent) -> None:
    """The agent's key is a placeholder, and the client's stands on the proxy's URL."""
    code, text = worked[agent, "placeholder"].result()
    assert code == 0, text
    assert "This is the demo provider." in text


@pytest.mark.parametrize("agent", AGENTS)
def test_a_client_s_key_in_place_of_the_provider_s(worked: Worked, agent: Agent) -> None:
    """And nothing on the proxy's URL."""
    code, text = worked[agent, "client's key"].result()
    assert code == 0, text
    assert "This is the demo provider." in text


@pytest.mark.parametrize("agent", AGENTS)
def test_a_wrong_key_ends_soon_with_our_words(worked: Worked, agent: Agent) -> None:
    """Inside TLS, and the agent is told not to come again; Claude Code has words of its own."""
    code, text = worked[agent, "wrong key"].result()
    assert code != 0
    shown = "Invalid API key" if agent is claude else "is not one of this proxy's client keys"
    assert shown in text, text


def test_a_model_that_is_not_there_ends_soon_with_our_words(worked: Worked) -> None:
    """As the provider would say it."""
    code, text = worked[codex, "no model"].result()
    assert code != 0
    assert "forbidden" in text


def test_codex_asks_by_http_where_the_route_has_no_websocket(worked: Worked) -> None:
    """It tries one first, and the refusal says how to go on: one handshake is enough."""
    worked[codex, "http"].result()


def codex_by_http(folder: Path, demo: Demo) -> None:
    """Check it at a proxy of its own, in whose traces nobody else stands."""
    with open_sandbox(folder, url=demo.url) as live:
        code, text = codex(live, folder)
        assert code == 0, text
        record = trace_of(live.daemon, method="POST", path="/v1/responses", session=_session(text))
        assert (record["status"], record["usage"]) == (200, "reported")
        tried = [one for one in live.daemon.traces() if one["error"] == "websocket"]
        assert [(one["method"], one["status"]) for one in tried] == [("GET", 426)]


def test_codex_over_a_websocket(worked: Worked) -> None:
    """Its warm-up, with ``"generate": false``, costs nothing; the response behind it is counted."""
    worked[codex, "websocket"].result()


def codex_over_a_websocket(folder: Path) -> None:
    """Check it at a proxy of its own, before a provider that speaks WebSocket."""
    peers, asked = Peers(), list[dict[str, Any]]()

    def play(connection: ServerConnection) -> None:
        for message in connection:
            asked.append(json.loads(message))
            for event in _response(generates=asked[-1].get("generate") is not False):
                connection.send(json.dumps(event))

    peers.play = play
    with (
        running_provider(peers) as url,
        open_sandbox(folder, url=url, native="\nwebsocket = true") as live,
    ):
        code, text = codex(live, folder)
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
