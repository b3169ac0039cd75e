import pytest

from cortex.core.errors import QueueFullError
from cortex.neuron.engine.scheduler import Chunk, Scheduler
from tests.neuron.engine.building import make_scheduler, make_sequence


def plan(chunks: list[Chunk]) -> list[tuple[int, int]]:
    return [(chunk.sequence.request_id, chunk.num_tokens) for chunk in chunks]


def step(scheduler: Scheduler, max_tokens: int | None = None) -> list[tuple[int, int]]:
    """Run one step in which every finished chunk samples token 2."""
    chunks = scheduler.schedule(max_tokens)
    planned = plan(chunks)
    ready = [chunk.sequence for chunk in chunks if chunk.is_last]
    scheduler.commit(chunks)
    for sequence in ready:
        sequence.append(2)
    return planned


def test_a_prompt_is_computed_whole_when_the_budget_allows():
    scheduler = make_scheduler()
    scheduler.add(make_sequence(1, 10))
    assert step(scheduler) == [(1, 10)]
    assert step(scheduler) == [(1, 1)]


def test_a_long_prompt_is_cut_into_chunks_of_the_budget():
    scheduler = make_scheduler(max_batched_tokens=16)
    scheduler.add(make_sequence(1, 40))
    assert [step(scheduler) for _ in range(4)] == [[(1, 16)], [(1, 16)], [(1, 8)], [(1, 1)]]


def test_decodes_go_before_prefill_chunks_in_one_step():
    scheduler = make_scheduler(max_batched_tokens=16)
    scheduler.add(make_sequence(1, 3))
    step(scheduler)
    scheduler.add(make_sequence(2, 40))
    assert step(scheduler) == [(1, 1), (2, 15)]
    scheduler.add(make_sequence(3, 4))
    assert step(scheduler) == [(1, 1), (2, 15)]
    assert step(scheduler) == [(1, 1), (2, 10), (3, 4)]


def test_a_smaller_budget_for_one_step_bounds_the_prefill():
    scheduler = make_scheduler(max_batched_tokens=16)
    scheduler.add(make_sequence(1, 40))
    assert step(scheduler, 5) == [(1, 5)]


def test_a_smaller_budget_never_holds_back_decodes():
    scheduler = make_scheduler(max_batched_tokens=16)
    for request_id in (1, 2, 3):
        scheduler.add(make_sequence(request_id, 2))
    step(scheduler)
    assert step(scheduler, 1) == [(1, 1), (2, 1), (3, 1)]


def test_waiting_sequences_are_admitted_in_the_order_they_came():
    scheduler = make_scheduler(num_slots=2)
    for request_id in (5, 3, 4):
        scheduler.add(make_sequence(request_id, 2))
    assert step(scheduler) == [(5, 2), (3, 2)]
    assert scheduler.num_waiting == 1


def test_a_small_sequence_does_not_overtake_a_large_one_that_waits_for_blocks():
    scheduler = make_scheduler(num_blocks=6, block_size=4)
    scheduler.add(make_sequence(1, 11))
    scheduler.add(make_sequence(2, 15))
    scheduler.add(make_sequence(3, 1))
    assert step(scheduler) == [(1, 11)]
    assert step(scheduler) == [(1, 1)]


def test_no_sequence_is_admitted_without_a_free_slot():
    scheduler = make_scheduler(num_slots=1)
    first = make_sequence(1, 2)
    scheduler.add(first)
    scheduler.add(make_sequence(2, 2))
    assert step(scheduler) == [(1, 2)]
    assert step(scheduler) == [(1, 1)]
    scheduler.remove(first)
    assert step(scheduler) == [(2, 2)]


def test_admission_keeps_a_place_for_the_first_generated_token():
    scheduler = make_scheduler(num_blocks=2, block_size=4)
    scheduler.add(make_sequence(1, 4))
    scheduler.add(make_sequence(2, 1))
    assert step(scheduler) == [(1, 4)]
    assert scheduler.blocks.num_free == 0


def test_a_decoding_sequence_takes_a_block_only_when_it_needs_one():
    scheduler = make_scheduler(num_blocks=10, block_size=4)
    scheduler.add(make_sequence(1, 3))
    free = []
    for _ in range(6):
        step(scheduler)
        free.append(scheduler.blocks.num_free)
    assert free == [9, 9, 8, 8, 8, 8]


def test_the_youngest_is_preempted_when_blocks_run_out():
    scheduler = make_scheduler(num_blocks=4, block_size=4)
    old, young = make_sequence(1, 7), make_sequence(2, 6)
    scheduler.add(old)
    scheduler.add(young)
    assert step(scheduler) == [(1, 7), (2, 6)]
    assert step(scheduler) == [(1, 1), (2, 1)]
    assert step(scheduler) == [(1, 1)]
    assert (young.blocks, young.slot, young.num_computed) == ([], -1, 0)
    assert len(young.token_ids) == 8
    assert (scheduler.num_running, scheduler.num_waiting) == (1, 1)


def test_a_preempted_sequence_runs_again_from_all_its_tokens_before_newcomers():
    scheduler = make_scheduler(num_blocks=4, block_size=4)
    old, young = make_sequence(1, 7), make_sequence(2, 6)
    scheduler.add(old)
    scheduler.add(young)
    for _ in range(3):
        step(scheduler)
    scheduler.add(make_sequence(3, 1))
    scheduler.remove(old)
    assert step(scheduler) == [(2, 8), (3, 1)]


def test_nobody_is_admitted_in_a_step_that_preempts():
    scheduler = make_scheduler(num_blocks=5, block_size=4)
    scheduler.add(make_sequence(1, 7))
    scheduler.add(make_sequence(2, 11))
    step(scheduler)
    step(scheduler)
    scheduler.add(make_sequence(3, 1))
    assert step(scheduler) == [(1, 1)]
    assert scheduler.blocks.num_free == 2


def test_a_sequence_that_is_itself_the_youngest_gives_way():
    scheduler = make_scheduler(num_blocks=4, block_size=4)
    scheduler.add(make_sequence(1, 6))
    young = make_sequence(2, 7)
    scheduler.add(young)
    step(scheduler)
    step(scheduler)
    assert step(scheduler) == [(1, 1)]
    assert young.slot == -1


def test_a_prompt_in_progress_goes_on_when_a_younger_sequence_is_preempted():
    scheduler = make_scheduler(num_blocks=8, block_size=4, max_batched_tokens=8)
    scheduler.add(make_sequence(1, 7))
    step(scheduler)
    scheduler.add(make_sequence(2, 19))
    assert step(scheduler) == [(1, 1), (2, 7)]
    scheduler.add(make_sequence(3, 1))
    assert step(scheduler) == [(1, 1), (2, 7)]
    assert scheduler.blocks.num_free == 0
    assert step(scheduler) == [(1, 1), (2, 5)]
    assert scheduler.num_waiting == 1


def test_the_waiting_queue_has_a_bound():
    scheduler = make_scheduler(max_waiting=2)
    scheduler.add(make_sequence(1, 2))
    scheduler.add(make_sequence(2, 2))
    with pytest.raises(QueueFullError):
        scheduler.add(make_sequence(3, 2))


def test_a_budget_below_the_number_of_slots_is_refused():
    with pytest.raises(ValueError, match="3 tokens cannot carry 4 sequences"):
        make_scheduler(num_slots=4, max_batched_tokens=3)


@pytest.mark.parametrize("num_steps", [0, 1, 3])
def test_removing_a_sequence_at_any_stage_returns_everything(num_steps):
    scheduler = make_scheduler(num_blocks=20, max_batched_tokens=8)
    sequence = make_sequence(1, 12)
    scheduler.add(sequence)
    for _ in range(num_steps):
        step(scheduler)
    scheduler.remove(sequence)
    assert (scheduler.blocks.num_free, scheduler.slots.num_free) == (20, 4)
    assert (scheduler.num_running, scheduler.num_waiting) == (0, 0)
    assert step(scheduler) == []
