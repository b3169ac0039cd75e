"""What the native operators refuse: each message names the operator and shows what came."""

import re

import pytest
import torch

from cortex.neuron.kernels import extension
from cortex.neuron.kernels.chunks import plan_prefill

F16, F32, F64 = torch.float16, torch.float32, torch.float64
INT32, INT64 = torch.int32, torch.int64


def _rule():
    return {
        "q": torch.randn(6, 2, 8),
        "k": torch.randn(6, 2, 8),
        "v": torch.randn(6, 4, 5),
        "g": -torch.rand(6, 4),
        "beta": torch.rand(6, 4),
        "states": torch.randn(3, 4, 5, 8),
        "slots": torch.tensor([2, 0]),
        "starts": torch.tensor([0, 2, 6]),
    }


def _conv():
    return {
        "x": torch.randn(6, 8),
        "weight": torch.randn(8, 4),
        "windows": torch.randn(3, 3, 8),
        "slots": torch.tensor([2, 0]),
        "starts": torch.tensor([0, 2, 6]),
    }


def _update():
    return {**_conv(), "x": torch.randn(2, 8), "starts": ...}


def _gating():
    return {
        "b": torch.randn(3, 4),
        "a": torch.randn(3, 4),
        "a_log": torch.randn(4),
        "dt_bias": torch.randn(4),
    }


def _norm():
    return {
        "x": torch.randn(3, 4, 5),
        "gate": torch.randn(3, 4, 5),
        "weight": torch.randn(5),
        "eps": 1e-6,
    }


def _decode():
    return {
        "mixed": torch.randn(2, 52),
        "z": torch.randn(2, 20),
        "b": torch.randn(2, 4),
        "a": torch.randn(2, 4),
        "conv_weight": torch.randn(52, 4),
        "a_log": torch.randn(4),
        "dt_bias": torch.randn(4),
        "norm_weight": torch.randn(5),
        "norm_eps": 1e-6,
        "windows": torch.randn(3, 3, 52),
        "states": torch.randn(3, 4, 5, 8),
        "slots": torch.tensor([2, 0]),
        "arrivals": torch.zeros(4, dtype=INT32),
    }


def _verify():
    per_token = {name: _decode()[name][:, None] for name in ("mixed", "z", "b", "a")}
    return {
        **_decode(),
        **per_token,
        "pending": torch.tensor([0, 1]),
        "ring_inputs": torch.randn(3, 2, 52),
        "ring_keys": torch.randn(3, 2, 4, 8),
        "ring_deltas": torch.randn(3, 2, 4, 5),
        "ring_decays": -torch.rand(3, 2, 4),
    }


def _prefill():
    tables = plan_prefill([2, 4], snapshots_at=[(1, 3)])
    return {
        "qkv": torch.randn(6, 52),
        "g": -torch.rand(6, 4),
        "beta": torch.rand(6, 4),
        "states": torch.randn(3, 4, 5, 8),
        "slots": torch.tensor([2, 0]),
        "chunks": tables.chunks,
        "first_chunks": tables.first_chunks,
        "segments": tables.segments,
        "snapshots": torch.zeros(1, 4, 5, 8),
    }


RIGHT = {
    "gated_delta_rule_recurrence": _rule,
    "chunked_gated_delta_rule_recurrence": _rule,
    "causal_conv1d_full": _conv,
    "causal_conv1d_update": _update,
    "fused_gdn_gating": _gating,
    "gdn_gated_norm": _norm,
    "gdn_decode_step": _decode,
    "gdn_verify": _verify,
    "gdn_prefill": _prefill,
}


def arguments(op, **changes):
    given = {**RIGHT[op](), **changes}
    return {name: value for name, value in given.items() if value is not ...}


def every_other(*shape):
    """A tensor whose last dimension is not dense."""
    return torch.randn(*shape[:-1], 2 * shape[-1])[..., ::2]


def wide(*shape):
    """A tensor whose tokens lie apart, where they may not."""
    return torch.randn(*shape[:-1], shape[-1] + 1)[..., :-1]


def slots(*each):
    return torch.tensor(each)


def chunks(*rows):
    return torch.tensor(rows, dtype=INT32)


def with_chunk(index, row):
    """The right chunks but for one."""
    table = _prefill()["chunks"]
    table[index] = torch.tensor(row)
    return table


STATES = [
    (
        "states",
        "states must be (slots, v_heads, v_dim, k_dim), got (4, 5, 8)",
        torch.zeros(4, 5, 8),
    ),
    ("states", "states must be contiguous, got strides (180, 45, 9, 1)", wide(3, 4, 5, 8)),
    (
        "states",
        "states must be float32 or bfloat16, got torch.float16",
        torch.zeros(3, 4, 5, 8, dtype=F16),
    ),
    ("states", "head dims go from 1 to 256, states are (3, 4, 5, 257)", torch.zeros(3, 4, 5, 257)),
    ("states", "head dims go from 1 to 256, states are (3, 4, 0, 8)", torch.zeros(3, 4, 0, 8)),
]
SLOTS = [
    ("slots", "slots must be torch.int64, got torch.int32", torch.zeros(2, dtype=INT32)),
    ("slots", "slots must be contiguous, got strides (2)", torch.tensor([0, 1, 2, 3])[::2]),
    ("slots", "slot -2 is outside the pool of 3", slots(0, -2)),
    ("slots", "slot 3 is outside the pool of 3", slots(3, 0)),
    ("slots", "slot 1 is given twice", slots(1, 1)),
]
STARTS = [
    ("starts", "starts must be (3), got (2)", slots(0, 6)),
    ("starts", "starts must be torch.int64, got torch.int32", torch.tensor([0, 2, 6], dtype=INT32)),
    ("starts", "starts must ascend from 0 to the 6 tokens", slots(1, 2, 6)),
    ("starts", "starts must ascend from 0 to the 6 tokens", slots(0, 2, 5)),
    ("starts", "starts must ascend from 0 to the 6 tokens", slots(0, 7, 6)),
]
RULE = [
    ("v", "v must be float32, float16 or bfloat16, got torch.float64", _rule()["v"].double()),
    ("q", "q must be (6, 2, 8), got (6, 1, 8)", torch.zeros(6, 1, 8)),
    ("q", "q must be torch.float32, got torch.float16", _rule()["q"].half()),
    ("q", "q must be dense but for its tokens, got strides (32, 16, 2)", every_other(6, 2, 8)),
    ("k", "k must be (*, *, 8), got (6, 2, 7)", torch.zeros(6, 2, 7)),
    ("k", "4 value heads are no multiple of 3 key heads", torch.zeros(6, 3, 8)),
    ("v", "v must be (6, 4, 5), got (6, 4, 6)", torch.zeros(6, 4, 6)),
    ("v", "v must be (6, 4, 5), got (5, 4, 5)", torch.zeros(5, 4, 5)),
    ("g", "g must be contiguous, got strides (5, 1)", wide(6, 4)),
    ("g", "g must be torch.float32, got torch.float64", torch.zeros(6, 4, dtype=F64)),
    ("beta", "beta must be (6, 4), got (6, 1)", torch.zeros(6, 1)),
    *STATES,
    ("slots", "slots must be (*), got (1, 2)", slots(0, 1)[None]),
    *SLOTS,
    *STARTS,
]
CONV = [
    ("x", "x must be float32, float16 or bfloat16, got torch.int32", torch.zeros(6, 8).int()),
    ("x", "x must be (*, *), got (6, 8, 1)", torch.zeros(6, 8, 1)),
    ("x", "x must be dense but for its tokens, got strides (16, 2)", every_other(6, 8)),
    ("weight", "weight must be (8, *), got (7, 4)", torch.zeros(7, 4)),
    ("weight", "weight has 1 taps; 2 to 8 are served", torch.zeros(8, 1)),
    ("weight", "weight has 9 taps; 2 to 8 are served", torch.zeros(8, 9)),
    ("weight", "weight must be torch.float32, got torch.bfloat16", torch.zeros(8, 4).bfloat16()),
    ("windows", "windows must be (*, 3, 8), got (3, 4, 8)", torch.zeros(3, 4, 8)),
    ("windows", "windows must be contiguous, got strides (27, 9, 1)", wide(3, 3, 8)),
    *SLOTS,
]
STEP = [
    ("conv_weight", "conv_weight must be (52, *), got (51, 4)", torch.zeros(51, 4)),
    ("conv_weight", "conv_weight has 9 taps; 2 to 8 are served", torch.zeros(52, 9)),
    ("a_log", "a_log must be (4), got (3)", torch.zeros(3)),
    ("dt_bias", "dt_bias must be torch.float32, got torch.float16", torch.zeros(4).half()),
    ("norm_weight", "norm_weight must be (5), got (4)", torch.zeros(4)),
    ("windows", "windows must be (3, 3, 52), got (2, 3, 52)", torch.zeros(2, 3, 52)),
    *STATES,
    ("slots", "slots must be (2), got (3)", slots(0, 1, 2)),
    *SLOTS,
    ("arrivals", "arrivals must be torch.int32, got torch.int64", torch.zeros(4).long()),
    ("arrivals", "arrivals must hold at least 4, got 3", torch.zeros(3, dtype=INT32)),
]
WRONG = {
    "gated_delta_rule_recurrence": RULE,
    "chunked_gated_delta_rule_recurrence": RULE,
    "causal_conv1d_full": [*CONV, *STARTS],
    "causal_conv1d_update": [
        *CONV,
        ("x", "4 tokens for 2 slots", torch.zeros(4, 8)),
        ("x", "3 tokens are not 2 sequences of one length", torch.zeros(3, 8)),
    ],
    "fused_gdn_gating": [
        ("b", "b must be float32, float16 or bfloat16, got torch.bool", torch.ones(3, 4).bool()),
        ("b", "b must be (*, *), got (4)", torch.zeros(4)),
        ("b", "b must be dense but for its tokens, got strides (8, 2)", every_other(3, 4)),
        ("a", "a must be (3, 4), got (3, 5)", torch.zeros(3, 5)),
        ("a", "a must be torch.float32, got torch.float16", torch.zeros(3, 4).half()),
        ("a_log", "a_log must be (4), got (1)", torch.zeros(1)),
        ("dt_bias", "dt_bias must be torch.float32, got torch.float16", torch.zeros(4).half()),
    ],
    "gdn_gated_norm": [
        ("x", "x must be float32, float16 or bfloat16, got torch.uint8", torch.zeros(1).byte()),
        ("x", "x must be (*, *, *), got (3, 20)", torch.zeros(3, 20)),
        ("x", "x must be contiguous, got strides (24, 6, 1)", wide(3, 4, 5)),
        ("x", "head dims go from 1 to 256, x is (3, 4, 257)", torch.zeros(3, 4, 257)),
        ("gate", "gate must be (3, 4, 5), got (3, 4, 1)", torch.zeros(3, 4, 1)),
        ("gate", "gate must be dense but for its tokens, got strides (24, 6, 1)", wide(3, 4, 5)),
        ("weight", "weight must be (5), got (4)", torch.zeros(4)),
    ],
    "gdn_decode_step": [
        ("mixed", "mixed must be (*, *), got (2, 1, 52)", torch.zeros(2, 1, 52)),
        (
            "mixed",
            "mixed must be float32, float16 or bfloat16, got torch.float64",
            torch.zeros(2, 52).double(),
        ),
        (
            "mixed",
            "mixed has 53 channels, which are not key heads for states of (3, 4, 5, 8)",
            torch.zeros(2, 53),
        ),
        ("mixed", "4 value heads are no multiple of 3 key heads", torch.zeros(2, 68)),
        (
            "mixed",
            "mixed must be dense but for its tokens, got strides (104, 2)",
            every_other(2, 52),
        ),
        ("z", "z must be (2, 20), got (2, 4, 5)", torch.zeros(2, 4, 5)),
        ("b", "b must be (2, 4), got (1, 4)", torch.zeros(1, 4)),
        ("a", "a must be torch.float32, got torch.float16", torch.zeros(2, 4).half()),
        *STEP,
    ],
    "gdn_verify": [
        ("mixed", "mixed must be (*, *, *), got (2, 52)", torch.zeros(2, 52)),
        (
            "mixed",
            "mixed must have its tokens evenly apart, got strides (156, 52, 1)",
            torch.zeros(2, 3, 52)[:, :2],
        ),
        ("ring_inputs", "1 draft tokens in a ring of 0; at most 16", torch.zeros(3, 0, 52)),
        ("z", "z must be (2, 1, 20), got (2, 2, 20)", torch.zeros(2, 2, 20)),
        ("b", "b must be (2, 1, 4), got (2, 4)", torch.zeros(2, 4)),
        ("a", "a must be (2, 1, 4), got (2, 1, 5)", torch.zeros(2, 1, 5)),
        *STEP,
        ("pending", "pending must be (2), got (3)", slots(0, 0, 0)),
        ("pending", "pending must be torch.int64, got torch.int32", torch.zeros(2).int()),
        ("ring_inputs", "ring_inputs must be (3, *, 52), got (2, 2, 52)", torch.zeros(2, 2, 52)),
        (
            "ring_inputs",
            "1 draft tokens in a ring of 17; at most 16 are served",
            torch.zeros(3, 17, 52),
        ),
        (
            "ring_inputs",
            "ring_inputs must be torch.float32, got torch.float16",
            torch.zeros(3, 2, 52).half(),
        ),
        ("ring_keys", "ring_keys must be (3, 2, 4, 8), got (3, 2, 2, 8)", torch.zeros(3, 2, 2, 8)),
        (
            "ring_deltas",
            "ring_deltas must be torch.float32, got torch.float16",
            torch.zeros(3, 2, 4, 5).half(),
        ),
        ("ring_decays", "ring_decays must be (3, 2, 4), got (3, 1, 4)", torch.zeros(3, 1, 4)),
    ],
    "gdn_prefill": [
        (
            "qkv",
            "qkv must be float32, float16 or bfloat16, got torch.int64",
            torch.zeros(6, 52).long(),
        ),
        ("qkv", "qkv must be (*, *), got (6, 4, 13)", torch.zeros(6, 4, 13)),
        (
            "qkv",
            "qkv has 20 channels, which are not key heads for states of (3, 4, 5, 8)",
            torch.zeros(6, 20),
        ),
        ("qkv", "4 value heads are no multiple of 3 key heads", torch.zeros(6, 68)),
        ("qkv", "too many tokens: 2147483648", torch.zeros(1, 52).expand(2**31, 52)),
        ("g", "g must be (6, 4), got (5, 4)", torch.zeros(5, 4)),
        ("beta", "beta must be torch.float32, got torch.float16", torch.zeros(6, 4).half()),
        *STATES,
        ("slots", "slots must be (*), got (1, 2)", slots(0, 1)[None]),
        *SLOTS,
        ("chunks", "chunks must be (*, 4), got (3, 3)", chunks(*[[0] * 3] * 3)),
        ("chunks", "chunks must be torch.int32, got torch.int64", _prefill()["chunks"].long()),
        ("first_chunks", "first_chunks must be (3), got (2)", chunks(0, 3)),
        ("first_chunks", "first_chunks must go from 0 to the 3 chunks", chunks(0, 1, 2)),
        ("first_chunks", "first_chunks must go from 0 to the 3 chunks", chunks(1, 1, 3)),
        ("first_chunks", "first_chunks names chunk -1 of 3", chunks(0, -1, 3)),
        ("segments", "segments must be (*, 4), got (2, 3)", chunks([0] * 3, [1] * 3)),
        ("segments", "1 segments for 2 sequences", chunks([0, 0, 3, 1])),
        ("snapshots", "snapshots must be (*, 4, 5, 8), got (1, 4, 8, 5)", torch.zeros(1, 4, 8, 5)),
        (
            "snapshots",
            "snapshots must be torch.float32, got torch.bfloat16",
            torch.zeros(1, 4, 5, 8).bfloat16(),
        ),
        ("snapshots", "chunk 1 names snapshot 0 of 0", None),
        (
            "chunks",
            "chunk 0 is (0, 65, 0, -1) where token 0 of sequence 0 comes next",
            with_chunk(0, [0, 65, 0, -1]),
        ),
        (
            "chunks",
            "chunk 0 is (0, 0, 0, -1) where token 0 of sequence 0 comes next",
            with_chunk(0, [0, 0, 0, -1]),
        ),
        (
            "chunks",
            "chunk 1 is (3, 2, 1, 0) where token 2 of sequence 1 comes next",
            with_chunk(1, [3, 2, 1, 0]),
        ),
        (
            "chunks",
            "chunk 1 is (2, 3, 0, 0) where token 2 of sequence 1 comes next",
            with_chunk(1, [2, 3, 0, 0]),
        ),
        ("chunks", "chunk 2 names snapshot 1 of 1", with_chunk(2, [5, 1, 1, 1])),
        ("chunks", "chunk 2 names snapshot -2 of 1", with_chunk(2, [5, 1, 1, -2])),
        (
            "chunks",
            "the chunks hold 5 tokens of 6",
            chunks([0, 2, 0, -1], [2, 2, 1, 0], [4, 1, 1, -1]),
        ),
    ],
}


WRONG_ARGUMENTS = [
    pytest.param(op, {name: value}, message, id=f"{op}-{message}")
    for op, rows in WRONG.items()
    for name, message, value in rows
]


@pytest.fixture(scope="module", autouse=True)
def operators():
    assert extension.is_loaded()


@pytest.mark.parametrize("op", RIGHT)
def test_right_arguments_pass(op):
    getattr(torch.ops.cortex, op)(**arguments(op))


@pytest.mark.parametrize(("op", "changes", "message"), WRONG_ARGUMENTS)
def test_wrong_arguments_are_refused_and_shown(op, changes, message):
    given = arguments(op, **changes)
    before = {n: x.clone() for n, x in given.items() if n in {"states", "windows", "slots"}}
    with pytest.raises(RuntimeError, match=f"^{op}: {re.escape(message)}"):
        getattr(torch.ops.cortex, op)(**given)
    assert all(torch.equal(given[name], x) for name, x in before.items())


@pytest.mark.parametrize("op", ["gated_delta_rule_recurrence", "causal_conv1d_full"])
@pytest.mark.parametrize("each", [(), (0, 1, 2, -1)])
def test_sequences_without_starts_are_equally_long(each, op):
    given = arguments(op, slots=torch.tensor(each, dtype=INT64), starts=None)
    message = f"^{op}: 6 tokens are not {len(each)} sequences of one length"
    with pytest.raises(RuntimeError, match=message):
        getattr(torch.ops.cortex, op)(**given)


def test_drafts_of_no_tokens_may_lie_anywhere():
    """A slice that holds nothing is as good as an empty tensor."""
    given = arguments("gdn_verify")
    names = ("mixed", "z", "b", "a")
    sliced = {name: given[name][:, :0] for name in names}
    empty = {name: torch.empty_like(x) for name, x in sliced.items()}
    for none in (sliced, empty):
        assert torch.ops.cortex.gdn_verify(**{**given, **none}).shape == (2, 0, 20)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("op", RIGHT)
def test_tensors_of_two_devices_are_refused(op):
    """The first tensor on the GPU and another on the host, each of the others once."""
    on_gpu = {n: x.cuda() if isinstance(x, torch.Tensor) else x for n, x in arguments(op).items()}
    getattr(torch.ops.cortex, op)(**on_gpu)
    for name, value in list(on_gpu.items())[1:]:
        if isinstance(value, torch.Tensor):
            message = f"^{op}: {name} is on another device than the first argument"
            with pytest.raises(RuntimeError, match=message):
                getattr(torch.ops.cortex, op)(**{**on_gpu, name: value.cpu()})
