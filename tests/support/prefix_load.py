"""The shared-prefix workload: conversations over long system prompts, some asked over most."""

import asyncio
import random
import statistics
from dataclasses import dataclass, field

import aiohttp
import msgspec

from tests.support.mock_neuron.engine import TOKEN_BYTES

MODEL = "m"
FIRST_TOKEN = b'"content":" '


@dataclass(frozen=True)
class Workload:
    """Who asks what.

    Attributes:
        num_prompts: system prompts, of which the first are asked over most.
        rate: requests a second, all together.
    """

    num_prompts: int = 24
    prompt_tokens: int = 3000
    question_tokens: int = 80
    turns: int = 4
    answer_tokens: int = 16
    think_s: float = 1.0
    rate: float = 14.0
    seconds: float = 40.0
    skew: float = 0.8
    seed: int = 7


@dataclass
class Figures:
    """What a policy achieved."""

    ttft_s: list[float] = field(default_factory=list)
    failed: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    per_node: list[int] = field(default_factory=list)

    @property
    def cached(self) -> float:
        """Share of the prompt tokens that were found in a cache."""
        return self.cached_tokens / max(1, self.prompt_tokens)

    def ttft(self, share: float) -> float:
        """Percentile of the time to the first token."""
        ordered = sorted(self.ttft_s)
        return ordered[min(len(ordered) - 1, int(share * len(ordered)))]

    @property
    def imbalance(self) -> float:
        """Requests at the busiest node over the mean."""
        return max(self.per_node) / statistics.mean(self.per_node)


async def drive(url: str, nodes: list[str], work: Workload) -> Figures:
    """Run the workload against a router and collect the nodes' own figures."""
    figures = Figures()
    rng = random.Random(work.seed)
    prompts = [_text(rng, work.prompt_tokens) for _ in range(work.num_prompts)]
    weights = [1 / (at + 1) ** work.skew for at in range(work.num_prompts)]
    loop = asyncio.get_running_loop()
    connector = aiohttp.TCPConnector(limit=0)
    timeout = aiohttp.ClientTimeout(total=None)
    async with aiohttp.ClientSession(connector=connector, timeout=timeout) as session:
        async with asyncio.TaskGroup() as tasks:
            end_s = loop.time() + work.seconds
            while loop.time() < end_s:
                own = random.Random(rng.random())
                (prompt,) = rng.choices(prompts, weights)
                tasks.create_task(_converse(session, url, work, figures, prompt, own))
                await asyncio.sleep(rng.expovariate(work.rate / work.turns))
        for node in nodes:
            async with session.get(f"{node}/mock/stats") as reply:
                stats = await reply.json()
            figures.prompt_tokens += stats["prompt_tokens"]
            figures.cached_tokens += stats["cached_tokens"]
            figures.per_node.append(stats["requests"])
    return figures


def _text(rng: random.Random, tokens: int) -> str:
    """Return a text of so many tokens that no other has."""
    return "".join(rng.choices("abcdefghijklmnopqrstuvwxyz ", k=tokens * TOKEN_BYTES))


async def _converse(
    session: aiohttp.ClientSession,
    url: str,
    work: Workload,
    figures: Figures,
    prompt: str,
    rng: random.Random,
) -> None:
    messages = [{"role": "system", "content": prompt}]
    for _ in range(work.turns):
        messages.append({"role": "user", "content": _text(rng, work.question_tokens)})
        body = {
            "model": MODEL,
            "messages": messages,
            "stream": True,
            "max_tokens": work.answer_tokens,
        }
        answer = await _ask(session, url, body, figures)
        if answer is None:
            return
        messages.append({"role": "assistant", "content": answer})
        await asyncio.sleep(rng.expovariate(1 / work.think_s))


async def _ask(
    session: aiohttp.ClientSession, url: str, body: dict[str, object], figures: Figures
) -> str | None:
    """Ask and note the time to the first token; return the answer."""
    loop = asyncio.get_running_loop()
    begun_s = loop.time()
    first_s = None
    received = b""
    try:
        async with session.post(f"{url}/v1/chat/completions", json=body) as reply:
            while chunk := await reply.content.readany():
                received += chunk
                if first_s is None and FIRST_TOKEN in received:
                    first_s = loop.time()
    except aiohttp.ClientError:
        first_s = None
    if first_s is None or b"[DONE]" not in received:
        figures.failed += 1
        return None
    figures.ttft_s.append(first_s - begun_s)
    events = [line[6:] for line in received.split(b"\n") if line.startswith(b"data: {")]
    deltas = [msgspec.json.decode(event)["choices"] for event in events]
    return "".join(each[0]["delta"].get("content") or "" for each in deltas if each)
