"""Draws the next token of every sequence of a step from its logits, each row by its own rules."""

import math
from collections.abc import Sequence as Seq
from dataclasses import dataclass

import torch
from torch import Tensor

from cortex.neuron.engine.protocol import Logprob, Sampling

# Below this the division would overflow and the draw is the likeliest token anyway.
_GREEDY_BELOW = 1e-5
# Uniform numbers drawn at a time from a sequence's generator.
_UNIFORM_BLOCK = 64
# Candidates looked at for top_p before a row is sorted as a whole.
_FIRST_CANDIDATES = 1024


class SamplingState:
    """One sequence's sampling settings and what they need to remember.

    Args:
        sampling: the settings.
        prompt_ids: read for the repetition penalty.
        vocab_size: width of the model's logits.
        device: where the logits are.
    """

    __slots__ = (
        "_counts",
        "_generator",
        "_is_thinking",
        "_num_thought",
        "_uniforms",
        "bias",
        "has_penalties",
        "is_filtered",
        "is_greedy",
        "is_simple",
        "params",
        "prompt_seen",
    )

    def __init__(
        self, sampling: Sampling, *, prompt_ids: Seq[int], vocab_size: int, device: torch.device
    ) -> None:
        self.params = sampling
        self.is_greedy = sampling.temperature < _GREEDY_BELOW
        self.is_filtered = 0 < sampling.top_k < vocab_size or sampling.top_p < 1
        self.has_penalties = (
            sampling.presence_penalty != 0
            or sampling.frequency_penalty != 0
            or sampling.repetition_penalty != 1
        )
        self.is_simple = (
            self.is_greedy
            and not self.has_penalties
            and not sampling.logit_bias
            and sampling.num_logprobs is None
            and sampling.think is None
        )
        self._is_thinking = sampling.think is not None and sampling.think.begin_id is None
        self._num_thought = 0
        self.bias: tuple[Tensor, Tensor] | None = None
        if sampling.logit_bias:
            ids = torch.tensor(list(sampling.logit_bias), device=device)
            values = torch.tensor(list(sampling.logit_bias.values()), device=device)
            self.bias = ids, values.float()
        self._counts: Tensor | None = None
        self.prompt_seen: Tensor | None = None
        if self.has_penalties:
            self._counts = torch.zeros(vocab_size, device=device)
            self.prompt_seen = torch.zeros(vocab_size, dtype=torch.bool, device=device)
            if sampling.repetition_penalty != 1:
                self.prompt_seen[torch.tensor(list(prompt_ids), device=device)] = True
        self._generator: torch.Generator | None = None
        self._uniforms: list[float] = []

    @property
    def counts(self) -> Tensor:
        """(vocab,) float32, how often each token was generated; only with penalties."""
        assert self._counts is not None
        return self._counts

    @property
    def forced_id(self) -> int | None:
        """The only token that may come next: the end of a thought that is long enough."""
        think = self.params.think
        if think is None or not self._is_thinking or self._num_thought < think.max_tokens:
            return None
        return think.end_id

    def uniform(self) -> float:
        """Return the sequence's next number in [0, 1): the same for a seed whatever runs beside."""
        if not self._uniforms:
            if self._generator is None:
                self._generator = torch.Generator()
                if self.params.seed is None:
                    self._generator.seed()
                else:
                    self._generator.manual_seed(self.params.seed)
            block = torch.rand(_UNIFORM_BLOCK, generator=self._generator, dtype=torch.float64)
            self._uniforms = block.tolist()
            self._uniforms.reverse()
        return self._uniforms.pop()

    def observe(self, token_id: int) -> None:
        """Count a generated token for the penalties and for the budget of thinking."""
        if self._counts is not None:
            self._counts[token_id] += 1
        think = self.params.think
        if think is None:
            return
        if self._is_thinking:
            self._is_thinking = token_id != think.end_id
            self._num_thought += self._is_thinking
        else:
            self._is_thinking = token_id == think.begin_id


@dataclass(frozen=True, slots=True)
class Sampled:
    """One draw per row.

    Attributes:
        token_ids: drawn ids; meaningless where not valid.
        is_valid: whether the row had a finite best logit and no NaN.
        logprobs: of the rows that asked, by row.
    """

    token_ids: list[int]
    is_valid: list[bool]
    logprobs: dict[int, Logprob]


def edit_logits(logits: Tensor, states: Seq[SamplingState]) -> None:
    """Apply penalties, biases and ends of thoughts in place.

    Args:
        logits: (rows, vocab) float32, one row per state.
    """
    rows = [i for i, state in enumerate(states) if state.has_penalties]
    if rows:
        _apply_penalties(logits, rows, [states[i] for i in rows])
    for i, state in enumerate(states):
        if state.bias is not None:
            ids, values = state.bias
            logits[i, ids] += values
        if state.forced_id is not None:
            logits[i] = -torch.inf
            logits[i, state.forced_id] = 0.0


def sample(logits: Tensor, states: Seq[SamplingState], raw: "RawLogits | None" = None) -> Sampled:
    """Draw one token per row.

    Args:
        logits: (rows, vocab) float32 after all edits and masks; may be changed.
        raw: what `keep_raw` returned for the same rows before the edits.
    """
    best, ids = logits.max(dim=-1)
    drawn = [i for i, state in enumerate(states) if not state.is_greedy]
    if drawn:
        index = torch.tensor(drawn, device=logits.device)
        ids[index] = _draw(logits[index], [states[i] for i in drawn])
    token_ids: list[int] = ids.tolist()
    is_valid = [math.isfinite(value) for value in best.tolist()]
    logprobs = {} if raw is None else raw.logprobs(token_ids)
    return Sampled(token_ids=token_ids, is_valid=is_valid, logprobs=logprobs)


class RawLogits:
    """Copies of the unedited rows whose log probabilities were asked for."""

    def __init__(self, logits: Tensor, rows: list[int], num_top: list[int]) -> None:
        self._rows = rows
        self._num_top = num_top
        self._log_probs = logits[torch.tensor(rows, device=logits.device)].log_softmax(dim=-1)

    def logprobs(self, token_ids: list[int]) -> dict[int, Logprob]:
        """Return the log probability of each row's token and of its likeliest rivals."""
        chosen = torch.tensor([token_ids[row] for row in self._rows], device=self._log_probs.device)
        values: list[float] = self._log_probs.gather(1, chosen[:, None])[:, 0].tolist()
        width = min(max(self._num_top), self._log_probs.shape[1])
        top = self._log_probs.topk(width, dim=-1)
        top_values: list[list[float]] = top.values.tolist()
        top_ids: list[list[int]] = top.indices.tolist()
        return {
            row: Logprob(
                token_id=token_ids[row],
                logprob=values[i],
                top=list(zip(top_ids[i][:num], top_values[i][:num], strict=True)),
            )
            for i, (row, num) in enumerate(zip(self._rows, self._num_top, strict=True))
        }


def keep_raw(logits: Tensor, states: Seq[SamplingState]) -> RawLogits | None:
    """Set aside the rows that want log probabilities; None if no row does."""
    rows = [i for i, state in enumerate(states) if state.params.num_logprobs is not None]
    if not rows:
        return None
    return RawLogits(logits, rows, [states[i].params.num_logprobs or 0 for i in rows])


def _column(values: list[float], device: torch.device) -> Tensor:
    return torch.tensor(values, dtype=torch.float32, device=device)[:, None]


def _apply_penalties(logits: Tensor, rows: list[int], states: list[SamplingState]) -> None:
    device = logits.device
    index = torch.tensor(rows, device=device)
    edited = logits[index]
    counts = torch.stack([state.counts for state in states])
    seen = torch.stack([s.prompt_seen for s in states if s.prompt_seen is not None]) | (counts > 0)
    repetition = _column([s.params.repetition_penalty for s in states], device)
    scaled = torch.where(edited > 0, edited / repetition, edited * repetition)
    edited = torch.where(seen, scaled, edited)
    edited -= counts * _column([s.params.frequency_penalty for s in states], device)
    edited -= (counts > 0) * _column([s.params.presence_penalty for s in states], device)
    logits[index] = edited


def _draw(logits: Tensor, states: list[SamplingState]) -> Tensor:
    """Draw from the softmax of (rows, vocab) logits after temperature and filters; (rows,) ids.

    What is kept is drawn in the order of the vocabulary, so that neither equal logits nor the
    other rows of the batch change what a seed gives.
    """
    logits = logits / _column([s.params.temperature for s in states], logits.device)
    filtered = [i for i, state in enumerate(states) if state.is_filtered]
    if filtered:
        index = torch.tensor(filtered, device=logits.device)
        rows = logits[index]
        least = _least_kept(rows, [states[i] for i in filtered])
        logits[index] = rows.masked_fill(rows < least, -torch.inf)
    if any(state.params.min_p > 0 for state in states):
        shares = [min(state.params.min_p, 1.0) for state in states]
        floors = [math.log(share) if share > 0 else -math.inf for share in shares]
        floor = logits.amax(dim=-1, keepdim=True) + _column(floors, logits.device)
        logits = logits.masked_fill(logits < floor, -torch.inf)
    return _invert_cdf(logits.softmax(dim=-1), states)


def _least_kept(logits: Tensor, states: list[SamplingState]) -> Tensor:
    """Return the least logit that top_k and then top_p keep, (rows, 1) of (rows, vocab)."""
    vocab_size = logits.shape[1]
    top_k = [s.params.top_k if s.params.top_k > 0 else vocab_size for s in states]
    width = min(max(k if k < vocab_size else _FIRST_CANDIDATES for k in top_k), vocab_size)
    values, probs = _candidates(logits, top_k, width)
    if width < vocab_size and _needs_more(probs, states, top_k):
        values, probs = _candidates(logits, top_k, vocab_size)
    # Off is a bound that a rounded sum cannot reach.
    mass = [s.params.top_p if s.params.top_p < 1 else math.inf for s in states]
    dropped = probs.cumsum(dim=-1) - probs >= _column(mass, logits.device)
    dropped |= values == -torch.inf
    dropped[:, 0] = False
    return values.masked_fill(dropped, torch.inf).amin(dim=-1, keepdim=True)


def _candidates(logits: Tensor, top_k: list[int], width: int) -> tuple[Tensor, Tensor]:
    """Return the `width` best logits of each row, best first, and their probabilities.

    A row with top_k is normalised over its k best, another over the whole vocabulary.
    """
    values = logits.topk(width, dim=-1).values
    limit = torch.tensor(top_k, device=logits.device)[:, None]
    values = values.masked_fill(torch.arange(width, device=logits.device) >= limit, -torch.inf)
    total = values.logsumexp(dim=-1)
    whole = [i for i, k in enumerate(top_k) if k >= logits.shape[1]]
    if whole and width < logits.shape[1]:
        index = torch.tensor(whole, device=logits.device)
        total[index] = logits[index].logsumexp(dim=-1)
    return values, (values - total[:, None]).exp()


def _needs_more(probs: Tensor, states: list[SamplingState], top_k: list[int]) -> bool:
    """Whether a row without top_k has less than its top_p among the first candidates."""
    mass = probs.sum(dim=-1).tolist()
    rows = zip(mass, states, top_k, strict=True)
    width = probs.shape[1]
    return any(k > width and found < state.params.top_p for found, state, k in rows)


def _invert_cdf(probs: Tensor, states: list[SamplingState]) -> Tensor:
    """Draw a column of each row of (rows, n) unnormalised probabilities by its own uniform."""
    cdf = probs.cumsum(dim=-1)
    total = cdf[:, -1:]
    uniform = torch.tensor([[s.uniform()] for s in states], dtype=torch.float64).to(
        device=cdf.device, dtype=cdf.dtype
    )
    # Strictly under the total, so that no column of probability zero at the end is drawn.
    below = torch.nextafter(total, torch.zeros_like(total))
    target = torch.minimum(uniform * total, below)
    picked = torch.searchsorted(cdf, target, right=True)[:, 0]
    return picked.clamp_(max=probs.shape[1] - 1)
