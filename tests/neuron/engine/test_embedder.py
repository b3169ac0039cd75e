"""The engine of models that make vectors, over tiny checkpoints and over an encoder in words."""

import numpy as np
import pytest
import torch

from cortex.neuron.engine.embedder import MAX_WAITING, Embedder
from cortex.neuron.engine.loader import load_engine
from cortex.neuron.engine.protocol import Embed, EngineStats, LoadModel, Submit
from cortex.neuron.models.embedding_config import EmbeddingSpec
from cortex.neuron.models.source import ModelSource
from tests.neuron.engine.building import Clock
from tests.support import checkpoints
from tests.support import embedding_checkpoints as made

SPEC = EmbeddingSpec(is_encoder=True, pooling="mean", is_normalized=False, dimension=2)


class FakeEncoder:
    """Each token's state is its own id and its position; remembers what each step was given."""

    max_model_len = 100
    max_texts = 3
    vocab_size = 50

    def __init__(self, *, can_split=False):
        self.can_split = can_split
        self.steps = []
        self.failure = None
        self.healthy = True

    def encode(self, pieces, start):
        self.steps.append([len(each) for each in pieces])
        if self.failure is not None:
            raise self.failure
        return [
            torch.tensor([[float(token), float(start + at)] for at, token in enumerate(each)])
            for each in pieces
        ]

    def is_healthy(self):
        return self.healthy


def make(encoder, max_batched_tokens=8):
    return Embedder(encoder, SPEC, max_batched_tokens=max_batched_tokens, clock=Clock())


def ask(engine, *texts):
    for request_id, ids in enumerate(texts, 1):
        engine.embed(Embed(request_id=request_id, prompt_ids=ids))


def run(engine):
    events = []
    while engine.has_work or engine.has_news:
        events += engine.step().events
    return events


def vectors(events):
    assert all(each.finish == "stop" for each in events), events
    return {each.request_id: np.frombuffer(each.vector, "<f4").tolist() for each in events}


def test_a_step_takes_whole_texts_in_order_as_far_as_they_fit():
    encoder = FakeEncoder()
    engine = make(encoder)
    ask(engine, [1] * 3, [2] * 3, [3] * 3, [4], [5], [6], [7] * 20)
    assert engine.report().stats == EngineStats(num_running=3, num_waiting=4, free_slots=0)
    found = vectors(run(engine))
    assert encoder.steps == [[3, 3], [3, 1, 1], [1], [20]]
    assert found[1] == [1.0, 1.0]
    assert found[7] == [7.0, 9.5]
    assert engine.report().stats.tok_s_prefill > 0


def test_a_long_text_comes_in_pieces_where_the_model_can_go_on():
    encoder = FakeEncoder(can_split=True)
    engine = make(encoder)
    ask(engine, [1, 2], list(range(20)), [3])
    assert vectors(run(engine)) == {1: [1.5, 0.5], 2: [9.5, 9.5], 3: [3.0, 0.0]}
    assert encoder.steps == [[2], [8], [8], [4], [1]]


def test_a_text_that_is_cancelled_between_its_pieces_leaves_nothing():
    encoder = FakeEncoder(can_split=True)
    engine = make(encoder)
    ask(engine, list(range(20)), [4, 6])
    assert engine.step().events == []
    engine.cancel(1)
    engine.cancel(99)
    events = run(engine)
    assert [(each.request_id, each.finish) for each in events] == [(1, "cancelled"), (2, "stop")]
    assert encoder.steps == [[8], [2]]


@pytest.mark.parametrize(
    ("ids", "words"),
    [
        ([], "empty"),
        ([1] * 101, "101 tokens and the model takes 100"),
        ([50], "outside the vocabulary of 50"),
        ([-1], "outside the vocabulary"),
    ],
)
def test_a_text_that_can_never_be_served_is_refused_at_once(ids, words):
    engine = make(FakeEncoder())
    ask(engine, ids)
    (event,) = engine.report().events
    assert (event.finish, event.is_refusal) == ("error", True)
    assert words in event.error
    assert not engine.has_work


def test_the_queue_is_bounded_and_a_number_is_taken_once():
    engine = make(FakeEncoder())
    ask(engine, *([[1]] * MAX_WAITING))
    engine.embed(Embed(request_id=1, prompt_ids=[2]))
    assert not engine.has_news
    engine.embed(Embed(request_id=MAX_WAITING + 1, prompt_ids=[2]))
    (event,) = engine.report().events
    assert (event.request_id, event.is_refusal) == (MAX_WAITING + 1, True)


def test_a_request_for_text_is_refused():
    engine = make(FakeEncoder())
    engine.submit(Submit(request_id=3, prompt_ids=[1], max_tokens=5))
    (event,) = engine.report().events
    assert (event.request_id, event.is_refusal) == (3, True)
    assert "writes no text" in event.error


def test_a_failed_step_ends_its_own_texts_alone():
    encoder = FakeEncoder()
    engine = make(encoder)
    ask(engine, [1] * 8, [2])
    encoder.failure = torch.OutOfMemoryError()
    (event,) = engine.step().events
    assert (event.request_id, event.finish, event.is_refusal) == (1, "error", False)
    assert "out of memory" in event.error
    encoder.failure = None
    assert vectors(run(engine)) == {2: [2.0, 0.0]}
    assert not engine.is_lost
    encoder.failure, encoder.healthy = RuntimeError("gone"), False
    ask(engine, [1])
    engine.step()
    assert engine.is_lost


def test_a_vector_that_is_not_finite_is_an_error_and_not_an_answer():
    encoder = FakeEncoder()
    encoder.encode = lambda pieces, start: [
        torch.full((len(each), 2), float("nan") if each[0] == 1 else 1.0) for each in pieces
    ]
    engine = make(encoder)
    ask(engine, [1], [2])
    first, second = run(engine)
    assert (first.finish, first.vector) == ("error", None)
    assert second.finish == "stop"


def load(directory, **settings):
    command = LoadModel(source=ModelSource(kind="hf", path=str(directory)), **settings)
    engine, loaded = load_engine(command, progress=lambda _: None)
    assert isinstance(engine, Embedder)
    return engine, loaded


def compared(engine, model, texts, pooling, *, normalize=True):
    ask(engine, *texts)
    found = vectors(run(engine))
    for request_id, ids in enumerate(texts, 1):
        wanted = made.reference(model, ids, pooling, normalize=normalize)
        mine = torch.tensor(found[request_id])
        assert torch.nn.functional.cosine_similarity(mine, wanted, dim=0) > 0.9999
        torch.testing.assert_close(mine, wanted, atol=2e-4, rtol=2e-3)


@pytest.mark.parametrize(
    "pooling", ["cls", "mean", "max", "mean_sqrt_len", "weighted_mean", "last"]
)
def test_an_encoder_is_loaded_and_pools_as_its_files_say(tmp_path, pooling):
    model = made.tiny_encoder(tmp_path, pooling, normalize=pooling != "max", max_tokens=60)
    engine, loaded = load(tmp_path, max_batched_tokens=32)
    assert (loaded.max_model_len, loaded.num_kv_blocks, loaded.cache_bytes) == (60, 0, 0)
    texts = [list(range(2, 2 + count)) for count in (1, 5, 60, 9, 2, 5)]
    compared(engine, model, texts, pooling, normalize=pooling != "max")


@pytest.mark.parametrize("make", [checkpoints.llama, checkpoints.qwen3_5_text])
def test_a_decoder_pools_its_last_token_alone_in_a_batch_and_in_pieces(tmp_path, make):
    model = made.tiny_decoder(tmp_path, make)
    engine, loaded = load(tmp_path, max_batched_tokens=64, block_size=16, max_num_seqs=8)
    assert loaded.max_num_seqs == 8
    generator = torch.Generator().manual_seed(1)
    texts = [
        torch.randint(0, 500, (count,), generator=generator).tolist()
        for count in (1, 7, 200, 1, 33, 64, 65, 2, 130)
    ]
    compared(engine, model, texts, "last")


def test_a_decoder_may_pool_all_of_its_tokens(tmp_path):
    model = made.tiny_decoder(tmp_path, checkpoints.qwen3_5_text)
    made.write_modules(tmp_path, "mean")
    engine, _ = load(tmp_path, max_batched_tokens=32)
    compared(engine, model, [list(range(100)), [3], list(range(20))], "mean")


def test_a_decoder_without_a_head_and_without_prefixes_is_loaded(tmp_path):
    model = made.tiny_decoder(tmp_path)
    checkpoints.rewrite_tensors(
        tmp_path,
        lambda tensors: {
            name.removeprefix("model."): tensor
            for name, tensor in tensors.items()
            if name != "lm_head.weight"
        },
    )
    engine, _ = load(tmp_path)
    compared(engine, model, [[1, 2, 3]], "last")


def test_caches_that_memory_bounds_bound_the_length_of_a_text_and_of_a_step(tmp_path):
    model = made.tiny_decoder(tmp_path)
    # 4 layers x 2 x 2 heads x 16 x 4 bytes = 1 KiB a token; 5 blocks of 16.
    engine, loaded = load(
        tmp_path, cache_bytes=5 * 16 * 1024, block_size=16, max_batched_tokens=512, max_num_seqs=32
    )
    assert (loaded.max_model_len, loaded.cache_bytes) == (80, 80 * 1024)
    compared(engine, model, [[1] * 80, *[[at] for at in range(1, 9)], [2] * 40, [3] * 17], "last")
