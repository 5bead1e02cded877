"""``llmproxy explain``: what it prints, and its exit codes; ``tests/live`` asks a daemon, too."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from llmproxy.cli.main import main
from tests.support.authorities import OpenAuthority
from tests.support.configs import SECRET, vault

DIGEST = "1" * 64
FILE = f"""
[credentials]
directory = "FOLDER/credentials"
[providers.openai]
url = "https://api.openai.example/base"
dialect = "openai"
credential = "key"
query = {{ api-version = "7" }}
timeouts = {{ first_byte = "2m" }}
[providers.anthropic]
url = "https://api.anthropic.example"
dialect = "anthropic"
credential = {{ command = ["FOLDER/never-run"] }}
headers = {{ anthropic-version = "2023-06-01" }}
[providers.open]
url = "http://open.example:8000"
dialect = "raw"
pass_credential = true
[[routes]]
path = "/openai"
providers = ["openai"]
models = ["gpt-*"]
override = {{ openai = {{ model = "real" }} }}
request_body = "1KiB"
[[routes]]
path = "/anthropic"
providers = ["anthropic"]
[[routes]]
path = "/open"
providers = ["open"]
hosts = ["open.example"]
[[routes]]
path = "/list"
name = "list"
providers = ["openai"]
models = ["gpt-4o", "gpt-5", "o*"]
models_list = "configured"
[clients.team-a]
keys = ["sha256:{DIGEST}"]
models = ["gpt-4o", "claude-*", "-"]
[clients.late]
keys = [{{ hash = "sha256:{"2" * 64}", expires = 2026-01-01T00:00:00Z }}]
"""

CHAT = "/openai/v1/chat/completions"
Printed = pytest.CaptureFixture[str]


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """The file of two providers."""
    vault(tmp_path)
    path = tmp_path / "llmproxy.toml"
    path.write_text(FILE.replace("FOLDER", str(tmp_path)))
    return path


def run(file: Path, printed: Printed, *arguments: str) -> tuple[int, str, str]:
    """Return the exit code and what was printed."""
    code = main(["explain", str(file), *arguments])
    captured = printed.readouterr()
    assert SECRET not in captured.out + captured.err
    return code, captured.out, captured.err


def explained(file: Path, printed: Printed, *arguments: str, code: int = 0) -> Any:
    """Return the object that is printed for ``team-a``, unless another client is named."""
    who = () if "--client" in arguments else ("--client", "team-a")
    got, out, err = run(file, printed, "--json", *who, *arguments)
    assert (got, err) == (code, "")
    return json.loads(out)


def test_the_route_and_what_the_provider_gets(file: Path, capsys: Printed) -> None:
    """Target, model, deadlines and headers of the one candidate; the credential is named only."""
    found = explained(file, capsys, "--path", f"{CHAT}?a=1", "--model", "gpt-4o", "--stream")
    assert (found["ok"], found["client"]) == (True, "team-a")
    assert (found["route"]["name"], found["route"]["at"]) == ("openai", "routes[0]")
    assert (found["model"], found["model_from"]) == ("gpt-4o", "body")
    limits = found["limits"]
    assert (limits["request_body"], limits["requests_per_minute"]) == ("1KiB", None)
    (one,) = found["candidates"]
    assert one["url"] == "https://api.openai.example/base/v1/chat/completions?a=1&api-version=7"
    assert (one["provider"], one["model"], one["stream"]) == ("openai", "real", True)
    assert one["credential"] == {"from": "a file", "header": "authorization"}
    assert one["timeouts"]["first_byte"] == "2m"
    assert {"authorization", "x-llmproxy-key", "openai-organization"} <= set(one["drops"])
    assert one["adds"] == ["via", "accept", "accept-encoding", "x-request-id", "authorization"]


def test_a_command_is_not_run(file: Path, capsys: Printed) -> None:
    """It need not be there; the header in which its output would go is."""
    found = explained(file, capsys, "--path", "/anthropic/v1/messages", "--model", "claude-1")
    (one,) = found["candidates"]
    assert one["credential"] == {"from": "a command", "header": "x-api-key"}
    assert {"anthropic-version", "x-api-key"} <= set(one["adds"])
    found = explained(
        file,
        capsys,
        *("--path", "/anthropic/v1/messages", "--model", "claude-1"),
        *("--header", "Anthropic-Version: 1", "--header", "X-Real-IP: 1.2.3.4"),
    )
    assert "anthropic-version" not in found["candidates"][0]["adds"]
    assert "x-real-ip" in found["candidates"][0]["drops"]


def test_the_callers_own_credential(file: Path, capsys: Printed) -> None:
    """With ``pass_credential`` the SDKs' headers are not dropped; the host decides the route."""
    asked = ("--path", "/open/x", "--method", "GET")
    (one,) = explained(file, capsys, *asked, "--host", "open.example:1")["candidates"]
    assert one["credential"] == {"from": "the caller", "header": None}
    assert "x-api-key" not in one["drops"]
    assert one["url"] == "http://open.example:8000/x"
    refused = explained(file, capsys, *asked, code=1)["refused"]
    assert (refused["status"], refused["reason"]) == (404, "no_route")


@pytest.mark.parametrize(
    ("arguments", "status", "reason"),
    [
        (["--path", "/else"], 404, "no_route"),
        (["--path", CHAT, "--model", "o3"], 404, "no_route"),
        (["--path", CHAT, "--model", "gpt-5"], 403, "model_forbidden"),
        (["--path", "/anthropic/v1/messages"], 403, "model_forbidden"),
        (["--path", "/openai/../x"], 400, "bad_path"),
        (["--path", CHAT, "--method", "TRACE"], 405, "method"),
        (["--path", CHAT, "--header", "x_api_key: 1"], 400, "bad_header"),
        (
            ["--path", CHAT, "--model", "gpt-4o", "--header", "content-type: text/csv"],
            415,
            "unread_body",
        ),
        (["--path", CHAT, "--client", "late"], 401, "key_expired"),
        (["--path", "/list/v1/models/gpt-5", "--method", "GET"], 404, "no_model"),
    ],
)
def test_why_a_request_would_be_refused(
    arguments: list[str], status: int, reason: str, file: Path, capsys: Printed
) -> None:
    """The status, the reason word and the text that the caller would get; the code is 1."""
    found = explained(file, capsys, *arguments, code=1)
    refused = found["refused"]
    assert (found["ok"], refused["status"], refused["reason"]) == (False, status, reason)
    assert refused["message"]


TUNNELS = '\n[tunnel]\nallow = ["git.example:443", "*.openai.example:443"]\n'


@pytest.mark.parametrize(
    ("target", "outcome"),
    [
        ("git.example:443", "tunnelled"),
        ("GIT.example:443", "tunnelled"),
        ("api.openai.example:443", "intercepted"),
        ("api.openai.example:8443", "intercepted"),
        ("x.openai.example:443", "tunnelled"),
    ],
)
def test_what_becomes_of_a_connect(target: str, outcome: str, file: Path, capsys: Printed) -> None:
    """The target of a CONNECT is host and port; interception wins."""
    made = OpenAuthority(file.parent, "api.openai.example")
    _, section, keys = made.config().partition("[intercept]")
    file.write_text(f"{file.read_text()}{TUNNELS}{section}{keys}")
    asked = ("--path", target)
    assert explained(file, capsys, *asked)["connect"] == {
        "host": target.lower(),
        "outcome": outcome,
    }
    code, out, _ = run(file, capsys, "--client", "team-a", *asked)
    assert (code, out.splitlines()[1]) == (0, f"connect     {target.lower()} ({outcome})")


@pytest.mark.parametrize(
    ("arguments", "status", "reason"),
    [
        (["--path", "git.example:22"], 403, "tunnel_refused"),
        (["--path", "else.example:443"], 403, "tunnel_refused"),
        (["--path", "git.example:0"], 400, "bad_target"),
        (["--path", "/openai/x", "--method", "CONNECT"], 400, "bad_target"),
        (["--path", "git.example:443", "--client", "late"], 407, "key_expired"),
        (["--path", "git.example:443", "--client", "anonymous"], 407, "no_key"),
    ],
)
def test_why_a_tunnel_would_be_refused(
    arguments: list[str], status: int, reason: str, file: Path, capsys: Printed
) -> None:
    """As for a request, with the words of the status line."""
    file.write_text(f"[proxy]\nanonymous = true\n{file.read_text()}{TUNNELS}")
    refused = explained(file, capsys, *arguments, code=1)["refused"]
    assert (refused["status"], refused["reason"]) == (status, reason)


def test_a_tunnel_that_is_observed(file: Path, capsys: Printed) -> None:
    """It passes, and says that the list would refuse it."""
    file.write_text(f"{file.read_text()}\n[tunnel]\nobserve = true\n")
    found = explained(file, capsys, "--path", "git.example:443")
    assert found["connect"]["outcome"] == "would_refuse"


def test_a_list_of_our_own(file: Path, capsys: Printed) -> None:
    """It says who responds, and with what."""
    found = explained(file, capsys, "--path", "/list/v1/models", "--method", "GET")
    assert (found["route"]["name"], found["listed"]) == ("list", ["gpt-4o"])
    assert "candidates" not in found


def test_a_person_reads_lines(file: Path, capsys: Printed) -> None:
    """Each has a label, and none is too long for a terminal."""
    asked = ("--client", "team-a", "--path", CHAT, "--model", "gpt-4o")
    code, out, err = run(file, capsys, *asked)
    assert (code, err) == (0, "")
    lines = out.splitlines()
    assert lines[0] == "client      team-a"
    assert lines[1] == "route       openai (routes[0], path /openai)"
    assert "model       gpt-4o (of the body)" in lines
    assert "1. openai (openai)" in lines
    assert "credential  a file, in authorization" in lines
    assert max(map(len, lines)) <= 100
    code, out, err = run(file, capsys, "--client", "team-a", "--path", "/else")
    assert (code, err) == (1, "")
    assert out.splitlines()[1:] == [
        "refused     404 no_route",
        "            No route leads to this path.",
    ]
    code, out, err = run(
        file, capsys, "--client", "team-a", "--path", "/list/v1/models", "--method", "GET"
    )
    assert out.splitlines()[-2:] == [
        "answer      the proxy's own list of models",
        "            gpt-4o",
    ]


def test_nobody_is_anonymous_unless_the_file_says_so(file: Path, capsys: Printed) -> None:
    """Without a client the question has no answer, and an unknown one is named."""
    code, out, err = run(file, capsys, "--path", CHAT)
    assert (code, out) == (1, "")
    assert err.startswith("--client: expected a client's name")
    code, _, err = run(file, capsys, "--path", CHAT, "--client", "team-b")
    assert code == 1
    assert "(team-a, late), got 'team-b'" in err
    file.write_text("proxy.anonymous = true\n" + file.read_text())
    assert run(file, capsys, "--path", CHAT, "--model", "gpt-1")[0] == 0


def test_a_file_with_mistakes_explains_nothing(file: Path, capsys: Printed) -> None:
    """Its problems are told as ``check`` does."""
    file.write_text(file.read_text().replace('dialect = "raw"', 'dialect = "other"'))
    code, out, err = run(file, capsys, "--path", CHAT)
    assert (code, out) == (1, "")
    assert err.startswith("providers.open.dialect: expected one of")
    code, out, err = run(file, capsys, "--path", CHAT, "--json")
    assert (code, err) == (1, "")
    report = json.loads(out)
    assert report["ok"] is False
    assert report["problems"][0].startswith("providers.open.dialect: expected one of")


@pytest.mark.parametrize("path", ["x", "", "http://a/b", "/a b", "/ä"])
def test_a_target_that_is_no_path_is_a_wrong_command_line(
    path: str, file: Path, capsys: Printed
) -> None:
    """A request line could not hold it."""
    with pytest.raises(SystemExit) as caught:
        main(["explain", str(file), "--path", path])
    assert caught.value.code == 2
    assert "expected a path" in capsys.readouterr().err


def test_several_candidates_come_with_their_rules(file: Path, capsys: Printed) -> None:
    """In the order of the file, with what decides whether and when each of them is asked."""
    file.write_text(
        file.read_text()
        .replace(
            'providers = ["openai"]', 'providers = ["openai", "azure"]\nbalance = "weighted"', 1
        )
        .replace('{ openai = { model = "real" } }', '{ azure = { model = "real", weight = 3 } }')
        + '[providers.azure]\nurl = "http://azure.example"\ndialect = "openai"\n'
        + "max_streams = 5\nqueue = { size = 9 }\nhealth = { failures = 2 }\n"
    )
    found = explained(file, capsys, "--path", CHAT, "--model", "gpt-4o")
    rules = found["route"]["rules"]
    assert (rules["balance"], rules["sticky"]) == ("weighted", "off")
    first, second = found["candidates"]
    assert (first["provider"], first["model"]) == ("openai", "gpt-4o")
    assert (second["provider"], second["model"]) == ("azure", "real")
    assert (first["rules"]["weight"], first["rules"]["queue"]) == (1, None)
    assert second["rules"] == {
        "weight": 3,
        "max_streams": 5,
        "queue": {"size": 9, "timeout": "10s"},
        "health": {"failures": 2, "window": "30s", "open_for": "15s"},
    }
    code, out, _ = run(file, capsys, "--path", CHAT, "--model", "gpt-4o", "--client", "team-a")
    assert code == 0
    assert "queue (size 9, timeout 10s)" in " ".join(out.split())
