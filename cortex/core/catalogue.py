"""The catalogue (models.toml): which models the fleet offers, and on which hosts they fit."""

from pathlib import Path
from typing import Annotated

import msgspec
from msgspec import Meta

from cortex.core.config import convert, read_toml
from cortex.core.errors import ConfigError
from cortex.core.neuron_api import Cost, Device, Limit

DEFAULT_PRIORITY = 100
PINNED_PRIORITY = 1000


class CatalogueModel(msgspec.Struct, kw_only=True, frozen=True, forbid_unknown_fields=True):
    """`[[models]]`: one model on offer.

    Attributes:
        vram_mb: what it needs, for placement before any node has measured it.
        min_device_vram_mb: total memory its device must have.
        pinned_on: nodes it belongs on; empty means any.
        residency_priority: a newcomer displaces only models of at most its own priority.
    """

    id: Annotated[str, Meta(min_length=1)]
    harness: str = "torch"
    vram_mb: Annotated[int, Meta(gt=0)] | None = None
    min_devices: Annotated[int, Meta(ge=1)] = 1
    min_device_vram_mb: Annotated[int, Meta(gt=0)] | None = None
    pinned_on: list[str] = []
    residency_priority: int | None = None
    source: str | None = None
    limit: Limit | None = None
    cost: Cost | None = None
    capabilities: list[str] = []

    def __post_init__(self) -> None:
        if self.harness not in ("torch", "candle"):
            raise ValueError(f"model {self.id}: harness `{self.harness}` is unknown; use `torch`")
        if self.min_devices > 1:
            raise ValueError(
                f"model {self.id}: min_devices over 1 asks for tensor parallelism, which is not "
                "supported; a model runs on one device"
            )

    @property
    def priority(self) -> int:
        """The residency priority, with the defaults for pinned and other models."""
        if self.residency_priority is not None:
            return self.residency_priority
        return PINNED_PRIORITY if self.pinned_on else DEFAULT_PRIORITY

    def feasible_on(self, node: str, devices: list[Device]) -> bool:
        """Whether a node of these devices could ever hold the model."""
        if self.pinned_on and node not in self.pinned_on:
            return False
        if self.min_device_vram_mb is None:
            return True
        return any(device.vram_total_mb >= self.min_device_vram_mb for device in devices)


class Catalogue(msgspec.Struct, kw_only=True, frozen=True, forbid_unknown_fields=True):
    """models.toml."""

    models: list[CatalogueModel] = []
    aliases: dict[str, str] = {}

    def __post_init__(self) -> None:
        seen: set[str] = set()
        for model in self.models:
            if model.id in seen:
                raise ValueError(f"model {model.id} is listed twice")
            seen.add(model.id)
        for alias, target in self.aliases.items():
            if target in self.aliases:
                raise ValueError(f"alias {alias} points at the alias {target}; name the model")

    def find(self, model_id: str) -> CatalogueModel | None:
        """Return the entry of a model id (not of an alias)."""
        return next((model for model in self.models if model.id == model_id), None)

    def resolve(self, name: str) -> str:
        """Return the model id an alias stands for, or the name itself."""
        return self.aliases.get(name, name)


_REFUSED = {
    "models[].quant": "in-place quantisation is not supported; list a GGUF file's id instead",
}


def load_catalogue(path: Path | None) -> Catalogue:
    """Read models.toml (None: an empty catalogue).

    Raises:
        ConfigError: the file is missing or an entry cannot be used.
    """
    if path is None:
        return Catalogue()
    if not path.exists():
        raise ConfigError(
            f"{path}: the catalogue named by `models_config` does not exist; create it, or "
            "remove the key to serve what the neurons list by themselves"
        )
    return convert(read_toml(path), Catalogue, _REFUSED, str(path))
