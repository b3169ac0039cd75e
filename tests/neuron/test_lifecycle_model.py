"""What may happen to the models of a host, in any order: hypothesis looks for an order that breaks.

The lifecycle is the real one; engines are fakes without processes and time is virtual, so that
minutes of waiting take microseconds. The model of this test is what callers may rely on.
"""

import asyncio
from collections.abc import Coroutine
from typing import Any

from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from cortex.core.config import TorchHarness
from cortex.core.errors import CortexError
from cortex.core.neuron_api import LoadRequest
from cortex.neuron.admission import Ticket
from cortex.neuron.lifecycle import Lifecycle
from cortex.neuron.metrics import Metrics
from cortex.neuron.peaks import Peaks
from cortex.neuron.resident import Model
from tests.support.fake_harness import GIB, FakeHarness, FakeHost, FakeModel
from tests.support.virtual_time import NO_SETTLE_S, VirtualTimeLoop

DRAIN_S = 20.0
# Whatever was begun has ended by then: loads, drains, restarts and their pauses.
LONG_S = 2_000.0
NAMES = ["a", "b", "c", "d"]
names = st.sampled_from(NAMES)
moments = st.sampled_from([0.05, 0.2, 1.0, 6.0, 25.0, 70.0])
# What follows an action: mostly enough time for it to end.
pauses = st.sampled_from([0.0, 0.3, 3.0, 3.0, 3.0, 3.0])
policies = st.fixed_dictionaries(
    {
        # Pinned models that nobody unloads would soon fill the host for good.
        "pinned": st.sampled_from([False, False, False, True]),
        "ttl_s": st.sampled_from([None, None, 0.0, 10.0]),
        "min_resident_s": st.sampled_from([0.0, 0.0, 0.0, 30.0]),
        "priority": st.sampled_from([None, None, 50, 200]),
    }
)


class Residents(RuleBasedStateMachine):
    """Two GPUs of 24 GiB, four models that do not all fit, and callers who come and go."""

    def __init__(self) -> None:
        super().__init__()
        self.runner = asyncio.Runner(loop_factory=lambda: VirtualTimeLoop(NO_SETTLE_S))
        self.loop = self.runner.get_loop()
        self.host = FakeHost(24, 24)
        models = [
            FakeModel(id=name, gib=gib) for name, gib in zip(NAMES, (6, 14, 20, 20), strict=True)
        ]
        self.models = {each.id: each for each in models}
        self.asked_to_leave: set[Model] = set()
        self.tickets: list[tuple[str, Ticket]] = []
        self.waiters: list[asyncio.Task[Any]] = []
        self.requests: list[asyncio.Task[Any]] = []
        self.failures: list[str] = []
        self.is_closing = False

    @initialize(idle_ttl_s=st.sampled_from([None, 30.0]))
    def open(self, idle_ttl_s: float | None) -> None:
        self.lifecycle = Lifecycle(
            config=TorchHarness(drain_s=DRAIN_S, stall_s=40.0, idle_ttl_s=idle_ttl_s),
            harnesses=[FakeHarness(self.host, list(self.models.values()), self.on_stop)],
            monitor=self.host,  # type: ignore[arg-type]
            peaks=Peaks(None),  # type: ignore[arg-type]
            metrics=Metrics(),
            clock=self.loop.time,
        )

        async def read() -> Any:
            return self.host.reading

        # A thread would have a time of its own.
        self.lifecycle._ledger.read = read  # type: ignore[method-assign]
        self.stopping = asyncio.Event()
        self.serving = self.loop.create_task(self.serve())
        self.settle()

    async def serve(self) -> None:
        async with self.lifecycle.run():
            await self.stopping.wait()

    # What happens.

    @rule(name=names, policy=policies, then_s=pauses)
    def load(self, name: str, policy: dict[str, Any], then_s: float) -> None:
        self.begin_load(LoadRequest(model_id=name, **policy))
        self.pause(then_s)

    @precondition(lambda self: 0 < len(self.loaded()) < len(NAMES))
    @rule(
        data=st.data(),
        others=st.lists(names, max_size=1),
        priority=st.sampled_from([None, None, 200]),
        are_busy=st.booleans(),
        deed=st.sampled_from(["nothing", "crash", "load", "unload"]),
        then_s=st.sampled_from([0.2, 3.0, 25.0, 25.0]),
    )
    def load_in_place_of_what_is_loaded(
        self,
        data: st.DataObject,
        others: list[str],
        priority: int | None,
        are_busy: bool,
        deed: str,
        then_s: float,
    ) -> None:
        if are_busy:
            self.begin_request(data.draw(st.sampled_from(self.loaded())))
        name = data.draw(st.sampled_from(sorted(set(NAMES) - set(self.loaded()))))
        victims = [each for each in self.loaded() if each != name] + others
        self.begin_load(LoadRequest(model_id=name, evict=victims, priority=priority))
        self.pause(0.2)
        if self.making_room():
            self.meddle(data.draw(st.sampled_from(self.making_room())), deed)
        self.pause(then_s)

    def begin_load(self, request: LoadRequest) -> None:
        async def load() -> None:
            job = await self.lifecycle.load(request)
            await job.wait()
            assert job.load_s is not None

        self.wait_for(load(), f"load {request.model_id}")

    @rule(name=names)
    def unload(self, name: str) -> None:
        async def unload() -> None:
            # Once it is asked for, an unload goes on without who asked.
            asked = self.lifecycle.model(name)
            if asked is not None:
                self.asked_to_leave.add(asked)
            await self.lifecycle.unload(name)
            assert self.lifecycle.model(name) is not asked

        self.wait_for(unload(), f"unload {name}")

    @precondition(lambda self: self.loaded())
    @rule(data=st.data())
    def recycle(self, data: st.DataObject) -> None:
        name = data.draw(st.sampled_from(self.loaded()))

        async def recycle() -> None:
            await (await self.lifecycle.recycle(name)).wait()

        self.wait_for(recycle(), f"recycle {name}")

    @precondition(lambda self: self.loaded())
    @rule(data=st.data())
    def ask(self, data: st.DataObject) -> None:
        self.begin_request(data.draw(st.sampled_from(self.loaded())))

    def begin_request(self, name: str) -> None:
        async def ask() -> None:
            serving = self.lifecycle.serving(name)
            with self.lifecycle.using(name):
                ticket = await serving.admission.acquire()
                self.tickets.append((name, ticket))

        task = self.loop.create_task(self.quietly(ask(), f"ask {name}"))
        self.requests.append(task)
        self.settle()

    @precondition(lambda self: self.tickets)
    @rule(data=st.data())
    def answer(self, data: st.DataObject) -> None:
        at = data.draw(st.integers(0, len(self.tickets) - 1))
        self.tickets.pop(at)[1].release()
        self.settle()

    @precondition(lambda self: self.waiters)
    @rule(data=st.data())
    def leave(self, data: st.DataObject) -> None:
        self.waiters[data.draw(st.integers(0, len(self.waiters) - 1))].cancel()
        self.settle()

    @precondition(lambda self: self.requests)
    @rule(data=st.data())
    def give_up_a_request(self, data: st.DataObject) -> None:
        self.requests[data.draw(st.integers(0, len(self.requests) - 1))].cancel()
        self.settle()

    def meddle(self, name: str, deed: str) -> None:
        """Do something to a model that is making room."""
        match deed:
            case "crash":
                self.crash(name)
            case "load":
                self.begin_load(LoadRequest(model_id=name))
            case "unload":
                self.unload(name)

    @rule(name=names)
    def crash(self, name: str) -> None:
        for engine in self.models[name].engines[-1:]:
            engine.crash()
        self.settle()

    @rule(
        name=names,
        failures=st.sampled_from([0, 0, 1, 5]),
        is_silent=st.booleans(),
        device=st.integers(0, 1),
        gib=st.sampled_from([0, 0, 0, 3, 12]),
    )
    def trouble(self, name: str, failures: int, is_silent: bool, device: int, gib: int) -> None:
        """The next loads fail, an engine goes silent, another program takes memory; or no more."""
        self.models[name].failures = failures
        self.models[name].is_silent = is_silent
        self.host.foreign[device] = gib * GIB

    @rule(seconds=moments)
    def wait(self, seconds: float) -> None:
        self.run(asyncio.sleep(seconds))

    # What always holds.

    def on_stop(self, name: str) -> None:
        """Check that an engine is ended in order only for a reason."""
        model = self.lifecycle.model(name)
        assert model is not None
        is_free = model in self.asked_to_leave or self.is_closing
        if model.in_flight and not is_free:
            self.failures.append(f"{name} was ended at work")
        if model.state.is_recycling or is_free:
            return
        now_s = self.loop.time()
        idle_s = now_s - max(model.loaded_s or 0.0, model.last_used_s or 0.0)
        ttl_s = model.policy.ttl_s
        is_expired = ttl_s is not None and idle_s >= ttl_s
        if model.policy.pinned:
            self.failures.append(f"{name} is pinned and was ended")
        if not is_expired and model.evictable_in_s(now_s):
            self.failures.append(f"{name} was evicted within its minimum residency")

    @invariant()
    def nothing_went_wrong(self) -> None:
        assert self.failures == []
        assert not getattr(self, "serving", None) or not self.serving.done()

    @invariant()
    def the_ledger_stays_within_the_devices(self) -> None:
        if not hasattr(self, "lifecycle"):
            return
        for index, total in self.host.total.items():
            claims = [each for each in self.lifecycle._ledger.claims() if each.device == index]
            assert all(each.num_bytes > 0 for each in claims)
            assert sum(each.num_bytes for each in claims if each.is_taken) <= total
            leaving = [self.lifecycle.model(each.model_id) for each in claims]
            is_leaving = [model is not None and not model.calm.is_set() for model in leaving]
            staying = [each for each, is_out in zip(claims, is_leaving, strict=True) if not is_out]
            assert sum(each.num_bytes for each in staying) <= total

    @invariant()
    def every_state_has_what_belongs_to_it(self) -> None:
        if not hasattr(self, "lifecycle"):
            return
        for model in self.lifecycle.models():
            live = [each for each in self.models[model.id].engines if not each.ended.is_set()]
            assert len(live) <= 1
            assert model.in_flight >= 0
            claim = self.lifecycle.claim(model.id)
            match model.state.status:
                case "loaded":
                    assert claim is not None
                    assert model.task is not None
                case "draining" if live and not model.state.is_reversible:
                    # Only who was told to leave ends with requests in hand.
                    assert not model.in_flight or model in self.asked_to_leave
                case "failed":
                    assert (claim, live, model.task) == (None, [], None)
                case "unloaded":
                    raise AssertionError(f"{model.id} is unloaded and was not forgotten")
        gone = set(NAMES) - {each.id for each in self.lifecycle.models()}
        assert all(self.lifecycle.claim(name) is None for name in gone)

    def teardown(self) -> None:
        if not hasattr(self, "lifecycle"):
            self.runner.close()
            return
        try:
            self.end()
        finally:
            self.runner.close()

    def end(self) -> None:
        """Let everybody go: nobody waits for ever, and nothing is left."""
        for _, ticket in self.tickets:
            ticket.release()
        for name in NAMES:
            self.models[name].is_silent = False
        self.run(asyncio.sleep(LONG_S))
        stuck = [each.get_name() for each in (*self.waiters, *self.requests) if not each.done()]
        assert stuck == []
        for _, ticket in self.tickets:
            ticket.release()
        assert {each.state.status for each in self.lifecycle.models()} <= {"loaded", "failed"}
        assert all(each.in_flight == 0 for each in self.lifecycle.models())
        self.is_closing = True
        self.stopping.set()

        async def ended() -> None:
            async with asyncio.timeout(LONG_S):
                await asyncio.wait([self.serving])

        self.run(ended())
        self.serving.result()
        assert self.lifecycle._ledger.claims() == []
        assert self.host.used == {0: 0, 1: 0}
        assert self.failures == []

    # How.

    def wait_for(self, work: Coroutine[Any, Any, None], name: str) -> None:
        self.waiters = [each for each in self.waiters if not each.done()]
        self.waiters.append(self.loop.create_task(self.quietly(work, name), name=name))
        self.settle()

    async def quietly(self, work: Coroutine[Any, Any, None], name: str) -> None:
        """Run what may well be refused; anything else than a refusal is a fault."""
        try:
            await work
        except CortexError:
            return
        except asyncio.CancelledError:
            raise
        except BaseException as exc:
            self.failures.append(f"{name}: {exc!r}")
            raise

    def loaded(self) -> list[str]:
        found = self.lifecycle.models() if hasattr(self, "lifecycle") else []
        return sorted(each.id for each in found if each.state.status == "loaded")

    def making_room(self) -> list[str]:
        found = self.lifecycle.models() if hasattr(self, "lifecycle") else []
        return sorted(each.id for each in found if each.state.is_reversible)

    def pause(self, seconds: float) -> None:
        if seconds:
            self.run(asyncio.sleep(seconds))

    def run(self, work: Coroutine[Any, Any, Any]) -> None:
        self.runner.run(work)
        self.requests = [each for each in self.requests if not each.done()]

    def settle(self) -> None:
        """Let what can happen at this moment happen."""

        async def turns() -> None:
            for _ in range(30):
                await asyncio.sleep(0)

        self.run(turns())


def test_no_order_of_events_breaks_what_callers_rely_on():
    run_state_machine_as_test(
        Residents,
        settings=settings(
            max_examples=100,
            stateful_step_count=40,
            deadline=None,
            derandomize=True,
            database=None,
            # Making a failure smaller can take minutes, which is for whoever looks into it.
            phases=[Phase.generate],
            suppress_health_check=list(HealthCheck),
        ),
    )
