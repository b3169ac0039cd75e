"""The mock node's ledger, loads and faults behave as a real neuron's do."""

import asyncio

import pytest

from cortex.core.neuron_api import LoadRequest
from tests.support import virtual_time
from tests.support.mock_neuron.engine import EngineSpec
from tests.support.mock_neuron.faults import FaultCommand, FaultKind
from tests.support.mock_neuron.node import Node, RefusedError
from tests.support.mock_neuron.script import GIB, MockModel


def wish(model_id: str, **more: object) -> LoadRequest:
    return LoadRequest(model_id=model_id, **more)  # type: ignore[arg-type]


def slow(model_id: str, gib: int, status: str = "unloaded") -> MockModel:
    """A model that loads at 1 GiB/s."""
    return MockModel(
        model_id, status, gib * GIB, load_bytes_s=float(GIB), engine=EngineSpec(max_tokens=4)
    )


def test_a_load_takes_its_bytes_over_the_rate_and_reports_progress() -> None:
    async def main() -> None:
        node = Node(slow("m", 8))
        async with asyncio.TaskGroup() as tasks:
            load = tasks.create_task(node.load(wish("m")))
            await asyncio.sleep(2.5)
            progress = node.info(node.models["m"]).progress
            assert progress is not None
            assert (progress.bytes_done, progress.seconds_left) == (2 * GIB, 6.0)
            assert node.free_bytes == 56 * GIB
        assert load.result().load_s == pytest.approx(8, abs=0.01)
        assert virtual_time.now_s() == pytest.approx(8, abs=0.01)
        await node.end_tasks()

    virtual_time.run(main())


def test_a_second_caller_joins_and_one_that_leaves_does_not_stop_the_load() -> None:
    async def main() -> None:
        node = Node(slow("m", 8))
        async with asyncio.TaskGroup() as tasks:
            first = tasks.create_task(node.load(wish("m")))
            await asyncio.sleep(1)
            first.cancel()
            await node.load(wish("m"))
        assert (len(node.loads), node.starts) == (2, ["m"])
        assert virtual_time.now_s() == pytest.approx(8, abs=0.01)
        await node.end_tasks()

    virtual_time.run(main())


def test_without_room_the_answer_is_what_is_missing_and_nobody_has_left() -> None:
    async def main() -> None:
        node = Node(
            slow("a", 6, "loaded"), slow("b", 6, "loaded"), slow("m", 12), total_bytes=16 * GIB
        )
        with pytest.raises(RefusedError) as refused:
            await node.load(wish("m", evict=["a"]))
        assert refused.value.status == 409
        assert refused.value.extras["needed_bytes"] == 12 * GIB
        assert refused.value.extras["free_bytes"] == 4 * GIB
        assert [each["id"] for each in refused.value.extras["residents"]] == ["a", "b"]  # type: ignore[attr-defined]
        assert node.models["a"].status == "loaded"
        assert (await node.load(wish("m", evict=["a", "b"]))).evicted == ["a", "b"]
        await node.end_tasks()

    virtual_time.run(main())


@pytest.mark.parametrize("why", ["busy", "pinned", "young"])
def test_a_model_that_may_not_leave_stays(why: str) -> None:
    async def main() -> None:
        node = Node(slow("a", 12), slow("m", 12), total_bytes=16 * GIB)
        await node.load(
            wish("a", pinned=why == "pinned", min_resident_s=60 if why == "young" else 0)
        )
        if why == "busy":
            node.begin(node.models["a"])
        with pytest.raises(RefusedError):
            await node.load(wish("m", evict=["a"]))
        assert node.models["a"].status == "loaded"
        if why == "young":
            await asyncio.sleep(61)
            assert (await node.load(wish("m", evict=["a"]))).evicted == ["a"]
        await node.end_tasks()

    virtual_time.run(main())


def test_models_go_to_the_device_with_the_most_room() -> None:
    async def main() -> None:
        node = Node(*(slow(name, 10) for name in "abc"), total_bytes=16 * GIB, num_devices=2)
        for name in "ab":
            await node.load(wish(name))
        assert [node.models[name].device for name in "ab"] == [0, 1]
        with pytest.raises(RefusedError):
            await node.load(wish("c"))
        await node.end_tasks()

    virtual_time.run(main())


@pytest.mark.parametrize(
    ("kind", "status", "words"),
    [
        ("disk_full", 503, "No space left"),
        ("corrupt_checkpoint", 422, "cut short"),
        ("hub_unreachable", 502, "cannot be reached"),
        ("out_of_memory", 503, "out of memory"),
    ],
)
def test_a_load_that_fails_half_way_leaves_its_cause_and_cools_down(
    kind: FaultKind, status: int, words: str
) -> None:
    async def main() -> None:
        node = Node(slow("m", 8))
        node.apply(FaultCommand(kind=kind))
        async with asyncio.TaskGroup() as tasks:
            waiters = [tasks.create_task(_refusal(node)) for _ in range(3)]
        for each in waiters:
            assert each.result().status == status
            assert words in each.result().message
        assert virtual_time.now_s() == pytest.approx(4, abs=0.01)
        assert node.models["m"].status == "failed"
        assert node.free_bytes == 64 * GIB
        node.faults.clear()
        assert words in (await _refusal(node)).message
        await asyncio.sleep(6)
        assert (await node.load(wish("m"))).status == "loaded"
        await node.end_tasks()

    virtual_time.run(main())


async def _refusal(node: Node) -> RefusedError:
    with pytest.raises(RefusedError) as refused:
        await node.load(wish("m"))
    return refused.value


def test_a_hung_engine_is_noticed_and_started_again() -> None:
    async def main() -> None:
        node = Node(slow("m", 8, "loaded"))
        node.start_engines()
        node.apply(FaultCommand(kind="hang_engine", after_s=3))
        await asyncio.sleep(4)
        assert node.models["m"].status == "recovering"
        await asyncio.sleep(8)
        assert node.models["m"].status == "loaded"
        await node.end_tasks()

    virtual_time.run(main())


def test_unloading_waits_for_the_requests_in_hand() -> None:
    async def main() -> None:
        node = Node(slow("m", 8, "loaded"))
        node.begin(node.models["m"])
        async with asyncio.TaskGroup() as tasks:
            leaving = tasks.create_task(node.unload("m"))
            await asyncio.sleep(5)
            assert (node.models["m"].status, leaving.done()) == ("draining", False)
            node.models["m"].in_flight -= 1
            await node.changed()
        assert node.free_bytes == 64 * GIB

    virtual_time.run(main())


def test_a_model_that_nobody_uses_is_unloaded_after_its_time() -> None:
    async def main() -> None:
        node = Node(slow("m", 2))
        await node.load(wish("m", ttl_s=10))
        await asyncio.sleep(6)
        node.begin(node.models["m"])
        await asyncio.sleep(20)
        assert node.models["m"].status == "loaded"
        node.models["m"].in_flight -= 1
        await asyncio.sleep(2)
        assert node.models["m"].status == "unloaded"

    virtual_time.run(main())
