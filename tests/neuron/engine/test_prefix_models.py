"""The prefix cache with both families in float32: the same greedy tokens as without it."""

import random

import pytest

from cortex.neuron.engine.engine import Engine
from cortex.neuron.engine.loader import load_engine
from cortex.neuron.engine.protocol import LoadModel, Submit
from cortex.neuron.models.source import detect
from tests.support import checkpoints

FAMILIES = {"llama": checkpoints.llama, "qwen3_5": checkpoints.qwen3_5_text}


@pytest.fixture(params=FAMILIES, scope="module")
def source(request, tmp_path_factory):
    path = tmp_path_factory.mktemp(request.param)
    FAMILIES[request.param](path)
    source = detect(path)
    assert source is not None
    return source


def load(source, **settings) -> Engine:
    command = LoadModel(
        source=source,
        block_size=16,
        max_num_seqs=4,
        max_batched_tokens=96,
        max_model_len=700,
        **settings,
    )
    return load_engine(command, progress=lambda _: None)[0]


def run(engine: Engine, *prompts: list[int], max_tokens: int = 24) -> list[tuple[list[int], int]]:
    """Return each prompt's new tokens and how many of its own were cached."""
    for request_id, prompt in enumerate(prompts):
        engine.submit(Submit(request_id=request_id, prompt_ids=prompt, max_tokens=max_tokens))
    tokens: list[list[int]] = [[] for _ in prompts]
    cached = [0] * len(prompts)
    while engine.has_work:
        for event in engine.step().events:
            assert event.error is None
            tokens[event.request_id] += event.token_ids
            cached[event.request_id] = event.cached_tokens
    return list(zip(tokens, cached, strict=True))


def random_ids(rng: random.Random, count: int) -> list[int]:
    return [rng.randrange(3, checkpoints.VOCAB_SIZE) for _ in range(count)]


@pytest.mark.parametrize("first_len", [97, 128, 131, 257])
def test_three_turns_of_a_chat_give_the_same_tokens_with_and_without_the_cache(source, first_len):
    rng = random.Random(first_len)
    plain, caching = load(source, prefix_cache=False), load(source)
    chat = random_ids(rng, first_len)
    for turn in range(3):
        ((expected, none),) = run(plain, chat, max_tokens=67)
        ((tokens, cached),) = run(caching, chat, max_tokens=67)
        assert tokens == expected
        assert none == 0
        # All but what came last: the new message, and less than a block before it.
        assert cached >= (len(chat) - 9 - 16 if turn else 0)
        chat += expected + random_ids(rng, 9)


def test_concurrent_requests_that_share_a_prefix_give_the_same_tokens(source):
    rng = random.Random(3)
    shared = random_ids(rng, 151)
    prompts = [shared + random_ids(rng, count) for count in (1, 5, 17, 40)]
    plain, caching = load(source, prefix_cache=False), load(source)
    run(caching, shared)
    expected = [tokens for tokens, _ in run(plain, *prompts)]
    found = run(caching, *prompts)
    assert [tokens for tokens, _ in found] == expected
    assert all(cached >= 128 for _, cached in found)


def test_prompts_that_compete_for_too_few_blocks_give_the_same_tokens(source):
    rng = random.Random(5)
    shared = [random_ids(rng, 90), random_ids(rng, 140)]
    prompts = [rng.choice(shared) + random_ids(rng, rng.randrange(1, 40)) for _ in range(12)]
    plain = load(source, prefix_cache=False)
    # Room for about two of these sequences, and for two states.
    spec = plain._runner.model.cache_spec
    token_bytes = spec.kv_bytes_per_token(plain._runner.model.dtype)
    caching = load(source, cache_bytes=400 * token_bytes, max_snapshots=2)
    expected = [tokens for tokens, _ in run(plain, *prompts, max_tokens=40)]
    found = run(caching, *prompts, max_tokens=40)
    assert [tokens for tokens, _ in found] == expected
    assert any(cached for _, cached in found)


def test_a_prompt_that_was_cancelled_halfway_gives_the_same_tokens(source):
    prompt = random_ids(random.Random(9), 333)
    plain, caching = load(source, prefix_cache=False), load(source)
    caching.submit(Submit(request_id=7, prompt_ids=prompt, max_tokens=5))
    caching.step()
    caching.step()
    caching.cancel(7)
    caching.step()
    ((expected, _),) = run(plain, prompt)
    ((tokens, cached),) = run(caching, prompt)
    assert tokens == expected
    assert cached > 100


def test_each_family_says_from_where_a_prompt_may_go_on(source):
    loaded = [
        load_engine(LoadModel(source=source, **settings), progress=lambda _: None)[1]
        for settings in ({}, {"prefix_cache": False}, {"max_snapshots": 0})
    ]
    has_state = "qwen3_5" in source.path
    expected = ["snapshot", None, None] if has_state else ["block", None, "block"]
    assert [each.prefix_match for each in loaded] == expected
    assert (loaded[0].num_snapshots > 0) == has_state
    assert (loaded[0].cache_bytes > loaded[1].cache_bytes) == has_state
