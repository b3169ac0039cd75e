"""How many callers may wait for a model: all who have a request open, beyond the model's seats."""

from collections.abc import Callable

from cortex.core.errors import QueueFullError
from cortex.gateway.fleet import FleetSnapshot

# When a caller who found a busy model's queue full may come again.
BUSY_RETRY_S = 2.0
COLD_RETRY_S = 5.0


def seats(snapshot: FleetSnapshot, model_id: str) -> int | None:
    """Return how many requests the loaded replicas work on at once, None where one has not said."""
    found = 0
    for node in snapshot.nodes:
        if node.status(model_id) != "loaded" or not node.usable:
            continue
        load = node.loads.get(model_id)
        if load is None or load.max_in_flight <= 0:
            return None
        found += load.max_in_flight
    return found


def seconds_left(snapshot: FleetSnapshot, model_id: str) -> float | None:
    """Return how long the model's load that ends first still takes, None where nobody knows."""
    known = [
        info.progress.seconds_left
        for node in snapshot.nodes
        if (info := node.models.get(model_id)) is not None
        and info.status == "loading"
        and info.progress is not None
        and info.progress.seconds_left is not None
    ]
    return min(known, default=None)


class Queues:
    """Counts the callers of each model, from their arrival to the end of their answer."""

    def __init__(self) -> None:
        self._open: dict[str, int] = {}

    def enter(self, model_id: str, look: Callable[[], FleetSnapshot], max_waiting: int) -> None:
        """Count a caller.

        Args:
            look: returns the fleet; called only where the bound may be reached.

        Raises:
            QueueFullError: `max_waiting` callers wait for the model already.
        """
        held = self._open.get(model_id, 0)
        # No more can wait than are here, so that this is all there is to do when few are.
        if held >= max_waiting:
            snapshot = look()
            places = seats(snapshot, model_id)
            if places is not None and held >= places + max_waiting:
                raise _full(snapshot, model_id, places, max_waiting)
        self._open[model_id] = held + 1

    def leave(self, model_id: str) -> None:
        """Take a caller back that was counted."""
        left = self._open[model_id] - 1
        if left:
            self._open[model_id] = left
        else:
            del self._open[model_id]


def _full(snapshot: FleetSnapshot, model_id: str, places: int, max_waiting: int) -> QueueFullError:
    if places:
        return QueueFullError(
            f"{max_waiting} callers wait for model '{model_id}' already, beside the {places} it "
            "works on; try again shortly",
            retry_after_s=BUSY_RETRY_S,
        )
    left_s = seconds_left(snapshot, model_id)
    return QueueFullError(
        f"{max_waiting} callers wait for model '{model_id}' to be loaded already; try again",
        retry_after_s=COLD_RETRY_S if left_s is None else max(1.0, left_s),
    )
