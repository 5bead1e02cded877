"""Credential files: what is one, where they are looked for, and that nothing secret is shown."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any

import msgspec
import pytest

from llmproxy.config import Secret
from llmproxy.http1.headers import ACCOUNT_FIELDS, ROUTING_FIELDS
from tests.support.configs import (
    DIGEST,
    KEYS_LINE,
    SECRET,
    accepted,
    problems_of,
    with_credential,
)


@pytest.mark.parametrize("end", ["", "\n", "\r\n"])
def test_one_line_end_is_cut(directory: Path, end: str) -> None:
    """A credential is the file's content without one trailing line end."""
    (directory / "key").write_bytes(b"a b" + end.encode())
    credential = accepted(with_credential(directory)).providers["p"].credential
    assert credential == Secret("a b")


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "not empty"),
        (b"\n", "not empty"),
        (b"\r\n", "not empty"),
        (b"a\n\n", "one line"),
        (b"a\r", "one line"),
        (b" a", "white space"),
        (b"a \n", "white space"),
        (b"a\tb", "visible ASCII"),
        (b"a\0b", "visible ASCII"),
        ("ä".encode(), "visible ASCII"),
        (b"a" * (64 * 1024 + 1), "at most 64KiB"),
    ],
)
def test_content_of_a_credential_file(directory: Path, content: bytes, words: str) -> None:
    """What cannot be a header's value is no credential, and is not shown."""
    (directory / "key").write_bytes(content)
    (problem,) = problems_of(with_credential(directory))
    assert problem.startswith("providers.p.credential: expected a credential file")
    assert words in problem
    assert "got" not in problem


def test_the_largest_credential(directory: Path) -> None:
    """A credential of 64 KiB with its line end is just small enough."""
    (directory / "key").write_bytes(b"a" * 64 * 1024 + b"\r\n")
    accepted(with_credential(directory))


@pytest.mark.parametrize(
    ("name", "words"),
    [
        *((name, "the bare name of a file") for name in ("../key", "/key", "a/b", "..", ".", "")),
        ("\0", "the bare name of a file"),
        (1, "the bare name of a file"),
        (SECRET, "the name of a credential file, and no key"),
        (".hidden", "a regular file"),
        ("pipe", "a regular file"),
    ],
)
def test_a_name_of_no_credential_file(directory: Path, name: str | int, words: str) -> None:
    """No other file is read, and the problem hides the name: it may be the key itself.

    A pipe would never end.
    """
    (directory / ".hidden").mkdir()
    os.mkfifo(directory / "pipe")
    (problem,) = problems_of(
        with_credential(directory, **{"providers.p.credential": json.dumps(name)})
    )
    assert problem.startswith("providers.p.credential: expected ")
    assert words in problem
    assert "got" not in problem
    assert SECRET not in problem


@pytest.mark.parametrize(
    "name", ["missing", "openai-key", "azure_prod.2", "team-a.key.txt", "OPENAI_API_KEY", "gpt4-eu"]
)
def test_a_missing_file_is_named_with_its_directory(directory: Path, name: str) -> None:
    """What looks like a file's name is one: the operator reads which file is looked for, where."""
    changes = with_credential(directory, **{"providers.p.credential": json.dumps(name)})
    assert problems_of(changes) == (
        f'providers.p.credential: expected a file "{name}" in {directory} that can be read '
        "(No such file or directory)",
    )


KEYS = [
    *("sk-abc", "sk-proj-Ab3", "sk_live_a", "llmp_" + "a" * 43, "xai-abcdef", "gsk_abc", "hf_abc"),
    *("AIzaSyA-b", "ghp_abc", "pplx-abc", "r8_abc", "eyJhbGciOi", "AKIAIOSFODNN7EXAMPLE"),
    *("0123456789abcdef0123456789abcdef", "3f2504e0-4f89-11d3-9a0c-0305e82c3301"),
    *("Zm9vYmFyYmF6cXV4", "a1b2c3d4e5", "Bearer abc", "qwertyuiopasdfghjklzxcvbnm"),
]


@pytest.mark.parametrize("key", KEYS)
def test_a_key_in_place_of_a_files_name_is_not_shown(directory: Path, key: str) -> None:
    """The problem says how a credential is given; it shows the directory, and never the value."""
    changes = with_credential(directory, **{"providers.p.credential": json.dumps(key)})
    (problem,) = problems_of(changes)
    assert problem == (
        "providers.p.credential: expected the name of a credential file, and no key: "
        f"write the key into a file of its own in {directory}, and the file's name here"
    )


@pytest.mark.parametrize(
    "name", ["api_key", "key", "apikey", "API_KEY", "api-key", "token", "secret", "password"]
)
@pytest.mark.parametrize("value", [f'"{SECRET}"', '"${OPENAI_API_KEY}"', "{ env = 1 }"])
def test_a_provider_with_a_key_inline(name: str, value: str) -> None:
    """The problem says how a credential is given, and shows nothing of what stood there."""
    assert problems_of({f"providers.p.{name}": value}) == (
        f"providers.p.{name}: unknown key; no secret stands in this file: write the key into a "
        "file of its own in the credentials directory, and here `credential` with the file's name",
    )


def test_a_key_inline_before_there_is_a_directory() -> None:
    """The first thing that a newcomer tries is reported for what it is, too."""
    directory, problem = problems_of({"providers.p.credential": f'"{SECRET}"'})
    assert directory.startswith("credentials.directory: expected a directory")
    assert problem == (
        "providers.p.credential: expected the name of a credential file, and no key: "
        "write the key into a file of its own in the credentials directory, "
        "and the file's name here"
    )


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("openai-key", "no secret stands in this file: each has a file of its own in `directory`"),
        ("directry", 'did you mean "directory"?'),
    ],
)
def test_the_table_of_credentials_holds_none(name: str, words: str) -> None:
    """It says where they are; a slip in that is still taken for one."""
    (problem,) = problems_of({f"credentials.{name}": f'"{SECRET}"'})
    assert problem == f"credentials.{name}: unknown key; {words}"


@pytest.mark.parametrize("name", ["key", "api_key", "token", "secret", "password"])
def test_a_client_with_a_key_inline(name: str) -> None:
    """The problem says how a client's key is given."""
    changes = {f"clients.c.{name}": f'"{SECRET}"', "clients.c.keys": KEYS_LINE}
    (problem,) = problems_of(changes)
    assert problem == (
        f"clients.c.{name}: unknown key; no key stands in this file: "
        "`llmproxy keys new c` makes a key and prints its `keys` line"
    )


def test_credentials_from_systemd(directory: Path) -> None:
    """Without the key, credentials are read from $CREDENTIALS_DIRECTORY."""
    changes = {"providers.p.credential": '"key"'}
    found = accepted(changes, CREDENTIALS_DIRECTORY=str(directory)).providers["p"].credential
    assert found == Secret(SECRET)


def test_no_place_for_credentials() -> None:
    """Where no directory of credentials is named, that is reported once for all providers."""
    changes = {
        "providers.p.credential": '"key"',
        "providers.q": '{ url = "https://q", dialect = "raw", credential = "key" }',
    }
    (problem,) = problems_of(changes)
    assert problem.startswith("credentials.directory: expected a directory")
    assert "$CREDENTIALS_DIRECTORY is not set either" in problem


@pytest.mark.parametrize("mode", [0o701, 0o702, 0o704, 0o755])
@pytest.mark.parametrize("place", ["credentials.directory", "$CREDENTIALS_DIRECTORY"])
def test_a_directory_open_to_others(directory: Path, place: str, mode: int) -> None:
    """A directory that others may enter, read or change is refused once, wherever it is named."""
    directory.chmod(mode)
    changes = {
        "providers.p.credential": '"missing"',
        "providers.q": '{ url = "https://q", dialect = "raw", credential = "missing" }',
    }
    if place.startswith("$"):
        (problem,) = problems_of(changes, CREDENTIALS_DIRECTORY=str(directory))
    else:
        (problem,) = problems_of(with_credential(directory, **changes))
    assert problem.startswith(f"{place}: expected a directory closed to others")
    assert str(directory) in problem


@pytest.mark.parametrize("mode", [0o755, 0o775, 0o1777, 0o705])
def test_a_directory_as_containers_have_it(directory: Path, mode: int) -> None:
    """It belongs to root, everybody may read it, and its files are links, as Kubernetes has it."""
    (directory / "..data").mkdir()
    (directory / "key").rename(directory / "..data" / "key")
    (directory / "key").symlink_to("..data/key")
    directory.chmod(mode)
    changes = {"providers.p.credential": '"key"', "credentials.open_to_others": "true"}
    environ = {"CREDENTIALS_DIRECTORY": str(directory)}
    found = accepted(changes, **environ).providers["p"].credential
    assert found == Secret(SECRET)
    assert accepted(with_credential(directory, **changes)).providers["p"].credential == found
    (problem,) = problems_of({**changes, "credentials.open_to_others": "false"}, **environ)
    assert "credentials.open_to_others = true, if a container" in problem


def test_nobody_may_replace_a_credential(directory: Path) -> None:
    """A directory in which others may rename files is refused in any case."""
    directory.chmod(0o777)
    (problem,) = problems_of(with_credential(directory, **{"credentials.open_to_others": "true"}))
    assert problem.startswith("credentials.directory: expected a directory that others may not")


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("credentials.directory", '"credentials"', "an absolute path"),
        ("credentials.directory", "1", "a non-empty string"),
        ("credentials", '"/etc"', "a table"),
    ],
)
def test_a_directory_with_a_mistake_is_one_problem(key: str, value: str, words: str) -> None:
    """A credential is not asked for in another place, which the operator never named."""
    (problem,) = problems_of({key: value, "providers.p.credential": '"key"'})
    assert problem.startswith(f"{key}: expected {words}")


def test_an_unused_directory_of_systemd_is_not_checked(directory: Path) -> None:
    """Where no provider names a credential, $CREDENTIALS_DIRECTORY may be anything."""
    directory.chmod(0o755)
    accepted({}, CREDENTIALS_DIRECTORY=str(directory))


def test_a_directory_open_to_a_group(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A group may enter only if the process is in it; systemd's own directory is not judged."""
    directory.chmod(0o750)
    group = directory.stat().st_gid
    monkeypatch.setattr(os, "getegid", lambda: group + 1)
    monkeypatch.setattr(os, "getgroups", lambda: [group])
    accepted(with_credential(directory))
    monkeypatch.setattr(os, "getgroups", lambda: [group + 2])
    (problem,) = problems_of(with_credential(directory))
    assert problem.startswith("credentials.directory: expected a directory closed to a group")
    accepted({"providers.p.credential": '"key"'}, CREDENTIALS_DIRECTORY=str(directory))


@pytest.mark.parametrize(("name", "words"), [("missing", "No such file"), ("file", "a directory")])
def test_a_directory_that_is_none(tmp_path: Path, name: str, words: str) -> None:
    """A directory that is named is checked although no provider has a credential."""
    (tmp_path / "file").touch()
    (problem,) = problems_of({"credentials.directory": json.dumps(str(tmp_path / name))})
    assert problem.startswith("credentials.directory: expected a directory")
    assert words in problem


def test_two_credentials(directory: Path) -> None:
    """A provider's own key and the caller's key cannot both be sent."""
    (problem,) = problems_of(with_credential(directory, **{"providers.p.pass_credential": "true"}))
    assert problem.startswith("providers.p.pass_credential: expected either this or `credential`")
    assert accepted({"providers.p.pass_credential": "true"}).providers["p"].pass_credential


def test_one_reader_of_the_query() -> None:
    """A caller's key in the query is the proxy's or the provider's."""
    both = {"providers.p.pass_credential": "true", "providers.p.key_query": "true"}
    (problem,) = problems_of(both)
    assert problem.startswith("providers.p.key_query: expected either this or `pass_credential`")


def test_the_digest_of_nothing_is_no_key() -> None:
    """An empty key field counts as no key, so nothing could fit such a digest."""
    digest = hashlib.sha256(b"").hexdigest()
    (problem,) = problems_of({"clients.c.keys": f'["sha256:{digest}"]'})
    assert problem.startswith("clients.c.keys[0]: expected the digest of a key that is not empty")


def test_a_provider_that_gets_our_credential_gets_no_account_of_callers(directory: Path) -> None:
    """Which headers are dropped follows the credential, unless the provider says it."""

    def dropped(**keys: str) -> tuple[str, ...]:
        return accepted(with_credential(directory, **keys)).providers["p"].drop_headers

    assert accepted({}).providers["p"].drop_headers == ROUTING_FIELDS
    assert dropped() == (*ROUTING_FIELDS, *ACCOUNT_FIELDS)
    assert dropped(**{"providers.p.drop_headers": "[]"}) == ()
    assert dropped(**{"providers.p.drop_headers": '["X-Own"]'}) == ("x-own",)


# --- nothing secret is shown ----------------------------------------------------------------------


def test_nothing_secret_is_shown(directory: Path) -> None:
    """No secret and no digest is in repr, in the redacted form or in what msgspec encodes."""
    config = accepted(with_credential(directory, **{"clients.c.keys": KEYS_LINE}))
    digest = bytes.fromhex(DIGEST)
    redacted = config.redacted()
    for shown in (repr(config), str(config), json.dumps(redacted), f"{config.providers['p']}"):
        assert SECRET not in shown
        assert DIGEST not in shown
        assert repr(digest)[2:-1] not in shown
    assert "credential=***" in repr(config)
    clients: Any = redacted["clients"]
    assert (clients["c"]["keys"], clients["c"]["routes"]) == (1, ["*"])
    with pytest.raises(TypeError, match="Secret"):
        msgspec.json.encode(config)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("clients.c.keys", f'["{SECRET}"]'),
        ("clients.c.keys", f'"{SECRET}"'),
        ("clients.c.keys", f'["sha256:{DIGEST}0"]'),
        ("clients.c.keys", f'["sha256:{DIGEST.upper()}"]'),
        ("clients.c.keys", f'["{DIGEST}"]'),
        ("clients.c", f'"{SECRET}"'),
        ("clients.c.key", f'"{SECRET}"'),
        ("providers.p.credential", f'"{SECRET}"'),
        ("providers.p.credential", f'"Bearer/{SECRET}"'),
        ("providers.p.key", f'"{SECRET}"'),
        ("providers.p.url", f'"https://user:{SECRET}@a"'),
        ("providers.p.url", f'"user:{SECRET}@a"'),
        ("providers.p.url", f'"https://a/?key={SECRET}"'),
        ("providers.p.header", f'"Authorization: {SECRET}"'),
        ("providers.p.format", f'"Bearer {SECRET}"'),
        ("providers.p.headers", f'{{ authorization = "Bearer {SECRET}" }}'),
        ("providers.p.headers", f'{{ x-token = "{SECRET}\\n" }}'),
        ("providers.p.headers", f'"x-token: {SECRET}"'),
        ("credentials.key", f'"{SECRET}"'),
    ],
)
def test_a_secret_in_the_wrong_place_is_not_shown(directory: Path, key: str, value: str) -> None:
    """A key that was written where it does not belong stands in no message."""
    changes: dict[str, str | None] = {
        "credentials.directory": json.dumps(str(directory)),
        key: value,
    }
    shown = "\n".join(problems_of(changes)).lower()
    assert key.split(".", 1)[0] in shown
    assert SECRET not in shown
    assert DIGEST not in shown


def test_the_problem_of_a_wrong_key_names_the_command() -> None:
    """An operator who wrote the key itself reads which command prints its line."""
    (problem,) = problems_of({"clients.team-a.keys": '["llmp_x"]'})
    assert problem.startswith('clients.team-a.keys[0]: expected "sha256:" and 64 lower-case')
    assert "`llmproxy keys new team-a`" in problem
