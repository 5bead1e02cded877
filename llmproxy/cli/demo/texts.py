"""What goes with the demo provider: the configuration of a proxy in front of it, and what to try.

Texts alone: nothing here listens, and nothing knows how the provider answers.
"""

from __future__ import annotations

import hashlib
import json
import shlex
import time
from collections.abc import Mapping
from typing import Any

DEMO_KEY = "demo"
"""The one key that the demo's proxy knows, and the token of its admin site."""

_DIALECTS = ("openai", "anthropic", "ollama", "gemini")


def demo_config(
    *, provider_port: int, proxy_port: int, admin_port: int, trace: str | None = None
) -> str:
    """The TOML configuration of a proxy in front of the demo provider, all on loopback.

    SDKs reach it with the base URLs ``http://127.0.0.1:PORT/openai/v1``, ``.../anthropic``,
    ``.../ollama`` and ``.../gemini``, with the key ``demo`` or none.

    Args:
        provider_port: where the demo provider listens.
        proxy_port: where the proxy is to listen.
        admin_port: where its admin site is to listen.
        trace: the JSON Lines file for traces; None: none is written.
    """
    parts = [
        f'[proxy]\nlisten = ["tcp:{proxy_port}:interface=127.0.0.1"]\n'
        'anonymous = true\ndrain_timeout = "1s"\n'
        "max_connections = 500\n",  # whatever the machine allows: the first words are no warning
        f'[admin]\nlisten = "tcp:{admin_port}:interface=127.0.0.1"\n',
    ]
    # A wrong key is refused even where a caller may have none, and most SDKs insist on one.
    digest = hashlib.sha256(DEMO_KEY.encode()).hexdigest()
    parts.append(f'[clients.demo]\nkeys = ["sha256:{digest}"]\n')
    for dialect in _DIALECTS:
        url = f"http://127.0.0.1:{provider_port}"
        parts.append(f'[providers.demo-{dialect}]\nurl = "{url}"\ndialect = "{dialect}"\n')
    for dialect in _DIALECTS:
        parts.append(f'[[routes]]\npath = "/{dialect}"\nproviders = ["demo-{dialect}"]\n')
    if trace is not None:
        parts.append(f"[trace]\njsonl = {_quoted(trace)}\n")
    return "\n".join(parts)


def _quoted(text: str) -> str:
    """Return a string of TOML: one of JSON is that, but for DEL, which TOML wants escaped."""
    return json.dumps(text, ensure_ascii=False).replace("\x7f", "\\u007f")


SANDBOX_HOSTS = (
    "inference.local",
    "api.openai.com",
    "api.anthropic.com",
    "generativelanguage.googleapis.com",
)
"""The hosts that the demo of a sandbox intercepts."""


def sandbox_config(*, ca_certificate: str, credentials: str) -> str:
    """The further configuration of a proxy that intercepts :data:`SANDBOX_HOSTS`.

    Whatever model is asked for at the providers' own hosts, the demo's takes its place: programs
    ask for models that it has not.

    Args:
        ca_certificate: the file of the authority's signing certificate.
        credentials: the folder with its key.
    """
    parts = [
        f"[credentials]\ndirectory = {_quoted(credentials)}\n",
        f"[intercept]\nhosts = {json.dumps(SANDBOX_HOSTS)}\n"
        f'ca_certificate = {_quoted(ca_certificate)}\nca_key = "ca-key"\n',
    ]
    places = [
        ("inference.local", "/v1/messages", "anthropic"),
        ("inference.local", "/api", "ollama"),
        ("inference.local", "/v1beta", "gemini"),
        ("inference.local", "/", "openai"),
        ("api.openai.com", "/", "openai"),
        ("api.anthropic.com", "/", "anthropic"),
        ("generativelanguage.googleapis.com", "/", "gemini"),
    ]
    for host, path, dialect in places:
        parts.append(
            f'[[routes]]\nname = "{host}{path}"\npath = "{path}"\nhosts = ["{host}"]\n'
            f'providers = ["demo-{dialect}"]\nstrip = false\n'
        )
        if host != "inference.local":
            parts.append(f'[routes.override]\ndemo-{dialect} = {{ model = "demo-20tps" }}\n')
    return "\n".join(parts)


def sandbox_lines(proxy_port: int, environment: Mapping[str, str]) -> str:
    """What to paste into a shell in which everything goes through the proxy.

    Args:
        environment: the variables by which programs trust the authority.
    """
    url = f"http://demo:{DEMO_KEY}@127.0.0.1:{proxy_port}"
    given = {"HTTPS_PROXY": url, **environment, "OPENAI_API_KEY": "placeholder"}
    given |= {"ANTHROPIC_API_KEY": "placeholder", "CODEX_API_KEY": "placeholder"}
    exports = "\n".join(f"export {name}={shlex.quote(value)}" for name, value in given.items())
    others = "https_proxy no_proxy CURL_CA_BUNDLE OPENAI_BASE_URL ANTHROPIC_BASE_URL"
    body = {"model": "m", "stream": True, "messages": [{"role": "user", "content": "Hello"}]}
    message = {**body, "model": "demo-20tps", "max_tokens": 1024}
    return f"""\
# A sandbox: paste these into another terminal; what is unset would win over them
{exports}
unset {others}

# Then everything in it goes through the proxy, unmodified, such as
curl -N https://api.openai.com/v1/chat/completions -H 'content-type: application/json' \\
  -d '{json.dumps(body)}'

curl -N https://inference.local/v1/messages -H 'content-type: application/json' \\
  -d '{json.dumps(message)}'

claude -p 'Say hello'

# and what is on no list is refused
curl https://example.com/

"""


def replay_lines(proxy_port: int, in_words: str) -> str:
    """What to paste into a shell to see a capsule played; ``in_words`` says what is in it."""
    message = {"role": "user", "content": "Hello"}
    body = json.dumps({"model": "demo-replay", "stream": True, "messages": [message]})
    return f"""\
# The model demo-replay, at any path, plays the capsule: {in_words}
curl -N http://127.0.0.1:{proxy_port}/openai/v1/chat/completions \\
  -H 'content-type: application/json' -d '{body}'

"""


def request_line(event: Mapping[str, Any]) -> str:
    """Return an access event as one short line: what was asked for, and what came of it.

    Args:
        event: as the recorder logs it; fields that are not known are missing.
    """
    at = time.strftime("%H:%M:%S", time.localtime(event["log_time"]))
    words = [at, event["method"], event["path"], event.get("model", "")]
    asked = "".join(c if c.isprintable() else ascii(c)[1:-1] for c in " ".join(filter(None, words)))
    end = event["end_reason"] + (f" ({event['error']})" if "error" in event else "")
    parts = [f"{event.get('status', 'no')} {end}", f"{event['duration_s']:.2f} s"]
    if "input_tokens" in event and "output_tokens" in event:
        parts.append(f"{event['input_tokens']} tokens in, {event['output_tokens']} out")
    return f"{asked}: {', '.join(parts)}\n"


def curl_lines(proxy_port: int, *, admin_port: int = 9080) -> str:
    """What to paste into a shell: a streamed chat for each dialect, and what operators look at."""
    base = f"http://127.0.0.1:{proxy_port}"
    openai, anthropic, ollama = (
        json.dumps(
            {
                "model": "demo-20tps",
                **members,
                "messages": [{"role": "user", "content": f"Hello {name}, through the proxy"}],
            }
        )
        for name, members in (
            ("OpenAI", {"stream": True, "stream_options": {"include_usage": True}}),
            ("Anthropic", {"stream": True, "max_tokens": 1024}),
            ("Ollama", {}),
        )
    )
    contents = [{"role": "user", "parts": [{"text": "Hello Gemini, through the proxy"}]}]
    gemini = json.dumps({"contents": contents})
    return f"""\
# OpenAI
curl -N {base}/openai/v1/chat/completions -H 'content-type: application/json' \\
  -d '{openai}'

# Anthropic
curl -N {base}/anthropic/v1/messages -H 'content-type: application/json' \\
  -H 'anthropic-version: 2023-06-01' \\
  -d '{anthropic}'

# Ollama
curl -N {base}/ollama/api/chat -H 'content-type: application/json' \\
  -d '{ollama}'

# Gemini
curl -N '{base}/gemini/v1beta/models/demo-20tps:streamGenerateContent?alt=sse' \\
  -H 'content-type: application/json' \\
  -d '{gemini}'

# Other models: demo-fast, demo-slow, demo-Ntps, and failures: demo-429, demo-500, demo-503,
# demo-break, demo-stall, demo-malformed, demo-unfinished, demo-fail, demo-redirect
# Other paths: /openai/v1/completions, /openai/v1/responses, /openai/v1/embeddings,
# /anthropic/v1/messages/count_tokens, /ollama/api/generate, /ollama/api/embed,
# /gemini/v1beta/models/NAME:generateContent, /gemini/v1beta/models/NAME:countTokens

# What runs, in a browser (the admin token is "{DEMO_KEY}"): http://127.0.0.1:{admin_port}/
# Metrics
curl http://127.0.0.1:{admin_port}/metrics
"""
