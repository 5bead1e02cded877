"""``llmproxy check``: what it says beside mistakes: what cannot work, or is likely not meant."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest

from llmproxy.cli.ca import new_authority
from llmproxy.cli.main import main
from llmproxy.config.values import show_instant
from tests.support.authorities import OpenAuthority, signed
from tests.support.commands import COUNTED, runs, script
from tests.support.configs import KEYS_LINE, toml, vault, with_credential

Printed = pytest.CaptureFixture[str]


@pytest.fixture(autouse=True)
def no_proxy_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    """The machine's own proxy is none of the warnings' business."""
    for name in ("HTTPS_PROXY", "https_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    """A directory for credential files, with one in it."""
    return vault(tmp_path)


def warnings_of(folder: Path, printed: Printed, changes: dict[str, str | None]) -> list[str]:
    """Return the warnings to a file that can be used."""
    path = folder / "checked.toml"
    path.write_text(toml(changes))
    assert main(["check", str(path)]) == 0
    captured = printed.readouterr()
    assert captured.out.startswith(f"{path}: ok: ")
    found = captured.err.splitlines()
    assert all(line.startswith("warning: ") for line in found)
    return [line.removeprefix("warning: ") for line in found]


def test_a_warning_is_a_line_of_stderr_and_the_code_is_0(tmp_path: Path, capsys: Printed) -> None:
    """The file can be used; a program finds the warnings beside the problems."""
    changes: dict[str, str | None] = {"providers.q": '{ url = "https://q.example", dialect="raw" }'}
    (warning,) = warnings_of(tmp_path, capsys, changes)
    assert warning == "providers.q: no route uses this provider"
    assert main(["check", str(tmp_path / "checked.toml"), "--json"]) == 0
    captured = capsys.readouterr()
    report = json.loads(captured.out)
    assert (report["ok"], report["problems"], captured.err) == (True, [], "")
    assert report["warnings"] == [warning]


# --- the authority of intercepted hosts -----------------------------------------------------------


def authority_warnings(folder: Path, printed: Printed, chain: bytes, key: bytes) -> list[str]:
    """Return the warnings to a file with this authority."""
    made = OpenAuthority(folder, "inference.local")
    made.put(chain, key)
    (folder / "checked.toml").write_text(f"{toml({})}\n{made.config()}")
    assert main(["check", str(folder / "checked.toml")]) == 0
    return printed.readouterr().err.splitlines()


@pytest.mark.parametrize(("days", "warned"), [(13, True), (15, False), (365, False)])
def test_an_authority_that_expires_soon(
    days: int, warned: bool, tmp_path: Path, capsys: Printed
) -> None:
    """Clients must get another one before that."""
    made = new_authority(["inference.local"], now=time.time(), days=days)
    found = authority_warnings(tmp_path, capsys, made.chain, made.key)
    words = f"the certificate will expire, at {show_instant(made.not_after)}"
    assert found == ([f"warning: intercept.ca_certificate: {words}"] if warned else [])


def test_an_authority_without_constraints(tmp_path: Path, capsys: Printed) -> None:
    """It may sign for every host there is: that is allowed, and said."""
    free = signed(signed())
    (warning,) = authority_warnings(tmp_path, capsys, free.pem, free.key_pem)
    assert warning.startswith("warning: intercept.ca_certificate: it has no name constraints: ")
    assert "`llmproxy ca new`" in warning


def test_an_authority_that_has_expired_is_a_problem(tmp_path: Path, capsys: Printed) -> None:
    """The check judges by the time of now, as the start does."""
    made = OpenAuthority(tmp_path, "inference.local", now=time.time() - 9 * 86400, days=7)
    (tmp_path / "checked.toml").write_text(f"{toml({})}\n{made.config()}")
    assert main(["check", str(tmp_path / "checked.toml")]) == 1
    (problem,) = capsys.readouterr().err.splitlines()
    assert problem.startswith("intercept.ca_certificate: expected a certificate that has not exp")


# --- interceptions and tunnels --------------------------------------------------------------------


def sandbox_warnings(
    folder: Path,
    printed: Printed,
    *hosts: str,
    routes: Sequence[str] | None,
    tunnel: str = "",
) -> list[str]:
    """Return the warnings to a file that intercepts ``hosts``, with a route for others."""
    for_hosts: dict[str, str | None] = {}
    if routes is not None:
        for_hosts["routes[0].hosts"] = json.dumps(routes)
    made = OpenAuthority(folder, *hosts)
    path = folder / "checked.toml"
    path.write_text(f"{toml(for_hosts)}\n{made.config()}\n[tunnel]\n{tunnel}\n")
    assert main(["check", str(path)]) == 0
    return [line.removeprefix("warning: ") for line in printed.readouterr().err.splitlines()]


@pytest.mark.parametrize(
    ("hosts", "routes", "lost"),
    [
        (["a.example", "b.example"], ["a.example"], ["b.example"]),
        (["a.example"], ["a.exampel"], ["a.example"]),
        (["*.a.example"], ["b.example"], ["*.a.example"]),
        (["*.a.example"], ["a.example"], ["*.a.example"]),
        (["*.a.example"], ["x.y.a.example"], []),
        (["a.example"], ["b.example", "a.example"], []),
        (["a.example", "*.b.example"], None, []),
    ],
)
def test_an_intercepted_host_without_a_route(
    hosts: list[str],
    routes: list[str] | None,
    lost: list[str],
    tmp_path: Path,
    capsys: Printed,
) -> None:
    """Each request to it would get a 404; a route that is kept to no host serves all of them."""
    found = sandbox_warnings(tmp_path, capsys, *hosts, routes=routes)
    assert found == [
        f'intercept.hosts: every request to "{host}" gets a 404: no route has it in `hosts`, and '
        "none is without `hosts`"
        for host in lost
    ]


@pytest.mark.parametrize(
    ("allow", "dead"),
    [
        ("a.example:443", True),
        ("A.example:*", True),
        ("*.b.example:443", True),
        ("*.c.b.example:443", True),
        ("c.b.example:22", True),
        ("*.a.example:443", False),
        ("b.example:443", False),
        ("*.example:443", False),
        ("other.example:443", False),
    ],
)
def test_a_tunnel_that_is_intercepted_instead(
    allow: str, dead: bool, tmp_path: Path, capsys: Printed
) -> None:
    """No tunnel leads to a host of both lists; a wildcard that has other hosts, too, is usual."""
    hosts = ("a.example", "*.b.example")
    found = sandbox_warnings(tmp_path, capsys, *hosts, routes=None, tunnel=f'allow = ["{allow}"]')
    words = f'tunnel.allow: no tunnel leads to "{allow.lower()}": `intercept.hosts` has it, too'
    assert found == ([words] if dead else [])


# --- lists of models ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("key", "names", "is_empty"),
    [
        ("routes[0].models", '["gpt-*", "-"]', True),
        ("routes[0].models", '["gpt-*", "gpt-4o"]', False),
        ("clients.c.models", '["gpt-*"]', True),
        ("clients.c.models", '["gpt-4o"]', False),
        ("routes[0].override", '{ p = { model = "gpt-4o" } }', False),
    ],
)
def test_a_list_of_models_without_models(
    key: str, names: str, is_empty: bool, tmp_path: Path, capsys: Printed
) -> None:
    """A pattern cannot be listed; whoever chooses from the list could choose nothing."""
    changes = {"routes[0].models_list": '"configured"', "clients.c.keys": KEYS_LINE, key: names}
    found = warnings_of(tmp_path, capsys, {**changes})
    assert [one.partition(":")[0] for one in found] == ["routes[0].models_list"] * is_empty


# --- keys that expire -----------------------------------------------------------------------------


def test_keys_that_have_expired_or_will_soon(tmp_path: Path, capsys: Printed) -> None:
    """Whoever checks the file has two weeks to make another key."""
    now = int(time.time())
    ends = {-5: "has expired", 13 * 86400: "will expire", 15 * 86400: ""}
    keys = [
        f'{{ hash = "sha256:{at:064}", expires = "{show_instant(now + s)}" }}'
        for at, s in enumerate(ends)
    ]
    found = warnings_of(tmp_path, capsys, {"clients.c.keys": f"[{', '.join(keys)}]"})
    assert found == [
        f"clients.c.keys[{at}]: the key {words}, at {show_instant(now + s)}"
        for at, (s, words) in enumerate(ends.items())
        if words
    ]


# --- commands that print credentials --------------------------------------------------------------


def command(path: Path) -> dict[str, str | None]:
    """Return the changes by which a program prints the provider's credential."""
    return {"providers.p.credential": f'{{ command = ["{path}"] }}'}


def test_a_program_that_is_missing_or_may_not_be_run(tmp_path: Path, capsys: Printed) -> None:
    """The daemon would start, and have no credential."""
    path = tmp_path / "token"
    (warning,) = warnings_of(tmp_path, capsys, command(path))
    key = "providers.p.credential.command"
    assert warning == f"{key}: {path} is no file: requests to this provider get a 503"
    path.write_text("")
    (warning,) = warnings_of(tmp_path, capsys, command(path))
    assert warning == f"{key}: the user of this check may not run {path}: the daemon's user must"


def test_a_command_is_run_only_if_that_is_asked_for(tmp_path: Path, capsys: Printed) -> None:
    """It may change something elsewhere, or ask somebody; what it prints is shown nowhere."""
    path = script(tmp_path, COUNTED + '[ "$n" = 1 ] && echo tok-SECRET')
    assert warnings_of(tmp_path, capsys, command(path)) == []
    assert runs(tmp_path) == 0
    checked = str(tmp_path / "checked.toml")
    for count, failed in ((1, ""), (2, "the command failed: it ended with exit status 1")):
        assert main(["check", "--run-commands", checked]) == 0
        captured = capsys.readouterr()
        assert runs(tmp_path) == count
        assert failed in captured.err
        assert bool(failed) is bool(captured.err)
        assert "SECRET" not in captured.out + captured.err


# --- where calls would go -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("dialect", "url", "asked", "sent"),
    [
        ("openai", "https://a.example/v1", "/a/v1/chat/completions", "/v1/v1/chat/completions"),
        ("openai", "https://a.example/b/v1/", "/a/v1/chat", "/b/v1/v1/chat/completions"),
        ("anthropic", "https://a.example/v1", "/a/v1/messages", "/v1/v1/messages"),
        ("ollama", "https://a.example/api", "/a/api/chat", "/api/api/chat"),
        (
            "gemini",
            "https://a.example/v1beta",
            "/a/v1beta/models/NAME:generateContent",
            "/v1beta/v1beta/models/NAME:generateContent",
        ),
        ("ollama", "https://a.example/v1", "/a/v1/chat/completions", "/v1/v1/chat/completions"),
    ],
)
def test_a_url_that_ends_with_what_sdks_begin_with(
    dialect: str, url: str, asked: str, sent: str, tmp_path: Path, capsys: Printed
) -> None:
    """Every call of an SDK's would go to a path that no provider has: it is shown."""
    changes = {"providers.p.url": f'"{url}"', "providers.p.dialect": f'"{dialect}"'}
    (warning,) = warnings_of(tmp_path, capsys, {**changes})
    assert warning.startswith("providers.p.url: SDKs put /")
    assert f"a call to {asked}" in warning
    assert f"would go to https://a.example{sent}" in warning
    assert f'write "{url.rpartition("/v1")[0] or url.rpartition("/api")[0]}"' in warning


@pytest.mark.parametrize(
    "changes",
    [
        {"providers.p.url": '"https://a.example"'},
        {"providers.p.url": '"https://a.example/v1"', "routes[0].path": '"/v1"'},
        {"providers.p.url": '"https://a.example/v1"', "routes[0].path": '"/x/v1"'},
        {"providers.p.url": '"https://a.example/v1/x"'},
        {"providers.p.url": '"https://a.example/v1"', "providers.p.dialect": '"raw"'},
        {"providers.p.url": '"https://a.example/api"'},
    ],
)
def test_urls_that_are_right(
    changes: dict[str, str | None], tmp_path: Path, capsys: Printed
) -> None:
    """The route cuts the segment off that the URL puts back, or the URL does not end with it."""
    assert warnings_of(tmp_path, capsys, changes) == []


def test_a_kept_path_may_double_it_too(tmp_path: Path, capsys: Printed) -> None:
    """Where the route's own path is not cut off, it is part of what is sent."""
    changes: dict[str, str | None] = {
        "providers.p.url": '"https://a.example/v1"',
        "routes[0].path": '"/v1"',
        "routes[0].strip": "false",
    }
    (warning,) = warnings_of(tmp_path, capsys, changes)
    assert "would go to https://a.example/v1/v1/chat/completions" in warning


# --- what can never work, or is not safe ----------------------------------------------------------


@pytest.mark.parametrize(
    ("first", "second", "shadowed"),
    [
        ({}, {}, True),
        ({"models": '["gpt-*"]'}, {"models": '["gpt-4*", "gpt-x"]'}, True),
        ({"models": '["*"]'}, {}, True),
        ({"models": '["a", "-"]'}, {"models": '["-"]'}, True),
        ({"hosts": '["a.example", "b.example"]'}, {"hosts": '["b.example"]'}, True),
        ({"models": '["gpt-4*"]'}, {"models": '["gpt-*"]'}, False),
        ({"models": '["gpt-4"]'}, {"models": '["*-4"]'}, False),
        ({"models": '["a*"]'}, {"models": '["-"]'}, False),
        ({"models": '["a*"]'}, {}, False),
        ({}, {"models": '["a*"]'}, False),
        ({"hosts": '["a.example"]'}, {}, False),
        ({"hosts": '["a.example"]'}, {"hosts": '["b.example"]'}, False),
        ({"path": '"/b"'}, {}, False),
        ({"path": '"/"'}, {}, False),
    ],
)
def test_a_route_that_can_never_match(
    first: dict[str, str],
    second: dict[str, str],
    shadowed: bool,
    tmp_path: Path,
    capsys: Printed,
) -> None:
    """A route before it takes all that it would take; what may match once is left alone."""
    changes: dict[str, str | None] = {
        "routes[1].path": '"/a"',
        "routes[1].name": '"second"',
        "routes[1].providers": '["p"]',
        **{f"routes[0].{key}": value for key, value in first.items()},
        **{f"routes[1].{key}": value for key, value in second.items()},
    }
    words = "routes[1]: no request comes here: routes[0] takes all that this route would take"
    assert warnings_of(tmp_path, capsys, changes) == ([words] if shadowed else [])


@pytest.mark.parametrize(
    ("url", "warned"),
    [
        ("http://a.example", True),
        ("http://10.0.0.1:8000", True),
        ("https://a.example", False),
        ("http://localhost:8000", False),
        ("http://127.0.0.2", False),
        ("http://[::1]:1", False),
    ],
)
def test_a_credential_in_the_clear(
    url: str, warned: bool, directory: Path, tmp_path: Path, capsys: Printed
) -> None:
    """Whoever is on the way to another machine can read it."""
    changes = with_credential(directory, **{"providers.p.url": f'"{url}"'})
    found = warnings_of(tmp_path, capsys, {**changes})
    passing = {"providers.p.url": f'"{url}"', "providers.p.pass_credential": "true"}
    assert len(found) == warned
    assert all("providers.p.url: " in one and "without TLS" in one for one in found)
    assert len(warnings_of(tmp_path, capsys, {**passing})) == warned
    assert warnings_of(tmp_path, capsys, {"providers.p.url": f'"{url}"'}) == []


@pytest.mark.parametrize("mode", [0o644, 0o666, 0o602])
def test_a_file_that_everybody_may_write(mode: int, tmp_path: Path, capsys: Printed) -> None:
    """Whoever may write the file decides where the credentials go."""
    path = tmp_path / "a.toml"
    path.write_text(toml({}))
    path.chmod(mode)
    assert main(["check", str(path)]) == 0
    warning = f"warning: {path}: everybody on this machine may write this file (chmod o-w)\n"
    assert capsys.readouterr().err == (warning if mode & 0o002 else "")


@pytest.mark.parametrize("key", ["jsonl", "ledger"])
def test_a_folder_for_records_that_is_not_there(key: str, tmp_path: Path, capsys: Printed) -> None:
    """The start would fail, unless systemd makes the folder, as the units have it."""
    folder = tmp_path / "no" / "folder"
    changes: dict[str, str | None] = {f"trace.{key}": f'"{folder}/records"'}
    (warning,) = warnings_of(tmp_path, capsys, changes)
    assert warning.startswith(f"trace.{key}: {folder} is no folder: the start fails")
    assert "LogsDirectory" in warning
    folder.mkdir(parents=True)
    assert warnings_of(tmp_path, capsys, changes) == []
    (folder / "records").mkdir()
    (warning,) = warnings_of(tmp_path, capsys, changes)
    assert warning.startswith(f"trace.{key}: {folder}/records is no file")


@pytest.fixture
def as_somebody() -> Iterator[Path]:
    """A folder whose one file everybody may write, while the test is not root's."""
    with TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "closed").mkdir()
        (folder / "checked.toml").touch()
        (folder / "checked.toml").chmod(0o666)
        for one in (folder, folder / "closed"):
            one.chmod(0o555)
        before = os.geteuid()
        if before == 0:
            os.seteuid(65534)
        yield folder
        os.seteuid(before)
        folder.chmod(0o700)


def test_a_folder_for_records_that_cannot_be_written(as_somebody: Path, capsys: Printed) -> None:
    """The check knows only what its own user may do, and says so."""
    changes: dict[str, str | None] = {"trace.jsonl": f'"{as_somebody}/closed/records"'}
    _, warning = warnings_of(as_somebody, capsys, changes)
    assert warning.startswith("trace.jsonl: the user of this check may not write")


@pytest.mark.parametrize("key", ["proxy.listen", "admin.listen", "admin.metrics_listen"])
def test_a_folder_for_a_unix_socket_that_is_not_there(
    key: str, tmp_path: Path, capsys: Printed
) -> None:
    """It is as with records: systemd may make it; other endpoints need no folder."""
    folder = tmp_path / "run: here"
    quoted = str(folder).replace(":", "\\\\:")
    endpoint = f'"unix:{quoted}/socket:mode=600"'
    changes: dict[str, str | None] = {
        key: f'["tcp:1", {endpoint}]' if key == "proxy.listen" else endpoint
    }
    (warning,) = warnings_of(tmp_path, capsys, changes)
    assert warning.startswith(f"{key}: {folder} is no folder: the start fails, unless systemd")
    folder.mkdir()
    assert warnings_of(tmp_path, capsys, changes) == []


# --- credentials ----------------------------------------------------------------------------------


def test_credentials_that_systemd_hands_over(
    directory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Printed
) -> None:
    """By hand the folder is named; without it the check says how."""
    monkeypatch.delenv("CREDENTIALS_DIRECTORY", raising=False)
    path = tmp_path / "a.toml"
    path.write_text(toml({"providers.p.credential": '"key"', "clients.c.keys": KEYS_LINE}))
    assert main(["check", str(path)]) == 1
    (problem,) = capsys.readouterr().err.splitlines()
    assert "llmproxy check --credentials DIR" in problem
    assert main(["check", str(path), "--credentials", str(directory)]) == 0
    monkeypatch.setenv("CREDENTIALS_DIRECTORY", str(tmp_path / "none"))
    assert main(["check", str(path), "--credentials", str(directory)]) == 0


# --- limits ---------------------------------------------------------------------------------------


def test_a_limit_for_a_day_without_a_ledger(tmp_path: Path, capsys: Printed) -> None:
    """A restart would give the client its budget once more."""
    changes: dict[str, str | None] = {
        "proxy.anonymous": None,
        "clients.c": f"{{ keys = {KEYS_LINE}, tokens_per_day = 5 }}",
        "clients.d": f'{{ keys = ["sha256:{"cd" * 32}"], tokens_per_minute = 5 }}',
    }
    (warning,) = warnings_of(tmp_path, capsys, changes)
    assert warning.startswith("clients.c.tokens_per_day: without `ledger` in [trace], a restart")
    changes["trace.ledger"] = f'"{tmp_path}/ledger"'
    assert warnings_of(tmp_path, capsys, changes) == []
    changes["trace.keep"] = '"23h"'
    (warning,) = warnings_of(tmp_path, capsys, changes)
    assert warning.startswith('clients.c.tokens_per_day: with `keep` shorter than "1d" in [trace]')
    changes["trace.keep"] = '"off"'
    assert warnings_of(tmp_path, capsys, changes) == []


def test_a_server_keeps_the_tokens_of_a_day_too(tmp_path: Path, capsys: Printed) -> None:
    """Then there is nothing to warn of."""
    pytest.importorskip("psycopg")
    changes: dict[str, str | None] = {
        "proxy.anonymous": None,
        "clients.c": f"{{ keys = {KEYS_LINE}, tokens_per_day = 5 }}",
        "trace.postgres": '"postgresql://u@h/d"',
    }
    assert warnings_of(tmp_path, capsys, changes) == []


@pytest.mark.parametrize("as_json", [False, True])
@pytest.mark.parametrize(
    ("url", "is_there", "words"),
    [
        ("postgresql://u@h/d", False, "pip install 'llmproxy[postgres]'"),
        ("postgresql://u@h/d?sslmod=x", True, 'invalid URI query parameter: "sslmod"'),
    ],
)
def test_a_server_that_the_start_would_refuse(
    tmp_path: Path,
    capsys: Printed,
    monkeypatch: pytest.MonkeyPatch,
    url: str,
    is_there: bool,
    words: str,
    as_json: bool,
) -> None:
    """Without psycopg the check says what to install; with it, libpq reads the URL."""
    if is_there:
        pytest.importorskip("psycopg")
    else:
        for name in [one for one in sys.modules if one.startswith("llmproxy.record.postgres")]:
            monkeypatch.delitem(sys.modules, name)
        monkeypatch.delattr("llmproxy.record.postgres_ledger", raising=False)
        monkeypatch.setitem(sys.modules, "psycopg", None)
    path = tmp_path / "c.toml"
    path.write_text(toml({"trace.postgres": json.dumps(url)}))
    assert main(["check", str(path), *(["--json"] if as_json else [])]) == 1
    captured = capsys.readouterr()
    said = json.loads(captured.out)["problems"] if as_json else captured.err.splitlines()
    (problem,) = said
    assert problem.startswith("trace.postgres: ")
    assert words in problem


def test_limits_beside_anonymous_callers(tmp_path: Path, capsys: Printed) -> None:
    """Who is refused for a limit of its own can call without a key."""
    keys = f"keys = {KEYS_LINE}"
    for limit, warned in (("", False), (", max_streams = 5", True)):
        changes: dict[str, str | None] = {"clients.c": f"{{ {keys}{limit} }}"}
        found = warnings_of(tmp_path, capsys, changes)
        assert [one.partition(":")[0] for one in found] == ["proxy.anonymous"] * warned
        changes["proxy.anonymous"] = "false"
        assert warnings_of(tmp_path, capsys, changes) == []


# --- parent proxies -------------------------------------------------------------------------------

PARENT = '"http://proxy.corp.example:3128"'


@pytest.mark.parametrize(
    ("url", "words"),
    [
        ("https://a.example", None),
        ("https://a.example:8443", "asks for a tunnel to port 8443, and many proxies allow 443"),
        ("http://a.example", "asks for a tunnel to port 80, and many proxies allow 443"),
        ("http://127.0.0.1:11434", "takes 127.0.0.1 for its own machine: name it in"),
        ("https://localhost", "takes localhost for its own machine: name it in"),
    ],
)
def test_a_way_through_a_parent_that_may_be_closed_is_warned_of(
    url: str, words: str | None, tmp_path: Path, capsys: Printed
) -> None:
    """By the port of a tunnel, and by a host that is another one there."""
    changes: dict[str, str | None] = {
        "providers.p.url": f'"{url}"',
        "proxy.parent_proxy": PARENT,
        "proxy.no_parent_proxy": "[]",
    }
    found = warnings_of(tmp_path, capsys, changes)
    assert len(found) == (words is not None)
    if words is not None:
        assert found[0].startswith("providers.p.url: ")
        assert words in found[0]
    assert warnings_of(tmp_path, capsys, {**changes, "providers.p.parent_proxy": '"none"'}) == []


@pytest.mark.parametrize("name", ["HTTPS_PROXY", "https_proxy", "ALL_PROXY", "all_proxy"])
def test_a_variable_that_is_not_read_is_warned_of(
    name: str, tmp_path: Path, capsys: Printed, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not where the file says how providers are reached; the value may hold a password."""
    monkeypatch.setenv(name, "http://team:s3cret@proxy.corp.example:3128")
    changes: dict[str, str | None] = {"providers.p.url": '"https://a.example"'}
    (warning,) = warnings_of(tmp_path, capsys, changes)
    assert warning == f"${name} is set, and is not read: providers are reached through what " + (
        "`parent_proxy` says, directly without it"
    )
    assert warnings_of(tmp_path, capsys, {**changes, "proxy.parent_proxy": PARENT}) == []
    assert warnings_of(tmp_path, capsys, {**changes, "providers.p.parent_proxy": '"none"'}) == []
