"""``llmproxy check``: whether a configuration file can be used, and whether it says what was meant.

A problem is what the start would refuse, by the very code of the start.  A warning is what the
start would take although it can never work, or what only the start can tell for sure: the check may
run as another user, and before systemd has made the folders.  Nothing here knows how the daemon
works.
"""

from __future__ import annotations

import argparse
import ipaddress
import json
import os
import stat
import sys
import time
from collections.abc import Iterator, Mapping, Sequence

from llmproxy.config import (
    Client,
    Config,
    ConfigError,
    CredentialCommand,
    Provider,
    Route,
    load,
)
from llmproxy.config.credentials import ENVIRONMENT
from llmproxy.config.endpoints import socket_path
from llmproxy.config.host_pattern import HostPatterns
from llmproxy.config.values import show_instant
from llmproxy.dialects.dialect import Dialect
from llmproxy.errors import ProxyError
from llmproxy.policy.auth import ANONYMOUS
from llmproxy.policy.limits import DAY_S, limited
from llmproxy.policy.routes import PathMatch, Routes, shadowed
from llmproxy.record.journal import PRIORITIES, is_journal
from llmproxy.record.ledger_steps import LedgerError
from llmproxy.record.sinks import conninfo_of
from llmproxy.upstream.command import CommandFailed, Run

_SOON_S = 14 * 86400.0
"""Seconds before a key or an authority expires in which that is worth a warning."""

_SDK_PATHS = {
    (Dialect.OPENAI, "v1"): "/chat/completions",
    (Dialect.ANTHROPIC, "v1"): "/messages",
    (Dialect.OLLAMA, "v1"): "/chat/completions",
    (Dialect.OLLAMA, "api"): "/chat",
    (Dialect.GEMINI, "v1beta"): "/models/NAME:generateContent",
}
"""What SDKs put behind the segment with which they begin a path, by dialect and segment."""

_USUAL_PORT = 443
"""To this port proxies open tunnels as they are packaged."""

_PROXY_VARIABLES = ("HTTPS_PROXY", "https_proxy", "ALL_PROXY", "all_proxy")
"""Where other programs look for a proxy on the way to a provider."""


def check(args: argparse.Namespace) -> int:
    """Check a configuration file, with the credential files that it names."""
    environ = dict(os.environ)
    if args.credentials is not None:
        environ[ENVIRONMENT] = args.credentials
    try:
        config = load(args.file, instance=args.instance, environ=environ, now=time.time())
    except ConfigError as error:
        return _tell_problems(error.problems, as_json=args.json)
    try:
        if config.trace.postgres is not None:
            conninfo_of(config.trace)
    except LedgerError as error:
        return _tell_problems([f"trace.postgres: {error}"], as_json=args.json)
    warnings = [*_of_file(args.file), *_of_environment(config, environ), *warnings_of(config)]
    warnings += [*_of_keys(config, time.time()), *_of_authority(config, time.time())]
    if args.run_commands:
        warnings += _of_runs(config, environ)
    counts = _counts(config)
    if args.json:
        print(json.dumps({"ok": True, "problems": [], "warnings": warnings, **counts}))
        return 0
    for warning in warnings:
        print(f"warning: {warning}", file=sys.stderr)
    words = (f"{count} {noun if count != 1 else noun[:-1]}" for noun, count in counts.items())
    print(f"{args.file}: ok: {', '.join(words)}")
    return 0


def warnings_of(config: Config) -> list[str]:
    """Return what is likely not meant in a configuration that can be used, a line each."""
    found = []
    used = {name for route in config.routes for name in route.providers}
    for name, provider in config.providers.items():
        if name not in used:
            found.append(f"providers.{name}: no route uses this provider")
            continue
        if isinstance(command := provider.credential, CredentialCommand):
            found += _of_program(f"providers.{name}.credential.command", command.command[0])
        found += _of_url(provider, [one for one in config.routes if name in one.providers])
        if config.parent_proxy_for(provider) is not None:
            found += _of_tunnel(provider)
    for at, before in shadowed(config):
        found.append(
            f"routes[{at}]: no request comes here: "
            f"routes[{before}] takes all that this route would take"
        )
    found += _of_lists(config)
    found += _of_interceptions(config)
    for key, endpoint in _endpoints(config):
        if (path := socket_path(endpoint)) is not None:
            found += _of_folder(key, os.path.dirname(path))
    for key, path in (("trace.jsonl", config.trace.jsonl), ("trace.ledger", config.trace.ledger)):
        if path is not None:
            found += _of_folder(key, os.path.dirname(path)) or _of_records(key, path)
    found += _of_limits(config)
    return found


def _of_interceptions(config: Config) -> Iterator[str]:
    """Yield which hosts of a sandbox are not served as the file seems to say."""
    hosts = () if config.intercept is None else config.intercept.hosts
    routed = [route.hosts for route in config.routes]
    for host in hosts:
        is_it = HostPatterns([host]).match
        if all(names is not None and not any(map(is_it, names)) for names in routed):
            yield (
                f'intercept.hosts: every request to "{host}" gets a 404: no route has it in '
                "`hosts`, and none is without `hosts`"
            )
    is_intercepted = HostPatterns(hosts).match
    for target in config.tunnel.allow:
        if is_intercepted(target.host):  # a star counts as a label like any other
            yield f'tunnel.allow: no tunnel leads to "{target}": `intercept.hosts` has it, too'


def _of_limits(config: Config) -> Iterator[str]:
    """Yield what lets clients use more than their limits say."""
    if config.proxy.anonymous and limited(config.clients):
        yield (
            "proxy.anonymous: a client that is beyond its limits can leave out its key, as "
            '"anonymous" has no limits'
        )
    trace, keep = config.trace, config.trace.keep
    has_ledger = trace.ledger is not None or trace.postgres is not None
    if has_ledger and (keep is None or keep >= DAY_S):
        return
    lacks = "without `ledger`" if not has_ledger else 'with `keep` shorter than "1d"'
    for name, client in config.clients.items():
        if client.tokens_per_day is not None:
            yield (
                f"clients.{name}.tokens_per_day: {lacks} in [trace], a restart forgets what was "
                "used today"
            )


def _endpoints(config: Config) -> Iterator[tuple[str, str]]:
    """Yield all that is listened on, each with its key."""
    proxy, admin = config.proxy, config.admin
    yield from (("proxy.listen", one) for one in proxy.listen)
    yield from (("proxy.listen_tls", one) for one in proxy.listen_tls)
    yield "admin.listen", admin.listen
    if admin.metrics_listen is not None:
        yield "admin.metrics_listen", admin.metrics_listen


def _of_url(provider: Provider, routes: Sequence[Route]) -> Iterator[str]:
    url, key = provider.url, f"providers.{provider.name}.url"
    own, _, last = url.path.rpartition("/")
    behind = _SDK_PATHS.get((provider.dialect, last))
    if behind is not None:
        for route in routes:
            path = route.path.removesuffix("/")
            asked = path + ("" if path.endswith(f"/{last}") else f"/{last}") + behind
            sent = url.path + (asked.removeprefix(path) if route.strip else asked)
            if f"/{last}/{last}/" in sent:
                short = f"{url.scheme}://{url.netloc}"
                yield (
                    f"{key}: SDKs put /{last} into the path themselves, so a call to {asked} "
                    f'would go to {short}{sent}: write "{short}{own}"'
                )
                break
    carries_key = provider.credential is not None or provider.pass_credential
    if url.scheme == "http" and carries_key and not _is_this_machine(url.host):
        yield f"{key}: a key goes to {url.netloc} without TLS: whoever is on the way can read it"


def _of_tunnel(provider: Provider) -> Iterator[str]:
    """Yield why the parent proxy may not open a tunnel to ``provider``, or one to elsewhere."""
    url, key = provider.url, f"providers.{provider.name}.url"
    if _is_this_machine(url.host):
        yield (
            f"{key}: the parent proxy takes {url.host} for its own machine: "
            'name it in `no_parent_proxy`, or write parent_proxy = "none" here'
        )
    elif url.port != _USUAL_PORT:
        yield (
            f"{key}: the proxy asks for a tunnel to port {url.port}, and many proxies allow "
            f"{_USUAL_PORT} alone (squid: `acl SSL_ports port {url.port}`)"
        )


def _of_environment(config: Config, environ: Mapping[str, str]) -> Iterator[str]:
    known = [config.proxy.parent_proxy, *(one.parent_proxy for one in config.providers.values())]
    for name in _PROXY_VARIABLES:
        if environ.get(name) and not any(known):
            yield (
                f"${name} is set, and is not read: providers are reached through what "
                "`parent_proxy` says, directly without it"
            )
            return


def _is_this_machine(host: str) -> bool:
    if host == "localhost" or host.endswith(".localhost"):
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _of_folder(key: str, folder: str) -> list[str]:
    """Return what may keep the start from making a file in ``folder``."""
    if os.path.isdir(folder or "."):
        return []
    makers = "RuntimeDirectory=, LogsDirectory=, StateDirectory="
    return [f"{key}: {folder} is no folder: the start fails, unless systemd makes it ({makers})"]


def _of_lists(config: Config) -> Iterator[str]:
    """Return which lists of models are empty for everybody who may read them."""
    routes = Routes(config)
    for at, route in enumerate(config.routes):
        if route.models_list == "configured":
            path = route.path.rstrip("/").encode("ascii") + b"/v1/models"
            place = routes.at(path, "" if route.hosts is None else route.hosts[0])
            if not any(_names(place, one, path) for one in (ANONYMOUS, *config.clients.values())):
                yield (
                    f"routes[{at}].models_list: the list is empty: write names without a star into "
                    "`models` of the route or of clients"
                )


def _names(place: PathMatch, client: Client, path: bytes) -> list[str]:
    try:
        listed = place.list_of(client, path)
    except ProxyError:
        return []
    return [] if listed is None else listed.names


def _of_keys(config: Config, now: float) -> Iterator[str]:
    """Return which keys of clients have expired, or will soon."""
    for name, client in config.clients.items():
        for at, key in enumerate(client.keys):
            if key.expires is not None and key.expires - now < _SOON_S:
                will = "has expired" if key.expires <= now else "will expire"
                yield f"clients.{name}.keys[{at}]: the key {will}, at {show_instant(key.expires)}"


def _of_authority(config: Config, now: float) -> Iterator[str]:
    """Return what some clients make of the authority of intercepted hosts, and its end."""
    if config.intercept is None:
        return
    authority, key = config.intercept.authority, "intercept.ca_certificate"
    for weakness in authority.weaknesses:
        yield f"{key}: {weakness}"
    if authority.not_after - now < _SOON_S:
        yield f"{key}: the certificate will expire, at {show_instant(authority.not_after)}"


def _of_program(key: str, path: str) -> list[str]:
    """Return what may keep the daemon from running a program; it is not run."""
    if not os.path.isfile(path):
        return [f"{key}: {path} is no file: requests to this provider get a 503"]
    if not os.access(path, os.X_OK, effective_ids=True):
        return [f"{key}: the user of this check may not run {path}: the daemon's user must"]
    return []


def _of_runs(config: Config, environ: Mapping[str, str]) -> Iterator[str]:
    """Run the commands that print credentials, as this user, and return which of them fail."""
    for name, provider in config.providers.items():
        if isinstance(command := provider.credential, CredentialCommand):
            try:
                Run(command.command, time.monotonic, environ)()
            except CommandFailed as error:
                yield f"providers.{name}.credential.command: the command failed: {error}"


def _of_records(key: str, path: str) -> list[str]:
    """Return what may keep the start from writing records to ``path``, whose folder is there."""
    exists = os.path.exists(path)
    if exists and not os.path.isfile(path):
        return [f"{key}: {path} is no file: the start fails"]
    place = path if exists else os.path.dirname(path)
    if not os.access(place, os.W_OK, effective_ids=True):
        return [f"{key}: the user of this check may not write {path}: the daemon's user must"]
    return []


def _of_file(path: str) -> Iterator[str]:
    if os.stat(path).st_mode & stat.S_IWOTH:
        yield f"{path}: everybody on this machine may write this file (chmod o-w)"


def _tell_problems(problems: Sequence[str], *, as_json: bool) -> int:
    if as_json:
        said = json.dumps({"ok": False, "problems": problems, "warnings": []})
        print(f"{_mark(1)}{said}")
    else:
        print("\n".join(f"{_mark(2)}{problem}" for problem in problems), file=sys.stderr)
    return 1


def _mark(descriptor: int) -> str:
    """Return what makes a line an error, if it is for the journal."""
    return PRIORITIES["error"].decode() if is_journal(descriptor, os.environ) else ""


def _counts(config: Config) -> dict[str, int]:
    return {
        "routes": len(config.routes),
        "providers": len(config.providers),
        "clients": len(config.clients),
    }
