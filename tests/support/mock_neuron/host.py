"""What a mock node's host is: its devices and models, what they hold, and what is said of them."""

from typing import Literal

from cortex.core.neuron_api import (
    Device,
    DeviceHealth,
    Discovery,
    ModelInfo,
    ModelLoad,
    NeuronHealth,
)
from tests.support.mock_neuron.engine import Timebase
from tests.support.mock_neuron.script import GIB, MockModel


class Host:
    """Models on devices, as the API tells them.

    Attributes:
        status: `draining` while it takes nothing new.
        cycles: loads and unloads so far.
    """

    def __init__(
        self,
        *models: MockModel,
        total_bytes: int = 64 * GIB,
        num_devices: int = 1,
        time_scale: float = 1.0,
    ) -> None:
        self.models = {model.id: model for model in models}
        self.total_bytes = total_bytes
        self.devices = [
            Device(index=index, name="Mock", vram_total_mb=total_bytes >> 20)
            for index in range(num_devices)
        ]
        self.status: Literal["ok", "draining"] = "ok"
        self.time = Timebase(time_scale)
        self.cycles = 0
        self.tick = 0

    @property
    def free_bytes(self) -> int:
        """Memory of the emptiest device that no model holds."""
        return max(self.free_on(device.index) for device in self.devices)

    def free_on(self, device: int) -> int:
        """Memory of a device that no model holds; never negative."""
        held = sum(
            model.memory_bytes
            for model in self.models.values()
            if model.holds_memory and model.device == device
        )
        assert held <= self.total_bytes, f"device {device} is overbooked"
        return self.total_bytes - held

    def discovery(self) -> Discovery:
        """Return what the host is."""
        return Discovery(hostname="mock", devices=self.devices, memory_total_mb=65536)

    def health(self) -> NeuronHealth:
        """Return the work in hand and the devices' readings."""
        loads = [self.load_of(model) for model in self.models.values() if model.status == "loaded"]
        devices = []
        for device in self.devices:
            used_mb = (self.total_bytes - self.free_on(device.index)) >> 20
            devices.append(
                DeviceHealth(
                    index=device.index,
                    vram_used_mb=used_mb,
                    vram_free_mb=device.vram_total_mb - used_mb,
                    utilization_pct=12,
                    temp_c=40,
                )
            )
        return NeuronHealth(uptime_secs=1, status=self.status, devices=devices, models=loads)

    def load_of(self, model: MockModel) -> ModelLoad:
        """Return a loaded model's work in hand."""
        engine = model.running
        if engine is None:
            return ModelLoad(
                id=model.id,
                in_flight=model.requests,
                queue_depth=model.queue_depth,
                max_in_flight=8,
                max_queue_depth=64,
                free_slots=8 - model.requests,
                rejected_queue_full=3,
                tok_s_decode=50.0,
            )
        spec = engine.spec
        return ModelLoad(
            id=model.id,
            in_flight=engine.in_flight,
            queue_depth=engine.queue_depth,
            max_in_flight=spec.max_num_seqs,
            max_queue_depth=spec.max_queue_depth,
            free_slots=spec.max_num_seqs - engine.in_flight,
            free_kv_blocks=engine.cache.free_blocks,
            total_kv_blocks=spec.num_blocks,
            rejected_queue_full=engine.rejected,
            tok_s_prefill=spec.prefill_tok_s,
            tok_s_decode=1 / (spec.step_s + spec.step_per_seq_s),
        )

    def info(self, model: MockModel) -> ModelInfo:
        """Return a model as the listing has it."""
        return ModelInfo(
            id=model.id,
            harness="torch",
            status=model.status,
            devices=[model.device] if model.holds_memory else [],
            weight_bytes=model.memory_bytes,
            capabilities=model.capabilities,
            limit=model.limit,
            servable=model.servable,
            progress=model.progress,
            error=model.error,
            in_flight=model.requests,
            last_used_s=self.idle_s(model),
            resident_s=self.resident_s(model),
            engine_cycles=self.cycles - model.cycles_at_start if model.holds_memory else None,
            ttl_s=model.wish.ttl_s,
            min_resident_s=model.wish.min_resident_s,
            pinned=model.wish.pinned,
            priority=model.wish.priority,
            prefix_match=_prefix_match(model),
        )

    def resident_s(self, model: MockModel) -> float | None:
        if model.status != "loaded" or model.loaded_s is None:
            return None
        return self.time.now_s() - model.loaded_s

    def may_leave(self, model: MockModel) -> bool:
        """Whether a model may be evicted: idle, not pinned, and there for long enough."""
        resident_s = self.resident_s(model)
        return (
            model.status == "loaded"
            and model.requests == 0
            and not model.wish.pinned
            and (resident_s is None or resident_s >= model.wish.min_resident_s)
        )

    def idle_s(self, model: MockModel) -> float | None:
        return None if model.used_tick is None else float(self.tick - model.used_tick)


def _prefix_match(model: MockModel) -> Literal["block", "snapshot"] | None:
    if model.engine is None:
        return None
    return "block" if model.engine.snapshot_tokens is None else "snapshot"
