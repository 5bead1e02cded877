"""Which models a list of ours has: those that stand in the file, and that the client may use."""

from __future__ import annotations

import pytest

from llmproxy.config import Client, parse
from llmproxy.errors import ProxyError
from llmproxy.policy.routes import PathMatch, Routes

KEY = "sha256:" + "1" * 64


def at(routes: str, path: bytes = b"/a/v1/models", client: str = "") -> tuple[PathMatch, Client]:
    """Return what there is at a path, and the client ``c``, which has these further keys."""
    providers = "".join(
        f'[providers.{name}]\nurl = "https://{name}.example"\ndialect = "openai"\n' for name in "pq"
    )
    config = parse(f'{providers}{routes}[clients.c]\nkeys = ["{KEY}"]\n{client}', environ={})
    return Routes(config).at(path, "h"), config.clients["c"]


def listed(routes: str, path: bytes = b"/a/v1/models", client: str = "") -> list[str] | None:
    """Return the names of a list for the client ``c``, or None where the path asks for none."""
    match, caller = at(routes, path, client)
    assert match.lists
    found = match.list_of(caller, path)
    return None if found is None else found.names


def route(path: str, *keys: str, provider: str = "p") -> str:
    """Return a route whose lists are ours."""
    lines = (f'path = "{path}"', f'providers = ["{provider}"]', 'models_list = "configured"')
    return "\n".join(["[[routes]]", *lines, *keys, ""])


OVERRIDE = 'override = {{ p = {{ model = "{}" }} }}'


@pytest.mark.parametrize(
    ("routes", "client", "names"),
    [
        # of the route, in the order of the file
        (route("/a", 'models = ["b", "a"]'), "", ["b", "a"]),
        (route("/a", 'models = ["a", "b*", "-", "a"]'), "", ["a"]),
        (route("/a", 'models = ["a*"]'), "", []),
        (route("/a"), "", []),
        # of the client, as far as the route takes them
        (route("/a"), 'models = ["x", "y-*", "-"]', ["x"]),
        (route("/a", 'models = ["x*", "y"]'), 'models = ["x1", "z", "y"]', ["y", "x1"]),
        (route("/a", 'models = ["x1", "x2"]'), 'models = ["x1"]', ["x1"]),
        (route("/a", 'models = ["x1", "y"]'), 'models = ["x*"]', ["x1"]),
        # of overrides, as far as a caller may ask for them
        (route("/a", OVERRIDE.format("real")), "", ["real"]),
        (route("/a", OVERRIDE.format("real"), 'models = ["fast"]'), "", ["fast"]),
        (route("/a", OVERRIDE.format("fast-1"), 'models = ["fast-*"]'), "", ["fast-1"]),
        (route("/a", OVERRIDE.format("real")), 'models = ["fast"]', ["fast"]),
    ],
)
def test_the_names_are_those_of_the_file(routes: str, client: str, names: list[str]) -> None:
    """A pattern stands for names that nobody has written down."""
    assert listed(routes, client=client) == names


TWO = route("/a", 'name = "one"', 'models = ["m1"]') + route(
    "/a", 'name = "two"', 'models = ["m2", "m1"]', provider="q"
)


def test_the_routes_of_one_path_have_one_list() -> None:
    """A name that both take is the first one's, so it is there once."""
    assert listed(TWO) == ["m1", "m2"]


def test_a_name_whose_route_the_client_may_not_use_is_left_out() -> None:
    """It would get a 403; what another route would do for it does not count."""
    assert listed(TWO, client='routes = ["one"]') == ["m1"]


def test_a_client_that_may_not_use_the_route_gets_no_list() -> None:
    """It is the 403 that the provider's list would be."""
    with pytest.raises(ProxyError) as caught:
        listed(TWO, client='routes = ["two"]')
    assert (caught.value.status, caught.value.reason) == (403, "route_forbidden")


def test_names_of_other_paths_are_left_out() -> None:
    """A list is of the path that its reader calls with; the longest one is its own."""
    routes = route("/a", 'models = ["outer"]') + route("/a/b", 'models = ["inner"]')
    assert listed(routes, b"/a/b/v1/models") == ["inner"]
    assert listed(routes) == ["outer"]


def test_a_list_is_asked_for_behind_the_path_of_the_route() -> None:
    """All else goes to the provider, as it always did."""
    routes = route("/v1", 'models = ["m"]') + route("/", 'models = ["m"]')
    for path in (b"/v1/models", b"/v1/models/m", b"/v1/models/other", b"/api/tags"):
        assert listed(routes, path) == ["m"]
    for path in (b"/v1/chat/completions", b"/v1/files", b"/v1", b"/api/version"):
        assert listed(routes, path) is None


def test_other_routes_lists_are_the_providers() -> None:
    """The route of a list is found as the provider's is: it must need no model."""
    theirs = '[[routes]]\npath = "/a"\nname = "theirs"\nproviders = ["q"]\n'
    assert not at(theirs)[0].lists
    assert not at(route("/a"), b"/else")[0].lists
    assert not at(theirs + route("/a", 'models = ["m"]'))[0].lists
    assert at(theirs.replace("providers", 'models = ["m"]\nproviders') + route("/a"))[0].lists
