"""The demo provider's prompt cache: what is found again, by whom, and for how long."""

from __future__ import annotations

import pytest
from twisted.internet.task import Clock

from llmproxy.cli.demo.prompt_cache import BLOCK_WORDS, KEPT_S, PromptCache


def words(count: int, name: str = "w") -> str:
    """Return a text of so many different words."""
    return " ".join(f"{name}{number}" for number in range(count))


@pytest.fixture
def clock() -> Clock:
    """Time that is turned by hand."""
    return Clock()


@pytest.fixture
def cache(clock: Clock) -> PromptCache:
    """A cache that holds as much as it usually does."""
    return PromptCache(clock.seconds)


def test_a_growing_conversation_is_found_up_to_its_last_turn(cache: PromptCache) -> None:
    """Each turn finds the whole blocks of the one before, and keeps those that are new."""
    parts = [words(20, "system"), words(20, "first")]
    assert cache.use("", "m", parts) == (0, 32)
    parts += [words(20, "answer"), words(20, "second")]
    assert cache.use("", "m", parts) == (32, 48)
    parts += [words(1, "short")]
    assert cache.use("", "m", parts) == (80, 0)


def test_only_a_beginning_is_found(cache: PromptCache) -> None:
    """What stands behind another word is new, though it was seen before at the same place."""
    text = words(4 * BLOCK_WORDS)
    cache.use("", "m", [text])
    assert cache.use("", "m", ["other " + text]) == (0, 4 * BLOCK_WORDS)
    assert cache.use("", "m", [text.replace(f"w{BLOCK_WORDS} ", "other ")]) == (
        BLOCK_WORDS,
        3 * BLOCK_WORDS,
    )


@pytest.mark.parametrize("count", [0, 1, BLOCK_WORDS - 1])
def test_a_prompt_without_a_whole_block_is_not_kept(cache: PromptCache, count: int) -> None:
    """However often it comes."""
    for _ in range(3):
        assert cache.use("", "m", [words(count)]) == (0, 0)
    assert len(cache) == 0


@pytest.mark.parametrize("count", [BLOCK_WORDS, 3 * BLOCK_WORDS])
def test_the_last_word_is_always_read(cache: PromptCache, count: int) -> None:
    """The same prompt again: its last block is known, and yet not counted as found."""
    assert cache.use("", "m", [words(count)]) == (0, count)
    assert cache.use("", "m", [words(count)]) == (count - BLOCK_WORDS, 0)
    assert cache.use("", "m", [words(count + 1)]) == (count, 0)


def test_accounts_and_models_share_nothing(cache: PromptCache) -> None:
    """Nor can one name run into the other."""
    text = words(BLOCK_WORDS + 1)
    for account, model in (("a", "m"), ("b", "m"), ("a", "n"), ("am", ""), ("", "am")):
        assert cache.use(account, model, [text]) == (0, BLOCK_WORDS)
        assert cache.use(account, model, [text]) == (BLOCK_WORDS, 0)


def test_messages_are_apart(cache: PromptCache) -> None:
    """The same words in one message and in two are different prompts."""
    cache.use("", "m", [words(BLOCK_WORDS + 1)])
    first, _, rest = words(BLOCK_WORDS + 1).partition(" ")
    assert cache.use("", "m", [first, rest])[0] == 0


def test_spaces_are_no_part_of_a_prompt(cache: PromptCache) -> None:
    """Words are what the demo counts everywhere."""
    text = words(BLOCK_WORDS + 1)
    cache.use("", "m", [text])
    assert cache.use("", "m", [text.replace(" ", "\n  ")])[0] == BLOCK_WORDS


def test_half_a_surrogate_pair_is_a_word_like_any_other(cache: PromptCache) -> None:
    """JSON can say it."""
    text = "\ud83d " + words(BLOCK_WORDS)
    cache.use("", "m", [text])
    assert cache.use("", "m", [text])[0] == BLOCK_WORDS


def test_what_is_used_again_is_kept_longer(cache: PromptCache, clock: Clock) -> None:
    """Each use begins the time anew, of what was used alone."""
    short, long = words(BLOCK_WORDS + 1), words(2 * BLOCK_WORDS + 1)
    cache.use("", "m", [long])
    clock.advance(KEPT_S - 1)
    assert cache.use("", "m", [short]) == (BLOCK_WORDS, 0)
    clock.advance(1)
    assert cache.use("", "m", [long]) == (BLOCK_WORDS, BLOCK_WORDS)
    clock.advance(KEPT_S)
    assert cache.use("", "m", [long]) == (0, 2 * BLOCK_WORDS)


def test_a_full_cache_drops_what_was_used_longest_ago(clock: Clock) -> None:
    """Of one prompt its end goes first, so that the beginning is of use as long as it is there."""
    cache = PromptCache(clock.seconds, most=3)
    cache.use("", "m", [words(2 * BLOCK_WORDS + 1, "old")])
    cache.use("", "m", [words(2 * BLOCK_WORDS + 1, "new")])
    assert len(cache) == 3
    assert cache.use("", "m", [words(2 * BLOCK_WORDS + 1, "new")]) == (2 * BLOCK_WORDS, 0)
    assert cache.use("", "m", [words(BLOCK_WORDS + 1, "old")]) == (BLOCK_WORDS, 0)


def test_what_is_used_again_is_dropped_later(clock: Clock) -> None:
    """The age of a block is that of its last use."""
    cache = PromptCache(clock.seconds, most=2)
    text = {name: words(BLOCK_WORDS + 1, name) for name in ("first", "second", "third")}
    for name in ("first", "second", "first", "third"):
        cache.use("", "m", [text[name]])
    assert cache.use("", "m", [text["first"]])[0] == BLOCK_WORDS
    assert cache.use("", "m", [text["second"]])[0] == 0


def test_a_prompt_larger_than_the_cache_keeps_its_beginning(clock: Clock) -> None:
    """The bound holds for one prompt, too."""
    cache = PromptCache(clock.seconds, most=2)
    text = words(5 * BLOCK_WORDS)
    for read in (0, 2 * BLOCK_WORDS):
        assert cache.use("", "m", [text])[0] == read
        assert len(cache) == 2


def test_what_may_not_be_kept_is_not_found_either(cache: PromptCache) -> None:
    """A prompt whose kept part is found as a whole has a last word to read behind it."""
    parts = [words(BLOCK_WORDS, "system"), words(2 * BLOCK_WORDS)]
    assert cache.use("", "m", parts, 1) == (0, BLOCK_WORDS)
    assert cache.use("", "m", parts, 1) == (BLOCK_WORDS, 0)
    assert cache.use("", "m", parts, 0) == (0, 0)
    assert cache.use("", "m", parts) == (BLOCK_WORDS, 2 * BLOCK_WORDS)
