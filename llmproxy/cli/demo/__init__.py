"""The embedded demo provider: all dialects, paced, with failures on demand; and the demo itself.

This is the door: everything that others use is imported from here.
"""

from llmproxy.cli.demo.prompt_cache import PromptCache
from llmproxy.cli.demo.provider import DemoProvider, demo_site
from llmproxy.cli.demo.texts import DEMO_KEY, curl_lines, demo_config

__all__ = [
    "DEMO_KEY",
    "DemoProvider",
    "PromptCache",
    "curl_lines",
    "demo_config",
    "demo_site",
]
