"""What the control plane answers, put together from memory: no file, device or engine is asked."""

from collections.abc import Callable, Iterator, Mapping

import msgspec

from cortex.core.build import version
from cortex.core.command import CommandModel
from cortex.core.embeddings import EMBEDDINGS, TEXT
from cortex.core.neuron_api import (
    VISION,
    Activation,
    DeviceHealth,
    Discovery,
    HostMemory,
    Limit,
    LoadRequest,
    ModelInfo,
    ModelLoad,
    NeuronHealth,
    NeuronSnapshot,
    Servable,
    Version,
)
from cortex.core.openai import ModelCard, ModelList
from cortex.neuron.chat.model import ChatModel
from cortex.neuron.devices import HOST, DeviceMemory
from cortex.neuron.discovery import Monitor, describe_host
from cortex.neuron.engine.protocol import EngineStats
from cortex.neuron.harness import Harness
from cortex.neuron.kernels.build import features
from cortex.neuron.library import Entry
from cortex.neuron.lifecycle import Lifecycle
from cortex.neuron.metrics import GaugeSnapshot
from cortex.neuron.models.facts import ModelFacts
from cortex.neuron.resident import Model

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
            for listing in self._lifecycle.listings()
            for each in listing.values()
            if each.facts is not None
        ]
        longest = max(known, default=0)
        return describe_host(
            self._monitor.hardware,
            self._monitor.reading,
            harnesses=self._lifecycle.harness_names(),
            max_prompt_tokens=min(longest, self._max_model_len or longest),
        )

    def health(self) -> NeuronHealth:
        """Return how this host is doing."""
        return NeuronHealth(
            uptime_secs=int(self._clock() - self._started_s),
            status="draining" if self._lifecycle.is_closing else "ok",
            devices=self.devices(),
            host=self._host(),
            activation=self._activation(),
            models=self.loads(),
            cycles=self._lifecycle.cycles,
        )

    def devices(self) -> list[DeviceHealth]:
        """Return the last reading of the devices, with what is left for loads."""
        memory = {each.index: each for each in self._monitor.reading.memory}
        return [
            msgspec.structs.replace(
                each,
                free_bytes=self._lifecycle.free_bytes(memory[each.index]),
                total_bytes=memory[each.index].total_bytes,
            )
            if each.index in memory
            else each
            for each in self._monitor.reading.devices
        ]

    def _host(self) -> HostMemory | None:
        memory = self._host_reading()
        if memory is None:
            return None
        return HostMemory(
            free_bytes=self._lifecycle.free_bytes(memory), total_bytes=memory.total_bytes
        )

    def _host_reading(self) -> DeviceMemory | None:
        found = (each for each in self._monitor.reading.memory if each.index == HOST)
        return next(found, None)

    def version(self) -> Version:
        """Return what this program is."""
        return msgspec.structs.replace(version(), features=features())

    def snapshot(self) -> NeuronSnapshot:
        """Return everything a gateway keeps of this host."""
        return NeuronSnapshot(
            models=self.models(),
            health=self.health(),
            discovery=self.discovery(),
            version=self.version(),
        )

    def loads(self) -> list[ModelLoad]:
        """Return the work in hand of each model with an engine."""
        now_s = self._clock()
        return [
            _load(each, now_s)
            for each in self._lifecycle.models()
            if each.engine is not None or each.state.is_recycling
        ]

    def models(self) -> list[ModelInfo]:
        """Return every model this host serves or could serve, by name."""
        ids = {each.id for each in self._lifecycle.models()}
        ids.update(*self._lifecycle.listings())
        return [info for info in map(self.model, sorted(ids)) if info is not None]

    def model(self, model_id: str) -> ModelInfo | None:
        """Return one of them."""
        resident = self._lifecycle.model(model_id)
        harness = self._lifecycle.harness_of(model_id) if resident is None else resident.harness
        entry = harness.find(model_id)
        if resident is not None:
            return self._resident(resident, resident.entry or entry)
        return None if entry is None else self._servable(harness, entry)

    def residents(self) -> Iterator[ModelInfo]:
        """Return those that are loaded, moving or failed."""
        for each in self._lifecycle.models():
            yield self._resident(each, each.entry or each.harness.find(each.id))

    def listings(self) -> list[Mapping[str, Entry]]:
        """Return what the list of models is made of besides the residents; new ones are anew."""
        return self._lifecycle.listings()

    def cards(self) -> ModelList:
        """Return the same as OpenAI clients list it."""
        return ModelList(data=[_card(info) for info in self.models()])

    def gauges(self) -> GaugeSnapshot:
        """Return what a scrape shows."""
        return GaugeSnapshot(
            statuses={each.id: each.state.status for each in self._lifecycle.models()},
            models=self.loads(),
            devices=self.devices(),
            unaccounted=self._lifecycle.drift(self._monitor.reading),
        )

    def _servable(self, harness: Harness, entry: Entry) -> ModelInfo:
        facts, command = entry.facts, entry.command
        tool_call, reasoning = _traits(None, command)
        error = None if entry.error is None else entry.error.message
        return ModelInfo(
            id=entry.id,
            harness=harness.name,
            status="unloaded",
            weight_bytes=None if facts is None else facts.weight_bytes,
            need_bytes=self._need_bytes(harness, entry),
            num_devices=1 if command is None else command.span,
            capabilities=_capabilities(command, facts),
            limit=self._limit(None, entry),
            tool_call=tool_call,
            reasoning=reasoning,
            servable=None if error is None else _unservable("unreadable_checkpoint", error),
            error=error,
        )

    def _resident(self, model: Model, entry: Entry | None) -> ModelInfo:
        facts = None if entry is None else entry.facts
        now_s = self._clock()
        claim, loaded = self._lifecycle.claim(model.id), model.loaded
        # An engine that is started again takes requests: they wait for it.
        is_recycling = model.state.is_recycling
        status = "loaded" if is_recycling else model.state.status
        error = None if model.state.error is None else model.state.error.message
        command = None if entry is None else entry.command
        tool_call, reasoning = _traits(model.chat, command)
        is_loading = is_recycling or status in ("loading", "recovering")
        last_used_s = model.last_used_s
        need = self._need_bytes(model.harness, entry)
        if claim is not None:
            need = claim.num_bytes * len(claim.devices)
        return ModelInfo(
            id=model.id,
            harness=model.harness.name,
            status=status,
            devices=[] if claim is None or claim.device == HOST else list(claim.devices),
            num_devices=1 if command is None else command.span,
            vram_used_mb=None if claim is None else claim.num_bytes // MIB * len(claim.devices),
            weight_bytes=None if facts is None else facts.weight_bytes,
            cache_bytes=None if loaded is None or claim is None else loaded.cache_bytes,
            prefix_match=None if loaded is None else loaded.prefix_match,
            need_bytes=need,
            capabilities=_capabilities(command, facts),
            limit=self._limit(model, entry),
            tool_call=tool_call,
            reasoning=reasoning,
            servable=_recycling() if is_recycling else _servable(status, error),
            progress=model.job.progress if is_loading and model.job is not None else None,
            error=error,
            in_flight=model.in_flight,
            last_used_s=None if last_used_s is None else now_s - last_used_s,
            resident_s=now_s - model.loaded_s if model.loaded_s and model.engine else None,
            idle_unload_in_s=model.unload_in_s(now_s),
            evictable_in_s=model.evictable_in_s(now_s),
            engine_cycles=self._lifecycle.cycles - model.cycles_at_start if model.engine else None,
            ttl_s=model.policy.ttl_s,
            min_resident_s=model.policy.min_resident_s,
            pinned=model.policy.pinned,
            priority=model.policy.priority,
        )

    def _need_bytes(self, harness: Harness, entry: Entry | None) -> int | None:
        wish = None if entry is None else harness.wish(entry, LoadRequest(model_id=entry.id))
        each = None if wish is None else self._lifecycle.need_bytes(wish)
        return None if each is None or wish is None else each * wish.num_devices

    def _limit(self, model: Model | None, entry: Entry | None) -> Limit | None:
        if model is not None and model.chat is not None:
            return Limit(context=model.chat.max_model_len)
        if entry is not None and entry.command is not None:
            loaded = None if model is None else model.loaded
            context = entry.command.context if loaded is None else loaded.max_model_len or None
            return None if context is None else Limit(context=context)
        if entry is None or entry.facts is None:
            return None
        longest = entry.facts.max_position_embeddings
        return Limit(context=min(longest, self._max_model_len or longest))


def _capabilities(command: CommandModel | None, facts: ModelFacts | None) -> list[str]:
    """Return what a model takes and gives; nothing where that is not known yet."""
    if command is not None:
        return command.capabilities
    if facts is None:
        return []
    if facts.embedding is not None:
        return [EMBEDDINGS]
    return [TEXT, VISION] if facts.takes_images else [TEXT]


def _traits(
    chat: ChatModel | None, command: CommandModel | None
) -> tuple[bool | None, bool | None]:
    """Return whether a model can call tools and whether it can think, None where nobody says."""
    if command is not None:
        return command.tool_call, command.reasoning
    if chat is not None and chat.template is not None:
        return chat.supports_tools, chat.template.supports_thinking
    return None, None


def _servable(status: str, error: str | None) -> Servable:
    return Servable(ok=True) if status == "loaded" else _unservable(status, error)


def _recycling() -> Servable:
    return Servable(
        ok=True, reason="recycling", detail="the engine is started again; requests wait for it"
    )


def _unservable(reason: str, detail: str | None) -> Servable:
    return Servable(ok=False, reason=reason, detail=detail)


def _load(model: Model, now_s: float) -> ModelLoad:
    admission, engine = model.admission, model.engine
    stats = EngineStats() if engine is None else engine.stats
    return ModelLoad(
        id=model.id,
        in_flight=model.in_flight,
        queue_depth=0 if admission is None else admission.queue_depth,
        max_in_flight=0 if admission is None else admission.max_in_flight,
        max_queue_depth=0 if admission is None else admission.max_queue_depth,
        free_slots=stats.free_slots,
        free_kv_blocks=stats.free_blocks,
        cached_kv_blocks=stats.cached_blocks,
        kept_states=stats.num_snapshots,
        total_kv_blocks=0 if model.loaded is None else model.loaded.num_kv_blocks,
        rejected_queue_full=0 if admission is None else admission.rejected_queue_full,
        rejected_timeout=0 if admission is None else admission.rejected_timeout,
        tok_s_prefill=stats.tok_s_prefill,
        tok_s_decode=stats.tok_s_decode,
        num_requests=model.num_requests,
        last_used_s=None if model.last_used_s is None else now_s - model.last_used_s,
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
