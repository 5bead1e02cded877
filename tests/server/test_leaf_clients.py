"""Real programs meet leaves: what the proxy signs is believed, and nothing else of its authority.

Each client calls ``https://localhost``.  A leaf that is inside the constraints of its authority is
accepted; one that is outside is refused, although the authority's own key has signed it.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import pytest
from pytest_twisted import ensureDeferred
from twisted.internet.task import Clock

from llmproxy.server.leaves import Leaf, Leaves
from tests.support.authorities import OpenAuthority
from tests.support.served import Served

CLIENTS = Path(__file__).parents[1] / "support" / "trusting"

# python3.13 may be a shim that finds no interpreter behind it.
_HAS_3_13 = (
    shutil.which("python3.13") is not None
    and subprocess.run(["python3.13", "-c", ""], capture_output=True, check=False).returncode == 0
)


class Client(NamedTuple):
    """A program that asks once, believing one root.

    Attributes:
        words: its command; ``{root}`` stands for the root's file, ``{url}`` for what it asks.
        variable: the environment variable that names the root's file, if one does.
        refusal: what it says if the certificate is outside the constraints.
        needs: the program that must be installed.
    """

    words: tuple[str, ...]
    refusal: str
    variable: str | None = None
    needs: str = ""


_PYTHON = """
import ssl, sys, urllib.request
context = ssl.create_default_context()
context.verify_flags |= ssl.VERIFY_X509_STRICT
print(urllib.request.urlopen(sys.argv[1], context=context).read().decode())
"""
_SUBTREE = "permitted subtree violation"

PROGRAMS = {
    "python": Client((sys.executable, "-c", _PYTHON, "{url}"), _SUBTREE, "SSL_CERT_FILE"),
    "python3.13": Client(("python3.13", "-c", _PYTHON, "{url}"), _SUBTREE, "SSL_CERT_FILE"),
    "curl": Client(("curl", "-sS", "--cacert", "{root}", "{url}"), _SUBTREE),
    "node": Client(
        ("node", "-e", "fetch(process.argv[1]).then(r => r.text()).then(console.log)", "{url}"),
        _SUBTREE,
        "NODE_EXTRA_CA_CERTS",
    ),
    "git": Client(
        ("git", "ls-remote", "{url}"), "server certificate verification failed", "GIT_SSL_CAINFO"
    ),
    "openssl": Client(
        (
            *("openssl", "s_client", "-connect", "{place}", "-servername", "localhost"),
            *("-CAfile", "{root}", "-verify_hostname", "localhost", "-x509_strict"),
            *("-verify_return_error", "-brief"),
        ),
        _SUBTREE,
    ),
}


def environment(**more: str) -> dict[str, str]:
    """Return an environment without a proxy and without authorities."""
    dropped = {"SSL_CERT_FILE", "SSL_CERT_DIR", "NODE_EXTRA_CA_CERTS", "CURL_CA_BUNDLE"}
    dropped |= {"GIT_SSL_CAINFO", "REQUESTS_CA_BUNDLE", "NODE_OPTIONS"}
    kept = {
        name: value
        for name, value in os.environ.items()
        if name not in dropped and not name.lower().endswith("_proxy")
    }
    return {**kept, "GIT_TERMINAL_PROMPT": "0", **more}


def run(words: Iterable[str], **more: str) -> subprocess.CompletedProcess[str]:
    """Run a client to its end."""
    return subprocess.run(
        list(words),
        env=environment(**more),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )


def leaf_of(made: OpenAuthority, host: str = "localhost") -> Leaf:
    """Return the leaf of a host, whether or not the authority may sign for it."""

    def never(call: object) -> None:
        raise AssertionError

    leaves = Leaves(Clock(), time.time, aside=never)  # type: ignore[arg-type]  # it is not called
    prepared = leaves.prepare(made.intercept(host))
    assert prepared is not None
    return prepared.exact[host]


class Said(NamedTuple):
    """What a client has said of both leaves."""

    inside: subprocess.CompletedProcess[str]
    outside: subprocess.CompletedProcess[str]


async def ask_both(
    folder: Path, words: tuple[str, ...], variable: str | None, *, direct: bool
) -> Said:
    """Let a client ask a server inside the constraints of its authority, and one outside."""
    said = []
    for name in ("localhost", "elsewhere.example"):
        (own := folder / name).mkdir()
        made = OpenAuthority(own, name)
        async with Served(tls=leaf_of(made), direct=direct) as served:
            place = f"localhost:{served.port}"
            filled = [
                one.format(root=made.root, url=f"https://{place}/", place=place)
                if "{" in one[:1]
                else one
                for one in words
            ]
            more = {} if variable is None else {variable: str(made.root)}
            said.append(await served.run(run, filled, **more))
    return Said(*said)


@pytest.mark.parametrize("direct", [True, False], ids=["on the socket", "Twisted's layer"])
@pytest.mark.parametrize("name", PROGRAMS)
@ensureDeferred
async def test_a_real_client_believes_what_is_inside_and_nothing_else(
    tmp_path: Path, name: str, direct: bool
) -> None:
    """Each has a verifier of its own; Python's is as strict as that of 3.13."""
    client = PROGRAMS[name]
    if shutil.which(client.words[0]) is None or (name == "python3.13" and not _HAS_3_13):
        pytest.skip(f"{name} is not installed")
    said = await ask_both(tmp_path, client.words, client.variable, direct=direct)
    assert said.inside.returncode == 0, said.inside
    assert said.outside.returncode != 0, said.outside
    assert client.refusal in said.outside.stderr
    if name == "openssl":
        assert "Verification: OK" in said.inside.stderr
    elif name != "git":  # which has nothing to say of what is no repository
        assert "127.0.0.1" in said.inside.stdout


@pytest.fixture(scope="module")
def go(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A program in Go."""
    program = shutil.which("go")
    if program is None:
        pytest.skip("go is not installed")
    folder = tmp_path_factory.mktemp("go")
    built = [program, "build", "-o", str(folder / "ask"), str(CLIENTS / "ask.go")]
    environ = {**os.environ, "GOCACHE": str(folder / "cache"), "GO111MODULE": "off"}
    subprocess.run(built, check=True, env=environ, timeout=110)
    return str(folder / "ask")


@ensureDeferred
async def test_go_believes_what_is_inside_and_nothing_else(tmp_path: Path, go: str) -> None:
    """Its own verifier."""
    said = await ask_both(tmp_path, (go, "{url}"), "SSL_CERT_FILE", direct=True)
    assert said.inside.returncode == 0, said.inside
    assert "127.0.0.1" in said.inside.stdout
    assert said.outside.returncode != 0
    assert "is not permitted by any constraint" in said.outside.stderr


@pytest.mark.skipif(shutil.which("javac") is None, reason="a JDK is not installed")
@ensureDeferred
async def test_java_believes_what_is_inside_and_nothing_else(tmp_path: Path) -> None:
    """It applies no constraints of a trusted root: the intermediate's are what it goes by."""
    script = tmp_path / "java.sh"
    script.write_text(
        "set -e\n"
        'keytool -importcert -noprompt -alias a -file "$1" -keystore "$1.p12" -storetype PKCS12 '
        "-storepass changeit >/dev/null 2>&1\n"
        'exec java -Djavax.net.ssl.trustStore="$1.p12" '
        '-Djavax.net.ssl.trustStorePassword=changeit "$2" "$3"\n'
    )
    words = ("sh", str(script), "{root}", str(CLIENTS / "Ask.java"), "{url}")
    said = await ask_both(tmp_path, words, None, direct=True)
    assert said.inside.returncode == 0, said.inside
    assert "127.0.0.1" in said.inside.stdout
    assert said.outside.returncode != 0
    assert "name constraints check failed" in said.outside.stderr
