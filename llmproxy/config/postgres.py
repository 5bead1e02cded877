"""Where a PostgreSQL server is: libpq's own URL or connection string, without a password.

What may stand in it is libpq's to say, when it connects.  A password is refused here, wherever it
stands, for this value is shown.
"""

from __future__ import annotations

import re
from urllib.parse import unquote

from llmproxy.config.values import Wrong

_SCHEME = re.compile(r"postgres(?:ql)?://")
_SECRETS = frozenset({"password", "sslpassword", "oauth_client_secret", "scram_client_key"})
_PAIR = re.compile(
    r"\s*([A-Za-z_]+)\s*=\s*(?:'(?:[^'\\]|\\.)*'|(?:[^\s'\\]|\\.)*)(?=\s|$)", re.DOTALL
)
"""``NAME=VALUE`` or ``NAME='VALUE'``; a backslash quotes the character behind it."""

_A_URL = 'a URL such as "postgresql://USER@HOST/DATABASE"'


def postgres_url(value: object) -> str:
    """Read libpq's URL or connection string.

    Raises:
        Wrong: it is neither, or has a password; nothing of it is shown.
    """
    if not isinstance(value, str):
        raise Wrong(_A_URL)
    if not value.strip() or "\0" in value:
        raise Wrong(_A_URL, hidden=True)
    names = _of_url(value) if _SCHEME.match(value) else _of_pairs(value)
    if _SECRETS.intersection(names):
        raise Wrong(
            "a URL without a password: put the password into a credential file, and that file's "
            "name into `postgres_credential`",
            hidden=True,
        )
    return value


def _of_url(value: str) -> list[str]:
    """Return the names of a URL's parameters, and ``password`` if a user has one."""
    place, _, query = _SCHEME.sub("", value, count=1).partition("?")
    user, at, _ = place.rpartition("@")
    names = [unquote(pair.partition("=")[0]) for pair in query.split("&")]
    # What stands behind a colon is a password also where libpq reads it as a port: "u:p/w@host".
    return [*names, "password"] if (at and ":" in user) or "@" in query else names


def _of_pairs(value: str) -> list[str]:
    """Return the names in a connection string, ``NAME=VALUE NAME='VALUE'``."""
    names, at = list[str](), 0
    text = value.rstrip()
    while at < len(text):
        found = _PAIR.match(text, at)
        if found is None:
            raise Wrong(f'{_A_URL}, or "host=HOST dbname=DATABASE"', hidden=True)
        names.append(found[1])
        at = found.end()
    return names
