"""What sequences go on from, and that it changes none of their tokens."""

import random

import pytest
import torch
from torch import Tensor

from cortex.neuron.engine.images import SequenceImage
from cortex.neuron.engine.prefix import cuts
from cortex.neuron.engine.protocol import ImageSpan, Sampling
from cortex.neuron.layers.context import Caches, StepBatch
from tests.neuron.engine.building import Bench, make_scheduler, make_sequence
from tests.support.fake_model import FakeModel, continuation

SIZE = 16
PROMPT = [i * 7 % 97 for i in range(150)]


def bench_of(kind: str, **settings) -> Bench:
    """Return an engine with a prefix cache, of a model with a state or without one."""
    settings = {"num_blocks": 64, "block_size": SIZE, "max_batched_tokens": 64, **settings}
    num_snapshots = settings.pop("num_snapshots", 8)
    return Bench(
        prefix_cache=True,
        max_model_len=900,
        num_snapshots=num_snapshots if kind == "hybrid" else None,
        **settings,
    )


def ask(bench: Bench, request_id: int, prompt: list[int], max_tokens: int = 5) -> int:
    """Run one request to its end, look at its tokens, and return how many were cached."""
    bench.submit(request_id, prompt, max_tokens)
    bench.run()
    assert bench.tokens(request_id) == continuation(prompt, max_tokens)
    return bench.cached(request_id)


# Where a prefix may end


@pytest.mark.parametrize(
    ("num_tokens", "cached"), [(16, 0), (17, 16), (32, 16), (33, 32), (149, 144), (150, 144)]
)
def test_without_a_state_a_prompt_goes_on_from_the_last_full_block_that_is_the_same(
    num_tokens, cached
):
    bench = bench_of("dense")
    assert ask(bench, 1, PROMPT) == 0
    assert ask(bench, 2, PROMPT[:num_tokens]) == cached


def test_a_prompt_that_differs_in_one_token_shares_the_blocks_before_it():
    bench = bench_of("dense")
    ask(bench, 1, PROMPT)
    assert ask(bench, 2, [*PROMPT[:70], 96, *PROMPT[71:]]) == 64


def test_equal_blocks_after_different_ones_are_not_shared():
    bench = bench_of("dense")
    ask(bench, 1, PROMPT)
    assert ask(bench, 2, [96, *PROMPT[1:]]) == 0


def test_with_a_state_the_next_turn_goes_on_from_where_the_answer_ended():
    bench = bench_of("hybrid")
    assert ask(bench, 1, PROMPT, 45) == 0
    # Its last token was drawn and never computed.
    turn = [*PROMPT, *continuation(PROMPT, 45), 1, 2, 3]
    assert ask(bench, 2, turn) == 194


def test_a_state_within_a_block_is_only_for_the_same_tokens_in_that_block():
    bench = bench_of("hybrid")
    ask(bench, 1, PROMPT, 45)
    answered = [*PROMPT, *continuation(PROMPT, 45)]
    assert ask(bench, 2, [*answered[:193], answered[193] ^ 1, 7, 7]) == 128


def test_with_a_state_a_chat_whose_answer_is_rewritten_goes_on_from_near_its_prompts_end():
    bench = bench_of("hybrid")
    ask(bench, 1, PROMPT, 9)
    # 150 tokens less 16 that a template may change, down to the end of a block.
    assert ask(bench, 2, [*PROMPT[:140], *range(40)]) == 128


def test_with_a_state_a_prompt_that_parts_early_finds_nothing_and_the_one_after_it_does():
    bench = bench_of("hybrid")
    ask(bench, 1, PROMPT)
    parting = [[*PROMPT[:100], salt, *PROMPT[:49]] for salt in (50, 60, 70)]
    assert [ask(bench, 2 + i, prompt) for i, prompt in enumerate(parting)] == [0, 96, 96]


def test_a_prompt_asked_again_computes_its_last_token():
    dense, hybrid = bench_of("dense"), bench_of("hybrid")
    prompt = PROMPT[:144]
    assert [ask(dense, i, prompt, 1) for i in (1, 2)] == [0, 128]
    # The end of the answer is the end of the prompt: nothing drawn is ever computed.
    assert [ask(hybrid, i, prompt, 1) for i in (1, 2)] == [0, 128]


def test_short_prompts_leave_no_states():
    bench = bench_of("hybrid")
    assert [ask(bench, i, PROMPT[:40]) for i in (1, 2)] == [0, 0]
    assert bench.engine.report().stats.num_snapshots == 0


@pytest.mark.parametrize(
    ("start", "known", "stop", "expected"),
    [
        (0, 0, 60, []),  # too little to be worth it
        (0, 0, 100, [64]),
        (0, 0, 127, [96]),
        (0, 0, 128, [96]),  # the last 16 tokens may change with the next turn
        (0, 0, 144, [128]),
        (0, 96, 1000, [96, 960]),  # where another prompt parted from it
        (0, 992, 1000, [960]),
        (0, 32, 1000, [960]),
        (100, 0, 150, []),
        (100, 0, 200, []),
        (0, 0, 5000, [2048, 4096, 4960]),
        (0, 2080, 5000, [2080, 4096, 4960]),
        (1000, 1000, 5000, [3040, 4960]),
        (0, 0, 32016, [6400, 12800, 19200, 25600, 32000]),
    ],
)
def test_states_are_kept_at_few_places_of_a_prompt(start, known, stop, expected):
    assert cuts(start, known, stop, 32) == expected


# Same tokens, whatever is cached


@pytest.mark.parametrize("kind", ["dense", "hybrid"])
@pytest.mark.parametrize("num_blocks", [64, 24])
def test_random_chats_that_branch_get_the_tokens_of_an_engine_without_a_cache(kind, num_blocks):
    rng = random.Random(7)
    bench = bench_of(kind, num_blocks=num_blocks, num_slots=3, num_snapshots=3)
    chats = [[rng.randrange(97) for _ in range(rng.randrange(90, 200))] for _ in range(3)]
    prompts = {}
    for request_id in range(60):
        chat = rng.choice(chats)
        prompt = [*chat[: rng.randrange(60, len(chat) + 1)], *PROMPT[: rng.randrange(60)]][:250]
        prompts[request_id] = prompt
        bench.submit(request_id, prompt, 1 + request_id % 20)
        for _ in range(rng.randrange(6)):
            bench.step()
        if request_id % 7 == 3:
            bench.engine.cancel(request_id)
        if len(chats) < 12:
            chats.append([*prompt, *continuation(prompt, 1 + request_id % 20)])
    bench.run()
    for request_id, prompt in prompts.items():
        expected = continuation(prompt, 1 + request_id % 20)
        tokens = bench.tokens(request_id)
        assert tokens == expected[: len(tokens)]
        assert bench.finishes(request_id) in (["length"], ["cancelled"])
    assert sum(bench.cached(i) > 0 for i in prompts if bench.tokens(i)) > 10
    bench.assert_all_is_free()


@pytest.mark.parametrize("kind", ["dense", "hybrid"])
def test_concurrent_sequences_share_the_blocks_of_a_common_prefix(kind):
    bench = bench_of(kind, num_slots=4)
    ask(bench, 0, PROMPT, 1)
    prompts = [[*PROMPT[:128], *range(i, i + 10)] for i in range(1, 5)]
    for request_id, prompt in enumerate(prompts, 1):
        bench.submit(request_id, prompt, 6)
    stats = bench.step().stats
    # Eight shared blocks and one more for each.
    assert (stats.num_running, stats.free_blocks) == (4, 64 - 8 - 4)
    bench.run()
    for request_id, prompt in enumerate(prompts, 1):
        assert bench.tokens(request_id) == continuation(prompt, 6)
        assert bench.cached(request_id) == 128
    bench.assert_all_is_free()


@pytest.mark.parametrize("kind", ["dense", "hybrid"])
def test_of_prompts_that_come_together_one_computes_what_they_have_in_common(kind):
    bench = bench_of(kind, num_slots=4)
    # They part after 110 tokens; the end of the sixth block is the last that is the same.
    prompts = [[*PROMPT[:110], *range(i, i + 30)] for i in range(4)]
    for request_id, prompt in enumerate(prompts):
        bench.submit(request_id, prompt, 6)
    bench.run()
    for request_id, prompt in enumerate(prompts):
        assert bench.tokens(request_id) == continuation(prompt, 6)
    assert [bench.cached(i) for i in range(4)] == [0, 96, 96, 96]


@pytest.mark.parametrize(("kind", "cached"), [("dense", 144), ("hybrid", 128)])
def test_choices_of_one_prompt_compute_it_once(kind, cached):
    bench = bench_of(kind, num_slots=4)
    for request_id in range(3):
        bench.submit(request_id, PROMPT, 4)
    bench.run()
    assert all(bench.tokens(i) == continuation(PROMPT, 4) for i in range(3))
    assert [bench.cached(i) for i in range(3)][1] >= cached - 64
    assert bench.cached(2) >= cached - 64
    num_computed = sum(sum(query_lens) for query_lens, _ in bench.model.batches)
    assert num_computed <= 150 + 2 * (150 - cached + 64) + 3 * 4


def test_a_prompt_that_waited_for_one_that_is_cancelled_goes_on_from_what_that_left():
    bench = bench_of("hybrid", max_batched_tokens=32)
    bench.submit(1, PROMPT, 5)
    bench.submit(2, PROMPT, 5)
    for _ in range(3):
        assert bench.step().stats.num_waiting == 1
    bench.engine.cancel(1)
    bench.run()
    assert bench.tokens(2) == continuation(PROMPT, 5)
    assert bench.cached(2) == 96


@pytest.mark.parametrize(("kind", "cached"), [("dense", 128), ("hybrid", 128)])
def test_a_cancelled_prompt_leaves_what_was_computed_of_it(kind, cached):
    bench = bench_of(kind)
    bench.submit(1, PROMPT, 5)
    bench.step()
    bench.step()
    bench.engine.cancel(1)
    assert ask(bench, 2, PROMPT) == cached


@pytest.mark.parametrize("kind", ["dense", "hybrid"])
def test_a_preempted_sequence_reports_what_was_cached_when_it_was_first_admitted(kind):
    bench = bench_of(kind, num_blocks=12, num_slots=2)
    ask(bench, 0, PROMPT[:80], 1)
    bench.submit(1, PROMPT[:80], 60)
    bench.submit(2, [9] * 30, 60)
    bench.run()
    assert bench.tokens(1) == continuation(PROMPT[:80], 60)
    assert bench.tokens(2) == continuation([9] * 30, 60)
    assert (bench.cached(1), bench.cached(2)) == (64, 0)
    bench.assert_all_is_free()


def test_a_request_that_samples_is_served_from_the_cache_too():
    bench = bench_of("hybrid")
    ask(bench, 1, PROMPT)
    bench.submit(2, PROMPT, 5, sampling=Sampling(temperature=1.0, seed=3, num_logprobs=2))
    bench.run()
    assert bench.cached(2) == 128
    assert len(bench.tokens(2)) == 5


def test_what_was_cached_of_a_long_prompt_is_told_after_its_first_step():
    bench = bench_of("dense", max_batched_tokens=32)
    ask(bench, 1, PROMPT, 1)
    bench.events.clear()
    bench.submit(2, [*PROMPT[:40], *range(60)], 2)
    for _ in range(5):
        bench.step()
    told = [(event.cached_tokens, len(event.token_ids)) for event in bench.events]
    assert told == [(32, 0), (32, 1), (32, 1)]


# Bounds


def test_the_states_least_lately_used_make_room():
    bench = bench_of("hybrid", num_snapshots=2, num_blocks=200)
    prompts = [[salt, *PROMPT[1:90]] for salt in range(3)]
    assert [ask(bench, i, prompt, 1) for i, prompt in enumerate(prompts)] == [0, 0, 0]
    # The state at 64 of the second and of the third are left; the first's is used, then theirs.
    assert ask(bench, 3, prompts[2], 1) == 64
    assert ask(bench, 4, prompts[0], 1) == 0
    assert ask(bench, 5, prompts[2], 1) == 64
    assert bench.engine.report().stats.num_snapshots == 2


def test_a_sequence_may_take_every_block_although_all_are_cached():
    bench = bench_of("hybrid", num_blocks=12, max_batched_tokens=256)
    ask(bench, 1, PROMPT, 42)
    # Twelve full ones would need 192 tokens; the last one was drawn and never computed.
    assert bench.engine.report().stats.cached_blocks == 11
    other = [i * 5 % 89 for i in range(180)]
    assert ask(bench, 2, other, 11) == 0
    assert ask(bench, 3, PROMPT, 3) == 0
    bench.assert_all_is_free()


def test_the_end_of_a_prefix_is_evicted_before_its_beginning():
    bench = bench_of("dense", num_blocks=12)
    ask(bench, 1, PROMPT, 1)
    ask(bench, 2, [90] * 90, 1)
    # Six blocks were taken, three of them free ones: the last three of nine have gone.
    assert ask(bench, 3, PROMPT, 1) == 96


def test_a_state_goes_with_the_blocks_that_it_needs():
    bench = bench_of("hybrid", num_blocks=12)
    ask(bench, 1, PROMPT, 1)
    assert bench.engine.report().stats.num_snapshots == 1
    ask(bench, 2, [90] * 100, 1)
    assert ask(bench, 3, PROMPT, 1) == 0


# Faults


@pytest.mark.parametrize("kind", ["dense", "hybrid"])
def test_nothing_of_a_sequence_without_finite_logits_is_found_again(kind):
    bench = bench_of(kind)
    bench.model.nan_after = 91
    bench.submit(1, [*PROMPT[:120], 91], 4)
    bench.run()
    assert bench.error(1) == "the model computed no finite logits"
    bench.assert_all_is_free()
    stats = bench.engine.report().stats
    assert (stats.cached_blocks, stats.num_snapshots) == (0, 0)
    assert ask(bench, 2, PROMPT[:121]) == 0


@pytest.mark.parametrize("kind", ["dense", "hybrid"])
def test_who_shares_a_prefix_with_a_sequence_without_finite_logits_goes_on(kind):
    bench = bench_of(kind)
    ask(bench, 0, PROMPT, 1)
    bench.model.nan_after = 91
    bench.submit(1, [*PROMPT[:128], 5, 6], 30)
    bench.submit(2, [*PROMPT[:128], 91], 30)
    bench.run()
    assert bench.error(2) == "the model computed no finite logits"
    assert bench.tokens(1) == continuation([*PROMPT[:128], 5, 6], 30)
    bench.assert_all_is_free()


class SpoilingModel(FakeModel):
    """Leaves a NaN in what its second forward pass writes, though not in its logits."""

    def forward(self, batch: StepBatch, caches: Caches) -> Tensor:
        logits = super().forward(batch, caches)
        if len(self.batches) == 2:
            caches.values.view(-1)[batch.kv_slots[-1]] = torch.nan
            caches.recurrent_states[:, batch.state_slots] = torch.nan
        return logits


@pytest.mark.parametrize(("kind", "cached"), [("dense", 64), ("hybrid", 0)])
def test_numbers_that_are_not_finite_are_never_kept(kind, cached):
    bench = bench_of(kind, model=SpoilingModel(has_state=kind == "hybrid"))
    bench.submit(1, PROMPT, 5)
    assert [bench.step().stats.num_running for _ in range(2)] == [1, 1]
    held = bench.scheduler._running[0].blocks
    bench.engine.cancel(1)
    bench.caches.values[:, held[4:]] = 0
    assert ask(bench, 2, PROMPT) == cached


def test_a_failed_step_leaves_nothing_to_go_on_from():
    bench = bench_of("dense")
    bench.submit(1, PROMPT, 5)
    bench.step()
    bench.model.fault = RuntimeError("shapes")
    bench.run()
    assert ask(bench, 2, PROMPT) == 0


def test_a_sequence_that_must_not_be_cached_neither_finds_nor_leaves_anything():
    scheduler = make_scheduler(prefix_cache=True, num_snapshots=4, max_batched_tokens=400)
    prefix = scheduler.prefix
    assert prefix is not None
    for request_id in (1, 2):
        sequence = make_sequence(request_id, 200)
        sequence.is_cacheable = False
        scheduler.add(sequence)
        chunks = scheduler.schedule()
        assert [chunk.num_tokens for chunk in chunks] == [200]
        scheduler.commit(chunks)
        assert prefix.due(sequence, is_leaving=True) is None
        scheduler.remove(sequence)
    assert scheduler.blocks.num_idle == 0


def test_prompts_with_different_images_share_what_comes_before_them():
    scheduler = make_scheduler(prefix_cache=True, max_batched_tokens=400)
    prefix = scheduler.prefix
    assert prefix is not None
    cached = []
    for request_id, digest in enumerate([b"a cat", b"a dog", b"a cat"]):
        sequence = make_sequence(request_id, 21)
        # Tokens 6 to 9: the first block of four is only text.
        span = ImageSpan(start=6, width=16, height=16, digest=digest)
        sequence.images = [SequenceImage(span, b"", 8)]
        scheduler.add(sequence)
        chunks = scheduler.schedule()
        scheduler.commit(chunks)
        due = prefix.due(sequence)
        if due is not None:
            prefix.keep(sequence, due)
        cached.append(sequence.cached_tokens)
        scheduler.remove(sequence)
    assert cached == [0, 4, 20]
