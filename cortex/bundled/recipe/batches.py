"""Draws dialogues into batches of similar length and turns them into tensors."""

import random
from collections.abc import Iterator

import torch
from torch import Tensor

from cortex.bundled.recipe import data, render

_LONGEST = 544
_POOL = 480
_PROMPT_WEIGHT = 0.1
_ROUND = 4

Sample = tuple[list[int], list[bool]]


def copy_share(progress: float) -> float:
    """Return the share of copying samples at a point of the training, from 0 to 1."""
    if progress < 0.1:
        return 0.8
    if progress < 0.28:
        return 0.8 - (progress - 0.1) / 0.18 * 0.7
    return 0.1 if progress < 0.6 else 0.04


class Feed:
    """Draws batches of samples of similar length, without end."""

    def __init__(self, encoder: render.Encoder, seed: int, batch_tokens: int) -> None:
        self._encoder, self._seed, self._tokens = encoder, seed, batch_tokens
        self._rng = random.Random(seed)
        self._next = 0
        self._ready: list[list[Sample]] = []

    def batch(self, progress: float) -> list[Sample]:
        """Return the next batch."""
        if not self._ready:
            self._ready = list(self._draw(copy_share(progress)))
            self._rng.shuffle(self._ready)
        return self._ready.pop()

    def _draw(self, copies: float) -> Iterator[list[Sample]]:
        pool: list[Sample] = []
        while len(pool) < _POOL:
            stage = "copy" if self._rng.random() < copies else "full"
            drawn = data.dialogue(self._seed, self._next, stage)
            self._next += 1
            sample = self._encoder.encode(drawn.messages, drawn.tools)
            if len(sample[0]) <= _LONGEST:
                pool.append(sample)
        pool.sort(key=lambda sample: len(sample[0]))
        batch: list[Sample] = []
        for sample in pool:
            if batch and (len(batch) + 1) * padded(len(sample[0])) > self._tokens:
                yield batch
                batch = []
            batch.append(sample)
        yield batch


def padded(length: int) -> int:
    """Return a length rounded up a little."""
    return -(-length // _ROUND) * _ROUND


def tensors(batch: list[Sample], device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Return ids, the ids that follow, and their weights; padding comes last and weighs nothing."""
    width = padded(max(len(ids) for ids, _ in batch))
    ids = torch.zeros(len(batch), width, dtype=torch.long)
    after = torch.zeros(len(batch), width, dtype=torch.long)
    weights = torch.zeros(len(batch), width)
    for row, (tokens, own) in enumerate(batch):
        last = len(tokens) - 1
        ids[row, : last + 1] = torch.tensor(tokens)
        after[row, :last] = torch.tensor(tokens[1:])
        weights[row, :last] = torch.tensor([1.0 if mine else _PROMPT_WEIGHT for mine in own[1:]])
    return ids.to(device), after.to(device), weights.to(device)
