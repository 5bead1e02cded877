"""The demo as one process: the embedded provider, and the proxy in front of it.

Both are the real thing, joined by nothing but a socket; the proxy is configured by the same kind
of file that an operator writes.  Here, as in ``service.py``, the reactor enters the program.
"""

from __future__ import annotations

import atexit
import sys
from typing import Any

from twisted.internet import reactor as global_reactor
from twisted.logger import (
    FilteringLogObserver,
    LogEvent,
    LogLevel,
    LogLevelFilterPredicate,
    globalLogBeginner,
)

from llmproxy.cli.demo.prompt_cache import PromptCache
from llmproxy.cli.demo.provider import demo_site
from llmproxy.cli.demo.texts import curl_lines, demo_config, request_line
from llmproxy.config import parse
from llmproxy.record.log import ACCESS, JsonLog, log_writer
from llmproxy.record.log_writer import LogFile, LogWriter
from llmproxy.service import ProxyService


def run(*, proxy_port: int, admin_port: int, cache: bool = True) -> None:
    """Serve until interrupted; prints commands to try once everything listens.

    Args:
        proxy_port: where the proxy listens on loopback.
        admin_port: where its admin site does.
        cache: the provider remembers prompts.

    Raises:
        SystemExit: 1, where a port is taken.
    """
    reactor: Any = global_reactor
    _begin_log(reactor)
    site = demo_site(reactor, cache=PromptCache(reactor.seconds) if cache else None)
    provider = reactor.listenTCP(0, site, interface="127.0.0.1")
    text = demo_config(
        provider_port=provider.getHost().port, proxy_port=proxy_port, admin_port=admin_port
    )
    service = ProxyService(parse(text, environ={}), reactor)
    service.privilegedStartService()
    service.startService()
    reactor.addSystemEventTrigger("before", "shutdown", service.stopService)
    reactor.callWhenRunning(_tell_what_to_do, service)  # Ctrl-C is taken by then
    reactor.run()


def _tell_what_to_do(service: ProxyService) -> None:
    proxy_port, admin_port = (
        ports[0].getHost().port for ports in (service.proxy_ports, service.admin_ports)
    )
    sys.stdout.write(
        f"# The proxy listens on http://127.0.0.1:{proxy_port}, a demo provider behind it.\n"
        "# Paste a command into another terminal; Ctrl-C ends this.\n\n"
    )
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
