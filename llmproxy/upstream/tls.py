"""Whom a provider's connection trusts.

Names are verified by service-identity within the handshake, before a byte of a request is sent.
"""

from __future__ import annotations

from typing import Any

from twisted.internet.ssl import Certificate, optionsForClientTLS, trustRootFromCertificates

from llmproxy.config import Provider

_MARK = b"-----BEGIN CERTIFICATE-----"


def client_options(provider: Provider) -> Any:
    """Return what makes TLS connections to ``provider``, or None where its URL is plain HTTP.

    Made once for a provider: loading the trusted authorities takes milliseconds.
    """
    if provider.url.scheme != "https":
        return None
    trust = None
    if provider.ca is not None:
        with open(provider.ca, "rb") as file:
            pem = file.read()
        trust = trustRootFromCertificates(
            [Certificate.loadPEM(_MARK + part) for part in pem.split(_MARK)[1:]]
        )
    return optionsForClientTLS(
        provider.url.host, trustRoot=trust, acceptableProtocols=[b"http/1.1"]
    )
