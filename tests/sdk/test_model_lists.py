"""Lists of models that the proxy makes, as the SDKs read them; the provider is not there."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from typing import Any

import anthropic
import ollama
import openai
import pytest

from tests.sdk.clients import KITS, Kit
from tests.sdk.sdks import KEY, SDKS, route
from tests.support.daemon import Daemon, provider_table, route_table
from tests.support.live_proxy import client_config, trace_of
from tests.support.sockets import WAIT

MODELS = [f"model-{n:02}" for n in range(50)]
SEEN = ["model-03", "model-07", "own/model x"]


@pytest.fixture(scope="module")
def proxy(tmp_path_factory: pytest.TempPathFactory, closed_url: str) -> Iterator[Daemon]:
    """A proxy that makes the lists of each SDK's route; ``team`` may use three models."""
    config = client_config("team", KEY, f"models = {[*SEEN, 'model-2*']}")
    config += client_config("all", "key-of-all")
    for sdk in SDKS:
        config += provider_table(sdk, url=closed_url, dialect=sdk)
        lists = ('models_list = "configured"', f"models = {[*MODELS, 'own/*']}")
        config += route_table(f"/{sdk}", sdk, *lists)
    with Daemon(tmp_path_factory.mktemp("lists"), config, proxy="") as daemon:
        yield daemon


@pytest.fixture(params=KITS, ids=str)
def kit(request: pytest.FixtureRequest) -> Kit:
    """An SDK."""
    found: Kit = request.param
    return found


LISTED = ["model-03", "model-07", *MODELS[20:30], "own/model x"]


def test_the_sdk_lists_what_its_key_may_use(kit: Kit, proxy: Daemon) -> None:
    """In the order of the file: names of the route first; the async client sees the same."""

    async def names(client: Any) -> list[str]:
        return [model.id async for model in client.models.list()]

    with kit.open(route(proxy, kit.name)) as client:
        assert [model.id for model in client.models.list()] == LISTED
        assert kit.run_async(route(proxy, kit.name), names) == LISTED
        assert client.models.retrieve("model-07").id == "model-07"


def test_a_model_with_a_slash_and_a_blank_is_found(kit: Kit, proxy: Daemon) -> None:
    """SDKs encode it in their own ways."""
    with kit.open(route(proxy, kit.name)) as client:
        assert client.models.retrieve("own/model x").id == "own/model x"


def test_a_model_that_its_key_may_not_use_is_not_found(kit: Kit, proxy: Daemon) -> None:
    """The SDK raises what it raises for the provider's own 404."""
    with kit.open(route(proxy, kit.name)) as client:
        sdk = openai if kit.name == "openai" else anthropic
        with pytest.raises(sdk.NotFoundError) as caught:
            client.models.retrieve("model-04")
        assert caught.value.response.headers["x-llmproxy-error"] == "no_model"


def test_anthropics_sdk_reads_page_after_page(proxy: Daemon) -> None:
    """Each page has what leads to the next one; reading backwards comes to the same."""
    base = route(proxy, "anthropic")
    with anthropic.Anthropic(base_url=base, api_key="key-of-all", timeout=WAIT) as client:
        assert [model.id for model in client.models.list()] == MODELS  # three pages of twenty
        assert [model.id for model in client.models.list(limit=7)] == MODELS
        page = client.models.list(limit=3, before_id="model-05")
        assert [model.id for model in page.data] == MODELS[2:5]
        assert (page.has_more, page.first_id, page.last_id) == (True, "model-02", "model-04")
        model = client.models.retrieve("model-05")
        assert (model.type, model.display_name, model.created_at.year) == (
            "model",
            "model-05",
            1970,
        )


def test_openais_sdk_reads_one_page(proxy: Daemon) -> None:
    """Its lists of models have no other."""
    base = f"{route(proxy, 'openai')}/v1"
    with openai.OpenAI(base_url=base, api_key="key-of-all", timeout=WAIT) as client:
        page = client.models.list()
        assert [model.id for model in page.data] == MODELS
        assert page.has_next_page() is False
        assert {(model.object, model.owned_by) for model in page.data} == {("model", "llmproxy")}


def test_ollamas_sdk_reads_tags(proxy: Daemon) -> None:
    """Also at the route of another dialect, whose provider may have both APIs."""
    headers = {"Authorization": f"Bearer {KEY}"}

    async def scene(base: str) -> Any:
        async with ollama.AsyncClient(host=base, headers=headers, timeout=WAIT) as client:
            return await client.list()

    for sdk in ("ollama", "openai"):
        base = route(proxy, sdk)
        with ollama.Client(host=base, headers=headers, timeout=WAIT) as client:
            tags = client.list()
        assert tags == asyncio.run(scene(base))
        assert [model.model for model in tags.models] == LISTED


def test_a_list_needs_a_key(kit: Kit, proxy: Daemon) -> None:
    """As every other request does."""
    base = route(proxy, kit.name) + kit.path
    with kit.client(base_url=base, api_key="wrong", max_retries=0, timeout=WAIT) as client:
        sdk = openai if kit.name == "openai" else anthropic
        with pytest.raises(sdk.AuthenticationError):
            list(client.models.list())


def test_the_record_says_that_no_provider_was_asked(proxy: Daemon) -> None:
    """It has the route and the client, and the metric an empty provider."""
    with openai.OpenAI(
        base_url=f"{route(proxy, 'openai')}/v1", api_key=KEY, timeout=WAIT
    ) as client:
        raw = client.models.with_raw_response.list()
    assert raw.headers["content-type"] == "application/json"
    record = trace_of(proxy, id=raw.headers["x-llmproxy-request-id"])
    assert (record["client"], record["route"], record["provider"]) == ("team", "openai", None)
    assert (record["status"], record["end_reason"], record["attempts"]) == (200, "complete", [])
    assert record["is_complete"] is True
    labels = 'client="team",method="GET",provider="",route="openai",status="2xx"'
    assert proxy.metrics()[f"llmproxy_requests_total{{{labels}}}"] >= 1
