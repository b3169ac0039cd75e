"""Inputs of the Gated DeltaNet operators from a seed, their float64 results, and error measures.

A case is a small frozen description. `make` draws its inputs: keys normalised, decays and write
strengths spread as trained models have them. The truth is computed in float64 from the inputs as
they are after rounding, so that an error is an operator's own. Slots of a pool lie in no order,
and those that no sequence holds are full of NaN.
"""

import functools
import itertools
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn import functional

from cortex.neuron.kernels import gdn_reference as reference
from cortex.neuron.kernels.chunks import PrefillTables, plan_prefill

NORM_EPS = 1e-6
# The largest relative error of one rounding to a type.
ROUNDING = {torch.float32: 2.0**-24, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}
# Of operators that compute in float32 whatever the type of their inputs.
FLOAT32_ERROR = 1e-5
# Of operators that may round what they compute with to the type of their inputs.
PREFILL_ERROR = {torch.float32: 1e-5, torch.float16: 1e-3, torch.bfloat16: 5e-3}


@dataclass(frozen=True, kw_only=True)
class Heads:
    """Head counts and dims."""

    k_heads: int = 2
    v_heads: int = 4
    k_dim: int = 64
    v_dim: int = 64

    @property
    def conv_dim(self) -> int:
        """Channels of [q heads | k heads | v heads]."""
        return 2 * self.k_heads * self.k_dim + self.v_heads * self.v_dim

    def split(self, channels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return q, k, v of (..., conv_dim), as (..., heads, dim)."""
        width = self.k_heads * self.k_dim
        parts = channels.split([width, width, self.v_heads * self.v_dim], dim=-1)
        dims = (self.k_dim, self.k_dim, self.v_dim)
        q, k, v = (x.unflatten(-1, (-1, dim)) for x, dim in zip(parts, dims, strict=True))
        return q, k, v


@dataclass(frozen=True, kw_only=True)
class RuleCase:
    """Sequences for a delta rule.

    Attributes:
        padding: sequences that hold no slot.
        no_slot: what stands for their slot.
        decay: g of every token; None: drawn.
        alike: keys differ by 1 % and beta is near 1.
        strided: tokens lie further apart than their size.
        snapshots_at: of a prefill, as for `plan_prefill`.
        max_segment_chunks: of a prefill.
    """

    lengths: tuple[int, ...]
    heads: Heads = Heads()
    dtype: torch.dtype = torch.float32
    state_dtype: torch.dtype = torch.float32
    padding: tuple[int, ...] = ()
    no_slot: int = -1
    decay: float | None = None
    alike: bool = False
    strided: bool = False
    snapshots_at: tuple[tuple[int, int], ...] = ()
    max_segment_chunks: int | None = None

    def __str__(self) -> str:
        h = self.heads
        lengths = "+".join(map(str, self.lengths))
        types = "-".join(_name(dtype) for dtype in (self.dtype, self.state_dtype))
        parts = [lengths, f"{h.k_heads}.{h.v_heads}x{h.k_dim}.{h.v_dim}", types]
        parts += [name for name in ("padding", "alike", "strided") if getattr(self, name)]
        parts += [f"decay{self.decay:g}"] if self.decay is not None else []
        parts += ["snapshots"] if self.snapshots_at else []
        parts += [f"segments{self.max_segment_chunks}"] if self.max_segment_chunks else []
        return "-".join(parts)


@dataclass(kw_only=True)
class RuleInputs:
    """What a delta rule is called with; `qkv` holds raw q and k, for prefills."""

    q: Tensor
    k: Tensor
    v: Tensor
    qkv: Tensor
    g: Tensor
    beta: Tensor
    states: Tensor
    slots: Tensor
    starts: Tensor
    tables: PrefillTables


@dataclass(frozen=True, kw_only=True)
class RuleTruth:
    """float64 results: outputs (tokens, v_heads, v_dim), states by sequence, snapshots."""

    out: Tensor
    states: Tensor
    snapshots: Tensor


def make_rule(case: RuleCase, device: torch.device | str = "cpu") -> RuleInputs:
    """Draw a case's inputs; the same ones on every call."""
    drawn = _draw_rule(case)
    moved = {
        name: _to(value, device) for name, value in vars(drawn).items() if isinstance(value, Tensor)
    }
    if case.strided:
        moved |= {name: apart(moved[name]) for name in ("q", "k", "v", "qkv")}
    tables = plan_prefill(
        case.lengths,
        snapshots_at=case.snapshots_at,
        max_segment_chunks=case.max_segment_chunks,
        device=device,
    )
    return RuleInputs(**moved, tables=tables)


@functools.lru_cache(maxsize=16)
def rule_truth(case: RuleCase, *, raw: bool = False) -> RuleTruth:
    """Return a case's results in float64; `raw`: of a prefill, which normalises q and k."""
    inputs = _draw_rule(case)
    if raw:
        q, k, v = case.heads.split(inputs.qkv.double())
        q, k = reference.l2_normalise(q) * case.heads.k_dim**-0.5, reference.l2_normalise(k)
    else:
        q, k, v = inputs.q.double(), inputs.k.double(), inputs.v.double()
    out = torch.zeros(v.shape, dtype=torch.float64)
    tokens = (q, k, v, inputs.g.double(), inputs.beta.double())
    ends: list[Tensor] = []
    snapshots: dict[int, Tensor] = {}
    starts = [0, *itertools.accumulate(case.lengths)]
    for sequence, length in enumerate(case.lengths):
        slot = int(inputs.slots[sequence])
        if not 0 <= slot < len(inputs.states):
            ends.append(torch.zeros(inputs.states.shape[1:], dtype=torch.float64))
            continue
        state = inputs.states[slot].double()[None]
        wanted = {n: i for i, (s, n) in enumerate(case.snapshots_at) if s == sequence}
        cuts = sorted({0, *wanted, length})
        for begin, end in itertools.pairwise(cuts):
            part = slice(starts[sequence] + begin, starts[sequence] + end)
            done, state = _rule(*(x[None, part] for x in tokens), state)
            out[part] = done[0]
            if end in wanted:
                snapshots[wanted[end]] = state[0]
        ends.append(state[0])
    return RuleTruth(
        out=out,
        states=_stack(ends, inputs.states),
        snapshots=_stack([snapshots[i] for i in sorted(snapshots)], inputs.states),
    )


@dataclass(frozen=True, kw_only=True)
class StepCase:
    """Sequences for gdn_decode_step, or for gdn_verify with its draft tokens.

    Attributes:
        rows: sequences.
        tokens: of each sequence, for gdn_verify or for as many decode steps.
        ring: entries of a slot's ring.
        padding, no_slot, strided: as in RuleCase.
    """

    rows: int
    tokens: int = 1
    ring: int = 4
    heads: Heads = Heads()
    width: int = 4
    dtype: torch.dtype = torch.float32
    state_dtype: torch.dtype = torch.float32
    padding: tuple[int, ...] = ()
    no_slot: int = -1
    strided: bool = False

    def __str__(self) -> str:
        h = self.heads
        types = "-".join(_name(dtype) for dtype in (self.dtype, self.state_dtype))
        parts = [f"{self.rows}x{self.tokens}", f"{h.k_heads}.{h.v_heads}x{h.k_dim}.{h.v_dim}"]
        parts += [types, f"taps{self.width}"]
        parts += [name for name in ("padding", "strided") if getattr(self, name)]
        return "-".join(parts)


@dataclass(kw_only=True)
class StepInputs:
    """What the fused steps are called with; mixed, z, b and a are (rows, tokens, ...)."""

    mixed: Tensor
    z: Tensor
    b: Tensor
    a: Tensor
    conv_weight: Tensor
    a_log: Tensor
    dt_bias: Tensor
    norm_weight: Tensor
    windows: Tensor
    states: Tensor
    slots: Tensor
    arrivals: Tensor
    pending: Tensor
    ring_inputs: Tensor
    ring_keys: Tensor
    ring_deltas: Tensor
    ring_decays: Tensor

    def decode_arguments(self, token: int = 0) -> tuple[Tensor | float, ...]:
        """Return the arguments of gdn_decode_step for one token of each sequence."""
        each = (x[:, token] for x in (self.mixed, self.z, self.b, self.a))
        return (*each, *self._weights(), self.windows, self.states, self.slots, self.arrivals)

    def verify_arguments(self, tokens: slice = slice(None)) -> tuple[Tensor | float, ...]:
        """Return the arguments of gdn_verify for some tokens of each sequence, or for none."""
        each = (x[:, tokens] for x in (self.mixed, self.z, self.b, self.a))
        pools = (self.windows, self.states, self.slots)
        ring = (self.ring_inputs, self.ring_keys, self.ring_deltas, self.ring_decays)
        return (*each, *self._weights(), *pools, self.pending, *ring, self.arrivals)

    def _weights(self) -> tuple[Tensor | float, ...]:
        return self.conv_weight, self.a_log, self.dt_bias, self.norm_weight, NORM_EPS


def make_step(case: StepCase, device: torch.device | str = "cpu") -> StepInputs:
    """Draw a case's inputs; the same ones on every call."""
    moved = {name: _to(value, device) for name, value in vars(_draw_step(case)).items()}
    if case.strided:
        moved |= {name: apart(moved[name], 2) for name in ("mixed", "z", "b", "a")}
    return StepInputs(**moved)


@dataclass(frozen=True, kw_only=True)
class StepTruth:
    """float64 results: out (rows, tokens, v_heads * v_dim); states and windows after each token.

    `states` is (tokens + 1, rows, v_heads, v_dim, k_dim), the first one being that before the
    call; `windows` likewise, exact.
    """

    out: Tensor
    states: Tensor
    windows: Tensor


@functools.lru_cache(maxsize=16)
def step_truth(case: StepCase) -> StepTruth:
    """Return what a case's tokens give one after the other, in float64."""
    inputs = _draw_step(case)
    held = [row for row in range(case.rows) if row not in case.padding]
    out = torch.zeros(inputs.z.shape, dtype=torch.float64)
    each = inputs.slots.clamp(0, len(inputs.states) - 1)
    states, windows = inputs.states[each].double(), inputs.windows[each].double()
    all_states, all_windows = [states], [windows]
    for t in range(case.tokens):
        if held:
            done, states, windows = _mix(case, inputs, t, states, windows)
            out[held, t] = done[held]
        all_states.append(states)
        all_windows.append(windows)
    return StepTruth(out=out, states=torch.stack(all_states), windows=torch.stack(all_windows))


def gated_norm(x: Tensor, gate: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Return x / rms(x) * weight * silu(gate), in float64."""
    x, gate = x.double(), gate.double()
    scale = torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)
    return x * scale * weight.double() * functional.silu(gate)


def error(got: Tensor, want: Tensor, dims: int = 1) -> float:
    """Return the largest norm of a difference over the wanted norm.

    Args:
        got: anything; NaN gives NaN and what should be zeros infinity, which no bound allows.
        want: float64, shaped like got.
        dims: leading dimensions that are measured one by one, such as a pool's slots and heads.
    """
    assert got.shape == want.shape, (got.shape, want.shape)
    if not want.numel():
        return 0.0
    flat = [x.double().cpu().flatten(dims).flatten(0, dims - 1) for x in (got, want)]
    apart_by, norms = (flat[0] - flat[1]).norm(dim=-1), flat[1].norm(dim=-1)
    return float(torch.where(apart_by == 0, 0.0, apart_by / norms).max())


def rounded(bound: float, dtype: torch.dtype) -> float:
    """Return a bound for results with an error of `bound` that are rounded to a type."""
    return bound + ROUNDING[dtype]


def bits(x: Tensor) -> Tensor:
    """Return a copy of a tensor's bits, which are equal where NaN is not."""
    integer = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    return x.detach().clone().view(integer[x.element_size()])


def apart(x: Tensor, token_dims: int = 1) -> Tensor:
    """Return a copy of x whose tokens lie apart, NaN between them, at an odd offset."""
    tokens, size = x.shape[:token_dims].numel(), x.shape[token_dims:].numel()
    wide = torch.full((tokens * (size + 5) + 3,), torch.nan, dtype=x.dtype, device=x.device)
    rows = wide[3:].view(tokens, size + 5)[:, :size]
    rows.copy_(x.reshape(tokens, size))
    steps = [size + 5]
    for length in reversed(x.shape[1:token_dims]):
        steps.insert(0, steps[0] * length)
    inner = torch.empty(x.shape[token_dims:]).stride()
    return wide.as_strided(x.shape, (*steps, *inner), 3)


def spread(rows: int, padding: tuple[int, ...], no_slot: int) -> tuple[Tensor, int]:
    """Return slots for some sequences, in no order and not side by side, and the pool's size."""
    num_slots = 2 * rows + 1
    slots = torch.tensor([(5 * row + 2) % num_slots for row in range(rows)], dtype=torch.int64)
    if num_slots % 5 == 0:
        slots = torch.tensor([num_slots - 1 - 2 * row for row in range(rows)], dtype=torch.int64)
    slots[list(padding)] = no_slot
    return slots, num_slots


def held_slots(slots: Tensor, num_slots: int) -> Iterator[tuple[int, int]]:
    """Yield (sequence, slot) of the sequences that hold one."""
    for sequence, slot in enumerate(slots.tolist()):
        if 0 <= slot < num_slots:
            yield sequence, slot


def poison_others(pool: Tensor, slots: Tensor) -> Tensor:
    """Fill a pool's slots that no sequence holds with NaN, in place."""
    held = [slot for _, slot in held_slots(slots, len(pool))]
    pool[[slot for slot in range(len(pool)) if slot not in held]] = torch.nan
    return pool


@functools.lru_cache(maxsize=16)
def _draw_rule(case: RuleCase) -> RuleInputs:
    heads, tokens = case.heads, sum(case.lengths)
    generator = torch.Generator().manual_seed(tokens + 7 * heads.k_dim + heads.v_heads)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    q, k = draw(tokens, heads.k_heads, heads.k_dim), draw(tokens, heads.k_heads, heads.k_dim)
    if case.alike:
        k = k[:1] + 0.01 * k
    v = draw(tokens, heads.v_heads, heads.v_dim)
    qkv = torch.cat([x.flatten(1) for x in (q, k, v)], dim=1)
    beta, g = reference.fused_gdn_gating(
        draw(tokens, heads.v_heads), draw(tokens, heads.v_heads), *_gates(heads, generator)
    )
    if case.alike:
        beta = 1 - 0.02 * beta
    if case.decay is not None:
        g = case.decay * (1 + 0.1 * torch.rand(g.shape, generator=generator))
    slots, num_slots = spread(len(case.lengths), case.padding, case.no_slot)
    states = draw(num_slots, heads.v_heads, heads.v_dim, heads.k_dim).to(case.state_dtype)
    return RuleInputs(
        q=(reference.l2_normalise(q) * heads.k_dim**-0.5).to(case.dtype),
        k=reference.l2_normalise(k).to(case.dtype),
        v=v.to(case.dtype),
        qkv=qkv.to(case.dtype),
        g=g,
        beta=beta,
        states=poison_others(states, slots),
        slots=slots,
        starts=torch.tensor([0, *itertools.accumulate(case.lengths)], dtype=torch.int64),
        tables=plan_prefill([]),
    )


@functools.lru_cache(maxsize=16)
def _draw_step(case: StepCase) -> StepInputs:
    heads = case.heads
    generator = torch.Generator().manual_seed(case.rows + 7 * heads.k_dim + heads.v_heads)

    def draw(*shape: int, dtype: torch.dtype = case.dtype) -> Tensor:
        return torch.randn(*shape, generator=generator).to(dtype)

    rows, tokens, v_heads = case.rows, case.tokens, heads.v_heads
    slots, num_slots = spread(rows, case.padding, case.no_slot)
    a_log, dt_bias = _gates(heads, generator)
    windows = draw(num_slots, case.width - 1, heads.conv_dim)
    states = draw(num_slots, v_heads, heads.v_dim, heads.k_dim, dtype=case.state_dtype)
    ring = (num_slots, case.ring)
    nan = torch.nan
    return StepInputs(
        mixed=draw(rows, tokens, heads.conv_dim),
        z=draw(rows, tokens, v_heads * heads.v_dim),
        b=draw(rows, tokens, v_heads),
        a=draw(rows, tokens, v_heads),
        conv_weight=draw(heads.conv_dim, case.width) * 0.5,
        a_log=a_log,
        dt_bias=dt_bias,
        norm_weight=1 + 0.2 * draw(heads.v_dim, dtype=torch.float32),
        windows=poison_others(windows, slots),
        states=poison_others(states, slots),
        slots=slots,
        arrivals=torch.zeros(max(1, rows * heads.k_heads), dtype=torch.int32),
        pending=torch.zeros(rows, dtype=torch.int64),
        ring_inputs=torch.full((*ring, heads.conv_dim), nan, dtype=case.dtype),
        ring_keys=torch.full((*ring, v_heads, heads.k_dim), nan),
        ring_deltas=torch.full((*ring, v_heads, heads.v_dim), nan),
        ring_decays=torch.full((*ring, v_heads), nan),
    )


def _gates(heads: Heads, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Return a_log and dt_bias as models are born with: decays from 16 a token down to 0.001."""
    a_log = (1 + 15 * torch.rand(heads.v_heads, generator=generator)).log()
    steps = torch.exp(-2.3 - 4.6 * torch.rand(heads.v_heads, generator=generator))
    return a_log, steps.expm1().log()


def _mix(
    case: StepCase, inputs: StepInputs, t: int, states: Tensor, windows: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Return output, states and windows of every row after its token t, in float64."""
    convolved, windows = reference.causal_conv1d_update(
        inputs.mixed[:, t].double(), inputs.conv_weight.double(), windows
    )
    q, k, v = case.heads.split(convolved)
    q, k = reference.l2_normalise(q) * case.heads.k_dim**-0.5, reference.l2_normalise(k)
    beta, g = reference.fused_gdn_gating(
        inputs.b[:, t], inputs.a[:, t], inputs.a_log.double(), inputs.dt_bias.double()
    )
    core, states = reference.gated_delta_rule_recurrence(
        *(x[:, None] for x in (q, k, v, g, beta)), states
    )
    gate = inputs.z[:, t].unflatten(-1, (case.heads.v_heads, -1))
    return gated_norm(core[:, 0], gate, inputs.norm_weight, NORM_EPS).flatten(1), states, windows


def _rule(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, state: Tensor
) -> tuple[Tensor, Tensor]:
    """Apply the rule in float64 by whichever form is faster; both are exact to 1e-12."""
    by_chunks = q.shape[1] > reference.CHUNK_TOKENS
    rule = (
        reference.chunked_gated_delta_rule_recurrence
        if by_chunks
        else reference.gated_delta_rule_recurrence
    )
    return rule(q, k, v, g, beta, state)


def _stack(each: list[Tensor], pool: Tensor) -> Tensor:
    return torch.stack(each) if each else torch.empty((0, *pool.shape[1:]), dtype=torch.float64)


def _to(x: Tensor, device: torch.device | str) -> Tensor:
    return x.clone() if torch.device(device).type == x.device.type else x.to(device)


def _name(dtype: torch.dtype) -> str:
    return {torch.float32: "f32", torch.float16: "f16", torch.bfloat16: "bf16"}[dtype]


def across(case: RuleCase, **fields: tuple[object, ...]) -> list[RuleCase]:
    """Return a case with every combination of some fields' values."""
    combinations = itertools.product(*fields.values())
    return [replace(case, **dict(zip(fields, values, strict=True))) for values in combinations]
