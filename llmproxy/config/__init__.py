"""The configuration: a TOML file and credential files in, frozen structs out.

This is the door: the structs are imported from here.  A file is read as a whole, and *every*
mistake in it is reported at once, each with the path of its key, what stood there and what is
expected.  ``llmproxy check``, the start and the reload all call :func:`load`.

How it works: ``settings.py`` declares each key once, as the field of a struct: what the key takes,
its default and its meaning.  ``schema.py`` reads a table as it is declared, with the readers of
``readers.py``, ``values.py`` and ``url.py``.  ``sections.py`` holds the rules between the keys of
one section, and this module those of the whole file.  ``credentials.py`` opens credential files,
and ``keypair.py`` knows those of a listener.  ``reference.py`` writes the keys down for the
documentation.  Array items are counted from 0 in a key's path: ``routes[0]`` is the first.

This module may not know who uses a value, and touches no reactor.
"""

from __future__ import annotations

import tomllib
from collections.abc import Iterable, Mapping
from itertools import pairwise

import msgspec

from llmproxy.config.authority import Authority
from llmproxy.config.credentials import Credentials, Secret
from llmproxy.config.keypair import Keypair
from llmproxy.config.parent_proxy import ParentProxy
from llmproxy.config.readers import client_name, instance_name, provider_name
from llmproxy.config.schema import Context, Table
from llmproxy.config.sections import (
    read_client,
    read_intercept,
    read_provider,
    read_proxy,
    read_route,
    read_shared,
    read_trace,
    read_tunnel,
)
from llmproxy.config.settings import (
    ROOT,
    SECTIONS,
    Admin,
    Client,
    ClientKey,
    Config,
    CredentialCommand,
    Intercept,
    Limits,
    Log,
    Override,
    Provider,
    Proxy,
    Route,
    Shared,
    Timeouts,
    Trace,
    Tunnel,
)
from llmproxy.config.tunnel_target import TunnelTarget
from llmproxy.config.url import Url
from llmproxy.config.values import Wrong, show
from llmproxy.config.values import text as any_text
from llmproxy.dialects.dialect import Dialect

__all__ = [
    "Admin",
    "Authority",
    "Client",
    "ClientKey",
    "Config",
    "ConfigError",
    "CredentialCommand",
    "Intercept",
    "Keypair",
    "Limits",
    "Log",
    "Override",
    "ParentProxy",
    "Provider",
    "Proxy",
    "Route",
    "Secret",
    "Shared",
    "Timeouts",
    "Trace",
    "Tunnel",
    "TunnelTarget",
    "Url",
    "ledger_path",
    "ledger_server",
    "load",
    "parse",
]


class ConfigError(Exception):
    """A configuration cannot be used.

    Args:
        problems: everything that is wrong with it, one line each, such as
            ``providers.a.url: expected an http:// or https:// URL, got "ftp://x"``.
    """

    def __init__(self, problems: Iterable[str]) -> None:
        self.problems: tuple[str, ...] = tuple(problems)
        super().__init__("\n".join(self.problems))


def load(
    path: str,
    *,
    instance: str = "0",
    environ: Mapping[str, str],
    now: float | None = None,
) -> Config:
    """Read a configuration file and the credential files that it names.

    Args:
        path: the TOML file.
        instance: this daemon's name among several, which replaces ``{instance}``.
        environ: where ``$CREDENTIALS_DIRECTORY`` may stand.
        now: seconds since the epoch, or None: an expired authority is no mistake.

    Raises:
        ConfigError: the file cannot be read or is wrong.
    """
    return parse(_text_of(path), instance=instance, environ=environ, now=now, source=path)


def ledger_path(path: str) -> str | None:
    """Return ``trace.ledger`` of a configuration file, ``{instance}`` as it stands there.

    Nothing but ``[trace]`` is looked at: a user who may read the ledger may not read the
    credentials.

    Raises:
        ConfigError: the file cannot be read, or that key is wrong.
    """
    problems: list[str] = []
    data = _toml(_text_of(path), path)
    root = Table({"trace": data.get("trace", {})}, "", ROOT, problems, Context("0"))
    table = root.table("trace", SECTIONS["trace"])
    table.take("ledger")
    if problems:
        raise ConfigError(problems)
    return table.read("ledger", any_text, None)


def ledger_server(
    path: str, environ: Mapping[str, str]
) -> tuple[str, Secret | None, list[str]] | None:
    """Return ``trace.postgres`` of a configuration file, and the password for it.

    Nothing but ``[trace]`` and ``[credentials]`` is looked at.  The password is None where none is
    configured, and where it cannot be read: libpq may find another one.  In the latter case the
    list says why.

    Raises:
        ConfigError: the file cannot be read, or that key is wrong.
    """
    problems: list[str] = []
    data = _toml(_text_of(path), path)
    known = {name: data.get(name, {}) for name in ("trace", "credentials")}
    root = Table(known, "", ROOT, problems, Context("0"))
    table = root.table("trace", SECTIONS["trace"])
    url = table.take("postgres")
    if problems:
        raise ConfigError(problems)
    if url is None:
        return None
    root.context.credentials = _credentials_of(root, environ, problems)
    return url, table.take("postgres_credential"), problems


def parse(
    text: str,
    *,
    instance: str = "0",
    environ: Mapping[str, str],
    now: float | None = None,
    source: str = "configuration",
) -> Config:
    """Do as :func:`load` with the ``text`` of a file; ``source`` is what errors call it."""
    data = _toml(text, source)
    problems: list[str] = []
    try:
        instance_name(instance)
    except Wrong as wrong:
        problems.append(f"--instance: expected {wrong.expected}, got {show(instance)}")
    root = Table(data, "", ROOT, problems, Context(instance, now))
    config = _read(root, environ, problems)
    if problems:
        raise ConfigError(problems)
    return config


def _text_of(path: str) -> str:
    try:
        with open(path, "rb") as file:
            return file.read().decode("utf-8")
    except OSError as error:
        raise ConfigError([f"{path}: expected a file to read ({error.strerror})"]) from error
    except UnicodeDecodeError as error:
        raise ConfigError([f"{path}: expected UTF-8, as TOML is (byte {error.start})"]) from error


def _toml(text: str, source: str) -> dict[str, object]:
    if text.startswith("\ufeff"):
        raise ConfigError(
            [f"{source}: expected TOML without the byte order mark that it begins with"]
        )
    try:
        return tomllib.loads(text)
    except RecursionError:
        raise ConfigError([f"{source}: expected TOML, got one nested too deeply"]) from None
    except ValueError as error:
        raise ConfigError([f"{source}: expected TOML: {error}"]) from error


def _read(root: Table, environ: Mapping[str, str], problems: list[str]) -> Config:
    context = root.context
    providers = root.named("providers", SECTIONS["providers.*"], provider_name)
    context.credentials = _credentials_of(root, environ, problems)
    context.providers = tuple(providers)
    config = Config(
        proxy=read_proxy(root.table("proxy", SECTIONS["proxy"])),
        admin=root.table("admin", SECTIONS["admin"]).struct(Admin),
        timeouts=root.table("timeouts", SECTIONS["timeouts"]).struct(Timeouts),
        limits=root.table("limits", SECTIONS["limits"]).struct(Limits),
        providers={name: read_provider(name, one) for name, one in providers.items()},
        routes=tuple(read_route(one) for one in root.tables("routes", SECTIONS["routes"])),
        intercept=(
            read_intercept(root.table("intercept", SECTIONS["intercept"]))
            if "intercept" in root
            else None
        ),
        tunnel=read_tunnel(root.table("tunnel", SECTIONS["tunnel"])),
        trace=read_trace(root.table("trace", SECTIONS["trace"])),
        shared=read_shared(root.table("shared", SECTIONS["shared"])),
        log=root.table("log", SECTIONS["log"]).struct(Log),
    )
    _check_route_names(config.routes, problems)
    _check_session_header(config, problems)
    _check_route_headers(config, problems)
    _check_candidates(config, problems)
    _check_models_list(config, problems)
    names = [route.name for route in config.routes]
    # If a route has no name, clients may mean that route: what they say of routes is not judged.
    context.routes = names if all(names) else None
    tables = root.named("clients", SECTIONS["clients.*"], client_name)
    clients = {name: read_client(name, one) for name, one in tables.items()}
    _check_keys(clients, problems)
    _check_present(config, clients, problems)
    return msgspec.structs.replace(config, clients=clients)


def _credentials_of(root: Table, environ: Mapping[str, str], problems: list[str]) -> Credentials:
    """Return the directory of credential files that ``[credentials]`` names."""
    files = root.table("credentials", SECTIONS["credentials"])
    return Credentials(
        files.take("directory"),
        environ,
        problems,
        is_named=not files.lacks("directory"),
        open_to_others=files.take("open_to_others"),
    )


def _check_route_names(routes: tuple[Route, ...], problems: list[str]) -> None:
    first: dict[str, int] = {}
    for at, route in enumerate(routes):
        if route.name and first.setdefault(route.name, at) != at:
            problems.append(
                f"routes[{at}].name: expected a name of its own: set `name`, "
                f"as routes[{first[route.name]}] is called {show(route.name)} already"
            )


def _check_session_header(config: Config, problems: list[str]) -> None:
    carriers = {provider.header for provider in config.providers.values()}
    for name in config.trace.session_header:
        if name in carriers:
            problems.append(
                "trace.session_header: expected a header that carries no key, "
                f"but a provider's `header` is {show(name)}"
            )


def _check_route_headers(config: Config, problems: list[str]) -> None:
    for at, route in enumerate(config.routes):
        carriers = {config.providers[name].header for name in route.providers}
        for name, _ in route.headers:
            if name in carriers:
                problems.append(
                    f"routes[{at}].headers.{name}: expected no header that carries a key here: "
                    "the provider's `header` does"
                )


def _check_candidates(config: Config, problems: list[str]) -> None:
    """Report candidates to which a route could not send one and the same request."""
    same = ("dialect", "pass_credential", "key_query")
    for at, route in enumerate(config.routes):
        candidates = [config.providers[name] for name in route.providers]
        for first, other in pairwise(candidates):
            for key in same:
                if getattr(first, key) != getattr(other, key):
                    problems.append(
                        f"routes[{at}].providers: expected providers of the same `{key}`, "
                        f"but {show(first.name)} and {show(other.name)} differ"
                    )


def _check_models_list(config: Config, problems: list[str]) -> None:
    for at, route in enumerate(config.routes):
        dialects = {config.providers[name].dialect for name in route.providers}
        if route.models_list == "configured" and Dialect.GEMINI in dialects:
            problems.append(
                f'routes[{at}].models_list: expected "upstream", as a provider\'s dialect is '
                '"gemini", whose lists the proxy does not make'
            )


def _check_keys(clients: dict[str, Client], problems: list[str]) -> None:
    owners: dict[bytes, str] = {}
    for name, client in clients.items():
        for key in client.keys:
            if key.hash in owners:
                problems.append(
                    f"clients.{name}.keys: expected a key of its own, "
                    f"but one stands in clients.{owners[key.hash]}.keys already"
                )
            owners.setdefault(key.hash, name)


def _check_present(config: Config, clients: dict[str, Client], problems: list[str]) -> None:
    """Report the sections without which nothing could be served."""
    if not config.providers:
        problems.append("providers: expected at least one [providers.NAME], but there is none")
    if not config.routes:
        problems.append("routes: expected at least one [[routes]], but there is none")
    if not clients and not config.proxy.anonymous:
        problems.append(
            "clients: expected at least one [clients.NAME], or proxy.anonymous = true "
            "for an open listener without clients"
        )
