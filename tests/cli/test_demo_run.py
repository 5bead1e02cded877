"""``llmproxy demo`` as a newcomer runs it: what stands on the terminal, and in which order."""

from __future__ import annotations

import json
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import closing, contextmanager
from http.client import HTTPConnection
from pathlib import Path
from typing import Any

import pytest

from tests.support.daemon import environment
from tests.support.sockets import WAIT

COMMAND = [str(Path(sys.executable).parent / "llmproxy"), "demo", "--port", "0"]
COMMAND += ["--admin-port", "0"]
FEW = 4096
"""As many descriptors as a usual machine allows at most."""


def limited() -> None:
    """Allow few descriptors, in the child."""
    resource.setrlimit(resource.RLIMIT_NOFILE, (1024, FEW))


class RunningDemo:
    """A demo under way.

    Attributes:
        begin: all that it printed at its start.
        port: the proxy's.
    """

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self.process = process
        lines = [self.line()]
        while not lines[-1].endswith("/metrics\n"):
            lines.append(self.line())
        self.begin = "".join(lines)
        found = re.search(r"http://127\.0\.0\.1:([0-9]+)", self.begin)
        assert found is not None
        self.port = int(found[1])

    def line(self) -> str:
        """Return the next line of standard output."""
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        assert line, "it has ended"
        return line

    def post(self, path: str, model: str) -> int:
        """Ask a model for a stream, read that, and return its status."""
        body = {"model": model, "stream": True, "messages": [{"role": "user", "content": "Hi"}]}
        return self.ask(path, body)[0]

    def ask(self, path: str, body: dict[str, Any]) -> tuple[int, bytes]:
        """Post a body; return the status and the body of the response."""
        with closing(HTTPConnection("127.0.0.1", self.port, timeout=WAIT)) as connection:
            kind = {"content-type": "application/json"}
            connection.request("POST", path, json.dumps(body).encode(), kind)
            response = connection.getresponse()
            return response.status, response.read()


@pytest.fixture
def demo() -> Iterator[RunningDemo]:
    """A demo on ports of the kernel's choice; at its end nothing may stand on standard error."""
    with running() as demo:
        yield demo


@contextmanager
def running(*options: str) -> Iterator[RunningDemo]:
    """Run a demo in this way."""
    with subprocess.Popen(
        [*COMMAND, *options],
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=limited,
    ) as process:
        try:
            yield RunningDemo(process)
            process.send_signal(signal.SIGINT)
            _, errors = process.communicate(timeout=WAIT)
        finally:
            process.kill()
    assert (process.returncode, errors) == (0, "")


def test_the_first_words_are_what_to_do(demo: RunningDemo) -> None:
    """Not a warning, where the machine allows few descriptors; the ports are the real ones."""
    first, second, *_ = demo.begin.splitlines()
    assert first == (
        f"# The proxy listens on http://127.0.0.1:{demo.port}, a demo provider behind it."
    )
    assert second == "# Paste a command into another terminal; Ctrl-C ends this."
    assert demo.port != 0
    assert ":0/" not in demo.begin


def test_each_request_is_a_short_line(demo: RunningDemo) -> None:
    """It says what was asked for, what came of it, and how long and how much it was."""
    assert demo.post("/openai/v1/chat/completions", "demo-fast") == 200
    line = demo.line()
    assert re.fullmatch(
        r"[0-9]{2}:[0-9]{2}:[0-9]{2} POST /openai/v1/chat/completions demo-fast: "
        r"200 complete, [0-9]+\.[0-9]{2} s(, [0-9]+ tokens in, [0-9]+ out)?\n",
        line,
    ), line
    for path in ("/openai/v1/chat/completions", "/nowhere"):
        assert demo.post(path, "\x1b[2J") == 404
    assert r"/completions \x1b[2J: 404 upstream_refused, " in demo.line()
    assert re.fullmatch(
        r"POST /nowhere.*: 404 rejected \(no_route\), 0\.[0-9]{2} s\n", demo.line()[9:]
    )


def test_a_prompt_is_remembered(demo: RunningDemo) -> None:
    """Who sends the same again sees cached tokens, as with a provider."""
    body = {"model": "demo-fast", "messages": [{"role": "user", "content": "word " * 40}]}
    counts = []
    for _ in range(2):
        _, document = demo.ask("/openai/v1/chat/completions", body)
        counts.append(json.loads(document)["usage"]["prompt_tokens_details"]["cached_tokens"])
    assert counts == [0, 32]


@pytest.mark.skipif(shutil.which("curl") is None, reason="curl is not installed")
def test_a_sandbox_is_what_it_prints() -> None:
    """In a shell with nothing but these variables, curl reaches the providers' own hosts."""
    with running("--sandbox") as demo:
        text = demo.begin
        exports = [line for line in text.splitlines() if line.startswith(("export ", "unset "))]
        folder = Path(re.findall(r"NODE_EXTRA_CA_CERTS=(\S+)/root.pem", text)[0])
        calls = re.findall(r"curl -N https://[^\n]*\n[^\n]*", text)
        assert len(calls) == 2
        for call in calls:
            done = in_a_shell(*exports, call)
            assert done.returncode == 0, done.stderr
            assert "data: " in done.stdout
        assert in_a_shell(*exports, "curl -sS https://example.com/").returncode == 56
        # What stands in a shell may win over what is printed.
        others = {"https_proxy": "http://127.0.0.1:1", "CURL_CA_BUNDLE": "/none.pem"}
        others["no_proxy"] = "*"
        assert in_a_shell(*exports, calls[0], **others).returncode == 0
        assert folder.is_dir()
    assert not folder.exists()


def in_a_shell(*lines: str, **variables: str) -> subprocess.CompletedProcess[str]:
    """Run lines in a shell that knows nothing else but these variables."""
    return subprocess.run(
        ["bash", "-c", "\n".join(lines)],
        env={"PATH": os.environ["PATH"], **variables},
        capture_output=True,
        text=True,
        timeout=WAIT,
        check=False,
    )


@pytest.mark.skipif(shutil.which("curl") is None, reason="curl is not installed")
def test_a_capsule_is_played_by_the_curl_that_it_prints(tmp_path: Path) -> None:
    """The first words say what is in it, and the client sees the stream break."""
    came = {"chunks": 1, "bytes": 700, "ends_between_events": True, "last_chunks": [[0.1, 700]]}
    capsule = {"capsule": 1, "end_reason": "upstream_broken", "cause": "closed"}
    file = tmp_path / "fault.json"
    file.write_text(json.dumps({**capsule, "response": {"status": 200, **came}}))
    with running("--replay", str(file)) as demo:
        words = "status 200, 700 bytes in 1 reads, then upstream_broken closed"
        assert f"# The model demo-replay, at any path, plays the capsule: {words}\n" in demo.begin
        (call,) = re.findall(r"curl -N .*\n.*demo-replay.*", demo.begin)
        done = in_a_shell(call)
        assert (done.returncode, len(done.stdout)) == (18, 700)
        assert "demo-replay: 200 upstream_broken (upstream_broken), " in demo.line()
