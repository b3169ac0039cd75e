"""The default models of neuron.toml, loaded one after the other once the neuron answers."""

import asyncio
import logging
from collections.abc import Sequence

from cortex.core.config import DefaultModel
from cortex.core.errors import CortexError, ShuttingDownError
from cortex.core.neuron_api import (
    Activation,
    FailedActivation,
    LoadRequest,
    RetriedActivation,
)
from cortex.neuron.hub import HubUnreachableError, retry_pause_s
from cortex.neuron.lifecycle import Lifecycle

_logger = logging.getLogger(__name__)


class Activator:
    """Loads the default models; `state` tells how far it is."""

    def __init__(self, lifecycle: Lifecycle, models: Sequence[DefaultModel]) -> None:
        self._lifecycle = lifecycle
        self._models = {each.model_id: each for each in models}
        self._pending = list(self._models)
        self._in_progress: str | None = None
        self._completed: list[str] = []
        self._failed: list[FailedActivation] = []
        self._retried: dict[str, RetriedActivation] = {}

    @property
    def state(self) -> Activation:
        """Where it stands."""
        is_ready = not self._pending and self._in_progress is None
        return Activation(
            state="ready" if is_ready else "pre_warming",
            pending=list(self._pending),
            in_progress=self._in_progress,
            completed=list(self._completed),
            failed=list(self._failed),
            retried=list(self._retried.values()),
        )

    async def run(self) -> None:
        """Load them all; those whose repository cannot be reached are tried again, ever later."""
        attempt = 0
        while self._pending:
            for model_id in list(self._pending):
                self._pending.remove(model_id)
                self._in_progress = model_id
                if await self._load(self._models[model_id]):
                    self._retried.pop(model_id, None)
                else:
                    self._pending.append(model_id)
                self._in_progress = None
            if self._pending:
                await asyncio.sleep(retry_pause_s(attempt))
                attempt += 1

    async def _load(self, model: DefaultModel) -> bool:
        """Load one; False if it should be tried again later."""
        request = LoadRequest(
            model_id=model.model_id,
            harness=model.harness,
            source=model.source,
            devices=model.devices,
            max_model_len=model.max_model_len,
            ttl_s=model.ttl_s,
            pinned=model.pinned,
            priority=model.priority,
            tool_format=model.tool_format,
            constrain_tools=model.constrain_tools,
        )
        try:
            job = await self._lifecycle.load(request)
            await job.wait()
        except HubUnreachableError as exc:
            _logger.warning(
                "default model is out of reach; it is tried again",
                extra={"model": model.model_id, "cause": exc.message},
            )
            before = self._retried.get(model.model_id)
            self._retried[model.model_id] = RetriedActivation(
                model_id=model.model_id,
                error=exc.message,
                attempts=1 if before is None else before.attempts + 1,
            )
            return False
        except ShuttingDownError:
            return True
        except CortexError as exc:
            self._failed.append(FailedActivation(model_id=model.model_id, error=exc.message))
            return True
        self._completed.append(model.model_id)
        return True
