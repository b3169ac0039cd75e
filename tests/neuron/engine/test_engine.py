import pytest
import torch

from cortex.neuron.engine.protocol import Sampling
from tests.neuron.engine.building import Bench, Clock
from tests.support.fake_model import continuation

PROMPT = [5, 17, 3, 60, 9]


def test_greedy_tokens_are_the_models_own():
    bench = Bench()
    bench.submit(1, PROMPT, 6)
    bench.run()
    assert bench.tokens(1) == continuation(PROMPT, 6)
    assert bench.finishes(1) == ["length"]
    bench.assert_all_is_free()


def test_a_prompt_in_chunks_gives_the_same_tokens_as_in_one_piece():
    prompt = [i * 7 % 97 for i in range(75)]
    bench = Bench(max_batched_tokens=16)
    bench.submit(1, prompt, 5)
    bench.run()
    assert [query_lens for query_lens, _ in bench.model.batches[:5]] == [
        (16,),
        (16,),
        (16,),
        (16,),
        (11,),
    ]
    assert bench.tokens(1) == continuation(prompt, 5)


def test_forty_sequences_over_eight_slots_all_finish_and_free_everything():
    bench = Bench(num_slots=8, num_blocks=48, max_batched_tokens=24)
    prompts = {i: [(i * 13 + k * k) % 97 for k in range(1 + i % 23)] for i in range(40)}
    for request_id, prompt in prompts.items():
        bench.submit(request_id, prompt, 4 + request_id % 9)
    bench.run()
    for request_id, prompt in prompts.items():
        assert bench.tokens(request_id) == continuation(prompt, 4 + request_id % 9)
        assert bench.finishes(request_id) == ["length"]
    bench.assert_all_is_free()


def test_a_preempted_sequence_gets_the_same_tokens_as_an_undisturbed_one():
    bench = Bench(num_slots=4, num_blocks=10)
    prompts = {i: [i * 11 + k for k in range(6)] for i in range(4)}
    for request_id, prompt in prompts.items():
        bench.submit(request_id, prompt, 25)
    bench.run()
    # Contexts that start at zero with more tokens than a prompt has: recomputed ones.
    recomputed = [
        query_len
        for query_lens, context_lens in bench.model.batches
        for query_len, context_len in zip(query_lens, context_lens, strict=True)
        if context_len == 0 and query_len > 6
    ]
    assert recomputed
    for request_id, prompt in prompts.items():
        assert bench.tokens(request_id) == continuation(prompt, 25)
    bench.assert_all_is_free()


def test_a_stop_id_ends_the_sequence_and_is_reported():
    bench = Bench()
    expected = continuation(PROMPT, 10)
    bench.submit(1, PROMPT, 10, stop_ids=[expected[3]])
    bench.run()
    assert bench.tokens(1) == expected[: expected.index(expected[3]) + 1]
    assert bench.finishes(1) == ["stop"]


def test_the_end_of_the_context_ends_the_sequence_with_length():
    bench = Bench(max_model_len=12)
    bench.submit(1, PROMPT, 100)
    bench.run()
    assert len(bench.tokens(1)) == 7
    assert bench.finishes(1) == ["length"]


def test_a_sequence_may_fill_every_block_there_is():
    bench = Bench(num_blocks=4, block_size=4, max_model_len=16)
    bench.submit(1, PROMPT, 100)
    bench.run()
    assert bench.tokens(1) == continuation(PROMPT, 11)
    bench.assert_all_is_free()


def test_a_sequence_never_outgrows_the_blocks_there_are():
    bench = Bench(num_blocks=4, block_size=4, max_model_len=100)
    bench.submit(1, PROMPT, 50)
    bench.submit(2, [1] * 16, 50)
    bench.run()
    assert bench.tokens(1) == continuation(PROMPT, 11)
    assert "the prompt has 16 tokens and the model holds 16" in bench.error(2)


def test_each_step_reports_one_token_per_decoding_sequence():
    bench = Bench()
    bench.submit(1, [1, 2], 5)
    bench.submit(2, [3, 4], 5)
    done = bench.step()
    assert [event.request_id for event in done.events] == [1, 2]
    assert [len(event.token_ids) for event in done.events] == [1, 1]
    assert (done.stats.num_running, done.stats.num_waiting) == (2, 0)


# Cancelling


def test_a_waiting_sequence_can_be_cancelled():
    bench = Bench(num_slots=1)
    bench.submit(1, PROMPT, 20)
    bench.submit(2, PROMPT, 20)
    bench.step()
    bench.engine.cancel(2)
    bench.run()
    assert bench.finishes(2) == ["cancelled"]
    assert bench.tokens(2) == []
    assert bench.tokens(1) == continuation(PROMPT, 20)


def test_a_sequence_can_be_cancelled_before_its_first_step():
    bench = Bench()
    bench.submit(1, PROMPT, 20)
    bench.engine.cancel(1)
    assert not bench.engine.has_work
    bench.step()
    assert bench.finishes(1) == ["cancelled"]
    assert bench.model.batches == []


def test_a_sequence_can_be_cancelled_in_the_middle_of_its_prompt():
    bench = Bench(max_batched_tokens=16)
    bench.submit(1, list(range(60)), 20)
    bench.step()
    assert bench.tokens(1) == []
    bench.engine.cancel(1)
    bench.step()
    assert bench.finishes(1) == ["cancelled"]
    bench.assert_all_is_free()


def test_a_decoding_sequence_can_be_cancelled_and_its_neighbour_goes_on():
    bench = Bench()
    bench.submit(1, PROMPT, 20)
    bench.submit(2, [8, 8], 20)
    for _ in range(4):
        bench.step()
    bench.engine.cancel(1)
    bench.run()
    assert bench.tokens(1) == continuation(PROMPT, 4)
    assert bench.finishes(1) == ["cancelled"]
    assert bench.tokens(2) == continuation([8, 8], 20)
    bench.assert_all_is_free()


def test_a_preempted_sequence_can_be_cancelled():
    bench = Bench(num_blocks=4)
    bench.submit(1, [1, 2, 3, 4, 5, 6, 7], 8)
    bench.submit(2, [1, 2, 3, 4, 5, 6], 8)
    while bench.step().stats.num_waiting == 0:
        pass
    assert bench.tokens(2) != []
    bench.engine.cancel(2)
    bench.run()
    assert bench.finishes(2) == ["cancelled"]
    assert bench.tokens(1) == continuation([1, 2, 3, 4, 5, 6, 7], 8)
    bench.assert_all_is_free()


def test_a_cancelled_slot_is_visible_without_a_step():
    bench = Bench(num_slots=2)
    bench.submit(1, PROMPT, 20)
    bench.step()
    bench.engine.cancel(1)
    assert bench.engine.has_news
    report = bench.engine.report()
    assert [event.finish for event in report.events] == ["cancelled"]
    assert report.stats.free_slots == 2
    assert not bench.engine.has_news


def test_cancelling_an_unknown_sequence_does_nothing():
    bench = Bench()
    bench.engine.cancel(77)
    assert not bench.engine.has_news


def test_a_sequence_that_ended_cannot_be_cancelled_again():
    bench = Bench()
    bench.submit(1, PROMPT, 2)
    bench.run()
    bench.engine.cancel(1)
    bench.step()
    assert bench.finishes(1) == ["length"]


# Refusals


@pytest.mark.parametrize(
    ("prompt_ids", "max_tokens", "sampling", "words"),
    [
        ([], 5, Sampling(), "the prompt is empty"),
        ([1], 0, Sampling(), "max_tokens must be at least 1, not 0"),
        ([1] * 128, 5, Sampling(), "the prompt has 128 tokens and the model holds 128"),
        ([1, 97], 5, Sampling(), "token ids outside the vocabulary of 97"),
        ([1, -1], 5, Sampling(), "token ids outside the vocabulary of 97"),
        ([1], 5, Sampling(logit_bias={97: 1.0}), "logit_bias has token ids outside"),
    ],
)
def test_what_can_never_be_served_ends_with_an_error_event(prompt_ids, max_tokens, sampling, words):
    bench = Bench()
    bench.submit(1, prompt_ids, max_tokens, sampling=sampling)
    assert not bench.engine.has_work
    bench.step()
    assert bench.finishes(1) == ["error"]
    assert words in bench.error(1)


def test_a_request_beyond_the_queues_bound_ends_with_an_error_event():
    bench = Bench(num_slots=1, max_waiting=1)
    bench.submit(1, PROMPT, 3)
    bench.step()
    bench.submit(2, PROMPT, 3)
    bench.submit(3, PROMPT, 3)
    bench.run()
    assert bench.error(3) == "1 requests wait already; retry later"
    assert bench.finishes(2) == ["length"]


def test_a_second_request_of_the_same_number_leaves_the_first_alone():
    bench = Bench()
    bench.submit(1, PROMPT, 4)
    bench.submit(1, [9, 9], 4)
    bench.run()
    assert bench.tokens(1) == continuation(PROMPT, 4)
    assert bench.finishes(1) == ["length"]


# Faults


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        (torch.OutOfMemoryError("no more"), "the device ran out of memory"),
        (RuntimeError("shapes"), "the step failed: RuntimeError"),
    ],
)
def test_a_failed_step_ends_its_sequences_and_the_engine_goes_on(fault, words):
    bench = Bench(num_slots=2)
    for request_id in (1, 2, 3):
        bench.submit(request_id, PROMPT, 4)
    bench.step()
    bench.model.fault = fault
    bench.run()
    assert words in bench.error(1)
    assert words in bench.error(2)
    assert bench.tokens(3) == continuation(PROMPT, 4)
    assert not bench.engine.is_lost
    bench.assert_all_is_free()


def test_a_lost_device_is_reported_with_the_failed_sequences(monkeypatch):
    bench = Bench()
    monkeypatch.setattr(bench.engine._runner, "is_healthy", lambda: False)
    bench.submit(1, PROMPT, 4)
    bench.model.fault = RuntimeError("device-side assert")
    bench.step()
    assert bench.finishes(1) == ["error"]
    assert bench.engine.is_lost


def test_logits_that_are_not_finite_end_only_their_own_sequence():
    bench = Bench()
    bench.model.nan_after = 91
    bench.submit(1, [1, 91], 4)
    bench.submit(2, [2, 3], 4)
    bench.run()
    assert bench.error(1) == "the model computed no finite logits"
    assert bench.tokens(1) == []
    assert bench.tokens(2) == continuation([2, 3], 4)
    bench.assert_all_is_free()


def test_what_a_sequence_without_finite_logits_held_is_zeroed():
    bench = Bench()
    bench.model.nan_after = 91
    bench.submit(1, [40, 91], 4)
    bench.run()
    assert bench.caches.keys.count_nonzero() == 0
    assert bench.caches.values.count_nonzero() == 0
    assert bench.caches.recurrent_states.count_nonzero() == 0


# Rates and step sizes


def test_rates_count_tokens_over_the_time_of_their_steps():
    bench = Bench(clock=Clock(0.5), max_batched_tokens=16)
    bench.submit(1, [1] * 10, 3)
    stats = bench.step().stats
    assert (stats.tok_s_prefill, stats.tok_s_decode) == (20.0, 0.0)
    stats = bench.step().stats
    assert (stats.tok_s_prefill, stats.tok_s_decode) == (20.0, 2.0)


def test_prefill_chunks_shrink_on_a_slow_device():
    # 128 tokens in a second; a quarter of a second is aimed at, but never less than 64 tokens.
    bench = Bench(clock=Clock(1.0), max_batched_tokens=512, max_model_len=500, num_blocks=200)
    bench.submit(1, [1] * 400, 1)
    bench.run()
    assert [query_lens for query_lens, _ in bench.model.batches] == [
        (128,),
        (64,),
        (64,),
        (64,),
        (64,),
        (16,),
    ]


def test_prefill_chunks_grow_to_the_limit_on_a_fast_device():
    bench = Bench(clock=Clock(0.001), max_batched_tokens=256, max_model_len=500, num_blocks=200)
    bench.submit(1, [1] * 400, 1)
    bench.run()
    assert [query_lens for query_lens, _ in bench.model.batches] == [(128,), (256,), (16,)]
