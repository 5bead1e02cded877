"""Credential files: from a name in the configuration to a :class:`Secret`.

The directory is ``[credentials] directory``, or else what systemd put into
``$CREDENTIALS_DIRECTORY``.  It must be closed to others, unless the operator says that it is not.
A problem quotes a file's name only if that is written as people write names: if an operator writes
a key where a file's name belongs, no log shows the key.
"""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Callable, Mapping
from typing import TypeVar

from llmproxy.config.values import Wrong, show

T = TypeVar("T")

ENVIRONMENT = "CREDENTIALS_DIRECTORY"

_KEY = "credentials.directory"
_LARGEST_BYTES = 64 * 1024
_TOO_LARGE = "a credential file of at most 64KiB"

LONGEST_CREDENTIAL = _LARGEST_BYTES + len(b"\r\n")
"""Bytes of the longest credential, with its line end."""
_NAME = re.compile(
    r"(?!(?i:sk|pk|xai|gsk|hf|ghp|pplx|r8|llmp|nvapi|eyj|aiza|akia|bearer)(?![a-z]))"
    r"(?:[a-z]{1,20}|[A-Z]{1,20}|[A-Z][a-z]{1,19})?[0-9]{0,4}"
    r"(?:[._-](?:[a-z]{1,20}|[A-Z]{1,20}|[A-Z][a-z]{1,19})?[0-9]{0,4})*"
)
"""A file's name: short words and numbers, and not as keys of well-known providers begin."""

_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f]")
_VALUE = re.compile(rb"[\x21-\x7e](?:[\x20-\x7e]*[\x21-\x7e])?")


class Secret:
    """A credential's value, which ``repr``, ``str`` and the encoders of msgspec do not give away.

    It is no struct on purpose: msgspec would encode a struct's fields, and refuses this class.
    """

    __slots__ = ("_value",)

    def __init__(self, value: str) -> None:
        self._value = value

    def reveal(self) -> str:
        """Return the value itself, to be put on a request and nowhere else."""
        return self._value

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Secret) and other._value == self._value

    def __hash__(self) -> int:
        return hash(self._value)

    def __repr__(self) -> str:
        return "***"


class Credentials:
    """The one directory that credentials are read from.

    Args:
        directory: what ``[credentials] directory`` says, or ``None``.
        environ: where ``$CREDENTIALS_DIRECTORY`` may stand.
        problems: gathers what is wrong with the directory itself, once.
        is_named: the file has that key, so no other place is looked at.
        open_to_others: others may read the directory.
    """

    def __init__(
        self,
        directory: str | None,
        environ: Mapping[str, str],
        problems: list[str],
        *,
        is_named: bool,
        open_to_others: bool,
    ) -> None:
        self._environ = environ
        self._problems = problems
        self._open_to_others = open_to_others
        self._usable: str | None = None
        self._looked = is_named
        if directory is not None:
            self._usable = self._fit(_KEY, directory, check_group=True)

    def read(self, value: object) -> Secret | None:
        """Read the credential file called ``value``; ``None`` where there is no usable directory.

        Raises:
            Wrong: the name is not a file's bare name, or the file is not a credential.
        """
        content = self._read(value)
        return None if content is None else Secret(credential_value(content))

    def user_and_password(self, value: object) -> Secret | None:
        """Do as :meth:`read` for a file that holds ``NAME:PASSWORD`` in UTF-8 (RFC 7617)."""
        content = self._read(value)
        return None if content is None else Secret(_user_and_password(content))

    def pem(self, reader: Callable[[bytes], T]) -> Callable[[object], T | None]:
        """Return a reader of a credential file in PEM, whose content ``reader`` checks."""

        def read(value: object) -> T | None:
            content = self._read(value)
            if content is not None and len(content) > _LARGEST_BYTES:
                raise Wrong(_TOO_LARGE, hidden=True)
            return None if content is None else reader(content)

        return read

    def _read(self, value: object) -> bytes | None:
        if not isinstance(value, str) or not _is_bare_name(value):
            raise Wrong(
                'the bare name of a file in the credentials directory (no "/")', hidden=True
            )
        if not self._looked:
            self._looked = True
            self._usable = self._from_environment()
        if self._usable is None:
            if not _NAME.fullmatch(value):
                raise _no_key("the credentials directory")
            return None
        return _content(self._usable, value)

    def _from_environment(self) -> str | None:
        directory = self._environ.get(ENVIRONMENT)
        if not directory:
            self._problems.append(
                f"{_KEY}: expected a directory, as a credential is named, "
                f"but it is missing, and ${ENVIRONMENT} is not set either (systemd sets it for "
                "its units; by hand: llmproxy check --credentials DIR)"
            )
            return None
        # systemd may open it to the service's user by an ACL, whose mask then shows as the group's
        # permissions: only what others may do can be told from the mode.
        return self._fit(f"${ENVIRONMENT}", directory, check_group=False)

    def _fit(self, key: str, directory: str, *, check_group: bool) -> str | None:
        """Return ``directory``, or report what makes it unfit."""
        words = _why_unfit(directory, check_group=check_group, open_to_others=self._open_to_others)
        if words is None:
            return directory
        self._problems.append(f"{key}: expected {words}, got {show(directory)}")
        return None


def _why_unfit(directory: str, *, check_group: bool, open_to_others: bool) -> str | None:
    try:
        found = os.stat(directory)
    except OSError as error:
        return f"a directory that can be read ({error.strerror})"
    if not stat.S_ISDIR(found.st_mode):
        return "a directory"
    if open_to_others:
        if found.st_mode & stat.S_IWOTH and not found.st_mode & stat.S_ISVTX:
            return "a directory that others may not write (chmod o-w)"
        return None
    if found.st_mode & 0o007:
        return (
            "a directory closed to others (chmod o-rwx; or credentials.open_to_others = true, "
            "if a container's platform mounts it so)"
        )
    own = {*os.getgroups(), os.getegid()}
    if check_group and found.st_mode & 0o070 and found.st_gid not in own:
        return "a directory closed to a group that is not this process's own (chmod g-rwx)"
    return None


def _is_bare_name(value: str) -> bool:
    return bool(value) and value.isprintable() and "/" not in value and value not in (".", "..")


def _content(directory: str, name: str) -> bytes:
    """Return what the file holds, up to one byte more than a credential and its line end."""
    path = os.path.join(directory, name)
    shown = f" {show(name)}" if _NAME.fullmatch(name) else ""
    try:
        if not stat.S_ISREG(os.stat(path).st_mode):
            raise Wrong(f"a regular file{shown} in {directory}", hidden=True)
        with open(path, "rb") as file:
            return file.read(LONGEST_CREDENTIAL + 1)
    except OSError as error:
        if not shown:
            raise _no_key(directory) from None
        raise Wrong(
            f"a file{shown} in {directory} that can be read ({error.strerror})", hidden=True
        ) from None


def _no_key(directory: str) -> Wrong:
    """Return what is wrong with what looks like a key in the place of a file's name."""
    return Wrong(
        "the name of a credential file, and no key: write the key into a file of its own "
        f"in {directory}, and the file's name here",
        hidden=True,
    )


def credential_value(content: bytes, what: str = "a credential file") -> str:
    """Return the credential that a file holds, or a command prints, without its line end.

    Args:
        what: holds it, as a problem calls that.

    Raises:
        Wrong: it is not one line of visible ASCII, or too long.
    """
    value = _line(content, what)
    if not _VALUE.fullmatch(value):
        raise Wrong(
            f"{what} of one line of visible ASCII, without white space at its beginning or end",
            hidden=True,
        )
    return value.decode("ascii")


def _line(content: bytes, what: str = "a credential file") -> bytes:
    """Return the content without its line end; it may hold others."""
    value = content.removesuffix(b"\n")
    if value != content:
        value = value.removesuffix(b"\r")
    if not value:
        raise Wrong(f"{what} that is not empty", hidden=True)
    if len(value) > _LARGEST_BYTES:
        raise Wrong(f"{what} of at most 64KiB", hidden=True)
    return value


def _user_and_password(content: bytes) -> str:
    try:
        value = _line(content).decode("utf-8")
    except UnicodeDecodeError:
        raise Wrong("a credential file in UTF-8", hidden=True) from None
    if _CONTROL.search(value):
        raise Wrong("a credential file of one line, without control characters", hidden=True)
    if ":" not in value:
        raise Wrong("a credential file with NAME:PASSWORD", hidden=True)
    return value
