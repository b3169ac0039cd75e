import math

import pytest
import torch

from cortex.neuron.engine.protocol import Sampling, ThinkBudget
from cortex.neuron.engine.sampler import SamplingState, edit_logits, keep_raw, sample
from tests.neuron.engine.building import Bench

CPU = torch.device("cpu")


def state(vocab_size: int = 4, prompt_ids: tuple[int, ...] = (), **settings) -> SamplingState:
    sampling = Sampling(**settings)
    return SamplingState(sampling, prompt_ids=prompt_ids, vocab_size=vocab_size, device=CPU)


def frequencies(logits: list[float], draws: int = 4000, **settings) -> list[float]:
    """Draw many times from one row's logits with one seeded state; return each id's share."""
    drawing = state(len(logits), seed=1, temperature=settings.pop("temperature", 1.0), **settings)
    counts = [0] * len(logits)
    for _ in range(draws // 50):
        ids = sample(torch.tensor([logits] * 50), [drawing] * 50).token_ids
        for token_id in ids:
            counts[token_id] += 1
    return [count / draws for count in counts]


def logs(*probs: float) -> list[float]:
    return [math.log(p) if p > 0 else -math.inf for p in probs]


# Four standard deviations of a share of 4000 draws are at most 0.032.
CLOSE = 0.032


def test_temperature_one_draws_by_the_softmax():
    assert frequencies(logs(0.5, 0.3, 0.15, 0.05)) == pytest.approx(
        [0.5, 0.3, 0.15, 0.05], abs=CLOSE
    )


def test_a_high_temperature_flattens_the_draw():
    # Square roots of 0.64, 0.32 and 0.04 over their sum.
    assert frequencies(logs(0.64, 0.32, 0.04), temperature=2.0) == pytest.approx(
        [0.5110, 0.3613, 0.1277], abs=CLOSE
    )


def test_temperature_zero_takes_the_likeliest():
    assert frequencies([0.1, 0.3, 0.2], draws=100, temperature=0.0) == [0.0, 1.0, 0.0]


def test_a_vanishing_temperature_takes_the_likeliest_without_overflow():
    assert frequencies([300.0, 301.0, -500.0], draws=100, temperature=1e-30) == [0.0, 1.0, 0.0]


def test_a_token_of_no_probability_is_never_drawn():
    shares = frequencies(logs(0.0, 0.5, 0.5, 0.0), draws=4000)
    assert shares[0] == shares[3] == 0.0


def test_top_k_draws_among_the_k_likeliest_renormalised():
    assert frequencies(logs(0.1, 0.4, 0.3, 0.2), top_k=2) == pytest.approx(
        [0.0, 4 / 7, 3 / 7, 0.0], abs=CLOSE
    )


def test_top_k_of_one_takes_the_likeliest():
    assert frequencies(logs(0.3, 0.4, 0.3), draws=200, top_k=1) == [0.0, 1.0, 0.0]


def test_top_k_over_the_vocabulary_changes_nothing():
    assert frequencies(logs(0.6, 0.4), top_k=50) == pytest.approx([0.6, 0.4], abs=CLOSE)


def test_top_p_keeps_the_token_that_crosses_the_bound():
    assert frequencies(logs(0.15, 0.5, 0.3, 0.05), top_p=0.7) == pytest.approx(
        [0.0, 0.625, 0.375, 0.0], abs=CLOSE
    )


def test_top_p_of_zero_keeps_the_likeliest():
    assert frequencies(logs(0.3, 0.4, 0.3), draws=200, top_p=0.0) == [0.0, 1.0, 0.0]


def test_top_p_counts_mass_after_top_k():
    # Of the two likeliest, 0.4 and 0.3, the first has 0.571 of the mass, over 0.55.
    assert frequencies(logs(0.4, 0.3, 0.3 - 1e-6, 1e-6), draws=400, top_k=2, top_p=0.55) == [
        1.0,
        0.0,
        0.0,
        0.0,
    ]


def test_top_p_looks_past_the_first_candidates_when_the_mass_is_spread_wide():
    wide = state(5000, temperature=1.0, top_p=0.9, seed=3)
    ids = sample(torch.zeros(400, 5000), [wide] * 400).token_ids
    # 4500 of 5000 equally likely tokens are kept, far more than are looked at first.
    assert len(set(ids)) > 350


def test_min_p_drops_what_is_far_below_the_likeliest():
    assert frequencies(logs(0.5, 0.3, 0.15, 0.05), min_p=0.5) == pytest.approx(
        [0.625, 0.375, 0.0, 0.0], abs=CLOSE
    )


def test_min_p_over_one_keeps_the_likeliest():
    assert frequencies(logs(0.3, 0.4, 0.3), draws=200, min_p=1.5) == [0.0, 1.0, 0.0]


def test_min_p_holds_beside_top_p():
    assert frequencies(logs(0.5, 0.3, 0.15, 0.05), min_p=0.5, top_p=0.99) == pytest.approx(
        [0.625, 0.375, 0.0, 0.0], abs=CLOSE
    )


def edited(logits: list[float], sampling_state: SamplingState, *generated: int) -> list[float]:
    for token_id in generated:
        sampling_state.observe(token_id)
    row = torch.tensor([logits])
    edit_logits(row, [sampling_state])
    return row[0].tolist()


def test_the_end_of_a_thought_is_forced_when_the_budget_is_used_up():
    thinking = state(4, think=ThinkBudget(max_tokens=2, end_id=3))
    assert edited([1.0, 5.0, 2.0, 0.0], thinking, 1) == [1.0, 5.0, 2.0, 0.0]
    forced = edited([1.0, 5.0, 2.0, 0.0], thinking, 2)
    assert forced == [-math.inf, -math.inf, -math.inf, 0.0]
    assert edited([1.0, 5.0, 2.0, 0.0], thinking, 3) == [1.0, 5.0, 2.0, 0.0]
    assert edited([1.0, 5.0, 2.0, 0.0], thinking, 0, 0, 0) == [1.0, 5.0, 2.0, 0.0]


def test_a_thought_that_the_model_begins_counts_from_there_and_with_later_ones():
    thinking = state(4, think=ThinkBudget(max_tokens=2, begin_id=2, end_id=3))
    plain = [1.0, 5.0, 2.0, 0.0]
    assert edited(plain, thinking, 0, 0, 0) == plain
    assert edited(plain, thinking, 2, 1, 3) == plain
    assert edited(plain, thinking, 2) == plain
    assert edited(plain, thinking, 1)[:3] == [-math.inf] * 3


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_forced_end_is_drawn_whatever_the_settings(temperature: float):
    budget = ThinkBudget(max_tokens=1, end_id=1)
    thinking = state(3, think=budget, temperature=temperature, top_p=0.5, top_k=2, min_p=0.1)
    thinking.observe(0)
    row = torch.tensor([[9.0, -9.0, 9.0]])
    edit_logits(row, [thinking])
    sampled = sample(row, [thinking])
    assert (sampled.token_ids, sampled.is_valid) == ([1], [True])


def test_the_presence_penalty_is_taken_once_from_each_generated_token():
    drawing = state(3, presence_penalty=0.5)
    assert edited([1.0, 1.0, 1.0], drawing, 2, 2) == [1.0, 1.0, 0.5]


def test_the_frequency_penalty_is_taken_for_each_time_a_token_was_generated():
    drawing = state(3, frequency_penalty=0.5)
    assert edited([1.0, 1.0, 1.0], drawing, 2, 2, 0) == [0.5, 1.0, 0.0]


def test_presence_and_frequency_leave_the_prompts_tokens_alone():
    drawing = state(2, prompt_ids=(1,), presence_penalty=1.0, frequency_penalty=1.0)
    assert edited([1.0, 1.0], drawing) == [1.0, 1.0]


def test_the_repetition_penalty_divides_positive_and_multiplies_negative_logits():
    drawing = state(4, prompt_ids=(0,), repetition_penalty=2.0)
    assert edited([4.0, 4.0, -4.0, -4.0], drawing, 2) == [2.0, 4.0, -8.0, -4.0]


def test_a_logit_bias_is_added_to_its_tokens():
    assert edited([1.0, 2.0, 3.0], state(3, logit_bias={0: 5.0, 2: -1.5})) == [6.0, 2.0, 1.5]


def test_each_row_is_edited_by_its_own_settings():
    states = [
        state(2),
        state(2, presence_penalty=1.0),
        state(2, logit_bias={1: 3.0}),
        state(2, frequency_penalty=0.25),
    ]
    for drawing in states:
        drawing.observe(0)
        drawing.observe(0)
    rows = torch.ones(4, 2)
    edit_logits(rows, states)
    assert rows.tolist() == [[1.0, 1.0], [0.0, 1.0], [1.0, 4.0], [0.5, 1.0]]


def test_rows_of_all_kinds_in_one_batch_are_drawn_by_their_own_rules():
    logits = logs(0.05, 0.15, 0.3, 0.5)
    counts = [[0] * 4 for _ in range(5)]
    states = [
        state(temperature=0.0),
        state(temperature=1.0, seed=1),
        state(temperature=1.0, seed=2, top_k=2),
        state(temperature=1.0, seed=3, top_p=0.75),
        state(temperature=1.0, seed=4, min_p=0.25),
    ]
    for _ in range(2000):
        for row, token_id in enumerate(sample(torch.tensor([logits] * 5), states).token_ids):
            counts[row][token_id] += 1
    shares = [[count / 2000 for count in row] for row in counts]
    assert shares[0] == [0.0, 0.0, 0.0, 1.0]
    assert shares[1] == pytest.approx([0.05, 0.15, 0.3, 0.5], abs=0.045)
    assert shares[2] == pytest.approx([0.0, 0.0, 0.375, 0.625], abs=0.045)
    assert shares[3] == pytest.approx([0.0, 0.0, 0.375, 0.625], abs=0.045)
    assert shares[4] == pytest.approx([0.0, 3 / 19, 6 / 19, 10 / 19], abs=0.045)


def test_rows_that_are_not_finite_are_told_apart():
    rows = torch.tensor(
        [[0.0, 1.0], [math.nan, 1.0], [-math.inf, -math.inf], [math.inf, 0.0], [-math.inf, 2.0]]
    )
    states = [state(2, temperature=t) for t in (0.0, 1.0, 0.0, 1.0, 1.0)]
    sampled = sample(rows, states)
    assert sampled.is_valid == [True, False, False, False, True]
    assert sampled.token_ids[4] == 1


def test_logprobs_are_those_of_the_unedited_logits():
    states = [
        state(3, num_logprobs=2, temperature=0.0, logit_bias={0: 100.0}),
        state(3),
        state(3, num_logprobs=0),
    ]
    rows = torch.tensor([logs(0.2, 0.5, 0.3)] * 3)
    raw = keep_raw(rows, states)
    edit_logits(rows, states)
    logprobs = sample(rows, states, raw).logprobs
    assert sorted(logprobs) == [0, 2]
    assert logprobs[0].token_id == 0
    assert logprobs[0].logprob == pytest.approx(math.log(0.2))
    assert [token_id for token_id, _ in logprobs[0].top] == [1, 2]
    assert [value for _, value in logprobs[0].top] == pytest.approx(logs(0.5, 0.3))
    assert logprobs[2].token_id == 1
    assert logprobs[2].top == []


def test_more_logprobs_than_tokens_give_all_tokens():
    states = [state(3, num_logprobs=20)]
    rows = torch.tensor([logs(0.2, 0.5, 0.3)])
    assert len(sample(rows, states, keep_raw(rows, states)).logprobs[0].top) == 3


def seeded(bench: Bench, request_id: int, **settings) -> None:
    bench.submit(
        request_id, [4, 2, 9], 20, sampling=Sampling(temperature=20.0, seed=11, **settings)
    )


@pytest.mark.parametrize("settings", [{}, {"top_k": 30}, {"top_p": 0.8}])
def test_a_seed_gives_the_same_tokens_whatever_runs_beside(settings):
    alone = Bench()
    seeded(alone, 1, **settings)
    alone.run()
    crowded = Bench(num_slots=4, num_blocks=16)
    for request_id in (10, 11, 12):
        other = Sampling(temperature=1.0, top_k=5 * request_id, top_p=0.9)
        crowded.submit(request_id, [request_id] * 7, 30, sampling=other)
    for _ in range(3):
        crowded.step()
    seeded(crowded, 1, **settings)
    crowded.run()
    assert len(set(alone.tokens(1))) > 5
    assert crowded.tokens(1) == alone.tokens(1)


def test_different_seeds_and_no_seed_give_different_tokens():
    bench = Bench()
    for request_id, seed in ((1, 1), (2, 2), (3, None), (4, None)):
        sampling = Sampling(temperature=20.0, seed=seed)
        bench.submit(request_id, [4, 2, 9], 20, sampling=sampling)
    bench.run()
    assert len({tuple(bench.tokens(request_id)) for request_id in (1, 2, 3, 4)}) == 4


@pytest.mark.parametrize("seed", [0, -1, 2**63, -(2**63), 2**64 - 1])
def test_every_64_bit_seed_is_accepted(seed):
    assert 0 <= state(seed=seed).uniform() < 1


def test_penalties_follow_the_generated_tokens_through_the_engine():
    plain, penalised = Bench(), Bench()
    plain.submit(1, [3], 40)
    penalised.submit(1, [3], 40, sampling=Sampling(presence_penalty=1000.0))
    plain.run()
    penalised.run()
    assert len(set(plain.tokens(1))) < 40
    assert len(set(penalised.tokens(1))) == 40


def test_logprobs_come_with_each_token_event():
    bench = Bench()
    bench.submit(1, [3, 4], 3, sampling=Sampling(num_logprobs=1))
    bench.run()
    for event in bench.events:
        (logprob,) = event.logprobs
        assert logprob.token_id == event.token_ids[0]
        assert logprob.top == [(logprob.token_id, logprob.logprob)]
