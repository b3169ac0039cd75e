"""The Gated DeltaNet operators against their floors and their peers, on a GPU or on a CPU.

Run by hand: `python -m tests.bench.kernels` (a GPU if there is one), `--device cpu`, `--quick`.

K1: the recurrence of one token. K2: the whole decode step; K1b and
K2b: with states in bfloat16. K3: prefill. K4: the convolution of a
prefill. Layer: what a layer does between its projections in a prefill. Peers are timed in the same
run on the same inputs, in interleaved rounds: fla (flash-linear-attention) where it is importable,
the plain operators of this project (`chain`: the five of them, one launch each), transformers'
reference functions, plain torch. The floor is the time to move the bytes at the rate of a torch
copy measured in this run, or to multiply at --tflops. Ratios are peer / ours: more is better. Every
case is checked on the inputs that are timed, against float64.

On a GPU a case is one CUDA graph of calls on so many copies of its inputs that they do not fit the
L2 cache; its time is the median replay over the number of calls.
"""

import argparse
import ctypes
import importlib
import json
import os
import platform
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cortex.neuron.kernels import extension, gdn_reference, gdn_torch
from cortex.neuron.kernels.build import describe_build
from cortex.neuron.kernels.chunks import choose_segment_chunks, plan_prefill

K_HEADS, V_HEADS, DIM, WIDTH = 16, 48, 128, 4
CONV_DIM = (2 * K_HEADS + V_HEADS) * DIM
COLD_BYTES = 1 << 30
EPS = 1e-6

Call = Callable[[], Any]


@dataclass
class Case:
    """One row: several ways to do the same, and what it must cost at least.

    Attributes:
        calls: by name, "ours" among them: one callable per copy of the inputs.
        moved_bytes, flops: what cannot be avoided.
        error: norm-wise relative error of ours against float64.
    """

    name: str
    shape: str
    calls: dict[str, list[Call]]
    moved_bytes: float
    error: float
    bound: float
    flops: float = 0.0
    micros: dict[str, float] = field(default_factory=dict)


def main() -> None:
    """Print one table; with --json write it to a file as well."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    has_gpu = torch.cuda.is_available()
    parser.add_argument("--device", default="cuda" if has_gpu else "cpu", choices=["cpu", "cuda"])
    parser.add_argument("--threads", type=int, default=1, help="of a CPU")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--tflops", type=float, default=790.0, help="what the GPU multiplies at")
    parser.add_argument("--quick", action="store_true", help="fewer shapes")
    parser.add_argument("--only", default="", help="ids, such as K1,K3")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    device = torch.device(options.device)
    torch.set_num_threads(options.threads)
    if not extension.serves(device):
        raise SystemExit(f"the native operators are not built for {device}")
    bandwidth = copy_rate(device)
    describe(device, bandwidth)
    rows = []
    for make in cases(device, quick=options.quick, only=options.only):
        case = make()
        measure(case, device, options.rounds)
        rows.append(show(case, bandwidth, options.tflops if device.type == "cuda" else 0))
        del case
        if device.type == "cuda":
            torch.cuda.empty_cache()
    if options.json is not None:
        options.json.write_text(json.dumps(rows, indent=1) + "\n")


def describe(device: torch.device, bandwidth: float) -> None:
    build = describe_build()
    name = (
        torch.cuda.get_device_name(device)
        if device.type == "cuda"
        else f"{platform.machine()} {torch.ops.cortex.cpu_capability()}"
    )
    cuda = f"nvcc {build.cuda_version} {' '.join(build.cuda_archs)}" if build else "no CUDA"
    print(
        f"{name}, torch {torch.__version__}, {cuda}, "
        f"fla {version_of('fla')}, transformers {version_of('transformers')}, "
        f"copy {bandwidth / 1e9:.0f} GB/s, load {os.getloadavg()[0]:.2f}"
    )


def version_of(module: str) -> str:
    found = optional(module)
    return str(getattr(found, "__version__", "?")) if found else "not there"


def optional(module: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError:
        return None


def copy_rate(device: torch.device) -> float:
    """Return bytes read and written per second by a torch copy."""
    size = (1 << 30) if device.type == "cuda" else (1 << 26)
    source = torch.ones(size // 4, device=device)
    target = torch.empty_like(source)
    seconds = [run_once(lambda: target.copy_(source), device) for _ in range(9)]
    return 2 * size / statistics.median(seconds)


def run_once(call: Call, device: torch.device) -> float:
    if device.type == "cpu":
        begin = time.perf_counter()
        call()
        return time.perf_counter() - begin
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    call()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / 1e3


def measure(case: Case, device: torch.device, rounds: int) -> None:
    """Fill in the case's medians, all ways interleaved."""
    runs = {}
    for name, calls in case.calls.items():
        try:
            runs[name] = as_one(calls, device)
        except Exception as exc:  # a peer may do what it likes
            if name == "ours":
                raise
            print(f"  ({name}: {type(exc).__name__}: {str(exc)[:200]})")
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(rounds):
        for name, run in runs.items():
            seconds[name].append(run_once(run, device) / len(case.calls[name]))
    case.micros = {name: statistics.median(each) * 1e6 for name, each in seconds.items()}


def as_one(calls: list[Call], device: torch.device) -> Call:
    """Return a callable that makes all calls: on a GPU the replay of their graph."""

    def run() -> None:
        with torch.inference_mode():
            for call in calls:
                call()

    run()
    if device.type == "cpu":
        return run
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.inference_mode(), torch.cuda.graph(graph):
            for call in calls:
                call()
    except RuntimeError as exc:
        print(f"  (no graph: {str(exc).splitlines()[0]})")
        return run
    graph.replay()
    return graph.replay


def show(case: Case, bandwidth: float, tflops: float) -> dict[str, Any]:
    floor = case.moved_bytes / bandwidth * 1e6
    if tflops:
        floor = max(floor, case.flops / (tflops * 1e12) * 1e6)
    ours = case.micros["ours"]
    peers = ", ".join(
        f"{name} {micros:.1f} ({micros / ours:.2f}x)"
        for name, micros in case.micros.items()
        if name != "ours"
    )
    verdict = "" if case.error <= case.bound else f"  WRONG: bound {case.bound:g}"
    print(
        f"{case.name:6} {case.shape:30} ours {ours:9.1f} us, floor {floor:8.1f} "
        f"({floor / ours:4.0%}), error {case.error:.1e}{verdict}; {peers}",
        flush=True,
    )
    return {
        "id": case.name,
        "shape": case.shape,
        "ours_us": ours,
        "floor_us": floor,
        "error": case.error,
        "peers_us": {name: us for name, us in case.micros.items() if name != "ours"},
    }


def cases(device: torch.device, *, quick: bool, only: str) -> Iterator[Callable[[], Case]]:
    wanted = only.split(",") if only else ["K1", "K1b", "K2", "K2b", "K3", "K4", "Layer"]
    is_gpu = device.type == "cuda"
    batches = ([1, 8, 32, 128, 256] if is_gpu else [1, 8, 32])[: 2 if quick else None]
    for name, dtype in (("K1", torch.float32), ("K1b", torch.bfloat16)):
        if name in wanted:
            for batch in batches:
                yield lambda batch=batch, dtype=dtype, name=name: recurrence(
                    name, device, batch, dtype
                )
    for name, dtype in (("K2", torch.float32), ("K2b", torch.bfloat16)):
        if name in wanted:
            for batch in batches:
                yield lambda batch=batch, dtype=dtype, name=name: decode_step(
                    name, device, batch, dtype
                )
    prompts = (
        [[2048], [8192], [32768], [8192] * 4, [1024] * 8, [5000, 37, 2048, 1, 900]]
        if is_gpu
        else [[64], [1024], [100, 37, 1, 300]]
    )[: 2 if quick else None]
    if "K3" in wanted:
        for lengths in prompts:
            yield lambda lengths=lengths: prefill(device, lengths)
    if "K4" in wanted:
        yield lambda: convolution(device, [8192] if is_gpu else [1024])
    if "Layer" in wanted:
        for lengths in prompts[:2]:
            yield lambda lengths=lengths: layer(device, lengths)


def input_dtype(device: torch.device) -> torch.dtype:
    return torch.bfloat16 if device.type == "cuda" else torch.float32


def draw(device: torch.device, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
    return torch.randn(shape, device=device).to(dtype or input_dtype(device))


def copies(device: torch.device, bytes_each: float) -> int:
    return max(1, int(COLD_BYTES // bytes_each)) if device.type == "cuda" else 1


def relative(got: Tensor, want: Tensor) -> float:
    return float((got.double() - want.double()).norm() / want.double().norm())


def bound_of(device: torch.device) -> float:
    return 5e-3 if device.type == "cuda" else 1e-5


def gates(device: torch.device, tokens: int) -> tuple[Tensor, Tensor]:
    """Return g and beta of a trained model's size."""
    a_log = torch.empty(V_HEADS, device=device).uniform_(0, 2.7)
    g = -a_log.exp() * torch.nn.functional.softplus(torch.randn(tokens, V_HEADS, device=device) - 4)
    return g, torch.rand(tokens, V_HEADS, device=device)


def unit_keys(device: torch.device, tokens: int) -> tuple[Tensor, Tensor]:
    q, k = (
        gdn_reference.l2_normalise(torch.randn(tokens, K_HEADS, DIM, device=device))
        for _ in range(2)
    )
    return (q * DIM**-0.5).to(input_dtype(device)), k.to(input_dtype(device))


def pools(device: torch.device, batch: int, dtype: torch.dtype) -> list[tuple[Tensor, Tensor]]:
    """Return (pool, slots) pairs, cold copies of a pool of at least 512 slots, slots at random."""
    num_slots = max(512, batch) if device.type == "cuda" else 2 * batch
    slot_bytes = V_HEADS * DIM * DIM * dtype.itemsize
    pool = torch.randn(num_slots, V_HEADS, DIM, DIM, device=device).mul_(0.1).to(dtype)
    order = torch.randperm(num_slots, device=device)
    count = min(copies(device, batch * slot_bytes), num_slots // batch)
    return [(pool, order[i * batch : (i + 1) * batch].contiguous()) for i in range(count)]


def recurrence(name: str, device: torch.device, batch: int, dtype: torch.dtype) -> Case:
    """One token of each sequence through the recurrence alone."""
    q, k = unit_keys(device, batch)
    v, (g, beta) = draw(device, batch, V_HEADS, DIM), gates(device, batch)
    sets = pools(device, batch, dtype)
    pool, slots = sets[0]
    before = pool[slots].double()
    out = torch.ops.cortex.gated_delta_rule_recurrence(q, k, v, g, beta, pool, slots, None)
    want, _ = gdn_reference.gated_delta_rule_recurrence(
        *(x[:, None].double() for x in (q, k, v, g, beta)), before
    )
    calls: dict[str, list[Call]] = {
        "ours": [
            lambda p=p, s=s: torch.ops.cortex.gated_delta_rule_recurrence(
                q, k, v, g, beta, p, s, None
            )
            for p, s in sets
        ],
    }
    fla = optional("fla.ops.gated_delta_rule") if device.type == "cuda" else None
    if fla is not None and dtype == torch.float32:
        states = torch.randn(len(sets), batch, V_HEADS, DIM, DIM, device=device)
        q4, k4 = (x.repeat_interleave(V_HEADS // K_HEADS, 1)[:, None] for x in (q, k))
        calls["fla"] = [
            lambda i=i: fla.fused_recurrent_gated_delta_rule(
                q4,
                k4,
                v[:, None],
                g[:, None],
                beta[:, None],
                scale=1.0,
                initial_state=states[i],
                output_final_state=True,
            )
            for i in range(len(sets))
        ]
    if device.type == "cpu":
        calls["torch"] = [
            lambda: gdn_torch.gated_delta_rule_recurrence(q, k, v, g, beta, pool, slots)
        ]
    # A state is read and written; what else moves is a hundredth of it.
    moved = 2 * batch * V_HEADS * DIM * DIM * dtype.itemsize
    error = relative(out, want[:, 0])
    shape = f"B={batch} {str(dtype).removeprefix('torch.')} state"
    return Case(name, shape, calls, moved, error, bound_of(device))


@dataclass
class StepInputs:
    mixed: Tensor
    z: Tensor
    b: Tensor
    a: Tensor
    conv_weight: Tensor
    a_log: Tensor
    dt_bias: Tensor
    norm_weight: Tensor

    @classmethod
    def draw(cls, device: torch.device, batch: int) -> "StepInputs":
        return cls(
            draw(device, batch, CONV_DIM),
            draw(device, batch, V_HEADS * DIM),
            draw(device, batch, V_HEADS),
            draw(device, batch, V_HEADS) - 4,
            draw(device, CONV_DIM, WIDTH) * 0.5,
            torch.empty(V_HEADS, device=device).uniform_(0, 2.7),
            draw(device, V_HEADS, dtype=torch.float32),
            torch.ones(DIM, device=device),
        )

    def fused(self, ops: Any, windows: Tensor, states: Tensor, slots: Tensor, n: Tensor) -> Tensor:
        return ops.gdn_decode_step(
            self.mixed,
            self.z,
            self.b,
            self.a,
            self.conv_weight,
            self.a_log,
            self.dt_bias,
            self.norm_weight,
            EPS,
            windows,
            states,
            slots,
            n,
        )

    def chain(self, windows: Tensor, states: Tensor, slots: Tensor) -> Tensor:
        """The step by the plain operators, one launch or more for each part."""
        ops = torch.ops.cortex
        convolved = ops.causal_conv1d_update(self.mixed, self.conv_weight, windows, slots)
        qk = K_HEADS * DIM
        q, k = (
            gdn_reference.l2_normalise(x.unflatten(-1, (K_HEADS, DIM)).float())
            for x in (convolved[:, :qk], convolved[:, qk : 2 * qk])
        )
        dtype = convolved.dtype
        beta, g = ops.fused_gdn_gating(self.b, self.a, self.a_log, self.dt_bias)
        core = ops.gated_delta_rule_recurrence(
            (q * DIM**-0.5).to(dtype),
            k.to(dtype),
            convolved[:, 2 * qk :].unflatten(-1, (V_HEADS, DIM)),
            g,
            beta,
            states,
            slots,
            None,
        )
        gate = self.z.unflatten(-1, (V_HEADS, DIM))
        return ops.gdn_gated_norm(core, gate, self.norm_weight, EPS).flatten(1)


def decode_step(name: str, device: torch.device, batch: int, dtype: torch.dtype) -> Case:
    """Everything between the projections of a layer, one token of each sequence."""
    inputs = StepInputs.draw(device, batch)
    sets = pools(device, batch, dtype)
    pool, slots = sets[0]
    windows = draw(device, pool.shape[0], WIDTH - 1, CONV_DIM)
    arrivals = torch.zeros(batch * K_HEADS, dtype=torch.int32, device=device)
    want = inputs.fused(gdn_torch, windows.clone(), pool.clone(), slots, arrivals)
    out = inputs.fused(torch.ops.cortex, windows.clone(), pool, slots, arrivals)
    calls: dict[str, list[Call]] = {
        "ours": [
            lambda p=p, s=s: inputs.fused(torch.ops.cortex, windows, p, s, arrivals)
            for p, s in sets
        ],
        "chain": [lambda p=p, s=s: inputs.chain(windows, p, s) for p, s in sets],
    }
    if device.type == "cpu":
        calls["torch"] = [lambda: inputs.fused(gdn_torch, windows, pool, slots, arrivals)]
    moved = 2 * batch * V_HEADS * DIM * DIM * dtype.itemsize
    shape = f"B={batch} {str(dtype).removeprefix('torch.')} state"
    # Plain torch in float32 is the truth here: the parts are checked against float64 elsewhere.
    return Case(name, shape, calls, moved, relative(out, want), bound_of(device))


def prefill(device: torch.device, lengths: list[int]) -> Case:
    """The rule over whole prompts, from convolved channels to value heads."""
    tokens = sum(lengths)
    element = input_dtype(device).itemsize
    moved = tokens * (CONV_DIM + V_HEADS * DIM) * element + 8 * tokens * V_HEADS
    count = copies(device, moved)
    qkvs = [draw(device, tokens, CONV_DIM) for _ in range(count)]
    g, beta = gates(device, tokens)
    states = torch.zeros(len(lengths), V_HEADS, DIM, DIM, device=device)
    slots = torch.arange(len(lengths), device=device)
    tables = plan_prefill(lengths, max_segment_chunks=segments(device, lengths), device=device)

    def ours(qkv: Tensor) -> Tensor:
        return torch.ops.cortex.gdn_prefill(
            qkv, g, beta, states, slots, tables.chunks, tables.first_chunks, tables.segments, None
        )

    out = ours(qkvs[0])
    error = prefill_error(qkvs[0], g, beta, out, lengths)
    calls: dict[str, list[Call]] = {"ours": [lambda x=x: ours(x) for x in qkvs]}
    qk = K_HEADS * DIM
    fla = optional("fla.ops.gated_delta_rule") if device.type == "cuda" else None
    starts = torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()], device=device)
    if fla is not None:

        def apart(qkv: Tensor) -> list[Tensor]:
            sizes = (qk, qk, V_HEADS * DIM)
            return [x.unflatten(-1, (-1, DIM))[None].contiguous() for x in qkv.split(sizes, -1)]

        def peer(q: Tensor, k: Tensor, v: Tensor) -> Any:
            return fla.chunk_gated_delta_rule(
                q,
                k,
                v,
                g[None],
                beta[None],
                initial_state=states,
                output_final_state=True,
                use_qk_l2norm_in_kernel=True,
                cu_seqlens=starts,
            )

        calls["fla"] = [lambda x=x: peer(*x) for x in map(apart, qkvs)]
    if device.type == "cuda" and torch.cuda.get_device_capability(device)[0] == 9:
        calls["mma"] = [lambda x=x: without_sm90(lambda: ours(x)) for x in qkvs]
    if tokens <= 8192:
        calls["chunked"] = [lambda: chunked(qkvs[0], g, beta, states, slots, starts)]
    if device.type == "cpu":
        calls["torch"] = [
            lambda: gdn_torch.gdn_prefill(
                qkvs[0],
                g,
                beta,
                states,
                slots,
                tables.chunks,
                tables.first_chunks,
                tables.segments,
            )
        ]
        add_transformers(calls, qkvs[0], g, beta, lengths)
    # Six products of 64 x 64 x 128 or 64 x 128 x 128 per chunk and value head.
    chunks = tables.chunks.shape[0]
    flops = 2 * chunks * V_HEADS * (3 * 64 * 64 * 128 + 2 * 64 * 64 * 128 + 3 * 64 * 128 * 128)
    shape = "+".join(map(str, lengths)) if len(set(lengths)) > 1 else f"{len(lengths)}x{lengths[0]}"
    return Case("K3", shape, calls, moved, error, bound_of(device), flops=flops)


def without_sm90(call: Call) -> Any:
    """Call with the kernel that any card has, where a Hopper would take its own."""
    library = ctypes.CDLL(str(extension._LIBRARY))
    library.gdn_cuda_allow_sm90(0)
    try:
        return call()
    finally:
        library.gdn_cuda_allow_sm90(1)


def segments(device: torch.device, lengths: list[int]) -> int | None:
    if device.type == "cpu":
        return None
    count = torch.cuda.get_device_properties(device).multi_processor_count
    return choose_segment_chunks(lengths, num_v_heads=V_HEADS, num_multiprocessors=count)


def chunked(
    qkv: Tensor, g: Tensor, beta: Tensor, states: Tensor, slots: Tensor, starts: Tensor
) -> Tensor:
    """The plain chunked operator, after a normalisation in torch."""
    qk = K_HEADS * DIM
    q, k = (
        gdn_reference.l2_normalise(x.unflatten(-1, (K_HEADS, DIM)).float())
        for x in (qkv[:, :qk], qkv[:, qk : 2 * qk])
    )
    v = qkv[:, 2 * qk :].unflatten(-1, (V_HEADS, DIM))
    return torch.ops.cortex.chunked_gated_delta_rule_recurrence(
        (q * DIM**-0.5).to(v.dtype), k.to(v.dtype), v, g, beta, states, slots, starts
    )


def add_transformers(
    calls: dict[str, list[Call]], qkv: Tensor, g: Tensor, beta: Tensor, lengths: list[int]
) -> None:
    module = optional("transformers.models.qwen3_5.modeling_qwen3_5")
    rule = getattr(module, "torch_chunk_gated_delta_rule", None)
    if rule is None or len(lengths) > 1:
        return
    qk = K_HEADS * DIM
    q, k = (
        x.unflatten(-1, (K_HEADS, DIM)).repeat_interleave(V_HEADS // K_HEADS, 1)[None]
        for x in (qkv[:, :qk], qkv[:, qk : 2 * qk])
    )
    v = qkv[None, :, 2 * qk :].unflatten(-1, (V_HEADS, DIM))
    calls["transformers"] = [
        lambda: rule(
            q,
            k,
            v,
            g=g[None],
            beta=beta[None],
            output_final_state=True,
            use_qk_l2norm_in_kernel=True,
        )
    ]


def prefill_error(qkv: Tensor, g: Tensor, beta: Tensor, out: Tensor, lengths: list[int]) -> float:
    """Compare the value heads of the first key head with float64."""
    group = V_HEADS // K_HEADS
    qk = K_HEADS * DIM
    worst, start = 0.0, 0
    for length in lengths:
        rows = slice(start, start + length)
        q, k = (
            gdn_reference.l2_normalise(qkv[rows, at : at + DIM].double())[None, :, None]
            for at in (0, qk)
        )
        v = qkv[rows, 2 * qk : 2 * qk + group * DIM].double().unflatten(-1, (group, DIM))[None]
        want, _ = gdn_reference.chunked_gated_delta_rule_recurrence(
            q * DIM**-0.5,
            k,
            v,
            g[None, rows, :group].double(),
            beta[None, rows, :group].double(),
            torch.zeros(1, group, DIM, DIM, dtype=torch.float64, device=qkv.device),
        )
        worst = max(worst, relative(out[rows, :group], want[0]))
        start += length
    return worst


def convolution(device: torch.device, lengths: list[int]) -> Case:
    """The convolution of a prefill, with the windows carried in and out."""
    tokens = sum(lengths)
    moved = 2 * tokens * CONV_DIM * input_dtype(device).itemsize
    xs = [draw(device, tokens, CONV_DIM) for _ in range(copies(device, moved))]
    weight = draw(device, CONV_DIM, WIDTH) * 0.5
    windows = draw(device, len(lengths), WIDTH - 1, CONV_DIM)
    slots = torch.arange(len(lengths), device=device)
    starts = torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()], device=device)
    want = gdn_torch.causal_conv1d_full(xs[0], weight, windows.clone(), slots, starts)
    out = torch.ops.cortex.causal_conv1d_full(xs[0], weight, windows.clone(), slots, starts)
    target = torch.empty_like(xs[0])
    calls: dict[str, list[Call]] = {
        "ours": [
            lambda x=x: torch.ops.cortex.causal_conv1d_full(x, weight, windows, slots, starts)
            for x in xs
        ],
        "copy": [lambda x=x: target.copy_(x) for x in xs],
        "torch": [
            lambda: torch.nn.functional.silu(
                torch.nn.functional.conv1d(
                    xs[0].t()[None], weight[:, None], padding=WIDTH - 1, groups=CONV_DIM
                )
            )
        ],
    }
    return Case("K4", f"T={tokens}", calls, moved, relative(out, want), bound_of(device))


def layer(device: torch.device, lengths: list[int]) -> Case:
    """Convolution, gates, rule and norm of a prefill: what a layer adds to its projections."""
    tokens = sum(lengths)
    element = input_dtype(device).itemsize
    mixed, z = draw(device, tokens, CONV_DIM), draw(device, tokens, V_HEADS, DIM)
    b, a = draw(device, tokens, V_HEADS), draw(device, tokens, V_HEADS) - 4
    weight = draw(device, CONV_DIM, WIDTH) * 0.5
    a_log = torch.empty(V_HEADS, device=device).uniform_(0, 2.7)
    dt_bias, norm_weight = torch.zeros(V_HEADS, device=device), torch.ones(DIM, device=device)
    windows = draw(device, len(lengths), WIDTH - 1, CONV_DIM)
    states = torch.zeros(len(lengths), V_HEADS, DIM, DIM, device=device)
    slots = torch.arange(len(lengths), device=device)
    starts = torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()], device=device)
    tables = plan_prefill(lengths, max_segment_chunks=segments(device, lengths), device=device)

    def run(ops: Any) -> Tensor:
        x = ops.causal_conv1d_full(mixed, weight, windows.zero_(), slots, starts)
        beta, g = ops.fused_gdn_gating(b, a, a_log, dt_bias)
        core = ops.gdn_prefill(
            x,
            g,
            beta,
            states.zero_(),
            slots,
            tables.chunks,
            tables.first_chunks,
            tables.segments,
            None,
        )
        return ops.gdn_gated_norm(core, z, norm_weight, EPS)

    error = relative(run(torch.ops.cortex), run(gdn_torch))
    calls: dict[str, list[Call]] = {"ours": [lambda: run(torch.ops.cortex)]}
    if device.type == "cpu":
        calls["torch"] = [lambda: run(gdn_torch)]
    moved = element * tokens * (2 * CONV_DIM + 3 * V_HEADS * DIM)
    shape = f"{len(lengths)}x{lengths[0]}"
    return Case("Layer", shape, calls, moved, error, bound_of(device))


if __name__ == "__main__":
    main()
