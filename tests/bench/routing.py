"""Routing quality in virtual time: shared prompts over eight engines, ours beside plain policies.

    python -m tests.bench.routing --rates 14 28 56 --seeds 7 8 9

The gateway's own code decides (`Routing` over a polled `Fleet`); engines, prompts and their users
are those of tests/support/routed_fleet.py. Nothing is timed, so the machine does not matter and a
seed gives the same figures every time. Median over the seeds.
"""

import argparse
import statistics

import msgspec

from tests.support.mock_neuron.engine import EngineSpec
from tests.support.routed_fleet import Figures, Workload, measure

DENSE = EngineSpec(
    prefill_tok_s=6000, step_s=0.015, step_per_seq_s=0.0005, num_blocks=700, max_tokens=16
)
ENGINES = {
    "dense": DENSE,
    "hybrid": msgspec.structs.replace(DENSE, snapshot_tokens=1024, max_snapshots=48),
}
POLICIES = ("round_robin", "random", "least_loaded", "cortex")


def row(engine: str, rate: float, policy: str, found: list[Figures], best: float) -> str:
    """Return a policy's medians as a table row; `best` is the p90 that it is compared with."""
    p90 = statistics.median(each.ttft(0.9) for each in found)
    cells = [
        engine,
        f"{rate:g}",
        policy,
        f"{statistics.median(each.cached for each in found):.1%}",
        f"{statistics.median(each.ttft(0.5) for each in found) * 1000:.0f} ms",
        f"{p90 * 1000:.0f} ms",
        f"{statistics.median(each.ttft(0.99) for each in found) * 1000:.0f} ms",
        f"{p90 / best:.1f}",
        f"{statistics.median(each.busiest for each in found):.2f}",
        str(sum(each.failed for each in found)),
    ]
    return f"| {' | '.join(cells)} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rates", type=float, nargs="+", default=[14, 28, 56])
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--seeds", type=int, nargs="+", default=[7, 8, 9])
    options = parser.parse_args()
    print("| engine | req/s | policy | cached | p50 | p90 | p99 | p90 / ours | busiest | failed |")
    print("|---|---|---|---|---|---|---|---|---|---|", flush=True)
    for engine, spec in ENGINES.items():
        for rate in options.rates:
            found = {
                policy: [
                    measure(policy, spec, Workload(rate=rate, seconds=options.seconds, seed=seed))
                    for seed in options.seeds
                ]
                for policy in POLICIES
            }
            ours = statistics.median(each.ttft(0.9) for each in found["cortex"])
            for policy in POLICIES:
                print(row(engine, rate, policy, found[policy], ours), flush=True)


if __name__ == "__main__":
    main()
