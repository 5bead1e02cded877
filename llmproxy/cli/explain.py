"""``llmproxy explain``: what the proxy would do with a request, without starting anything.

The request is made up from the command line and asked of the same code that serves requests: the
first look at it, the routes, what its body says, and what each candidate would be sent.  Nothing is
sent, no credential is shown, and no command is run.  What only a running daemon knows is not here:
who is busy, cools down or is switched off.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import textwrap
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, cast

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
from llmproxy.config.host_pattern import HostPatterns, as_compared
from llmproxy.config.schema import redacted
from llmproxy.config.settings import PROVIDER_TIMEOUTS
from llmproxy.config.values import show_size
from llmproxy.dialects.endpoints import endpoint
from llmproxy.dialects.json_spans import BodyError
from llmproxy.dialects.request import (
    RequestFacts,
    UnknownBody,
    is_call,
    read_request,
    reads_list,
)
from llmproxy.dialects.websocket import socket_api
from llmproxy.errors import ProxyError
from llmproxy.gateway.admission import Rules, admit, handshake_of, refuse_unread, unread_body
from llmproxy.gateway.attempt import model_edits
from llmproxy.gateway.gateway import guarded_fields
from llmproxy.http1.grammar import BadMessage, Fields, first_values, parse_authority
from llmproxy.http1.headers import (
    ACCOUNT_FIELDS,
    HOP_BY_HOP,
    KEY_FIELDS,
    OWN_KEY_FIELD,
    ROUTING_FIELDS,
    host_of,
)
from llmproxy.http1.websocket import UPGRADE, Handshake
from llmproxy.policy.auth import ANONYMOUS, Auth, no_proxy_key
from llmproxy.policy.routes import Candidate, ModelList, Named, NoModel, RouteMatch, Routes
from llmproxy.policy.tunnels import Tunnels

_WITH_BODY = (b"POST", b"PUT", b"PATCH")
_SEEN = (
    *(OWN_KEY_FIELD, *KEY_FIELDS, b"user-agent", b"content-type", b"accept-encoding", b"forwarded"),
    *(b"x-forwarded-for", b"x-forwarded-proto", b"expect", b"proxy-authorization"),
    *sorted(HOP_BY_HOP - {b"connection", b"upgrade"}),
    *(name.encode() for name in (*ROUTING_FIELDS, *ACCOUNT_FIELDS)),
)
"""The headers of which it is said whether they cross: those that programs and proxies send."""

_THEIRS = b"(the caller's)"

_OTHERWISE_SHOWN = ("name", "path", "providers", "models", "hosts", "override", "timeouts")
_NO_LIMITS = ("keys", "routes", "models")
_TIMEOUTS = PROVIDER_TIMEOUTS.names
_WIDTH = 100

Report = dict[str, Any]


@dataclass
class Asked:
    """The request that is made up; it has of a real one what the gateway's steps look at."""

    method: bytes
    uri: bytes
    fields: Fields
    body: bytes
    refusal: ProxyError | None = None
    inside: None = None
    clientproto: bytes = b"HTTP/1.1"
    upload: None = None
    handshake: Handshake | None = None
    first: dict[bytes, bytes] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.first = first_values(self.fields)

    @property
    def path(self) -> bytes:
        """The target without its query."""
        return self.uri.partition(b"?")[0]

    @property
    def has_body(self) -> bool:
        """Whether the request has a body."""
        return bool(self.body)

    @property
    def body_bytes(self) -> int:
        """How long the body is."""
        return len(self.body)


def explain(args: argparse.Namespace) -> int:
    """Say what would happen to a request; 1 where it would be refused."""
    environ = dict(os.environ)
    if args.credentials is not None:
        environ[ENVIRONMENT] = args.credentials
    try:
        config = load(args.file, instance=args.instance, environ=environ)
        client = _client(config, args.client)
    except ConfigError as error:
        return _tell({"ok": False, "problems": list(error.problems)}, as_json=args.json)
    asked = _asked(args)
    report: Report = {"ok": True, "client": client.name}
    try:
        report |= explained(config, client, asked)
    except ProxyError as error:
        report["ok"] = False
        report["refused"] = {
            "status": error.status,
            "reason": error.reason,
            "message": error.message,
        }
    return _tell(report, as_json=args.json)


def explained(config: Config, client: Client, asked: Asked) -> Report:
    """Return what would happen to a request.

    Raises:
        ProxyError: it would be refused.
    """
    if asked.method == b"CONNECT":
        return {"connect": _of_connect(config, client, asked.uri)}
    routes, request = Routes(config), cast(Any, asked)
    place = routes.at(asked.path, host_of(asked.first.get(b"host")))
    via = config.proxy.via.encode("ascii")
    auth = Auth(config, time.time)
    asked.handshake = handshake_of(request, place)
    admit(request, place, Rules(via.lower(), guarded_fields(config), auth))
    auth.refuse_expired(client)
    place.require()
    if place.lists and not is_call(asked.method) and not asked.has_body:
        listed = place.list_of(client, asked.path)
        if listed is not None:
            return _of_list(config, listed)
    facts = _facts(asked, place.crossing(asked.uri), strict=place.needs_model(client))
    named: tuple[Named, ...] = facts.models
    if not named:
        named = (NoModel.WITH_BODY,) if asked.has_body else (NoModel.WITHOUT_BODY,)
    calls = is_call(asked.method)
    if asked.handshake is not None and place.websockets is not None:
        calls, place = True, place.websockets
        if socket_api(place.dialect, asked.path) is not None:
            named = facts.models
    match = place.choose(
        client,
        asked.uri,
        named,
        reads_list=named[:1] == (NoModel.WITHOUT_BODY,) and reads_list(asked.method, asked.path),
        is_call=calls,
    )
    return {
        "route": _of_route(config, match.route),
        "model": facts.model,
        "model_from": facts.source,
        "candidates": [_of_candidate(asked, match, one, facts, via) for one in match.candidates],
        "limits": {
            "request_body": show_size(match.body_limit),
            **{k: v for k, v in redacted(client).items() if k not in _NO_LIMITS},
        },
    }


# --- what the command line says -------------------------------------------------------------------


def _client(config: Config, name: str | None) -> Client:
    """Return who calls.

    Raises:
        ConfigError: there is no such client.
    """
    if name is None or name == ANONYMOUS.name:
        if config.proxy.anonymous:
            return ANONYMOUS
        raise ConfigError(["--client: expected a client's name, as nobody is anonymous here"])
    if name not in config.clients:
        known = ", ".join(config.clients) or "none"
        raise ConfigError([f"--client: expected the name of a client ({known}), got {name!r}"])
    return config.clients[name]


def _asked(args: argparse.Namespace) -> Asked:
    usual = "POST" if args.path.startswith("/") else "CONNECT"
    method: bytes = (args.method or usual).encode("latin-1")
    said = {} if args.model is None else {"model": args.model}
    body = json.dumps(said | ({"stream": True} if args.stream else {})).encode()
    given = [_field(line) for line in args.header]
    fields: Fields = [(b"host", args.host.encode("latin-1")), *given]
    names = {name for name, _ in fields}
    fields += [(name, _THEIRS) for name in _SEEN if name not in names and name != b"content-type"]
    if b"content-type" not in names:
        fields.append((b"content-type", b"application/json"))
    target = args.path.encode("ascii", "backslashreplace")
    return Asked(method, target, fields, body if method in _WITH_BODY else b"")


def _field(line: str) -> tuple[bytes, bytes]:
    name, _, value = line.partition(":")
    return name.strip().lower().encode("latin-1", "replace"), value.strip().encode("utf-8")


def _facts(asked: Asked, target: bytes, *, strict: bool) -> RequestFacts:
    """Return what the request asks for, as the gateway reads it."""
    kind = asked.first.get(b"content-type")
    if strict and asked.has_body:
        refuse_unread(cast(Any, asked))
    steps = read_request(kind, asked.body, target, asked.method, strict=strict)
    try:
        while True:
            next(steps)
    except StopIteration as done:
        facts: RequestFacts = done.value
        return facts
    except UnknownBody as error:
        raise unread_body(str(error)) from error
    except BodyError as error:
        raise ProxyError(400, "bad_body", str(error)) from error


# --- what would happen ----------------------------------------------------------------------------


def _of_route(config: Config, route: Route) -> Report:
    rules = {k: v for k, v in redacted(route).items() if k not in _OTHERWISE_SHOWN}
    at = config.routes.index(route)
    shown = {"name": route.name, "at": f"routes[{at}]", "path": route.path}
    return {**shown, "models": route.models, "hosts": route.hosts, "rules": rules}


def _of_connect(config: Config, client: Client, target: bytes) -> Report:
    """Return what becomes of a CONNECT, as far as its host says; addresses are checked later."""
    try:
        asked, port = parse_authority(target)
    except BadMessage as error:
        raise ProxyError(400, "bad_target", f"The request is refused: {error}.") from None
    host = as_compared(asked)
    shown = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
    if config.intercept is not None and HostPatterns(config.intercept.hosts).match(host):
        return {"host": shown, "outcome": "intercepted"}
    if client is ANONYMOUS:
        raise no_proxy_key()
    try:
        Auth(config, time.time).refuse_expired(client)
    except ProxyError as error:
        raise ProxyError(407, error.reason, error.message) from error
    is_observed = Tunnels(config.tunnel).permit(host, port)
    return {"host": shown, "outcome": "would_refuse" if is_observed else "tunnelled"}


def _of_list(config: Config, listed: ModelList) -> Report:
    name, names = listed.asked.name, listed.names
    if name is not None and name not in names:
        raise ProxyError(404, "no_model", "There is no model of this name in the list.")
    return {"route": _of_route(config, listed.route), "listed": names if name is None else [name]}


def _of_candidate(
    asked: Asked, match: RouteMatch, candidate: Candidate, facts: RequestFacts, via: bytes
) -> Report:
    provider = candidate.provider
    target = match.target(candidate)
    if candidate.model is not None:
        model_edits(cast(Any, asked), match, candidate, facts)
    streams = bool(facts.wants_stream(endpoint(provider.dialect, candidate.base + match.path)))
    carrier = None if provider.credential is None else provider.header.encode("ascii")
    sent = candidate.rewriter.for_provider(
        asked.fields,
        asked.first,
        via=b"1.1 " + via,
        request_id=b"(an id)",
        streams=streams,
        identity=match.route.accept_encoding == "identity",
        credential=None if carrier is None else (carrier, b"(the credential)"),
    )
    if asked.handshake is not None:
        sent += UPGRADE
    came, url = set(asked.fields), provider.url
    return {
        "provider": provider.name,
        "dialect": provider.dialect.value,
        "url": f"{url.scheme}://{url.netloc}{target.decode('ascii', 'backslashreplace')}",
        "model": candidate.model if candidate.model is not None else facts.model,
        "stream": streams,
        "credential": _of_credential(candidate),
        "adds": [name.decode("latin-1") for name, value in sent if (name, value) not in came],
        "drops": [
            name.decode("latin-1")
            for name, value in asked.fields
            if (name, value) not in set(sent) and name != b"host"
        ],
        "rules": _rules_of(match.route, provider),
        "timeouts": {k: v for k, v in redacted(candidate.timeouts).items() if k in _TIMEOUTS},
    }


def _rules_of(route: Route, provider: Provider) -> Report:
    """Return what decides whether and when this candidate is asked."""
    shown = redacted(provider)
    override = route.override.get(provider.name)
    weight = {"weight": 1 if override is None else override.weight}
    return {
        **(weight if route.balance == "weighted" else {}),
        **{name: shown[name] for name in ("max_streams", "queue", "health")},
    }


def _of_credential(candidate: Candidate) -> Report:
    provider = candidate.provider
    if provider.pass_credential:
        return {"from": "the caller", "header": None}
    if provider.credential is None:
        return {"from": None, "header": None}
    is_command = isinstance(provider.credential, CredentialCommand)
    return {"from": "a command" if is_command else "a file", "header": provider.header}


# --- how it is told -------------------------------------------------------------------------------


def _tell(report: Report, *, as_json: bool) -> int:
    if as_json:
        print(json.dumps(report))
    elif "problems" in report:
        print("\n".join(report["problems"]), file=sys.stderr)
    else:
        print("\n".join(_lines(report)))
    return 0 if report["ok"] else 1


def _lines(report: Report) -> Sequence[str]:
    lines = [_line("client", report["client"])]
    if "refused" in report:
        refused = report["refused"]
        lines.append(_line("refused", f"{refused['status']} {refused['reason']}"))
        return [*lines, _line("", refused["message"])]
    if "connect" in report:
        connect = report["connect"]
        return [*lines, _line("connect", f"{connect['host']} ({connect['outcome']})")]
    route = report["route"]
    lines.append(_line("route", f"{route['name']} ({route['at']}, path {route['path']})"))
    lines += [_line("rules", _pairs(route["rules"]))]
    if "listed" in report:
        names = ", ".join(report["listed"]) or "no model"
        return [*lines, _line("answer", "the proxy's own list of models"), _line("", names)]
    model = report["model"]
    lines.append(
        _line("model", "none" if model is None else f"{model} (of the {report['model_from']})")
    )
    lines.append(_line("limits", _pairs(report["limits"])))
    for number, one in enumerate(report["candidates"], 1):
        credential = one["credential"]
        source = credential["from"] or "none"
        in_header = f", in {credential['header']}" if credential["header"] else ""
        lines += [
            "",
            f"{number}. {one['provider']} ({one['dialect']})",
            _line("url", one["url"]),
            _line("model", one["model"] or "none"),
            _line("credential", source + in_header),
            _line("adds", ", ".join(one["adds"])),
            _line("drops", ", ".join(one["drops"])),
            _line("rules", _pairs(one["rules"])),
            _line("timeouts", _pairs(one["timeouts"])),
        ]
    return lines


def _line(label: str, text: str) -> str:
    """Return a label and what it says, which may take several lines."""
    return textwrap.fill(
        text or "none",
        _WIDTH,
        initial_indent=f"{label:<11} ",
        subsequent_indent=" " * 12,
        break_long_words=False,
        break_on_hyphens=False,
    )


def _pairs(values: Report) -> str:
    shown = (f"{name} {_shown(value)}" for name, value in values.items() if value not in ([], {}))
    return ", ".join(shown)


def _shown(value: object) -> str:
    if isinstance(value, bool) or value is None:
        return {True: "yes", False: "no", None: "none"}[value]
    if isinstance(value, dict):
        return f"({_pairs(value)})"
    return " ".join(map(str, value)) if isinstance(value, list) else str(value)
