"""How well prompts are spread: the gateway's own choice beside plain ones, in virtual time."""

import msgspec
import pytest

from tests.support.mock_neuron.engine import EngineSpec
from tests.support.routed_fleet import Figures, Workload, measure

DENSE = EngineSpec(
    prefill_tok_s=6000, step_s=0.015, step_per_seq_s=0.0005, num_blocks=700, max_tokens=16
)
# A model with a recurrent state: it goes on only from snapshots, of which it keeps few.
HYBRID = msgspec.structs.replace(DENSE, snapshot_tokens=1024, max_snapshots=48)
WORK = Workload(rate=20, seconds=20)


@pytest.fixture(scope="module", params=["dense", "hybrid"])
def found(request: pytest.FixtureRequest) -> dict[str, Figures]:
    spec = DENSE if request.param == "dense" else HYBRID
    policies = ("cortex", "round_robin", "random", "least_loaded")
    return {kind: measure(kind, spec, WORK) for kind in policies}


@pytest.mark.parametrize("other", ["round_robin", "random", "least_loaded"])
def test_twice_as_many_prompt_tokens_are_cached(found: dict[str, Figures], other: str) -> None:
    assert found["cortex"].cached > 0.75
    assert found["cortex"].cached > 1.9 * found[other].cached


@pytest.mark.parametrize("other", ["round_robin", "random", "least_loaded"])
def test_nine_of_ten_first_tokens_come_in_half_the_time(
    found: dict[str, Figures], other: str
) -> None:
    assert found["cortex"].ttft(0.9) < 0.5 * found[other].ttft(0.9)


def test_every_request_is_answered_and_no_node_is_left_out(found: dict[str, Figures]) -> None:
    assert found["cortex"].failed == 0
    assert min(found["cortex"].per_node.values()) > 0


def test_one_prompt_for_all_does_not_make_one_node_hot() -> None:
    one = Workload(num_prompts=1, rate=150, seconds=8)
    ours = measure("cortex", DENSE, one)
    assert ours.failed == 0
    assert ours.busiest < 1.5
    assert ours.ttft(0.9) <= 1.2 * measure("least_loaded", DENSE, one).ttft(0.9)


def test_the_same_seed_gives_the_same_figures() -> None:
    work = Workload(rate=20, seconds=5)
    first, second = (measure("cortex", DENSE, work) for _ in range(2))
    assert first == second
