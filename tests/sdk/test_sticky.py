"""Conversations over two providers with prompt caches, as programs with real SDKs have them.

A conversation of each SDK grows by what the provider said and by a new question.  A provider finds
in its cache what it was sent before; whether it was sent that is the proxy's choice.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from typing import Any, NamedTuple

import anthropic
import openai
import pytest

from llmproxy.cli.demo.prompt_cache import BLOCK_WORDS
from tests.sdk.sdks import KEY
from tests.support.daemon import Daemon, provider_table
from tests.support.demo import Demo
from tests.support.live_proxy import client_config, until
from tests.support.sockets import WAIT

SDKS = ("openai", "anthropic")


class Turn(NamedTuple):
    """What an SDK knows of one response.

    Attributes:
        provider: from whom it is, by the header.
        asked: how many providers were asked.
        whole: the tokens of the prompt, cached or not.
        cached: those that the provider had already.
    """

    provider: str
    asked: int
    whole: int
    cached: int


class Conversation:
    """One session, which an SDK leads through a proxy.

    Args:
        sdk: whose.
        base: the URL of the route.
        session: the name of the session, which stands in all of its texts, too.
    """

    def __init__(self, sdk: str, base: str, session: str) -> None:
        self.session = session
        self.turns: list[Turn] = []
        self._messages: list[Any] = []
        self._client: Any = None
        self._ask = self._openai(base) if sdk == "openai" else self._anthropic(base)

    def close(self) -> None:
        """Close the connections."""
        self._client.close()

    def go_on(self, turns: int = 1) -> list[Turn]:
        """Ask so many more questions; return what came of them."""
        for _ in range(turns):
            question = f"{self.session} {len(self.turns)} " * BLOCK_WORDS
            self._messages.append({"role": "user", "content": question})
            text, turn = self._ask()
            self._messages.append({"role": "assistant", "content": text})
            self.turns.append(turn)
        return self.turns[-turns:]

    def _openai(self, base: str) -> Any:
        client = self._client = openai.OpenAI(
            base_url=f"{base}/v1",
            api_key=KEY,
            max_retries=0,
            timeout=WAIT,
            default_headers={"x-session-id": self.session},
        )

        def ask() -> tuple[str, Turn]:
            raw = client.chat.completions.with_raw_response.create(
                model="demo-fast", messages=self._messages
            )
            completion = raw.parse()
            usage = completion.usage
            assert usage is not None
            assert usage.prompt_tokens_details is not None
            cached = usage.prompt_tokens_details.cached_tokens or 0
            text = completion.choices[0].message.content or ""
            return text, _turn(raw.headers, usage.prompt_tokens, cached)

        return ask

    def _anthropic(self, base: str) -> Any:
        client = self._client = anthropic.Anthropic(
            base_url=base,
            api_key=KEY,
            max_retries=0,
            timeout=WAIT,
            default_headers={"x-session-id": self.session},
        )

        def ask() -> tuple[str, Turn]:
            raw = client.messages.with_raw_response.create(
                model="demo-fast",
                max_tokens=64,
                messages=self._messages,
                cache_control={"type": "ephemeral"},
            )
            message = raw.parse()
            usage, block = message.usage, message.content[0]
            assert block.type == "text"
            read, written = usage.cache_read_input_tokens or 0, usage.cache_creation_input_tokens
            whole = usage.input_tokens + read + (written or 0)
            return block.text, _turn(raw.headers, whole, read)

        return ask


def _turn(headers: Any, whole: int, cached: int) -> Turn:
    asked = int(headers["x-llmproxy-attempts"])
    return Turn(headers["x-llmproxy-provider"], asked, whole, cached)


class Pair:
    """Two providers with caches of their own, and a proxy whose routes are over both.

    The routes are called ``SDK-session`` and ``SDK-off``, after the SDK and ``sticky``.
    """

    def __init__(self, folder: Any, stack: ExitStack) -> None:
        self.demos = {name: Demo(caching=True) for name in "ab"}
        self._lives = {name: stack.enter_context(ExitStack()) for name in "ab"}
        for name, demo in self.demos.items():
            self._lives[name].enter_context(demo)
        config = ""
        for sdk in SDKS:
            names = [f"{sdk}-{name}" for name in "ab"]
            for name, demo in zip(names, self.demos.values(), strict=True):
                config += provider_table(name, url=demo.url, dialect=sdk)
            for sticky in ("session", "off"):
                config += f'[[routes]]\npath = "/{sdk}-{sticky}"\nproviders = {names}\n'
                config += f'balance = "weighted"\nsticky = "{sticky}"\n'
        config += client_config("team", KEY)
        self.proxy = stack.enter_context(Daemon(folder, config, proxy=""))
        self._clients = stack.enter_context(ExitStack())

    def begin(self, sdk: str, sticky: str, session: str) -> Conversation:
        """Begin a conversation on one of the routes."""
        base = f"http://127.0.0.1:{self.proxy.port}/{sdk}-{sticky}"
        talk = Conversation(sdk, base, f"{sdk}-{session}")
        self._clients.callback(talk.close)
        return talk

    def stop(self, name: str) -> None:
        """Let one provider go down."""
        self._lives[name].close()

    def start_again(self, name: str) -> None:
        """Let it come back where it was, with an empty cache."""
        self._lives[name].enter_context(Demo(port=self.demos[name].port, caching=True))

    def wait_recorded(self, session: str, count: int) -> None:
        """Wait until so many requests of a session have their records."""
        until(lambda: len(self.recorded(session)) == count, "the records of the session")

    def recorded(self, session: str) -> list[tuple[str, int]]:
        """Return the provider and the cached tokens of a session's requests, by the records."""
        traces = [trace for trace in self.proxy.traces() if trace["session"] == session]
        return [(trace["provider"], trace["cache_read_tokens"]) for trace in traces]


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pair]:
    """Two providers that stay."""
    with ExitStack() as stack:
        yield Pair(tmp_path_factory.mktemp("sticky"), stack)


def blocks(words: int) -> int:
    """Return how many of so many words stand in whole blocks."""
    return words // BLOCK_WORDS * BLOCK_WORDS


@pytest.mark.parametrize("sdk", SDKS)
def test_from_the_second_turn_on_a_session_finds_its_prompts(sdk: str, pair: Pair) -> None:
    """Three sessions in turn, each at one of two providers; the records say what the SDK saw."""
    talks = [pair.begin(sdk, "session", name) for name in ("one", "two", "three")]
    for _ in range(4):
        for talk in talks:
            talk.go_on()
    assert {talk.turns[0].provider for talk in talks} == {f"{sdk}-a", f"{sdk}-b"}
    for talk in talks:
        assert len({turn.provider for turn in talk.turns}) == 1
        wholes = [turn.whole for turn in talk.turns]
        assert [turn.cached for turn in talk.turns] == [0, *map(blocks, wholes[:-1])]
        assert wholes[0] > BLOCK_WORDS
        seen = [(turn.provider, turn.cached) for turn in talk.turns]
        pair.wait_recorded(talk.session, len(seen))
        assert pair.recorded(talk.session) == seen


@pytest.mark.parametrize("sdk", SDKS)
def test_without_stickiness_the_next_turn_finds_nothing(sdk: str, pair: Pair) -> None:
    """It is at the other provider; the turn after it finds what stood there two turns ago."""
    talk = pair.begin(sdk, "off", "restless")
    talk.go_on(4)
    first, second, third, fourth = talk.turns
    assert (first.provider, second.provider) == (third.provider, fourth.provider)
    assert first.provider != second.provider
    found = [turn.cached for turn in talk.turns]
    assert found == [0, 0, blocks(first.whole), blocks(second.whole)]


@pytest.mark.parametrize("sdk", SDKS)
def test_a_session_whose_provider_goes_down_moves_and_stays(sdk: str, tmp_path: Any) -> None:
    """The new provider has its prompts then, also when the old one is back."""
    with ExitStack() as stack:
        pair = Pair(tmp_path, stack)
        talk = pair.begin(sdk, "session", "moved")
        before = talk.go_on(2)[-1]
        assert before.provider == f"{sdk}-a"
        pair.stop("a")
        moved, after = talk.go_on(2)
        assert (moved.provider, moved.asked, moved.cached) == (f"{sdk}-b", 2, 0)
        assert (after.provider, after.asked) == (f"{sdk}-b", 1)
        assert after.cached == blocks(moved.whole)
        pair.start_again("a")
        others = [pair.begin(sdk, "session", f"other-{n}").go_on()[0].provider for n in range(2)]
        assert f"{sdk}-a" in others
        back = talk.go_on()[0]
        assert (back.provider, back.asked, back.cached) == (f"{sdk}-b", 1, blocks(after.whole))
