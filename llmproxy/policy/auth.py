"""From the keys that a request presents to the client that it comes from.

Keys are compared by their SHA-256 digest, and are never kept, logged or put into an error.  Nothing
here knows routes or providers: an argument says whether the SDK's own key fields are the
provider's.
"""

from __future__ import annotations

import hashlib

from llmproxy.config import Client, Config
from llmproxy.errors import ProxyError
from llmproxy.http1.grammar import Fields
from llmproxy.http1.headers import KEY_FIELDS, OWN_KEY_FIELD

ANONYMOUS = Client(name="anonymous", keys=())
"""The client of a request without a key, where such requests are allowed."""


class Auth:
    """Every client's keys, by digest."""

    def __init__(self, config: Config) -> None:
        self._anonymous = config.proxy.anonymous
        self._clients = {
            digest: client for client in config.clients.values() for digest in client.keys
        }

    def identify(self, fields: Fields, *, pass_credential: bool) -> Client:
        """Return the client that the request's keys name.

        Args:
            fields: the request's header fields.
            pass_credential: the SDK's key fields are the provider's; only ``x-llmproxy-key``
                speaks.

        Raises:
            ProxyError: 401, where no key is shown and nobody is anonymous, a key is unknown, two
                keys name different clients, or a client's key stands in a field that would cross.
        """
        client = self._caller(fields, () if pass_credential else KEY_FIELDS)
        if pass_credential:
            self._keep_keys_here(fields)
        return client

    def _caller(self, fields: Fields, names: tuple[bytes, ...]) -> Client:
        found: Client | None = None
        for name, value in fields:
            if name == OWN_KEY_FIELD or name in names:
                client = self._lookup(_key(name, value))
                if found is not None and client is not found:
                    text = "The keys of this request name different clients."
                    raise _unauthorized("keys_disagree", text)
                found = client
        if found is not None:
            return found
        if self._anonymous:
            return ANONYMOUS
        raise _unauthorized("no_key", "No key was given. Send one of this proxy's client keys.")

    def _keep_keys_here(self, fields: Fields) -> None:
        """Refuse a client's key in a field that crosses: the provider would get it."""
        for name, value in fields:
            key = value.partition(b" ")[2].strip(b" ") if name == b"authorization" else value
            if name in KEY_FIELDS and hashlib.sha256(key).digest() in self._clients:
                text = "A client key of this proxy stands where the provider's credential belongs."
                raise _unauthorized("misplaced_key", text)

    def _lookup(self, key: bytes) -> Client:
        client = self._clients.get(hashlib.sha256(key).digest())
        if client is None:
            raise _unauthorized("unknown_key", "The key is not one of this proxy's client keys.")
        return client


def _key(name: bytes, value: bytes) -> bytes:
    if name != b"authorization":
        return value
    scheme, _, key = value.partition(b" ")
    if scheme.lower() != b"bearer":
        raise _unauthorized("unknown_key", "Authorization must be a Bearer key of this proxy.")
    return key.strip(b" ")


def _unauthorized(reason: str, message: str) -> ProxyError:
    return ProxyError(401, reason, message, fields=((b"www-authenticate", b"Bearer"),))
