"""Duties come around again, whatever becomes of one round."""

import asyncio

import pytest

from cortex.gateway.steward import Steward


async def test_a_duty_that_fails_is_logged_and_done_again(caplog: pytest.LogCaptureFixture):
    rounds = 0
    done = asyncio.Event()

    async def duty() -> None:
        nonlocal rounds
        rounds += 1
        if rounds == 1:
            raise RuntimeError("oh")
        done.set()

    async with asyncio.TaskGroup() as tasks:
        running = tasks.create_task(Steward({"x": duty}, lambda: 0.0).run())
        async with asyncio.timeout(5):
            await done.wait()
        running.cancel()
    assert "the gateway's duty `x` failed unexpectedly" in caplog.text
