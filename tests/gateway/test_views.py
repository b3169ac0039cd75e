"""The model listing and the health report, over HTTP."""

import anthropic
import pytest

from cortex.core.catalogue import Catalogue, CatalogueModel
from cortex.core.entitlements import ApiKey, Entitlements
from cortex.core.neuron_api import Cost, Limit, Servable
from tests.support.gateway import run_gateway
from tests.support.mock_neuron import MockModel, MockNeuron


async def test_health_is_ok_and_says_what_every_node_is_doing() -> None:
    model = MockModel("m", "loaded", reported_in_flight=2, queue_depth=1)
    async with MockNeuron(model, MockModel("n")) as neuron:
        async with run_gateway({"a": neuron.endpoint}) as gateway:
            for path in ("/health", "/"):
                response = await gateway.get(path)
                assert response.status == 200
                report = await response.json()
                assert report["status"] == "ok"
                assert report["nodes"] == {"healthy": 1, "total": 1}
                assert report["unservable"] == []
                node = report["details"][0]
                assert (node["name"], node["healthy"]) == ("a", True)
                counts = (node["in_flight"], node["queue_depth"], node["free_slots"])
                assert counts == (2, 1, 6)
                states = [(each["id"], each["state"]) for each in node["models"]]
                assert states == [("m", "loaded"), ("n", "unloaded")]


async def test_head_of_the_root_answers() -> None:
    async with run_gateway({}) as gateway:
        async with gateway.session.head(gateway.url + "/") as response:
            assert response.status == 200


async def test_health_is_degraded_without_any_healthy_node() -> None:
    async with run_gateway({"a": "http://127.0.0.1:9"}) as gateway:
        response = await gateway.get("/health")
        assert response.status == 200
        report = await response.json()
        assert report["status"] == "degraded"
        assert report["nodes"] == {"healthy": 0, "total": 1}
        assert "cannot be reached" in report["details"][0]["error"]


async def test_health_is_impaired_when_one_node_of_two_is_down() -> None:
    async with MockNeuron() as neuron:
        nodes = {"a": neuron.endpoint, "b": "http://127.0.0.1:9"}
        async with run_gateway(nodes) as gateway:
            report = await (await gateway.get("/health")).json()
            assert report["status"] == "impaired"
            assert report["nodes"] == {"healthy": 1, "total": 2}


async def test_a_resident_model_that_cannot_serve_impairs_and_is_named() -> None:
    sick = MockModel("m", "loaded", servable=Servable(ok=False, reason="poisoned", detail="XID"))
    async with MockNeuron(sick, MockModel("n", "recovering")) as neuron:
        async with run_gateway({"a": neuron.endpoint}) as gateway:
            report = await (await gateway.get("/health")).json()
            assert report["status"] == "impaired"
            assert report["unservable"] == [
                {"node": "a", "model": "m", "reason": "poisoned", "detail": "XID"},
                {"node": "a", "model": "n", "reason": "recovering", "detail": None},
            ]


async def test_the_listing_merges_catalogue_nodes_and_aliases_sorted_by_id() -> None:
    listed = Catalogue(
        models=[CatalogueModel(id="z", limit=Limit(context=9000), cost=Cost(input=0.0))],
        aliases={"fast": "m", "dead": "nowhere"},
    )
    loaded = MockModel("m", "loaded", limit=Limit(context=4096, output=512))
    async with MockNeuron(loaded, MockModel("b")) as neuron:
        async with run_gateway({"a": neuron.endpoint}, catalogue=listed) as gateway:
            listing = await (await gateway.get("/v1/models")).json()
            assert listing["object"] == "list"
            assert [card["id"] for card in listing["data"]] == ["b", "fast", "m", "z"]
            cards = {card["id"]: card for card in listing["data"]}
            assert cards["m"] == {
                "id": "m",
                "object": "model",
                "created": 1767225600,
                "owned_by": "cortex",
                "loaded": True,
                "status": "loaded",
                "feasible_on": ["a"],
                "locations": [{"node": "a", "status": "loaded", "vram_estimate_mb": 1024}],
                "capabilities": ["text"],
                "limit": {"context": 4096, "output": 512},
                "max_model_len": 4096,
                "max_output_tokens": 512,
            }
            assert {**cards["fast"], "id": "m"} == cards["m"]
            assert cards["b"]["status"] == "unloaded"
            assert not cards["b"]["loaded"]
            assert cards["z"]["limit"] == {"context": 9000}
            assert cards["z"]["cost"] == {"input": 0.0}


async def test_limits_are_the_tightest_over_replicas() -> None:
    wide = MockModel("m", "loaded", limit=Limit(context=8192, input=8000))
    narrow = MockModel("m", "loaded", limit=Limit(context=4096))
    async with MockNeuron(wide) as first, MockNeuron(narrow) as second:
        async with run_gateway({"a": first.endpoint, "b": second.endpoint}) as gateway:
            card = await (await gateway.get("/v1/models/m")).json()
            assert card["limit"] == {"context": 4096, "input": 8000}
            assert [each["node"] for each in card["locations"]] == ["a", "b"]


async def test_one_model_is_had_by_its_id_with_slashes_and_by_alias() -> None:
    aliases = Catalogue(aliases={"short": "org/m"})
    async with MockNeuron(MockModel("org/m")) as neuron:
        async with run_gateway({"a": neuron.endpoint}, catalogue=aliases) as gateway:
            for name in ("org/m", "org%2Fm", "short"):
                response = await gateway.get(f"/v1/models/{name}")
                assert response.status == 200
            response = await gateway.get("/v1/models/nope")
            assert response.status == 404
            assert (await response.json())["error"]["code"] == "model_not_found"


async def test_the_listing_has_the_anthropic_shape_for_anthropic_callers() -> None:
    async with MockNeuron(MockModel("b"), MockModel("m", "loaded")) as neuron:
        async with run_gateway({"a": neuron.endpoint}) as gateway:
            response = await gateway.get("/v1/models", anthropic_version="2023-06-01")
            listing = await response.json()
            assert [(each["type"], each["id"]) for each in listing["data"]] == [
                ("model", "b"),
                ("model", "m"),
            ]
            assert (listing["has_more"], listing["first_id"], listing["last_id"]) == (
                False,
                "b",
                "m",
            )
            response = await gateway.get("/v1/models/m", anthropic_version="2023-06-01")
            card = await response.json()
            assert (card["type"], card["id"]) == ("model", "m")
            assert card["created_at"] == "2026-01-01T00:00:00Z"
            response = await gateway.get("/v1/models/nope", anthropic_version="2023-06-01")
            assert response.status == 404
            body = await response.json()
            assert (body["type"], body["error"]["type"]) == ("error", "not_found_error")


async def test_the_sdk_reads_the_models_of_its_key_page_by_page() -> None:
    names = ["org/a", "org/b", "org/c", "org/d", "z"]
    keys = [ApiKey(key="k", account_id="a", models=["org/*"])]
    entitlements = Entitlements(require_auth=True, keys=keys)
    async with MockNeuron(*(MockModel(name) for name in names)) as neuron:
        async with run_gateway({"a": neuron.endpoint}, entitlements=entitlements) as gateway:
            async with anthropic.AsyncAnthropic(
                base_url=gateway.url, api_key="k", max_retries=0
            ) as client:
                page = await client.models.list(limit=3)
                assert [model.id for model in page.data] == ["org/a", "org/b", "org/c"]
                assert page.has_more
                paged = [model.id async for model in client.models.list(limit=3)]
                assert paged == ["org/a", "org/b", "org/c", "org/d"]
                back = [model.id async for model in client.models.list(limit=2, before_id="z")]
                assert back == ["org/c", "org/d", "org/a", "org/b"]
                assert (await client.models.retrieve("org/b")).id == "org/b"
                with pytest.raises(anthropic.NotFoundError):
                    await client.models.retrieve("z")
                with pytest.raises(anthropic.BadRequestError):
                    await client.models.list(limit=0)
                with pytest.raises(anthropic.BadRequestError):
                    await client.models.list(after_id="a", before_id="b")
