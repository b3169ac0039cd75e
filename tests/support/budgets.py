"""One limited key, requests with it, and how far it is used up."""

import asyncio
from typing import Any

import aiohttp

from cortex.core.entitlements import ApiKey, Entitlements
from tests.support.gateway import RunningGateway

# The first second of a minute and of a day.
MIDNIGHT_S = 1_728_000_000.0
# What the mock's answer costs: 7 tokens of prompt, 3 of answer.
COST = 10


class Wall:
    """A wall clock in the test's hands."""

    def __init__(self) -> None:
        self.now_s = MIDNIGHT_S

    def __call__(self) -> float:
        return self.now_s


def one_key(**limits: Any) -> Entitlements:
    return Entitlements(
        require_auth=True, keys=[ApiKey(key="k", account_id="alice", key_id="laptop", **limits)]
    )


def chat_body(model: str = "m", max_tokens: int = 20, **fields: Any) -> dict[str, Any]:
    message = {"role": "user", "content": "Hi"}
    return {"model": model, "max_tokens": max_tokens, "messages": [message], **fields}


async def chat(gateway: RunningGateway, **fields: Any) -> aiohttp.ClientResponse:
    return await gateway.post("/v1/chat/completions", chat_body(**fields), x_api_key="k")


async def used(gateway: RunningGateway) -> dict[str, int]:
    report = await (await gateway.get("/v1/usage", x_api_key="k")).json()
    return {each["name"]: each["used"] for each in report["limits"]}


async def until_used(gateway: RunningGateway, name: str, amount: int) -> None:
    async with asyncio.timeout(10):
        while (await used(gateway))[name] != amount:
            await asyncio.sleep(0.01)
