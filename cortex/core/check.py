"""Whether configuration files can be used, without starting anything."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import msgspec

from cortex.core.catalogue import Catalogue, load_catalogue
from cortex.core.config import (
    GatewayConfig,
    NeuronConfig,
    load_gateway_config,
    load_neuron_config,
    parse_address,
    read_toml,
)
from cortex.core.errors import ConfigError
from cortex.core.trust import Trust

Kind = Literal["gateway", "catalogue", "neuron"]

CONFIG_DIR = Path("/etc/cortex")
NAMES: Mapping[str, Kind] = {
    "cortex.toml": "gateway",
    "models.toml": "catalogue",
    "neuron.toml": "neuron",
}
_STRUCTS: Mapping[Kind, type[msgspec.Struct]] = {
    "gateway": GatewayConfig,
    "catalogue": Catalogue,
    "neuron": NeuronConfig,
}
_READABLE_BY_ALL = 0o004


class Verdict(msgspec.Struct, kw_only=True, frozen=True):
    """What is to be said of one file.

    Attributes:
        kind: whose configuration it is; None where it cannot be told.
        summary: what it configures, "" where it cannot be used.
        error: why it cannot be used, with the way out.
        key: path of the wrong key, where one is to blame.
        warnings: what can be used and is hardly meant.
    """

    file: str
    kind: Kind | None = None
    ok: bool
    summary: str = ""
    error: str | None = None
    key: str | None = None
    warnings: list[str] = []


def default_files(folder: Path = CONFIG_DIR) -> list[Path]:
    """Return the configuration files that are in a folder."""
    return [folder / name for name in NAMES if (folder / name).exists()]


def check_files(paths: Sequence[Path]) -> list[Verdict]:
    """Read each file as the service would, with overrides from the environment.

    The catalogue of a cortex.toml is checked along with it.
    """
    verdicts: dict[Path, Verdict] = {}
    for path in paths:
        verdicts[path.absolute()] = check_file(path)
        named = _catalogue_of(path, verdicts[path.absolute()])
        if named is not None and named not in {each.absolute() for each in paths}:
            verdicts.setdefault(named, check_file(named, "catalogue"))
    return list(verdicts.values())


def check_file(path: Path, kind: Kind | None = None) -> Verdict:
    """Return the verdict on one file.

    Args:
        kind: whose configuration it is; by default its name tells, else what is in it.
    """
    try:
        tables = read_toml(path)
        kind = kind or kind_of(path, tables)
        summary, warnings = _READERS[kind](path)
    except ConfigError as exc:
        # The message begins with the file, which the verdict names by itself.
        error = exc.message.removeprefix(f"{path}: ")
        return Verdict(file=str(path), kind=kind, ok=False, error=error, key=exc.param)
    return Verdict(
        file=str(path),
        kind=kind,
        ok=True,
        summary=summary,
        warnings=[*warnings, *_exposed_secrets(path, tables)],
    )


def kind_of(path: Path, tables: Mapping[str, Any]) -> Kind:
    """Return whose configuration a file is: its name tells, else the keys at its top.

    Raises:
        ConfigError: neither does.
    """
    if path.name in NAMES:
        return NAMES[path.name]
    shared = {field.name for field in msgspec.structs.fields(Trust)}
    fits: list[Kind] = []
    for kind, struct in _STRUCTS.items():
        own = {field.name for field in msgspec.structs.fields(struct)} - shared
        if own & set(tables):
            fits.append(kind)
    if len(fits) == 1:
        return fits[0]
    found = " and ".join(fits) or "none"
    raise ConfigError(
        f"{path}: neither its name nor its keys tell whose configuration it is (keys of: {found}); "
        f"call it {', '.join(NAMES)}, or keep to the keys of one"
    )


def _read_gateway(path: Path) -> tuple[str, list[str]]:
    config = load_gateway_config(path)
    for key in ("listen", "metrics_listen"):
        address = getattr(config.gateway, key)
        try:
            parse_address(address, f"{path}: gateway.{key}")
        except ConfigError as exc:
            raise ConfigError(exc.message, param=f"gateway.{key}") from exc
    warnings = [] if config.neurons else ["no [[neurons]]: there is nothing to serve"]
    named = config.models_config
    if named is not None and Path(named).exists():
        warnings += _unknown_nodes(config, Path(named))
    return f"gateway on {config.gateway.listen}, {_count(config.neurons, 'neuron')}", warnings


def _unknown_nodes(config: GatewayConfig, catalogue: Path) -> list[str]:
    """Return a warning for each model that is pinned on a node that does not exist."""
    try:
        models = load_catalogue(catalogue).models
    except ConfigError:
        return []  # has a verdict of its own
    names = {neuron.name for neuron in config.neurons}
    return [
        f"{catalogue.name}: {model.id} is pinned on '{node}', and no [[neurons]] has that name"
        for model in models
        for node in model.pinned_on
        if node not in names
    ]


def _read_catalogue(path: Path) -> tuple[str, list[str]]:
    catalogue = load_catalogue(path)
    known = {model.id for model in catalogue.models} | set(catalogue.virtual)
    # An alias may also stand for what a neuron finds by itself, so this is no error.
    warnings = [
        f"alias '{alias}' stands for '{target}', which is not listed here; it serves only where a "
        "neuron lists it"
        for alias, target in catalogue.aliases.items()
        if target not in known
    ]
    aliases = _count(catalogue.aliases, "alias", "aliases")
    return f"{_count(catalogue.models, 'model')}, {aliases}", warnings


def _read_neuron(path: Path) -> tuple[str, list[str]]:
    config = load_neuron_config(path)
    engines = _count(config.harness.command.models, "external engine")
    defaults = _count(config.default_models, "default model")
    return f"neuron on {config.host}:{config.port}, {defaults}, {engines}", []


_READERS = {"gateway": _read_gateway, "catalogue": _read_catalogue, "neuron": _read_neuron}


def _catalogue_of(path: Path, verdict: Verdict) -> Path | None:
    """Return the catalogue that a usable cortex.toml names."""
    if verdict.kind != "gateway" or not verdict.ok:
        return None
    named = load_gateway_config(path).models_config
    return None if named is None else Path(named)


def _exposed_secrets(path: Path, tables: Mapping[str, Any]) -> list[str]:
    """Return a warning where everybody on this host can read a secret that the file holds."""
    entitlements = tables.get("entitlements")
    keys = entitlements.get("keys", []) if isinstance(entitlements, dict) else []
    has_secret = "fleet_secret" in tables or any("key" in key for key in keys)
    if has_secret and path.stat().st_mode & _READABLE_BY_ALL:
        return [f"it holds a secret and everybody may read it; chmod 640 {path}"]
    return []


def _count(things: Sequence[object] | Mapping[str, object], one: str, many: str = "") -> str:
    return f"{len(things)} {one if len(things) == 1 else many or f'{one}s'}"
