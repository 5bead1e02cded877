"""Where a request goes: paths by whole segments, hosts, models, and the rights of clients."""

from __future__ import annotations

import hashlib

import pytest

from llmproxy.config import Client, parse
from llmproxy.dialects.dialect import Dialect
from llmproxy.errors import ProxyError
from llmproxy.policy.routes import Named, NoModel, RouteMatch, Routes, refuse_dots

KEY = "sha256:" + hashlib.sha256(b"key").hexdigest()


NO_BODY, UNNAMED = NoModel.WITHOUT_BODY, NoModel.WITH_BODY


class Routing(Routes):
    """Routes, and one client that is known."""

    client: Client

    def to(
        self,
        target: bytes,
        *models: Named,
        host: str = "h",
        client: Client | None = None,
        reads_list: bool = False,
    ) -> RouteMatch:
        """Return where a request goes."""
        place = self.at(target.partition(b"?")[0], host)
        named = models or (NO_BODY,)
        return place.choose(client or self.client, target, named, reads_list=reads_list)

    def refusal(self, target: bytes, *models: Named, host: str = "h") -> ProxyError:
        """Return why a request goes nowhere."""
        with pytest.raises(ProxyError) as caught:
            self.to(target, *models, host=host)
        return caught.value


def configured(*routes: str, provider: str = "", client: str = "") -> Routing:
    """Return routes; each item is one ``[[routes]]``, to provider ``p`` unless it names another.

    Args:
        provider: more keys of ``p``.
        client: more keys of the one client.
    """
    tables = ""
    for route in routes:
        where = "" if "providers" in route else 'providers = ["p"]\n'
        tables += f"[[routes]]\n{where}{route}\n"
    config = parse(
        f'[providers.p]\nurl = "https://p.example/base"\ndialect = "openai"\n{provider}\n'
        '[providers.q]\nurl = "http://q.example"\ndialect = "anthropic"\n'
        '[providers.o]\nurl = "http://o.example"\ndialect = "ollama"\npass_credential = true\n'
        f'{tables}[clients.c]\nkeys = ["{KEY}"]\n{client}',
        environ={},
    )
    routing = Routing(config)
    routing.client = config.clients["c"]
    return routing


ANYBODY = Client(name="anonymous", keys=())


def sent_to(match: RouteMatch) -> bytes:
    """Return the target that the one candidate gets."""
    (candidate,) = match.candidates
    return match.target(candidate)


# --- paths ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("route", "target", "sent"),
    [
        ('path = "/a"', b"/a/v1", b"/base/v1"),
        ('path = "/a"', b"/a", b"/base"),
        ('path = "/a"', b"/a/", b"/base/"),
        ('path = "/a"', b"/a?x", b"/base?x"),
        ('path = "/a"', b"/a/v1?", b"/base/v1?"),
        ('path = "/a"', b'/a//b%2F{x}|"?y=/../%zz?', b'/base//b%2F{x}|"?y=/../%zz?'),
        ('path = "/a/b"', b"/a/b/c", b"/base/c"),
        ('path = "/"', b"/v1", b"/base/v1"),
        ('path = "/"', b"/", b"/base/"),
        ('path = "/a"\nstrip = false', b"/a/v1?x", b"/base/a/v1?x"),
        ('path = "/"\nstrip = false', b"/v1", b"/base/v1"),
    ],
)
def test_the_routes_path_is_cut_off_and_the_rest_crosses(
    route: str, target: bytes, sent: bytes
) -> None:
    """Path and query are the client's, byte for byte, behind the path of the provider's URL."""
    assert sent_to(configured(route).to(target)) == sent


def test_a_provider_without_a_path_is_asked_for_its_root() -> None:
    """A target is never empty."""
    routing = configured('path = "/q"\nproviders = ["q"]')

    assert sent_to(routing.to(b"/q")) == b"/"
    assert sent_to(routing.to(b"/q?x")) == b"/?x"


@pytest.mark.parametrize(
    "target",
    [b"/", b"/ab", b"/ab/c", b"/A", b"/b/a", b"/%61", b"//a", b"/?/a", b"/a%2fb", b"/a;x"],
)
def test_paths_are_compared_by_whole_segments(target: bytes) -> None:
    """What merely looks like a route's path, or encodes it, is another path: 404."""
    error = configured('path = "/a"').refusal(target)

    assert (error.status, error.reason) == (404, "no_route")


def test_the_longest_path_wins() -> None:
    """The order of the file does not matter."""
    routing = configured('path = "/"', 'path = "/a/b"', 'path = "/a"')
    for target, name in ((b"/a/b/c", "a/b"), (b"/a/bc", "a"), (b"/b", "root")):
        assert routing.to(target).route.name == name


def test_the_more_particular_route_wins_and_then_the_first() -> None:
    """Hosts and models make a route more particular; among equals the first one counts."""
    routing = configured(
        'path = "/a"\nname = "plain"',
        'path = "/a"\nname = "second"',
        'path = "/a"\nname = "hosts"\nhosts = ["h"]',
        'path = "/a"\nname = "both"\nhosts = ["h"]\nmodels = ["m"]',
    )

    assert routing.to(b"/a", "m").route.name == "both"
    assert routing.to(b"/a", "else").route.name == "hosts"
    assert routing.to(b"/a", "m", host="else").route.name == "plain"


def test_a_longer_path_that_does_not_match_leaves_the_shorter() -> None:
    """Only routes of which path, hosts and models match are compared."""
    routing = configured(
        'path = "/a"', 'path = "/a/b"\nmodels = ["m"]', 'path = "/a/b/c"\nhosts = ["else"]'
    )

    assert routing.to(b"/a/b/c", "m").route.name == "a/b"
    assert routing.to(b"/a/b/c", "n").route.name == "a"


@pytest.mark.parametrize("path", [b"/a/../b", b"/a/..;/b", b"/a/%252e%252e/b"])
def test_dot_segments_are_refused(path: bytes) -> None:
    """A path that may lead out of its route is a 400 (``http1/path.py`` knows which)."""
    with pytest.raises(ProxyError) as caught:
        refuse_dots(path)

    assert (caught.value.status, caught.value.reason) == (400, "bad_path")
    refuse_dots(b"/a..b/v1.0")


# --- hosts ----------------------------------------------------------------------------------------


def test_who_asks_for_a_host_without_a_route_is_told_that_it_is_the_host() -> None:
    """The path is good elsewhere; the operator sees which host it was."""
    routing = configured('path = "/a"\nhosts = ["one.example"]', 'path = "/b"')
    error = routing.refusal(b"/a/v1", host="two.example")
    assert (error.status, error.reason) == (404, "no_route")
    assert error.message == "No route for this host leads to this path."
    assert error.detail == "host two.example"
    other = routing.refusal(b"/c", host="two.example")
    assert (other.message, other.detail) == ("No route leads to this path.", "")


def test_hosts_are_compared_where_a_route_names_some() -> None:
    """Without ``hosts`` any host is good."""
    routing = configured('path = "/a"\nhosts = ["One.example", "two.example"]', 'path = "/b"')

    assert routing.to(b"/a", host="one.example").route.name == "a"
    assert routing.to(b"/b", host="whatever").route.name == "b"
    for host in ("else", "", "example", "x.one.example"):
        assert routing.refusal(b"/a", host=host).status == 404


# --- models ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("patterns", "good", "bad"),
    [
        ('["*"]', ["m", "", "a\nb", NO_BODY, UNNAMED], []),
        ('["m"]', ["m"], ["M", "mm", "m\n", "", NO_BODY, UNNAMED]),
        ('["gpt-*"]', ["gpt-", "gpt-4", "gpt-a\nb"], ["gpt", "xgpt-4", NO_BODY]),
        ('["*-mini", "a*b*c"]', ["x-mini", "abc", "aXbYc"], ["mini", "acb", NO_BODY]),
        ('["g.t", "[ab]+"]', ["g.t", "[ab]+"], ["gpt", "a", NO_BODY]),
        ('["-"]', [NO_BODY], ["m", "-", "", UNNAMED]),
        ('["m", "-"]', [NO_BODY, "m"], ["n", "-", UNNAMED]),
    ],
)
def test_model_patterns(patterns: str, good: list[Named], bad: list[Named]) -> None:
    """``*`` stands for anything, ``-`` for no body, everything else for itself."""
    routed = configured(f'path = "/a"\nmodels = {patterns}')
    allowed = configured('path = "/a"', client=f"models = {patterns}")
    for routing, status in ((routed, 404), (allowed, 403)):
        for model in good:
            assert routing.to(b"/a", model).route.name == "a"
        for model in bad:
            assert routing.refusal(b"/a", model).status == status
        if NO_BODY in good:
            assert routing.to(b"/a").route.name == "a"


def test_all_models_must_be_allowed() -> None:
    """A path cannot smuggle in a model that the body does not name, nor the other way round."""
    routing = configured('path = "/a"\nmodels = ["x", "y"]', client='models = ["x", "z"]')

    assert routing.to(b"/a", "x", "x").route.name == "a"
    for models in (("x", "y"), ("y", "x")):
        assert routing.refusal(b"/a", *models).status == 403
    for models in (("x", "z"), ("z", "x")):
        assert routing.refusal(b"/a", *models).status == 404


def test_a_list_is_read_by_whoever_may_use_the_route() -> None:
    """The route that takes a request without a model comes first, or else any at the path."""
    routing = configured(
        'path = "/a"\nname = "few"\nmodels = ["x"]',
        'path = "/b"\nname = "one"\nmodels = ["y"]',
        'path = "/b"\nname = "two"',
        client='models = ["x"]\nroutes = ["few", "two"]',
    )

    assert routing.to(b"/a", NO_BODY, reads_list=True).route.name == "few"
    assert routing.to(b"/b", NO_BODY, reads_list=True).route.name == "two"
    for target, status in ((b"/c", 404), (b"/a", 404)):
        assert routing.refusal(target, NO_BODY).status == status


@pytest.mark.parametrize("base", ["/openai/deployments", "/openai/deployments/", "/x/models"])
def test_what_a_path_says_behind_the_providers_own_counts(base: str) -> None:
    """A provider's URL may end where the name of a model begins."""
    routing = configured(
        'path = "/a"\nproviders = ["az"]\nmodels = ["x", "y"]',
        'path = "/over"\nproviders = ["az"]\n[routes.override]\naz = { model = "prod" }',
        provider=f'[providers.az]\nurl = "https://az.example{base}"\ndialect = "openai"',
        client='models = ["x", "z"]',
    )

    path = b"/a/%b:chat" if base.endswith("models") else b"/a/%b/chat"
    assert routing.to(path % b"x", "x").route.name == "a"
    assert routing.refusal(path % b"y", "x").status == 403
    assert routing.refusal(path % b"z", "x").status == 404
    match = routing.to(path.replace(b"/a", b"/over") % b"x", "x")
    assert b"prod" in sent_to(match)


# --- what is known of places ----------------------------------------------------------------------


def test_the_places_that_are_remembered_are_bounded() -> None:
    """A caller who makes up paths or hosts takes a bounded memory for them."""
    routing = configured('path = "/a"')
    for number in range(1500):
        routing.at(b"/a/%d" % number, "h")
    assert len(routing._known) == 1024
    assert routing.at(b"/a/1499", "h").body_limit == routing.at(b"/a/0", "h").body_limit


def test_a_long_place_is_not_remembered() -> None:
    """The memory of one is bounded, too."""
    routing = configured('path = "/a"')
    for path, host in ((b"/" * 256, "h"), (b"/a", "h" * 300), (b"/a" * 64, "h" * 128)):
        routing.at(path, host)
    assert not routing._known
    routing.at(b"/a", "h")
    assert len(routing._known) == 1


def test_a_candidate_has_the_model_of_the_override() -> None:
    """Without an override the candidate has no model of its own."""
    routing = configured('path = "/a"\n[routes.override]\np = { model = "prod" }', 'path = "/b"\n')

    assert [one.model for one in routing.to(b"/a", "m").candidates] == ["prod"]
    assert [one.model for one in routing.to(b"/b", "m").candidates] == [None]


# --- permissions ----------------------------------------------------------------------------------


def test_a_client_may_use_its_own_routes_only() -> None:
    """Another route is a 403, not a 404: the path is known."""
    routing = configured('path = "/a"', 'path = "/b"', client='routes = ["a"]')

    assert routing.to(b"/a").route.name == "a"
    error = routing.refusal(b"/b")
    assert (error.status, error.reason) == (403, "route_forbidden")
    assert routing.to(b"/b", "any", client=ANYBODY).route.name == "b"


@pytest.mark.parametrize(
    ("models", "matters"), [('["*"]', False), ('["m"]', True), ('["-"]', True)]
)
def test_a_restricted_client_makes_the_model_matter(models: str, matters: bool) -> None:
    """Where a client may not use every model, its bodies must be looked into."""
    routing = configured('path = "/a"', client=f"models = {models}")

    assert routing.at(b"/a", "h").needs_model(routing.client) is matters
    assert routing.at(b"/a", "h").needs_model() is matters
    assert routing.at(b"/a", "h").needs_model(ANYBODY) is False


@pytest.mark.parametrize(
    ("more", "matters"),
    [
        ("", False),
        ('models = ["m"]', True),
        ('[routes.override]\np = { model = "prod" }', True),
    ],
)
def test_a_route_makes_the_model_matter(more: str, matters: bool) -> None:
    """Where models decide, or one is overridden, bodies must be looked into."""
    routing = configured(f'path = "/a"\nhosts = ["h"]\n{more}', 'path = "/b"')

    for client in (None, routing.client):
        assert routing.at(b"/a/x", "h").needs_model(client) is matters
        assert routing.at(b"/a/x", "else").needs_model(client) is False
        assert routing.at(b"/b", "h").needs_model(client) is False


# --- before a client is identified ----------------------------------------------------------------


def test_an_unknown_path_is_refused_before_the_body_is_read() -> None:
    """404 for a path or host to which no route leads, whatever the model."""
    routing = configured('path = "/a"\nhosts = ["h"]\nmodels = ["m"]')
    routing.at(b"/a/b", "h").require()
    for path, host in ((b"/b", "h"), (b"/a", "else")):
        with pytest.raises(ProxyError) as caught:
            routing.at(path, host).require()
        assert caught.value.status == 404


@pytest.mark.parametrize(
    ("path", "dialect"),
    [
        (b"/p/x", Dialect.OPENAI),
        (b"/q/v1/chat", Dialect.ANTHROPIC),
        (b"/o", Dialect.OLLAMA),
        (b"/v1/messages", Dialect.ANTHROPIC),
        (b"/else", Dialect.OPENAI),
    ],
)
def test_errors_speak_the_dialect_of_the_route(path: bytes, dialect: Dialect) -> None:
    """The first candidate's dialect counts where the path matches, else that of the path's form."""
    routing = configured(
        'path = "/p"', 'path = "/q"\nproviders = ["q"]', 'path = "/o"\nproviders = ["o"]'
    )

    assert routing.at(path, "h").dialect is dialect


def test_the_path_decides_whose_key_the_fields_of_sdks_carry() -> None:
    """The first route that matches by path and host decides."""
    routing = configured('path = "/a"', 'path = "/a/b"\nhosts = ["h"]\nproviders = ["o"]')

    assert routing.at(b"/a/b/c", "h").keys.passes is True
    assert routing.at(b"/a/b/c", "else").keys.passes is False
    assert routing.at(b"/a", "h").keys.passes is False
    assert routing.at(b"/else", "h").keys.passes is False


def test_the_largest_limit_of_a_path_bounds_its_bodies() -> None:
    """The route itself is known only after the body was read."""
    routing = configured(
        'path = "/a"\nrequest_body = "1KiB"',
        'path = "/a/b"\nrequest_body = "2KiB"',
        'path = "/c"',
        'path = "/c/d"\nrequest_body = "64MiB"',
    )

    assert routing.at(b"/a/x", "h").body_limit == 1024
    assert routing.at(b"/a/b", "h").body_limit == 2048
    assert routing.at(b"/c", "h").body_limit == 32 * 1024**2
    assert routing.at(b"/c/d/e", "h").body_limit == 64 * 1024**2
    assert routing.at(b"/else", "h").body_limit == 32 * 1024**2


def test_deadlines_are_the_routes_then_the_providers_then_ours() -> None:
    """What is set nearer to the request counts."""
    routing = configured(
        'path = "/a"\ntimeouts = { connect = "1s" }',
        provider='timeouts = { connect = "2s", idle = "off" }',
    )
    (candidate,) = routing.to(b"/a").candidates
    timeouts = candidate.timeouts

    assert (timeouts.connect, timeouts.idle, timeouts.first_byte) == (1.0, None, 600.0)
