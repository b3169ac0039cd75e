from cortex.core.config import DefaultModel
from cortex.core.errors import LoadFailedError
from cortex.core.neuron_api import FailedActivation, RetriedActivation
from cortex.neuron import activation
from cortex.neuron.activation import Activator
from cortex.neuron.hub import HubUnreachableError


class FakeJob:
    async def wait(self):
        pass


class FakeLifecycle:
    """Loads whatever its script does not make fail; an error is raised once per entry."""

    def __init__(self, **errors):
        self.errors = {name: list(found) for name, found in errors.items()}
        self.asked = []
        self.states = []
        self.activator = None

    async def load(self, request):
        self.asked.append(request.model_id)
        self.states.append(self.activator.state)
        waiting = self.errors.get(request.model_id)
        if waiting:
            raise waiting.pop(0)
        return FakeJob()


def make(lifecycle, *names):
    lifecycle.activator = Activator(lifecycle, [DefaultModel(model_id=name) for name in names])
    return lifecycle.activator


async def test_default_models_are_loaded_one_after_the_other():
    lifecycle = FakeLifecycle()
    activator = make(lifecycle, "a", "b")
    assert activator.state.state == "pre_warming"
    assert activator.state.pending == ["a", "b"]
    await activator.run()
    assert [each.in_progress for each in lifecycle.states] == ["a", "b"]
    assert lifecycle.states[0].pending == ["b"]
    assert (activator.state.state, activator.state.completed) == ("ready", ["a", "b"])


async def test_a_failure_is_told_and_does_not_stop_the_others():
    lifecycle = FakeLifecycle(a=[LoadFailedError("broken")])
    activator = make(lifecycle, "a", "b")
    await activator.run()
    assert lifecycle.asked == ["a", "b"]
    assert activator.state.failed == [FailedActivation(model_id="a", error="broken")]
    assert activator.state.completed == ["b"]


async def test_a_model_out_of_reach_is_tried_again_after_the_others(monkeypatch):
    attempts = []
    monkeypatch.setattr(activation, "retry_pause_s", lambda at: attempts.append(at) or 0.0)
    lifecycle = FakeLifecycle(a=[HubUnreachableError("down"), HubUnreachableError("down")])
    activator = make(lifecycle, "a", "b")
    await activator.run()
    assert lifecycle.asked == ["a", "b", "a", "a"]
    assert attempts == [0, 1]
    assert activator.state.completed == ["b", "a"]
    assert activator.state.failed == []


async def test_a_model_out_of_reach_says_why_until_it_is_loaded(monkeypatch):
    seen = []

    async def sleep(_):
        seen.append(activator.state)

    monkeypatch.setattr(activation.asyncio, "sleep", sleep)
    lifecycle = FakeLifecycle(a=[HubUnreachableError("down"), HubUnreachableError("still down")])
    activator = make(lifecycle, "a")
    await activator.run()
    assert [each.retried for each in seen] == [
        [RetriedActivation(model_id="a", error="down", attempts=1)],
        [RetriedActivation(model_id="a", error="still down", attempts=2)],
    ]
    assert [(each.state, each.pending) for each in seen] == [("pre_warming", ["a"])] * 2
    assert (activator.state.retried, activator.state.completed) == ([], ["a"])


async def test_without_default_models_the_neuron_is_ready_at_once():
    assert make(FakeLifecycle()).state.state == "ready"
