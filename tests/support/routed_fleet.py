"""A fleet of model engines in one process and in virtual time, and policies that spread requests.

The engines are those of the mock neuron: steps, batches, a bounded prefix cache. The policy called
`cortex` is the gateway's own code (`Routing` over a `Fleet` that is polled), the others are what a
plain load balancer does. With a seed everything is the same every time.
"""

import asyncio
import random
from collections.abc import Callable
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Protocol

import msgspec

from cortex.core.catalogue import Catalogue
from cortex.core.config import GatewayConfig
from cortex.core.neuron_api import ModelInfo, ModelLoad, NeuronHealth
from cortex.gateway.fleet import Fleet, Lease
from cortex.gateway.live import Live
from cortex.gateway.metrics import RequestTiming
from cortex.gateway.rates import RateBook
from cortex.gateway.router import Serve
from cortex.gateway.routing import Leg, Routing, Trip
from tests.support.mock_neuron.engine import (
    TOKEN_BYTES,
    Engine,
    EngineSpec,
    QueueFull,
    Timebase,
)
from tests.support.virtual_time import VirtualTimeLoop, now_s

MODEL = "m"
POLL_S = 2.0

Message = dict[str, str]


@dataclass(frozen=True)
class Workload:
    """Conversations over shared system prompts.

    Attributes:
        num_prompts: system prompts, of which the first are asked over most (`skew`).
        rate: requests a second, all conversations together.
    """

    num_prompts: int = 24
    prompt_tokens: int = 3000
    question_tokens: int = 80
    answer_tokens: int = 16
    turns: int = 4
    think_s: float = 1.0
    rate: float = 14.0
    seconds: float = 40.0
    skew: float = 0.8
    seed: int = 7


@dataclass
class Figures:
    """What one policy achieved."""

    ttft_s: list[float] = field(default_factory=list)
    failed: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    per_node: dict[str, int] = field(default_factory=dict)

    @property
    def cached(self) -> float:
        """Share of the prompt tokens that were found in a cache."""
        return self.cached_tokens / max(1, self.prompt_tokens)

    @property
    def busiest(self) -> float:
        """Requests at the busiest node over the mean."""
        return max(self.per_node.values()) * len(self.per_node) / sum(self.per_node.values())

    def ttft(self, share: float) -> float:
        """A percentile of the time to the first token."""
        ordered = sorted(self.ttft_s)
        return ordered[min(len(ordered) - 1, int(share * len(ordered)))]


class Policy(Protocol):
    """Decides where requests go, and is told how they went."""

    def choose(self, messages: list[Message]) -> str:
        """Return the name of a node."""

    def first_token(self, node: str) -> None:
        """The last request chosen for a node, by this caller, has its first token."""

    def ended(self, node: str, prompt_tokens: int, cached_tokens: int) -> None:
        """It has ended."""


class Plain:
    """What a load balancer without knowledge of prompts does."""

    def __init__(self, kind: str, nodes: list[str], seed: int) -> None:
        self._kind = kind
        self._nodes = nodes
        self._rng = random.Random(seed)
        self._turn = 0
        self._in_hand = dict.fromkeys(nodes, 0)

    def ticket(self) -> "Plain":
        """Return what follows one request; counts are shared."""
        return self

    def choose(self, messages: list[Message]) -> str:
        """Return the name of a node."""
        if self._kind == "round_robin":
            node = self._nodes[self._turn % len(self._nodes)]
            self._turn += 1
        elif self._kind == "random":
            node = self._rng.choice(self._nodes)
        else:
            least = min(self._in_hand.values())
            node = self._rng.choice([name for name in self._nodes if self._in_hand[name] == least])
        self._in_hand[node] += 1
        return node

    def first_token(self, node: str) -> None:
        """Nothing is learned from it."""

    def ended(self, node: str, prompt_tokens: int, cached_tokens: int) -> None:
        """Count the request as done."""
        self._in_hand[node] -= 1


class Cortex:
    """The gateway's own choice."""

    def __init__(self, engines: dict[str, Engine]) -> None:
        self._engines = engines
        self.fleet = Fleet([(name, f"http://{name}") for name in engines])
        live = Live(GatewayConfig(), Catalogue())
        self.routing = Routing(live, self.fleet, RateBook(), clock=now_s)
        self.poll()

    def poll(self) -> None:
        """Tell the fleet what a neuron would tell of its engine."""
        for name, engine in self._engines.items():
            spec = engine.spec
            match = "block" if spec.snapshot_tokens is None else "snapshot"
            info = ModelInfo(
                id=MODEL,
                harness="torch",
                status="loaded",
                resident_s=now_s(),
                prefix_match=match,  # type: ignore[arg-type]
            )
            load = ModelLoad(
                id=MODEL,
                in_flight=engine.in_flight,
                queue_depth=engine.queue_depth,
                max_in_flight=spec.max_num_seqs,
                tok_s_prefill=spec.prefill_tok_s,
            )
            health = NeuronHealth(uptime_secs=1, models=[load])
            stamp = self.fleet.begin_reading()
            self.fleet.record_reading(name, [info], health, stamp=stamp)

    async def keep_polling(self) -> None:
        """Poll for ever, and look after the prefixes as the gateway does."""
        while True:
            await asyncio.sleep(POLL_S)
            self.poll()
            await self.routing.refresh()

    def ticket(self) -> "Ticket":
        """Return what follows one request."""
        return Ticket(self.fleet, self.routing)


class Ticket:
    """One request of the gateway's."""

    def __init__(self, fleet: Fleet, routing: Routing) -> None:
        self._fleet = fleet
        self._routing = routing
        self._leg: Leg | None = None
        self._lease: Lease | None = None

    def choose(self, messages: list[Message]) -> str:
        """Return the name of a node."""
        body = msgspec.json.encode({"model": MODEL, "messages": messages, "stream": True})
        trip = Trip(MODEL, body)
        route = self._routing.choose(trip)
        assert isinstance(route, Serve)
        self._leg = self._routing.begin(trip, route)
        self._lease = self._fleet.lease(route.node, MODEL)
        return route.node

    def first_token(self, node: str) -> None:
        """Pass it on."""
        assert self._leg is not None
        self._leg.first_token()

    def ended(self, node: str, prompt_tokens: int, cached_tokens: int) -> None:
        """Learn from it."""
        assert self._leg is not None
        assert self._lease is not None
        self._lease.release()
        timing = RequestTiming(
            model=MODEL, prompt_tokens=prompt_tokens, cached_tokens=cached_tokens
        )
        self._leg.end(timing if prompt_tokens else None)


class _Run:
    """One policy over cold engines."""

    def __init__(self, kind: str, spec: EngineSpec, work: Workload, num_nodes: int) -> None:
        names = [f"n{at}" for at in range(num_nodes)]
        self.engines = {name: Engine(spec, Timebase()) for name in names}
        self.cortex = Cortex(self.engines) if kind == "cortex" else None
        plain = Plain(kind, names, work.seed)
        self.ticket: Callable[[], Policy] = (
            self.cortex.ticket if self.cortex is not None else plain.ticket
        )
        self.work = work
        self.figures = Figures(per_node=dict.fromkeys(names, 0))

    async def drive(self) -> Figures:
        """Let conversations come for as long as the workload says, and wait for their ends."""
        work, rng = self.work, random.Random(self.work.seed)
        prompts = [_text(rng, work.prompt_tokens) for _ in range(work.num_prompts)]
        weights = [1 / (at + 1) ** work.skew for at in range(work.num_prompts)]
        async with asyncio.TaskGroup() as background:
            tasks = [background.create_task(engine.run()) for engine in self.engines.values()]
            if self.cortex is not None:
                tasks.append(background.create_task(self.cortex.keep_polling()))
            async with asyncio.TaskGroup() as conversations:
                while now_s() < work.seconds:
                    own = random.Random(rng.random())
                    (prompt,) = rng.choices(prompts, weights)
                    conversations.create_task(self._converse(prompt, own))
                    await asyncio.sleep(rng.expovariate(work.rate / work.turns))
            for task in tasks:
                task.cancel()
        return self.figures

    async def _converse(self, prompt: str, rng: random.Random) -> None:
        messages = [{"role": "system", "content": prompt}]
        for _ in range(self.work.turns):
            question = _text(rng, self.work.question_tokens)
            messages.append({"role": "user", "content": question})
            answer = await self._ask(messages)
            if answer is None:
                return
            messages.append({"role": "assistant", "content": answer})
            await asyncio.sleep(rng.expovariate(1 / self.work.think_s))

    async def _ask(self, messages: list[Message]) -> str | None:
        ticket = self.ticket()
        node = ticket.choose(messages)
        self.figures.per_node[node] += 1
        begun_s = now_s()
        counts = (0, 0)
        answer: list[str] = []
        text = "".join(message["content"] for message in messages).encode()
        engine = self.engines[node]
        try:
            async with aclosing(engine.generate(text, self.work.answer_tokens)) as tokens:
                async for token in tokens:
                    if isinstance(token, tuple):
                        counts = token
                        continue
                    if not answer:
                        self.figures.ttft_s.append(now_s() - begun_s)
                        ticket.first_token(node)
                    answer.append(token)
        except QueueFull:
            self.figures.failed += 1
            ticket.ended(node, 0, 0)
            return None
        ticket.ended(node, *counts)
        self.figures.prompt_tokens += counts[0]
        self.figures.cached_tokens += counts[1]
        return "".join(answer)


def measure(kind: str, spec: EngineSpec, work: Workload, num_nodes: int = 8) -> Figures:
    """Return what a policy achieves over cold engines, in virtual time."""

    async def all_of_it() -> Figures:
        return await _Run(kind, spec, work, num_nodes).drive()

    # There are no sockets to wait for.
    with asyncio.Runner(loop_factory=lambda: VirtualTimeLoop(0.0)) as runner:
        return runner.run(all_of_it())


def _text(rng: random.Random, tokens: int) -> str:
    return "".join(rng.choices("abcdefghijklmnopqrstuvwxyz ", k=tokens * TOKEN_BYTES))
