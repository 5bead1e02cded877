"""From a presented key to the client: which fields speak, and what is refused."""

from __future__ import annotations

import hashlib

import pytest

from llmproxy.config import Client, Config, Proxy
from llmproxy.dialects.dialect import Dialect
from llmproxy.dialects.errors import error_body
from llmproxy.errors import ProxyError
from llmproxy.http1.grammar import Fields
from llmproxy.http1.headers import KEY_FIELDS
from llmproxy.policy.auth import ANONYMOUS, Auth


def client(name: str, *keys: str) -> Client:
    """Return a client with these keys."""
    return Client(name=name, keys=tuple(hashlib.sha256(key.encode()).digest() for key in keys))


CLIENTS = {"a": client("a", "key-a", "key-a2"), "b": client("b", "key-b")}


def identify(fields: Fields, *, anonymous: bool = False, pass_credential: bool = False) -> str:
    """Return the name of the client that the fields identify."""
    auth = Auth(Config(proxy=Proxy(anonymous=anonymous), clients=CLIENTS))
    return auth.identify(fields, pass_credential=pass_credential).name


def refusal(
    fields: Fields, *, anonymous: bool = False, pass_credential: bool = False
) -> ProxyError:
    """Return why the fields are refused."""
    with pytest.raises(ProxyError) as caught:
        identify(fields, anonymous=anonymous, pass_credential=pass_credential)
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
        [(b"x-api-key", b"")],
        [(b"x-api-key", b"Bearer key-a")],
        [(b"x-api-key", b"KEY-A")],
        [(b"x-api-key", b"key-a "), (b"x-llmproxy-key", b"key-a")],
        [(b"authorization", b"key-a")],
        [(b"authorization", b"Bearer")],
        [(b"authorization", b"Bearer key-a key-a")],
        [(b"authorization", b"Basic a2V5LWE=")],
        [(b"authorization", b"")],
        [(b"x-llmproxy-key", hashlib.sha256(b"key-a").hexdigest().encode())],
        [(b"x-api-key", b"key-a"), (b"api-key", b"wrong")],
        [(b"x-api-key", b"wrong"), (b"x-api-key", b"key-a")],
    ],
)
def test_a_wrong_key_is_refused(fields: Fields, anonymous: bool) -> None:
    """Whatever else is shown, one unknown key is a 401, also where nobody needs a key."""
    error = refusal(fields, anonymous=anonymous)

    assert (error.status, error.reason) == (401, "unknown_key")
    assert (b"www-authenticate", b"Bearer") in error.fields


@pytest.mark.parametrize("second", KEY_FIELDS)
def test_keys_that_disagree_are_refused(second: bytes) -> None:
    """Two clients in one request are a 401."""
    value = b"Bearer key-b" if second == b"authorization" else b"key-b"
    error = refusal([(b"x-llmproxy-key", b"key-a"), (second, value)])

    assert (error.status, error.reason) == (401, "keys_disagree")


def test_a_request_without_a_key_may_be_anonymous() -> None:
    """The configuration may allow this; a key still identifies its client."""
    assert identify([], anonymous=True) == ANONYMOUS.name == "anonymous"
    assert identify([(b"x-api-key", b"key-b")], anonymous=True) == "b"


@pytest.mark.parametrize("name", KEY_FIELDS)
def test_with_pass_credential_the_sdks_fields_are_the_providers(name: bytes) -> None:
    """Only our own field identifies the client; the others are forwarded unread."""
    fields = [(name, b"sk-provider")]
    assert identify([*fields, (b"x-llmproxy-key", b"key-a")], pass_credential=True) == "a"
    assert identify(fields, pass_credential=True, anonymous=True) == "anonymous"
    assert refusal(fields, pass_credential=True).reason == "no_key"
    wrong = [*fields, (b"x-llmproxy-key", b"wrong")]
    assert refusal(wrong, pass_credential=True).reason == "unknown_key"


def test_no_key_is_repeated() -> None:
    """Neither the error nor its body repeats the key that was sent."""
    for fields in ([(b"x-api-key", b"s3cret")], [(b"authorization", b"Basic s3cret")]):
        error = refusal(fields)
        shown = f"{error} {error.detail} {error.fields}".encode()
        assert b"s3cret" not in shown + error_body(error, Dialect.OPENAI, "id")


@pytest.mark.parametrize("name", KEY_FIELDS)
@pytest.mark.parametrize("own", [[], [(b"x-llmproxy-key", b"key-b")]], ids=["anonymous", "known"])
def test_a_clients_key_never_crosses_as_the_providers(name: bytes, own: Fields) -> None:
    """Where the SDK's fields are forwarded, a key of ours in one of them is refused."""
    value = b"Bearer key-b" if name == b"authorization" else b"key-b"
    refused = refusal([*own, (name, value)], pass_credential=True, anonymous=True)

    assert (refused.status, refused.reason) == (401, "misplaced_key")
    assert "key-b" not in refused.message
