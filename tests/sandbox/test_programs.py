"""Unmodified programs in a sandbox: proxy and authority variables alone, and the tokens arrive.

What each program does with the variables was measured (docs/sandbox.rst).  Programs that are not
installed are left out, and say so.
"""

from __future__ import annotations

import json
import os
import select
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.live_proxy import assert_settles, trace_of
from tests.support.sandbox import KEY, Sandbox, open_sandbox
from tests.support.scripts import DONE, event

PATIENCE = 60.0
"""Seconds that a program may take to start and to write; on an idle machine Java takes four."""

PROGRAMS = Path(__file__).parent / "programs"
MODULES = Path(__file__).parents[1] / "sandbox" / "node_modules"
NODE = MODULES / ".bin" / "node"

SSE = (
    b"HTTP/1.1 200 OK\r\nConnection: close\r\nContent-Type: text/event-stream\r\n"
    b"Transfer-Encoding: chunked\r\n\r\n"
)
NDJSON = SSE.replace(b"text/event-stream", b"application/x-ndjson")

OPENAI = "https://api.openai.com/v1/chat/completions"
ANTHROPIC = "https://api.anthropic.com/v1/messages"
LOCAL = "https://inference.local/v1/chat/completions"
OLLAMA = "https://inference.local/api/chat"


def delta(word: str) -> bytes:
    """Return one event of Anthropic's API."""
    body = {"type": "content_block_delta", "index": 0, "delta": {"type": "text_delta"}}
    body["delta"]["text"] = word  # type: ignore[index]  # it is a table
    return b"event: content_block_delta\ndata: " + json.dumps(body).encode() + b"\n\n"


def line(word: str) -> bytes:
    """Return one line of Ollama's API."""
    body = {"model": "m", "message": {"role": "assistant", "content": word}, "done": False}
    return json.dumps(body).encode() + b"\n"


RAW = [(event(n), event(n)) for n in range(3)]
"""What the provider sends, and what a program then writes."""

DELTAS = [(delta(word), word.encode()) for word in ("One", "Two", "Three")]
LINES = [(line(word), word.encode()) for word in ("One", "Two", "Three")]


@pytest.fixture(scope="module")
def live(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Sandbox]:
    """One proxy for all programs."""
    with open_sandbox(tmp_path_factory.mktemp("sandbox")) as live:
        yield live


def needs(program: str) -> str:
    """Return where a program is, or leave the test out."""
    found = shutil.which(program)
    if found is None:
        pytest.skip(f"{program} is not installed")
    return found


def python(library: str, url: str) -> list[str]:
    """Return the command of a library's program."""
    pytest.importorskip(library)
    return [sys.executable, str(PROGRAMS / "stream.py"), library, url]


def node(library: str, url: str) -> list[str]:
    """Return the command of a program of Node's; the Node that knows the variables is npm's."""
    if not NODE.exists():
        pytest.skip("node 24 is not installed; make peers")
    return [str(NODE), str(PROGRAMS / "stream.mjs"), library, url]


def curl(*options: str) -> list[str]:
    """Return a command of curl's."""
    head = "content-type: application/json"
    return [needs("curl"), "-sSN", "-H", head, "-d", '{"model":"m","stream":true}', *options]


def go(url: str) -> list[str]:
    """Return the command of a Go program, which is built first."""
    binary = Path(os.environ.get("TMPDIR", "/tmp")) / f"llmproxy-stream-{os.getpid()}"
    if not binary.exists():
        build = [needs("go"), "build", "-o", str(binary), str(PROGRAMS / "stream.go")]
        subprocess.run(build, check=True, timeout=300)
    return [str(binary), url]


def java(url: str, live: Sandbox) -> list[str]:
    """Return the command of a Java program; Java takes no variables, but properties."""
    store = live.daemon.folder / "store"
    if not store.exists():
        command = [needs("keytool"), "-importcert", "-noprompt", "-keystore", str(store)]
        command += ["-storepass", "changeit", "-alias", "a", "-file", live.report["root"]]
        subprocess.run(command, check=True, capture_output=True, timeout=60)
    properties = {
        "https.proxyHost": "127.0.0.1",
        "https.proxyPort": str(live.daemon.port),
        "javax.net.ssl.trustStore": str(store),
        "javax.net.ssl.trustStorePassword": "changeit",
    }
    given = [f"-D{name}={value}" for name, value in properties.items()]
    return [needs("java"), *given, str(PROGRAMS / "Stream.java"), url]


def assert_streams(
    live: Sandbox,
    command: list[str],
    pieces: list[tuple[bytes, bytes]],
    *,
    head: bytes = SSE,
    end: bytes = DONE,
    shown_end: bytes = DONE,
    environ: dict[str, str] | None = None,
) -> None:
    """Run a program, and see it write each piece before the provider sends the next one."""
    turn = live.stream(*(sent for sent, _ in pieces), end, head=head)
    environment = live.environment() if environ is None else environ
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment
    ) as process:
        assert process.stdout is not None
        try:
            for _, shown in pieces:
                turn.give()
                got = b""
                while len(got) < len(shown):
                    ready = select.select([process.stdout], [], [], PATIENCE)[0]
                    piece = os.read(process.stdout.fileno(), 65536) if ready else b""
                    if not piece:
                        process.kill()
                        raise AssertionError(f"{got!r} and {process.communicate()[1]!r}")
                    got += piece
                assert got == shown
            turn.give(2)
            rest, complaint = process.communicate(timeout=PATIENCE)
        finally:
            process.kill()
    assert (process.returncode, rest) == (0, shown_end), complaint
    assert_settles(live.daemon)


@pytest.mark.parametrize("url", [OPENAI, LOCAL])
@pytest.mark.parametrize("library", ["urllib", "requests", "httpx", "httpx2", "aiohttp"])
def test_python(live: Sandbox, library: str, url: str) -> None:
    """Every usual library."""
    assert_streams(live, python(library, url), RAW)


@pytest.mark.parametrize("url", [OPENAI, LOCAL])
def test_openai_s_sdk(live: Sandbox, url: str) -> None:
    """The key that it has is a placeholder."""
    assert_streams(live, python("openai", url), RAW, shown_end=b"")


def test_anthropic_s_sdk(live: Sandbox) -> None:
    """At the native host."""
    command = python("anthropic", ANTHROPIC)
    assert_streams(live, command, DELTAS, end=b"event: message_stop\ndata: {}\n\n", shown_end=b"")


def test_ollama_s_sdk(live: Sandbox) -> None:
    """NDJSON, at the name that is not in DNS."""
    last = b'{"model":"m","message":{"role":"assistant","content":""},"done":true}\n'
    command = python("ollama", OLLAMA)
    assert_streams(live, command, LINES, head=NDJSON, end=last, shown_end=b"")


@pytest.mark.parametrize("version", ["--http1.1", "--http2"])
def test_curl(live: Sandbox, version: str) -> None:
    """With the versions of HTTP that it offers."""
    assert_streams(live, curl(version, OPENAI), RAW)


@pytest.mark.parametrize("library", ["fetch", "openai"])
def test_node(live: Sandbox, library: str) -> None:
    """Node 24, which goes by the variables where it is told to."""
    shown = DONE if library == "fetch" else b""
    assert_streams(live, node(library, OPENAI), RAW, shown_end=shown)


def test_node_with_anthropic_s_sdk(live: Sandbox) -> None:
    """As Python's."""
    command = node("anthropic", ANTHROPIC)
    end = b'event: message_stop\ndata: {"type":"message_stop"}\n\n'
    assert_streams(live, command, DELTAS, end=end, shown_end=b"")


def test_go(live: Sandbox) -> None:
    """By net/http."""
    assert_streams(live, go(OPENAI), RAW)


def test_java(live: Sandbox) -> None:
    """It sends no credentials unless the program has an Authenticator: the key is in the call."""
    assert_streams(live, [*java(OPENAI, live), KEY], RAW, environ=live.environment(key=None))


def test_a_program_may_have_the_key_in_place_of_its_provider_s(live: Sandbox) -> None:
    """And nothing on the proxy's URL."""
    command = curl("-H", f"authorization: Bearer {KEY}", "-H", "user-agent: keyed", OPENAI)
    assert_streams(live, command, RAW, environ=live.environment(key=None))
    assert trace_of(live.daemon, user_agent="keyed", method="POST")["client"] == "team"


# --- refusals -------------------------------------------------------------------------------------


def refused(command: list[str], environ: dict[str, str]) -> str:
    """Run a program that fails; return what it wrote."""
    done = subprocess.run(
        command,
        env=environ,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=PATIENCE,
        check=False,
    )
    assert done.returncode != 0
    return done.stdout


SHOWS = {
    "urllib": "403 No host is on the tunnel list",
    "requests": "403 No host is on the tunnel list",
    "httpx": "403 No host is on the tunnel list",
    "httpx2": "403 No host is on the tunnel list",
    "aiohttp": "No host is on the tunnel list",
    "openai": "403 No host is on the tunnel list",
    "anthropic": "403 No host is on the tunnel list",
}
"""What programs show of a CONNECT that is refused; the SDKs in the cause of their error."""


@pytest.mark.parametrize("library", SHOWS)
def test_a_host_that_is_not_listed(live: Sandbox, library: str) -> None:
    """The reason is in the status line, which programs of Python show."""
    url = "https://other.example/v1/messages"
    assert SHOWS[library] in refused(python(library, url), live.environment())


def test_a_host_that_is_not_listed_for_other_programs(live: Sandbox) -> None:
    """Go shows the reason alone; curl and Node's fetch show the status."""
    url = "https://other.example/v1/messages"
    assert "No host is on the tunnel list" in refused(go(url), live.environment())
    assert "403" in refused([needs("curl"), "-sS", url], live.environment())
    assert "403" in refused(node("fetch", url), live.environment())


@pytest.mark.parametrize("library", ["openai", "anthropic"])
def test_a_wrong_key_is_said_inside(live: Sandbox, library: str) -> None:
    """Both SDKs show the words then; of a wrong key on the proxy's URL they show the status."""
    url = OPENAI if library == "openai" else ANTHROPIC
    words = "is not one of this proxy's client keys"
    assert words in refused(python(library, url), live.environment(key=None))
    assert words in refused(node(library, url), live.environment(key=None))
    assert "407 Proxy key unknown" in refused(python(library, url), live.environment(key="wrong"))
