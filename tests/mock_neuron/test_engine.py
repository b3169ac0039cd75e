"""The modelled engine keeps the time, the bounds and the cache that its spec says."""

import asyncio
from contextlib import aclosing

import pytest

from tests.support import virtual_time
from tests.support.mock_neuron.engine import (
    Engine,
    EngineDied,
    EngineSpec,
    QueueFull,
    Timebase,
    num_tokens,
)

SPEC = EngineSpec(
    prefill_tok_s=1000,
    step_s=0.01,
    step_per_seq_s=0.001,
    max_batched_tokens=100,
    max_num_seqs=2,
    num_blocks=100,
    block_tokens=10,
)
PROMPT = b"abcd" * 200


class Ask:
    """One request's figures: counts, tokens and when the first and the last came."""

    def __init__(self) -> None:
        self.prompt = self.cached = 0
        self.tokens: list[str] = []
        self.first_s = self.last_s = 0.0

    async def run(self, engine: Engine, text: bytes, max_tokens: int) -> "Ask":
        async with aclosing(engine.generate(text, max_tokens)) as items:
            async for item in items:
                if isinstance(item, tuple):
                    self.prompt, self.cached = item
                    continue
                self.last_s = virtual_time.now_s()
                self.first_s = self.first_s or self.last_s
                self.tokens.append(item)
        return self


def run(spec: EngineSpec, work: object) -> object:
    async def main() -> object:
        engine = Engine(spec, Timebase())
        async with asyncio.TaskGroup() as tasks:
            stepping = tasks.create_task(engine.run())
            result = await work(engine)  # type: ignore[operator]
            stepping.cancel()
        return result

    return virtual_time.run(main())


def test_a_prompt_takes_its_tokens_over_the_rate_and_a_token_takes_a_step() -> None:
    async def work(engine: Engine) -> Ask:
        return await Ask().run(engine, PROMPT, 11)

    ask = run(SPEC, work)
    assert isinstance(ask, Ask)
    assert (ask.prompt, ask.cached, len(ask.tokens)) == (200, 0, 11)
    # 200 tokens at 1000/s, in two steps of 10 ms; then ten steps of one sequence.
    assert ask.first_s == pytest.approx(0.22, abs=1e-3)
    assert ask.last_s - ask.first_s == pytest.approx(10 * 0.011, abs=1e-3)


def test_a_prompt_seen_before_costs_only_what_is_new() -> None:
    async def work(engine: Engine) -> list[Ask]:
        first = await Ask().run(engine, PROMPT, 5)
        return [first, await Ask().run(engine, PROMPT + b"wxyz" * 20, 5)]

    first, second = run(SPEC, work)  # type: ignore[misc]
    assert (first.cached, second.cached) == (0, 200)


def test_the_answer_is_part_of_the_cached_prefix_of_the_next_turn() -> None:
    async def work(engine: Engine) -> int:
        first = await Ask().run(engine, PROMPT, 50)
        answer = "".join(first.tokens).encode()
        return (await Ask().run(engine, PROMPT + answer + b"more" * 30, 1)).cached

    assert run(SPEC, work) == 250


def test_a_hybrid_continues_only_where_it_has_a_snapshot() -> None:
    hybrid = EngineSpec(
        prefill_tok_s=1000, num_blocks=100, block_tokens=10, snapshot_tokens=100, max_tokens=64
    )

    async def work(engine: Engine) -> list[int]:
        await Ask().run(engine, PROMPT + b"tail" * 30, 1)
        shared = await Ask().run(engine, PROMPT[: 4 * 190] + b"other" * 40, 1)
        return [shared.cached, (await Ask().run(engine, PROMPT + b"tail" * 40, 1)).cached]

    assert run(hybrid, work) == [100, 230]


def test_who_does_not_fit_waits_and_who_finds_the_queue_full_is_refused() -> None:
    narrow = EngineSpec(max_num_seqs=1, max_queue_depth=1, num_blocks=100, block_tokens=10)

    async def work(engine: Engine) -> list[float]:
        async with asyncio.TaskGroup() as tasks:
            first = tasks.create_task(Ask().run(engine, PROMPT, 10))
            await asyncio.sleep(0.001)
            second = tasks.create_task(Ask().run(engine, PROMPT, 10))
            await asyncio.sleep(0.001)
            assert (engine.in_flight, engine.queue_depth) == (1, 1)
            with pytest.raises(QueueFull):
                await Ask().run(engine, PROMPT, 10)
        assert engine.rejected == 1
        return [first.result().last_s, second.result().first_s]

    first_end, second_begin = run(narrow, work)  # type: ignore[misc]
    assert second_begin > first_end


def test_blocks_that_are_in_use_are_never_given_up_and_idle_ones_are() -> None:
    small = EngineSpec(num_blocks=30, block_tokens=10, max_num_seqs=8)

    async def work(engine: Engine) -> tuple[int, int, int]:
        await Ask().run(engine, PROMPT, 10)
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(Ask().run(engine, PROMPT, 20))
            await asyncio.sleep(0.001)
            # Twenty blocks are held and two reserved: another two hundred tokens must wait.
            tasks.create_task(Ask().run(engine, b"1234" * 200, 20))
            await asyncio.sleep(0.001)
            together = engine.in_flight
        return together, engine.cache.reserved, engine.cache.free_blocks

    assert run(small, work) == (1, 0, 30)


def test_an_engine_that_dies_tells_everyone_and_refuses_the_next() -> None:
    async def work(engine: Engine) -> None:
        async with asyncio.TaskGroup() as tasks:
            waiting = tasks.create_task(_died(engine))
            await asyncio.sleep(0.05)
            engine.die()
            assert await waiting
        assert await _died(engine)

    run(SPEC, work)


async def _died(engine: Engine) -> bool:
    try:
        await Ask().run(engine, PROMPT, 10)
    except EngineDied:
        return True
    return False


def test_a_caller_that_leaves_frees_its_place_and_its_blocks() -> None:
    async def work(engine: Engine) -> tuple[int, int]:
        async with asyncio.TaskGroup() as tasks:
            leaving = tasks.create_task(Ask().run(engine, PROMPT, 500))
            await asyncio.sleep(1)
            leaving.cancel()
        return engine.in_flight, engine.cache.reserved

    assert run(SPEC, work) == (0, 0)


def test_a_scaled_clock_makes_a_second_of_the_model_shorter() -> None:
    async def main() -> float:
        await Timebase(0.01).sleep(60)
        return virtual_time.now_s()

    assert virtual_time.run(main()) == pytest.approx(0.6)


def test_tokens_are_four_bytes_and_a_rest_counts_as_one() -> None:
    assert [num_tokens(b"x" * size) for size in (0, 1, 4, 5)] == [0, 1, 1, 2]
