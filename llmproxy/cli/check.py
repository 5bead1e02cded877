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
from collections.abc import Iterator, Mapping, Sequence

from llmproxy.config import Config, ConfigError, Provider, Route, load
from llmproxy.config.credentials import ENVIRONMENT
from llmproxy.config.endpoints import socket_path
from llmproxy.dialects.dialect import Dialect
from llmproxy.policy.routes import shadowed
from llmproxy.record.journal import PRIORITIES, is_journal

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
        config = load(args.file, instance=args.instance, environ=environ)
    except ConfigError as error:
        return _tell_problems(error.problems, as_json=args.json)
    warnings = [*_of_file(args.file), *_of_environment(config, environ), *warnings_of(config)]
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
        found += _of_url(provider, [one for one in config.routes if name in one.providers])
        if config.parent_proxy_for(provider) is not None:
            found += _of_tunnel(provider)
    for at, before in shadowed(config):
        found.append(
            f"routes[{at}]: no request comes here: "
            f"routes[{before}] takes all that this route would take"
        )
    for key, endpoint in _endpoints(config):
        if (path := socket_path(endpoint)) is not None:
            found += _of_folder(key, os.path.dirname(path))
    for key, path in (("trace.jsonl", config.trace.jsonl), ("trace.ledger", config.trace.ledger)):
        if path is not None:
            found += _of_folder(key, os.path.dirname(path)) or _of_records(key, path)
    return found


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
