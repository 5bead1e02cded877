"""A credential that a command prints, in the file and in the redacted view."""

from __future__ import annotations

from llmproxy.config import CredentialCommand
from llmproxy.http1.headers import ACCOUNT_FIELDS
from tests.support.configs import accepted, problems_of

COMMAND = {"providers.p.credential": '{ command = ["/bin/token", "of a", ""], ttl = "90s" }'}


def test_a_command_is_kept_word_by_word() -> None:
    """It is not run, and need not be there, when the file is read."""
    provider = accepted(COMMAND).providers["p"]
    assert provider.credential == CredentialCommand(command=("/bin/token", "of a", ""), ttl=90.0)
    assert provider.drop_headers[-len(ACCOUNT_FIELDS) :] == ACCOUNT_FIELDS


def test_five_minutes_are_the_default_time() -> None:
    """That is how long an output is good without ``ttl``."""
    config = accepted({"providers.p.credential": '{ command = ["/bin/token"] }'})
    assert config.providers["p"].credential == CredentialCommand(command=("/bin/token",))
    assert CredentialCommand(command=()).ttl == 300.0


def test_a_command_cannot_stand_beside_pass_credential() -> None:
    """Only one key can be sent, wherever it is from."""
    problems = problems_of({**COMMAND, "providers.p.pass_credential": "true"})
    assert "either this or `credential`" in problems[0]


def test_the_redacted_view_shows_the_program_alone() -> None:
    """Somebody may have put a secret into the arguments."""
    shown = accepted(COMMAND).redacted()["providers"]
    assert isinstance(shown, dict)
    assert shown["p"]["credential"] == {"command": ["/bin/token"], "ttl": "90s"}
