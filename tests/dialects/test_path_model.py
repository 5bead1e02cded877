"""The models that a target names, as the strictest and the laxest of servers read it."""

from __future__ import annotations

import pytest

from llmproxy.dialects import path_model
from llmproxy.dialects.json_body import MODEL_BYTES
from llmproxy.dialects.json_spans import BodyError
from llmproxy.dialects.path_model import path_models, query_models, replaced


@pytest.mark.parametrize(
    ("path", "model"),
    [
        (b"/openai/deployments/gpt-4o/chat/completions", "gpt-4o"),
        (b"/v1/engines/davinci/completions", "davinci"),
        (b"/v1beta/tunedModels/m:generateContent", "m"),
        (b"/deployments/gpt-4o", "gpt-4o"),
        (b"/openai/Deploy%6Dents/gpt-4o/x", "gpt-4o"),
        (b"/deployments/b%C3%A9%20/x", "bé "),
        (b"/deployments/a:b/x", "a:b"),
        (b"/v1beta/models/gemini-2.5-pro:streamGenerateContent", "gemini-2.5-pro"),
        (b"/v1/projects/p/publishers/google/models/m%401:predict", "m@1"),
        (b"/v1beta/models/gemini%3AgenerateContent", "gemini"),
        (b"/v1beta/models/org/BIG:generateContent", "org/BIG"),
        (b"/v1/models/llama3:8b:generate", "llama3:8b"),
        (b"/model/BIG/invoke", "BIG"),
        (b"/Model/anthropic.claude-v2:1/converse-stream", "anthropic.claude-v2:1"),
        (b"/model/arn%3Aaws%3Abedrock%2Fus.big%3A0/invoke", "arn:aws:bedrock/us.big:0"),
        (b"/v1/models/org/BIG/predictions", "org/BIG"),
        (b"/v1/models/org/BIG/Predictions/", "org/BIG"),
        (b"/v2/models/m/infer", "m"),
        (b"/models/v1/chat/completions", "v1"),
        (b"/openai/deployments/org/M/chat/completions", "org/M"),
        (b"/openai/deployments/org%2FM/chat/completions", "org/M"),
        (b"/engines/org/M/completions", "org/M"),
        (b"/deployments/completions/completions", "completions"),
        (b"/v1/models", None),
        (b"/v1/models/", None),
        (b"/v1/mymodels/m:generateContent", None),
        (b"/deployments", None),
        (b"/deployments/", None),
        (b"/v1/chat/completions", None),
        (b"", None),
    ],
)
def test_a_path_names_a_deployment_or_a_called_model(path: bytes, model: str | None) -> None:
    """A deployment's segment and a model with a verb are names; a model's resource is none."""
    assert path_models(path).names == (() if model is None else (model,))
    assert (path_models(path).span is None) is (model is None)


@pytest.mark.parametrize(
    ("path", "names"),
    [
        (b"/v1/models/gpt-4", ()),
        (b"/v1/models/ft:gpt-4o:org::abc", ()),
        (b"/v1/models/llama3:8b", ()),
        (b"/v1/models/:generateContent", ()),
        (b"/v1/models/org/m", ()),
        (b"/model/m/invoke", ()),
        (b"/v1beta/models/m:countTokens", ("m",)),
        (b"/deployments/m/n/chat/completions", ("m",)),
    ],
)
def test_a_resource_that_is_read_is_no_call(path: bytes, names: tuple[str, ...]) -> None:
    """``GET`` and ``HEAD`` of a model's own resource need no model."""
    assert path_models(path, is_call=False).names == names


@pytest.mark.parametrize(
    ("path", "names"),
    [
        (b"/v1/models/gpt-4", ("gpt-4",)),
        (b"/models/org/BIG", ("org", "org/BIG")),
        (b"/models/org/BIG/v1/chat/completions", ("org/BIG/v1", "org/BIG")),
        (b"/models/org/BIG/", ("org", "org/BIG")),
        (b"/model/BIG/else", ("BIG", "BIG/else")),
        (b"/model/BIG:x/else", ("BIG:x", "BIG:x/else")),
        (b"/v1/models/ft:gpt-4o:org::abc", ("ft", "ft:gpt-4o:org::abc", "ft:gpt-4o:org:")),
        (b"/models/llama3:latest/infer", ("llama3", "llama3:latest")),
        (b"/models/a/deployments/b/completions", ("a/deployments/b", "b")),
        (b"/models/:generateContent", (":generateContent",)),
        (b"/deployments/a/deployments/b", ("a", "b")),
        (b"/deployments/a%2Fb/x", ("a/b", "a")),
        (b"/deployments/a%252Fb/x", ("a%2Fb", "a/b", "a")),
        (b"/deployments//a%2Fb/x", ("a/b", "a")),
        (b"/models//a%2Fb:predict", ("a/b",)),
        (b"/deployments//big;v=1/x", ("big;v=1", "big")),
        (b"/deployments/a/deployments//a/x", ("a",)),
        (b"/deployments%2Fbig/chat", ("big",)),
        (b"/deployments%252fbig/chat", ("big",)),
        (b"/deployments//big/chat", ("big",)),
        (b"/deployments/%2Fbig/chat", ("/big", "big")),
        (b"/deployments\\big/chat", ("big",)),
        (b"/deployments;a=b/big/chat", ("big",)),
        (b"/deployments%3Ba=b/big/chat", ("big",)),
        (b"/deployments/big;v=1/chat", ("big;v=1", "big")),
        (b"/deployments%20/big/chat", ("big",)),
        (b"/models//big:generateContent", ("big",)),
        (
            b"/models/big:x%2Fmodels%2Fother:y",
            ("big", "big:x/models/other:y", "big:x/models/other", "other"),
        ),
        (b"/models/a:predict/deployments//b", ("a", "b")),
    ],
)
def test_what_servers_read_differently_is_read_in_both_ways(
    path: bytes, names: tuple[str, ...]
) -> None:
    """Every name that some server finds counts, and none of them can be overridden."""
    found = path_models(path)
    assert found.names == names
    assert found.span is None
    with pytest.raises(BodyError, match="cannot be overridden"):
        replaced(path, "new")


@pytest.mark.parametrize(
    ("before", "after"),
    [
        (b"/deployments/big/chat", b"/deployments/new%2Fm%C3%A9/chat"),
        (b"/deployments/b%C3%A9%20", b"/deployments/new%2Fm%C3%A9"),
        (b"/models/big:generateContent", b"/models/new%2Fm%C3%A9:generateContent"),
        (b"/%6dodels/b%69g%3AgenerateContent/x", b"/%6dodels/new%2Fm%C3%A9%3AgenerateContent/x"),
        (b"/models/b%69g%3agener%61teContent", b"/models/new%2Fm%C3%A9%3agener%61teContent"),
        (b"/models/big:generateContent%2Fx", b"/models/new%2Fm%C3%A9:generateContent%2Fx"),
        (b"/models/big:generateContent;x", b"/models/new%2Fm%C3%A9:generateContent;x"),
        (b"/models/a/big:predict", b"/models/new%2Fm%C3%A9:predict"),
        (b"/model/a%2Fbig:1/invoke", b"/model/new%2Fm%C3%A9/invoke"),
        (b"/deployments/a/big/completions", b"/deployments/new%2Fm%C3%A9/completions"),
        (b"/v1/chat//completions;x", b"/v1/chat//completions;x"),
    ],
)
def test_an_override_changes_the_name_alone(before: bytes, after: bytes) -> None:
    """Every other byte of the path stays as it was."""
    assert replaced(before, "new/mé") == after


@pytest.mark.parametrize(
    ("query", "models"),
    [
        (b"", ()),
        (b"?", ()),
        (b"model=m", ("m",)),
        (b"?a=b&Model=m%2Fn+o&x", ("m/n o",)),
        (b"a;mod%65l=m", ("m",)),
        (b"model=a&model=b", ("a", "b")),
        (b"model", ("",)),
        (b"models=m&amodel=n&x=model", ()),
    ],
)
def test_a_query_names_models(query: bytes, models: tuple[str, ...]) -> None:
    """Every parameter of the name counts, in any case and however it is encoded."""
    assert query_models(query) == models


def test_what_a_long_target_costs_is_bounded() -> None:
    """One that might name a model may not have more parts than a call has; any other may."""
    for part in (b"/a", b"//", b"/\\", b"/;"):
        assert path_models(part * 8000).names == ()
        with pytest.raises(BodyError, match="too many segments"):
            path_models(b"/models" + part * 8000)
    assert query_models(b"&a=%41" * 8000) == ()
    assert query_models(b"&a=%41" * 998 + b"&model=m") == ("m",)
    with pytest.raises(BodyError, match="too many models"):
        path_models(b"/models" * 20)
    assert path_models(b"/models" + b"/x" * 63).names == ("x", "/".join("x" * 63))
    with pytest.raises(BodyError, match="too many parameters"):
        query_models(b"&a=%41" * 8000 + b"&model=m")


def test_what_is_known_of_paths_is_bounded() -> None:
    """A caller who makes up paths takes no memory for them."""
    paths = [b"/x/%d" % number for number in range(1000)] + [b"/" + b"x" * 10_000] * 2
    for path in paths:
        path_models(path)
        path_models(path, is_call=False)
    for kept in (path_model._of_call.__self__, path_model._of_read.__self__):  # type: ignore[attr-defined]  # a bound method of the memory
        assert b"/x/999" in kept
        assert len(kept) <= 256
        assert max(map(len, kept)) <= 256


@pytest.mark.parametrize(
    "path",
    [
        b"/deployments/%ff/x",
        b"/deployments/%zz/x",
        b"/deployments/a%2",
        b"/models/%c3:predict",
        b"/deployments/" + b"a" * (MODEL_BYTES + 1),
    ],
)
def test_a_path_with_a_malformed_name_is_refused(path: bytes) -> None:
    """A name in a path is percent-encoded UTF-8 of bounded length."""
    with pytest.raises(BodyError):
        path_models(path)


def test_malformed_segments_elsewhere_are_left_to_the_provider() -> None:
    """Only the name is read, so only the name is checked."""
    assert path_models(b"/%ff/%zz/deployments/m/%ff").names == ("m",)
