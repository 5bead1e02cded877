"""``llmproxy doctor trust``: which programs of a sandbox reach an intercepted host, or why not.

Each program that is installed asks once for the same URL, with the environment that the command
has.  What it says when it fails tells whether it did not take the proxy, was refused by it, or does
not believe the certificate; each runtime reads variables of its own (docs/sandbox.rst), and the one
that is missing, or names the wrong file, is named.

Whether a file holds the authority is found out by a handshake of our own that believes this file
alone.  Nothing is changed, and no key is sent but the one of the proxy's URL.
"""

from __future__ import annotations

import argparse
import http.client
import json
import os
import re
import shutil
import ssl
import subprocess
import sys
import tempfile
from base64 import b64encode
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Timer
from typing import Literal, NamedTuple
from urllib.parse import unquote, urlsplit

from llmproxy.cli.table import print_table

URL = "https://inference.local/"

_CODES = """exit codes: 0 every program reaches the proxy; 1 some do not; 2 the proxy cannot be
reached, or the command line is wrong"""
_ABOUT = """\
Within a sandbox: let each program that is installed (Python, requests, httpx, Node, curl, git,
Java, Codex) ask once for a URL of an intercepted host, with the present environment; for each that
does not reach the proxy, or does not trust it, name the variable that is missing."""

_PATIENCE_S = 60.0
"""Seconds for one program; on an idle machine Java takes three."""

Outcome = Literal["reached", "another", "untrusted", "constrained", "bypassed", "refused", "failed"]
"""What became of a program's request; ``another`` is a response that is not the proxy's."""

_WORDS: dict[Outcome, str] = {
    "reached": "reaches the proxy",
    "another": "gets a response of somebody else",
    "untrusted": "does not trust the certificate",
    "constrained": "finds the host outside the authority",
    "bypassed": "does not take the proxy",
    "refused": "is refused by the proxy",
    "failed": "fails",
}

_SIGNS: tuple[tuple[Outcome, re.Pattern[str]], ...] = (
    ("constrained", re.compile(r"permitted subtree|NameConstraint|not authorized to sign", re.I)),
    (
        "untrusted",
        re.compile(
            r"CERTIFICATE_VERIFY_FAILED|certificate verif|self.signed|SELF_SIGNED|UNABLE_TO_"
            r"|local issuer|SSL certificate problem|PKIX|UnknownIssuer|unknown (?:ca|authority)"
            r"|CA certificate bundle|error setting certificate",
            re.I,
        ),
    ),
    (
        "refused",
        re.compile(r"\b407\b|\b403\b|Proxy Authentication|tunnel failed|Tunnel conn", re.I),
    ),
    (
        "bypassed",
        re.compile(
            r"not known|ENOTFOUND|EAI_AGAIN|resolve host|resolution|UnresolvedAddress|UnknownHost"
            r"|No address|unreachable|refused|ECONN|dns error|ConnectException|timed? ?out",
            re.I,
        ),
    ),
)
"""How programs say what went wrong, the first that fits."""

_PYTHON = """\
import sys
library, url = sys.argv[1:]
try:
    if library == "urllib":
        import urllib.error, urllib.request
        try:
            response = urllib.request.urlopen(url, timeout=30)
        except urllib.error.HTTPError as error:
            response = error
        status, fields = response.status, response.headers
    else:
        client = __import__(library)
        response = client.get(url, timeout=30)
        status, fields = response.status_code, response.headers
except ModuleNotFoundError:
    sys.exit(99)
print("HTTP", status, "proxy" if "x-llmproxy-request-id" in fields else "another")
"""

_NODE = """\
fetch(process.argv[1]).then(
  (response) => console.log("HTTP", response.status,
    response.headers.has("x-llmproxy-request-id") ? "proxy" : "another"),
  (error) => { console.log(error.cause?.code ?? "", error.cause?.message ?? error.message);
    process.exit(1); });
"""

_JAVA = """\
import java.net.URI;
import java.net.http.*;

public class Ask {
    public static void main(String[] words) throws Exception {
        var request = HttpRequest.newBuilder(URI.create(words[0])).build();
        var response = HttpClient.newHttpClient().send(
            request, HttpResponse.BodyHandlers.discarding());
        var ours = response.headers().firstValue("x-llmproxy-request-id").isPresent();
        System.out.println("HTTP " + response.statusCode() + (ours ? " proxy" : " another"));
    }
}
"""

_NOT_THERE = 99

_CODEX = (
    *("exec", "--skip-git-repo-check", "-m", "trust"),
    *("-c", 'model_provider="trust"'),
    *("-c", 'model_providers.trust.name="trust"'),
    *("-c", 'model_providers.trust.base_url="{url}v1"'),
    *("-c", 'model_providers.trust.wire_api="responses"'),
    *("-c", "model_providers.trust.request_max_retries=0"),
    *("-c", "model_providers.trust.stream_max_retries=0"),
    "Say hello",
)


class Program(NamedTuple):
    """One program, or one library of Python's.

    Attributes:
        name: as it is shown.
        command: its words, the first of which must be installed; ``{url}`` is the URL, ``{folder}``
            a folder of its own with ``Ask.java`` in it.
        trusts: the variables that name what it trusts, those that it reads first in front.
        proxies: the variables that say it shall take a proxy.
        reached: what it says when it got a response.
        advised: which of ``trusts`` an operator sets.
        gives_up: what it says when it failed and tries again without end; of what it failed, it
            does not say, and that is found out without it.
    """

    name: str
    command: tuple[str, ...]
    trusts: tuple[str, ...]
    proxies: tuple[str, ...] = ("HTTPS_PROXY",)
    reached: str = r"\AHTTP"
    advised: int = 0
    gives_up: str = ""


PROGRAMS = (
    Program("Python (ssl)", ("python3", "-c", _PYTHON, "urllib", "{url}"), ("SSL_CERT_FILE",)),
    Program(
        "requests",
        ("python3", "-c", _PYTHON, "requests", "{url}"),
        ("REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE"),
    ),
    Program("httpx", ("python3", "-c", _PYTHON, "httpx", "{url}"), ("SSL_CERT_FILE",)),
    Program(
        "Node (fetch)",
        ("node", "-e", _NODE, "{url}"),
        ("NODE_EXTRA_CA_CERTS",),
        ("HTTPS_PROXY", "NODE_USE_ENV_PROXY"),
    ),
    Program(
        "curl",
        ("curl", "-sS", "-o", os.devnull, "-D", "-", "-m", "30", "{url}"),
        ("CURL_CA_BUNDLE", "SSL_CERT_FILE"),
        advised=1,
        reached="(?im)^x-llmproxy-request-id:",
    ),
    Program(
        "git",
        ("git", "-c", "credential.helper=", "ls-remote", "{url}trust.git"),
        ("GIT_SSL_CAINFO",),
        reached=r"returned error: [45]|not found|could not read Username|Authentication failed",
    ),
    Program(
        "Java",
        ("java", "{folder}/Ask.java", "{url}"),
        ("JAVA_TOOL_OPTIONS",),
        ("JAVA_TOOL_OPTIONS",),
    ),
    Program(
        "Codex",
        ("codex", *_CODEX),
        ("CODEX_CA_CERTIFICATE", "SSL_CERT_FILE"),
        reached=r"unexpected status|last status|stream disconnected|stream closed",
        advised=1,
        gives_up="Reconnecting",  # 0.171, for minutes
    ),
)


class Found(NamedTuple):
    """What was found of one program.

    Attributes:
        program: its name.
        outcome: what became of its request.
        advice: what to change; empty where all is well.
        said: the program's last words, where they say more.
    """

    program: str
    outcome: Outcome
    advice: str
    said: str


class Way(NamedTuple):
    """The proxy as the environment names it, and the host that is asked for."""

    url: str
    proxy: str
    host: str
    port: int

    def believes(self, file: str) -> bool | None:
        """Return whether who trusts ``file`` alone trusts the host; None where it is not known.

        Raises:
            OSError: the proxy cannot be reached, or refuses the CONNECT.
        """
        try:
            context = ssl.create_default_context(cafile=file)
        except (OSError, ssl.SSLError):
            return False
        return self._shakes(context)

    def check(self) -> None:
        """Connect once, whoever the host is.

        Raises:
            OSError: the proxy cannot be reached, or refuses the CONNECT.
        """
        context = ssl.create_default_context()
        context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
        self._shakes(context)

    def _shakes(self, context: ssl.SSLContext) -> bool | None:
        proxy = urlsplit(self.proxy)
        if proxy.scheme != "http" or proxy.hostname is None:
            return None
        fields = {}
        if proxy.username is not None:
            pair = f"{unquote(proxy.username)}:{unquote(proxy.password or '')}"
            fields["Proxy-Authorization"] = "Basic " + b64encode(pair.encode()).decode()
        connection = http.client.HTTPSConnection(
            proxy.hostname, proxy.port or 80, timeout=10, context=context
        )
        connection.set_tunnel(self.host, self.port, fields)
        try:
            connection.connect()
        except ssl.SSLCertVerificationError:
            return False
        finally:
            connection.close()
        return True


def add_trust(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the command to those of ``llmproxy``."""
    command = commands.add_parser(
        "doctor trust",
        help="find out which programs of a sandbox do not trust the proxy",
        description=_ABOUT,
        epilog=_CODES,
    )
    command.add_argument(
        "url",
        nargs="?",
        default=URL,
        type=_url,
        metavar="URL",
        help="of an intercepted host (default: %(default)s)",
    )
    command.add_argument("--json", action="store_true", help="print JSON to stdout")
    command.set_defaults(run=trust)


def trust(args: argparse.Namespace) -> int:
    """Let the programs ask, and print what became of it."""
    target = urlsplit(args.url)
    proxy = _first(os.environ, "HTTPS_PROXY", "https_proxy")
    if proxy is None:
        print("HTTPS_PROXY is not set: no program knows the proxy", file=sys.stderr)
        return 2
    way = Way(args.url, proxy, target.hostname or "", target.port or 443)
    try:
        way.check()
    except (OSError, http.client.HTTPException) as error:
        print(f"the proxy at {_shown(proxy)} gives no way to {way.host}: {error}", file=sys.stderr)
        return 2
    found = list(examine(way, os.environ))
    missing = [one.name for one in PROGRAMS if one.name not in {each.program for each in found}]
    if args.json:
        programs = [one._asdict() for one in found]
        print(json.dumps({"url": args.url, "programs": programs, "not_installed": missing}))
    else:
        rows = [(one.program, _WORDS[one.outcome], _last_column(one)) for one in found]
        print_table(("program", "what it does", "what to do"), rows)
        if missing:
            print(f"not installed, and not tried: {', '.join(missing)}")
    return 0 if all(one.outcome == "reached" for one in found) else 1


def _last_column(one: Found) -> str:
    return one.advice or ("" if one.outcome == "reached" else one.said)


def examine(way: Way, environ: Mapping[str, str]) -> Iterator[Found]:
    """Let each program that is installed ask; yield what was found, in their order."""
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(2) as pool:
        (Path(folder) / "Ask.java").write_text(_JAVA)
        said = pool.map(lambda one: _ask(one, way.url, folder, environ), PROGRAMS)
        for program, words in zip(PROGRAMS, said, strict=True):
            if words is not None:
                outcome = _judge(program, words)
                if outcome == "failed" and program.gives_up:
                    outcome = _reckon(program, way, environ)
                last = next((line for line in reversed(words.splitlines()) if line.strip()), "")
                advice = "" if outcome == "reached" else _advise(program, outcome, way, environ)
                yield Found(program.name, outcome, advice, last.strip()[:200])


def _ask(program: Program, url: str, folder: str, environ: Mapping[str, str]) -> str | None:
    """Run a program; return all that it wrote, or None where it is not installed."""
    path = shutil.which(program.command[0], path=environ.get("PATH"))
    if path is None:
        return None
    words = [word.replace("{url}", url).replace("{folder}", folder) for word in program.command]
    own = {**environ, "GIT_TERMINAL_PROMPT": "0", "CODEX_HOME": folder}
    try:
        process = subprocess.Popen(  # noqa: S603 - what is installed here, as the operator runs it
            [path, *words[1:]],
            cwd=folder,
            env=own,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
        )
    except OSError as error:
        return str(error)
    said: list[str] = []
    clock = Timer(_PATIENCE_S, process.kill)
    clock.start()
    with process:
        for line in process.stdout or ():
            said.append(line)
            if program.gives_up and re.search(program.gives_up, line):
                process.kill()
    clock.cancel()
    return None if process.returncode == _NOT_THERE else "".join(said)


def _judge(program: Program, words: str) -> Outcome:
    """Return what became of a request, from what the program wrote."""
    if program.gives_up:
        return "reached" if re.search(program.reached, words) else "failed"
    for outcome, sign in _SIGNS[:2]:
        if sign.search(words):
            return outcome
    if re.search(program.reached, words):
        return "another" if re.search(r"(?m)^HTTP \d+ another", words) else "reached"
    return next((outcome for outcome, sign in _SIGNS[2:] if sign.search(words)), "failed")


def _reckon(program: Program, way: Way, environ: Mapping[str, str]) -> Outcome:
    """Return what a program has probably failed of that does not say it."""
    if _is_excluded(way.host, _first(environ, "NO_PROXY", "no_proxy") or ""):
        return "bypassed"
    file = _first(environ, *program.trusts)
    return "failed" if file is not None and way.believes(file) else "untrusted"


def _advise(program: Program, outcome: Outcome, way: Way, environ: Mapping[str, str]) -> str:
    if outcome == "constrained":
        return "the authority is not for this host: make one that is (llmproxy ca new), for all"
    if outcome == "untrusted":
        return _advise_trust(program, way, environ)
    if outcome in ("bypassed", "another"):
        return _advise_proxy(program, way, environ)
    if outcome == "refused":
        return "see what the proxy's log says of it: its key, or the host"
    return ""


def _advise_trust(program: Program, way: Way, environ: Mapping[str, str]) -> str:
    """Name the variable that is missing, or what is wrong with the file that it names."""
    if program.trusts == ("JAVA_TOOL_OPTIONS",):
        return (
            "import the root into Java's store (keytool -importcert -cacerts ...), or name a store "
            "in JAVA_TOOL_OPTIONS: -Djavax.net.ssl.trustStore=FILE"
        )
    name = next((name for name in program.trusts if environ.get(name)), None)
    if name is None:
        return f"set {program.trusts[program.advised]}"
    file = environ[name]
    if not os.path.isfile(file):
        return f"{name} names {file}, which is not there"
    if way.believes(file) is False:
        return f"{name} names {file}, which does not hold the authority's root"
    return f"{name} names {file}, which is right: is the program told to trust another file?"


def _advise_proxy(program: Program, way: Way, environ: Mapping[str, str]) -> str:
    """Name the variable for want of which a program goes its own way."""
    for name in program.proxies:
        if not (environ.get(name) or (name == "HTTPS_PROXY" and environ.get("https_proxy"))):
            if name == "JAVA_TOOL_OPTIONS":
                proxy = urlsplit(way.proxy)
                place = f"-Dhttps.proxyHost={proxy.hostname} -Dhttps.proxyPort={proxy.port or 80}"
                return f'set JAVA_TOOL_OPTIONS="{place}"'
            return f"set {name}" + ("=1 (Node 24)" if name == "NODE_USE_ENV_PROXY" else "")
    names = _first(environ, "NO_PROXY", "no_proxy")
    if names and _is_excluded(way.host, names):
        return f"NO_PROXY names {way.host}: take it out"
    if program.name.startswith("Node"):
        return "NODE_USE_ENV_PROXY is known to Node 24 and newer"
    return "it is told of the proxy: does it read HTTPS_PROXY?"


def _is_excluded(host: str, names: str) -> bool:
    if not names:
        return False
    parts = (one.strip().lower().lstrip("*").lstrip(".") for one in names.split(","))
    return any(one == "" or host == one or host.endswith(f".{one}") for one in parts)


def _first(environ: Mapping[str, str], *names: str) -> str | None:
    return next((environ[name] for name in names if environ.get(name)), None)


def _shown(proxy: str) -> str:
    """Return a proxy's URL without its key."""
    found = urlsplit(proxy)
    return f"{found.scheme}://{found.hostname}:{found.port or 80}"


def _url(text: str) -> str:
    found = urlsplit(text)
    if found.scheme != "https" or not found.hostname:
        raise argparse.ArgumentTypeError(f"expected an https:// URL, got {text!r}")
    return text if text.endswith("/") else f"{text}/"
