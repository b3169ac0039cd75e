"""Routing quality: shared prefixes over eight mock nodes, cortex beside other policies.

    python -m tests.bench.fleet --rounds 2 --smg /path/to/venv/bin/smg

Users ask questions over a few long system prompts, several turns each. A node can keep some of
the prompts cached but not all, so what counts is who is sent where. The nodes are mocks with the
time behaviour of an engine; sockets, proxies and clients are real. Every policy starts with cold
nodes, and policies take turns within a round.
"""

import argparse
import asyncio
import signal
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import aiohttp
import msgspec

from tests.support.mock_neuron.__main__ import ModelSpec, NodeSpec
from tests.support.mock_neuron.engine import EngineSpec
from tests.support.plain_proxy import Policy, plain_proxy
from tests.support.prefix_load import MODEL, Figures, Workload, drive
from tests.support.processes import answers, free_port

NUM_NODES = 8
READY_S = 60

DENSE = EngineSpec(
    prefill_tok_s=6000, step_s=0.015, step_per_seq_s=0.0005, num_blocks=700, max_tokens=16
)
HYBRID = msgspec.structs.replace(DENSE, snapshot_tokens=1024, max_snapshots=48)


@contextmanager
def running(command: list[str], **options: object) -> Iterator[subprocess.Popen[str]]:
    """Run a process for the length of the context."""
    process = subprocess.Popen(command, text=True, **options)  # type: ignore[call-overload]
    try:
        yield process
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


@contextmanager
def mock_nodes(engine: EngineSpec) -> Iterator[list[str]]:
    """Run the nodes; yields their URLs."""
    spec = NodeSpec(models=[ModelSpec(id=MODEL, status="loaded", engine=engine)])
    command = [sys.executable, "-m", "tests.support.mock_neuron", "--count", str(NUM_NODES)]
    command += ["--spec", msgspec.json.encode(spec).decode()]
    with running(command, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        yield [process.stdout.readline().strip() for _ in range(NUM_NODES)]


def router_command(
    policy: str, port: int, nodes: list[str], smg: str | None, tmp: Path
) -> list[str]:
    """Return the command that routes with a policy."""
    if policy == "cortex":
        config = tmp / "cortex.toml"
        config.write_text(
            f'[gateway]\nlisten = "127.0.0.1:{port}"\n'
            f'metrics_listen = "127.0.0.1:{free_port()}"\n'
            + "".join(
                f'[[neurons]]\nname = "n{at}"\nendpoint = "{node}"\n'
                for at, node in enumerate(nodes)
            )
        )
        return [sys.executable, "-m", "cortex", "serve", "-c", str(config)]
    if policy == "smg":
        assert smg is not None
        return [
            *(smg, "launch", "--host", "127.0.0.1", "--port", str(port)),
            *("--policy", "cache_aware", "--worker-urls", *nodes),
            *("--prometheus-port", str(free_port()), "--log-level", "error"),
        ]
    plain = [sys.executable, "-m", "tests.bench.fleet", "--serve", policy]
    return [*plain, "--port", str(port), "--nodes", *nodes]


async def serve_plain(policy: Policy, port: int, nodes: list[str]) -> None:
    """Serve a plain policy until SIGTERM."""
    ended = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, ended.set)
    async with plain_proxy(nodes, policy, port):
        await ended.wait()


async def ready(url: str) -> None:
    """Wait until a router takes requests for the model."""
    body = {"model": MODEL, "messages": [{"role": "user", "content": "a"}], "max_tokens": 1}
    async with asyncio.timeout(READY_S), aiohttp.ClientSession() as session:
        while True:
            if answers(url):
                async with session.post(f"{url}/v1/chat/completions", json=body) as reply:
                    if reply.status == 200:
                        return
            await asyncio.sleep(0.2)


def measure(policy: str, engine: EngineSpec, work: Workload, smg: str | None) -> Figures:
    """Run one policy over cold nodes."""
    port = free_port()
    with tempfile.TemporaryDirectory() as tmp, mock_nodes(engine) as nodes:
        command = router_command(policy, port, nodes, smg, Path(tmp))
        with running(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL):
            url = f"http://127.0.0.1:{port}"

            async def all_of_it() -> Figures:
                await ready(url)
                return await drive(url, nodes, work)

            return asyncio.run(all_of_it())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--seconds", type=float, default=40)
    parser.add_argument("--rate", type=float, default=14)
    parser.add_argument("--smg", help="its command, from a virtual environment of its own")
    parser.add_argument("--engine", choices=["dense", "hybrid", "both"], default="both")
    parser.add_argument("--policies", nargs="+")
    parser.add_argument("--serve", help=argparse.SUPPRESS)
    parser.add_argument("--port", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--nodes", nargs="+", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.serve:
        asyncio.run(serve_plain(options.serve, options.port, options.nodes))
        return
    policies = options.policies or [
        *("round_robin", "least_loaded", "cortex"),
        *(["smg"] if options.smg else []),
    ]
    engines = {"dense": DENSE, "hybrid": HYBRID}
    print("| engine | policy | requests | failed | cached | TTFT p50 | p90 | p99 | busiest |")
    print("|---|---|---|---|---|---|---|---|---|", flush=True)
    for name, engine in engines.items():
        if options.engine not in (name, "both"):
            continue
        found: dict[str, list[Figures]] = {policy: [] for policy in policies}
        for number in range(options.rounds):
            work = Workload(rate=options.rate, seconds=options.seconds, seed=7 + number)
            for policy in policies:
                found[policy].append(measure(policy, engine, work, options.smg))
        for policy, rounds in found.items():
            print(row(name, policy, rounds), flush=True)


def row(engine: str, policy: str, rounds: list[Figures]) -> str:
    """Return a policy's medians over the rounds as a table row."""

    def median(values: list[float]) -> float:
        return statistics.median(values)

    cells = [
        engine,
        policy,
        str(sum(len(each.ttft_s) for each in rounds)),
        str(sum(each.failed for each in rounds)),
        f"{median([each.cached for each in rounds]):.1%}",
        *(
            f"{median([each.ttft(share) for each in rounds]) * 1000:.0f} ms"
            for share in (0.5, 0.9, 0.99)
        ),
        f"{median([each.imbalance for each in rounds]):.2f}",
    ]
    return f"| {' | '.join(cells)} |"


if __name__ == "__main__":
    main()
