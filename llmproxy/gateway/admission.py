"""The first look at a request: what no route and no key could make acceptable.

Refused here are a method that is not served, a target that would leave its route, a handshake that
cannot be met, a request that came through this proxy before, and a header that is disguised.  Each
refusal says what is wrong, and costs next to nothing.
"""

from __future__ import annotations

import msgspec

from llmproxy.config import Client
from llmproxy.config.host_pattern import HostPatterns, as_compared
from llmproxy.dialects.request import is_readable
from llmproxy.errors import ProxyError
from llmproxy.http1.grammar import first_values
from llmproxy.http1.headers import BODY_FIELDS, host_of, nominated, refuse_disguised
from llmproxy.http1.websocket import USE_HTTP, Handshake, is_handshake, read_handshake
from llmproxy.policy.auth import ANONYMOUS, Auth, KeyPlaces
from llmproxy.policy.origins import refuse_page
from llmproxy.policy.routes import PathMatch, refuse_dots
from llmproxy.server.error_response import METHODS
from llmproxy.server.inside import Inside
from llmproxy.server.request import Request


class Rules(msgspec.Struct, frozen=True):
    """What requests are admitted by.

    Attributes:
        pseudonym: ours in ``Via``, in lower case.
        guarded: the fields that some provider gets from the proxy alone, or not at all.
        auth: knows the clients' keys.
        serves_plain: requests behind CONNECT are served without TLS, too.
        intercepts: the hosts for which requests behind CONNECT are served.
    """

    pseudonym: bytes
    guarded: frozenset[bytes]
    auth: Auth
    serves_plain: bool = False
    intercepts: HostPatterns = HostPatterns(())


def admit(request: Request, place: PathMatch, rules: Rules) -> None:
    """Let ``request`` pass, or refuse it.

    Args:
        place: where its path leads.

    Raises:
        ProxyError: why it cannot be served; what the server refused already comes first.
    """
    if request.refusal is not None:
        raise request.refusal
    if request.method not in METHODS:
        allow = (b"allow", b", ".join(METHODS))
        raise ProxyError(405, "method", "This method is not served.", fields=(allow,))
    if not request.uri.startswith(b"/"):
        raise ProxyError(400, "bad_target", "The request target must be a path.")
    if (inside := request.inside) is not None:
        refuse_elsewhere(request, inside, rules)
    refuse_dots(request.path)
    admit_fields(request, rules.pseudonym, rules.guarded, place.websockets is not None)


def admit_fields(
    request: Request,
    pseudonym: bytes,
    guarded: frozenset[bytes] = frozenset(),
    takes_websockets: bool = False,
) -> None:
    """Let the fields of ``request`` pass, or refuse them.

    Args:
        pseudonym: ours in ``Via``, in lower case.
        guarded: as :class:`Rules` has them.
        takes_websockets: a WebSocket handshake may pass.

    Raises:
        ProxyError: a handshake that cannot be met, a loop, or a header that is disguised.
    """
    first = request.first
    if b"upgrade" in first and not takes_websockets and _asks_for_websocket(request):
        text = "WebSockets are not served here; use HTTP streaming."
        lacks = "no route here has `websocket = true`"
        raise ProxyError(426, "websocket", text, fields=USE_HTTP, detail=lacks)
    if b"via" in first and _came_through(request, pseudonym):
        raise ProxyError(508, "loop", "The request came through this proxy already.")
    refuse_disguised(first, guarded)
    if (
        b"connection" in first
        and not _is_usual(request)
        and BODY_FIELDS & nominated(request.fields)
    ):
        text = "Connection names a header that says how the body is to be read."
        raise ProxyError(400, "bad_header", text)


def _is_usual(request: Request) -> bool:
    """Return whether ``Connection`` says nothing but whether to keep the connection."""
    option = request.first[b"connection"].lower()
    return option in (b"keep-alive", b"close") and len(request.first) == len(request.fields)


def identify(request: Request, place: PathMatch, rules: Rules) -> Client:
    """Admit ``request``, and return who calls.

    Raises:
        ProxyError: it cannot be served, nobody is known, or a web page of somebody else's calls.
    """
    admit(request, place, rules)
    if request.inside is None:  # as nearly always
        client = rules.auth.identify(request.fields, request.uri, place.keys, request.first)
    else:
        client = who_calls(request, place.keys, rules.auth)
    if client is ANONYMOUS and not place.keys.passes:
        refuse_page(request.first, place.origins)
    return client


def who_calls(request: Request, keys: KeyPlaces, auth: Auth) -> Client:
    """Return the client of ``request``: the one of its CONNECT, or of the keys that it shows.

    Raises:
        ProxyError: 401.
    """
    inside = request.inside
    if inside is not None and inside.authorization is not None:
        return auth.identify_within(inside.authorization, request.fields, request.uri, keys)
    return auth.identify(request.fields, request.uri, keys, request.first)


def refuse_elsewhere(request: Request, inside: Inside, rules: Rules) -> None:
    """Refuse a request behind CONNECT that is for another host than that, or in the clear.

    A connection may outlive the configuration that it was opened under: what counts is the present.

    Raises:
        ProxyError: 400 without a Host; 421 where Host or the name in TLS is another one (RFC 9110,
            section 15.5.20), or the host is not intercepted any more; 403 where TLS is needed.
    """
    asked = f"{inside.host}:{inside.port}"
    if not rules.intercepts.match(inside.host):
        text = f"This proxy serves https://{inside.host} no more: connect again."
        raise ProxyError(421, "not_intercepted", text, fields=((b"connection", b"close"),))
    if not inside.is_secure and not rules.serves_plain:
        text = f"This proxy serves https://{inside.host} and not http://: change the URL."
        raise ProxyError(403, "plain_http", text)
    value = request.first.get(b"host")
    if value is None:
        raise ProxyError(400, "bad_host", "A request behind CONNECT needs a Host field.")
    name = host_of(value)
    port = value[len(name) + 1 :]
    if as_compared(name) != inside.host or (port and port != b"%d" % inside.port):
        raise ProxyError(421, "wrong_host", f"Host is another one than CONNECT asked for, {asked}.")
    if inside.name is not None and as_compared(inside.name) != inside.host:
        text = f"TLS named another host than CONNECT asked for, {asked}."
        raise ProxyError(421, "wrong_host", text)


def handshake_of(request: Request, place: PathMatch) -> Handshake | None:
    """Return the WebSocket handshake that ``request`` is, or None where it is none, or no route.

    The request then has header fields in the place of the subprotocols that mean some, such as a
    key.

    Raises:
        ProxyError: 400 or 426, where it is a faulty one.
    """
    if place.websockets is None or request.refusal is not None or not _asks_for_websocket(request):
        return None
    has_body = request.body_bytes > 0 or request.upload is not None
    handshake = read_handshake(request.method, request.fields, has_body=has_body)
    request.fields, request.first = handshake.fields, first_values(handshake.fields)
    return handshake


def early_refusal(request: Request, place: PathMatch, rules: Rules) -> ProxyError | None:
    """Return why ``request`` is refused whatever its body says, or None where that depends."""
    try:
        client = identify(request, place, rules)
        place.require()
        if place.needs_model(client):
            refuse_unread(request)
        request.belongs_to(client.name)
        request.caller = client
    except ProxyError as error:
        return error
    return None


def needs_model(request: Request, place: PathMatch, rules: Rules) -> bool:
    """Return whether the model of ``request`` decides something for whoever calls."""
    if not place.needs_model():
        return False
    try:
        client = who_calls(request, place.keys, rules.auth)
    except ProxyError:
        return False  # it will be refused
    return place.needs_model(client)


def refuse_unread(request: Request) -> None:
    """Refuse a body whose model must be known, if its type is none that is read.

    Raises:
        ProxyError: 415.
    """
    if not is_readable(request.first.get(b"content-type")):
        raise unread_body("The type of the body must be JSON or a form here.")


def unread_body(text: str) -> ProxyError:
    """Return the refusal of a type, which says what types would do (RFC 9110, section 15.5.16)."""
    accept = (b"accept", b"application/json, multipart/form-data")
    return ProxyError(415, "unread_body", text, fields=(accept,))


def _asks_for_websocket(request: Request) -> bool:
    return is_handshake(request.fields, request.clientproto)


def _came_through(request: Request, pseudonym: bytes) -> bool:
    return any(pseudonym in _hops(value) for name, value in request.fields if name == b"via")


def _hops(via: bytes) -> list[bytes]:
    """Return the pseudonyms of a ``Via`` line, in lower case (RFC 9110, section 7.6.3)."""
    parts = (hop.split() for hop in via.lower().split(b","))
    return [part[1] for part in parts if len(part) > 1]
