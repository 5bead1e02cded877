"""The sections of the file: one reader for each whose keys have to do with one another.

Key by key a table is read as ``settings.py`` declares it.  Here stands what one key says of another
in its section: which default follows from it, what it needs beside it, and what is read first.
What only the whole file can tell is ``__init__.py``'s.
"""

from __future__ import annotations

from importlib.util import find_spec

from llmproxy.config.authority import authority, outside
from llmproxy.config.keypair import Keypair, keypair
from llmproxy.config.readers import default_via, key_hint, route_name
from llmproxy.config.schema import Table
from llmproxy.config.settings import (
    Client,
    Intercept,
    Provider,
    Proxy,
    Route,
    Shared,
    Trace,
    Tunnel,
)
from llmproxy.config.values import Wrong, show
from llmproxy.dialects.dialect import Dialect
from llmproxy.http1.headers import ACCOUNT_FIELDS, ROUTING_FIELDS
from llmproxy.net.addresses import AddressGuard


def read_proxy(table: Table) -> Proxy:
    """Read ``[proxy]``."""
    table.defaults["via"] = default_via()
    for name in ("listen", "listen_tls", "reuse_port"):
        table.take(name)
    _check_parent_proxy(table, "parent_proxy_credential", "no_parent_proxy")
    return table.struct(Proxy, keypair=_keypair(table))


def _check_parent_proxy(table: Table, *names: str) -> None:
    """Report keys that are for a parent proxy, if the section has none."""
    has_none = table.lacks("parent_proxy") or table.take("parent_proxy") == "none"
    for name in names:
        if name in table and has_none:
            table.problem(name, "expected `parent_proxy` with a URL beside it, which it is for")


def _keypair(table: Table) -> Keypair | None:
    """Return what the TLS listeners show, if there are some."""
    wanted = "listen_tls" in table
    for name in ("certificate", "key"):
        if wanted:
            table.need(name)
            table.take(name)
        elif name in table:
            table.problem(name, "expected `listen_tls` beside it, which it is for")
    if not wanted:
        return None
    chain, key = table.take("certificate"), table.take("key")
    if chain is None or key is None:
        return None
    return table.read("key", lambda _: keypair(chain, key), None)


def read_intercept(table: Table) -> Intercept | None:
    """Read ``[intercept]``; ``None`` if it cannot be used (and that is reported)."""
    hosts, chain, key = (table.take(name) for name in ("hosts", "ca_certificate", "ca_key"))
    if chain is None:
        return None
    for host in outside(chain, hosts):
        table.problem(
            "hosts",
            f"expected hosts inside the name constraints of `ca_certificate`, and {show(host)} "
            "wants a new authority, as what clients trust cannot be changed: `llmproxy ca new`",
        )
    if key is None:
        return None
    signs = table.read("ca_key", lambda _: authority(chain, key), None)
    return None if signs is None else table.struct(Intercept, hosts=hosts, authority=signs)


def read_tunnel(table: Table) -> Tunnel:
    """Read ``[tunnel]``; what could never be reached is no target."""
    guard = AddressGuard(tuple, allow_private=table.take("allow_private"))
    for target in table.take("allow"):
        forbidden = guard.forbids_name(target.host, target.port or 0)
        if forbidden is not None:
            beside = "" if guard.allow_private else ", or `allow_private = true` beside it"
            table.problem(
                "allow",
                f"expected hosts that tunnels may reach{beside}, "
                f"but {show(str(target))} is not public ({forbidden.kind})",
            )
    return table.struct(Tunnel)


def read_trace(table: Table) -> Trace:
    """Read ``[trace]``."""
    if "keep" in table and table.lacks("ledger") and table.lacks("postgres"):
        table.problem("keep", "expected `ledger` beside it, or `postgres`, which it is for")
    if "postgres_credential" in table and table.lacks("postgres"):
        table.problem("postgres_credential", "expected `postgres` beside it, which it is for")
    return table.struct(Trace)


def read_shared(table: Table) -> Shared:
    """Read ``[shared]``: without ``url`` nothing else has a meaning."""
    for key in ("user", "credential", "ca", "strict"):
        if key in table and table.lacks("url") and table.take(key):
            table.problem(key, "expected `url` beside it, which it is for")
    url = table.take("url")
    if url is not None and find_spec("txredisapi") is None:
        table.problem("url", "expected the package that it needs: pip install 'llmproxy[shared]'")
    if url is not None and "ca" in table and not url.tls:
        table.problem("ca", "expected a rediss:// `url` beside it, which it is for")
    if "user" in table and table.lacks("credential"):
        table.problem("user", "expected `credential` beside it, with the user's password")
    return table.struct(Shared)


_KEY_FIELDS = {Dialect.ANTHROPIC: "x-api-key", Dialect.GEMINI: "x-goog-api-key"}
"""The headers of credentials that stand there alone, by dialect."""


def read_provider(name: str, table: Table) -> Provider:
    """Read one ``[providers.NAME]``; ``header`` and ``format`` follow the dialect."""
    if (field := _KEY_FIELDS.get(table.take("dialect"))) is not None:
        table.defaults.update(header=field, format="{}")
    if table.take("pass_credential") and "credential" in table:
        table.problem(
            "pass_credential", "expected either this or `credential`: only one key can be sent"
        )
    if table.take("key_query") and table.take("pass_credential"):
        table.problem(
            "key_query", "expected either this or `pass_credential`: the query has one reader"
        )
    if "credential" in table:
        table.defaults["drop_headers"] = (*ROUTING_FIELDS, *ACCOUNT_FIELDS)
    if "queue" in table and table.lacks("max_streams"):
        table.problem("queue", "expected `max_streams` beside it, for which requests wait")
    table.take("header")
    _check_parent_proxy(table, "parent_proxy_credential")
    return table.struct(Provider, name=name)


def read_route(table: Table) -> Route:
    """Read one ``[[routes]]``; its path names it."""
    path = table.take("path")
    table.take("providers")
    route = table.struct(Route, path=path or "", name=_route_name(table, path))
    if len(set(route.providers)) < len(route.providers):
        table.problem("providers", "expected each provider once")
    if route.balance != "weighted":
        for name, one in route.override.items():
            if one.weight != 1:
                table.problem(
                    "override", f'expected balance = "weighted" beside the weight of {show(name)}'
                )
    if route.websocket and any(one.model is not None for one in route.override.values()):
        table.problem(
            "websocket", "expected no `model` in `override` beside it: frames are not changed"
        )
    return route


def _route_name(table: Table, path: str | None) -> str:
    """Return the route's name, ``""`` if it cannot be told (and that is reported)."""
    if "name" in table or not path:
        return table.read("name", route_name, "")
    try:
        return route_name(path[1:] or "root")
    except Wrong as wrong:
        table.problem("name", f"expected this key, as the path does not make {wrong.expected}")
        return ""


def read_client(name: str, table: Table) -> Client:
    """Read one ``[clients.NAME]``."""
    if table.lacks("keys"):
        table.need("keys", f"; {key_hint(name)}")
        return table.struct(Client, name=name, keys=())
    return table.struct(Client, name=name)
