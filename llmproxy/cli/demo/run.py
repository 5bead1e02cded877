"""The demo as one process: the embedded provider, and the proxy in front of it.

Both are the real thing, joined by nothing but a socket; the proxy is configured by the same kind
of file that an operator writes.  Here, as in ``service.py``, the reactor enters the program.
"""

from __future__ import annotations

import atexit
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Mapping
from typing import Any

import msgspec
from twisted.internet import reactor as global_reactor
from twisted.logger import (
    FilteringLogObserver,
    LogEvent,
    LogLevel,
    LogLevelFilterPredicate,
    globalLogBeginner,
)

from llmproxy.cli.ca import make_authority
from llmproxy.cli.demo.prompt_cache import PromptCache
from llmproxy.cli.demo.provider import demo_site
from llmproxy.cli.demo.replay import Capsule
from llmproxy.cli.demo.texts import (
    DEMO_KEY,
    SANDBOX_HOSTS,
    curl_lines,
    demo_config,
    replay_lines,
    request_line,
    sandbox_config,
    sandbox_lines,
)
from llmproxy.config import Secret, parse
from llmproxy.record.log import ACCESS, JsonLog, log_writer
from llmproxy.record.log_writer import LogFile, LogWriter
from llmproxy.service import ProxyService


def run(
    *,
    proxy_port: int,
    admin_port: int,
    cache: bool = True,
    sandboxed: bool = False,
    capsule: Capsule | None = None,
) -> None:
    """Serve until interrupted; prints commands to try once everything listens.

    Args:
        proxy_port: where the proxy listens on loopback.
        admin_port: where its admin site does.
        cache: the provider remembers prompts.
        sandboxed: the proxy intercepts hosts, with an authority that lasts as long as the demo.
        capsule: what the model ``demo-replay`` plays, if there is to be one.

    Raises:
        SystemExit: 1, where a port is taken.
    """
    reactor: Any = global_reactor
    _begin_log(reactor)
    prompts = PromptCache(reactor.seconds) if cache else None
    site = demo_site(reactor, cache=prompts, capsule=capsule)
    provider = reactor.listenTCP(0, site, interface="127.0.0.1")
    text = demo_config(
        provider_port=provider.getHost().port, proxy_port=proxy_port, admin_port=admin_port
    )
    environment: Mapping[str, str] = {}
    if sandboxed:
        more, environment = _sandbox()
        text += more
    config = parse(text, environ={}, now=time.time())
    admin = msgspec.structs.replace(config.admin, token=Secret(DEMO_KEY))
    service = ProxyService(msgspec.structs.replace(config, admin=admin), reactor)
    service.privilegedStartService()
    service.startService()
    reactor.addSystemEventTrigger("before", "shutdown", service.stopService)
    reactor.callWhenRunning(
        _tell_what_to_do, service, environment, capsule
    )  # Ctrl-C is taken by then
    reactor.run()


def _sandbox() -> tuple[str, Mapping[str, str]]:
    """Make an authority; return what makes a sandbox of a configuration, and the variables."""
    folder = tempfile.mkdtemp(prefix="llmproxy-sandbox-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    report = make_authority(folder, SANDBOX_HOSTS, days=30)
    credentials = os.path.join(folder, "credentials")
    os.mkdir(credentials, 0o700)
    os.rename(report.ca_key, os.path.join(credentials, "ca-key"))
    text = sandbox_config(ca_certificate=report.ca_certificate, credentials=credentials)
    return "\n" + text, report.environment


def _tell_what_to_do(
    service: ProxyService, environment: Mapping[str, str], capsule: Capsule | None
) -> None:
    proxy_port, admin_port = (
        ports[0].getHost().port for ports in (service.proxy_ports, service.admin_ports)
    )
    sys.stdout.write(
        f"# The proxy listens on http://127.0.0.1:{proxy_port}, a demo provider behind it.\n"
        "# Paste a command into another terminal; Ctrl-C ends this.\n\n"
    )
    if environment:
        sys.stdout.write(sandbox_lines(proxy_port, environment))
    if capsule is not None:
        sys.stdout.write(replay_lines(proxy_port, capsule.in_words))
    sys.stdout.write(curl_lines(proxy_port, admin_port=admin_port))
    sys.stdout.flush()


def _begin_log(reactor: Any) -> None:
    """Let warnings and worse through to standard error, and show each request in a short line."""
    worth_a_word = LogLevelFilterPredicate(defaultLogLevel=LogLevel.warn)
    errors = JsonLog(_writer(reactor, sys.stderr.fileno()), wall=reactor.seconds)
    shown = _writer(reactor, sys.stdout.fileno())

    def show(event: LogEvent) -> None:
        if event.get("log_namespace") == ACCESS:
            shown.put(request_line(event).encode())

    observers: list[Any] = [FilteringLogObserver(errors, [worth_a_word]), show]
    globalLogBeginner.beginLoggingTo(observers, redirectStandardIO=False)


def _writer(reactor: Any, descriptor: int) -> LogWriter:
    writer = log_writer(LogFile(descriptor, owned=False), wall=reactor.seconds)
    writer.start()
    atexit.register(writer.flush)
    return writer
