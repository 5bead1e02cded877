"""What is held of a stream: the budget, and where the text ends."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from llmproxy.dialects.accumulated import Accumulated, ToolCall, Usage


@given(st.lists(st.text(max_size=8), max_size=30), st.integers(0, 60))
def test_text_is_cut_on_a_character(pieces: list[str], budget: int) -> None:
    """What is held begins the text, fits, ends with a whole character, and all of it is counted."""
    seen = Accumulated(keeps=True, budget=budget)
    for piece in pieces:
        seen.add_text(piece)
        assert seen.held_bytes <= budget
    whole = "".join(pieces)
    size = len(whole.encode())
    assert whole.startswith(seen.text)
    assert seen.text_bytes == size
    assert seen.is_cut == (size > budget)
    assert len(seen.text.encode()) > min(size, budget) - 4


def test_tool_calls_share_the_budget() -> None:
    """Calls, names and arguments cost what they hold, and more than fits is left out."""
    seen = Accumulated(keeps=True, budget=1024)
    seen.add_text("x" * 100)
    seen.open_call(0, "call_0", "tool")
    seen.add_arguments(0, "a" * 1000)
    seen.open_call(1, "call_1", "tool")
    seen.add_text("more")
    (call,) = seen.tool_calls
    assert (call.id, call.name, len(call.arguments)) == ("call_0", "tool", 1024 - 100 - 256 - 10)
    assert (seen.text, seen.text_bytes, seen.is_cut) == ("x" * 100, 104, True)
    assert seen.held_bytes == 1024


def test_calls_without_end() -> None:
    """A thousand keys and long names hold no more than the budget."""
    seen = Accumulated(keeps=True, budget=4096)
    for key in range(1000):
        seen.open_call(key, "i" * 5000, "n" * 5000)
        seen.add_arguments(key, "{}")
    assert seen.is_cut
    assert len(seen.tool_calls) <= 4096 // 256
    assert sum(len(c.id or "") + len(c.name or "") for c in seen.tool_calls) <= 4096


def test_a_call_may_be_named_late() -> None:
    """Arguments may come before the name, and a name that comes again changes nothing."""
    seen = Accumulated(keeps=True, budget=1000)
    seen.add_arguments(3, "{")
    seen.open_call(3, None, "tool")
    seen.open_call(3, "id", "other")
    seen.add_arguments(3, "}")
    assert seen.tool_calls == (ToolCall("id", "tool", "{}"),)


def test_names_are_bounded() -> None:
    """No provider fills memory with its model's name, an id, a reason or an error."""
    seen = Accumulated(keeps=False, budget=0)
    seen.name("i" * 10**6, "m" * 10**6)
    seen.finish("f" * 10**6)
    seen.fail("k" * 10**6, "e" * 10**6)
    names = (seen.response_id, seen.model, seen.finish_reason, *(seen.error or ()))
    assert all(len(name or "") <= 1024 for name in names)


def test_the_first_names_hold_and_the_search_ends() -> None:
    """Empty names are none, and after eight events without a name the search ends."""
    seen = Accumulated(keeps=False, budget=0)
    seen.name("", "")
    seen.name("a", None)
    assert seen.wants_all
    seen.name("b", "m")
    assert (seen.response_id, seen.model, seen.wants_all) == ("a", "m", False)
    nameless = Accumulated(keeps=False, budget=0)
    for _ in range(8):
        assert nameless.wants_all
        nameless.name(None, None)
    assert not nameless.wants_all


def test_zero_is_not_absent() -> None:
    """A reported 0 is reported; without any count nothing is."""
    seen = Accumulated(keeps=False, budget=0)
    assert seen.usage(is_final=True) == Usage()
    seen.count(output_tokens=0)
    assert seen.usage(is_final=True) == Usage(output_tokens=0, provenance="reported")
    assert seen.usage(is_final=False).provenance == "partial"
