"""From hidden states to one vector a text."""

import torch
from torch import Tensor
from torch.nn import functional

from cortex.neuron.models.embedding_config import EmbeddingSpec


class Pool:
    """The pooling of one text, whose hidden states come in pieces from the first token on."""

    def __init__(self, spec: EmbeddingSpec) -> None:
        self._spec = spec
        self._num_tokens = 0
        self._value: Tensor | None = None

    def add(self, hidden: Tensor) -> None:
        """Take the states of the next tokens, (tokens, hidden); `last` needs the last one alone.

        Sums are float32 whatever the model computes in.
        """
        states = hidden.float()
        start, self._num_tokens = self._num_tokens, self._num_tokens + len(states)
        match self._spec.pooling:
            case "last":
                self._value = states[-1]
            case "cls":
                self._value = states[0] if self._value is None else self._value
            case "max":
                highest = states.amax(0)
                known = highest if self._value is None else self._value
                self._value = torch.maximum(known, highest)
            case "mean" | "mean_sqrt_len":
                self._sum(states.sum(0))
            case "weighted_mean":
                ranks = torch.arange(start + 1, self._num_tokens + 1, device=states.device)
                self._sum(ranks.to(states.dtype) @ states)

    def vector(self) -> Tensor:
        """Return the text's vector, (hidden,) float32."""
        assert self._value is not None, "nothing was added"
        value = self._value
        match self._spec.pooling:
            case "mean":
                value = value / self._num_tokens
            case "mean_sqrt_len":
                value = value / self._num_tokens**0.5
            case "weighted_mean":
                value = value / (self._num_tokens * (self._num_tokens + 1) / 2)
            case "last" | "cls" | "max":
                pass
        return functional.normalize(value, dim=0) if self._spec.is_normalized else value

    def _sum(self, states: Tensor) -> None:
        self._value = states if self._value is None else self._value + states
