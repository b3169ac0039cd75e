"""What the control plane answers, put together from memory: no file, device or engine is asked."""

from collections.abc import Callable

from cortex.core.neuron_api import (
    Activation,
    Discovery,
    Limit,
    ModelInfo,
    ModelLoad,
    NeuronHealth,
    Servable,
)
from cortex.core.openai import ModelCard, ModelList
from cortex.neuron.chat.model import ChatModel
from cortex.neuron.devices import HOST
from cortex.neuron.discovery import Monitor, describe_host
from cortex.neuron.library import Entry
from cortex.neuron.lifecycle import Lifecycle
from cortex.neuron.metrics import GaugeSnapshot
from cortex.neuron.resident import Model

HARNESS = "torch"
MIB = 1 << 20


class Views:
    """The answers of `GET /discovery`, `/health`, `/models` and `/v1/models`.

    Args:
        max_model_len: the operator's bound on context, None without one.
        clock: monotonic seconds.
    """

    def __init__(
        self,
        *,
        lifecycle: Lifecycle,
        monitor: Monitor,
        activation: Callable[[], Activation],
        max_model_len: int | None,
        clock: Callable[[], float],
    ) -> None:
        self._lifecycle = lifecycle
        self._monitor = monitor
        self._activation = activation
        self._max_model_len = max_model_len
        self._clock = clock
        self._started_s = clock()

    def discovery(self) -> Discovery:
        """Return what this host is."""
        known = [
            each.facts.max_position_embeddings
            for each in self._lifecycle.library.entries.values()
            if each.facts is not None
        ]
        longest = max(known, default=0)
        return describe_host(
            self._monitor.hardware,
            self._monitor.reading,
            harnesses=[HARNESS],
            max_prompt_tokens=min(longest, self._max_model_len or longest),
        )

    def health(self) -> NeuronHealth:
        """Return how this host is doing."""
        return NeuronHealth(
            uptime_secs=int(self._clock() - self._started_s),
            status="draining" if self._lifecycle.is_closing else "ok",
            devices=self._monitor.reading.devices,
            activation=self._activation(),
            models=self.loads(),
        )

    def loads(self) -> list[ModelLoad]:
        """Return the work in hand of each model with an engine."""
        return [_load(each) for each in self._lifecycle.models() if each.engine is not None]

    def models(self) -> list[ModelInfo]:
        """Return every model this host serves or could serve, by name."""
        residents = {each.id: each for each in self._lifecycle.models()}
        entries = self._lifecycle.library.entries
        return [
            self._info(model_id, residents.get(model_id), entries.get(model_id))
            for model_id in sorted({*residents, *entries})
        ]

    def model(self, model_id: str) -> ModelInfo | None:
        """Return one of them."""
        resident = self._lifecycle.model(model_id)
        entry = self._lifecycle.library.find(model_id)
        if resident is None and entry is None:
            return None
        return self._info(model_id if resident or not entry else entry.id, resident, entry)

    def cards(self) -> ModelList:
        """Return the same as OpenAI clients list it."""
        return ModelList(data=[_card(info) for info in self.models()])

    def gauges(self) -> GaugeSnapshot:
        """Return what a scrape shows."""
        return GaugeSnapshot(
            statuses={each.id: each.state.status for each in self._lifecycle.models()},
            models=self.loads(),
            devices=self._monitor.reading.devices,
        )

    def _info(self, model_id: str, model: Model | None, entry: Entry | None) -> ModelInfo:
        entry = model.entry if model is not None and model.entry is not None else entry
        facts = None if entry is None else entry.facts
        if model is None:
            error = None if entry is None or entry.error is None else entry.error.message
            return ModelInfo(
                id=model_id,
                harness=HARNESS,
                status="unloaded",
                weight_bytes=None if facts is None else facts.weight_bytes,
                capabilities=["text"],
                limit=self._limit(None, entry),
                servable=None if error is None else _unservable("unreadable_checkpoint", error),
                error=error,
            )
        claim, status = model.claim, model.state.status
        error = None if model.state.error is None else model.state.error.message
        template = None if model.chat is None else model.chat.template
        is_loading = status in ("loading", "recovering")
        last_used_s = model.last_used_s
        return ModelInfo(
            id=model_id,
            harness=HARNESS,
            status=status,
            devices=[] if claim is None or claim.device == HOST else [claim.device],
            vram_used_mb=None if claim is None else claim.num_bytes // MIB,
            weight_bytes=None if facts is None else facts.weight_bytes,
            capabilities=["text"],
            limit=self._limit(model.chat, entry),
            tool_call=None if template is None else template.supports_tools,
            reasoning=None if template is None else template.supports_thinking,
            servable=Servable(ok=True) if status == "loaded" else _unservable(status, error),
            progress=model.job.progress if is_loading and model.job is not None else None,
            error=error,
            in_flight=model.in_flight,
            last_used_s=None if last_used_s is None else self._clock() - last_used_s,
        )

    def _limit(self, chat: ChatModel | None, entry: Entry | None) -> Limit | None:
        if chat is not None:
            return Limit(context=chat.max_model_len)
        if entry is None or entry.facts is None:
            return None
        longest = entry.facts.max_position_embeddings
        return Limit(context=min(longest, self._max_model_len or longest))


def _unservable(reason: str, detail: str | None) -> Servable:
    return Servable(ok=False, reason=reason, detail=detail)


def _load(model: Model) -> ModelLoad:
    admission, engine = model.admission, model.engine
    assert engine is not None
    stats = engine.stats
    return ModelLoad(
        id=model.id,
        in_flight=model.in_flight,
        queue_depth=0 if admission is None else admission.queue_depth,
        max_in_flight=0 if admission is None else admission.max_in_flight,
        max_queue_depth=0 if admission is None else admission.max_queue_depth,
        free_slots=stats.free_slots,
        free_kv_blocks=stats.free_blocks,
        total_kv_blocks=0 if model.loaded is None else model.loaded.num_kv_blocks,
        rejected_queue_full=0 if admission is None else admission.rejected_queue_full,
        rejected_timeout=0 if admission is None else admission.rejected_timeout,
        tok_s_prefill=stats.tok_s_prefill,
        tok_s_decode=stats.tok_s_decode,
    )


def _card(info: ModelInfo) -> ModelCard:
    context = None if info.limit is None else info.limit.context
    return ModelCard(
        id=info.id,
        loaded=info.status == "loaded",
        status=info.status,
        capabilities=info.capabilities,
        limit=info.limit,
        tool_call=info.tool_call,
        reasoning=info.reasoning,
        max_model_len=context,
    )
