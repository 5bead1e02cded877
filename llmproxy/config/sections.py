"""The sections of the file: one reader for each, from a checked table to its struct.

A reader here gives every key its meaning, its default and its rule.  What only the whole file can
tell (a client that names a route, a missing section) is ``config.py``'s; which keys there are is
``schema.py``'s.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Literal

from llmproxy.config.credentials import Credentials
from llmproxy.config.keypair import certificate_chain, keypair, private_key
from llmproxy.config.readers import (
    added_header_name,
    certificates,
    credential_format,
    default_via,
    digest,
    endpoint,
    endpoint_for_tls,
    field_value,
    file_of_instance,
    header_name,
    host_value,
    key_hint,
    reference,
    route_name,
    route_path,
    session_header,
)
from llmproxy.config.schema import KEYS, NOT_BUILT_YET, Table
from llmproxy.config.settings import (
    Admin,
    Client,
    Keypair,
    Limits,
    Override,
    Provider,
    Proxy,
    Route,
    Timeouts,
    Trace,
)
from llmproxy.config.url import Url, url
from llmproxy.config.values import (
    Wrong,
    boolean,
    choice,
    duration,
    duration_or_off,
    integer,
    model_pattern,
    show,
    size,
    size_above_zero,
    text,
    token,
)
from llmproxy.dialects.dialect import Dialect

_DIALECTS = {one.value: one for one in Dialect}
_ACCEPT_ENCODINGS: dict[str, Literal["identity", "pass"]] = {"identity": "identity", "pass": "pass"}
_CAPTURES: dict[str, Literal["usage", "content"]] = {"usage": "usage", "content": "content"}
_ON_DISCONNECT: dict[str, Literal["cancel", "drain"]] = {"cancel": "cancel", "drain": "drain"}
_INCLUDE_USAGE: dict[str, Literal["as-asked", "inject"]] = {
    "as-asked": "as-asked",
    "inject": "inject",
}
_NOWHERE = Url(scheme="http", host="invalid", port=80)


def read_proxy(table: Table, instance: str, credentials: Credentials) -> Proxy:
    """Read ``[proxy]``; a proxy may listen with TLS alone."""
    ours = Proxy()
    secure = "listen_tls" in table
    return Proxy(
        listen=table.array("listen", endpoint(instance), ours.listen, may_be_empty=secure),
        listen_tls=table.array("listen_tls", endpoint_for_tls(instance), ()),
        reuse_port=table.read("reuse_port", boolean, ours.reuse_port),
        keypair=_keypair(table, credentials, wanted=secure),
        anonymous=table.read("anonymous", boolean, False),
        drain_timeout=table.read("drain_timeout", duration, ours.drain_timeout),
        max_connections=table.read("max_connections", integer(1, 10_000_000), ours.max_connections),
        tuned_loop=table.read("tuned_loop", boolean, ours.tuned_loop),
        via=table.read("via", token, default_via()),
    )


def _keypair(table: Table, credentials: Credentials, *, wanted: bool) -> Keypair | None:
    """Return what the TLS listeners show, where there are some."""
    if not wanted:
        for name in ("certificate", "key"):
            if name in table:
                table.problem(name, "expected `listen_tls` beside it, which it is for")
        return None
    chain = table.need("certificate", credentials.pem(certificate_chain), None)
    key = table.need("key", credentials.pem(private_key), None)
    if chain is None or key is None:
        return None
    return table.read("key", lambda _: keypair(chain, key), None)


def read_admin(table: Table, instance: str) -> Admin:
    """Read ``[admin]``."""
    reader = endpoint(instance)
    return Admin(
        listen=table.read("listen", reader, Admin().listen),
        metrics_listen=table.read("metrics_listen", reader, None),
    )


def read_timeouts(table: Table) -> Timeouts:
    """Read ``[timeouts]``."""
    return Timeouts(**_timeouts(table))


def read_limits(table: Table) -> Limits:
    """Read ``[limits]``; only bodies and what is kept of them may be limited to nothing."""
    ours = Limits()
    return Limits(
        request_head=table.read("request_head", size_above_zero, ours.request_head),
        request_body=table.read("request_body", size, ours.request_body),
        request_memory=table.read("request_memory", size, ours.request_memory),
        response_head=table.read("response_head", size_above_zero, ours.response_head),
        accumulate=table.read("accumulate", size, ours.accumulate),
        event=table.read("event", size_above_zero, ours.event),
        connections_per_address=table.read("connections_per_address", integer(0, 10_000_000), 0),
        drains=table.read("drains", integer(0, 1_000_000), ours.drains),
    )


def read_trace(table: Table, instance: str) -> Trace:
    """Read ``[trace]``."""
    ours = Trace()
    if "keep" in table and table.lacks("ledger"):
        table.problem("keep", "expected `ledger` beside it, which it is for")
    return Trace(
        jsonl=table.read("jsonl", file_of_instance(instance), None),
        ledger=table.read("ledger", file_of_instance(instance), None),
        keep=table.read("keep", duration_or_off, ours.keep),
        otlp=table.read("otlp", url, None),
        session_header=table.read("session_header", session_header, ours.session_header),
    )


def read_provider(name: str, table: Table, credentials: Credentials) -> Provider:
    """Read one ``[providers.NAME]``."""
    dialect = table.need("dialect", choice(_DIALECTS), Dialect.RAW)
    anthropic = dialect is Dialect.ANTHROPIC
    pass_credential = table.read("pass_credential", boolean, False)
    if pass_credential and "credential" in table:
        table.problem(
            "pass_credential", "expected either this or `credential`: only one key can be sent"
        )
    header = table.read("header", header_name, "x-api-key" if anthropic else "authorization")
    return Provider(
        name=name,
        url=table.need("url", url, _NOWHERE),
        dialect=dialect,
        credential=table.read("credential", credentials.read, None),
        header=header,
        format=table.read("format", credential_format, "{}" if anthropic else "Bearer {}"),
        pass_credential=pass_credential,
        headers=_headers(table.table("headers", "headers by name"), header),
        ca=table.read("ca", certificates, None),
        pool=table.read("pool", integer(0, 1_000_000), 1000),
        timeouts=_timeouts(table.table("timeouts", "providers.*.timeouts")),
    )


def read_route(table: Table, known: Collection[str]) -> Route:
    """Read one ``[[routes]]``; ``known`` are the names of all providers."""
    path = table.need("path", route_path, "")
    candidates = table.array("providers", reference(known, "a provider"), ())
    if table.lacks("providers"):
        table.need("providers", text, None)
    if len(candidates) > 1:
        table.problem("providers", f"more than one candidate {NOT_BUILT_YET}")
    return Route(
        name=_route_name(table, path),
        path=path,
        providers=candidates,
        hosts=table.array("hosts", host_value, None),
        models=table.array("models", model_pattern, None),
        strip=table.read("strip", boolean, True),
        override=_overrides(table, candidates),
        timeouts=_timeouts(table.table("timeouts", "routes.timeouts")),
        accept_encoding=table.read("accept_encoding", choice(_ACCEPT_ENCODINGS), "identity"),
        include_usage=table.read("include_usage", choice(_INCLUDE_USAGE), "as-asked"),
        on_disconnect=table.read("on_disconnect", choice(_ON_DISCONNECT), "cancel"),
        drain_for=table.read("drain_for", duration, 30.0),
        error_event=table.read("error_event", boolean, False),
        capture=table.read("capture", choice(_CAPTURES), "usage"),
        request_body=table.read("request_body", size, None),
    )


def read_client(name: str, table: Table, routes: Collection[str] | None) -> Client:
    """Read one ``[clients.NAME]``; ``routes`` are the names of all routes, where they are known."""
    if table.lacks("keys"):
        table.problem("keys", f"expected this key, but it is missing; {key_hint(name)}")
    route = text if routes is None else reference({"*", *routes}, 'a route, or "*"')
    return Client(
        name=name,
        keys=table.array("keys", digest(name), ()),
        routes=table.array("routes", route, ("*",)),
        models=table.array("models", model_pattern, ("*",)),
    )


def _timeouts(table: Table) -> dict[str, float | None]:
    """Return the deadlines that ``table`` sets itself."""
    known = [key for key in KEYS[table.section] if key in table]
    return {key: table.read(key, duration_or_off, None) for key in known}


def _headers(table: Table, credential: str) -> tuple[tuple[str, str], ...]:
    """Return a provider's added fields; ``credential`` is the name that its key goes under."""
    fields: dict[str, str] = {}
    for key in table:
        try:
            name = added_header_name(key, credential)
        except Wrong as wrong:
            table.problem(key, f"expected {wrong.expected}")
            continue
        if name in fields:
            table.problem(key, f"expected each name once, but {show(name)} stands there already")
        fields[name] = table.read(key, field_value, "")
    return tuple(fields.items())


def _route_name(table: Table, path: str) -> str:
    """Return the route's name, ``""`` where it cannot be told (and that is reported)."""
    if "name" in table or not path:
        return table.read("name", route_name, "")
    try:
        return route_name(path[1:] or "root")
    except Wrong as wrong:
        table.problem("name", f"expected this key, as the path does not make {wrong.expected}")
        return ""


def _overrides(table: Table, candidates: tuple[str, ...]) -> dict[str, Override]:
    name = reference(candidates, "one of the route's providers")
    tables = table.named("override", "routes.override.*", name if candidates else text)
    return {
        candidate: Override(model=one.read("model", text, None))
        for candidate, one in tables.items()
    }
