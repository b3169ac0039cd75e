"""The gateway's view under any order of what it is told: breakers, leases, drains, reloads."""

from collections import Counter

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from cortex.core.neuron_api import ModelInfo, ModelLoad, NeuronHealth
from cortex.gateway.breaker import MAX_OPEN_S, TRIAL_S
from cortex.gateway.fleet import Fleet, Lease
from cortex.gateway.liveness import MAX_HOLD_S

NODES = "abc"
nodes = st.sampled_from(NODES)


class FleetStates(RuleBasedStateMachine):
    """Everything that the view is told, with a clock that only moves when told."""

    def __init__(self) -> None:
        super().__init__()
        self.now_s = 0.0
        self.fleet = Fleet(((name, f"http://{name}") for name in NODES), lambda: self.now_s)
        self.leases: list[Lease] = []
        self.lost: Counter[int] = Counter()
        self.drained: set[str] = set()
        self.trials: dict[str, tuple[float, Lease]] = {}

    @rule(seconds=st.sampled_from([0.1, 1.0, 3.0, 12.0, 70.0]))
    def wait(self, seconds: float) -> None:
        self.now_s += seconds

    @rule(name=nodes, status=st.sampled_from(["loaded", "unloaded", "loading"]))
    def read(self, name: str, status: str) -> None:
        health = NeuronHealth(uptime_secs=1, models=[ModelLoad(id="m", in_flight=2)])
        info = ModelInfo(id="m", harness="torch", status=status)
        self.fleet.record_reading(name, [info], health, stamp=self.fleet.begin_reading())

    @rule(name=nodes)
    def hear(self, name: str) -> None:
        self.fleet.record_alive(name)

    @rule(name=nodes, miss=st.sampled_from(["late", "silent", "refused"]))
    def miss(self, name: str, miss: str) -> None:
        self.fleet.record_failure(name, miss, miss)  # type: ignore[arg-type]

    @rule(name=nodes)
    def send(self, name: str) -> None:
        node = self.fleet.snapshot().node(name)
        if node is None or not node.usable:
            return
        lease = self.fleet.lease(name, "m")
        if node.breaker.state != "closed":
            last = self.trials.get(name)
            assert last is None or self.now_s - last[0] >= TRIAL_S, "a second trial"
            self.trials[name] = (self.now_s, lease)
        number = len(self.leases)
        lease.on_node_lost(lambda: self.lost.update([number]))
        self.leases.append(lease)

    @precondition(lambda self: self.leases)
    @rule(which=st.integers(0, 1 << 16), end=st.sampled_from(["ok", "failed", "at_once", "left"]))
    def finish(self, which: int, end: str) -> None:
        lease = self.leases.pop(which % len(self.leases))
        match end:
            case "ok":
                lease.succeeded()
            case "failed" | "at_once":
                lease.failed(at_once=end == "at_once")
        lease.release()
        trial = self.trials.get(lease.node)
        if trial is not None and (end == "ok" or trial[1] is lease):
            del self.trials[lease.node]

    @rule(name=nodes, drained=st.booleans())
    def drain(self, name: str, drained: bool) -> None:
        if self.fleet.snapshot().node(name) is None:
            return
        self.fleet.record_drained(name, drained)
        (self.drained.add if drained else self.drained.discard)(name)

    @rule(names=st.sets(nodes, min_size=1))
    def configure(self, names: set[str]) -> None:
        before = {node.name for node in self.fleet.snapshot().nodes}
        self.fleet.set_nodes((name, f"http://{name}") for name in names)
        self.drained &= names & before
        for name in set(NODES) - names:
            self.trials.pop(name, None)

    @rule(name=nodes, size=st.integers(0, 5))
    def claim(self, name: str, size: int) -> None:
        self.fleet.record_claim(name, "m", size)

    @rule(name=nodes)
    def forget_model(self, name: str) -> None:
        self.fleet.record_model_gone(name, "m")

    @invariant()
    def counts_are_those_of_the_open_leases(self) -> None:
        held = Counter((lease.node, lease.model_id) for lease in self.leases)
        assert dict(self.fleet.snapshot().leases) == dict(held)
        for node in self.fleet.snapshot().nodes:
            assert all(count >= 0 for count in node.foreign.values())

    @invariant()
    def what_is_usable_is_there_whole_and_wanted(self) -> None:
        for node in self.fleet.snapshot().nodes:
            assert node.draining == (node.name in self.drained)
            if node.usable:
                assert node.seen
                assert node.liveness.up
                assert node.name not in self.drained
            assert node.retry_s <= max(MAX_OPEN_S, TRIAL_S)
            assert set(node.loads) <= set(node.models) | {"m"}

    @invariant()
    def nobody_is_told_twice_that_a_node_was_lost(self) -> None:
        assert all(count == 1 for count in self.lost.values())

    def teardown(self) -> None:
        """Everything heals once nodes answer and requests succeed."""
        for lease in self.leases:
            lease.release()
        self.leases.clear()
        for node in self.fleet.snapshot().nodes:
            self.fleet.record_drained(node.name, False)
            self.fleet.record_alive(node.name)
        self.now_s += MAX_HOLD_S + MAX_OPEN_S + TRIAL_S
        for node in self.fleet.snapshot().nodes:
            assert node.usable, node
        assert dict(self.fleet.snapshot().leases) == {}


TestFleetStates = FleetStates.TestCase
TestFleetStates.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
