"""From the keys that a request presents to the client that it comes from.

Keys are compared by their SHA-256 digest, and are never kept, logged or put into an error.  A key
of a client's never crosses to a provider: one that stands anywhere in what would cross is refused,
and the refusal names the place.  Nothing here knows routes or providers: :class:`KeyPlaces` says
where keys stand (ADR-0018).
"""

from __future__ import annotations

import binascii
import hashlib
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from urllib.parse import unquote_to_bytes

import msgspec

from llmproxy.config import Client, Config
from llmproxy.errors import ProxyError
from llmproxy.http1.grammar import Fields
from llmproxy.http1.headers import KEY_FIELDS, OWN_KEY_FIELD, is_owned
from llmproxy.http1.query import without

ANONYMOUS = Client(name="anonymous", keys=())
"""The client of a request without a key, where such requests are allowed."""

KEY_PREFIX = "llmp_"
"""How the keys begin that ``llmproxy keys new`` makes."""

_MADE_KEY = re.compile(KEY_PREFIX.encode("ascii") + rb"[A-Za-z0-9_-]{43}")
"""Such a key, wherever it stands: 32 bytes in URL-safe base64."""

_PREFIX = KEY_PREFIX.encode("ascii")

MISPLACED, THE_PATH = "misplaced_key", "the path"
"""The reason of the error for a key that would cross, and its cause where the path holds the key:
what a client wrote itself is then in no record."""

_IN_QUERY = b"the query"

NO_FIELDS: Mapping[bytes, bytes] = {}

_OWN_KEY_FIELDS = frozenset((OWN_KEY_FIELD,))
_KEY_FIELDS = (OWN_KEY_FIELD, *KEY_FIELDS)
_ALL_KEY_FIELDS = frozenset(_KEY_FIELDS)

# CPython raises and drops a TypeError wherever it looks for bytes in bytes, but not for a number.
_QUESTION, _PERCENT, _UNDERSCORE = b"?%_"

_GLANCE = 1024
"""Bytes of a request without a key in which a key is looked for, to say where it should stand."""

_MOST_WORDS = 1000
"""How many words of a value, or parameters of a query, are looked at; each is hashed."""

_UNMISTAKABLE = 16
"""Length from which a key is found within a longer word; a shorter one may be in it by chance."""

_GAPS = re.compile(rb"[\s,;]+")
_MARKS = re.compile(rb"[\s,;:=&|\"'()<>\[\]{}]+")
"""What may stand between a key and its surroundings; keys of operators' own may hold some of it."""


class KeyPlaces(msgspec.Struct, frozen=True):
    """Where the keys of callers stand, as a provider has it.

    Attributes:
        passes: the SDK's key fields are the provider's, and cross; only ``x-llmproxy-key`` speaks.
        query: the parameter of the query that holds a key, or None.
        dropped: the parameters of the query that do not cross, from ``names_of``: what stands in
            them is not looked at.
    """

    passes: bool = False
    query: bytes | None = None
    dropped: frozenset[bytes] = frozenset()


class Auth:
    """Every client's keys, by digest.

    Args:
        config: the clients.
        wall: seconds since the epoch.
    """

    def __init__(self, config: Config, wall: Callable[[], float]) -> None:
        self._anonymous = config.proxy.anonymous
        self._wall = wall
        keys = [(key, client) for client in config.clients.values() for key in client.keys]
        self._clients = {key.hash: client for key, client in keys}
        self._ends = {key.hash: key.expires for key, _ in keys if key.expires is not None}

    def identify(
        self,
        fields: Fields,
        target: bytes,
        places: KeyPlaces,
        first: Mapping[bytes, bytes] = NO_FIELDS,
    ) -> Client:
        """Return the client that the request's keys name.

        Args:
            fields: the request's header fields.
            target: path and query, as the client sent them.
            places: where keys stand.
            first: the first value of each field, where that is known already; it saves time.

        Raises:
            ProxyError: 401, where no key is shown and nobody is anonymous, none of the keys is
                known, two of them name different clients, the client's key has expired, or a
                client's key stands in what would cross.
        """
        if len(first) == len(fields) and not places.passes:
            usual = self._usual(target, first)
            if usual is not None:
                return usual
        in_query, target = cut_keys(target, places.query)
        shown = [(_IN_QUERY, key) for key in in_query]
        if places.dropped:
            target = without(target, places.dropped)
        names = _OWN_KEY_FIELDS if places.passes else _ALL_KEY_FIELDS
        crossing = []
        for name, value in fields:
            if name not in names:
                crossing.append(value)
            elif key := _key(name, value):
                shown.append((name, key))
        known = {key: client for _, key in shown if (client := self._client_of(key)) is not None}
        client = _named_by(shown, known)
        said = b"\n".join([target, *crossing])
        is_short = len(said) <= _GLANCE or _PREFIX in said
        if client is None and not (self._anonymous or places.passes or is_short):
            raise _unauthorized("no_key", "No key was given. Send one of this proxy's client keys.")
        self._refuse_misplaced(list(known), said, fields, target, places)
        if client is not None:
            if self._ends and all(map(self._is_expired, _of(client, known))):
                raise _expired(shown, known, client)
            return client
        if self._anonymous:
            return ANONYMOUS
        raise _unauthorized("no_key", "No key was given. Send one of this proxy's client keys.")

    def identify_proxy(self, value: bytes) -> Client:
        """Return the client that a ``Proxy-Authorization`` names (RFC 9110, section 11.7.1).

        It is Basic with ``NAME:KEY`` (RFC 7617), as a proxy's URL has it, or Bearer with a key.
        NAME is the client's; the password may be percent-encoded, because some programs do not
        decode it; and a key may stand alone, before the colon.

        Raises:
            ProxyError: 407.
        """
        scheme, _, rest = value.partition(b" ")
        name, keys = b"", [rest.strip(b" ")]
        if scheme.lower() == b"basic":
            try:
                pair = binascii.a2b_base64(rest.strip(b" "), strict_mode=True)
            except binascii.Error:
                raise _proxy_unauthorized("no_key", "Proxy-Authorization is malformed.") from None
            name, _, password = pair.partition(b":")
            if not password:
                name, password = b"", name
            keys = [password, unquote_to_bytes(password)]
        elif scheme.lower() != b"bearer":
            text = "Proxy-Authorization must be Basic NAME:KEY or a Bearer key."
            raise _proxy_unauthorized("no_key", text)
        for key in keys:
            client = self._client_of(key)
            if client is not None and key:
                break
        else:
            text = "The key in Proxy-Authorization is not one of this proxy's client keys."
            raise _proxy_unauthorized("unknown_key", text)
        if name and client.name.encode() not in (name, unquote_to_bytes(name)):
            text = "The key in Proxy-Authorization is not a key of the client that it names."
            raise _proxy_unauthorized("keys_disagree", text)
        if self._ends and self._is_expired(key):
            text = "The key in Proxy-Authorization has expired. Ask the operator for a new one."
            raise _proxy_unauthorized("key_expired", text, detail=f"a key of {client.name}")
        return client

    def identify_within(
        self, authorization: bytes, fields: Fields, target: bytes, places: KeyPlaces
    ) -> Client:
        """Return the client of a request behind a CONNECT that named it; keys in it do not count.

        Args:
            authorization: the CONNECT's ``Proxy-Authorization``; it is looked at anew each time.
            fields: the request's header fields.
            target: path and query, as the client sent them.
            places: where keys stand.

        Raises:
            ProxyError: 401, where that names nobody any more, or a client's key stands in what
                would cross.
        """
        try:
            client = self.identify_proxy(authorization)
        except ProxyError as error:
            raise _unauthorized(error.reason, error.message, detail=error.detail) from None
        self.refuse_crossing(fields, target, places)
        return client

    def refuse_crossing(self, fields: Fields, target: bytes, places: KeyPlaces) -> None:
        """Refuse a client's key in what crosses of a request that shows elsewhere who calls.

        Args:
            fields: the request's header fields.
            target: path and query, as the client sent them.
            places: where keys stand; those there do not count.

        Raises:
            ProxyError: 401.
        """
        _, target = cut_keys(target, places.query)
        if places.dropped:
            target = without(target, places.dropped)
        names = _OWN_KEY_FIELDS if places.passes else _ALL_KEY_FIELDS
        crossing = b"\n".join([target, *(value for name, value in fields if name not in names)])
        self._refuse_misplaced([], crossing, fields, target, places)

    def refuse_expired(self, client: Client) -> None:
        """Refuse a client all of whose keys have expired, as its keys would be.

        Raises:
            ProxyError: 401.
        """
        ends = [self._ends.get(key.hash) for key in client.keys]
        if ends and all(end is not None and self._wall() >= end for end in ends):
            text = "Each key of this client has expired."
            raise _unauthorized("key_expired", text, detail=f"the keys of {client.name}")

    def may_expire(self, client: Client) -> bool:
        """Return whether a key of a client expires some time."""
        return any(key.hash in self._ends for key in client.keys)

    def _usual(self, target: bytes, first: Mapping[bytes, bytes]) -> Client | None:
        """Return the client of a usual request; None where there must be a closer look.

        It presents one key in one field, and nothing else of it holds that key or the beginning of
        one that we made.
        """
        shown = [*filter(first.__contains__, _KEY_FIELDS)]
        if len(shown) != 1 or _QUESTION in target or _PERCENT in target:
            return None
        (name,) = shown
        key = first[name]
        if name == b"authorization":
            if not key.startswith((b"Bearer ", b"bearer ")):
                return None
            key = key[7:].strip(b" ")
        if not key:
            return None
        before, _, after = b"\n".join((target, *first.values())).partition(key)
        if after.find(key) >= 0 or _holds_prefix(before + after):
            return None
        return None if self._ends and self._is_expired(key) else self._client_of(key)

    def _is_expired(self, key: bytes) -> bool:
        """Return whether the time of a key is over."""
        end = self._ends.get(hashlib.sha256(key).digest())
        return end is not None and self._wall() >= end

    def _client_of(self, key: bytes) -> Client | None:
        return self._clients.get(hashlib.sha256(key).digest())

    # -- no key of a client's crosses -------------------------------------------------------------

    def _refuse_misplaced(
        self, keys: list[bytes], crossing: bytes, fields: Fields, target: bytes, places: KeyPlaces
    ) -> None:
        """Refuse a client's key in anything that crosses: the provider would get it.

        Args:
            keys: that the request presents; they name a client.
            crossing: all that may cross, joined: most requests are done with one look at it.
        """
        path, mark, query = target.partition(b"?")
        if _PERCENT in target:
            crossing += b"\n" + unquote_to_bytes(target)
        if _PREFIX in crossing or any(key in crossing for key in keys):
            for place, value in _places(fields, path, query, places):
                if self._is_in(value, keys):
                    raise _misplaced(place)
        if places.passes:
            for name, value in fields:
                if name in KEY_FIELDS and self._holds_a_key(_words(value)):
                    raise _misplaced(f"the header {name.decode('ascii')}")
        if mark and self._holds_a_key(word for value in _values(query) for word in _words(value)):
            raise _misplaced("the query")

    def _is_in(self, value: bytes, keys: list[bytes]) -> bool:
        """Return whether ``value`` holds one of ``keys``, or any key that we made."""
        for key in keys:
            if key in value and (len(key) >= _UNMISTAKABLE or key in _words(value)):
                return True
        return self._holds_a_key(_MADE_KEY.findall(value))

    def _holds_a_key(self, words: Iterable[bytes]) -> bool:
        return any(self._client_of(word) is not None for word in words)


def cut_keys(target: bytes, name: bytes | None) -> tuple[list[bytes], bytes]:
    """Return the keys in the query of ``target``, and ``target`` without them.

    Args:
        target: path and query.
        name: the parameter that holds a key; None leaves ``target`` as it is.
    """
    path, mark, query = target.partition(b"?")
    if not mark or name is None:
        return [], target
    keys, kept = [], []
    for piece in query.split(b"&"):
        key, _, value = piece.partition(b"=")
        if _unquoted(key) != name:
            kept.append(piece)
        elif value:  # an empty one is no key
            keys.append(_unquoted(value))
    if len(kept) == query.count(b"&") + 1:
        return [], target
    return keys, path + mark + b"&".join(kept) if any(kept) else path


def _named_by(shown: list[tuple[bytes, bytes]], known: Mapping[bytes, Client]) -> Client | None:
    """Return the client that the keys name, or None where none is shown.

    A key that is none of ours does not count beside one that is: programs send a key of the
    provider's from their environment, too.  A known key in ``x-llmproxy-key`` decides.

    Args:
        shown: the keys, each with its field.
        known: the clients of those that are ours.
    """
    ours = [(name, key) for name, key in shown if key in known]
    ours = [one for one in ours if one[0] == OWN_KEY_FIELD] or ours
    clients = {known[key].name: known[key] for _, key in ours}
    if len(clients) > 1:
        text = f"The keys in {_listed(ours)} name different clients."
        raise _unauthorized("keys_disagree", text)
    if shown and not clients:
        text = f"The key in {_listed(shown)} is not one of this proxy's client keys."
        if any(name == b"authorization" and b" " in key for name, key in shown):
            text += " Authorization must be a Bearer key."
        raise _unauthorized("unknown_key", text)
    return next(iter(clients.values()), None)


def _of(client: Client, known: Mapping[bytes, Client]) -> list[bytes]:
    """Return the keys of ``known`` that name ``client``."""
    return [key for key, one in known.items() if one is client]


def _expired(
    shown: list[tuple[bytes, bytes]], known: Mapping[bytes, Client], client: Client
) -> ProxyError:
    """Return the refusal of a client whose key has expired: it showed the right one."""
    place = _listed((name, key) for name, key in shown if key in known)
    text = f"The key in {place} has expired. Ask the operator of this proxy for a new one."
    return _unauthorized("key_expired", text, detail=f"a key of {client.name}")


def soonest_ends(config: Config, now: float) -> dict[str, float]:
    """Return when the next key of each client expires, in seconds since the epoch.

    Clients whose keys do not expire are left out.  If all keys of a client have expired, it is when
    the last one did.

    Args:
        now: seconds since the epoch.
    """
    found = {}
    for name, client in config.clients.items():
        ends = sorted(key.expires for key in client.keys if key.expires is not None)
        if (soonest := next((end for end in ends if end > now), None)) is not None:
            found[name] = soonest
        elif ends and len(ends) == len(client.keys):
            found[name] = ends[-1]
    return found


def _listed(shown: Iterable[tuple[bytes, bytes]]) -> str:
    """Return where keys were shown, in words."""
    return " and ".join(dict.fromkeys(name.decode("ascii") for name, _ in shown))


def _key(name: bytes, value: bytes) -> bytes:
    """Return the key in a key field, empty where there is none: editors send ``Bearer`` alone.

    In another scheme than Bearer it is all of the value and a blank, which is no key of ours.
    """
    if name != b"authorization" or not value:
        return value
    scheme, _, key = value.partition(b" ")
    return key.strip(b" ") if scheme.lower() == b"bearer" else value + b" "


def _unquoted(text: bytes) -> bytes:
    """Return a name or value of a query as forms encode it."""
    return unquote_to_bytes(text.replace(b"+", b" "))


def _values(query: bytes) -> Iterator[bytes]:
    """Yield what a query says, decoded: the values, and the names of those without one."""
    if query.count(b"&") >= _MOST_WORDS:
        raise _too_much("The query has more parameters than are looked at.")
    for piece in query.split(b"&"):
        name, mark, value = piece.partition(b"=")
        yield _unquoted(value if mark else name)


def _words(value: bytes) -> set[bytes]:
    """Return whatever in ``value`` may be a key, within the usual separators and Basic."""
    if _MARKS.search(value) is None:
        return {value}
    parts = _MARKS.split(value, _MOST_WORDS)
    if len(parts) > _MOST_WORDS:
        raise _too_much("A value has more words than are looked at.")
    words = {value, *parts}
    for word in _GAPS.split(value):
        words |= {word, word.partition(b"=")[2].strip(b"\"'")}
    scheme, _, rest = value.partition(b" ")
    words.add(rest.strip())
    if scheme.lower() == b"basic":
        try:
            pair = binascii.a2b_base64(rest)
        except binascii.Error:
            return words
        words |= {pair, *pair.split(b":", 1)}
    return words


def _places(
    fields: Fields, path: bytes, query: bytes, places: KeyPlaces
) -> Iterator[tuple[str, bytes]]:
    """Yield all that crosses, each with its place: the path first, because it is recorded."""
    for place, raw in ((THE_PATH, path), ("the query", query)):
        yield place, raw
        yield place, unquote_to_bytes(raw)
    for name, value in fields:
        owned = is_owned(name) and name != b"via"  # the client's hops stand before ours
        if not owned and (places.passes or name not in KEY_FIELDS):
            yield f"the header {name.decode('ascii')}", value


def _misplaced(place: str) -> ProxyError:
    text = f"A client key of this proxy stands in {place}, which is sent to the provider."
    text += " Send the key in x-llmproxy-key."
    return _unauthorized(MISPLACED, text, place)


def holds_made_key(value: bytes) -> bool:
    """Return whether a value holds what looks like a key that we made."""
    return _holds_prefix(value) and _MADE_KEY.search(value) is not None


def _holds_prefix(value: bytes) -> bool:
    """Return whether a value holds how a key that we made begins; most lack one byte of it."""
    return _UNDERSCORE in value and value.find(_PREFIX) >= 0


def _too_much(text: str) -> ProxyError:
    return ProxyError(400, "bad_query", text)


def _unauthorized(
    reason: str, message: str, place: str | None = None, detail: str = ""
) -> ProxyError:
    return ProxyError(
        401,
        reason,
        message,
        fields=((b"www-authenticate", b"Bearer"),),
        detail=detail if place is None else f"a client's key in {place}",
        cause=place,
    )


PROXY_AUTHENTICATE = (b"proxy-authenticate", b'Basic realm="llmproxy"')
"""What a 407 asks for (RFC 9110, section 11.7.1); curl and git know no other scheme by default."""


def _proxy_unauthorized(reason: str, message: str, detail: str = "") -> ProxyError:
    return ProxyError(407, reason, message, fields=(PROXY_AUTHENTICATE,), detail=detail)


def no_proxy_key() -> ProxyError:
    """Nobody says who asks for a tunnel."""
    text = "No key was given. Set HTTPS_PROXY=http://NAME:KEY@HOST:PORT with a client key."
    return _proxy_unauthorized("no_key", text)
