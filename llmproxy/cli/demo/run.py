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
    LogLevel,
    LogLevelFilterPredicate,
    globalLogBeginner,
)

from llmproxy.cli.demo.provider import demo_site
from llmproxy.cli.demo.texts import curl_lines, demo_config
from llmproxy.config import parse
from llmproxy.record.log import JsonLog, log_writer
from llmproxy.record.log_writer import LogFile
from llmproxy.service import ProxyService


def run(*, proxy_port: int, admin_port: int) -> None:
    """Serve until interrupted; prints commands to try once everything listens.

    Args:
        proxy_port: where the proxy listens on loopback.
        admin_port: where its admin site does.

    Raises:
        SystemExit: 1, where a port is taken.
    """
    reactor: Any = global_reactor
    _log_warnings(reactor)
    provider = reactor.listenTCP(0, demo_site(reactor), interface="127.0.0.1")
    text = demo_config(
        provider_port=provider.getHost().port, proxy_port=proxy_port, admin_port=admin_port
    )
    service = ProxyService(parse(text, environ={}), reactor)
    service.privilegedStartService()
    service.startService()
    reactor.addSystemEventTrigger("before", "shutdown", service.stopService)
    sys.stdout.write(
        f"# The proxy listens on http://127.0.0.1:{proxy_port}, a demo provider behind it.\n"
        "# Paste a command into another terminal; Ctrl-C ends this.\n\n"
    )
    sys.stdout.write(curl_lines(proxy_port, admin_port=admin_port))
    sys.stdout.flush()
    reactor.run()


def _log_warnings(reactor: Any) -> None:
    """Let warnings and worse through to standard error; what goes well is quiet."""
    worth_a_word = LogLevelFilterPredicate(defaultLogLevel=LogLevel.warn)
    writer = log_writer(LogFile(sys.stderr.fileno(), owned=False), wall=reactor.seconds)
    writer.start()
    atexit.register(writer.flush)
    observer = FilteringLogObserver(JsonLog(writer, wall=reactor.seconds), [worth_a_word])
    globalLogBeginner.beginLoggingTo([observer], redirectStandardIO=False)
