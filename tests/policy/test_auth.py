"""From a presented key to the client: which fields speak, and what is refused."""

from __future__ import annotations

import hashlib
from base64 import b64encode
from collections.abc import Callable
from functools import partial
from typing import Any
from urllib.parse import quote_from_bytes

import pytest

from llmproxy.config import Client, ClientKey, Config, Proxy
from llmproxy.dialects.dialect import Dialect
from llmproxy.dialects.errors import error_body
from llmproxy.errors import ProxyError
from llmproxy.http1.grammar import Fields, first_values
from llmproxy.http1.headers import KEY_FIELDS
from llmproxy.policy.auth import ANONYMOUS, Auth, KeyPlaces, cut_keys, soonest_ends


def client(name: str, *keys: str) -> Client:
    """Return a client with these keys."""
    return Client(name=name, keys=tuple(ClientKey(hash=digest(key)) for key in keys))


def digest(key: str) -> bytes:
    """Return the digest of a key."""
    return hashlib.sha256(key.encode()).digest()


MADE = "llmp_" + "aB3-_" * 8 + "xyz"
"""A key as ``llmproxy keys new`` makes one."""

OWN, LONG = "an-operators:own/key==", "operators-own_key.2026"
ODD = "an odd, key; of=ours"
CLIENTS = {"a": client("a", "key-a", "key-a2"), "b": client("b", "key-b", MADE, OWN, LONG, ODD)}
_HERE = KeyPlaces()
NOW = 1000.0


PASSING, IN_QUERY = KeyPlaces(passes=True), KeyPlaces(query=b"key")


def identify(
    fields: Fields,
    target: bytes = b"/v1",
    *,
    anonymous: bool = False,
    places: KeyPlaces = _HERE,
    clients: dict[str, Client] = CLIENTS,
) -> str:
    """Return the name of the client that fields and target identify.

    The short way, which knows the first value of each field, must come to the same.
    """
    auth = Auth(Config(proxy=Proxy(anonymous=anonymous), clients=clients), lambda: NOW)
    found, other = (
        _outcome(partial(auth.identify, fields, target, places, *first))
        for first in ((), (first_values(fields),))
    )
    if isinstance(found, ProxyError) and isinstance(other, ProxyError):
        assert (found.reason, str(found)) == (other.reason, str(other))
        raise found
    assert found is other
    name: str = found.name
    return name


def _outcome(call: Callable[[], Client]) -> Any:
    try:
        return call()
    except ProxyError as error:
        return error


def refusal(
    fields: Fields,
    target: bytes = b"/v1",
    *,
    anonymous: bool = False,
    places: KeyPlaces = _HERE,
) -> ProxyError:
    """Return why fields and target are refused."""
    with pytest.raises(ProxyError) as caught:
        identify(fields, target, anonymous=anonymous, places=places)
    return caught.value


@pytest.mark.parametrize(
    ("name", "value"),
    [
        (b"x-llmproxy-key", b"key-a"),
        (b"x-api-key", b"key-a"),
        (b"api-key", b"key-a"),
        (b"x-goog-api-key", b"key-a"),
        (b"authorization", b"Bearer key-a"),
        (b"authorization", b"bearer key-a"),
        (b"authorization", b"BEARER   key-a "),
        (b"x-api-key", b"key-a2"),
    ],
)
def test_a_key_names_its_client(name: bytes, value: bytes) -> None:
    """Every field in which an SDK sends its key is read, and each of a client's keys is good."""
    assert identify([(b"x", b"y"), (name, value)]) == "a"


def test_keys_that_agree_are_one_client() -> None:
    """The same client may be named twice, by two of its keys."""
    assert identify([(b"x-api-key", b"key-a"), (b"authorization", b"Bearer key-a2")]) == "a"


def test_without_a_key_no_client_is_known() -> None:
    """The refusal is a 401, and says how to send a key."""
    error = refusal([(b"cookie", b"key-a"), (b"proxy-authorization", b"Bearer key-a")])

    assert (error.status, error.reason) == (401, "no_key")
    assert (b"www-authenticate", b"Bearer") in error.fields


@pytest.mark.parametrize("anonymous", [True, False])
@pytest.mark.parametrize(
    "fields",
    [
        [(b"x-api-key", b"wrong")],
        [(b"x-api-key", b"Bearer key-a")],
        [(b"x-api-key", b"KEY-A")],
        [(b"authorization", b"key-a")],
        [(b"authorization", b"Bearer key-a key-a")],
        [(b"authorization", b"Basic a2V5LWE=")],
        [(b"authorization", b"Basic")],
        [(b"x-llmproxy-key", hashlib.sha256(b"key-a").hexdigest().encode())],
        [(b"x-api-key", b"wrong"), (b"api-key", b"worse")],
    ],
)
def test_a_wrong_key_is_refused(fields: Fields, anonymous: bool) -> None:
    """Where no key is known, an unknown one is a 401, also where nobody needs a key."""
    error = refusal(fields, anonymous=anonymous)

    assert (error.status, error.reason) == (401, "unknown_key")
    assert (b"www-authenticate", b"Bearer") in error.fields


OTHERS = {
    "unknown": b"sk-of-the-environment",
    "with a blank": b"key-a ",
    "another scheme": b"Basic a2V5LWI=",
    "another client's": b"key-b",
}


@pytest.mark.parametrize("kind", list(OTHERS)[:3])
@pytest.mark.parametrize("second", KEY_FIELDS)
@pytest.mark.parametrize("first", [b"x-llmproxy-key", *KEY_FIELDS])
def test_an_unknown_key_does_not_count_beside_a_known_one(
    first: bytes, second: bytes, kind: str
) -> None:
    """Programs send a key of the provider's from their environment, too; the order is no matter."""
    good = (first, b"Bearer key-a" if first == b"authorization" else b"key-a")
    other = (second, OTHERS[kind])
    assert identify([good, other]) == identify([other, good]) == "a"
    assert identify([good, (b"x-api-key", b"key-a2"), other]) == "a"


@pytest.mark.parametrize("second", KEY_FIELDS)
def test_our_own_field_decides(second: bytes) -> None:
    """A known key in ``x-llmproxy-key`` counts, whatever the others; an unknown one does not."""
    other = (second, b"Bearer key-b" if second == b"authorization" else b"key-b")
    assert identify([other, (b"x-llmproxy-key", b"key-a")]) == "a"
    assert identify([other, (b"x-llmproxy-key", b"wrong")]) == "b"
    error = refusal([(b"x-llmproxy-key", b"key-a"), (b"x-llmproxy-key", b"key-b")])
    assert error.reason == "keys_disagree"


@pytest.mark.parametrize("second", [b"authorization", b"x-api-key", b"x-goog-api-key"])
def test_keys_that_disagree_are_refused(second: bytes) -> None:
    """Two clients in one request are a 401, which names the fields."""
    value = b"Bearer key-b" if second == b"authorization" else b"key-b"
    error = refusal([(b"api-key", b"key-a"), (second, value), (b"x-api-key", b"unknown")])

    assert (error.status, error.reason) == (401, "keys_disagree")
    said = "api-key and " + second.decode()
    assert str(error) == f"The keys in {said} name different clients."


def test_a_refusal_names_the_fields_at_fault() -> None:
    """Each field once, and never a value."""
    shown = [(b"x-api-key", b"wrong"), (b"authorization", b"Bearer w"), (b"x-api-key", b"worse")]
    text = "The key in x-api-key and authorization is not one of this proxy's client keys."
    assert str(refusal(shown)) == text
    hint = " Authorization must be a Bearer key."
    assert str(refusal([(b"authorization", b"key-a")])).endswith(hint)
    assert "the query" in str(refusal([], b"/v1?key=wrong", places=IN_QUERY))


def test_a_request_without_a_key_may_be_anonymous() -> None:
    """The configuration may allow this; a key still identifies its client."""
    assert identify([], anonymous=True) == ANONYMOUS.name == "anonymous"
    assert identify([(b"x-api-key", b"key-b")], anonymous=True) == "b"


@pytest.mark.parametrize("name", KEY_FIELDS)
def test_with_pass_credential_the_sdks_fields_are_the_providers(name: bytes) -> None:
    """Only our own field identifies the client; the others are forwarded unread."""
    fields = [(name, b"sk-provider")]
    assert identify([*fields, (b"x-llmproxy-key", b"key-a")], places=PASSING) == "a"
    assert identify(fields, places=PASSING, anonymous=True) == "anonymous"
    assert refusal(fields, places=PASSING).reason == "no_key"
    wrong = [*fields, (b"x-llmproxy-key", b"wrong")]
    assert refusal(wrong, places=PASSING).reason == "unknown_key"


def test_no_key_is_repeated() -> None:
    """Neither the error nor its body repeats the key that was sent."""
    for fields in ([(b"x-api-key", b"s3cret")], [(b"authorization", b"Basic s3cret")]):
        error = refusal(fields)
        shown = f"{error} {error.detail} {error.fields}".encode()
        assert b"s3cret" not in shown + error_body(error, Dialect.OPENAI, "id")


# --- no key ---------------------------------------------------------------------------------------

EMPTY: list[tuple[bytes, bytes]] = [
    (b"authorization", b""),
    (b"authorization", b"Bearer"),
    (b"authorization", b"bearer "),
    *((name, b"") for name in (b"x-llmproxy-key", *KEY_FIELDS[1:])),
]


@pytest.mark.parametrize("field", EMPTY)
def test_an_empty_field_is_no_key(field: tuple[bytes, bytes]) -> None:
    """Editors send one where nobody has set a key, also beside a field that holds one."""
    assert refusal([field]).reason == "no_key"
    assert identify([field], anonymous=True) == "anonymous"
    for good in ((b"x-llmproxy-key", b"key-a"), (b"x-api-key", b"key-a")):
        assert identify([field, good]) == identify([good, field]) == "a"


def test_an_empty_field_is_no_key_where_others_are_forwarded() -> None:
    """There our own field alone speaks, and an empty one says nothing."""
    provider = (b"authorization", b"Bearer sk-provider")
    assert refusal([(b"x-llmproxy-key", b""), provider], places=PASSING).reason == "no_key"
    assert identify([(b"x-llmproxy-key", b"key-a"), *EMPTY[:3]], places=PASSING) == "a"


# --- a key in the query ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    "target",
    [
        b"/v1?key=key-a",
        b"/v1?alt=sse&key=key-a",
        b"/v1?key=key-a&key=key-a2",
        b"/v1?key=&key=key-a",
        b"/v1?k%65y=%6bey-a",
    ],
)
def test_a_key_in_the_query_names_its_client(target: bytes) -> None:
    """It is read where a provider asks for it, encoded or not, alone or beside a header."""
    assert identify([], target, places=IN_QUERY) == "a"
    assert identify([(b"x-goog-api-key", b"key-a2")], target, places=IN_QUERY) == "a"
    disagreeing = refusal([(b"x-api-key", b"key-b")], target, places=IN_QUERY)
    assert disagreeing.reason == "keys_disagree"


def test_a_wrong_key_in_the_query_is_refused() -> None:
    """An empty one is none."""
    assert refusal([], b"/v1?key=wrong", places=IN_QUERY).reason == "unknown_key"
    assert refusal([], b"/v1?key=key-a+", places=IN_QUERY).reason == "unknown_key"
    assert refusal([], b"/v1?KEY=wrong", places=IN_QUERY).reason == "no_key"
    assert refusal([], b"/v1?key=", places=IN_QUERY).reason == "no_key"
    assert identify([], b"/v1?key", places=IN_QUERY, anonymous=True) == "anonymous"


@pytest.mark.parametrize(
    ("target", "keys", "rest"),
    [
        (b"/v1", [], b"/v1"),
        (b"/v1?", [], b"/v1?"),
        (b"/v1?a=%6b&&b", [], b"/v1?a=%6b&&b"),
        (b"/v1?key=k", [b"k"], b"/v1"),
        (b"/v1?key=k&", [b"k"], b"/v1"),
        (b"/v1?key=", [], b"/v1"),
        (b"/v1?a=1&key=k%2B+&b={x}", [b"k+ "], b"/v1?a=1&b={x}"),
        (b"/v1?key=k&a=?key=2&k%65y=l", [b"k", b"l"], b"/v1?a=?key=2"),
        (b"/v1?keys=1&xkey=2&key.x=3", [], b"/v1?keys=1&xkey=2&key.x=3"),
    ],
)
def test_a_key_is_cut_out_of_the_query(target: bytes, keys: list[bytes], rest: bytes) -> None:
    """All else stays byte for byte."""
    assert cut_keys(target, b"key") == (keys, rest)
    assert cut_keys(target, None) == ([], target)


# --- a key that would cross -----------------------------------------------------------------------


@pytest.mark.parametrize("name", KEY_FIELDS)
@pytest.mark.parametrize(
    "value",
    [
        "{}",
        "Bearer {}",
        "bearer  {}",
        "Bearer {} ",
        "Token {}",
        "{}, {}",
        "sk-provider,{}",
        "Bearer sk-provider, Bearer {}",
        "Bearer {};v=1",
        'Key="{}"',
        "Token token={}",
        "\t{}",
        "Basic {basic}",
    ],
)
@pytest.mark.parametrize("own", [[], [(b"x-llmproxy-key", b"key-b")]], ids=["anonymous", "known"])
@pytest.mark.parametrize("key", ["key-b", MADE, OWN])
def test_a_clients_key_never_crosses_as_the_providers(
    name: bytes, value: str, own: Fields, key: str
) -> None:
    """Where the SDK's fields are forwarded, a key of ours in one of them is refused."""
    basic = b64encode(f"user:{key}".encode()).decode()
    field = (name, value.format(key, key, basic=basic).encode())
    refused = refusal([*own, field], places=PASSING, anonymous=True)

    assert (refused.status, refused.reason) == (401, "misplaced_key")
    assert name.decode() in refused.message
    assert key not in refused.message
    assert refusal([field], places=PASSING).reason == "misplaced_key"


@pytest.mark.parametrize(
    "value", ["{}", "Bearer {}", "Bearer  {}", "Token   {}  ", "Basic {basic}"]
)
def test_a_key_with_separators_of_its_own_does_not_cross(value: str) -> None:
    """It is found as a whole, behind a scheme, and in Basic."""
    basic = b64encode(f"user:{ODD}".encode()).decode()
    field = (b"authorization", value.format(ODD, basic=basic).encode())
    assert refusal([field], places=PASSING, anonymous=True).reason == "misplaced_key"
    assert identify([(b"authorization", b"Basic !")], places=PASSING, anonymous=True) == "anonymous"


CROSSING: list[tuple[Fields, bytes, str]] = [
    ([(b"cookie", b"a=b; session={}")], b"/v1", "the header cookie"),
    ([(b"x-upstream-auth", b"Bearer {}")], b"/v1", "the header x-upstream-auth"),
    ([(b"x-request-id", b"{}")], b"/v1", "the header x-request-id"),
    ([], b"/v1?token={}", "the query"),
    ([], b"/v1?a=Bearer%20{}", "the query"),
    ([], b"/v1?a=1&{}", "the query"),
]
HIDDEN: list[tuple[Fields, bytes, str]] = [
    ([(b"x-a", b"k-{}.x")], b"/v1", "the header x-a"),
    ([], b"/{}/v1", "the path"),
    ([], b"/v1?x=-{}-", "the query"),
]


@pytest.mark.parametrize("places", [_HERE, PASSING, IN_QUERY])
@pytest.mark.parametrize(
    ("fields", "target", "place", "key"),
    [
        *((*case, key) for case in CROSSING for key in ("key-b", MADE, LONG)),
        *((*case, key) for case in HIDDEN for key in (MADE, LONG)),
        ([(b"x-a", b"Bearer {}")], b"/v1", "the header x-a", OWN),
        ([], b"/v1?x={}", "the query", OWN),
    ],
)
def test_the_presented_key_is_found_wherever_it_would_cross(
    fields: Fields, target: bytes, place: str, key: str, places: KeyPlaces
) -> None:
    """Any header, the path and the query are searched, and the refusal names the place."""
    plain = key.encode()
    shown = [(b"x-llmproxy-key", plain)]
    found = [(name, value.replace(b"{}", plain)) for name, value in fields]
    encoded = b"%%%02x" % plain[0] + quote_from_bytes(plain[1:], "").encode()
    for spelt in (encoded, quote_from_bytes(plain, "").encode()):
        refused = refusal([*shown, *found], target.replace(b"{}", spelt), places=places)
        assert (refused.status, refused.reason) == (401, "misplaced_key")
        assert f" {place}," in refused.message


@pytest.mark.parametrize(
    ("fields", "target"),
    [
        ([(b"cookie", b"llm=" + MADE.encode())], b"/v1"),
        ([(b"x-prefixed", b"k-" + MADE.encode() + b".x")], b"/v1"),
        ([], b"/v1?x=" + MADE.encode()),
        ([], b"/" + MADE.encode() + b"/v1"),
        ([], b"/%6c" + MADE[1:].encode() + b"/v1"),
    ],
)
def test_a_key_that_we_made_is_found_although_it_is_not_presented(
    fields: Fields, target: bytes
) -> None:
    """It is known by its form; one that nobody has crosses."""
    for shown in ([], [(b"x-llmproxy-key", b"key-a")]):
        assert refusal([*shown, *fields], target, anonymous=True).reason == "misplaced_key"
    other = MADE[:-1] + "_"
    changed = [(name, value.replace(MADE.encode(), other.encode())) for name, value in fields]
    target = target.replace(MADE[1:].encode(), other[1:].encode())
    assert identify([*changed, (b"x-llmproxy-key", b"key-a")], target) == "a"


@pytest.mark.parametrize("target", [b"/v1?key=key-b", b"/v1?x=key-b", b"/v1?key=k%65y-b&a"])
def test_a_key_in_a_query_that_is_not_read_is_refused(target: bytes) -> None:
    """Without ``key_query`` the query would cross; the caller learns why its key was not seen."""
    for places in (_HERE, PASSING):
        for anonymous in (True, False):
            refused = refusal([], target, places=places, anonymous=anonymous)
            assert refused.reason == "misplaced_key"
            assert "the query" in refused.message
    assert identify([(b"x-llmproxy-key", b"key-a")], b"/v1?key=theirs") == "a"


@pytest.mark.parametrize(("length", "found"), [(15, False), (16, True)])
def test_a_short_key_may_be_part_of_a_word_by_chance(length: int, found: bool) -> None:
    """From 16 bytes on it cannot."""
    key = "k" * length
    auth = Auth(Config(clients={"c": client("c", key)}), lambda: NOW)
    fields = [(b"x-llmproxy-key", key.encode()), (b"x-a", b"a" + key.encode() + b"z")]
    if found:
        with pytest.raises(ProxyError):
            auth.identify(fields, b"/", KeyPlaces())
    else:
        assert auth.identify(fields, b"/", KeyPlaces()).name == "c"


def test_what_only_looks_like_a_key_crosses() -> None:
    """A short key is no part of a longer word, and what is dropped anyway may hold a key."""
    shown = (b"x-llmproxy-key", b"key-a")
    fields = [(b"user-agent", b"key-agent/1.0"), (b"x-a", b"xkey-a"), (b"x-b", b"llmp_short")]
    dropped = [(b"proxy-authorization", b"Bearer key-a"), (b"x-forwarded-key", MADE.encode())]

    assert identify([shown, *fields, *dropped, (b"api-key", b"key-a")], b"/key-a/b?c=key-ab") == "a"


@pytest.mark.parametrize("query", [b"&".join([b"a"] * 1001), b"a=" + b"+".join([b"b"] * 1001)])
@pytest.mark.parametrize("anonymous", [True, False])
def test_what_is_hashed_of_a_query_is_bounded(query: bytes, anonymous: bool) -> None:
    """Whoever shows no key gets no work done; else a query with too many words is refused."""
    refused = refusal([], b"/x?" + query, anonymous=anonymous)
    assert refused.reason == ("bad_query" if anonymous else "no_key")


def test_a_key_does_not_cross_as_a_hop() -> None:
    """The client's ``Via`` stands before ours."""
    key = LONG.encode()
    assert refusal([(b"x-api-key", key), (b"via", b"1.1 " + key)]).cause == "the header via"


# --- keys that expire -----------------------------------------------------------------------------


def expiring(name: str, **ends: float | None) -> Client:
    """Return a client whose keys expire then."""
    keys = (ClientKey(hash=digest(key), expires=end) for key, end in ends.items())
    return Client(name=name, keys=tuple(keys))


ROTATING = {
    "a": expiring("a", old=NOW - 1, new=NOW + 0.1, now=NOW),
    "b": expiring("b", gone=NOW - 1, lasting=None),
}


@pytest.mark.parametrize(("key", "name"), [("new", "a"), ("lasting", "b")])
def test_a_key_is_good_until_it_expires(key: str, name: str) -> None:
    """Two keys of a client are good at a time, so that one can take the place of the other."""
    assert identify([(b"x-api-key", key.encode())], clients=ROTATING) == name


@pytest.mark.parametrize("key", ["old", "now", "gone"])
@pytest.mark.parametrize("anonymous", [False, True])
def test_a_key_that_has_expired_is_refused(key: str, anonymous: bool) -> None:
    """Only who shows the right key is told so; nobody becomes anonymous by it."""
    for fields in (
        [(b"x-api-key", key.encode())],
        [(b"authorization", b"Bearer " + key.encode()), (b"x-kept", b"1")],
    ):
        with pytest.raises(ProxyError) as caught:
            identify(fields, clients=ROTATING, anonymous=anonymous)
        assert (caught.value.status, caught.value.reason) == (401, "key_expired")
        assert f"The key in {fields[0][0].decode()} has expired." in caught.value.message
        assert (b"www-authenticate", b"Bearer") in caught.value.fields
    with pytest.raises(ProxyError) as caught:
        identify([(b"x-api-key", key.encode() + b"x")], clients=ROTATING, anonymous=anonymous)
    assert caught.value.reason == "unknown_key"


def test_one_good_key_of_the_client_is_enough() -> None:
    """A program may send the key of before from its environment, beside the new one."""
    fields = [(b"x-api-key", b"old"), (b"authorization", b"Bearer new")]
    assert identify(fields, clients=ROTATING) == "a"
    fields[1] = (b"authorization", b"Bearer now")
    with pytest.raises(ProxyError, match="The key in x-api-key and authorization has expired"):
        identify(fields, clients=ROTATING)


def test_keys_of_two_clients_disagree_whether_or_not_one_has_expired() -> None:
    """It is not for an expired key to say who calls, and not for chance either."""
    fields = [(b"x-api-key", b"old"), (b"authorization", b"Bearer lasting")]
    with pytest.raises(ProxyError) as caught:
        identify(fields, clients=ROTATING)
    assert caught.value.reason == "keys_disagree"


def test_an_expired_key_does_not_cross_either() -> None:
    """It is as much a secret of the client's as before."""
    with pytest.raises(ProxyError) as caught:
        identify([(b"x-api-key", b"new")], b"/v1?key=old", clients=ROTATING)
    assert caught.value.reason == "misplaced_key"


@pytest.mark.parametrize(
    ("ends", "soonest"),
    [
        ({"k": None}, None),
        ({"k": NOW + 9}, NOW + 9),
        ({"k": NOW + 9, "l": NOW + 5, "m": None}, NOW + 5),
        ({"k": NOW - 9, "l": NOW + 5}, NOW + 5),
        ({"k": NOW - 9, "l": NOW - 5}, NOW - 5),
        ({"k": NOW - 9, "l": None}, None),
    ],
)
def test_the_next_end_of_a_clients_keys(
    ends: dict[str, float | None], soonest: float | None
) -> None:
    """It is what an alert waits for: an old key that is still in the file is not."""
    config = Config(clients={"c": expiring("c", **ends)})
    assert soonest_ends(config, NOW) == ({} if soonest is None else {"c": soonest})


# --- Proxy-Authorization --------------------------------------------------------------------------


def by_proxy(value: bytes, *, clients: dict[str, Client] = CLIENTS, now: float = NOW) -> str:
    """Return the client that ``Proxy-Authorization`` names, or status and reason."""
    auth = Auth(Config(clients=clients), lambda: now)
    try:
        return auth.identify_proxy(value).name
    except ProxyError as error:
        asks = error.fields == ((b"proxy-authenticate", b'Basic realm="llmproxy"'),)
        return error.reason if asks and error.status == 407 else f"{error.status}"


def pair(text: str) -> bytes:
    """Return the credentials of Basic."""
    return b"Basic " + b64encode(text.encode())


@pytest.mark.parametrize(
    ("value", "name"),
    [
        (pair("a:key-a"), "a"),
        (pair("a:key-a2"), "a"),
        (pair("key-a:"), "a"),
        (pair("key-a"), "a"),
        (pair(f"b:{OWN}"), "b"),
        (pair("b:" + quote_from_bytes(OWN.encode(), safe="")), "b"),
        (pair(f"b:{MADE}"), "b"),
        (pair("%61:key-a"), "a"),
        (b"basic   " + b64encode(b"a:key-a"), "a"),
        (b"Bearer key-a", "a"),
        (b"bearer  " + MADE.encode(), "b"),
        (pair("b:key-a"), "keys_disagree"),
        (pair("nobody:key-a"), "keys_disagree"),
        (pair("a:key-x"), "unknown_key"),
        (pair("a:"), "unknown_key"),
        (pair(":key-a"), "a"),
        (pair(":"), "unknown_key"),
        (b"Basic", "unknown_key"),
        (b"Basic a:key-a", "no_key"),
        (b"Basic " + b64encode(b"a:key-a")[:-3], "no_key"),
        (b"Digest key-a", "no_key"),
        (b"key-a", "no_key"),
        (b"", "no_key"),
    ],
)
def test_a_proxy_s_credentials_name_the_client(value: bytes, name: str) -> None:
    """As the URL of a proxy has them, percent-decoded or not, or as a bearer key."""
    assert by_proxy(value) == name


def test_a_proxy_s_key_expires_as_any_other() -> None:
    """The text says so, and the client may ask again with another one."""
    key = ClientKey(hash=digest("key"), expires=NOW)
    clients = {"a": Client(name="a", keys=(key,))}
    assert by_proxy(pair("a:key"), clients=clients, now=NOW - 1) == "a"
    assert by_proxy(pair("a:key"), clients=clients) == "key_expired"


def within(value: bytes, fields: Fields, target: bytes = b"/v1", places: KeyPlaces = _HERE) -> str:
    """Return the client of a request behind a CONNECT with these credentials."""
    auth = Auth(Config(clients=CLIENTS), lambda: NOW)
    try:
        return auth.identify_within(value, fields, target, places).name
    except ProxyError as error:
        return error.reason if error.status == 401 else f"{error.status}"


@pytest.mark.parametrize("name", [b"authorization", b"x-api-key", b"x-goog-api-key", b"api-key"])
@pytest.mark.parametrize("value", [b"Bearer placeholder", b"Bearer key-b", b"key-b", b""])
def test_keys_behind_a_connect_that_named_its_client_do_not_count(
    name: bytes, value: bytes
) -> None:
    """They are dropped: what a sandboxed program has is a placeholder, or somebody's mistake."""
    assert within(pair("a:key-a"), [(name, value)]) == "a"


def test_credentials_of_a_connect_are_looked_at_anew() -> None:
    """For each request: a key that is no client's any more ends the connection's use."""
    assert within(pair("a:gone"), []) == "unknown_key"


@pytest.mark.parametrize(
    ("fields", "target"),
    [([(b"x-other", MADE.encode())], b"/v1"), ([], b"/v1/" + MADE.encode())],
)
def test_a_client_s_key_does_not_cross_behind_a_connect_either(
    fields: Fields, target: bytes
) -> None:
    """In what the provider gets."""
    assert within(pair("a:key-a"), fields, target) == "misplaced_key"
    assert within(pair("a:key-a"), [], b"/v1?key=key-b", IN_QUERY) == "a"
