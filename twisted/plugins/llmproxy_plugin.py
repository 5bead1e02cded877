"""What ``twistd llmproxy`` finds.  No ``__init__.py`` stands beside it: the folder is Twisted's."""

from twisted.application.service import ServiceMaker

llmproxy = ServiceMaker(
    "llmproxy",
    "llmproxy.service",
    "One shared egress to language-model providers.",
    "llmproxy",
)
