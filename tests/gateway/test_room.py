"""Who makes room, by what a neuron's refusal says."""

from cortex.core.catalogue import Catalogue, CatalogueModel
from cortex.core.config import Eviction
from cortex.core.errors import RemoteError
from cortex.core.neuron_api import LoadRequest, LoadResponse
from cortex.gateway.room import Shortage, choose_victims, shortage_of
from cortex.gateway.router import LoadPlan
from tests.support.fleet_views import fleet_of, model, view
from tests.support.gateway import run_gateway
from tests.support.mock_neuron import GIB, MockModel, MockNeuron
from tests.support.mock_neuron.node import RefusedError

PLAN = LoadPlan(node="a", endpoint="http://a", request=LoadRequest(model_id="m"))


def refusal(**extras: object) -> Shortage:
    error = RemoteError("no room", status=409, code="insufficient_memory", extras=dict(extras))
    return shortage_of(error)


def resident(name: str, device: int = 0, size: int = 10, **fields: object) -> dict[str, object]:
    return {
        "id": name,
        "device": device,
        "bytes": size,
        "in_flight": 0,
        "last_used_s": 5.0,
    } | fields


def victims(
    shortage: Shortage, plan: LoadPlan = PLAN, patience_s: float | None = None, **leases: int
) -> list[str] | None:
    node = view("a", model("x"), model("y"))
    listed = Catalogue(models=[CatalogueModel(id="pinned", pinned_on=["a"])])
    snapshot = fleet_of(node, leases={("a", name): count for name, count in leases.items()})
    return choose_victims(snapshot, listed, Eviction(), plan, shortage, patience_s=patience_s)


def test_the_device_where_the_fewest_have_to_leave_is_chosen() -> None:
    shortage = refusal(
        device=0,
        needed_bytes=20,
        free_bytes=0,
        devices=[
            {"device": 0, "needed_bytes": 20, "free_bytes": 0},
            {"device": 1, "needed_bytes": 20, "free_bytes": 5},
        ],
        residents=[resident("x", 0), resident("y", 0), resident("z", 1, 15)],
    )
    assert victims(shortage) == ["z"]


def test_what_the_refusal_says_of_protection_holds() -> None:
    for kept in (
        resident("x", pinned=True),
        resident("x", priority=500),
        resident("x", min_resident_left_s=9.0),
        resident("x", in_flight=1),
        resident("pinned"),
    ):
        assert victims(refusal(device=0, needed_bytes=5, residents=[kept])) is None, kept


def test_a_request_that_has_just_left_for_a_resident_protects_it() -> None:
    shortage = refusal(device=0, needed_bytes=5, residents=[resident("x"), resident("y")])
    assert victims(shortage, x=1) == ["y"]


def test_patience_sees_beyond_work_in_hand_and_short_protection() -> None:
    busy = refusal(device=0, needed_bytes=5, residents=[resident("x", in_flight=3)])
    assert victims(busy, patience_s=1.0) == ["x"]
    young = refusal(device=0, needed_bytes=5, residents=[resident("x", min_resident_left_s=30.0)])
    assert victims(young, patience_s=60.0) == ["x"]
    assert victims(young, patience_s=10.0) is None


def test_a_load_for_the_sake_of_keeping_displaces_only_what_it_may() -> None:
    keeping = LoadPlan(
        node="a", endpoint="http://a", request=LoadRequest(model_id="m"), displaces=99
    )
    shortage = refusal(device=0, needed_bytes=5, residents=[resident("x")])
    assert victims(shortage, keeping) is None
    low = refusal(device=0, needed_bytes=5, residents=[resident("x", priority=99)])
    assert victims(low, keeping) == ["x"]


def test_a_refusal_without_figures_has_no_plan() -> None:
    assert refusal(residents="what?") == Shortage()


class Stubborn(MockNeuron):
    """Refuses the first victims it is named: another gateway has just pinned them."""

    refused = 0

    async def load(self, wish: LoadRequest) -> LoadResponse:
        if wish.evict and not self.refused:
            self.refused += 1
            raise RefusedError(409, "victim_protected", "it is pinned", victim=wish.evict[0])
        return await super().load(wish)


async def test_victims_that_a_neuron_does_not_let_go_are_chosen_anew() -> None:
    models = MockModel("old", "loaded", 20 * GIB), MockModel("m", memory_bytes=8 * GIB)
    async with Stubborn(*models, total_bytes=24 * GIB) as neuron:
        async with run_gateway({"a": neuron.endpoint}) as gateway:
            gateway.apps.loads.room_retry_s = 0.01
            assert (await gateway.chat()).status == 200
            assert neuron.refused == 1
            assert [each.evict for each in neuron.loads] == [[], [], ["old"]]
