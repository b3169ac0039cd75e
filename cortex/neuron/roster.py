"""The one owner of the states of this host's models: who is in memory, moving or failed."""

from collections.abc import Callable

from cortex.core.neuron_api import ModelStatus
from cortex.neuron.harness import Harness
from cortex.neuron.residency import Decision, Happening, Residency, decide
from cortex.neuron.resident import Model

# Failed models that are remembered.
MAX_FAILED = 256


class Roster:
    """The models that are not merely servable; every change of state passes through `apply`.

    Args:
        on_change: called with a model's id when what is to be told of it may have changed.

    Attributes:
        cycles: loads and unloads so far.
    """

    def __init__(self, on_change: Callable[[str], None]) -> None:
        self.cycles = 0
        self._models: dict[str, Model] = {}
        self._on_change = on_change

    def all(self) -> list[Model]:
        """Return all of them."""
        return list(self._models.values())

    def get(self, model_id: str) -> Model | None:
        """Return one of them."""
        return self._models.get(model_id)

    def enter(self, model_id: str, harness: Harness) -> Model:
        """Return a model, which is unloaded if it was not here."""
        return self._models.setdefault(model_id, Model(id=model_id, harness=harness))

    def apply(self, model: Model, event: Happening) -> Decision:
        """Take note of what happened to a model and return what follows from it."""
        decision = decide(model.state, event)
        if decision.state.status != model.state.status:
            self._count(model.state.status, decision.state.status)
        self._set(model, decision.state)
        if decision.state.status == "failed":
            self._bound_failures()
        return decision

    def forget(self, model: Model) -> None:
        """Let go of a model that holds nothing any more."""
        if self._models.get(model.id) is model:
            del self._models[model.id]
            self._on_change(model.id)

    def touched(self, model: Model) -> None:
        """Tell that something else than its state moved."""
        self._on_change(model.id)

    def _set(self, model: Model, state: Residency) -> None:
        model.state = state
        if state.status == "draining":
            model.calm.clear()
        else:
            model.calm.set()
        self._on_change(model.id)

    def _count(self, before: ModelStatus, after: ModelStatus) -> None:
        is_loaded = before == "loading" and after == "loaded"
        is_unloaded = before == "draining" and after == "unloaded"
        self.cycles += is_loaded or is_unloaded

    def _bound_failures(self) -> None:
        failed = [each for each in self._models.values() if each.state.status == "failed"]
        for each in failed[: max(0, len(failed) - MAX_FAILED)]:
            self.forget(each)
