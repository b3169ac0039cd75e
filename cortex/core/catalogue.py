"""The catalogue (models.toml): which models the fleet offers, and on which hosts they fit."""

from fnmatch import fnmatchcase
from pathlib import Path
from typing import Annotated, Literal

import msgspec
from msgspec import Meta

from cortex.core.command import CommandModel
from cortex.core.config import convert, read_toml
from cortex.core.errors import ConfigError
from cortex.core.neuron_api import Cost, Device, Limit, ToolFormat

DEFAULT_PRIORITY = 100
PINNED_PRIORITY = 1000


class CatalogueModel(msgspec.Struct, kw_only=True, frozen=True, forbid_unknown_fields=True):
    """`[[models]]`: one model on offer.

    Attributes:
        harness: None leaves it to the node: an external engine where it has one configured.
        command: how a node starts the external engine, where nodes allow that.
        vram_mb: what it needs, for placement before any node has measured it.
        min_device_vram_mb: total memory its device must have.
        pinned_on: nodes it belongs on; empty means any.
        residency_priority: a newcomer displaces only models of at most its own priority.
        ttl_s: unloaded after so long without a request; None: the fleet's `[eviction]` value.
        min_resident_s: not evicted before it was loaded so long; None: the fleet's value.
        preload: kept loaded somewhere, without waiting for a request.
        tool_format: how it writes tool calls; None takes what its chat template tells.
        constrain_tools: its tool calls are held to the declared tools; None: the node's value.
    """

    id: Annotated[str, Meta(min_length=1)]
    harness: Literal["torch", "candle", "command"] | None = None
    command: CommandModel | None = None
    vram_mb: Annotated[int, Meta(gt=0)] | None = None
    min_devices: Annotated[int, Meta(ge=1)] = 1
    min_device_vram_mb: Annotated[int, Meta(gt=0)] | None = None
    pinned_on: list[str] = []
    residency_priority: int | None = None
    ttl_s: Annotated[float, Meta(gt=0)] | None = None
    min_resident_s: Annotated[float, Meta(ge=0)] | None = None
    preload: bool = False
    tool_format: ToolFormat | None = None
    constrain_tools: bool | None = None
    source: str | None = None
    limit: Limit | None = None
    cost: Cost | None = None
    capabilities: list[str] = []

    def __post_init__(self) -> None:
        if self.command is not None and self.harness not in (None, "command"):
            raise ValueError(
                f"model {self.id}: a command is for harness `command`, not `{self.harness}`"
            )
        if self.command is not None:
            self._settle(self.command)
        if self.is_external and (self.tool_format or self.constrain_tools is not None):
            raise ValueError(
                f"model {self.id}: tool_format and constrain_tools are for harness `torch`; an "
                "external engine reads tool calls itself"
            )
        if self.min_devices > 1 and not self.is_external:
            raise ValueError(
                f"model {self.id}: min_devices over 1 asks for tensor parallelism, which is not "
                "supported; a model runs on one device"
            )

    def _settle(self, command: CommandModel) -> None:
        """Take from the command what it says of memory and devices."""
        if self.min_devices not in (1, command.span):
            raise ValueError(
                f"model {self.id}: min_devices is {self.min_devices}, and its command spans "
                f"{command.span}; leave min_devices out"
            )
        msgspec.structs.force_setattr(self, "min_devices", command.span)
        if self.vram_mb is None:
            msgspec.structs.force_setattr(self, "vram_mb", command.vram_mb * command.span)

    @property
    def is_external(self) -> bool:
        """Whether somebody else's engine serves it."""
        return self.harness == "command" or self.command is not None

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
        if self.min_device_vram_mb is None and self.min_devices == 1:
            return True
        return len(self.usable_devices(devices)) >= self.min_devices

    def usable_devices(self, devices: list[Device]) -> list[Device]:
        """Return the devices that are large enough for the model's share on each."""
        floor_mb = self.min_device_vram_mb or 0
        return [device for device in devices if device.vram_total_mb >= floor_mb]


class Catalogue(msgspec.Struct, kw_only=True, frozen=True, forbid_unknown_fields=True):
    """models.toml.

    Attributes:
        aliases: name or pattern (`claude-*`) to the model or virtual model it stands for.
        virtual: a name for an ordered list of models; the first that is loaded serves.
        groups: names of sets of models of which a node holds at most one at a time.
    """

    models: list[CatalogueModel] = []
    aliases: dict[str, str] = {}
    virtual: dict[str, Annotated[list[str], Meta(min_length=1)]] = {}
    groups: dict[str, Annotated[list[str], Meta(min_length=2)]] = {}

    def __post_init__(self) -> None:
        seen: set[str] = set()
        for model in self.models:
            if model.id in seen:
                raise ValueError(f"model {model.id} is listed twice")
            seen.add(model.id)
        for alias, target in self.aliases.items():
            if target in self.aliases:
                raise ValueError(f"alias {alias} points at the alias {target}; name the model")
        for name, models in self.virtual.items():
            if name in seen or name in self.aliases:
                raise ValueError(f"virtual model {name} has the name of a model or an alias")
            for each in models:
                if each in self.virtual or each in self.aliases:
                    raise ValueError(f"virtual model {name} holds {each}; it may hold models only")
        self._check_groups()

    def _check_groups(self) -> None:
        kept = {model.id: set(model.pinned_on) for model in self.models if model.preload}
        for name, members in self.groups.items():
            if len(set(members)) != len(members):
                raise ValueError(f"group {name} names a model twice")
            nodes = [kept[each] for each in members if kept.get(each)]
            if any(a == b and len(a) == 1 for at, a in enumerate(nodes) for b in nodes[:at]):
                raise ValueError(f"group {name} holds two models to preload on the same node")

    def find(self, model_id: str) -> CatalogueModel | None:
        """Return the entry of a model id (not of an alias)."""
        return next((model for model in self.models if model.id == model_id), None)

    def targets(self, name: str, *, is_listed: bool = False) -> tuple[str, ...]:
        """Return the models that a name stands for, the preferred one first.

        An exact alias wins over a model's own id, that over a pattern, and of several patterns
        the one with most literal characters.

        Args:
            is_listed: some node lists a model of that very name.
        """
        target = self.aliases.get(name)
        if target is None and name not in self.virtual and not is_listed:
            target = self._pattern(name)
        found = name if target is None else target
        return tuple(self.virtual.get(found) or (found,))

    def resolve(self, name: str) -> str:
        """Return the model id a name stands for, the preferred one of a virtual model."""
        return self.targets(name)[0]

    def _pattern(self, name: str) -> str | None:
        if self.find(name) is not None:
            return None
        matching = [each for each in self.aliases if _is_pattern(each) and fnmatchcase(name, each)]
        best = min(matching, key=lambda each: (-len(each.replace("*", "")), each), default=None)
        return None if best is None else self.aliases[best]

    @property
    def names(self) -> list[str]:
        """Aliases that are no patterns, and virtual models."""
        return [*(each for each in self.aliases if not _is_pattern(each)), *self.virtual]

    def rivals(self, model_id: str) -> frozenset[str]:
        """Return the models that may not be resident on a node beside this one."""
        return frozenset(
            each
            for members in self.groups.values()
            if model_id in members
            for each in members
            if each != model_id
        )


def _is_pattern(name: str) -> bool:
    return any(each in name for each in "*?[")


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
