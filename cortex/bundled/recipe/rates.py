"""Counts, in one forward pass, the unseen dialogues that the model would end exactly."""

import random
from collections import defaultdict

import torch
from transformers import Qwen3_5ForCausalLM

from cortex.bundled.recipe import data, render
from cortex.bundled.recipe.batches import tensors


@torch.no_grad()
def exact_rates(
    model: Qwen3_5ForCausalLM, encoder: render.Encoder, seed: int, number: int, device: torch.device
) -> dict[str, tuple[int, int]]:
    """Return, per kind, how many unseen dialogues the model would write exactly, greedily.

    Under greedy decoding the answer is exact just if every own token is the likeliest one.
    """
    rates: dict[str, list[int]] = defaultdict(lambda: [0, 0])
    drawn = [data.dialogue(seed, idx) for idx in range(number)]
    rng = random.Random(seed)
    drawn += [data.tool_dialogue(rng, held_out=True) for _ in range(number // 5)]
    kinds = [item.kind for item in drawn[:number]] + ["held_out"] * (number // 5)
    samples = [encoder.encode(item.messages, item.tools) for item in drawn]
    order = sorted(range(len(samples)), key=lambda idx: len(samples[idx][0]))
    for start in range(0, len(order), 16):
        rows = order[start : start + 16]
        ids, after, weights = tensors([samples[idx] for idx in rows], device)
        guess = model(input_ids=ids, use_cache=False).logits.argmax(-1)
        right = ((guess == after) | (weights < 1)).all(-1)
        for idx, good in zip(rows, right.tolist(), strict=True):
            rates[kinds[idx]][0] += good
            rates[kinds[idx]][1] += 1
    return {kind: (good, total) for kind, (good, total) in sorted(rates.items())}


def summary(rates: dict[str, tuple[int, int]]) -> str:
    """Return the rates on one line."""
    return "  ".join(f"{kind} {good}/{total}" for kind, (good, total) in rates.items())
